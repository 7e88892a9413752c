"""Front: the best placement for every number of moves, and mixtures of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement, moves_from
from moetuner.solver.run import Incumbent, Moves, Run
from moetuner.solver.stages.layers import adds_up_over_layers, are_joined

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

# The front has points at numbers of moves that are 3 % apart. At 1.5 and 6 % no objective of the
# scorecard's few moves changes by more than 0.02 %, up or down, and 1.5 % takes longer ("Budgets
# that rise").
APART = 1.03
# Weight of a layer's excess over its cap, in whole objectives: caps come before the objective.
CAPS_FIRST = 1e6


class Front:
    """The best placement that was found for every number of moves from the running placement.

    Where nothing joins the layers, the front also mixes placements: each layer of a mixture comes
    from one of them.

    Parameters
    ----------
    run
        The solve that judges placements.
    moves
        The placement that runs.
    """

    def __init__(self, run: Run, moves: Moves) -> None:
        self.run, self.moves, self.can_mix = run, moves, not are_joined(run)
        # The sum over layers is the objective: of mixtures the best one is known.
        self.is_exact = adds_up_over_layers(run) and run.objective.is_of_windows
        self.points: dict[bytes, Incumbent] = {}
        # The number, in the lists below, of each placement that a search may begin with.
        self._starts: dict[bytes, int] = {}
        # One row for each placement to mix: slots [L,D,S], moves [L], costs [W,L], and excess [L].
        self._slots: list[Slots] = []
        self._moves: list[Ints] = []
        self._costs: list[Floats] = []
        self._excess: list[Floats] = []

    def add(self, point: Incumbent, *, is_start: bool = True) -> None:
        """Add a placement, unless it breaks a rule.

        Searches begin only with placements that are starts; those are the same for every budget.
        """
        key, objective = point.slots.tobytes(), self.run.objective
        is_known = key in self._starts or (key in self.points and not is_start)
        if is_known or np.isinf(point.excess):
            return
        self.points[key] = point
        if is_start:
            self._starts[key] = len(self._slots)
        if self.can_mix:
            placement = Placement(point.slots, num_experts=self.run.problem.num_experts)
            self._slots.append(point.slots)
            self._moves.append(moves_from(self.moves.running, point.slots))
            costs = objective.window_cost(placement) * objective.layer_factors(placement)
            self._costs.append(costs * objective.compute_values(objective.reference))
            self._excess.append(self.run.problem.caps.excess(placement))

    def best(self, limit: float) -> Incumbent:
        """Return the placement of the lowest rank within a limit of moves."""
        self._mix_exactly([limit])
        allowed = (point for point in self.points.values() if point.moves <= limit)
        return min(allowed, key=lambda point: point.rank)

    def fewest_moves(self, enough: float) -> Incumbent | None:
        """Return the placement with the fewest moves whose value is ``enough`` or less.

        Only placements with the least excess over the caps count.
        """
        excess = min(point.excess for point in self.points.values())
        points = (p for p in self.points.values() if p.excess <= excess and p.value <= enough)
        return min(points, key=lambda point: (point.moves, point.value), default=None)

    def undominated(self) -> list[Incumbent]:
        """Return the placements that are better than all with fewer moves, fewest moves first."""
        moves = [point.moves for point in self.points.values()]
        self._mix_exactly(list_move_limits(min(moves), max(moves)))
        return undominated((point, point.rank) for point in self.points.values())

    def _mix_exactly(self, limits: Sequence[float]) -> None:
        """Add the best mixture within each limit of moves, where it can be found exactly."""
        if self.is_exact:
            most_moves = int(np.stack(self._moves).max(axis=0).sum())
            useful = sorted({int(min(limit, most_moves)) for limit in limits})
            self.mix(useful, self.run.objective.windows.weight)

    @property
    def running(self) -> Incumbent:
        """The running placement, or the nearest that keeps the rules: what was offered first."""
        return self.run.incumbents[0]

    def best_start(self, price: float, weight: Floats) -> Slots:
        """Return the best slots [L,D,S] at a price of a move, by weights of windows [W]."""
        if self.can_mix:
            rows = np.array(list(self._starts.values()))
            costs = self._weighted_costs(weight) + price * np.stack(self._moves)
            return self._mixture(rows[costs[rows].argmin(axis=0)])
        surcharge = price - self.moves.price
        best = min(
            (self.points[key] for key in self._starts),
            key=lambda point: (point.excess, point.value + surcharge * point.moves),
        )
        return best.slots

    def mix(self, limits: Sequence[int], weight: Floats) -> None:
        """Add the best mixtures of layers within rising limits of moves, by weights of windows [W].

        Where such a sum over layers is not the objective, a mixture of more rows may be worse. So a
        limit mixes only rows that are there for every budget of at least as many moves.
        """
        if not self.can_mix:
            return
        moves = np.stack(self._moves)
        costs = self._weighted_costs(weight) + self.moves.price * moves
        if self.is_exact:
            self._mix(limits, moves, costs, np.arange(len(moves)))
            return
        is_start = np.isin(np.arange(len(moves)), list(self._starts.values()))
        for limit in limits:
            rows = np.flatnonzero(is_start | (moves.sum(axis=1) <= limit))
            self._mix([limit], moves[rows], costs[rows], rows)

    def _mix(self, limits: Sequence[int], moves: Ints, costs: Floats, row_numbers: Ints) -> None:
        """Add the best mixtures of some rows [P], given moves and costs [P,L]."""
        chosen = solve_knapsack(moves, costs, max(limits))
        layers = len(chosen)
        for limit in limits:
            rows, moves_left = np.zeros(layers, dtype=np.int64), limit
            for layer in reversed(range(layers)):
                rows[layer] = chosen[layer, moves_left]
                moves_left -= int(moves[rows[layer], layer])
            mixture = self.run.judge(self._mixture(row_numbers[rows]), "moves")
            self.points.setdefault(mixture.slots.tobytes(), mixture)

    def _weighted_costs(self, weight: Floats) -> Floats:
        """Compute the cost of every layer of every placement [P,L], excess over the caps first."""
        reference = max(float(weight @ self.run.objective.reference), 1e-300)
        costs: Floats = np.einsum("w,pwl->pl", weight / reference, np.stack(self._costs))
        penalty: Floats = CAPS_FIRST * costs[0].sum() * np.stack(self._excess)
        return costs + penalty

    def _mixture(self, rows: Ints) -> Slots:
        """Return slots [L,D,S] whose layers come from these rows [L]."""
        return np.stack([self._slots[row][layer] for layer, row in enumerate(rows.tolist())])


def undominated(
    ranked: Iterable[tuple[Incumbent, tuple[float, float]]],
) -> list[Incumbent]:
    """Return placements whose rank is below that of all with fewer moves, fewest moves first."""
    front: list[Incumbent] = []
    lowest = (np.inf, np.inf)
    for point, rank in sorted(ranked, key=lambda pair: (pair[0].moves, pair[1])):
        if rank < lowest:
            front.append(point)
            lowest = rank
    return front


def list_move_limits(least: int, limit: int) -> list[int]:
    """Return numbers of moves from the least to a limit, 3 % apart, the same for every limit."""
    powers = np.arange(int(np.log(limit - least + 1) / np.log(APART)) + 2)
    rising = set((APART**powers).astype(int).tolist())
    return [least, *(least + added for added in sorted(rising) if least + added <= limit)]


def solve_knapsack(moves: Ints, costs: Floats, limit: int) -> Ints:
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
