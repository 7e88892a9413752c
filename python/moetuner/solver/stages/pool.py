"""What is met on the way to a budget of moves: placements, and their layers put together anew."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement, moves_from
from moetuner.solver.run import Incumbent, Moves, Run
from moetuner.solver.stages.layers import are_joined, mixes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

# How many times the objective load above the caps weighs, as it comes first.
OVER = 1e6


class Pool:
    """Placements that a run meets, of which budgets of moves choose.

    Who meets the same ones and more has no worse choice at any budget. Where nothing joins the
    layers, a choice takes every layer from the placement where it serves best.
    """

    def __init__(self, run: Run, moves: Moves) -> None:
        problem = run.problem
        self.run, self.moves, self.mixes = run, moves, not are_joined(run)
        # The sum over layers is the objective: of mixtures the best one is known.
        self.is_exact = mixes(run) and problem.survive is None
        self.met: dict[bytes, Incumbent] = {}
        # Rows below of those that a search may begin with.
        self._starts: dict[bytes, int] = {}
        # For each placement that is mixed: slots [L,D,S], moves [L], costs [W,L], and excess [L].
        self._slots: list[Slots] = []
        self._moves: list[Ints] = []
        self._costs: list[Floats] = []
        self._excess: list[Floats] = []

    def add(self, incumbent: Incumbent, *, is_start: bool = True) -> None:
        """Take in a placement, whether the run's own budget suffices for it or not.

        It is one that a search may begin with if a larger budget meets it as early.
        """
        key, objective = incumbent.slots.tobytes(), self.run.objective
        if key in self._starts or (key in self.met and not is_start):
            return
        self.met[key] = incumbent
        if is_start:
            self._starts[key] = len(self._slots)
        if self.mixes:
            placement = Placement(incumbent.slots, num_experts=self.run.problem.experts)
            self._slots.append(incumbent.slots)
            self._moves.append(moves_from(self.moves.running, incumbent.slots))
            costs = objective.window_cost(placement) * objective.weigh_losses(placement)
            self._costs.append(costs * objective.worth(objective.reference))
            self._excess.append(self.run.problem.caps.excess(placement))

    def best(self, limit: int) -> Incumbent:
        """Return the placement of the lowest rank to which at most so many copies move."""
        allowed = (incumbent for incumbent in self.met.values() if incumbent.moves <= limit)
        return min(allowed, key=lambda incumbent: incumbent.rank)

    def best_at(self, price: float, weight: Floats) -> Slots:
        """Return slots [L,D,S] that are best at a price of a move, by weights of windows [W]."""
        if self.mixes:
            rows = np.array(list(self._starts.values()))
            worth = self._worth(weight) + price * np.stack(self._moves)
            return self._mixture(rows[worth[rows].argmin(axis=0)])
        more = price - self.moves.price
        best = min(
            (self.met[key] for key in self._starts),
            key=lambda incumbent: (incumbent.excess, incumbent.value + more * incumbent.moves),
        )
        return best.slots

    def mix(self, limits: Iterable[int], weight: Floats) -> None:
        """Take in the best mixtures of layers within limits of moves, by weights of windows [W]."""
        if not self.mixes:
            return
        limits, moves = list(limits), np.stack(self._moves)
        chosen = choose(moves, self._worth(weight) + self.moves.price * moves, max(limits))
        layers = len(chosen)
        for limit in limits:
            rows, left = np.zeros(layers, dtype=np.int64), limit
            for layer in reversed(range(layers)):
                rows[layer] = chosen[layer, left]
                left -= int(moves[rows[layer], layer])
            mixture = self.run.judge(self._mixture(rows), "moves")
            self.met.setdefault(mixture.slots.tobytes(), mixture)

    def _worth(self, weight: Floats) -> Floats:
        """Compute what every layer of every placement is worth [P,L]; excess counts first."""
        reference = max(float(weight @ self.run.objective.reference), 1e-300)
        costs: Floats = np.einsum("w,pwl->pl", weight / reference, np.stack(self._costs))
        over: Floats = OVER * costs[0].sum() * np.stack(self._excess)
        return costs + over

    def _mixture(self, rows: Ints) -> Slots:
        """Put slots [L,D,S] together from a placement for every layer [L]."""
        return np.stack([self._slots[row][layer] for layer, row in enumerate(rows.tolist())])


def choose(moves: Ints, worth: Floats, limit: int) -> Ints:
    """Choose a row for every column, of moves and worth [P,L], at budgets up to a limit [L,M+1].

    With the budget that a column and those before it have, its row is one of the least sum: the
    multiple-choice knapsack, exactly, by dynamic programming.
    """
    columns = worth.shape[1]
    chosen, least = np.zeros((columns, limit + 1), dtype=np.int64), np.zeros(limit + 1)
    for column in range(columns):
        taken, cost = moves[:, column], worth[:, column]
        order = np.lexsort((cost, taken))
        order = order[taken[order] <= limit]
        lowest = np.minimum.accumulate(cost[order])
        # Only those that cost less than all with fewer moves.
        useful = order[np.append(True, cost[order][1:] < lowest[:-1])]
        sums = np.full(limit + 1, np.inf)
        for row in useful.tolist():
            first = int(taken[row])
            tried = least[: limit + 1 - first] + cost[row]
            is_less = tried < sums[first:]
            sums[first:][is_less] = tried[is_less]
            chosen[column, first:][is_less] = row
        least = sums
    return chosen
