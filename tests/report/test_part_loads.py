"""Loads of a recording's parts: those of its groups and halves, which are counted once."""

import numpy as np

import moetuner as mt
from moetuner.report.loads import count_part_loads


def count(trace, rows):
    """Count the load [L,E] of some tokens, by a plain loop."""
    load = np.zeros((trace.layers, trace.num_experts), dtype=np.uint64)
    for token in np.flatnonzero(rows):
        for layer in range(trace.layers):
            for expert in trace.expert_ids[token, layer]:
                load[layer, expert] += 1
    return load


def make_trace():
    """Make a trace of an odd number of tokens, whose second of three groups has none."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((101, 2, 6)), axis=2)[:, :, :2]
    group = np.where(np.arange(101) % 3, 2, 0).astype(np.int16)
    names = ("code", "nobody", "chat")
    return mt.RoutingTrace.from_arrays(
        ids.astype(np.uint8), num_experts=6, group=group, group_names=names
    )


def test_parts_have_the_loads_of_their_tokens():
    """Groups with tokens, and halves by place, have what a plain loop counts of them."""
    trace = make_trace()
    place, (groups, halves) = np.arange(trace.tokens), count_part_loads(trace)
    assert [*groups] == ["code", "chat"]
    for name, number in (("code", 0), ("chat", 2)):
        assert np.array_equal(groups[name], count(trace, trace.group == number))
    assert np.array_equal(halves[0], count(trace, place < 51))
    assert np.array_equal(halves[1], count(trace, place >= 51))


def test_parts_are_counted_once():
    """Whoever asks next gets what was counted."""
    trace = make_trace()
    assert count_part_loads(trace) is count_part_loads(trace, threads=1)


def test_counts_are_halved_by_window():
    """Windows of counts are divided in the middle; a single one is the later half."""
    load = np.arange(24).reshape(3, 2, 4)
    groups, halves = count_part_loads(mt.RoutingStatistics.from_load(load))
    assert groups == {}
    assert np.array_equal(halves[0], load[0])
    assert np.array_equal(halves[1], load[1:].sum(axis=0))
    _, (early, late) = count_part_loads(mt.RoutingStatistics.from_load(load[:1]))
    assert not early.any()
    assert np.array_equal(late, load[0])
