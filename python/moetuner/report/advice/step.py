"""The cheapest useful step: what few moves gain of what the proposed placement does."""

from __future__ import annotations

import numpy as np

from moetuner.evaluation.judgement import judge
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.report.advice.request import Part, Request, search
from moetuner.report.advice.trial import PROPOSED, RUNNING, Trial, evaluate_all
from moetuner.report.advice.values import Advice, SmallStep
from moetuner.solver.rebalancing import rebalance

# Parts of the moves to the proposed placement that are tried, and the part of its gain that is
# enough.
PARTS, ENOUGH = (0.05, 0.1, 0.2, 0.4, 0.6), 0.75
# Slots of all layers up to which moves are searched step by step: that takes a second for as many,
# and minutes for those of the largest models.
FEW_SLOTS = 2048
STEP = "step"


def find_step(request: Request, trial: Trial, part: Part, advice: Advice) -> SmallStep | None:
    """Return the fewest moves that gain most of what the proposed placement gains.

    They are chosen by what was seen and judged on what was not, in the windows where most is
    gained. None where nothing is proposed, or few moves gain little.
    """
    experts = advice.moving.experts
    if advice.answer != "worth a trial" or not trial.problem.has_slots_for(
        running := trial.placements[RUNNING]
    ):
        return None
    problem, proposed = trial.problem, trial.placements[PROPOSED]
    value = problem.value(running)
    enough = value - ENOUGH * (value - problem.value(proposed))
    is_small = problem.capacity.sum() <= FEW_SLOTS
    for share in PARTS:
        budget = int(share * experts)
        found = [_relieve(problem, running, budget)]
        if is_small:
            found.append(_step_down(request, trial, part, budget))
        kept = [each for each in found if not problem.violations(each)]
        best = min(kept, key=problem.value, default=running)
        if problem.value(best) <= enough:
            return _judge(request, trial, part, advice, best)
    return None


def _step_down(request: Request, trial: Trial, part: Part, budget: int) -> Placement:
    """Return what so many moves make of what runs, by the steps that gain most for a move."""
    return search(
        request,
        trial.problem,
        "heuristic",
        part.seed,
        iterations=1,
        initial=trial.placements[RUNNING],
        move_budget=budget,
    ).placement


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
    request: Request, trial: Trial, part: Part, advice: Advice, placement: Placement
) -> SmallStep:
    """Judge a placement beside what runs, on the unseen traffic of the first split."""
    window, running = advice.main.window, trial.placements[RUNNING]
    evaluated = evaluate_all(request, {STEP: placement}, trial.problem, part.unseen, [window])
    judgement = judge(
        trial.evaluations[window][RUNNING],
        evaluated[window][STEP],
        figure="predicted_layer_us",
        units=request.units[window],
        price=request.price,
        names=("running", STEP),
    )
    diff = running.diff(placement, expert_bytes=request.expert_bytes)
    return SmallStep(diff.experts_moved, diff.bytes_moved, judgement.gain)
