"""The policy of the plugins: what engines rely on, whatever they hand over."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner import _core
from moetuner.plugins import rebalance_experts
from moetuner.plugins.decision import Case
from moetuner.plugins.vllm_ascend import loads_of
from moetuner.solver.rebalancing import recent


@st.composite
def cases(draw):
    """Draw loads [L,E] and sizes of a layer of more slots than experts, on ranks and nodes."""
    nodes = draw(st.integers(1, 3))
    ranks = nodes * draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 6))
    width = -(-experts // ranks) + draw(st.integers(0, 2))
    layers = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = np.floor(random.lognormal(6, draw(st.sampled_from([0, 1, 3])), (layers, experts)))
    load[random.random(layers) < 0.2] = 0
    return load, width * ranks, groups, nodes, ranks, random


def copies_on(slots, ranks, experts):
    """Count copies of every expert on every rank [L,D,E]."""
    rows = slots.reshape(len(slots), ranks, -1)
    return (rows[..., None] == np.arange(experts)).sum(axis=2)


def slowest(load, slots, ranks):
    """Tokens of the busiest rank [L], copies sharing evenly."""
    copies = copies_on(slots, ranks, load.shape[1])
    share = load / copies.sum(axis=1)
    return (copies * share[:, None]).sum(axis=2).max(axis=1)


def running(random, shape, experts):
    """Slots that some other policy left behind, every expert in one of them."""
    layers, slots = shape
    return np.stack([random.permutation(np.arange(slots) % experts) for _ in range(layers)]).astype(
        np.int64
    )


@given(cases())
def test_every_expert_has_a_slot_and_no_rank_two_copies(case):
    """With and without a running map; two where a rank has more slots than its node experts."""
    load, slots, groups, nodes, ranks, random = case
    experts = load.shape[1]
    for old in (None, running(random, (len(load), slots), experts)):
        actual = rebalance_experts(load, slots, groups, nodes, ranks, old)
        assert (actual.shape, actual.dtype) == ((len(load), slots), np.int64)
        copies = copies_on(actual, ranks, experts)
        assert (copies.sum(axis=1) > 0).all()
        assert copies.sum() == actual.size
        assert (copies <= -(-slots // ranks // (experts // nodes))).all()


@given(cases())
def test_what_stays_on_a_rank_keeps_its_slot(case):
    """An expert that a rank had once and has still is in the same slot."""
    load, slots, groups, nodes, ranks, random = case
    experts = load.shape[1]
    old = running(random, (len(load), slots), experts)
    actual = rebalance_experts(load, slots, groups, nodes, ranks, old, dead_zone=0, deviations=0)
    before, after = copies_on(old, ranks, experts), copies_on(actual, ranks, experts)
    same = old == actual
    width = slots // ranks
    for layer, rank, expert in np.argwhere((before == 1) & (after == 1)):
        here = slice(rank * width, (rank + 1) * width)
        assert same[layer, here][old[layer, here] == expert].all()


@given(cases())
def test_never_slower_and_settles(case):
    """The slowest rank does not get slower, and the same loads change nothing a second time."""
    load, slots, _, _, ranks, _ = case
    experts = load.shape[1]
    old = rebalance_experts(np.ones_like(load), slots, 1, 1, ranks)
    actual = rebalance_experts(load, slots, 1, 1, ranks, old, budget=10**6)
    assert (slowest(load, actual, ranks) <= slowest(load, old, ranks) * (1 + 1e-9)).all()
    again = rebalance_experts(load, slots, 1, 1, ranks, actual, budget=10**6)
    moved = copies_on(again, ranks, experts) != copies_on(actual, ranks, experts)
    gain = slowest(load, actual, ranks) - slowest(load, again, ranks)
    assert (
        not moved.any()
        or (gain > 0.02 * slowest(load, actual, ranks))[moved.any(axis=(1, 2))].all()
    )


@given(cases(), st.integers(0, 40))
def test_a_budget_is_kept(case, budget):
    """Copies that come to a rank are at most the budget, where nothing has to be mended."""
    load, slots, _, _, ranks, random = case
    experts = load.shape[1]
    old = rebalance_experts(random.random(load.shape), slots, 1, 1, ranks)
    actual = rebalance_experts(load, slots, 1, 1, ranks, old, budget=budget)
    assert (copies_on(actual, ranks, experts) > copies_on(old, ranks, experts)).sum() <= budget


@given(cases())
def test_only_ratios_count_and_the_answer_is_a_function(case):
    """Loads counted by every rank of a tensor-parallel group, or asked again: the same map."""
    load, slots, groups, nodes, ranks, random = case
    old = running(random, (len(load), slots), load.shape[1])
    actual = rebalance_experts(load, slots, groups, nodes, ranks, old, deviations=0)
    for factor in (1, 2, 8):
        again = rebalance_experts(load * factor, slots, groups, nodes, ranks, old, deviations=0)
        assert np.array_equal(actual, again)


@given(cases())
def test_without_load_nothing_moves(case):
    """A profile run counts nothing; a map that runs stays, and with none every slot is filled."""
    load, slots, groups, nodes, ranks, _ = case
    zero = np.zeros_like(load)
    fresh = rebalance_experts(zero, slots, groups, nodes, ranks)
    if slots // ranks <= load.shape[1]:
        assert np.array_equal(rebalance_experts(zero, slots, groups, nodes, ranks, fresh), fresh)


@given(cases(), st.integers(-2, 2))
def test_ranks_come_and_leave(case, more):
    """Of a map of another width, or with empty slots, what fits stays where it is."""
    load, slots, _, _, ranks, random = case
    experts, width = load.shape[1], slots // ranks
    others = max(ranks + more, -(-experts // width))
    old = running(random, (len(load), others * width), experts)
    old[random.random(old.shape) < 0.3] = -1
    actual = rebalance_experts(load, slots, 1, 1, ranks, old)
    copies = copies_on(actual, ranks, experts)
    assert (copies.sum(axis=1) > 0).all()
    assert (actual >= 0).all()
    assert (copies <= -(-width // experts)).all()


@given(cases(), st.integers(1, 5), st.booleans())
def test_windows_and_pairs_keep_all_promises(case, windows, runs):
    """Slots, budget, determinism and dead zone, where more than the sum of loads counts."""
    load, slots, _, _, ranks, random = case
    layers, experts = load.shape
    load = np.floor(load * random.lognormal(0, 1, (windows, *load.shape)))
    counts = np.triu(random.integers(0, 100, (layers, experts, experts)), 1)
    profile = mt.RoutingStatistics(
        np.full((1, layers, experts), 1000), coactivation=counts + counts.transpose(0, 2, 1)
    )
    old = rebalance_experts(load[0], slots, 1, 1, ranks) if runs else None
    rules = {"budget": 5, "profile": profile if experts > 1 else None}
    actual = rebalance_experts(load, slots, 1, 1, ranks, old, **rules)
    copies = copies_on(actual, ranks, experts)
    assert (copies.sum(axis=1) > 0).all()
    assert (copies <= -(-slots // ranks // experts)).all()
    assert np.array_equal(actual, rebalance_experts(load, slots, 1, 1, ranks, old, **rules))
    if runs:
        assert (copies > copies_on(old, ranks, experts)).sum() <= 5
        same = rebalance_experts(load, slots, 1, 1, ranks, actual, dead_zone=1.0, profile=profile)
        assert np.array_equal(same, actual)


def test_windows_are_balanced_one_by_one():
    """Experts that are busy at different times share a rank; on the sum they are all alike."""
    load = np.zeros((4, 1, 8))
    for window in range(4):
        load[window, 0, [window, window + 4]] = 1000
    actual = rebalance_experts(load, 8, 1, 1, 4).reshape(4, 2)
    assert (actual[:, 0] % 4 != actual[:, 1] % 4).all()


def test_a_profile_brings_together_what_is_chosen_together():
    """Loads alone cannot tell pairs apart; with a profile each pair is on one rank."""
    pairs = np.zeros((2, 8, 8), dtype=np.int64)
    for expert in range(8):
        pairs[:, expert, (expert + 4) % 8] = 500
    profile = mt.RoutingStatistics(np.full((1, 2, 8), 500), coactivation=pairs)
    load = np.full((2, 8), 1000)
    old = np.tile(np.arange(8), (2, 1))
    for start in (None, old):
        actual = rebalance_experts(load, 8, 1, 1, 4, start, profile=profile).reshape(2, 4, 2)
        assert (actual[..., 0] % 4 == actual[..., 1] % 4).all()
    hidden = np.concatenate([load[:1] * 0, load])
    assert (
        rebalance_experts(hidden, 8, 1, 1, 4, profile=profile)[1:] == actual.reshape(2, 8)
    ).any()
    with pytest.raises(ValueError, match="co-activation"):
        rebalance_experts(load, 8, 1, 1, 4, profile=mt.RoutingStatistics.from_load(load))
    with pytest.raises(ValueError, match="8 experts a layer, and the engine 6"):
        rebalance_experts(load[:, :6], 8, 1, 1, 4, profile=profile)


def test_copies_on_one_rank_are_taken_apart():
    """Windows of load, and a map where a rank has an expert twice: all experts, one copy a rank."""
    random = np.random.default_rng(0)
    windows = random.integers(1, 100, (2, 2, 8))
    old = np.stack([random.permutation(12) % 8 for _ in range(2)])
    old[:, :3] = old[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = rebalance_experts(windows, 12, 0, 1, 4, old).reshape(2, 4, 3)
    for layer in actual:
        assert set(layer.ravel().tolist()) == set(range(8))
        assert all(len(set(row.tolist())) == 3 for row in layer)


def nodes_of_groups(slots, groups, nodes, experts):
    """Count the nodes of every group [L,G]."""
    node = np.arange(slots.shape[1]) // (slots.shape[1] // nodes)
    group = slots // (experts // groups)
    return np.array([[len(set(node[row == g])) for g in range(groups)] for row in group])


@given(cases(), st.booleans())
def test_groups_are_whole_on_nodes(case, runs):
    """Where the engines' hierarchical policy keeps them whole, whatever runs and it costs."""
    load, slots, groups, nodes, ranks, random = case
    experts = load.shape[1]
    load[:, : experts // groups] *= 20
    old = running(random, (len(load), slots), experts) if runs else None
    actual = rebalance_experts(load, slots, groups, nodes, ranks, old, budget=0)
    if nodes > 1 and slots // ranks * (ranks // nodes) >= experts // nodes:
        assert (nodes_of_groups(actual, groups, nodes, experts)[load.any(axis=1)] == 1).all()


def test_groups_change_places_where_a_node_is_too_heavy():
    """Two heavy groups that drifted onto one node are parted, by the copies of two groups."""
    load = np.full((2, 64), 100)
    old = rebalance_experts(load, 80, 4, 2, 8)
    home = nodes_of_groups(old, 4, 2, 64)
    assert (home == 1).all()
    node = np.arange(80) // 40
    together = [group for group in range(4) if node[old[0] // 16 == group][0] == 0]
    load[0, [16 * group + at for group in together for at in range(16)]] = 300
    actual = rebalance_experts(load, 80, 4, 2, 8, old, budget=128)
    of_node = slowest(load, actual, 2)
    assert of_node[0] == pytest.approx(load[0].sum() / 2)
    assert np.array_equal(actual[1], old[1])


def drifting(windows, drift, shape=(12, 256)):
    """Draw windows of load [W,L,E], each drifted from the one before."""
    random = np.random.default_rng(3)
    state, load = random.normal(0, 0.8, shape), []
    for _ in range(windows):
        share = np.exp(state)
        load.append(np.floor(1e6 * share / share.sum(axis=1, keepdims=True)))
        state = np.sqrt(1 - drift**2) * state + drift * random.normal(0, 0.8, shape)
    return np.stack(load)


def initial(layers, slots, experts):
    """Return the map with which engines begin."""
    return np.tile(np.arange(slots) % experts, (layers, 1))


@pytest.mark.parametrize("drift", [0.05, 0.15, 0.3])
def test_as_good_on_the_next_window_as_packing_anew(drift):
    """Few moves end where EPLB's packing ends that moves all, judged on what comes next."""
    load = drifting(9, drift)
    now, ours, anew, moved = initial(12, 288, 256), [], [], 0
    capacity = np.full((12, 32), 9)
    for seen, judged in pairwise(load):
        new = rebalance_experts(seen, 288, None, 1, 32, now)
        moved += (copies_on(new, 32, 256) > copies_on(now, 32, 256)).sum()
        now = new
        packed = _core.replicate_experts(seen, capacity, np.ones(32), trials=0)
        ours.append(slowest(judged, now, 32))
        anew.append(slowest(judged, packed.reshape(12, 288), 32))
    assert np.mean(1 / np.array(ours)) >= np.mean(1 / np.array(anew)) * 0.997
    assert moved <= 8 * 12 * 288 * (31 / 32) / 5


def test_the_heaviest_experts_get_copies_from_the_initial_map():
    """Its copies follow no load; one decision later, no copy is heavier than it must be."""
    load = drifting(1, 0.0)[0]
    actual = rebalance_experts(load, 288, None, 1, 32, initial(12, 288, 256), budget=10**4)
    packed = _core.replicate_experts(load, np.full((12, 32), 9), np.ones(32), trials=0)
    heaviest = [
        (load / copies_on(slots, 32, 256).sum(axis=1)).max(axis=1)
        for slots in (actual, packed.reshape(12, 288))
    ]
    assert (heaviest[0] <= 1.1 * heaviest[1]).all()


def test_of_windows_the_last_ones_count_where_loads_drift():
    """All windows of a steady load are used, and of one that changed those since."""
    random = np.random.default_rng(0)
    steady = random.poisson(100.0, (16, 2, 32)).astype(float)
    assert len(recent(steady)) == 16
    changed = steady * np.where(np.arange(16) < 8, 1, 0)[:, None, None]
    changed[8:] = random.poisson(np.arange(1, 33) * 10.0, (8, 2, 32))
    assert len(recent(changed)) <= 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[1, 2]], 3, 1, 1, 2), "num_replicas"),
        (([[1, 2, 3]], 2, 1, 1, 2), "num_replicas"),
        (([[1, -2]], 2, 1, 1, 2), "at least 0"),
        (([[1, float("nan")]], 2, 1, 1, 2), "finite"),
        (([1, 2], 2, 1, 1, 2), "layers, experts"),
        (([[1, 2]], 2, 1, 1, 2, [[0.5, 1.5]]), "old_map"),
        (([[1, 2]], 2, 1, 1, 2, [[0, 1], [1, 0]]), "old_map"),
    ],
)
def test_says_what_is_wrong(arguments, words):
    """One line that names the argument."""
    with pytest.raises(ValueError, match=words):
        rebalance_experts(*arguments)


