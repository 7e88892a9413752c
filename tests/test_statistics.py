"""RoutingStatistics: counted like a plain loop would, whatever the sharding, and safe in files."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of
from safetensors.numpy import load_file

import moetuner as mt
from moetuner import _core
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.files import safetensors
from moetuner.statistics import measure_distance

TABLES = ("window_load", "transitions", "coactivation")


def oracle(ids, experts, window):
    """Count in loops: load [W,L,E], transitions [L-1,E,E], co-activation [L,E,E], and sets."""
    tokens, layers, _ = ids.shape
    windows = max(1, -(-tokens // window)) if window else 1
    load = np.zeros((windows, layers, experts), dtype=np.uint64)
    transitions = np.zeros((layers - 1, experts, experts), dtype=np.uint64)
    coactivation = np.zeros((layers, experts, experts), dtype=np.uint64)
    for t in range(tokens):
        for layer, chosen in enumerate(ids[t].tolist()):
            for e in chosen:
                load[t // window if window else 0, layer, e] += 1
                coactivation[layer, e, [f for f in chosen if f != e]] += 1
                if layer + 1 < layers:
                    transitions[layer, e, ids[t, layer + 1]] += 1
    sets = [Counter(tuple(sorted(row)) for row in layer) for layer in ids.swapaxes(0, 1).tolist()]
    return load, transitions, coactivation, sets


def as_counters(statistics):
    """Give the sets of every layer as dictionaries."""
    return [
        Counter(dict(zip(map(tuple, of.ids.tolist()), of.counts.tolist(), strict=True)))
        for of in statistics.sets
    ]


@st.composite
def routings(draw):
    """Ids [T,L,K] with their number of experts, in either type."""
    experts = draw(st.one_of(st.integers(1, 12), st.integers(13, 300)))
    top_k = draw(st.integers(1, min(experts, 9)))
    tokens, layers = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    is_narrow = experts <= 256 and draw(st.booleans())
    dtype = np.uint8 if is_narrow else np.uint16
    seed = draw(st.integers(0, 1 << 20))
    return random_ids(tokens, layers, top_k, experts, seed=seed, dtype=dtype), experts


@given(
    routing=routings(),
    window=st.none() | st.integers(1, 50),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    threads=st.sampled_from([1, 2, 5]),
)
def test_counts_like_a_plain_loop(routing, window, cuts, threads):
    """Neither shards nor threads nor the type of the ids change a count."""
    ids, experts = routing
    *expected, wanted = oracle(ids, experts, window)
    trace = trace_of(ids, experts)
    counted = mt.RoutingStatistics.from_trace(trace, window=window, threads=threads, sets=True)
    assert as_counters(counted) == wanted
    for layer, of in enumerate(counted.sets):
        assert of.ids.tolist() == sorted(map(list, wanted[layer]))
        assert np.array_equal(of.load(experts), counted.total_load[layer])
    for name, table in zip(TABLES, expected, strict=True):
        assert np.array_equal(getattr(counted, name), table), name

    tokens, layers, top_k = ids.shape
    counter = _core.StatisticsCounter(layers, experts, top_k, window=window)
    for shard in np.split(ids, sorted(min(cut, tokens) for cut in cuts)):
        counter.push(np.ascontiguousarray(shard), threads)
    count, *tables, sets = counter.finish()
    assert count == tokens
    assert sets is None
    for table, right in zip(tables, expected, strict=True):
        assert np.array_equal(table, right)


@pytest.mark.parametrize(
    "experts", [3, 8, 9, 32, 33, 64, 65, 128, 129, 256, 257, 384, 385, 511, 512, 513, 700]
)
def test_every_kernel_counts_like_numpy(experts):
    """With tokens of two chunks, and windows that straddle them."""
    tokens, layers, window = 4500, 2, 700
    rng = np.random.default_rng(experts)
    # Two experts that every token chooses: small counters must not overflow.
    favourites = np.broadcast_to([0, 1], (tokens, layers, 2))
    first = 2 + rng.integers(0, experts - 2, (tokens, layers, 1))
    step = np.arange(min(experts - 2, 8))
    ids = np.concatenate([favourites, 2 + (first - 2 + step) % (experts - 2)], axis=2)
    for top_k in sorted({min(top_k, experts) for top_k in (1, 4, 5, 8, 10)}):
        check_counts(ids[:, :, :top_k], experts, window)


def check_counts(ids, experts, window):
    """Hold the counts of ids [T,L,K] against numpy's."""
    counted = mt.RoutingStatistics.from_trace(trace_of(ids, experts), window=window)

    def pairs(left, right):
        cells = (left[:, :, None] * experts + right[:, None, :]).ravel()
        return np.bincount(cells, minlength=experts * experts).reshape(experts, experts)

    assert np.array_equal(counted.transitions[0], pairs(ids[:, 0], ids[:, 1]))
    for layer in range(ids.shape[1]):
        own = pairs(ids[:, layer], ids[:, layer])
        np.fill_diagonal(own, 0)
        assert np.array_equal(counted.coactivation[layer], own)
        for number, load in enumerate(counted.window_load[:, layer]):
            part = ids[number * window : (number + 1) * window, layer]
            assert np.array_equal(load, np.bincount(part.ravel(), minlength=experts))


