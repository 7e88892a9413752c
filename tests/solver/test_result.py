"""Details of a result: typed parts, and the same keys in JSON as ever."""

import json
from dataclasses import replace

import numpy as np
import pytest

import moetuner as mt
from moetuner.report.outcome import Outcome
from moetuner.solver.budget import Budget, History, Progress, gap_between
from moetuner.solver.result import (
    BoundDetails,
    CapsDetails,
    Details,
    LevelBound,
    PlaceStage,
    SearchDetails,
    UnseenDetails,
)

FULL = Details(
    SearchDetails(trials=0, stage_2=PlaceStage("skipped", (2, 3), gap=0.0)),
    CapsDetails({0: 1.5}, {0: (1.4, 1.5)}),
    UnseenDetails("maximum", "too few windows"),
    BoundDetails({"devices": LevelBound(7, 3, "iterations")}, refuted="load"),
)


def test_json_has_one_flat_object_of_facts():
    """Zeros are known, None and empty parts are not; nothing else needs a name of its own."""
    assert json.loads(json.dumps(FULL.to_dict())) == {
        "trials": 0,
        "stage_2": {"way": "skipped", "experts_per_device": [2, 3], "gap": 0.0},
        "caps_raised": {"0": 1.5},
        "caps_infeasible": {"0": [1.4, 1.5]},
        "unseen": {"chosen": "maximum", "reason": "too few windows"},
        "bound": {"devices": {"crossing_pairs": 7, "iterations": 3, "ended": "iterations"}},
        "bound_refuted": "load",
    }
    assert Details().to_dict() == {}


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("joint", {"way"}),
        ("heuristic", {"trials"}),
        ("paper", {"stage_1", "stage_2"}),
        ("contiguous", set()),
    ],
)
def test_methods_say_what_they_did(method, keys):
    """Every method fills the parts that it knows, under the keys that scripts read."""
    pairs = np.ones((1, 4, 4), dtype=int)
    statistics = mt.RoutingStatistics(np.full((1, 2, 4), 4), pairs)
    problem = mt.Problem(statistics, mt.Topology(2), regime="follow", max_imbalance=1.0)
    details = mt.solve(problem, method, iterations=10).details
    assert set(details.to_dict()) == keys
    assert len(repr(details)) < 500


def test_history_keeps_every_change_once():
    """The best only falls and the bound only rises; who listens hears what is known."""
    heard = []
    history = History(heard.append)
    history.add(Progress(0.1, "search", 5.0))
    history.add(Progress(0.2, "search", 6.0))
    history.add(Progress(0.3, "search", 4.0))
    history.add(Progress(0.0, "bound", 4.0, is_step=True))
    history.add(Progress(0.4, "bound", None, 3.0))
    history.add(Progress(0.5, "bound", None, 2.0))
    lines = history.finish(4.0, 3.5)
    assert [(line.objective, line.bound) for line in lines] == [
        (5.0, None),
        (4.0, None),
        (4.0, None),
        (4.0, 3.0),
        (4.0, 3.5),
    ]
    assert [line.is_step for line in lines] == [False, False, True, False, True]
    assert (heard[-1].phase, heard[-1].objective, heard[-1].bound) == ("bound", 4.0, 3.0)
    assert len(heard) == 5  # not between phases
    assert lines[-1].gap == 0.125
    assert Progress(0.0, "search", 4.0).gap is None


@pytest.mark.parametrize("objective", ["time", "balance", "traffic"])
def test_a_result_has_its_history_without_a_listener(make_trace, objective):
    """The last line is the answer; steps are the same in each run, and nothing beats a bound."""
    # Counted for each: what was searched once of the same counts is not searched again.
    problems = [
        mt.Problem(
            mt.RoutingStatistics.from_trace(make_trace(1500), window=100, sets=True),
            mt.Topology(4),
            objective=objective,
            slots_per_device=3,
            regime="dispatch",
        )
        for _ in range(2)
    ]
    one, two = (
        mt.solve(problem, iterations=2000, threads=threads)
        for threads, problem in enumerate(problems, 1)
    )
    problem = problems[0]
    last = one.history[-1]
    assert (last.objective, last.bound) == (one.objective, one.bound)
    assert last.gap == gap_between(one.objective, one.bound)
    steps = [
        [(line.phase, line.objective, line.bound) for line in result.history if line.is_step]
        for result in (one, two)
    ]
    assert steps[0] == steps[1]
    if objective != "traffic":
        assert len(steps[0]) > 2
    small = mt.CostModel.preset("h100", hidden=512, intermediate=256)
    tied = replace(problem, fill_slots=True, cost_model=small)
    others = (("exflow", problem), ("heuristic", tied))
    for result in (one, *(mt.solve(of, method, iterations=200) for method, of in others)):
        for line in (line for line in result.history if line.objective is not None):
            assert result.bound is None or line.objective >= result.bound
            # No answer is behind what was reported on the way to it.
            assert line.objective >= result.objective * (1 - 1e-9)


def test_values_in_another_unit_are_not_reported():
    """Phases are heard of, their numbers are not."""
    heard = []
    budget = Budget(progress=heard.append).muted()
    budget.progress(Progress(1.0, "pairs", 3.0, 2.0))
    assert heard == [Progress(1.0, "pairs")]
    assert Budget().muted().progress is None


@pytest.mark.parametrize("objective", ["time", "balance"])
def test_no_gap_is_computed_to_a_bound_of_loads_alone(objective):
    """Python, JSON and the table hide it alike: it would be the bound's, not the placement's."""
    load = np.random.default_rng(0).integers(1, 900, (6, 3, 16))
    statistics = mt.RoutingStatistics.from_load(load)
    problem = mt.Problem(statistics, mt.Topology(4), objective=objective)
    result = mt.solve(problem, iterations=50)
    assert result.bound_is_of_loads
    assert 0 < result.bound < result.objective
    assert result.gap is None
    assert result.to_dict()["gap"] is None
    evaluation = mt.evaluate(result.placement, statistics, cost_model=problem.cost_model)
    outcome = Outcome(problem, result, evaluation)
    assert (outcome.gap, outcome.to_dict()["gap"]) == (None, None)
    assert outcome.to_dict()["bound"] == result.bound


@pytest.mark.parametrize("slots", [None, 3, 5])
def test_a_placement_has_the_loads_that_it_was_computed_from(slots, tmp_path):
    """Whether slots are full, empty or of copies; by them a plugin tells how far traffic is."""
    load = np.random.default_rng(0).poisson(100, (4, 2, 6))
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load), mt.Topology(2), slots_per_device=slots
    )
    for method in ("contiguous", "lpt"):
        mt.solve(problem, method).placement.save(tmp_path / "placement.json")
        placement = mt.Placement.load(tmp_path / "placement.json")
        assert placement.settings["load"] == load.sum(axis=0).tolist()
