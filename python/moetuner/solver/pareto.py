"""pareto(): what more and more moves from a running placement gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import instance, one_of, positive, seed_in
from moetuner.frozen import Frozen
from moetuner.placement import Placement, keep_slots
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.bounds.caps import cap_report
from moetuner.solver.budget import Budget, History, Progress
from moetuner.solver.methods import METHODS, SEARCHES
from moetuner.solver.run import Moves, Run, Stage
from moetuner.solver.stages.layers import LayerModel
from moetuner.solver.stages.moves import descend, from_running, repair

Slots = NDArray[np.int32]


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
        """Return figures as JSON values."""
        return {
            "objective": self.objective,
            "gain": self.gain,
            "experts_moved": self.experts_moved,
            "bytes_moved": self.bytes_moved,
            "caps_raised": self.caps_raised,
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
    one_of("method", method, SEARCHES)
    seed = seed_in(seed)
    problem.check_running(initial)
    budget = Budget(time_limit, iterations, threads=threads, progress=progress)
    if progress is not None:
        budget = Budget(time_limit, iterations, threads=threads, progress=History(progress).add)
    run = Run(problem, seed=seed, budget=budget, moves=Moves(initial))
    front = _Front(problem, initial, expert_bytes)
    front.add(repair(problem, initial))
    run.through([Stage(lambda _, part: front.descend(run, part))])
    if not run.interrupted:
        run.through([Stage(lambda _, part: front.at_prices(run, METHODS[method], part))])
    return front.undominated()


class _Front:
    """Placements by their moves, and what each gains."""

    def __init__(self, problem: Problem, initial: Placement, expert_bytes: float) -> None:
        self.problem, self.initial, self.expert_bytes = problem, initial, expert_bytes
        self.before = problem.value(initial)
        # Load above the caps, in parts of them, and the trade.
        self.trades: list[tuple[float, Trade]] = []

    def add(self, slots: Slots) -> Trade:
        """Add a placement whose experts that stay keep their slots."""
        problem, initial = self.problem, self.initial
        placement = Placement(problem.filled(slots, initial), num_experts=problem.experts)
        moves = initial.diff(placement).experts_moved
        if (placement.held == initial.held).all():
            placement = initial
        else:
            slots = keep_slots(initial.slots, placement.slots, problem.capacity)
            placement = Placement(slots, num_experts=problem.experts)
        objective = problem.value(placement)
        trade = Trade(
            placement.with_names(
                model=problem.statistics.model,
                topology=problem.topology.name,
                fingerprint=problem.statistics.fingerprint,
                objective=objective,
            ),
            objective,
            gain=self.before - objective,
            experts_moved=moves,
            bytes_moved=moves * self.expert_bytes,
            caps_raised=dict(cap_report(problem, placement.slots).raised),
        )
        self.trades.append((float(problem.caps.excess(placement).sum()), trade))
        return trade

    def descend(self, run: Run, budget: Budget) -> None:
        """Add the ends of some of the steps that gain most for a move."""
        start, moves = repair(self.problem, self.initial), Moves(self.initial)
        path, interrupted = descend(run, LayerModel(run), moves, start, np.inf, budget)
        for steps in path.spread(effort.PARETO_STEPS):
            self.add(path.after(steps))
        if interrupted:
            raise KeyboardInterrupt

    def at_prices(self, run: Run, stages: Sequence[Stage], budget: Budget) -> None:
        """Add what a method solves at several prices of a move, beginning with none."""

        def at(price: float, left: int) -> Trade:
            moves = Moves(self.initial, cost=price)
            inner = run.inner(from_running(stages), budget.within(1 / left), moves=moves)
            trade = self.add(inner.answer().slots)
            if inner.interrupted:
                raise KeyboardInterrupt
            return trade

        left = len(effort.PARETO_PRICES)
        free = at(0.0, left + 1)
        if free.experts_moved and free.gain > 0:
            for number, part in enumerate(effort.PARETO_PRICES):
                at(part * free.gain / free.experts_moved, left - number)

    def undominated(self) -> list[Trade]:
        """Return trades that none equals or betters in moves, and in excess and objective."""

        def rank(of: tuple[float, Trade]) -> tuple[float, float]:
            return of[0], of[1].objective

        front: list[tuple[float, Trade]] = []
        for of in sorted(self.trades, key=lambda of: (of[1].experts_moved, *rank(of))):
            if not front or rank(of) < rank(front[-1]):
                front.append(of)
        return [trade for _, trade in front]