@given(routing=routings(), where=st.integers(0, 40))
def test_statistics_add_up(routing, where):
    """The statistics of a trace are the sum of those of its parts."""
    ids, experts = routing
    parts = [ids[:where], ids[where:]]
    traces = [trace_of(part, experts) for part in parts]
    both = mt.RoutingStatistics.sum(mt.RoutingStatistics.from_trace(t, sets=True) for t in traces)
    whole = mt.RoutingStatistics.from_trace(traces[0].concat(traces[1]), sets=True)
    assert as_counters(both) == as_counters(whole)
    assert both.windows == 2
    assert np.array_equal(both.total_load, whole.total_load)
    assert np.array_equal(both.transitions, whole.transitions)
    assert np.array_equal(both.coactivation, whole.coactivation)


@pytest.mark.parametrize("left_out", ["transitions", "coactivation", "sets"])
def test_pairs_and_sets_are_optional(make_trace, left_out):
    """What is not wanted is None, a sum has what both sides have, and fingerprints differ."""
    full = mt.RoutingStatistics.from_trace(make_trace())
    some = mt.RoutingStatistics.from_trace(make_trace(), **{left_out: False})
    assert some.fingerprint != full.fingerprint
    for actual in (some, some + full):
        for name in ("transitions", "coactivation", "sets"):
            assert (getattr(actual, name) is None) == (name == left_out)


def test_an_array_that_changed_is_refused(make_trace, tmp_path):
    """Ids in memory are looked at again when they are counted; those of a file just were."""
    ids = np.array(make_trace().expert_ids)
    trace = trace_of(ids)
    trace.save(tmp_path / "trace.safetensors")
    assert mt.RoutingTrace.load(tmp_path / "trace.safetensors").ids.fresh
    assert not trace.ids.fresh
    ids[5, 1, 0] = ids[5, 1, 1]
    with pytest.raises(ValueError, match="token 5, layer 1"):
        mt.RoutingStatistics.from_trace(trace)


# ---- files


def test_save_and_load(make_trace, tmp_path):
    """What is saved is loaded, expert sets too; the safetensors library reads it."""
    path = tmp_path / "s.safetensors"
    counted = mt.RoutingStatistics.from_trace(make_trace(), window=50, sets=True)
    about = {"group": [0, 1, 1, 0], "group_names": ["a", "b", "c"], "model": "m"}
    for statistics in (counted, mt.RoutingStatistics(counted.window_load, **about)):
        statistics.save(path)
        assert mt.RoutingStatistics.load(path) == statistics
        assert np.array_equal(load_file(path)["load"], statistics.window_load)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    sizes = ("window_load=uint64[4, 3, 8]", "windows=4", "layers=3", "sets", "model='small'")
    assert all(words in repr(counted) for words in sizes)


def test_load_tables(tmp_path):
    """An .npz with loads [W,L,E] or [L,E], whole numbers of any type, has no pairs."""
    path, load = tmp_path / "a.npz", np.arange(24).reshape(2, 3, 4)
    for dtype in ("u1", ">u2", "i8", "f4", "f8"):
        np.savez_compressed(path, load=load.astype(dtype), group=[1, 0], group_names=["x", "y"])
        actual = mt.RoutingStatistics.load(path)
        assert np.array_equal(actual.window_load, load)
        assert actual.group.tolist() == [1, 0]
        assert actual.transitions is None
    np.savez(path, load=load[0], model="m")
    assert mt.RoutingStatistics.load(path).window_load.shape == (1, 3, 4)
    np.savez(path, load=load, group=[2, 0])
    assert mt.RoutingStatistics.load(path).group_names == ("0", "1", "2")


