"""Windows of mixed arrival: as uneven as the steps of a busy engine are."""

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner.evaluation.arrival import mix_windows
from moetuner.placement import blocks
from moetuner.problem.windows.choice import CERTAIN, FEWEST, choose_windows

DEVICES, EXPERTS = 4, 16


def recorded(tokens=64 * 400):
    """Draw independent tokens, of which every one chooses three of sixteen experts."""
    ids = random_ids(tokens, 2, 3, EXPERTS, liking=np.tile([0.0, 0.5, 1.0, 1.5], DEVICES))
    return trace_of(ids, EXPERTS, length=20)


def mixed(load, groups=None, **fields):
    """Return windows of mixed arrival [W,L,E] of some load."""
    statistics = mt.RoutingStatistics.from_load(load, **fields)
    return choose_windows(statistics, arrival="mixed", risk="mean", groups=groups)


def test_they_are_as_uneven_as_a_replay_of_mixed_tokens():
    """What the search sees of a placement is what evaluate says of it, not the mean of windows."""
    trace = recorded()
    counts = mt.RoutingStatistics.from_trace(trace, window=64)
    load = mixed(counts.window_load).load
    device = load.reshape(len(load), 2, DEVICES, -1).sum(axis=3)
    seen = (device.max(axis=2) / device.mean(axis=2)).mean()
    placement = blocks(2, EXPERTS, DEVICES)
    replayed = mt.evaluate(placement, trace, mt.Topology(DEVICES), window=64, arrival="mixed")
    assert seen == pytest.approx(replayed.imbalance, rel=0.02)
    even = counts.total_load.reshape(2, DEVICES, -1).sum(axis=2)
    assert seen > (even.max(axis=1) / even.mean(axis=1)).mean() * 1.05


def test_chance_changes_nothing_of_very_many_tokens():
    """Counts of years are what they are, whatever a number of 64 bits can hold."""
    load = np.full((3, 1, 2), 2**58, dtype=np.uint64)
    assert (mixed(load).load == 2.0**58).all()
    assert load[0, 0, 0] > CERTAIN


def test_weights_of_groups_have_no_unit():
    """Weights a thousand times as large are the same windows, each a thousand times as heavy."""
    load = np.random.default_rng(0).integers(0, 9, (40, 2, 6))
    fields = {"group": np.arange(40) % 2, "group_names": ("a", "b")}
    one, other = (
        mixed(load, {"a": share * 3, "b": share}, **fields).load for share in (1.0, 1000.0)
    )
    assert np.allclose(one * 1000, other)
    assert len(np.unique(one)) < one.size / 2  # whole numbers of tokens


@pytest.mark.parametrize("windows", [2, 8, 40])
def test_longer_windows_differ_from_each_other(windows):
    """Each is of some of the windows that were counted, however few longer ones these make."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(8, 2.0), 4 * windows)
    load = random.multinomial(8000, shares)[:, None]
    statistics = mt.RoutingStatistics.from_load(load, window=100)
    longer = choose_windows(statistics, arrival="mixed", risk="mean", groups=None, tokens=400)
    drawn, total = longer.load, load.sum(axis=0) / windows
    assert len(drawn) == max(windows, FEWEST)
    assert longer.weight.sum() == pytest.approx(windows)
    apart = np.abs(drawn / total - 1).mean(axis=0)
    assert (apart > 0.03).all()
    assert drawn.mean(axis=0) == pytest.approx(total, rel=0.35)


@pytest.mark.parametrize("longer", [1, 4])
def test_they_are_as_far_from_what_was_seen_as_unseen_traffic_is(longer):
    """Means of what was seen alone would be less than half as far: they share its mean."""
    random = np.random.default_rng(longer)
    # So many tokens that what chance draws of them is small beside how windows differ.
    load = np.rint(random.lognormal(13, 0.5, (2, 40 * longer, 3, 16))).astype(np.int64)
    seen, unseen = load
    statistics = mt.RoutingStatistics.from_load(seen, window=100)
    found = choose_windows(statistics, "mixed", "mean", None, tokens=100 * longer)
    steps = mix_windows(unseen, size={1: 16, 4: 64}[longer])

    def distance(windows):
        return float(((windows - seen.mean(axis=0)) ** 2).mean())

    far = distance(np.concatenate([windows for _, windows in steps]))
    assert 0.8 < distance(found.load / longer) / far < 1.7