@given(cases())
def test_what_is_said_of_a_map(case):
    """Balancedness and copies moved, against a count rank by rank."""
    load, slots, groups, nodes, ranks, random = case
    experts = load.shape[1]
    old, new = (running(random, (len(load), slots), experts) for _ in range(2))
    engine = Case.of(load, slots, groups, nodes, ranks, old)
    mapped = new.reshape(len(load), ranks, -1).astype(np.int32)
    before, after = copies_on(old, ranks, experts), copies_on(new, ranks, experts)
    assert engine.copies_moved(mapped) == ((after > 0) & (before == 0)).sum()
    expected = None
    if load.any():
        expected = load.sum() / (ranks * slowest(load, new, ranks).sum())
    assert engine.balancedness(mapped) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sizes", "name"), [((1 << 40, 1), "num_replicas"), ((1 << 40, 1 << 38), "num_replicas")]
)
def test_sizes_beyond_any_engine_allocate_nothing(sizes, name):
    """A size that no engine has is refused by its name before a table is made of it."""
    slots, ranks = sizes
    with pytest.raises(ValueError, match=f"{name} must be"):
        rebalance_experts([[8, 1, 1, 2]], slots, None, 1, ranks)


def test_a_table_of_other_experts_allocates_nothing():
    """An expert of vllm-ascend's table beyond its slots is refused before loads are added up."""
    with pytest.raises(ValueError, match="current_expert_table must hold experts below the 4"):
        loads_of(np.array([[[0, 1], [2, 1 << 40]]]), np.ones((1, 2, 2)))
