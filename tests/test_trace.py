"""RoutingTrace: arrays and files in, shards out, and what it refuses."""

import itertools
import json
import os
import pickle
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids
from safetensors.numpy import load_file, save_file

import moetuner as mt

IDS = random_ids(50, 3, 2, 8)


def same(a, b):
    """Whether two traces say the same."""
    names = ("expert_ids", "sequence", "group", "num_experts", "group_names", "model")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


# ---- arrays


def test_narrow_ids_are_not_copied_and_not_writeable():
    """A C-contiguous uint8 array is used where it is; the caller's rights on it stay."""
    ids = IDS.copy()
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=8)
    assert np.shares_memory(trace.expert_ids, ids)
    assert not trace.expert_ids.flags.writeable
    assert ids.flags.writeable


@pytest.mark.parametrize(
    "dtype", ["u1", "<u2", ">u2", "i1", "<i2", ">i2", "<i4", ">i4", "<i8", ">i8", "<u4", "<u8"]
)
@pytest.mark.parametrize("layout", ["C", "F", "strided", "reversed"])
def test_any_integer_type_and_layout(dtype, layout, tmp_path):
    """Type, byte order and layout do not change the trace of an array, nor of an .npy file."""
    ids = IDS.astype(dtype)
    if layout == "F":
        ids = np.asfortranarray(ids)
    elif layout == "strided":
        ids = np.repeat(ids, 2, axis=0)[::2]
    elif layout == "reversed":
        ids = ids[::-1].copy()[::-1]
    actual = mt.RoutingTrace.from_arrays(ids, num_experts=8).expert_ids
    assert actual.dtype == (np.uint16 if dtype == "<u2" else np.uint8)
    many = mt.RoutingTrace.from_arrays(ids, num_experts=257)
    assert many.expert_ids.dtype == (np.uint8 if ids.dtype == np.uint8 else np.uint16)
    assert actual.flags.c_contiguous
    assert np.array_equal(actual, IDS)
    np.save(tmp_path / "a.npy", ids)
    trace = mt.RoutingTrace.load(tmp_path / "a.npy", num_experts=8)
    assert np.array_equal(trace.expert_ids, IDS)
    assert np.array_equal(np.concatenate(list(trace.shards(200))), IDS)


def test_smallest_traces():
    """One token, one layer, one expert; and no token at all."""
    one = mt.RoutingTrace.from_arrays([[[0]]], num_experts=1, group=[0])
    assert (one.tokens, one.layers, one.top_k, one.group_names) == (1, 1, 1, ("0",))
    assert (one.group.dtype, one.num_experts) == (np.int16, 1)
    none = mt.RoutingTrace.from_arrays(IDS[:0], num_experts=8, sequence=[], group=[])
    assert (none.tokens, none.layers, none.top_k) == (0, 3, 2)
    assert none.split(0.5)[0].tokens == 0


@pytest.mark.parametrize("top_k", [2, 3, 4, 6, 8, 9])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_expert_twice_is_named(top_k, dtype):
    """A token cannot visit an expert twice in a layer, whichever two of its ids these are."""
    ids = random_ids(200, 2, top_k, 16, dtype=dtype)
    for one, other in itertools.combinations(range(top_k), 2):
        twice = ids.copy()
        twice[150, 1, one] = ids[150, 1, other]
        rule = f"expert_ids: token 150, layer 1: expert id {ids[150, 1, other]} appears twice"
        with pytest.raises(ValueError, match=rule):
            mt.RoutingTrace.from_arrays(twice, num_experts=16)


# ---- shards, split, select, concat; in memory and in a file


def labelled(draw):
    """Draw a trace with sequences and groups, or without, and the arrays that it is of."""
    tokens = draw(st.integers(0, 60))
    kind = draw(st.sampled_from([np.uint8, np.uint16]))
    ids = random_ids(tokens, 3, 2, 8, seed=draw(st.integers(0, 9)), dtype=kind)
    if not draw(st.booleans()):
        return mt.RoutingTrace.from_arrays(ids, num_experts=8), ids, None
    sequence = np.repeat(np.arange(tokens), draw(st.integers(1, 8)))[:tokens]
    of = {"sequence": sequence, "group": sequence % 2, "group_names": ["even", "odd", "empty"]}
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=8, model="m", **of)
    return trace, ids, np.stack([sequence, sequence % 2], axis=1)


