"""KTransformers' file: by its choice of the highest sums exactly the chosen set is served."""

import json

import numpy as np
import pytest
from engines_files import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from make import trace_of

import moetuner as mt
from moetuner.formats import pickled
from moetuner.formats.hints import Hints
from moetuner.formats.ktransformers import choose_gpu_experts, write_chosen


def served(path, count):
    """Give the experts that kt-kernel keeps on the GPU: the highest sums of all hidden layers."""
    counts = pickled.load(path)["logical_count"].array()
    assert counts.ndim == 3
    sums = counts.sum(axis=0).astype(np.float32)
    first = np.argsort(-sums, axis=None)[:count]
    assert sums.ravel()[first[-1]] > np.delete(sums, first).max(initial=-1)  # no tie decides
    chosen = np.zeros(sums.size, dtype=bool)
    chosen[first] = True
    return chosen.reshape(sums.shape)


@given(st.integers(0, 1 << 30), st.integers(1, 5), st.booleans(), st.sets(st.integers(0, 4)))
def test_the_chosen_set_is_served(tmp_path_factory, seed, count, each_layer, dense):
    """Whatever the loads, ties and dense layers: those that are chosen, and no dense row."""
    load = np.random.default_rng(seed).integers(0, 5, (3, 6))
    chosen = choose_gpu_experts(load, count, each_layer=each_layer)
    assert chosen.sum() == 3 * count
    dense = tuple(sorted(dense))[:2]
    path = tmp_path_factory.mktemp("kt") / "experts.pt"
    hidden = 3 + len(dense)
    write_chosen(chosen, path, Hints(dense_layers=[layer for layer in dense if layer < hidden]))
    actual = served(path, 3 * count)
    moe = [layer for layer in range(len(actual)) if layer not in dense]
    assert np.array_equal(actual[moe], chosen)
    assert not actual[[*set(range(len(actual))) - set(moe)]].any()


@given(st.integers(0, 1 << 30), st.integers(1, 5))
def test_those_chosen_most_often_are_taken(seed, count):
    """Of all layers no other set takes more; of each layer none of its own."""
    load = np.random.default_rng(seed).integers(0, 9, (3, 5))
    together, each = (choose_gpu_experts(load, count, each_layer=flag) for flag in (False, True))
    assert load[together].sum() == np.sort(load, axis=None)[::-1][: 3 * count].sum()
    assert each.sum(axis=1).tolist() == [count] * 3
    assert np.array_equal(
        (load * each).sum(axis=1), np.sort(load, axis=1)[:, ::-1][:, :count].sum(axis=1)
    )


def test_torch_opens_it(tmp_path):
    """As weights alone, as KTransformers does."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "experts.pt"
    write_chosen(np.array([[True, False], [False, True]]), path, Hints(dense_layers=(1,)))
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert list(content) == ["logical_count", "chosen_experts"]
    assert content["logical_count"].tolist() == [[[2, 1], [0, 0], [1, 2]]]


def test_it_is_no_recording(tmp_path):
    """Its counts say what was chosen, and not how often."""
    path = tmp_path / "experts.pt"
    write_chosen(np.eye(3, dtype=bool), path, Hints(dense_layers=()))
    with pytest.raises(ValueError, match="must be recorded counts, got which experts a GPU holds"):
        mt.open_input(path)


def test_the_same_set_gives_the_same_bytes(tmp_path):
    """No time of day is in the file."""
    for name in ("a.pt", "b.pt"):
        write_chosen(np.eye(3, dtype=bool), tmp_path / name, Hints(dense_layers=()))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_layers_are_asked_for(tmp_path):
    """Which hidden layers are dense is not guessed, nor is another ending written."""
    chosen = np.eye(3, dtype=bool)
    with pytest.raises(ValueError, match="dense_layers is needed"):
        write_chosen(chosen, tmp_path / "a.pt", Hints())
    write_chosen(chosen, tmp_path / "a.pt", Hints(hidden_layers=3))
    with pytest.raises(ValueError, match=r"must end in \.pt"):
        write_chosen(chosen, tmp_path / "a.json", Hints(dense_layers=()))


def test_export_finds_what_the_set_takes_of_unseen_traffic(ok, tmp_path):
    """Its own share, and that of one half chosen by the other."""
    ids = np.random.default_rng(0).integers(0, 4, (400, 2, 1))
    ids[:, :, 0] *= np.random.default_rng(1).integers(0, 2, (400, 2))  # expert 0 is busy
    trace, out, said = tmp_path / "t.safetensors", tmp_path / "kt.pt", tmp_path / "s.json"
    trace_of(ids, 4, length=10).save(trace)
    options = ("--to", "ktransformers", "--gpu-experts", 1, "--dense-layers", "none")
    ok("export", trace, *options, "--out", out, "--json", said)
    share = np.mean(ids == 0)
    contents = json.loads(said.read_text())
    assert contents["share"] == pytest.approx(share)
    assert contents["unseen_share"] == pytest.approx(share, abs=0.05)
    assert served(out, 2).sum(axis=1).tolist() == contents["gpu_experts"] == [1, 1]


def test_unseen_texts_are_other_texts(ok, tmp_path):
    """Sequences that repeat a text are all seen or all unseen: half of the texts tell no other."""
    rng = np.random.default_rng(0)
    texts = 8 * np.arange(8)[:, None] + rng.integers(0, 8, (8, 50))  # of experts of their own
    trace, said = tmp_path / "t.safetensors", tmp_path / "s.json"
    labels = {"num_experts": 64, "sequence": np.arange(48 * 50) // 50}
    ids = texts[np.arange(48) % 8].reshape(-1, 1, 1)
    mt.RoutingTrace.from_arrays(ids, **labels).save(trace)
    options = ("--to", "ktransformers", "--gpu-experts", 32, "--dense-layers", "none")
    ok("export", trace, *options, "--out", tmp_path / "kt.pt", "--json", said)
    assert json.loads(said.read_text())["unseen_share"] == 0


def test_saved_statistics_have_unseen_windows(ok, make_trace, tmp_path):
    """Their pairs have no parts, but nobody asks for these here: loads of windows have."""
    statistics, said = tmp_path / "counts.safetensors", tmp_path / "s.json"
    mt.RoutingStatistics.from_trace(make_trace(tokens=4000), window=100).save(statistics)
    options = ("--to", "ktransformers", "--gpu-experts", 2, "--dense-layers", "none")
    ok("export", statistics, *options, "--out", tmp_path / "kt.pt", "--json", said)
    assert 0 < json.loads(said.read_text())["unseen_share"] < 1


def test_bytes_of_a_layer(ok, run, tmp_path):
    """As many experts as fit; no experts are refused as too many are."""
    given, out = GOLDEN / "tokenspeed", tmp_path / "kt.pt"
    to = ("export", given, "--to", "ktransformers", "--out", out)
    ok(*to, "--gpu-bytes", 10, "--expert-bytes", 3)
    assert served(out, 9).sum() == 9
    status, _, err = run(*to, "--gpu-bytes", 2, "--expert-bytes", 3)
    assert status == 2
    assert "must keep 1 to 8 experts" in err
