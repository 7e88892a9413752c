"""Front: the best placement that was found for every number of moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moetuner.solver.arrays import Floats, Slots
from moetuner.solver.run import Incumbent, Run
from moetuner.solver.stages.layers import are_joined
from moetuner.solver.stages.moves.mixing import Mixer

# The front has points at numbers of moves that are 3 % apart. At 1.5 and 6 % no objective of the
# scorecard's few moves changes by more than 0.02 %, up or down, and 1.5 % takes longer ("Budgets
# that rise").
APART = 1.03


class Front:
    """Placements by their moves from the running one, and mixtures where layers can be mixed.

    Parameters
    ----------
    run
        The solve that judges placements; the running one was offered first, or the nearest that
        keeps the rules.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.moves, self.running = run, run.require_moves(), run.incumbents[0]
        self.points: dict[bytes, Incumbent] = {}
        # Searches begin only with these, which are the same for every budget.
        self._starts: dict[bytes, Incumbent] = {}
        self.mixer = None if are_joined(run) else Mixer(run, self.moves)

    @property
    def mixes_exactly(self) -> bool:
        """True if the best mixture within any number of moves is known."""
        return self.mixer is not None and self.mixer.is_exact

    def add(self, point: Incumbent, *, is_start: bool = True) -> None:
        """Add a placement, as one that searches may begin with or not, unless it breaks a rule."""
        key = point.slots.tobytes()
        if key in (self._starts if is_start else self.points) or np.isinf(point.excess):
            return
        self.points[key] = point
        if is_start:
            self._starts[key] = point
        if self.mixer is not None:
            self.mixer.add(point.slots, is_start=is_start)

    def mix(self, limits: Sequence[float], weight: Floats) -> None:
        """Add the best mixtures of layers within limits of moves, by weights of windows [W]."""
        if self.mixer is not None:
            for slots in self.mixer.best_within(limits, weight):
                mixture = self.run.judge(slots, "moves")
                self.points.setdefault(mixture.slots.tobytes(), mixture)

    def best_start(self, price: float, weight: Floats) -> Slots:
        """Return the best slots [L,D,S] at a price of a move, by weights of windows [W]."""
        if self.mixer is not None:
            return self.mixer.best_start(price, weight)
        surcharge = price - self.moves.price
        best = min(
            self._starts.values(),
            key=lambda point: (point.excess, point.value + surcharge * point.moves),
        )
        return best.slots

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
        if self.mixes_exactly:
            self.mix(limits, self.run.objective.windows.weight)


def undominated(ranked: Iterable[tuple[Incumbent, tuple[float, float]]]) -> list[Incumbent]:
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
