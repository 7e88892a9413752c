"""The search alone: construct, anneal, recombine, polish, all in Rust. No integer programme."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver.bounds.caps import raised
from moetuner.solver.result import Candidate, Limits, Progress


def heuristic(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    initial: tuple[NDArray[np.int32], ...] = (),
) -> Candidate:
    """Search for the least traffic under the load cap.

    Parameters
    ----------
    problem
        With the regime ``follow`` transitions cost, with ``dispatch`` co-activation saves.
    initial
        Slots [L,D,S] to improve on besides the search's own starts.
    """
    pairs = {
        "follow": {"transitions": problem.statistics.transitions},
        "dispatch": {"coactivation": problem.statistics.coactivation},
    }[problem.regime]
    objective = Objective(problem)
    # Without pairs all placements cost nothing, and the balanced one that the search starts from
    # is the answer.
    pointless = not any(table is not None and table.any() for table in pairs.values())

    def report(seconds: float, cost: int | None) -> None:
        if limits.progress is not None:
            share = None if cost is None else cost / objective.scale
            limits.progress(Progress(seconds, "search", share))

    slots, caps, trials, interrupted, shift = _core.search(
        problem.load,
        np.repeat(problem.caps.whole[:, None], problem.devices, axis=1),
        # Pairs that stand for visits cost more where they are of other nodes.
        problem.topology.cost if objective.counts_visits else objective.link_cost,
        problem.slots,
        seed=seed,
        trials=limits.iterations,
        time_limit=limits.time_limit,
        threads=limits.threads,
        initial=list(initial),
        progress=report if limits.progress is not None else None,
        **({} if pointless else pairs),
    )
    details: dict[str, object] = {"trials": trials}
    if shift:
        details["counts_rounded_to_multiples_of"] = 1 << shift
    details |= raised(problem, caps, threads=limits.threads)
    return Candidate(slots, status="interrupted" if interrupted else "feasible", details=details)
