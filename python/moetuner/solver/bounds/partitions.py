"""The complete chain: where a layer has few partitions, dynamic programming over all of them.

Every objective of pairs is a chain, a cost of each layer alone plus a cost of neighbouring layers,
so the best sequence of partitions is a shortest path. No integer programme is needed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.problem import Problem
from moetuner.solver import effort

BOUND_SOURCE: Literal["complete dynamic programme"] = "complete dynamic programme"


def complete(
    problem: Problem,
    caps: NDArray[np.uint64],
    *,
    steps: int = effort.PARTITION_STEPS,
    time_limit: float | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.int32], int, NDArray[np.uint64]] | None:
    """Compute the optimum by dynamic programming over all partitions, of one copy of each expert.

    Returns
    -------
    tuple or None
        Slots [L,D,S], their cost, and the caps [L], raised to the least that can be kept. None
        where it would take more steps or seconds, where links are not of one or two tiers, or
        where devices differ. 105 partitions for 8 experts on 4 devices are few.
    """
    follow = problem.regime == "follow"
    return _core.exact_chain(
        problem.load,
        np.repeat(caps[:, None], problem.devices, axis=1),
        problem.objective_function.link_cost,
        problem.slots,
        transitions=problem.statistics.transitions if follow else None,
        coactivation=None if follow else problem.statistics.coactivation,
        work=steps,
        time_limit=time_limit,
        threads=threads,
    )
