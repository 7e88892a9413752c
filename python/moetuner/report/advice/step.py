"""The cheapest useful step: what few moves gain of what the proposed placement does."""

from __future__ import annotations

import numpy as np

from moetuner.evaluation.judgement import judge
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.report.advice.request import Holdout, Request
from moetuner.report.advice.trial import PROPOSED, RUNNING, Trial, evaluate_all
from moetuner.report.advice.values import Advice, SmallStep
from moetuner.solver import find_few_moves
from moetuner.solver.rebalancing import rebalance

# The part of the proposed placement's gain that is enough, and of its moves that are few.
ENOUGH, FEW_MOVES = 0.75, 0.6
# Slots of all layers up to which moves are searched step by step, half a second for as many: of
# the largest models that takes a minute. There parts of the proposed placement's moves are tried,
# each of which is larger than the one before by less than a half.
FEW_SLOTS = 2048
PARTS = (0.01, 0.014, 0.02, 0.03, 0.04, 0.06, 0.08, 0.11, 0.16, 0.23, 0.32, 0.45, FEW_MOVES)
STEP = "step"


def find_step(request: Request, trial: Trial, part: Holdout, advice: Advice) -> SmallStep | None:
    """Return the fewest moves that gain most of what the proposed placement gains.

    They are chosen by what was seen and judged on what was not, in the windows where most is
    gained. None where nothing is proposed, or few moves gain little.
    """
    problem, running = trial.problem, trial.placements[RUNNING]
    if advice.answer != "worth a trial" or not problem.has_slots_for(running):
        return None
    highest = int(FEW_MOVES * advice.moving.experts)
    if problem.capacity.sum() <= FEW_SLOTS:
        found = find_few_moves(
            problem,
            running,
            trial.placements[PROPOSED],
            ENOUGH,
            time_limit=request.time_limit,
            threads=request.threads,
        )
    else:
        found = _relieve_enough(trial, advice.moving.experts)
    if found is None or problem.violations(found):
        return None
    step = _judge(request, trial, part, advice, found)
    return step if step.experts <= highest else None


def _relieve_enough(trial: Trial, experts: int) -> Placement | None:
    """Return what the fewest of some parts of so many moves make of what runs, if it is enough.

    By bisection, as more moves gain more: none is enough where the most are not.
    """
    problem, running = trial.problem, trial.placements[RUNNING]
    value = problem.value(running)
    wanted = value - ENOUGH * (value - problem.value(trial.placements[PROPOSED]))
    enough: Placement | None = None
    fewest, tried, last = 0, len(PARTS) - 1, len(PARTS)
    while fewest < last:
        found = _relieve(problem, running, int(PARTS[tried] * experts))
        if not problem.violations(found) and problem.value(found) <= wanted:
            enough, last = found, tried
        elif enough is None:
            return None
        else:
            fewest = tried + 1
        tried = (fewest + last) // 2
    return enough


def _relieve(problem: Problem, running: Placement, budget: int) -> Placement:
    """Return what so many moves make of what runs, by the search of live rebalancing.

    It sees load alone, so it may break another rule of the problem.
    """
    windows = problem.windows.searched
    weight = windows.weight / max(float(windows.weight.mean()), 1e-300)
    load = np.ascontiguousarray(windows.load * weight[:, None, None], dtype=np.float64)
    slots = pad_slots(running.slots, problem.capacity)
    time = problem.topology.time_of_device
    found = rebalance(load, slots, budget=budget, time=time, full=problem.fill_slots)
    return Placement(found.slots, num_experts=problem.experts)


def _judge(
    request: Request, trial: Trial, part: Holdout, advice: Advice, placement: Placement
) -> SmallStep:
    """Judge a placement beside what runs, on the unseen traffic of the first split."""
    window, running = advice.main.window, trial.placements[RUNNING]
    evaluated = evaluate_all(request, {STEP: placement}, part.unseen, [window])
    judgement = judge(
        trial.evaluations[window][RUNNING],
        evaluated[window][STEP],
        figure="predicted_layer_us",
        measures=["predicted_layer_us"],
        units=request.units[window],
        price=request.price,
        names=("running", STEP),
    )
    diff = running.diff(placement, expert_bytes=request.expert_bytes)
    return SmallStep(diff.experts_moved, diff.bytes_moved, judgement.gain)
