"""Effort: default is bounded work, thorough is more of the same, and a time limit is neither."""

import math
from dataclasses import replace

import numpy as np
import pytest
from brute_force import rank
from instances import routing

import moetuner as mt
from moetuner.solver import EFFORTS, effort, stages
from moetuner.solver.bounds import pairs
from moetuner.solver.budget import Budget
from moetuner.solver.effort import RESTARTS
from moetuner.solver.run import Run, Stage
from moetuner.solver.stages import annealing, descent, layers, visits


class Counted:
    """The core's layers, whose searches are counted in work and not made."""

    def __init__(self, core, problem, works):
        self.core, self.works = core, works
        self.units = visits.units_of_trial(Run(problem))

    def __getattr__(self, name):
        return getattr(self.core, name)

    def place(self, start, *, trials, restarts=1, rounds=1, links=None, **_):
        """Return the start, and count the trials of every layer in all turns and restarts."""
        searches = restarts * (1 if links is None else 2 * rounds)
        self.works.append(trials * searches * self.units)
        return start, False


def problem_of(make_trace, **settings):
    """Make a problem of a small trace, with expert sets, on four devices in two nodes."""
    statistics = mt.RoutingStatistics.from_trace(make_trace(40), window=20, sets=True)
    return mt.Problem(statistics, mt.Topology(4, devices_per_node=2), **settings)


CASES = [
    {"objective": "time"},
    {"objective": "time", "slots_per_device": 3},
    {"objective": "time", "regime": "follow"},
    {"objective": "balance", "risk": 0.5},
    {"objective": "traffic", "max_imbalance": 1.2},
]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("work", [1e5, 1e7])
def test_default_effort_is_bounded_work(make_trace, monkeypatch, settings, work):
    """Single copies and copies are searched with so much work each, and a quarter for balance."""
    works, problems = [], []

    def note_problem(problem, **others):
        problems.append(problem)
        return make_site(problem, **others)

    def count(*arguments, **others):
        return Counted(core_layers(*arguments, **others), problems[-1], works)

    core_layers, make_site = layers.core_layers, layers.make_site
    for stage in (layers, visits):
        monkeypatch.setattr(stage, "make_site", note_problem)
        monkeypatch.setattr(stage, "core_layers", count)
    monkeypatch.setattr(effort, "CHAIN_LEAST", 1000)
    short = replace(EFFORTS["default"], layer_work=work, chain_trials=20)
    monkeypatch.setitem(EFFORTS, "default", short)
    mt.solve(problem_of(make_trace, **settings), "heuristic")
    assert 0 < sum(works) <= 2.5 * work


@pytest.mark.parametrize("settings", CASES)
def test_thorough_is_never_behind_default(make_trace, monkeypatch, settings):
    """More of the same search is no worse."""
    for name, work, trials in (("default", 3e4, 20), ("thorough", 3e5, 200)):
        short = replace(EFFORTS[name], layer_work=work, chain_trials=trials)
        monkeypatch.setitem(EFFORTS, name, short)
    monkeypatch.setattr(effort, "CHAIN_LEAST", 1000)
    problem = problem_of(make_trace, **settings)
    values = []
    for name in ("default", "thorough"):
        values.append(rank(problem, mt.solve(problem, "heuristic", effort=name).placement))
    assert values[1] <= values[0]


def test_a_time_limit_decides_alone():
    """Under a time limit the effort is the thorough one, whichever is named, and work endless."""
    for name in EFFORTS:
        timed = Budget(time_limit=5, effort=name).work
        assert timed == replace(EFFORTS["thorough"], layer_work=math.inf)
        assert Budget(effort=name).work == EFFORTS[name]


