"""Integer programmes as stages: the paper's two stages, and the co-location programme."""

from __future__ import annotations

from moetuner.solver import effort
from moetuner.solver.bounds.pairs import is_of_pairs
from moetuner.solver.budget import Budget
from moetuner.solver.milp.colocation import colocation, fits
from moetuner.solver.result import Candidate
from moetuner.solver.run import Bound, Run, Stage
from moetuner.solver.two_stage import two_stage


def _paper(run: Run, budget: Budget) -> None:
    answer = two_stage(run.problem, seed=run.seed, budget=budget)
    run.details, run.cut = answer.details, answer.status == "time_limit"
    run.offer(answer.slots, "paper")
    if answer.status == "interrupted":
        raise KeyboardInterrupt


def _programme(run: Run, budget: Budget) -> None:
    """Work on the whole programme from the best placement, while its gap is open."""
    if run.bound is None:
        return
    start = Candidate(
        run.best.slots, bound=run.bound.value, bound_source=run.bound.source, details=run.details
    )
    answer = colocation(run.problem, seed=run.seed, budget=budget, start=start)
    run.details = answer.details
    run.offer(answer.slots, "co-location")
    assert answer.bound is not None
    assert answer.bound_source is not None
    bound = run.bound
    run.prove(Bound(answer.bound, answer.bound_source, bound.certificate, bound.levels))
    run.cut = answer.status == "time_limit" or run.cut
    if answer.status == "interrupted":
        raise KeyboardInterrupt


def _applies(run: Run) -> bool:
    """Return whether a programme may end: without a time limit none is begun."""
    timed = run.budget.time_limit is not None
    return timed and is_of_pairs(run.problem) and fits(run.problem)


def _reserve(run: Run, left: float) -> float:
    share = 1 - effort.BOUND_SHARE / (1 - effort.SEARCH_SHARE)
    return share if share * left >= effort.PROGRAMME_LEAST else 0.0


PAPER = Stage(_paper)
PROGRAMME = Stage(
    _programme, applies=_applies, least=lambda _: effort.PROGRAMME_LEAST, reserve=_reserve
)
