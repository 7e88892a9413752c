"""Break ties: among placements whose times are as good, less traffic, then less imbalance.

What is predicted is not known to half a per cent. So the time of the best is missed by up to that,
for what else a placement is worth; or chance would decide it, and two samples of one traffic would
give answers of two kinds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, TIE, Run, Stage
from moetuner.solver.stages.layers import is_of_layers, mixes, quickest

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]


def _break_ties(run: Run, _: Budget) -> None:
    """Prefer slots whose time is as good as the best's, with the least traffic of the incumbents.

    Layers of different ones are combined where nothing joins them. The answer is not behind the
    best start.
    """
    problem, incumbents = run.problem, run.incumbents
    floor = min(
        (incumbent for incumbent in incumbents if incumbent.is_start),
        key=lambda incumbent: incumbent.rank,
    )
    best = min(incumbents, key=lambda incumbent: incumbent.rank)
    limit = (floor.excess, floor.value * (1 + ROUNDING))

    def cost(slots: Slots) -> tuple[float, float]:
        placement = Placement(slots, num_experts=problem.experts)
        return run.objective.traffic(placement), float(run.objective.imbalances(placement).sum())

    # Layers add up in the mean; excess that only some placements have does not mix.
    if mixes(run) and best.excess == 0:
        slots = _by_layer(run, limit[1] if limit[0] == 0 else np.inf)
    else:
        ceiling = max(min((best.excess, best.value * (1 + TIE)), limit), best.rank)
        equals = [
            incumbent.slots
            for incumbent in incumbents
            if incumbent.excess == best.excess and incumbent.rank <= ceiling
        ]
        slots = min(equals, key=cost)
    run.prefer(slots, "ties")


def _by_layer(run: Run, limit: float) -> Slots:
    """Take the quickest contents of every layer, then less traffic where that costs least."""
    problem, objective = run.problem, run.objective
    pool = [incumbent.slots for incumbent in run.incumbents if incumbent.excess == 0]
    placements = [Placement(slots, num_experts=problem.experts) for slots in pool]
    chosen, times = quickest(run, placements)
    layers = np.arange(problem.layers)
    least = float(times[chosen, layers].sum())
    limit_of_all = max(min(least * (1 + TIE), limit), least)
    traffic = np.array([objective.layers_traffic(placement) for placement in placements])
    imbalance = np.array([objective.imbalances(placement) for placement in placements])
    _exchange(times, traffic, chosen, limit_of_all)
    # Less imbalance must not bring the traffic back.
    allowed = np.where(traffic <= traffic[chosen, layers], imbalance, np.inf)
    _exchange(times, allowed, chosen, limit_of_all)
    slots: Slots = np.stack(pool)[chosen, layers]
    return slots


def _exchange(times: Floats, cost: Floats, chosen: NDArray[np.int64], limit: float) -> None:
    """Change the ``chosen`` of [N,L] for less of ``cost``, the least time for it first.

    As long as the times do not add up to more than ``most``.
    """
    layers = np.arange(len(chosen))
    while True:
        slower = times - times[chosen, layers]
        gain = cost[chosen, layers] - cost
        fits = (gain > 1e-12) & (times[chosen, layers].sum() + slower <= limit)
        if not fits.any():
            return
        price = np.where(fits, slower / np.where(fits, gain, 1.0), np.inf)
        number, layer = np.unravel_index(price.argmin(), price.shape)
        chosen[layer] = number


def _has_ties(run: Run) -> bool:
    return is_of_layers(run) and run.problem.goal == "time" and run.moves is None


TIES = Stage(_break_ties, applies=_has_ties, slack=TIE)
