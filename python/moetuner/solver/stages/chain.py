"""Traffic of pairs, one copy of each expert, equal devices: all layers as one chain.

Where a layer has few partitions, dynamic programming over all of them is the optimum. Elsewhere the
core constructs, anneals, recombines and polishes.
"""

from __future__ import annotations

from collections.abc import Callable

from moetuner import _core
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.arrays import Slots
from moetuner.solver.bounds.pairs import (
    COMPLETE,
    is_of_pairs,
    make_certificate,
    make_chain,
    solve_completely,
)
from moetuner.solver.budget import Budget, Progress
from moetuner.solver.run import Bound, Role, Run, Stage


def search_traffic(
    run: Run, problem: Problem, budget: Budget, fit: Callable[[Slots], Slots] | None = None
) -> None:
    """Search for the least traffic of pairs under the load cap, and offer the answer.

    ``fit`` turns the answer into slots [L,D,S] of the run's own problem. With it this is only a
    part of the search, so the details do not report its trials.
    """
    objective = problem.objective_function
    report = budget.progress

    def progress(seconds: float, cost: int | None) -> None:
        if report is not None:
            report(Progress(seconds, "search", None if cost is None else cost / objective.scale))

    # Pairs that stand for visits cost more between nodes.
    cost = problem.topology.cost if objective.has_expert_sets else None
    # Without pairs all placements cost nothing: the balanced one that it starts from is the answer.
    slots, trials, interrupted, shift = _core.search(
        make_chain(problem, problem.caps.whole, cost),
        seed=run.seed,
        trials=_trials(problem, budget),
        time_limit=budget.seconds_left,
        threads=budget.threads,
        progress=None if report is None else progress,
    )
    if fit is None:
        rounded = 1 << shift if shift else None
        run.details = run.details.with_search_facts(
            trials=trials, counts_rounded_to_multiples_of=rounded
        )
    run.offer(slots if fit is None else fit(slots), "search", role=Role.SINGLE)
    if interrupted:
        raise KeyboardInterrupt


def _trials(problem: Problem, budget: Budget) -> int | None:
    """Return the trials of a start; None where the core decides, by time or by work."""
    places = problem.devices * problem.slots
    if (
        budget.iterations is not None
        or budget.seconds_left is not None
        or places >= effort.WIDE_SLOTS
    ):
        return budget.iterations
    trials = budget.work.chain_trials * places * problem.layers
    return max(trials, effort.CHAIN_LEAST)


def _partitions(run: Run, budget: Budget) -> None:
    """Offer the optimum over all partitions, and prove it, if there are few enough."""
    problem, steps = run.problem, effort.PARTITION_STEPS
    if budget.seconds_left is not None:
        steps = int(min(steps, budget.seconds_left * effort.PARTITION_STEPS_PER_SECOND))
    optimum = solve_completely(
        problem,
        problem.caps.whole,
        steps=steps,
        time_limit=budget.seconds_left,
        threads=budget.threads,
    )
    if optimum is None:
        return
    slots, cost, caps = optimum
    run.details = run.details.with_search_facts(way="dynamic programming over all partitions")
    run.offer(slots, "search")
    run.prove(Bound(cost, COMPLETE, make_certificate(problem, caps, COMPLETE, cost)))


PARTITIONS = Stage(_partitions, applies=is_of_pairs)
CHAIN = Stage(lambda run, budget: search_traffic(run, run.problem, budget), applies=is_of_pairs)
