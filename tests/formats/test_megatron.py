"""Megatron-Core's router trace and RouterReplay: rows of the same tokens, and what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import random_ids

import moetuner as mt
from moetuner.formats import reader_of

LAYERS = (1, 2, 4)  # layer 0 is dense, and so is 3


def lines_of(ids, step, rank, block="decoder", layers=LAYERS):
    """Lines of one microbatch, ids [T,L,K], as the tracer writes them."""
    tokens, _, top_k = ids.shape
    return [
        {
            "step": step,
            "stage": "pre_dispatch",
            "block": block,
            "layer": layer,
            "rank": rank,
            "num_tokens": tokens,
            "topk": top_k,
            "top_indices": ids[:, at].tolist(),
        }
        for at, layer in enumerate(layers)
    ]


def write(folder, rank, lines):
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def recorded(tmp_path):
    """Two ranks, three steps, two microbatches in each; the ids of all in order of time."""
    rng = np.random.default_rng(0)
    lines, expected = {0: [], 1: []}, []
    for step in range(3):
        for turn in range(2):
            for rank in lines:
                ids = random_ids(int(rng.integers(3, 7)), 3, 2, 8, seed=10 * step + turn + rank)
                lines[rank] += lines_of(ids, step, rank)
                expected.append((rank, ids))
    for rank, of in lines.items():
        write(tmp_path, rank, of)
    return tmp_path, lines, expected


def test_microbatches_line_up(recorded):
    """Rows of all layers are those of the same tokens; sequences and ranks are kept."""
    folder, _, expected = recorded
    assert reader_of(folder) == "megatron"
    actual = mt.open_input(folder, num_experts=8)
    assert np.array_equal(actual.expert_ids, np.concatenate([ids for _, ids in expected]))
    sizes = [len(ids) for _, ids in expected]
    assert actual.sequence.tolist() == np.repeat(np.arange(12), sizes).tolist()
    assert actual.group.tolist() == np.repeat([rank for rank, _ in expected], sizes).tolist()
    assert actual.group_names == ("rank 0", "rank 1")


def test_files_may_be_named(recorded):
    """The files of some ranks, in any order, are read as well."""
    folder, _, expected = recorded
    files = [folder / f"router_trace_rank{rank}.jsonl" for rank in (1, 0)]
    both = mt.open_input(files, num_experts=8)
    assert np.array_equal(both.expert_ids, mt.open_input(folder, num_experts=8).expert_ids)
    one = mt.open_input(files[0], num_experts=8)
    assert one.group_names == ("rank 1",)
    assert np.array_equal(one.expert_ids, np.concatenate([i for r, i in expected if r == 1]))


def test_lines_of_prediction_are_apart(recorded):
    """Layers of multi-token prediction, and lines that Python alone can read, change nothing."""
    folder, lines, _ = recorded
    before = mt.open_input(folder, num_experts=8)
    mtp = lines_of(random_ids(4, 1, 2, 8), 0, 0, "mtp", [0])[0] | {"mtp_idx": 0}
    odd = [dict(line, extra=float("nan")) for line in lines[0]]
    write(folder, 0, [mtp, *odd, mtp])
    assert np.array_equal(mt.open_input(folder, num_experts=8).expert_ids, before.expert_ids)


def test_steps_without_tokens(tmp_path):
    """A rank may have had no tokens."""
    empty = lines_of(np.zeros((0, 3, 2), int), 0, 0)
    write(tmp_path, 0, [*empty, *lines_of(random_ids(3, 3, 2, 8), 1, 0)])
    assert mt.open_input(tmp_path, num_experts=8).tokens == 3


def test_stages_of_a_pipeline(tmp_path):
    """Ranks with other layers of the same tokens are joined, in the order of ranks."""
    ids = {rank: random_ids(5 + rank, 3, 2, 8, seed=rank) for rank in range(2)}
    for rank, of in ids.items():
        for stage, layers in enumerate((LAYERS[:1], LAYERS[1:])):
            at = slice(0, 1) if stage == 0 else slice(1, 3)
            number = rank + 2 * stage
            write(tmp_path, number, lines_of(of[:, at], 0, number, layers=layers))
    actual = mt.open_input(tmp_path, num_experts=8)
    assert np.array_equal(actual.expert_ids, np.concatenate([ids[0], ids[1]]))
    assert actual.group_names == ("rank 0", "rank 1")
    write(tmp_path, 3, lines_of(ids[0][:, 1:], 0, 3, layers=LAYERS[1:]))
    with pytest.raises(ValueError, match="step 0, rank 1: layers must have the same tokens"):
        mt.open_input(tmp_path, num_experts=8)
    (tmp_path / "router_trace_rank3.jsonl").unlink()
    with pytest.raises(ValueError, match=r"must have ids of each of layers .1, 2, 4., got none"):
        mt.open_input(tmp_path, num_experts=8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: lines[:-1], "step 2, rank 1: must have ids of each of layers [1, 2, 4]"),
        (lambda lines: lines[:-6], "rank 1 must have steps to 2 like rank 0, got 1 as its last"),
        (lambda lines: [lines[0] | {"num_tokens": 1}], "line 1: top_indices must be integers [1,"),
        (lambda lines: [lines[0], lines[1] | {"topk": 3}], "line 2: top_indices must be integers"),
        (lambda lines: [lines[0], lines[1] | {"step": -1}], "line 2: step must be an integer"),
        (lambda lines: [lines[0], {**lines[1], "rank": None}], "line 2: rank must be an integer"),
        (lambda lines: [lines[0], {"x": 1}], "line 2: must have 'top_indices', got keys ['x']"),
        (lambda lines: [lines[0] | {"top_indices": [[0, 9]] * 3}], "expert id 9 is not below"),
        (lambda lines: [line | {"block": "mtp"} for line in lines], "must hold lines of block"),
        (lambda lines: [line | {"rank": 0} for line in lines], "rank 0 is in another file too"),
    ],
)
def test_bad_files(recorded, change, text):
    """The message names file, place and rule."""
    folder, lines, _ = recorded
    lines[1][0]["top_indices"] = lines[1][0]["top_indices"][:3]
    lines[1][0]["num_tokens"] = 3
    lines[1][1] = lines[1][1] | {"top_indices": lines[1][1]["top_indices"][:3], "num_tokens": 3}
    lines[1][2] = lines[1][2] | {"top_indices": lines[1][2]["top_indices"][:3], "num_tokens": 3}
    path = write(folder, 1, change(lines[1]))
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        mt.open_input(folder, num_experts=8)
    assert str(caught.value).startswith((str(path), str(folder)))
    assert "\n" not in str(caught.value)


def test_missing_ranks_and_experts(recorded):
    """A gap among ranks is a missing file; the number of experts must be given."""
    folder, lines, _ = recorded
    with pytest.raises(ValueError, match="num_experts is needed: the file does not say it"):
        mt.open_input(folder)
    write(folder, 3, [line | {"rank": 3} for line in lines[1]])
    with pytest.raises(ValueError, match="files of ranks 0 to 3, got none of rank 2"):
        mt.open_input(folder, num_experts=8)
    text = (folder / "router_trace_rank3.jsonl").read_text()
    (folder / "router_trace_rank2.jsonl").write_text(text[:-40])
    with pytest.raises(ValueError, match=r"rank2.jsonl: line 18: must be JSON"):
        mt.open_input(folder, num_experts=8)


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_replay(tmp_path, kind):
    """Arrays [T,K] of every layer, in both containers."""
    ids = random_ids(9, 3, 2, 8, dtype=np.int64)
    arrays = [np.ascontiguousarray(ids[:, layer]) for layer in range(3)]
    path = tmp_path / f"replay.{kind}"
    if kind == "npz":
        np.savez(path, *arrays)
    else:
        torch = pytest.importorskip("torch")
        torch.save([torch.from_numpy(array) for array in arrays], path)
    assert reader_of(path) == "megatron"
    assert np.array_equal(mt.open_input(path, num_experts=8).expert_ids, ids)
    if kind == "npz":
        np.savez(path, arrays[0], arrays[1][:-1])
        with pytest.raises(ValueError, match="layers must have the same tokens"):
            mt.open_input(path, num_experts=8)


GOLDEN = Path(__file__).parent / "golden" / "megatron"


def test_what_megatron_wrote():
    """The tracer's files of two ranks say what RouterReplay recorded, in the order of experts."""
    trace = mt.open_input(GOLDEN, num_experts=8)
    assert (trace.tokens, trace.layers, trace.top_k) == (72, 2, 2)
    replays = [mt.open_input(GOLDEN / f"replay-{rank}.npz", num_experts=8) for rank in range(2)]
    both = mt.open_input([GOLDEN / f"replay-{rank}.npz" for rank in range(2)], num_experts=8)
    assert both.group_names == ("rank 0", "rank 1")
    for rank, replay in enumerate(replays):
        assert np.array_equal(both.select(groups=f"rank {rank}").expert_ids, replay.expert_ids)
        mine = trace.select(groups=f"rank {rank}")
        assert np.array_equal(mine.expert_ids, np.sort(replay.expert_ids))
        assert replay.sequence.tolist() == np.repeat([0, 1, 2], 12).tolist()
    assert not np.array_equal(*(replay.expert_ids for replay in replays))
