"""Front: placements by how many experts move from what runs, and mixtures of their layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement, moves_from
from moetuner.solver.run import Incumbent, Moves, Run
from moetuner.solver.stages.layers import are_joined, mixes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

# Numbers of moves at which points are kept are 3 % apart. At 1.5 and 6 % no objective of the
# scorecard's few moves changes by more than 0.02 %, up or down, and 1.5 % takes longer.
APART = 1.03
# A layer's load above its cap counts so many times the whole objective, as caps come first.
CAPS_FIRST = 1e6


class Front:
    """Placements by how many experts move: for every budget of moves the best that was met.

    Where nothing joins the layers, a mixture takes each layer from the placement that serves it
    best.

    Parameters
    ----------
    run
        The solve that judges them.
    moves
        The placement that runs.
    """

    def __init__(self, run: Run, moves: Moves) -> None:
        self.run, self.moves, self.mixes = run, moves, not are_joined(run)
        # The sum over layers is the objective: of mixtures the best one is known.
        self.is_exact = mixes(run) and run.objective.is_of_windows
        self.points: dict[bytes, Incumbent] = {}
        # Rows below of those that a search may begin with.
        self._starts: dict[bytes, int] = {}
        # For each placement that is mixed: slots [L,D,S], moves [L], costs [W,L], and excess [L].
        self._slots: list[Slots] = []
        self._moves: list[Ints] = []
        self._costs: list[Floats] = []
        self._excess: list[Floats] = []

    def add(self, point: Incumbent, *, is_start: bool = True) -> None:
        """Add a placement, unless it breaks a rule.

        Searches begin with starts alone, which are the same whatever the budget.
        """
        key, objective = point.slots.tobytes(), self.run.objective
        is_known = key in self._starts or (key in self.points and not is_start)
        if is_known or np.isinf(point.excess):
            return
        self.points[key] = point
        if is_start:
            self._starts[key] = len(self._slots)
        if self.mixes:
            placement = Placement(point.slots, num_experts=self.run.problem.experts)
            self._slots.append(point.slots)
            self._moves.append(moves_from(self.moves.running, point.slots))
            costs = objective.window_cost(placement) * objective.layer_factors(placement)
            self._costs.append(costs * objective.worth(objective.reference))
            self._excess.append(self.run.problem.caps.excess(placement))

    def best(self, limit: float) -> Incumbent:
        """Return the placement of the lowest rank to which at most so many experts move."""
        self._mix_exactly([limit])
        allowed = (point for point in self.points.values() if point.moves <= limit)
        return min(allowed, key=lambda point: point.rank)

    def first(self, enough: float) -> Incumbent | None:
        """Return the placement with the fewest moves that keeps caps best and is good enough."""
        least = min(point.excess for point in self.points.values())
        points = (p for p in self.points.values() if p.excess <= least and p.value <= enough)
        return min(points, key=lambda point: (point.moves, point.value), default=None)

    def undominated(self) -> list[Incumbent]:
        """Return the placements that are better than all with fewer moves, by their moves."""
        moves = [point.moves for point in self.points.values()]
        self._mix_exactly(rising_limits(min(moves), max(moves)))
        return undominated((point, point.rank) for point in self.points.values())

    def _mix_exactly(self, limits: Sequence[float]) -> None:
        """Add mixtures of all layers where the best one is known, whatever a search learned."""
        if self.is_exact:
            farthest = int(np.stack(self._moves).max(axis=0).sum())
            within = sorted({int(min(limit, farthest)) for limit in limits})
            self.mix(within, self.run.objective.windows.weight)

    def start_at(self, price: float, weight: Floats) -> Slots:
        """Return slots [L,D,S] that are best at a price of a move, by weights of windows [W]."""
        if self.mixes:
            rows = np.array(list(self._starts.values()))
            worth = self._worth(weight) + price * np.stack(self._moves)
            return self._mixture(rows[worth[rows].argmin(axis=0)])
        more = price - self.moves.price
        best = min(
            (self.points[key] for key in self._starts),
            key=lambda point: (point.excess, point.value + more * point.moves),
        )
        return best.slots

    def mix(self, limits: Sequence[int], weight: Floats) -> None:
        """Add the best mixtures of layers within rising limits of moves, by weights of windows [W].

        Where those are not the objective, more rows may lead to a worse mixture. So a mixture is of
        rows that every budget for as many moves has, whatever more it has.
        """
        if not self.mixes:
            return
        moves = np.stack(self._moves)
        worth = self._worth(weight) + self.moves.price * moves
        if self.is_exact:
            self._mix(limits, moves, worth, np.arange(len(moves)))
            return
        is_start = np.isin(np.arange(len(moves)), list(self._starts.values()))
        for limit in limits:
            rows = np.flatnonzero(is_start | (moves.sum(axis=1) <= limit))
            self._mix([limit], moves[rows], worth[rows], rows)

    def _mix(self, limits: Sequence[int], moves: Ints, worth: Floats, names: Ints) -> None:
        """Add the best mixtures of rows with moves and worth [P,L], which have names [P]."""
        chosen = choose(moves, worth, max(limits))
        layers = len(chosen)
        for limit in limits:
            rows, left = np.zeros(layers, dtype=np.int64), limit
            for layer in reversed(range(layers)):
                rows[layer] = chosen[layer, left]
                left -= int(moves[rows[layer], layer])
            mixture = self.run.judge(self._mixture(names[rows]), "moves")
            self.points.setdefault(mixture.slots.tobytes(), mixture)

    def _worth(self, weight: Floats) -> Floats:
        """Compute what every layer of every placement is worth [P,L]; excess counts first."""
        reference = max(float(weight @ self.run.objective.reference), 1e-300)
        costs: Floats = np.einsum("w,pwl->pl", weight / reference, np.stack(self._costs))
        over: Floats = CAPS_FIRST * costs[0].sum() * np.stack(self._excess)
        return costs + over

    def _mixture(self, rows: Ints) -> Slots:
        """Put slots [L,D,S] together from a placement for every layer [L]."""
        return np.stack([self._slots[row][layer] for layer, row in enumerate(rows.tolist())])


def undominated(
    ranked: Iterable[tuple[Incumbent, tuple[float, float]]],
) -> list[Incumbent]:
    """Return placements whose rank is below that of all with fewer moves, by their moves."""
    front: list[Incumbent] = []
    lowest = (np.inf, np.inf)
    for point, rank in sorted(ranked, key=lambda pair: (pair[0].moves, pair[1])):
        if rank < lowest:
            front.append(point)
            lowest = rank
    return front


def rising_limits(least: int, limit: int) -> list[int]:
    """Return numbers of moves from the least, 3 % apart, the same ones up to any limit."""
    powers = np.arange(int(np.log(limit - least + 1) / np.log(APART)) + 2)
    rising = set((APART**powers).astype(int).tolist())
    return [least, *(least + more for more in sorted(rising) if least + more <= limit)]


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
