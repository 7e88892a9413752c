"""Run: one solve under way, which owns its clock, Ctrl-C, progress and the best placement.

A method is a list of stages. A stage says whether it applies and how much time it needs. It takes
the problem and the best placement from the run, and offers placements. The run fills the slots of
an offered placement, judges it and ranks it: by slots, pinned and forbidden experts first, then by
load above the caps, then by the objective with moves at their price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np

from moetuner._checks import at_least, not_negative
from moetuner.placement import EMPTY, Placement, moves_from
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.arrays import Bools, Floats, Slots
from moetuner.solver.bounds.certificate import Certificate
from moetuner.solver.budget import Budget, Progress
from moetuner.solver.renaming import keep_running
from moetuner.solver.result import BoundDetails, Details, LevelBound, Status

Value = TypeVar("Value")


@dataclass(frozen=True)
class Moves:
    """A running placement, with the budget and price of moves from it, as ``solve`` takes them."""

    initial: Placement
    budget: float | None = None
    cost: float = 0.0
    expert_bytes: float = 1.0

    def __post_init__(self) -> None:
        if self.budget is not None:
            at_least("move_budget", self.budget, 0, " bytes")
            if math.isinf(self.budget):
                object.__setattr__(self, "budget", None)
        not_negative("move_cost", self.cost, "price of a byte")

    @property
    def price(self) -> float:
        """Price of a move, in units of the objective."""
        return self.cost * self.expert_bytes

    @property
    def most(self) -> float:
        """Most moves that the budget allows."""
        if self.budget is None or not self.expert_bytes:
            return np.inf
        return self.budget / self.expert_bytes

    @cached_property
    def running(self) -> Bools:
        """True where a device of the running placement holds an expert [L,D,E]; computed once."""
        return self.initial.held

    @property
    def copy_costs(self) -> Floats:
        """Price of a copy of an expert on a device [L,D,E]: none where it runs already."""
        return np.where(self.running, 0.0, self.price)

    def count(self, slots: Slots) -> int:
        """Count the copies in slots [L,D,S] that have to move."""
        return int(moves_from(self.running, slots).sum())


class Role(Enum):
    """The role of an incumbent for later stages, whatever stage offered it."""

    FOUND = "what a search found"
    # Any other incumbent of the same rank is preferred.
    FLOOR = "the load balanced, and nothing else"
    BALANCED = "large layers balanced by a whole search for that, after which others are shorter"
    # Where copies cost, another search begins with the last of these.
    FULL = "windows balanced by copies in all slots"
    # This is the answer, though others may have a better value.
    ANSWER = "what neither phase regrets"
    # A placement with copies must be better than this.
    SINGLE = "the best with one copy of each expert"
    RUNNING = "what runs, or the nearest that keeps the rules"


@dataclass(frozen=True)
class Incumbent:
    """A placement that a stage offered.

    Parameters
    ----------
    slots
        Expert ids [L,D,S].
    excess
        Part by which load exceeds the caps, summed over layers; infinite where rules of slots,
        pinned or forbidden experts are broken, which a stage may ignore.
    value
        The objective in the windows that a search sees, plus the price of moves.
    by
        Name of the search that found it.
    role
        Its role for later stages.
    is_start
        True if a search began with it: the answer is no worse than any of these.
    moves
        Copies that have to move.
    """

    slots: Slots
    excess: float
    value: float
    by: str
    role: Role = Role.FOUND
    is_start: bool = False
    moves: int = 0

    @property
    def rank(self) -> tuple[float, float]:
        """Excess over caps, then value; lower is better."""
        return self.excess, self.value


@dataclass(frozen=True)
class Bound:
    """A proven lower bound.

    Parameters
    ----------
    value
        In units of ``Objective.cost`` where the objective is traffic of pairs, else of
        ``Objective.value``.
    source
        Name of the proof.
    certificate
        Numbers from which ``verify`` recomputes the bound, or None.
    levels
        Proof of each level of the topology.
    interrupted
        True if Ctrl-C ended the proof.
    """

    value: float
    source: str
    certificate: Certificate | None = None
    levels: dict[str, LevelBound] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class Stage:
    """A step of a method.

    Parameters
    ----------
    run
        Takes the run and a budget, offers placements and proves bounds. It raises
        KeyboardInterrupt if the core or HiGHS reports an interrupt.
    applies
        True if it can improve or prove anything for the run's problem.
    least
        Least seconds with which it is worth beginning.
    share
        Largest share of the seconds left that it may use.
    reserve
        Share of the seconds left that earlier stages must leave for it.
    """

    run: Callable[[Run, Budget], None]
    applies: Callable[[Run], bool] = lambda _: True
    least: Callable[[Run], float] = lambda _: 0.0
    share: Callable[[Run], float] = lambda _: 1.0
    reserve: Callable[[Run, float], float] = lambda _, __: 0.0


class Run:
    """A solve under way, with the budget of all stages; ``moves`` is None if no placement runs."""

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        budget: Budget | None = None,
        moves: Moves | None = None,
    ) -> None:
        self.problem, self.seed, self.moves = problem, seed, moves
        self.budget = Budget() if budget is None else budget
        # Where there are many windows, a search sees representative ones; the answer is judged on
        # all.
        self.sees_all = problem.windows.searched is problem.windows
        self.objective = problem.objective_function
        # Where there are very many, the answer is chosen by a sample of them.
        self.final_objective = problem.objective_function
        if not self.sees_all:
            self.objective = problem.objective_searched
            self.final_objective = problem.objective_sampled
        # Searches of few slots try the same slots repeatedly: excess and value, without moves.
        self._ranks: dict[bytes, tuple[float, float]] = {}
        self.incumbents: list[Incumbent] = []
        self.bound: Bound | None = None
        self.details = Details()
        self.interrupted = self.cut = False
        # Seconds that it takes to judge a placement, by the windows searched and by all windows.
        self.judge_seconds = self.final_judge_seconds = 0.0

    @cached_property
    def is_tiny(self) -> bool:
        """True if slots are so few that changes are tried on the objective itself."""
        return bool(self.problem.capacity.sum() <= effort.POLISHED_SLOTS)

    @property
    def slots_of_layer(self) -> int:
        """Slots of the largest layer."""
        return int(self.problem.capacity.sum(axis=1).max())

    # Stages.

    def finish(
        self, stages: Sequence[Stage], floor: Callable[[], Slots], result: Callable[[], Value]
    ) -> Value:
        """Run stages and return the result; after Ctrl-C, that of the best placement so far.

        The slots of ``floor`` are the answer if no stage has offered any.
        """
        try:
            # This takes a while for large tables, so it must not come when the time is over.
            _ = self.problem.statistics.fingerprint
            self.run_stages(stages)
            if self.incumbents:
                return result()
        except KeyboardInterrupt:
            self.interrupted = True
        # Ctrl-C keeps the best so far: this takes no longer than the stage that was interrupted.
        if not self.incumbents:
            self.offer(floor(), "balance", role=Role.FLOOR, is_start=True)
        return result()

    def run_stages(self, stages: Sequence[Stage], budget: Budget | None = None) -> None:
        """Run stages in order until one proves the optimum or the gap, or Ctrl-C.

        A stage that does not apply or cannot end in time is skipped, unless nothing is offered yet.
        """
        budget = self.budget if budget is None else budget
        try:
            for number, stage in enumerate(stages):
                if self.interrupted or self.is_proven:
                    break
                if stage.applies(self):
                    self._begin(stage, stages[number + 1 :], budget)
        except KeyboardInterrupt:
            self.interrupted = True

    def _begin(self, stage: Stage, later: Sequence[Stage], budget: Budget) -> None:
        """Run a stage within its share of the budget, if that suffices."""
        seconds_left, reserved = budget.seconds_left, 0.0
        if seconds_left is not None:
            reserves = [stage.reserve(self, seconds_left) for stage in later if stage.applies(self)]
            reserved = max(reserves, default=0.0)
        # Time to judge what the stage offers, and in the end the best and a start on all windows.
        keep = self.judge_seconds + 2 * self.final_judge_seconds if self.incumbents else 0.0
        stage_budget = budget.within((1 - reserved) * stage.share(self), keep=keep)
        seconds = stage_budget.seconds_left
        if self.incumbents and seconds is not None and seconds <= stage.least(self):
            self.cut = True
        else:
            stage.run(self, stage_budget)

    def run_inner(
        self,
        stages: Sequence[Stage],
        budget: Budget,
        *,
        problem: Problem | None = None,
        moves: Moves | None = None,
        start: Slots | None = None,
    ) -> Run:
        """Run stages in another run and return it: of another problem, start, or price of moves."""
        inner = Run(problem or self.problem, seed=self.seed, budget=budget, moves=moves)
        if start is not None:
            inner.offer(start, "start", is_start=True)
        inner.run_stages(stages)
        if not inner.incumbents:
            raise KeyboardInterrupt
        return inner

    def adopt(self, inner: Run) -> Incumbent:
        """Offer the best of an inner run and return it; take over the inner bound and details."""
        best = inner.answer()
        is_as_good = best.rank <= self.best.rank
        incumbent = self.offer(best.slots, best.by, role=best.role)
        if self.details == Details():
            self.details = inner.details
        self.cut |= inner.cut
        if is_as_good and inner.bound is not None:
            self.bound = inner.bound
        if inner.interrupted:
            raise KeyboardInterrupt
        return incumbent

    # Placements.

    def judge(
        self,
        slots: Slots,
        by: str = "",
        *,
        role: Role = Role.FOUND,
        is_start: bool = False,
    ) -> Incumbent:
        """Return slots [L,D,S] with their rank, after filling them if the problem wants that."""
        begin = self.budget.elapsed
        slots = self.problem.filled(slots, None if self.moves is None else self.moves.initial)
        moves = 0 if self.moves is None else self.moves.count(slots)
        key = slots.tobytes() if self.is_tiny else b""
        rank = self._ranks.get(key) or self._rank_without_moves(slots, self.objective)
        if key:
            self._ranks[key] = rank
        excess, value = self._with_moves(rank, moves)
        incumbent = Incumbent(slots, excess, value, by, role, is_start, moves)
        self.judge_seconds = max(self.judge_seconds, self.budget.elapsed - begin)
        return incumbent

    def _rank(self, slots: Slots, moves: int, objective: Objective) -> tuple[float, float]:
        """Compute excess, and value with the price of moves."""
        return self._with_moves(self._rank_without_moves(slots, objective), moves)

    def _with_moves(self, rank: tuple[float, float], moves: int) -> tuple[float, float]:
        """Add the price of moves to the value of a rank."""
        excess, value = rank
        return excess, value + (0.0 if self.moves is None else self.moves.price * moves)

    def _rank_without_moves(self, slots: Slots, objective: Objective) -> tuple[float, float]:
        """Compute excess and value; the excess is infinite if a rule other than a cap is broken."""
        placement, problem = Placement(slots, num_experts=self.problem.num_experts), self.problem
        excess = float(problem.caps.excess(placement).sum())
        is_over_full = ((slots != EMPTY).sum(axis=2) > problem.capacity).any()
        if is_over_full or problem.rules.violations(placement):
            excess = np.inf
        return excess, objective.value(placement)

    def offer(
        self,
        slots: Slots,
        by: str,
        *,
        role: Role = Role.FOUND,
        is_start: bool = False,
        interrupted: bool = False,
    ) -> Incumbent:
        """Judge slots [L,D,S]; they become an incumbent if their moves are within the budget.

        Where a placement runs, devices are renamed so that the fewest copies move at this rank. The
        best value is reported if the answer will be judged by the same objective and keeps the
        caps. If the search was ``interrupted``, KeyboardInterrupt is raised after that.
        """
        incumbent = self.judge(slots, by, role=role, is_start=is_start)
        if self.moves is not None and incumbent.moves and role is not Role.RUNNING:
            incumbent = self._with_fewest_moves(incumbent, self.moves)
        if self.can_afford(incumbent):
            self.incumbents.append(incumbent)
            best, report = self.best, self.budget.progress
            is_objective = self.sees_all and (self.moves is None or not self.moves.price)
            if report is not None and is_objective and not best.excess:
                report(Progress(0.0, by, best.value, is_step=True))
        if is_start and not (self.sees_all or self.final_judge_seconds or self.budget.is_over()):
            self._estimate_final_rank(incumbent)
        if interrupted:
            raise KeyboardInterrupt
        return incumbent

    def _with_fewest_moves(self, incumbent: Incumbent, moves: Moves) -> Incumbent:
        """Return an incumbent of the same rank, renamed so that the fewest copies move to it."""
        renamed = keep_running(self.problem, self.objective, moves.initial, incumbent.slots)
        nearer = self.judge(renamed, incumbent.by, role=incumbent.role, is_start=incumbent.is_start)
        # Its value has the price of fewer moves, so it may also be lower.
        value = incumbent.value + abs(incumbent.value) * ROUNDING
        is_as_good = nearer.excess <= incumbent.excess and nearer.value <= value
        return nearer if is_as_good and nearer.moves < incumbent.moves else incumbent

    def require_moves(self) -> Moves:
        """Return the moves of a run that has a running placement."""
        assert self.moves is not None
        return self.moves

    @property
    def is_priced(self) -> bool:
        """True if moves have a price, or a budget that may be too small."""
        moves = self.moves
        return moves is not None and bool(moves.price or moves.most < self.problem.capacity.sum())

    def can_afford(self, incumbent: Incumbent) -> bool:
        """Return whether the moves of an incumbent are within the budget."""
        return self.moves is None or incumbent.moves <= self.moves.most

    @property
    def best(self) -> Incumbent:
        """The incumbent of the lowest rank; among equals the first one that is not the floor."""
        return min(
            self.incumbents,
            key=lambda incumbent: (incumbent.rank, incumbent.role is Role.FLOOR),
        )

    def with_role(self, role: Role) -> list[Incumbent]:
        """Return the incumbents that have a role, in the order in which they were offered."""
        return [incumbent for incumbent in self.incumbents if incumbent.role is role]

    def answer(self) -> Incumbent:
        """Return the better one of the best incumbent and the best start, by all windows.

        An incumbent that is the answer by its role comes before both.

        Where a search saw all windows, that is the best incumbent. If there are very many windows,
        a sample of them judges. Where time is over, the start is the answer.
        """
        if chosen := self.with_role(Role.ANSWER):
            return chosen[-1]
        best = self.best
        starts = [incumbent for incumbent in self.incumbents if incumbent.is_start]
        if self.sees_all or not starts:
            return best
        start = min(starts, key=lambda incumbent: incumbent.rank)
        if start.slots.tobytes() == best.slots.tobytes():
            return start
        start_rank = self._estimate_final_rank(start)
        is_better = not self.budget.is_over() and self._estimate_final_rank(best) <= start_rank
        return best if is_better else start

    def final_rank(self, incumbent: Incumbent) -> tuple[float, float]:
        """Compute the rank of an incumbent by all windows."""
        return self._rank(incumbent.slots, incumbent.moves, self.problem.objective_function)

    def _estimate_final_rank(self, incumbent: Incumbent) -> tuple[float, float]:
        """Compute the rank of an incumbent by all windows; by a sample of very many."""
        begin = self.budget.elapsed
        rank = self._rank(incumbent.slots, incumbent.moves, self.final_objective)
        self.final_judge_seconds = max(self.final_judge_seconds, self.budget.elapsed - begin)
        return rank

    # Proofs.

    def prove(self, bound: Bound) -> None:
        """Store a proven lower bound; raise KeyboardInterrupt if Ctrl-C ended its proof."""
        self.bound = bound
        self.details = replace(self.details, bound=BoundDetails(bound.levels))
        report = self.budget.progress
        if report is not None:
            report(Progress(0.0, "bound", None, bound.value / self.scale, is_step=True))
        if bound.interrupted:
            raise KeyboardInterrupt

    @property
    def scale(self) -> int:
        """Units of the bound in one unit of the objective."""
        return self.objective.scale if self.objective.counts_pairs else 1

    @property
    def is_proven(self) -> bool:
        """True if the bound proves that the best placement is the optimum, or within the gap."""
        bound = self.bound
        return bound is not None and judge_bound(self, self.best.slots, bound) is not None


# Sums of floats may be off by this part.
ROUNDING = 1e-9


def judge_bound(run: Run, slots: Slots, bound: Bound) -> Status | Literal["refuted"] | None:
    """Return what a bound proves about slots [L,D,S]: the optimum, or the gap that was given.

    A bound above the value of the slots is refuted. Costs of single copies are whole and exact.
    """
    placement, gap = Placement(slots, num_experts=run.problem.num_experts), run.budget.gap
    objective, rounding = run.problem.objective_function, ROUNDING
    value: float
    if objective.counts_pairs and not placement.has_copies:
        value, rounding = objective.cost(placement), 0
    else:
        value = objective.value(placement) * run.scale
    if bound.value > value * (1 + rounding):
        return "refuted"
    if bound.value >= value * (1 - rounding):
        return "optimal"
    return "gap_reached" if gap is not None and value - bound.value <= gap * value else None