def taken(draw, trace, ids, labels):
    """Draw a split or a selection of a trace, and do the same to its arrays."""
    ways = ["layers", "split", "order"]
    ways += ["groups", "sequences"] if labels is not None else []
    way = draw(st.sampled_from(ways))
    if way == "layers":
        layers = draw(st.permutations(range(ids.shape[1])))[: draw(st.integers(1, ids.shape[1]))]
        return trace.select(layers=layers), ids[:, layers], labels
    if way == "order":
        order = np.random.default_rng(draw(st.integers(0, 9))).permutation(len(ids))
        order = order[: draw(st.integers(0, len(ids)))]
        return trace.take(order), ids[order], None if labels is None else labels[order]
    if way == "split":
        share, seed = draw(st.floats(0.01, 0.99)), draw(st.integers(0, 9))
        parts = trace.split(share, seed=seed)
        assert same(parts[0], trace.split(share, seed=seed)[0])
        units = np.arange(len(ids)) if labels is None else labels[:, 0]
        keep = np.arange(len(ids)) < parts[0].tokens
        if labels is not None and len(np.unique(units)) > 1:
            keep = np.isin(units, parts[0].sequence)
        elif labels is not None:
            units = np.arange(len(ids))
        several = len(np.unique(units))
        wanted = min(max(round(share * several), 1), max(several - 1, 0))
        assert len(np.unique(units[keep])) == wanted
        number = draw(st.integers(0, 1))
        keep, chosen = (~keep if number else keep), parts[number]
    elif way == "groups":
        names = draw(st.lists(st.sampled_from(["even", "odd", "empty"]), min_size=1, unique=True))
        keep = np.isin(labels[:, 1], [trace.group_names.index(name) for name in names])
        chosen = trace.select(groups=names)
    else:
        there = np.unique(labels[:, 0]).tolist()
        some = draw(st.lists(st.sampled_from(there))) if there else []
        keep, chosen = np.isin(labels[:, 0], some), trace.select(sequences=some)
    return chosen, ids[keep], None if labels is None else labels[keep]


