"""Limits that hold: one clock that every phase asks, and interrupts that lose nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from brute_force import rank

import moetuner as mt
from moetuner.solver import budget
from moetuner.solver.budget import Budget
from moetuner.solver.run import Run
from moetuner.solver.stages import descent, polish
from moetuner.solver.stages.floor import balanced
from moetuner.solver.stages.layers import LayerModel

PROBLEMS = {
    "balance": {"objective": "balance", "slots_per_device": 5},
    "worst": {"objective": "balance", "risk": 0.5},
    "time": {"objective": "time"},
    "copies": {"objective": "time", "slots_per_device": 5},
    "follow": {"objective": "time", "regime": "follow"},
    "visits": {"objective": "traffic", "max_imbalance": 1.3},
    "visits, copies": {"objective": "traffic", "max_imbalance": 1.3, "slots_per_device": 5},
    "crossing": {"objective": "traffic", "regime": "follow", "max_imbalance": 1.3},
}


@pytest.fixture
def tick(monkeypatch):
    """Replace the clock by one that goes on by a step whenever it is read."""

    def tick(step):
        time = SimpleNamespace(now=0.0)

        def monotonic():
            time.now += step
            return time.now

        monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=monotonic))
        return time

    return tick


def test_a_clock_says_what_is_left(tick):
    """Shares are of what is left less what is kept back; nothing is ever below 0."""
    time = tick(0.0)
    clock = Budget(10.0)
    assert (clock.seconds_left, clock.within(0.5, keep=2.0).time_limit) == (10.0, 4.0)
    time.now += 7.0
    assert (clock.elapsed, clock.seconds_left, clock.is_over()) == (7.0, 3.0, False)
    assert clock.within(keep=4.0).time_limit == 0.0
    time.now += 7.0
    assert (clock.seconds_left, clock.is_over(), clock.within().time_limit) == (0.0, True, 0.0)
    endless = Budget()
    assert (endless.seconds_left, endless.is_over()) == (None, False)
    assert endless.within(0.1, keep=5.0) == Budget()


def test_a_pass_of_polish_ends_when_time_is_over(make_trace):
    """Not all neighbours of a placement are judged first: thousands, where slots are many."""
    problem = mt.Problem(mt.RoutingStatistics.from_trace(make_trace()), mt.Topology(4))
    run = Run(problem, seed=0, budget=Budget())
    start = run.offer(mt.solve(problem, "random").placement.slots, "start")
    contents = [None] * problem.layers
    neighbours = polish._neighbours(problem, start.slots, contents)
    assert polish._find_better(run, start, neighbours, Budget(0.0)) is None
    assert polish._find_better(run, start, neighbours, Budget()) is not None


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("limit", [0.0, 2.5, 10.0])
def test_time_that_is_over_ends_every_search(tick, make_trace, monkeypatch, name, limit):
    """No search of layers begins when the clock says that nothing is left."""
    time, begun = tick(1.0), []
    improve = LayerModel.improve

    def counted(self, run, slots, budget, *turns):
        begun.append(budget.time_limit)
        return improve(self, run, slots, budget, *turns)

    monkeypatch.setattr(LayerModel, "improve", counted)
    trace = make_trace(tokens=400, experts=16, seed=3)
    counted = mt.RoutingStatistics.from_trace(trace, window=50, sets=True)
    given = mt.Problem(counted, mt.Topology(4, devices_per_node=2), **PROBLEMS[name])
    result = mt.solve(given, time_limit=limit)
    assert all(0 < left < limit for left in begun)
    # As many readings as phases, however long the real ones take.
    assert time.now < limit + 60
    assert result.seconds == pytest.approx(time.now, abs=2.0)
    floor = mt.Placement(balanced(given), num_experts=given.num_experts)
    assert rank(given, result.placement) <= rank(given, floor)
    if not limit:
        assert not begun


def test_an_interrupt_before_the_first_step_down_is_not_lost(make_trace, monkeypatch):
    """Ctrl-C ends a solve although the steps down have found nothing by then."""
    problem = mt.Problem(mt.RoutingStatistics.from_trace(make_trace()), mt.Topology(4))
    run = Run(problem, seed=0, budget=Budget())
    slots = run.offer(mt.solve(problem, "random").placement.slots, "start").slots
    none = np.zeros((0, 2), dtype=np.int64)
    start = np.zeros(1)
    path = descent.Path(slots, none, none.astype(np.int32), start.astype(int), start, start)
    monkeypatch.setattr(descent, "descend", lambda *_: (path, True))
    with pytest.raises(KeyboardInterrupt):
        descent._settle(run, Budget())
