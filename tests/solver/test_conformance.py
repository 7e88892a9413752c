"""Random small problems over every option: what `solve` answers is true of the problem asked."""

import sys
from itertools import pairwise
from math import comb, prod

import numpy as np
import pytest
from brute_force import every_placement, rank
from make import trace_of

import moetuner as mt
from moetuner.solver import METHODS, effort
from moetuner.solver.stages.floor import balanced

SEARCHES = ("joint", "heuristic")
# Sums of floats may be off by this part.
ROUNDING = 1e-9
# Placements that are tried at most.
MOST_TRIED = 1000


@pytest.fixture(autouse=True)
def _few_are_polished(monkeypatch):
    """Polish the best placement of the smallest problems: a polish judges thousands."""
    monkeypatch.setattr(effort, "POLISHED", 1)
    monkeypatch.setattr(effort, "POLISHED_SLOTS", 4)


def random_problem(seed):
    """Draw a problem, all options of which may meet; None where it is refused in a sentence."""
    rng = np.random.default_rng(seed)
    devices, layers = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    experts = int(rng.integers(2, 5 if layers == 2 else 6))
    ids = rng.random((int(rng.integers(4, 30)), layers, experts)).argsort(axis=2)
    top_k = int(rng.integers(1, min(experts, 3) + 1))
    trace = trace_of(ids[..., :top_k].astype(np.uint8), experts)
    statistics = mt.RoutingStatistics.from_trace(trace, window=10, sets=bool(rng.integers(2)))
    row = rng.integers(0, experts + 1, devices)
    row[0] += max(experts - row.sum(), 0)
    fewest = -(-experts // devices)
    slots = [
        {},
        {"slots_per_device": fewest + int(rng.integers(2))},
        {"slots_per_device": row.tolist()},
        {"extra_slots": int(rng.integers(layers * experts * (devices - 1) + 1))},
    ]

    def rules(count):
        number = (layers, experts, devices)
        drawn = [tuple(int(rng.integers(n)) for n in number) for _ in range(rng.integers(count))]
        return [(None, *rule[1:]) if rng.integers(2) else rule for rule in drawn]

    speed = rng.choice([1.0, 1.02, 2.0], devices).tolist()
    try:
        return mt.Problem(
            statistics,
            mt.Topology(devices, speed=speed if rng.integers(4) == 0 else None),
            objective=str(rng.choice(["time", "balance", "traffic"])),
            regime=str(rng.choice(["dispatch", "follow"])),
            split=str(rng.choice(["even", "nearest", "round_robin"])),
            max_imbalance=[None, 1.0, 1.3, np.inf][rng.integers(4)],
            risk="mean" if rng.integers(4) else 0.5,
            fill_slots=bool(rng.integers(3) == 0),
            pinned=rules(3) if rng.integers(2) else [],
            forbidden=rules(2),
            **slots[rng.integers(4)],
        )
    except ValueError:
        return None


def is_behind(one, other):
    """Whether a rank is behind another one by more than rounding."""
    return one[0] > other[0] + ROUNDING or (
        one[0] >= other[0] - ROUNDING and one[1] > other[1] * (1 + ROUNDING)
    )


def broken(problem, placement):
    """Rules that a placement breaks, less the load cap."""
    return [line for line in problem.violations(placement) if "max_imbalance" not in line]


def least_value(problem):
    """Compute the least value of all placements; None if there are many, infinite without any."""
    contents = [comb(problem.num_experts, n) for n in range(problem.num_experts + 1)]
    if prod(sum(contents[: slots + 1]) for slots in problem.capacity.ravel().tolist()) > MOST_TRIED:
        return None
    every = (p for p in every_placement(problem) if problem.may_copy or not p.has_copies)
    return min((problem.value(p) for p in every if not problem.violations(p)), default=np.inf)


def check_claims(problem, result, least):
    """Hold bound, status and certificate of an answer against the least value of any placement."""
    if result.certificate is not None:
        objective = problem.objective_function
        scale = objective.tokens if objective.has_expert_sets else objective.scale
        assert mt.verify(result.certificate, problem) <= least * scale * (1 + ROUNDING)
    if np.isfinite(least):
        assert not result.details.caps.infeasible
        assert not result.details.caps.raised
        assert result.bound is None or result.bound <= least * (1 + ROUNDING)
        assert result.status != "optimal" or result.objective <= least * (1 + ROUNDING)


def check_slots(problem, running, placement):
    """Check that what stays keeps its slot, and that slots are full where they are to be."""
    slots, before = placement.slots, running.slots
    stays = np.take_along_axis(placement.held, np.maximum(before, 0).astype(np.int64), axis=2)
    width = np.arange(before.shape[2]) < problem.capacity[:, :, None]
    stays &= (before >= 0) & width
    assert (slots[:, :, : before.shape[2]] == before)[stays].all()
    full = np.minimum(problem.capacity, problem.num_experts)
    assert not problem.fill_slots or ((slots >= 0).sum(axis=2) == full).all()


def check_front(problem, running):
    """More moves exceed caps less, or as much at a lower objective; every trade keeps all rules."""
    trades = mt.pareto(problem, running, expert_bytes=7.0, iterations=50)
    ranks = [rank(problem, trade.placement) for trade in trades]
    assert all(is_behind(*pair) for pair in pairwise(ranks))
    moves = [trade.experts_moved for trade in trades]
    assert moves == sorted(set(moves))
    for trade, (excess, value) in zip(trades, ranks, strict=True):
        assert broken(problem, trade.placement) == []
        assert trade.experts_moved == running.diff(trade.placement).experts_moved
        assert (trade.objective, trade.bytes_moved) == (value, 7 * trade.experts_moved)
        assert trade.gain == pytest.approx(problem.value(running) - value)
        assert trade.placement.fingerprint == problem.statistics.fingerprint
        assert bool(trade.caps_raised) == (excess > 0)


@pytest.mark.parametrize("seed", range(12))
def test_answers_are_true_of_the_problem(seed):
    """Rules and budgets are kept, single copies and what runs are floors, and claims hold."""
    problem = random_problem(seed)
    if problem is None:
        return
    rng, given = np.random.default_rng(seed), {"threads": 1, "iterations": 50}
    answers = {name: mt.solve(problem, name, **given) for name in (*SEARCHES, "quick", "eplb")}
    least = least_value(problem)
    for name, result in answers.items():
        assert broken(problem, result.placement) == []
        assert problem.may_copy or not result.placement.has_copies
        if least is not None and name in SEARCHES:
            check_claims(problem, result, least)
    single = problem.without_copies()
    for name in SEARCHES if single is not None and not problem.fill_slots else ():
        alone = mt.solve(single, name, **given).placement
        assert not is_behind(*(rank(problem, p) for p in (answers[name].placement, alone)))

    running = mt.solve(problem, "random", seed=seed).placement
    check_front(problem, running)
    budget, method = int(rng.integers(problem.capacity.sum() + 1)), SEARCHES[seed % 2]
    moving = {"initial": running, "move_budget": budget, "iterations": 50}
    try:
        result = mt.solve(problem, method, threads=1, **moving)
    except ValueError:  # see test_moves: only where no placement is within the budget
        return
    assert broken(problem, result.placement) == []
    assert mt.solve(problem, method, threads=2, **moving).placement == result.placement
    moved = running.diff(result.placement).experts_moved
    assert moved == result.details.search.experts_moved <= budget
    check_slots(problem, running, result.placement)
    if not broken(problem, running):
        assert not is_behind(rank(problem, result.placement), rank(problem, running))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_at_any_moment_gives_an_answer(make_trace, method):
    """Ctrl-C while Python works on an answer ends every method with the best so far."""
    statistics = mt.RoutingStatistics.from_trace(make_trace(60), window=20)
    problem = mt.Problem(statistics, mt.Topology(4), objective="time", slots_per_device=3)
    floor = mt.Placement(balanced(problem), num_experts=8)
    for moment in (1, 200, 1500):
        calls, began = 0, False

        def interrupt(frame, event, _, moment=moment):
            nonlocal calls, began
            began |= frame.f_code.co_name == "fingerprint"
            calls += began and event == "call"
            if calls == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            result = mt.solve(problem, method, threads=1, iterations=100)
        finally:
            sys.setprofile(None)
        assert result.status == "interrupted" or calls < moment
        behind = is_behind(rank(problem, result.placement), rank(problem, floor))
        assert not (behind and method in SEARCHES)
