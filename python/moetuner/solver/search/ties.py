"""Among placements whose times are as good: less traffic, then less imbalance.

What is predicted is not known to half a per cent. So the time of the best is missed by up to that,
for what else a placement is worth; or chance would decide it, and two samples of one traffic would
give answers of two kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Times within this part of the best are as good; what sums of microseconds may be off.
TIE, ROUNDING = 0.005, 1e-9


@dataclass(frozen=True)
class Known:
    """Slots [L,D,S] that a search has found, by how much caps are exceeded, and the time."""

    excess: float
    value: float
    slots: Slots

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better."""
        return self.excess, self.value


def settled(
    problem: Problem, objective: Objective, known: list[Known], limit: tuple[float, float]
) -> Slots:
    """Return slots whose time is as good as the best's, with the least traffic found.

    Layers of different ones are combined where nothing joins them. ``limit`` is the rank of a
    placement that the answer must not be behind.
    """
    best = min(known, key=lambda each: each.rank)
    limit = (limit[0], limit[1] * (1 + ROUNDING))
    joined = problem.regime == "follow" and problem.layers > 1
    # Layers add up in the mean; excess that only some placements have does not mix.
    if not joined and problem.windows.is_mean and best.excess == 0:
        return _by_layer(problem, objective, known, limit[1] if limit[0] == 0 else np.inf)
    most = max(min((best.excess, best.value * (1 + TIE)), limit), best.rank)
    equals = [each.slots for each in known if each.excess == best.excess and each.rank <= most]

    def tastes(slots: Slots) -> tuple[float, float]:
        placement = Placement(slots, num_experts=problem.experts)
        return objective.traffic(placement), float(objective.imbalances(placement).sum())

    return min(equals, key=tastes)


def _by_layer(problem: Problem, objective: Objective, known: list[Known], limit: float) -> Slots:
    """Take the quickest contents of every layer, then less traffic where that costs least."""
    pool = [each for each in known if each.excess == 0]
    placements = [Placement(each.slots, num_experts=problem.experts) for each in pool]
    windows = objective.windows
    times = np.array(
        [
            [windows.value(cost, objective.reference) for cost in objective.window_cost(each).T]
            for each in placements
        ]
    )
    chosen = times.argmin(axis=0)
    every = np.arange(problem.layers)
    least = float(times[chosen, every].sum())
    most = max(min(least * (1 + TIE), limit), least)
    traffic = np.array([objective.layers_traffic(each) for each in placements])
    imbalance = np.array([objective.imbalances(each) for each in placements])
    for taste in (traffic, imbalance):
        # Less imbalance must not bring the traffic back.
        kept = (
            traffic <= traffic[chosen, every] if taste is imbalance else np.ones_like(times, bool)
        )
        _traded(times, np.where(kept, taste, np.inf), chosen, most)
    slots = np.stack([each.slots for each in pool])
    found: Slots = slots[chosen, every]
    return found


def _traded(times: Floats, taste: Floats, chosen: NDArray[np.int64], most: float) -> None:
    """Change the ``chosen`` of [N,L] for less of ``taste``, the least time for it first.

    As long as the times do not add up to more than ``most``.
    """
    every = np.arange(len(chosen))
    while True:
        slower = times - times[chosen, every]
        gain = taste[chosen, every] - taste
        fits = (gain > 1e-12) & (times[chosen, every].sum() + slower <= most)
        if not fits.any():
            return
        price = np.where(fits, slower / np.where(fits, gain, 1.0), np.inf)
        number, layer = np.unravel_index(price.argmin(), price.shape)
        chosen[layer] = number
