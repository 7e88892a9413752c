"""What a solver is asked for and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import at_least, not_negative, shown, threads_in, whole_number
from moetuner.frozen import Frozen, html_table
from moetuner.placement import Placement, brought
from moetuner.solver.bounds.certificate import Certificate

# Seconds that nobody waits for: such a limit, infinity too, is none.
LONGEST_LIMIT = 1e9

Status = Literal[
    "optimal", "feasible", "gap_reached", "time_limit", "interrupted", "violates rules"
]


@dataclass(frozen=True, eq=False, repr=False)
class Progress(Frozen):
    """One line of a long solve.

    Seconds since it began, the phase, and the best objective and bound (None while unknown).

    Examples
    --------
    >>> import moetuner as mt
    >>> mt.Progress(1.5, "search", objective=0.25)
    Progress(seconds=1.5, phase='search', objective=0.25)
    """

    seconds: float
    phase: str
    objective: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Limits:
    """When to stop. Without ``time_limit`` the answer depends on the problem and the seed alone.

    Parameters
    ----------
    time_limit
        Seconds; the best placement so far is returned.
    iterations
        Search steps of each start; None for the default of the problem's size.
    gap
        Stop when (objective - bound) / objective is at most this.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    progress
        Called now and then, from the calling thread.
    """

    time_limit: float | None = None
    iterations: int | None = None
    gap: float | None = None
    threads: int | None = None
    progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            at_least("time_limit", self.time_limit, 0, " seconds")
            if self.time_limit > LONGEST_LIMIT:
                object.__setattr__(self, "time_limit", None)
        if self.iterations is not None:
            whole_number("iterations", self.iterations, lowest=0)
        if self.gap is not None:
            not_negative("gap", self.gap, "share")
        threads_in(self.threads)
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be a function, got {shown(self.progress)}")


@dataclass(frozen=True)
class Candidate:
    """What one method found.

    Parameters
    ----------
    slots
        Expert ids [L,D,S], -1 for an empty slot.
    status
        ``"optimal"`` only with a proof.
    bound
        Proven lower bound of ``Objective.cost`` where the objective is traffic, else of
        ``Objective.value``; None without one. Of what it is one, `caps.scope` says.
    bound_source
        Which bound it is.
    details
        What the method has to say about itself, one entry per fact, JSON values.
    caps
        Caps [L] that the search kept, which had to raise those that it knew no placement under;
        None where ``slots`` alone tell what they exceed.
    """

    slots: NDArray[np.int32]
    status: Status = "feasible"
    bound: float | None = None
    bound_source: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    certificate: Certificate | None = None
    caps: NDArray[np.uint64] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Result(Frozen):
    """A solved problem.

    ``objective`` and ``bound`` are ``Objective.value``'s: microseconds of a layer, max / mean load,
    or the share of the traffic that moves (the crossing on the problem's own statistics, where all
    links are equal). ``bound_scope`` says of which placements ``bound`` is a bound: whether they
    may have copies of experts, and which load caps they keep. ``violations`` are rules that the
    placement breaks, in words; ``status`` then is ``"violates rules"``, unless all that is broken
    is a load cap that had to be raised, as ``details["caps_raised"]`` says. ``history`` is what was
    reported on the way, where somebody listened.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> result = mt.solve(mt.Problem(statistics, mt.Topology(2), objective="balance"))
    >>> result.status, round(result.gap, 3)
    ('feasible', 0.2)
    """

    placement: Placement
    method: str
    status: Status
    objective: float
    bound: float | None
    bound_source: str | None
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    certificate: Certificate | None = None
    bound_scope: str | None = None
    violations: tuple[str, ...] = ()
    history: tuple[Progress, ...] = field(default=(), repr=False, compare=False)

    _also_shown = ("gap",)

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective: how far from the optimum this can be at most."""
        if self.bound is None:
            return None
        if self.objective <= self.bound:
            return 0.0
        return (self.objective - self.bound) / self.objective

    def _repr_html_(self) -> str:
        head = ("method", "status", "objective", "bound", "gap", "seconds")
        return html_table(head, [[getattr(self, name) for name in head]])


@dataclass(frozen=True)
class Moving:
    """What it costs to leave a running placement.

    Parameters
    ----------
    initial
        The placement that runs.
    price
        Of a copy that has to be brought, in units of the objective.
    """

    initial: Placement
    price: float

    @property
    def prices(self) -> NDArray[np.float64]:
        """Price of a copy on a device [L,D,E]."""
        return np.where(self.initial.held, 0.0, self.price)

    def moved(self, slots: NDArray[np.int32]) -> int:
        """Count the copies in slots [L,D,S] that have to be brought."""
        return brought(self.initial.held, slots)


class Clock:
    """What is left of the limits, and where progress goes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.begin = time.monotonic()

    def within(self, share: float = 1.0) -> Limits:
        """Return the limits with a share of the time that is left; all of it by default."""
        if self.limits.time_limit is None:
            return self.limits
        left = self.limits.time_limit - (time.monotonic() - self.begin)
        return replace(self.limits, time_limit=max(left, 0.0) * share)

    def rest(self) -> Limits:
        """Return the time that is left, threads and progress, for what has its own iterations."""
        return replace(self.within(), iterations=None, gap=None)

    def report(self, phase: str) -> Callable[[float | None, float], None] | None:
        """Turn what HiGHS reports into `Progress` of a phase."""
        progress = self.limits.progress
        if progress is None:
            return None
        report = progress
        return lambda objective, bound: report(
            Progress(time.monotonic() - self.begin, phase, objective, bound)
        )
