"""Mixtures: each layer of a mixture comes from one of several placements.

Where nothing joins the layers, their moves and costs add up. So the best mixture within a limit of
moves is the answer to a multiple-choice knapsack, with one choice for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetuner.placement import Placement, moves_from
from moetuner.solver.arrays import Floats, Integers, Slots
from moetuner.solver.run import Moves, Run
from moetuner.solver.stages.layers import adds_up_over_layers

# Weight of a layer's excess over its cap, in whole objectives: caps come before the objective.
CAPS_FIRST = 1e6


class Mixer:
    """Placements whose layers can be mixed: a row of layers, moves and costs for each.

    Parameters
    ----------
    run
        The solve, whose objective gives the costs.
    moves
        The placement that runs, from which moves are counted.
    """

    def __init__(self, run: Run, moves: Moves) -> None:
        self.run, self.moves = run, moves
        # The sum over layers is the objective: of mixtures the best one is known.
        self.is_exact = adds_up_over_layers(run) and run.objective.is_of_windows
        # Of each row: slots [L,D,S], moves [L], costs [W,L], excess [L], and if it is a start.
        self._slots: list[Slots] = []
        self._moves: list[Integers] = []
        self._costs: list[Floats] = []
        self._excess: list[Floats] = []
        self._is_start: list[bool] = []

    def add(self, slots: Slots, *, is_start: bool) -> None:
        """Add a row for slots [L,D,S]."""
        problem, objective = self.run.problem, self.run.objective
        placement = Placement(slots, num_experts=problem.num_experts)
        costs = objective.window_cost(placement) * objective.layer_factors(placement)
        self._slots.append(slots)
        self._moves.append(moves_from(self.moves.running, slots))
        self._costs.append(costs * objective.compute_values(objective.reference))
        self._excess.append(problem.caps.excess(placement))
        self._is_start.append(is_start)

    def best_start(self, price: float, weight: Floats) -> Slots:
        """Return the best mixture of starts at a price of a move, by weights of windows [W]."""
        costs = self._weighted_costs(weight) + price * np.stack(self._moves)
        rows = np.flatnonzero(self._is_start)
        return self._join(rows[costs[rows].argmin(axis=0)])

    def best_within(self, limits: Sequence[float], weight: Floats) -> list[Slots]:
        """Return the best mixture within each limit of moves, by weights of windows [W].

        Where the sum over layers is not the objective, a mixture of more rows may be worse. So a
        limit mixes only rows that are there for every budget of at least as many moves.
        """
        moves = np.stack(self._moves)
        most_moves = int(moves.max(axis=0).sum())
        useful = sorted({int(min(limit, most_moves)) for limit in limits})
        costs = self._weighted_costs(weight) + self.moves.price * moves
        if self.is_exact:
            return self._mix(np.arange(len(moves)), moves, costs, useful)
        mixtures = []
        for limit in useful:
            rows = np.flatnonzero(self._is_start | (moves.sum(axis=1) <= limit))
            mixtures += self._mix(rows, moves[rows], costs[rows], [limit])
        return mixtures

    def _mix(
        self, rows: Integers, moves: Integers, costs: Floats, limits: Sequence[int]
    ) -> list[Slots]:
        """Return the best mixture within each limit of some rows [P], by moves and costs [P,L]."""
        chosen = solve_knapsack(moves, costs, max(limits))
        return [self._join(rows[trace_back(chosen, moves, limit)]) for limit in limits]

    def _weighted_costs(self, weight: Floats) -> Floats:
        """Compute the cost of every layer of every row [P,L], excess over the caps first."""
        reference = max(float(weight @ self.run.objective.reference), 1e-300)
        costs: Floats = np.einsum("w,pwl->pl", weight / reference, np.stack(self._costs))
        penalty: Floats = CAPS_FIRST * costs[0].sum() * np.stack(self._excess)
        return costs + penalty

    def _join(self, rows: Integers) -> Slots:
        """Return slots [L,D,S] whose layers come from these rows [L]."""
        return np.stack([self._slots[row][layer] for layer, row in enumerate(rows.tolist())])


def solve_knapsack(moves: Integers, costs: Floats, limit: int) -> Integers:
    """Return the row that each column takes at every budget of moves up to a limit [L,M+1].

    The multiple-choice knapsack, exactly, by dynamic programming over columns: of moves and costs
    [P,L], a column and those before it together have the least cost within the budget.
    """
    columns = costs.shape[1]
    chosen, least = np.zeros((columns, limit + 1), dtype=np.int64), np.zeros(limit + 1)
    for column in range(columns):
        needed, cost = moves[:, column], costs[:, column]
        order = np.lexsort((cost, needed))
        order = order[needed[order] <= limit]
        lowest = np.minimum.accumulate(cost[order])
        # Rows that cost less than all rows with fewer moves.
        useful = order[np.append(True, cost[order][1:] < lowest[:-1])]
        sums = np.full(limit + 1, np.inf)
        for row in useful.tolist():
            first = int(needed[row])
            candidate = least[: limit + 1 - first] + cost[row]
            is_less = candidate < sums[first:]
            sums[first:][is_less] = candidate[is_less]
            chosen[column, first:][is_less] = row
        least = sums
    return chosen


def trace_back(chosen: Integers, moves: Integers, budget: int) -> Integers:
    """Return the rows [L] of the least cost within a budget, from the rows chosen [L,M+1]."""
    rows = np.zeros(len(chosen), dtype=np.int64)
    for column in reversed(range(len(chosen))):
        rows[column] = chosen[column, budget]
        budget -= int(moves[rows[column], column])
    return rows
