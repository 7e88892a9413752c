"""Phases: windows of decode and of prefill in one objective, each with its share of the time."""

import json

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.placement import blocks
from moetuner.problem.objective import choose_tables
from moetuner.problem.windows import MOST
from moetuner.serving.phases import PREFILL_SHARE, WINDOWS


def recorded(tokens, seed=0, *, experts=8, layers=2, groups=None):
    """Trace whose sequences each prefer other experts; groups follow one another."""
    rng = np.random.default_rng(seed)
    sequence = np.arange(tokens) // 64
    liked = rng.normal(0, 1.5, (sequence[-1] + 1, layers, experts))[sequence]
    ids = np.argsort(-(liked + rng.gumbel(size=liked.shape)), axis=2)[..., :2].astype(np.uint8)
    labels = {"sequence": sequence}
    if groups is not None:
        labels |= {"group": np.repeat(np.arange(len(groups)), groups)}
        labels["group_names"] = [f"g{number}" for number in range(len(groups))]
    return trace_of(ids, experts, **labels)


def counted(tokens, window=512, **how):
    return mt.RoutingStatistics.from_trace(recorded(tokens), window=window, sets=True, **how)


def plain_mean(statistics, placement, tokens, topology, goal):
    """Average what sums of whole windows cost, in order, by a plain loop."""
    size = tokens // statistics.window
    sums = [
        statistics.window_load[at : at + size].sum(axis=0)
        for at in range(0, len(statistics.window_load) // size * size, size)
    ]
    whole = mt.RoutingStatistics(
        np.array(sums), statistics.transitions, statistics.coactivation, sets=statistics.sets
    )
    return mt.Problem(whole, topology, objective=goal).value(placement)


@pytest.mark.parametrize("devices_per_node", [4, 2])
@pytest.mark.parametrize("copies", [0, 1])
def test_a_time_of_expert_sets_asks_for_no_pairs(brief, devices_per_node, copies):
    """Counted with sets alone, a trace has the same phases, answer and bound as with all tables."""
    trace, topology = recorded(3 * WINDOWS[1]), mt.Topology(4, devices_per_node=devices_per_node)
    tables = choose_tables("dispatch", "time")
    assert tables == {"sets": True, "transitions": False, "coactivation": False}
    results = [
        mt.solve(
            mt.Problem(
                mt.RoutingStatistics.from_trace(trace, window=512, **each),
                topology,
                slots_per_device=2 + copies,
            ),
            iterations=100,
        )
        for each in ({"sets": True}, tables)
    ]
    every, alone = results
    assert len(alone.placement.settings["phases"]) == len(WINDOWS)
    assert every.placement.settings["phases"] == alone.placement.settings["phases"]
    assert every.placement == alone.placement
    assert (every.objective, every.bound) == (alone.objective, alone.bound)


@pytest.mark.parametrize("goal", ["time", "balance", "traffic"])
@pytest.mark.parametrize("regime", ["dispatch", "follow"])
def test_what_an_objective_is_made_of_is_counted(regime, goal):
    """Of the tables that are counted for it, its value is that of all tables."""
    trace, topology = recorded(700), mt.Topology(4)
    placement = blocks(2, 8, 4)
    values = [
        mt.Problem(
            mt.RoutingStatistics.from_trace(trace, **tables),
            topology,
            objective=goal,
            regime=regime,
        ).value(placement)
        for tables in ({"sets": True}, choose_tables(regime, goal))
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_time_is_a_mean_over_steps_that_take_their_shares_of_the_time(share):
    """Of both phases by a plain loop: under experts in blocks each phase takes its share."""
    statistics, topology = counted(64 * 64, window=64), mt.Topology(4)
    problem = mt.Problem(statistics, topology, phases={64: 1 - share, 1024: share})
    placements = [blocks(2, 8, 4), mt.solve(problem, "lpt").placement]
    means = [
        [plain_mean(statistics, of, tokens, topology, "time") for tokens in (64, 1024)]
        for of in placements
    ]
    # Steps of each phase, of which blocks spend the shares.
    steps = np.array([1 - share, share]) / means[0]
    for placement, mean in zip(placements, means, strict=True):
        wanted = (steps * mean).sum() / steps.sum()
        assert problem.value(placement) == pytest.approx(wanted, rel=1e-9)
    spent = steps * means[0]
    assert spent[1] / spent.sum() == pytest.approx(share)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_imbalance_is_the_mean_of_both_phases_by_their_shares(share):
    """Balance has no time: each phase's imbalance counts its share."""
    statistics, topology = counted(64 * 64, window=64), mt.Topology(4)
    how = {"objective": "balance"}
    problem = mt.Problem(statistics, topology, phases={64: 1 - share, 1024: share}, **how)
    placement = mt.solve(problem, "lpt").placement
    decode, prefill = (
        plain_mean(statistics, placement, tokens, topology, "balance") for tokens in (64, 1024)
    )
    assert problem.value(placement) == pytest.approx((1 - share) * decode + share * prefill)


def test_a_trace_has_both_phases_however_short_it_is():
    """Loads alone, and other windows than those of decode, are in one phase, as counted."""
    both = dict(zip(WINDOWS, (1 - PREFILL_SHARE, PREFILL_SHARE), strict=True))
    alone = {"transitions": False, "coactivation": False}
    tokens = 2 * WINDOWS[1]
    cases = [
        (counted(tokens), both),
        (counted(tokens - 1), both),
        (counted(600), both),
        (counted(100), both),
        (counted(tokens, window=256), {256: 1.0}),
        (counted(tokens, **alone), both),
        (mt.RoutingStatistics.from_trace(recorded(tokens), **alone, sets=False), {512: 1.0}),
        (mt.RoutingStatistics.from_load([[[1, 2]]] * 40), {None: 1.0}),
    ]
    for statistics, shares in cases:
        assert mt.Problem(statistics, mt.Topology(2)).shares == shares
    assert mt.Problem(cases[0][0], mt.Topology(2), phases={512: 3}).shares == {512: 1.0}


def test_a_phase_of_no_share_is_as_if_it_was_not_named():
    """The answer is that of the other phase alone, to the bit."""
    statistics, topology = counted(64 * 64, window=64), mt.Topology(4)
    for given, alone in (({64: 1.0, 1024: 0.0}, 64), ({64: 0.0, 1024: 1.0}, 1024)):
        a, b = (mt.Problem(statistics, topology, phases=of) for of in (given, {alone: 1.0}))
        assert mt.solve(a, "lpt").objective == mt.solve(b, "lpt").objective
        assert len(a.windows) == 64 * 64 // alone


def test_longer_windows_stay_in_order_and_within_a_group():
    """A plain loop over every group's whole windows; what is left over is in none."""
    sizes = [64 * 7 + 10, 64 * 5, 64 * 3 + 1]
    trace = recorded(sum(sizes), groups=sizes)
    statistics = mt.RoutingStatistics.from_trace(trace, window=64, by_group=True)
    joined = statistics.joined(128)
    wanted = []
    for number, size in enumerate(sizes):
        own = np.flatnonzero(statistics.group == number)[: size // 64]
        pairs = own[: len(own) // 2 * 2].reshape(-1, 2)
        wanted += [statistics.window_load[pair].sum(axis=0) for pair in pairs]
    assert np.array_equal(joined.window_load, wanted)
    assert joined.group.tolist() == [0, 0, 0, 1, 1, 2]
    assert (joined.window, joined.transitions) == (128, None)


@pytest.mark.parametrize(
    ("window", "windows", "size"),
    [
        (512, 1, 1),
        (512, 2, 1),
        (512, 7, 2),
        (512, 16, 4),
        (512, 31, 7),
        (64, 1, 1),
        (64, 2, 1),
        (64, 7, 3),
        (64, 16, 6),
        (64, 31, 10),
    ],
)
def test_windows_of_a_short_recording_are_scaled_from_shorter_runs(window, windows, size):
    """By a plain loop: runs of all of its tokens, scaled to the tokens of a long window.

    Runs are longer where the windows are shorter than those of decode.
    """
    statistics, tokens = counted(windows * window + 9, window=window), window * 32
    phase = mt.Problem(statistics, mt.Topology(2), phases={tokens: 1.0}).windows
    wanted = []
    for run in np.array_split(statistics.window_load, windows // size):
        total = run.sum(axis=0)
        wanted.append(total * (tokens * 2 * 2 / total.sum()))
    assert np.array_equal(phase.load, np.rint(wanted))
    assert phase.weight.sum() == pytest.approx((windows * window + 9) / tokens)


def test_groups_of_a_short_recording_count_as_their_tokens_do():
    """A group that fills no long window has the weight of its tokens, and one that fills two."""
    sizes = [64 * 10, 64 * 40, 64 * 70]
    statistics = mt.RoutingStatistics.from_trace(
        recorded(sum(sizes), groups=sizes), window=64, by_group=True
    )
    for groups in (None, {"g0": 1.0, "g1": 1.0, "g2": 1.0}):
        windows = mt.Problem(
            statistics, mt.Topology(2), phases={64 * 32: 1.0}, groups=groups
        ).windows
        weights = np.bincount(windows.group, windows.weight)
        # Of 70 windows two longer ones are filled, and six are left over.
        assert weights == pytest.approx([10 / 32, 40 / 32, 2])


@pytest.mark.parametrize("options", [{"risk": 0.8}, {"arrival": 0.5}, {"groups": "minimax"}])
def test_both_phases_count_whatever_else_is_asked_for(options):
    """The worst windows, mixed arrival and the worst group: of long windows alone they are none."""
    sizes = [64 * 32, 64 * 32]
    trace = recorded(sum(sizes), groups=sizes)
    grouped = "groups" in options
    statistics = mt.RoutingStatistics.from_trace(trace, window=64, by_group=grouped)
    topology = mt.Topology(4)
    of = [
        mt.Problem(statistics, topology, phases=phases, **options)
        for phases in ({64: 1}, {1024: 1}, {64: 0.5, 1024: 0.5})
    ]
    placement = mt.solve(of[2], "lpt").placement
    decode, prefill, both = (problem.value(placement) for problem in of)
    assert decode < both < prefill
    # With half of the time each, steps of decode are the more.
    assert both - decode < prefill - both


def test_thousands_of_windows_are_searched_by_phase():
    """Means of windows that are alike stand for each phase: weights and references add up."""
    load = np.random.default_rng(0).multinomial(8, [0.4, 0.3, 0.2, 0.1], ((MOST + 8) * 4, 1))
    windows = mt.RoutingStatistics.from_load(load, window=8)
    problem = mt.Problem(windows, mt.Topology(2), phases={8: 0.5, 32: 0.5})
    of, seen = problem.windows, problem.windows.searched
    assert len(seen) < len(of) == len(load) * 5 // 4
    assert seen.weight.sum() == pytest.approx(of.weight.sum())
    both = [(each.weight * each.reference).sum() for each in (of, seen)]
    assert both[0] == pytest.approx(both[1])
    assert seen.mean_tokens == pytest.approx(of.mean_tokens)


@pytest.mark.parametrize("goal", ["time", "balance"])
def test_a_bound_is_of_the_same_mean(goal):
    """No placement of a small problem is below it, and its scope names both phases."""
    statistics = counted(64 * 32, window=64)
    phases = {64: 0.5, 512: 0.5}
    problem = mt.Problem(statistics, mt.Topology(2), objective=goal, phases=phases)
    result = mt.solve(problem, iterations=50)
    rng = np.random.default_rng(0)
    for _ in range(200):
        slots = [np.sort(rng.permutation(8).reshape(2, 4), axis=1) for _ in range(2)]
        assert problem.value(mt.Placement(np.array(slots))) >= result.bound * (1 - 1e-9)
    where = "in windows of 64 tokens (50 % of the time) and of 512 (50 %)"
    assert where in result.bound_scope
    assert where in problem.objective_function.text(result.objective)


def test_a_placement_says_what_was_weighed(tmp_path):
    """Its settings name the windows and their shares, and survive a file."""
    statistics = counted(64 * 32, window=64)
    problem = mt.Problem(statistics, mt.Topology(2), phases={64: 3, 512: 1})
    mt.solve(problem, "lpt").placement.save(tmp_path / "p.json")
    settings = json.loads((tmp_path / "p.json").read_text())["settings"]
    assert settings["phases"] == {"64": 0.75, "512": 0.25}
    assert settings["window"] == 64