MEASURE = """
import resource, sys
import moetuner as mt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
trace = mt.RoutingTrace.load(sys.argv[1])
first, rest = trace.split(0.5)
counted = mt.RoutingStatistics.from_trace(rest, window=4096, threads=2)
assert counted.window_load.sum() == rest.tokens * trace.layers * trace.top_k
counted = mt.RoutingStatistics.from_trace(trace, window=4096, threads=2)
assert counted.window_load.sum() == trace.tokens * trace.layers * trace.top_k
print((peak() - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_is_the_shard_and_not_the_trace(tmp_path):
    """Counting a file of 200 MB, and half of it by sequence, takes far less than 200 MB."""
    path, block = tmp_path / "a.safetensors", random_ids(1 << 12, 12, 4, 16)
    blocks = (200 << 20) // block.nbytes
    shape = (blocks * len(block), 12, 4)
    sequence = np.arange(shape[0], dtype=np.int32) // 1000
    pieces = (block.dtype, shape, (block for _ in range(blocks)))
    tensors = {"sequence": safetensors.whole(sequence), "expert_ids": pieces}
    safetensors.write(path, tensors, {"num_experts": "16"})
    # A process inherits its parent's peak; one in between, which stays small, keeps it out.
    between = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    command = [sys.executable, "-c", between, "-c", MEASURE, str(path)]
    actual = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(actual) < 150, f"{actual.strip()} MiB"


# ---- parts of a recording, and several recordings


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.3, 3), (0.8, 8), (0.99, 9)])
def test_windows_are_held_out_with_their_groups(share, count):
    """Of ten windows so many are unseen, each is on one side, and each side has one at least."""
    load = np.random.default_rng(0).integers(0, 99, (10, 1, 32))
    table = mt.RoutingStatistics.from_load(
        load, group=np.arange(10), group_names=tuple("abcdefghij")
    )
    seen, unseen = parts = hold_out(table, share, seed=1)
    assert (seen.windows, unseen.windows) == (10 - count, count)
    assert sorted([*seen.group, *unseen.group]) == list(range(10))
    assert all(part.window_load.tolist() == load[part.group].tolist() for part in parts)


def test_groups_add_up_by_name():
    """Whatever the order of their names, and where one side has more of them."""
    load = np.arange(1, 9).reshape(2, 1, 4)
    a = mt.RoutingStatistics.from_load(load, group=[0, 1], group_names=["math", "code"])
    b = mt.RoutingStatistics.from_load(load, group=[0, 1], group_names=["code", "text"])
    for parts, names in (
        ([a, b], "math code code text"),
        ([b, a, b], "code text math code code text"),
    ):
        both = mt.RoutingStatistics.sum(parts)
        assert [both.group_names[number] for number in both.group] == names.split()
        assert np.array_equal(both.window_load, np.concatenate([load] * len(parts)))


def test_a_model_without_a_name_adds_up():
    """What only one side knows of the model is not said of both."""
    a = mt.RoutingStatistics.from_load(np.ones((1, 2, 4)), model="a", expert_size=(4, 8))
    b = mt.RoutingStatistics.from_load(np.ones((1, 2, 4)))
    assert ((a + b).model, (b + a).expert_size, (a + a).model) == (None, None, "a")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int64])
def test_no_load_wraps(dtype):
    """Loads of any type are what they were, or refused."""
    for value in (1.0, 2048.0, 2.0**31, 2.0**52, 2.0**62, 2.0**63, 2.0**64, 1e300):
        with np.errstate(over="ignore", invalid="ignore"):
            load = np.full((1, 1, 3), value).astype(dtype)
        if dtype is np.int64 and value >= 2.0**63:
            continue
        if float(load.astype(np.float64).sum()) < 2.0**63:
            actual = mt.RoutingStatistics.from_load(load).window_load
            assert (actual.astype(np.longdouble) == load.astype(np.longdouble)).all()
        else:
            with pytest.raises(ValueError, match="load must"):
                mt.RoutingStatistics.from_load(load)


def test_a_load_table_is_split_in_time():
    """The first windows of every group, then the rest; both parts have loads alone."""
    trace = trace_of(random_ids(40, 2, 2, 8), group=np.repeat([0, 1], 20), group_names=("a", "b"))
    whole = mt.RoutingStatistics.from_trace(trace, window=5, by_group=True, sets=True)
    for share, numbers in ((0.5, [0, 1, 4, 5]), (0.01, [0, 4]), (0.99, [0, 1, 2, 3, 4, 5, 6])):
        first, rest = whole.split(share)
        assert first.window_load.tolist() == whole.window_load[numbers].tolist()
        assert first.windows + rest.windows == whole.windows
        assert first.group.tolist() == whole.group[numbers].tolist()
        assert first.sets is first.transitions is rest.coactivation is None


def test_loads_of_the_same_shares_are_no_distance_apart_and_of_other_experts_one():
    """However many tokens there are; half of the tokens that go elsewhere are half apart."""
    one = np.array([[3, 1, 0, 0], [2, 2, 0, 0], [4, 4, 0, 0]])
    other = np.array([[300, 100, 0, 0], [0, 0, 7, 0], [5, 0, 5, 0]])
    assert measure_distance(one, other).tolist() == [0, 1, 0.5]


@pytest.mark.parametrize("top_k", [1, 2, 8, 9, 10])
def test_sets_are_those_of_a_sort(top_k):
    """Also where sets differ in their last experts alone, and where rows come in order."""
    random = np.random.default_rng(top_k)
    ids = random.permuted(np.tile(np.arange(12), (400, 1)), axis=1)[:, :top_k]
    counts = random.integers(1, 9, len(ids))
    rows, at = np.unique(np.sort(ids, axis=1), axis=0, return_inverse=True)
    tokens = np.bincount(at.ravel(), counts)
    for rows_given, of_each in ((ids, counts), (rows, tokens), (rows[:, ::-1], tokens)):
        sets = mt.ExpertSets(rows_given, of_each)
        assert (sets.ids == rows).all()
        assert (sets.counts == tokens).all()
