"""pareto(): what a better placement gains against what it takes to get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import instance, one_of, positive, seed_in
from moetuner.frozen import Frozen
from moetuner.placement import Placement, kept
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort, solve
from moetuner.solver.bounds.caps import exceeded
from moetuner.solver.migration import check
from moetuner.solver.result import Clock, Limits, Progress
from moetuner.solver.search.layerwise import Search
from moetuner.solver.search.move_cost import lawful


@dataclass(frozen=True, eq=False, repr=False)
class Trade(Frozen):
    """A placement that no other one found betters at as few moves.

    Parameters
    ----------
    placement
        What to change to; experts that stay keep their slots.
    objective
        ``Objective.value`` of it.
    gain
        How much lower that is than the initial placement's.
    experts_moved, bytes_moved
        What it takes.
    caps_raised
        Imbalance of layers that exceed the load cap still.

    Examples
    --------
    >>> import moetuner as mt
    >>> placement = mt.Placement([[[0], [1]]])
    >>> trade = mt.Trade(placement, 1.25, gain=0.5, experts_moved=2, bytes_moved=2e6)
    >>> trade.to_dict()["gain"]
    0.5
    """

    placement: Placement
    objective: float
    gain: float
    experts_moved: int
    bytes_moved: float
    caps_raised: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Figures as JSON values."""
        return {
            "objective": self.objective,
            "gain": self.gain,
            "experts_moved": self.experts_moved,
            "bytes_moved": self.bytes_moved,
            "caps_raised": self.caps_raised,
        }


# Load above caps, in parts of them, and the trade.
_Ranked = tuple[float, Trade]


def pareto(
    problem: Problem,
    initial: Placement,
    *,
    expert_bytes: float = 1.0,
    method: str = "heuristic",
    seed: int = 0,
    time_limit: float | None = None,
    iterations: int | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Trade]:
    """Find what more and more moves gain, by steps and by solving at several prices of a move.

    Parameters
    ----------
    problem, method, seed, iterations, threads, progress
        As for ``solve``.
    initial
        The placement that runs.
    expert_bytes
        Bytes of one expert of one layer.
    time_limit
        Seconds for all prices together.

    Returns
    -------
    list
        From no move, the initial placement, to the most, each with a lower objective than those
        before it, or less load above the caps. Where the initial placement breaks a rule, the
        first is one with the fewest moves that keeps all.

    Raises
    ------
    ValueError
        If the initial placement is not one of the problem, or an argument is out of range.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> problem = mt.Problem(statistics, mt.Topology(2), objective="balance")
    >>> trades = mt.pareto(problem, mt.Placement([[[0, 1], [2, 3]]]))
    >>> [(trade.experts_moved, trade.objective) for trade in trades]
    [(0, 1.5), (2, 1.25)]
    """
    instance("problem", problem, Problem, hint=", such as Problem(statistics, topology)")
    positive("expert_bytes", expert_bytes, "number of bytes")
    one_of("method", method, ("joint", "heuristic"))
    seed = seed_in(seed)
    check(problem, initial)
    clock = Clock(Limits(time_limit, iterations, threads=threads, progress=progress))
    worth = Objective(problem)
    before = worth.value(initial)

    def trade(placement: Placement) -> _Ranked:
        moved = initial.diff(placement).experts_moved
        objective = worth.value(placement)
        excess = problem.caps.excess(placement)
        raised = dict(exceeded(problem, placement.slots).raised)
        figures = (before - objective, moved, moved * expert_bytes, raised)
        return float(excess.sum()), Trade(placement, objective, *figures)

    def at(price: float, left: int) -> tuple[_Ranked, bool]:
        """Solve at a price per expert, with one of the ``left`` parts of the time that is left."""
        result = solve(
            problem,
            method,
            seed=seed,
            time_limit=clock.within(1 / left).time_limit,
            iterations=iterations,
            threads=threads,
            progress=progress,
            initial=initial,
            move_cost=price / expert_bytes,
            expert_bytes=expert_bytes,
        )
        return trade(result.placement), result.status == "interrupted"

    start = lawful(problem, initial)
    found = [trade(_kept(problem, initial, start))]
    path, interrupted = Search(problem, seed).descend(start, initial, np.inf, clock.within())
    found.extend(
        trade(_kept(problem, initial, path.after(n))) for n in path.spread(effort.PARETO_STEPS)
    )
    if not interrupted:
        (excess, free), interrupted = at(0.0, len(effort.PARETO_PRICES) + 1)
        found.append((excess, free))
        if free.experts_moved and free.gain > 0:
            mean = free.gain / free.experts_moved
            for number, part in enumerate(effort.PARETO_PRICES):
                if interrupted:
                    break
                one, interrupted = at(part * mean, len(effort.PARETO_PRICES) - number)
                found.append(one)
    return _undominated(found)


def _kept(problem: Problem, initial: Placement, slots: NDArray[np.int32]) -> Placement:
    """Make a placement in which experts that stay keep their slots."""
    if not initial.diff(Placement(slots, num_experts=problem.experts)).experts_moved:
        held = Placement(slots, num_experts=problem.experts).held
        if (held == initial.held).all():
            return initial
    return Placement(kept(initial.slots, slots, problem.capacity), num_experts=problem.experts)


def _undominated(trades: list[_Ranked]) -> list[Trade]:
    """Leave out trades that another one equals or betters in moves, and in excess and objective."""
    front: list[_Ranked] = []
    for excess, trade in sorted(trades, key=lambda each: (each[1].experts_moved, *_rank(each))):
        if not front or _rank((excess, trade)) < _rank(front[-1]):
            front.append((excess, trade))
    return [trade for _, trade in front]


def _rank(ranked: _Ranked) -> tuple[float, float]:
    return ranked[0], ranked[1].objective
