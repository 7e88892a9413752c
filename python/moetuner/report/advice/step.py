"""The cheapest useful step: few moves that bring most of the proposed placement's gain."""

from __future__ import annotations

from moetuner.evaluation.judgement import judge
from moetuner.report.advice.request import Holdout, Request
from moetuner.report.advice.trial import PROPOSED, RUNNING, Trial, evaluate_all
from moetuner.report.advice.values import Advice, SmallStep
from moetuner.solver import search_fewest_moves

# Share of the proposed placement's gain that a step has to bring on the seen traffic.
STEP_SHARE = 0.75
# Largest share of the proposed placement's moves that a step may take.
FEW_MOVES = 0.6
STEP = "step"


def find_step(request: Request, trial: Trial, holdout: Holdout, advice: Advice) -> SmallStep | None:
    """Return the fewest moves that gain most of what the proposed placement gains.

    Moves are chosen on the seen traffic and judged on the unseen, in the windows where most is
    gained. None where nothing is proposed, where few moves gain little, and where slots that do not
    run yet have to be filled, which moves many.
    """
    problem, running = trial.problem, trial.placements[RUNNING]
    takes_more = advice.fewer_copies is not None
    if advice.answer != "worth a trial" or takes_more or not problem.has_slots_for(running):
        return None
    value, highest = problem.value(running), int(FEW_MOVES * advice.moving.experts)
    placement = search_fewest_moves(
        problem,
        running,
        value - STEP_SHARE * (value - problem.value(trial.placements[PROPOSED])),
        most_moves=highest,
        time_limit=request.time_limit,
        threads=request.threads,
    )
    if placement is None or problem.violations(placement):
        return None
    diff = running.diff(placement, expert_bytes=request.expert_bytes)
    if diff.experts_moved > highest:
        return None
    window = advice.main.window
    evaluated = evaluate_all(request, {STEP: placement}, holdout.unseen, [window])
    judgement = judge(
        trial.evaluations[window][RUNNING],
        evaluated[window][STEP],
        figure="predicted_layer_us",
        measures=["predicted_layer_us"],
        units=request.units[window],
        price=request.price,
        names=("running", STEP),
    )
    return SmallStep(diff.experts_moved, diff.bytes_moved, judgement.gain)
