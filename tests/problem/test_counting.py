"""What a problem counts of a trace, what counts lack, and what pairs tell in place of sets."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.problem.objective import choose_tables

GOALS = [
    (regime, goal) for regime in ("dispatch", "follow") for goal in ("time", "balance", "traffic")
]
# Links of two nodes of two devices, and ranks, as bench/cluster emulates them.
SLOW = mt.Topology(4, 2, intra_node_bandwidth=174e6, inter_node_bandwidth=47e6)
RANKS = mt.CostModel(base_us=0, expert_us=0, start_us=6739, token_us=9.36, token_bytes=2080)


@pytest.mark.parametrize(("regime", "goal"), GOALS)
def test_a_trace_is_counted_as_the_goal_needs(make_trace, regime, goal):
    """A problem of a trace is that of its counts, lacks nothing, and can be made another one."""
    trace = make_trace(tokens=1100)
    problem = mt.Problem(trace, mt.Topology(2), regime=regime, objective=goal)
    needed = [name for name, is_counted in choose_tables(regime, goal).items() if is_counted]
    assert all(getattr(problem.statistics, name) is not None for name in needed)
    # Visits are no part of balance, nor of what moves on: sets take memory.
    assert (problem.statistics.sets is not None) == ("sets" in needed)
    counts = mt.RoutingStatistics.from_trace(trace, window=64, sets="sets" in needed)
    rules = {"regime": regime, "objective": goal, "window": 512}
    assert problem == mt.Problem(counts, mt.Topology(2), **rules)
    assert problem.objective_function.lacks is None
    assert mt.solve(problem, "contiguous").lacks is None
    assert replace(problem, slots_per_device=5).statistics is problem.statistics


def test_windows_are_those_of_the_phases(make_trace):
    """A trace is counted in windows that all phases are made of, by group where groups count."""
    trace, topology = make_trace(tokens=16 * 512), mt.Topology(2)
    assert mt.Problem(trace, topology).statistics.window == 512
    phases = {300: 0.5, 450: 0.5, 7: 0.0}
    assert mt.Problem(trace, topology, phases=phases).statistics.window == 150
    assert mt.Problem(trace, topology).statistics.group is None
    grouped = mt.Problem(trace, topology, groups="minimax").statistics
    assert set(grouped.group.tolist()) == {0, 1}
    with pytest.raises(TypeError, match="statistics must be a RoutingStatistics or RoutingTrace"):
        mt.Problem(trace.expert_ids, topology)


@pytest.mark.parametrize(
    ("tokens", "phases", "counted"),
    [
        (16 * 512, None, 512),
        (16 * 512 - 1, None, 256),
        (1_000, None, 32),
        (100, None, 32),
        (1_000, {300: 1.0}, 75),
        (1_000, {8192: 1.0}, 32),
    ],
)
def test_a_short_trace_is_counted_in_short_windows(make_trace, tokens, phases, counted):
    """Its steps and phases stay what they are: only their loads are seen in more windows."""
    problem = mt.Problem(make_trace(tokens=tokens), mt.Topology(2), phases=phases)
    step = 300 if phases and 300 in phases else 512
    assert problem.statistics.window == counted
    assert (problem.window, problem.serving.window) == (step, step)
    assert problem.shares == (phases or {512: 0.4, 8192: 0.6})
    others = replace(problem, slots_per_device=5)
    assert (others.window, others.statistics) == (step, problem.statistics)


def test_steps_of_a_short_trace_are_scaled_from_means(make_trace):
    """Chance adds twice a short window's variance over their number: `UNSEEN_SHORTER`.

    So of 31 windows seven are a step of decode (1 / (1/16 + 2/31)), fourteen one of prefill.
    """
    problem = mt.Problem(make_trace(tokens=1_000), mt.Topology(2), arrival="bursts")
    tokens = problem.windows.load.sum(axis=2) / 2
    assert (np.abs(tokens - 512) < 16).all(axis=1).tolist() == [True] * 4 + [False] * 2
    assert (np.abs(tokens - 8192) < 16).all(axis=1).tolist() == [False] * 4 + [True] * 2


def test_steps_are_whole_windows(make_trace):
    """Counted windows stay whole; without phases, steps of another size are all that counts."""
    counts = mt.RoutingStatistics.from_trace(make_trace(tokens=1_000), window=100)
    assert mt.Problem(counts, mt.Topology(2)).shares == {100: 1.0}
    assert mt.Problem(counts, mt.Topology(2), window=300).shares == {300: 1.0}
    with pytest.raises(ValueError, match=r"of whole windows of .* 100 tokens, got 150"):
        mt.Problem(counts, mt.Topology(2), window=150)
    table = mt.RoutingStatistics.from_load([[3, 4]])
    with pytest.raises(ValueError, match="of unknown length, got 512 tokens"):
        mt.Problem(table, mt.Topology(2), window=512)


def test_everything_is_counted_by_default(make_trace):
    """Counts serve all goals and regimes unless something is left out."""
    counts = mt.RoutingStatistics.from_trace(make_trace())
    tables = (counts.sets, counts.transitions, counts.coactivation)
    assert all(table is not None for table in tables)
    assert counts.top_k_of_layer == [2, 2, 2]


@pytest.mark.parametrize(
    ("goal", "words"), [("time", "are estimated from pairs"), ("traffic", "pairs stand for")]
)
def test_missing_sets_are_named_in_a_line(make_trace, goal, words):
    """Whoever looks at a result sees that the counts have no expert sets, and what follows."""
    counts = mt.RoutingStatistics.from_trace(make_trace(), sets=False)
    result = mt.solve(mt.Problem(counts, mt.Topology(2), objective=goal), "contiguous")
    assert result.lacks.startswith("no expert sets: ")
    assert words in result.lacks
    assert "lacks='no expert sets" in repr(result)
    # A token of one expert has no pairs, and visits one device.
    single = mt.RoutingStatistics.from_trace(make_trace(top_k=1), sets=False)
    assert mt.Problem(single, mt.Topology(2), objective=goal).objective_function.lacks is None


def trace_of_sets(sets, layers=2, experts=16, seed=0):
    """Make a trace of expert sets [T,K] under names that differ by layer."""
    rng = np.random.default_rng(seed)
    names = np.stack([rng.permutation(experts) for _ in range(layers)])
    ids = names[:, np.asarray(sets)].transpose(1, 0, 2)
    return trace_of(ids.astype(np.uint8), experts)


def blocks_at_random(tokens, noise, seed=0):
    """Draw sets of four experts out of one of four blocks; some out of all of them."""
    rng = np.random.default_rng(seed)
    block = rng.integers(0, 4, tokens)[:, None] * 4 + np.arange(4)
    anywhere = rng.random((tokens, 16)).argsort(axis=1)[:, :4]
    return np.where(rng.random((tokens, 1)) < noise, anywhere, block)


@pytest.mark.parametrize("slots", [4, 5])
def test_pairs_bring_what_sets_bring(slots):
    """Where pairs say which experts are chosen together, the same rows are saved without sets."""
    trace = trace_of_sets(blocks_at_random(2_000, 0.2))
    rules = {"objective": "time", "cost_model": RANKS, "slots_per_device": slots}
    fanout = {}
    for sets in (True, False):
        counts = mt.RoutingStatistics.from_trace(trace, window=500, sets=sets)
        placement = mt.solve(mt.Problem(counts, SLOW, **rules), effort="brief").placement
        judged = mt.evaluate(placement, trace, SLOW, window=500, cost_model=RANKS)
        fanout[sets] = judged.fanout
    assert fanout[False] <= 1.02 * fanout[True]
    assert fanout[False] < 1.5


@pytest.mark.parametrize("once_per", ["device", "node"])
@pytest.mark.parametrize(
    "sets",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
        list(itertools.combinations(range(16), 3)),
    ],
)
def test_visits_from_pairs_are_exact_at_both_ends(sets, once_per):
    """Where all of a token's experts are together, and where all sets are as frequent."""
    trace = trace_of_sets(sets, seed=3)
    model = replace(RANKS, once_per=once_per)
    # At one end every device has all of a block's experts, or none.
    together = mt.solve(mt.Problem(trace, SLOW, cost_model=model)).placement
    by_pairs, by_sets = (
        mt.evaluate(
            together,
            mt.RoutingStatistics.from_trace(trace, sets=sets),
            SLOW,
            cost_model=model,
            mixed=False,
        )
        for sets in (False, True)
    )
    assert by_pairs.predicted_layer_us == pytest.approx(by_sets.predicted_layer_us, rel=1e-9)
    assert by_pairs.fanout is None  # what is estimated is no count