@pytest.mark.parametrize(
    ("name", "hopeless"), [*((name, 1.0) for name in EFFORTS), ("default", 0.01)]
)
def test_tangents_get_iterations_by_effort(make_trace, monkeypatch, name, hopeless):
    """Two devices, whose contents are too many to try: the bound iterates as the effort says.

    It does not where sums of rows and columns are too far below; what they prove is the bound then.
    """
    made, bound = [], pairs.bound

    def note(*arguments, iterations, **others):
        made.append(iterations)
        return bound(*arguments, iterations=iterations, **others)

    monkeypatch.setattr(pairs, "bound", note)
    monkeypatch.setattr(effort, "HOPELESS", hopeless)
    statistics = mt.RoutingStatistics.from_trace(make_trace(60, layers=1, experts=32), sets=True)
    problem = mt.Problem(statistics, mt.Topology(2), objective="traffic", regime="dispatch")
    result = mt.solve(problem, iterations=50, effort=name)
    assert made == ([0, EFFORTS[name].tangent_iterations] if hopeless == 1 else [0])
    assert hopeless < 1 or result.bound_source.startswith("tangents + ")
    assert 0 < result.bound <= result.objective
    assert mt.verify(result.certificate, problem) == result.certificate.cost


@pytest.mark.parametrize(("experts", "searches"), [(8, effort.VISIT_SEARCHES), (96, 1)])
def test_searches_of_visits_share_the_trials(make_trace, monkeypatch, experts, searches):
    """A layer of few slots is searched as often as is written down, a larger one once."""
    made = []

    class Noted:
        def place(self, start, *, trials, restarts, **_):
            made.append((trials, restarts))
            return start, False

    monkeypatch.setattr(visits, "core_layers", lambda *_, **__: Noted())
    statistics = mt.RoutingStatistics.from_trace(make_trace(40, experts=experts), sets=True)
    problem = mt.Problem(statistics, mt.Topology(4), objective="traffic", regime="dispatch")
    mt.solve(problem, "heuristic", iterations=100)
    assert made == [(100 // searches, searches)]


@pytest.mark.parametrize(
    ("settings", "arguments", "restarts"),
    [
        ({}, {}, EFFORTS["default"].single_restarts),
        ({}, {"effort": "thorough"}, RESTARTS),
        ({}, {"effort": "brief"}, EFFORTS["brief"].single_restarts),
        ({"slots_per_device": 3}, {"effort": "brief"}, 1),
        ({}, {"iterations": 10}, RESTARTS),
        ({}, {"time_limit": 10.0}, RESTARTS),
        # The search by the slowest devices is the last one.
        ({"slots_per_device": 3}, {}, RESTARTS),
        ({"risk": 0.5}, {}, RESTARTS),
        ({"objective": "balance"}, {}, RESTARTS),
        ({"regime": "follow"}, {}, RESTARTS),
    ],
)
def test_layers_are_searched_fewer_times_where_trials_look_at_sets(
    make_trace, monkeypatch, settings, arguments, restarts
):
    """Of single copies, by default: where it takes long and a few searches find as much."""
    made = []

    class Noted(Counted):
        def place(self, start, *, restarts=1, **_):
            made.append(restarts)
            return start, False

    problem = problem_of(make_trace, **settings)
    core_layers = layers.core_layers
    monkeypatch.setattr(
        layers,
        "core_layers",
        lambda *own, **others: Noted(core_layers(*own, **others), problem, []),
    )
    mt.solve(problem, "heuristic", **arguments)
    if problem.goal == "balance":
        # The search by the slowest devices goes on from the best.
        assert made.pop() == RESTARTS
    assert made[-1] == restarts


@pytest.mark.parametrize("arguments", [{}, {"effort": "brief"}, {"seed": 3}])
def test_numbers_of_slots_share_a_search_of_single_copies(make_trace, monkeypatch, arguments):
    """What was searched without slots to spare is not searched again, and answers stay the same."""
    searched = []
    floor = stages.FLOOR.run

    def note(run, budget):
        searched.append(type(run.problem))
        floor(run, budget)

    search = {"method": "heuristic", "iterations": 30, **arguments}
    wanted = mt.solve(problem_of(make_trace, slots_per_device=3), **search).placement
    for module in (stages, annealing):
        monkeypatch.setattr(module, "FLOOR", replace(stages.FLOOR, run=note))
    single = problem_of(make_trace)
    mt.solve(single, **search)
    copied = mt.Problem(single.statistics, single.topology, slots_per_device=3)
    assert mt.solve(copied, **search).placement == wanted
    assert set(searched) == {mt.Problem}
    mt.solve(copied, **{**search, "seed": 4})
    assert set(searched) > {mt.Problem}


@pytest.mark.parametrize(
    ("experts", "slots", "times", "is_left_out"),
    [(128, 12, 200, True), (128, 12, 1, False), (32, 3, 200, False)],
)
def test_full_slots_far_behind_are_not_searched(monkeypatch, experts, slots, times, is_left_out):
    """Not in large layers that get few trials each: the answer is the same without a search."""
    brief = EFFORTS["brief"]
    short = replace(brief, layer_work=brief.layer_work / times)
    monkeypatch.setitem(EFFORTS, "brief", short)
    trace = routing(2, experts, 4, tokens=2000, types=12)
    statistics = mt.RoutingStatistics.from_trace(trace, window=100, sets=True)
    problem = mt.Problem(statistics, mt.Topology(16), slots_per_device=slots, fill_slots=True)
    searched, answers = [], []
    note = Stage(lambda run, _: searched.append(run.problem.fill_slots))
    monkeypatch.setattr(stages, "LAYER_SEARCHES", (note, *stages.LAYER_SEARCHES))
    for behind in (stages.SINGLE_BEHIND, math.inf):
        monkeypatch.setattr(stages, "SINGLE_BEHIND", behind)
        statistics.memo.clear()
        searched.clear()
        answers.append(mt.solve(problem, "heuristic", effort="brief"))
        assert any(searched) != (is_left_out and not math.isinf(behind))
    assert answers[0].placement == answers[1].placement


@pytest.mark.parametrize("effort_name", ["brief", "default"])
def test_full_slots_are_searched_for_an_answer_below_the_cutoff(monkeypatch, effort_name):
    """Where slots that may stay empty are worth the cutoff or more, their copies are filled up."""
    trace = routing(2, 32, 4, tokens=2000, types=12)
    statistics = mt.RoutingStatistics.from_trace(trace, window=100, sets=True)
    full = mt.Problem(statistics, mt.Topology(16), slots_per_device=3, fill_slots=True)
    search = {"method": "heuristic", "effort": effort_name}
    searched = []
    note = Stage(lambda run, _: searched.append(run.problem.fill_slots))
    monkeypatch.setattr(stages, "LAYER_SEARCHES", (note, *stages.LAYER_SEARCHES))
    partly_empty = replace(full, fill_slots=False)
    known = mt.solve(partly_empty, **search)
    filled = partly_empty.value(known.placement.filled())
    for cutoff, is_wanted in [(known.objective * (1 + 1e-9), True), (known.objective, False)]:
        searched.clear()
        answer = mt.solve(full, **search, cutoff=cutoff)
        assert any(searched) == is_wanted
        assert answer.objective <= filled * (1 + 1e-12)
        assert answer.objective >= known.objective
    searched.clear()
    # Only full slots that cost are left out.
    assert mt.solve(partly_empty, **search, cutoff=0).placement == known.placement
    assert searched


@pytest.mark.parametrize(
    ("has_sets", "times", "parts"), [(False, 200, 1), (True, 1, 1), (True, 200, 4)]
)
def test_a_search_for_time_begins_with_one_for_balance(monkeypatch, has_sets, times, parts):
    """In large layers it is a whole one, or a quarter where visits leave few trials for time."""
    default = EFFORTS["default"]
    short = replace(default, layer_work=default.layer_work / times)
    monkeypatch.setitem(EFFORTS, "default", short)
    trace = routing(2, 128, 4, tokens=2000, types=12)
    statistics = mt.RoutingStatistics.from_trace(trace, window=100, sets=has_sets)
    made = []
    balance = layers.balance_windows

    def note(run, budget, weight, trials, **options):
        made.append((trials, bool(options)))
        return balance(run, budget, weight, trials, **options)

    monkeypatch.setattr(layers, "balance_windows", note)
    mt.solve(mt.Problem(statistics, mt.Topology(16)), "heuristic")
    # The others are starts. The windows and their mean are two batches.
    whole = default.balancing * 128 // 2
    assert [trials for trials, is_whole in made if is_whole] == [whole // parts]


@pytest.mark.parametrize(("name", "times"), [("brief", 1), ("default", 2), ("thorough", 2)])
def test_a_brief_search_settles_at_its_end_alone(make_trace, monkeypatch, name, times):
    """The search for balance that others begin with takes steps down, too."""
    settled = []
    descend = descent.descend

    def note(run, *arguments):
        settled.append(run.problem.goal)
        return descend(run, *arguments)

    monkeypatch.setattr(descent, "descend", note)
    counts = mt.RoutingStatistics.from_trace(make_trace(40), window=5, sets=True)
    mt.solve(mt.Problem(counts, mt.Topology(4)), "heuristic", iterations=30, effort=name)
    assert len(settled) == times
    assert settled[-1] == "time"


@pytest.mark.parametrize("gains", [True, False])
def test_the_others_of_many_layers_are_searched_where_the_first_gain(monkeypatch, gains):
    """Those that cost most come first; where the others follow, the answer is as if all did."""
    trace = routing(40, 16, 2, tokens=400, types=8)
    statistics = mt.RoutingStatistics.from_trace(trace, window=100, sets=True)
    if not gains:
        # Each device has as much work as any other, however experts are placed.
        load = np.full((1, 40, 16), 100, dtype=np.uint64)
        statistics = mt.RoutingStatistics.from_load(load)
    problem = mt.Problem(statistics, mt.Topology(4), slots_per_device=5, fill_slots=True)
    anneal, searched, first = layers.anneal, [], effort.FIRST_LAYERS

    def note(run, budget, model):
        searched.append((model.chosen, layers._cost_of(run, run.best.slots)))
        anneal(run, budget, model)

    monkeypatch.setattr(layers, "anneal", note)
    answer = mt.solve(problem, "heuristic", seed=1)
    begun = [(chosen, costs) for chosen, costs in searched if len(chosen) == first]
    for chosen, costs in begun:
        assert costs[chosen].min() >= np.delete(costs, chosen).max()
    followed = [chosen for chosen, _ in searched if len(chosen) == problem.layers - first]
    assert len(begun) + len(followed) == len(searched)
    assert bool(followed) == gains
    searched.clear()
    monkeypatch.setattr(effort, "MANY_LAYERS", math.inf)
    statistics.memo.clear()
    assert mt.solve(problem, "heuristic", seed=1).objective == pytest.approx(answer.objective)
    assert [chosen for chosen, _ in searched] == [None] * len(begun)


def test_starts_are_made_once_for_the_same_counts(monkeypatch):
    """Neither another effort nor full slots change them; a time limit may, so they are not kept."""
    trace = routing(2, 16, 2, tokens=400, types=8)
    statistics = mt.RoutingStatistics.from_trace(trace, window=100, sets=True)
    full = mt.Problem(statistics, mt.Topology(4), slots_per_device=5, fill_slots=True)
    find_starts, made = layers._find_starts, []

    def note(run, budget):
        made.append((run.problem.slots, run.problem.objective))
        return find_starts(run, budget)

    monkeypatch.setattr(layers, "_find_starts", note)
    mt.solve(full, "heuristic", seed=1)
    first = list(made)
    assert {slots for slots, _ in first} == {4, 5}
    assert len(set(first)) == len(first)
    others = replace(full, fill_slots=False)
    wanted = mt.solve(others, "heuristic", seed=1, effort="brief").placement
    assert made == first
    mt.solve(others, "heuristic", seed=2)
    again = len(made)
    assert again > len(first)
    mt.solve(others, "heuristic", seed=2, time_limit=5)
    assert len(made) > again
    statistics.memo.clear()
    assert mt.solve(others, "heuristic", seed=1, effort="brief").placement == wanted