@given(st.data())
def test_a_trace_is_its_arrays(tmp_path_factory, data):
    """Whatever is selected, split, joined, saved and loaded: ids and labels are those of arrays."""
    draw, folder = data.draw, tmp_path_factory.mktemp("traces")
    trace, ids, labels = labelled(draw)
    for step in range(draw(st.integers(0, 4))):
        way = draw(st.sampled_from(["save", "take", "join", "pickle"]))
        if way == "save":
            trace.save(folder / f"{step}.safetensors")
            trace = mt.RoutingTrace.load(folder / f"{step}.safetensors")
            mapped = trace.expert_ids
            assert not trace.tokens or (
                isinstance(mapped, np.memmap) and not mapped.flags.writeable
            )
        elif way == "take":
            trace, ids, labels = taken(draw, trace, ids, labels)
        elif way == "pickle":
            trace = pickle.loads(pickle.dumps(trace))
        else:
            trace, ids = trace.concat(trace), np.concatenate([ids, ids])
            if labels is not None:  # equal labels of two recordings are two sequences
                fresh = np.unique(labels[:, 0], return_inverse=True)[1]
                both = np.concatenate([fresh, fresh + fresh.max(initial=-1) + 1])
                labels = np.stack([both, np.tile(labels[:, 1], 2)], axis=1)
    assert np.array_equal(trace.expert_ids, ids)
    if labels is None:
        assert trace.sequence is trace.group is None
    else:
        assert np.array_equal(np.stack([trace.sequence, trace.group], axis=1), labels)
        assert (trace.group_names, trace.model) == (("even", "odd", "empty"), "m")
    plain = mt.RoutingTrace.from_arrays(ids, num_experts=8)
    counts = [mt.RoutingStatistics.from_trace(of, window=10, sets=True) for of in (trace, plain)]
    assert counts[0].fingerprint == counts[1].fingerprint
    most = draw(st.integers(1, 400))
    shards = list(trace.shards(most))
    assert np.array_equal(np.concatenate([ids[:0], *shards]), ids)
    row = ids[0].nbytes if len(ids) else 1
    assert all(1 <= len(shard) <= max(1, most // row) for shard in shards)
    assert all(shard.flags.c_contiguous for shard in shards)


@given(st.data())
def test_tokens_are_read_by_their_numbers(tmp_path_factory, data):
    """Of whatever was selected, split, joined and saved, in pieces of any size."""
    draw, path = data.draw, tmp_path_factory.mktemp("traces") / "a.safetensors"
    trace, ids, labels = labelled(draw)
    if draw(st.booleans()):
        trace.save(path)
        trace = mt.RoutingTrace.load(path)
    for _ in range(draw(st.integers(0, 2))):
        trace, ids, labels = taken(draw, trace, ids, labels)
    if draw(st.booleans()):
        trace, ids = trace.concat(trace), np.concatenate([ids, ids])
    numbers = np.array(sorted(draw(st.sets(st.integers(0, max(len(ids) - 1, 0))))), np.int64)
    numbers = numbers[: len(ids)]
    pieces = list(trace.ids.chosen(numbers, draw(st.integers(1, 400))))
    assert np.array_equal(np.concatenate([ids[:0], *pieces]), ids[numbers])
    assert all(len(piece) and piece.flags.c_contiguous for piece in pieces)


def test_halves_of_a_large_array_share_its_memory(monkeypatch):
    """And are what they would be of a small one, whose halves are copies."""
    ids = random_ids(500, 3, 2, 8)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=8, sequence=np.arange(500) // 7)
    copies = trace.split(0.5)
    monkeypatch.setattr("moetuner.files.ids.COPIED_BYTES", ids.nbytes - 1)
    halves = trace.split(0.5)
    for half, copy in zip(halves, copies, strict=True):
        assert same(half, copy)
        assert half.ids.parts == (trace.ids,)
        assert np.array_equal(np.concatenate(list(half.shards(50))), copy.expert_ids)


def test_tokens_that_are_far_apart_are_read_without_what_is_between(tmp_path):
    """Also of a half that was chosen, in which a wrong id is not one that is read."""
    ids = np.tile(IDS, (9000 // len(IDS), 1, 1))
    ids[5000] = 255
    save_file({"expert_ids": ids}, tmp_path / "a.safetensors")
    trace = mt.RoutingTrace.load(tmp_path / "a.safetensors", num_experts=8)
    keep = np.arange(len(ids)) % 2 == 0
    half = replace(trace, ids=trace.ids.select(keep, None))
    read = list(half.ids.chosen(np.array([0, len(ids) // 2 - 1]), 60))
    assert np.array_equal(np.concatenate(read), ids[keep][[0, -1]])


def test_tokens_in_another_order_stay_in_the_file(tmp_path, monkeypatch):
    """They are gathered part by part, of near and of distant tokens: all of them never at once."""
    ids = random_ids(8_000, 12, 4, 64)
    mt.RoutingTrace.from_arrays(ids, num_experts=64).save(tmp_path / "a.safetensors")
    trace = mt.RoutingTrace.load(tmp_path / "a.safetensors")
    monkeypatch.setattr("moetuner.files.ids.order.GATHERED_BYTES", 1 << 14)
    steps = np.arange(8_000).reshape(40, -1).T.ravel()  # forty sequences advance together
    for order in (steps, np.random.default_rng(0).permutation(8_000), steps[::3]):
        wanted, done = trace.take(order), 0
        tracemalloc.start()
        for shard in wanted.shards(1 << 13):
            assert np.array_equal(shard, ids[order[done : done + len(shard)]])
            done += len(shard)
            del shard
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert done == len(order)
        assert peak < ids.nbytes / 2


def test_a_wrong_token_of_another_order_is_named(tmp_path):
    """By its number in the file, whatever is read beside it."""
    ids = np.tile(IDS, (9000 // len(IDS), 1, 1))
    ids[[4321, 5000]] = 255
    save_file({"expert_ids": ids}, tmp_path / "a.safetensors")
    trace = mt.RoutingTrace.load(tmp_path / "a.safetensors", num_experts=8)
    with pytest.raises(ValueError, match="token 5000"):
        list(trace.take([8000, 5000, 1]).shards())


def test_concat_keeps_recordings_apart(make_trace):
    """Groups meet by name; what only one side knows is not said of both."""
    of, labels = mt.RoutingTrace.from_arrays, {"sequence": [0] * 50, "num_experts": 8}
    a = of(IDS, **labels, group=[0] * 50, group_names=["math"], model="x")
    b = of(IDS.astype(np.uint16), **labels, group=[1] * 50, group_names=["law", "math"])
    both = a.concat(b, b)
    assert both.sequence.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    assert (both.group_names, set(both.group), both.model) == (("math", "law"), {0}, None)
    assert a.concat(make_trace(50, labelled=False)).group is None


def test_ids_in_memory_are_pickled_once():
    """A trace in memory goes to another process with its ids, and nothing more."""
    assert len(pickle.dumps(mt.RoutingTrace.from_arrays(IDS, num_experts=8))) < IDS.nbytes + 1000


# ---- files


def test_saved_files_are_plain_safetensors(make_trace, tmp_path):
    """The safetensors library reads what moetuner writes, and the other way round."""
    trace, path = make_trace(), tmp_path / "a.safetensors"
    trace.save(path, source="a test")
    tensors = load_file(path)
    assert np.array_equal(tensors["expert_ids"], trace.expert_ids)
    assert np.array_equal(tensors["sequence"], trace.sequence)
    with safetensors.safe_open(path, "numpy") as file:
        about = file.metadata()
    assert about["format"] == "moetuner.trace"
    assert about["version"] == "1"
    assert json.loads(about["group_names"]) == ["even", "odd", "empty"]
    assert about["source"] == "a test"
    save_file(tensors, path, metadata=about)
    assert same(mt.RoutingTrace.load(path), trace)
    save_file({"expert_ids": IDS.astype(np.int64)}, path)
    plain = mt.RoutingTrace.load(path, num_experts=8)
    assert np.array_equal(plain.expert_ids, IDS)
    assert plain.expert_ids.dtype == np.uint8


def test_a_trace_can_replace_its_own_file(make_trace, tmp_path):
    """Saving a selection over the file it reads from is safe; the old trace then says so."""
    path = tmp_path / "a.safetensors"
    make_trace().save(path)
    trace = mt.RoutingTrace.load(path)
    trace.select(layers=[2, 1, 0]).save(path)
    assert np.array_equal(mt.RoutingTrace.load(path).expert_ids, make_trace().expert_ids[:, ::-1])
    with pytest.raises(ValueError, match="file was replaced after it was loaded"):
        list(trace.shards())


def test_nothing_is_written_half(make_trace, tmp_path):
    """A save that fails leaves the old file and no other."""
    path, target = tmp_path / "bad.safetensors", tmp_path / "target.safetensors"
    make_trace().save(target)
    before, ids = target.read_bytes(), IDS.copy()
    ids[40, 1, 0] = 9
    save_file({"expert_ids": ids}, path)
    with pytest.raises(ValueError, match=r"bad\.safetensors: expert_ids: token 40, layer 1: "):
        mt.RoutingTrace.load(path, num_experts=8).save(target)
    assert target.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(make_trace, tmp_path, save):
    """All keys of an .npz are read; num_experts overrides what the file says."""
    trace, path = make_trace(), tmp_path / "a.npz"
    arrays = {"sequence": trace.sequence, "group": trace.group, "model": "small", "other": [1]}
    names = np.asarray(trace.group_names)
    save(path, expert_ids=trace.expert_ids, num_experts=8, group_names=names, **arrays)
    assert same(mt.RoutingTrace.load(path), trace)
    assert mt.RoutingTrace.load(path, num_experts=12).num_experts == 12
    with pytest.raises(ValueError, match=r"a\.npz: expert_ids: token \d+, layer \d: expert id"):
        mt.RoutingTrace.load(path, num_experts=4)


def test_ids_in_a_file_are_named_by_their_place_in_it(tmp_path):
    """The token's number counts from the file's start, also through a selection."""
    ids = IDS.copy()
    ids[33, 2, 1] = 200
    path = tmp_path / "a.npy"
    np.save(path, ids)
    rule = "expert_ids: token 33, layer 2: expert id 200 is not below num_experts 8"
    trace = mt.RoutingTrace.load(path, num_experts=8)
    for part in (trace, *trace.split(0.5), trace.concat(trace), trace.select(layers=[2])):
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{path}: {rule}')}$"):
            list(part.shards(60))
    np.save(path, ids.astype(">i8") - 1)
    negative = int(np.argwhere((ids == 0).any(axis=(1, 2)))[0, 0])
    with pytest.raises(ValueError, match=f"a.npy: expert_ids: token {negative}, layer "):
        list(mt.RoutingTrace.load(path, num_experts=300).shards())


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
def test_a_file_that_shrinks_after_loading(tmp_path, suffix):
    """Reading and mapping a shrunk file raise, and do not kill the process."""
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, IDS)
    else:
        save_file({"expert_ids": IDS}, path)
    trace = mt.RoutingTrace.load(path, num_experts=8)
    shards = trace.shards(60)
    next(shards)
    size = path.stat().st_size
    os.truncate(path, size - 150)
    with pytest.raises(ValueError, match=f"{path}: file shrank while it was read: 30 bytes"):
        list(shards)
    for use in (lambda: trace.expert_ids, lambda: list(trace.shards())):
        with pytest.raises(ValueError, match=f"file must have {size} bytes, as when it was loaded"):
            use()


LAST = (1 << 31) - 1
LIMITS = ([[0, LAST], [LAST, 5]], [[-LAST - 1, LAST], [-LAST - 1, LAST], [7, 7]])


@pytest.mark.parametrize("labels", [*LIMITS, [[LAST, 0], [0, 0]], [[LAST - 1, 3], [3, 4], [3, 9]]])
def test_sequences_near_the_limit_join(labels):
    """Joined traces tell all sequences apart, also where moving labels up would leave 32 bits."""
    of, ids = mt.RoutingTrace.from_arrays, [[[0]], [[1]]]
    whole = mt.RoutingTrace.concat([of(ids, num_experts=2, sequence=part) for part in labels])
    assert whole.sequence.dtype == np.int32
    wanted = [(at, label) for at, part in enumerate(labels) for label in part]
    actual = whole.sequence.tolist()
    assert len(set(actual)) == len(set(wanted)) == len(set(zip(actual, wanted, strict=True)))


def test_a_notebook_shows_what_a_trace_is(make_trace):
    """Sizes, sequences and groups in a table; names are no markup, and unknowns are dashes."""
    trace = replace(make_trace(tokens=20), sequence=np.arange(20) // 5, model="<b>")
    html = trace._repr_html_()
    assert "<td>tokens</td><td>20</td>" in html
    assert "<td>sequences</td><td>4</td>" in html
    assert "&lt;b&gt;" in html
    plain = mt.RoutingTrace.from_arrays(np.zeros((3, 1, 1), dtype=np.uint8), num_experts=2)
    assert "<td>groups</td><td>-</td>" in plain._repr_html_()


def test_an_array_is_no_argument_of_the_class():
    """Who calls the class finds the function that takes an array in the message."""
    with pytest.raises(
        TypeError, match=r"call RoutingTrace\.from_arrays\(expert_ids, num_experts="
    ):
        mt.RoutingTrace(np.zeros((4, 2, 1), int), 8)


@given(st.lists(st.integers(-3, 5), max_size=20), st.booleans())
def test_sequences_are_counted_in_any_order(labels, sorts):
    """As many as there are different labels of tokens; without labels the number is unknown."""
    labels = np.array(sorted(labels) if sorts else labels, dtype=np.int32)
    ids = np.zeros((len(labels), 1, 1), dtype=np.uint8)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=2, sequence=labels)
    assert trace.sequences == len(set(labels.tolist()))
    assert mt.RoutingTrace.from_arrays(ids, num_experts=2).sequences is None
