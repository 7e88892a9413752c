"""pareto(): what a better placement gains against what it takes to get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moetuner._validation import positive
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver import solve
from moetuner.solver.clock import Clock
from moetuner.solver.migration import check
from moetuner.solver.result import Limits, Progress

# Prices of a move, in parts of what a move gains on average where moving is free: the first moves
# gain far more than that, the last ones far less.
PRICES = (0.1, 0.3, 0.7, 1.5, 3.0, 8.0)


@dataclass(frozen=True)
class Trade:
    """A placement that no other one found betters at as few moves.

    Parameters
    ----------
    placement
        What to change to; experts that stay keep their slots.
    objective
        ``Problem.value`` of it.
    gain
        How much lower that is than the initial placement's.
    experts_moved, bytes_moved
        What it takes.
    """

    placement: Placement
    objective: float
    gain: float
    experts_moved: int
    bytes_moved: float

    def to_dict(self) -> dict[str, Any]:
        """Figures as JSON values."""
        return {
            "objective": self.objective,
            "gain": self.gain,
            "experts_moved": self.experts_moved,
            "bytes_moved": self.bytes_moved,
        }


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
    """Solve at several prices of a move.

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
        before it.

    Raises
    ------
    ValueError
        If the initial placement is not one of the problem, or an argument is out of range.
    """
    positive("expert_bytes", expert_bytes, "number of bytes")
    check(problem, initial)
    clock = Clock(Limits(time_limit))
    before = problem.value(initial)

    def at(price: float, left: int) -> tuple[Trade, bool]:
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
        moved = initial.diff(result.placement).experts_moved
        trade = Trade(
            result.placement,
            result.objective,
            before - result.objective,
            moved,
            moved * expert_bytes,
        )
        return trade, result.status == "interrupted"

    found = [Trade(initial, before, 0.0, 0, 0.0)]
    free, interrupted = at(0.0, len(PRICES) + 1)
    found.append(free)
    if free.experts_moved and free.gain > 0:
        mean = free.gain / free.experts_moved
        for number, part in enumerate(PRICES):
            if interrupted:
                break
            trade, interrupted = at(part * mean, len(PRICES) - number)
            found.append(trade)
    return _undominated(found)


def _undominated(trades: list[Trade]) -> list[Trade]:
    """Leave out trades that another one equals or betters in moves and objective."""
    kept: list[Trade] = []
    for trade in sorted(trades, key=lambda each: (each.experts_moved, each.objective)):
        if not kept or trade.objective < kept[-1].objective:
            kept.append(trade)
    return kept
