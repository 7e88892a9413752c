"""From a running placement to a better one by few moves, and pareto(): what moves gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import at_least, instance, not_negative, one_of, positive, seed_in
from moetuner.frozen import Frozen
from moetuner.placement import Placement, keep_slots, moves_from
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.bounds.caps import exceeded
from moetuner.solver.exact.enumeration import enumerated
from moetuner.solver.joint import SEARCHES, best_of_all
from moetuner.solver.result import Candidate, Clock, Limits, MoveCost, Progress
from moetuner.solver.search.balanced import balanced
from moetuner.solver.search.layerwise import LayerSearch
from moetuner.solver.search.move_cost import Path, lawful

Slots = NDArray[np.int32]

# How far prices of a move that are tried may be from what the last steps gain for a move: each try
# halves the logarithm's range.
SPREAD = 8.0
# The least price: no move that gains less than this part of the objective is worth asking for.
CHEAPEST = 1e-7


@dataclass(frozen=True)
class Migration:
    """What moving away from a running placement may cost.

    Parameters
    ----------
    budget
        Bytes that may move; None, or infinity, for any number.
    cost
        What a moved byte costs, in units of the objective.
    expert_bytes
        Bytes of one expert of one layer; with 1, budget and cost are of experts.
    """

    budget: float | None = None
    cost: float = 0.0
    expert_bytes: float = 1.0

    def __post_init__(self) -> None:
        if self.budget is not None:
            at_least("move_budget", self.budget, 0, " bytes")
            if math.isinf(self.budget):
                object.__setattr__(self, "budget", None)
        not_negative("move_cost", self.cost, "price of a byte")
        not_negative("expert_bytes", self.expert_bytes, "number of bytes")

    @property
    def price(self) -> float:
        """What a move costs, in units of the objective."""
        return self.cost * self.expert_bytes

    @property
    def most(self) -> float:
        """Moves that the budget allows."""
        if self.budget is None or not self.expert_bytes:
            return np.inf
        return self.budget / self.expert_bytes


def migrate(
    problem: Problem,
    initial: Placement,
    migration: Migration,
    method: Callable[..., Candidate],
    *,
    seed: int,
    limits: Limits,
) -> Candidate:
    """Improve a placement within a budget; what stays keeps its slot.

    The answer is never worse than staying, moves at their price: less load above caps comes first,
    then the objective. Where moves are free, it is never worse than that of ``method`` either.

    Raises
    ------
    ValueError
        If the placement breaks a rule, and it takes more moves than the budget to keep it.
    """
    problem.check_running(initial)
    solve = _Migrating(problem, initial, migration, seed, Clock(limits))
    try:
        if limits.time_limit == 0:
            solve.best = replace(solve.best, status="time_limit")
        elif solve.price == 0 and solve.most >= problem.capacity.sum():
            solve.freely(method)
        elif solve.most > 0:
            solve.step_by_step()
    except KeyboardInterrupt:  # outside of the core, which ends with the best it has
        solve.best = replace(solve.best, status="interrupted")
    return solve.answer()


class _Migrating:
    """The best answer so far, and ways to a better one."""

    def __init__(
        self, problem: Problem, initial: Placement, migration: Migration, seed: int, clock: Clock
    ) -> None:
        self.problem, self.initial, self.seed, self.clock = problem, initial, seed, clock
        self.objective = Objective(problem)
        self.price, self.most = migration.price, migration.most
        self.held = self.initial.held
        self.start = lawful(problem, self.initial)
        fewest = self.moved(self.start)
        if fewest > self.most:
            raise ValueError(
                f"move_budget {migration.budget:g} is too small: "
                f"initial breaks a rule ({problem.violations(self.initial)[0]}), and to keep "
                f"all rules takes {fewest} moves"
            )
        self.best = Candidate(self.start)
        self.rank = self.rank_of(self.start, fewest)
        self._tell()

    def freely(self, method: Callable[..., Candidate]) -> None:
        """Solve from nothing; what runs is one start more, if it is better than that."""
        # What is behind the start that every search has costs it no time.
        floor = self.problem.filled(balanced(self.problem), self.initial)
        promising = self.rank < self.rank_of(floor, self.moved(floor))
        limits = self.clock.within(effort.FRESH_SHARE if promising else 1.0)
        found = method(self.problem, seed=self.seed, limits=limits)
        if not self.consider(found) and found.status not in ("interrupted", "optimal"):
            search = LayerSearch(self.problem, self.seed)
            found = search.run(self.clock.within(), start=self.start)
            self.consider(best_of_all(self.problem, found, self.clock.within()))

    def step_by_step(self) -> None:
        """Take the steps that gain most for a move, then search at prices of a move."""
        problem, limits = self.problem, self.clock.limits
        path, interrupted = self.descend()
        if interrupted:
            self.best = replace(self.best, status="interrupted")
            return
        left = self.clock.within().time_limit
        if left is not None and limits.time_limit is not None and left < limits.time_limit / 2:
            # A search that gets less than the steps took adds nothing to them.
            self.best = replace(self.best, status="time_limit")
            return
        if problem.goal != "traffic" and limits.time_limit is None:
            moving = MoveCost(self.initial, self.price)
            exact = enumerated(
                problem, np.inf, caps=problem.caps.over_speed, moving=moving, most=self.most
            )
            if exact is not None and len(exact):
                self.consider(Candidate(exact))
                return
        search = LayerSearch(problem, self.seed)
        if self.most >= problem.capacity.sum():
            self.consider(Candidate(search.full(balanced(problem))))
            self.search_at(self.price, search, 1.0)
            return
        slope = max(path.slope(self.most), CHEAPEST * abs(self.rank[1]))
        low, high = max(self.price, slope / SPREAD), max(self.price, slope * SPREAD)
        for left in range(effort.PRICES_TRIED, 0, -1):
            price = float(np.sqrt(low * high))
            found = self.search_at(price, search, 1 / left)
            if found.status == "interrupted":
                return
            if self.moved(found.slots) <= self.most:
                high = price
            else:
                low = price

    def descend(self) -> tuple[Path, bool]:
        """Go down by steps, and keep the best that is passed."""
        problem = self.problem
        search = LayerSearch(problem, self.seed)
        for _ in range(1 if problem.windows.is_mean else effort.STEP_REWEIGHTINGS):
            path, interrupted = search.descend(
                self.start, self.initial, self.most, self.clock.within()
            )
            for steps in path.lengths(self.most, self.price, effort.LENGTHS):
                self.consider(Candidate(path.after(steps)))
                if self.clock.within().time_limit == 0:
                    return path, interrupted
            if interrupted:
                break
            search.reweight(self.best.slots)
        return path, interrupted

    def search_at(self, price: float, search: LayerSearch, share: float) -> Candidate:
        """Search at a price of a move from the best there is."""
        clock, moving = Clock(self.clock.within(share)), MoveCost(self.initial, price)
        found = search.run(clock.limits, start=self.best.slots, moving=moving)
        found = best_of_all(self.problem, found, clock.within(), moving=moving)
        self.consider(found)
        return found

    def consider(self, found: Candidate) -> bool:
        """Take an answer if it is the best so far within the budget."""
        moved = self.moved(found.slots)
        rank = self.rank_of(found.slots, moved)
        if moved <= self.most and rank < self.rank:
            self.best, self.rank = found, rank
            self._tell()
            return True
        if rank == self.rank and found.status == "optimal":
            self.best = replace(found, slots=self.best.slots)
            return True
        status = "feasible" if found.status == "optimal" else found.status
        details = self.best.details.or_else(found.details)
        self.best = replace(self.best, status=status, details=details)
        return False

    def _tell(self) -> None:
        """Tell of the best so far where its rank is its objective."""
        excess, value = self.rank
        if not excess and self.price == 0:
            self.clock.limits.tell("moves", value)

    def rank_of(self, slots: Slots, moved: int) -> tuple[float, float]:
        """Load above caps in parts of them, then the objective with moves at their price."""
        placement = Placement(slots, num_experts=self.problem.experts)
        excess = float(self.problem.caps.excess(placement).sum())
        return excess, self.objective.value(placement) + self.price * moved

    def moved(self, slots: Slots) -> int:
        """Count copies that have to be brought."""
        return int(moves_from(self.held, slots).sum())

    def answer(self) -> Candidate:
        """Return the best, in which what stays keeps its slots."""
        details = self.best.details.searched(experts_moved=self.moved(self.best.slots))
        slots = keep_slots(self.initial.slots, self.best.slots, self.problem.capacity)
        return replace(self.best, slots=slots, details=details, caps=None)


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
    one_of("method", method, SEARCHES)
    seed = seed_in(seed)
    problem.check_running(initial)
    limits = Limits(time_limit, iterations, threads=threads, progress=progress)
    clock = Clock(limits.counting())
    worth = Objective(problem)
    before = worth.value(initial)

    def trade(placement: Placement) -> _Ranked:
        moved = initial.diff(placement).experts_moved
        objective = worth.value(placement)
        excess = problem.caps.excess(placement)
        raised = dict(exceeded(problem, placement.slots).raised)
        figures = (before - objective, moved, moved * expert_bytes, raised)
        named = placement.with_names(
            model=problem.statistics.model,
            topology=problem.topology.name,
            fingerprint=problem.statistics.fingerprint,
            objective=objective,
        )
        return float(excess.sum()), Trade(named, objective, *figures)

    def at(price: float, left: int) -> tuple[_Ranked, bool]:
        """Solve at a price per expert, with one of the ``left`` parts of the time that is left."""
        found = migrate(
            problem,
            initial,
            Migration(cost=price / expert_bytes, expert_bytes=expert_bytes),
            SEARCHES[method],
            seed=seed,
            limits=clock.within(1 / left),
        )
        slots = problem.filled(found.slots, initial)
        return trade(_kept(problem, initial, slots)), found.status == "interrupted"

    start = lawful(problem, initial)
    found = [trade(_kept(problem, initial, start))]
    path, interrupted = LayerSearch(problem, seed).descend(start, initial, np.inf, clock.within())
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
    return Placement(
        keep_slots(initial.slots, slots, problem.capacity), num_experts=problem.experts
    )


def _undominated(trades: list[_Ranked]) -> list[Trade]:
    """Leave out trades that another one equals or betters in moves, and in excess and objective."""
    front: list[_Ranked] = []
    for excess, trade in sorted(trades, key=lambda each: (each[1].experts_moved, *_rank(each))):
        if not front or _rank((excess, trade)) < _rank(front[-1]):
            front.append((excess, trade))
    return [trade for _, trade in front]


def _rank(ranked: _Ranked) -> tuple[float, float]:
    return ranked[0], ranked[1].objective
