"""What a solver is asked for and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import at_least, not_negative, shown, threads_in, whole_number
from moetuner.frozen import Frozen, html_table
from moetuner.placement import Placement, moves_from
from moetuner.solver.bounds.certificate import Certificate

# Seconds that nobody waits for: such a limit, infinity too, is none.
LONGEST_LIMIT = 1e9

# The source of a bound that knows loads alone.
LOADS = "loads alone"

Part = TypeVar("Part", bound="_Part")
Status = Literal[
    "optimal", "feasible", "gap_reached", "time_limit", "interrupted", "violates rules"
]


@dataclass(frozen=True, eq=False, repr=False)
class Progress(Frozen):
    """One line of a long solve.

    Seconds since it began, the phase, and the best objective and bound (None while unknown).
    ``is_step`` where a step of the search has ended with it: without a time limit these lines, but
    for their seconds, are the same in every run, while others depend on when somebody looked.

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
    is_step: bool = False

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective; None while one of them is unknown."""
        if self.objective is None or self.bound is None:
            return None
        return max((self.objective - self.bound) / self.objective, 0.0) if self.objective else 0.0


class History:
    """What a solve tells on its way: the best and the bound so far, every change of them once.

    Parameters
    ----------
    listener
        Who else hears of it, now and then.
    """

    def __init__(self, listener: Callable[[Progress], None] | None = None) -> None:
        self.listener = listener
        self.lines: list[Progress] = []

    def tell(self, line: Progress) -> None:
        """Add a line, with what was known before it where it knows nothing better."""
        if self.lines:
            last = self.lines[-1]
            objectives = [each.objective for each in (line, last) if each.objective is not None]
            bounds = [each.bound for each in (line, last) if each.bound is not None]
            line = replace(
                line, objective=min(objectives, default=None), bound=max(bounds, default=None)
            )
            changed = (line.phase, line.objective, line.bound)
            is_new = line.is_step or changed != (last.phase, last.objective, last.bound)
        else:
            is_new = True
        if is_new:
            self.lines.append(line)
        # Between phases nobody is called: what a listener raises there, nobody waits for.
        if self.listener is not None and not line.is_step:
            self.listener(line)

    def end(self, line: Progress) -> tuple[Progress, ...]:
        """Return all lines, the answer's as the last."""
        return (*self.lines, line)


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
            seconds = float(self.time_limit)
            object.__setattr__(self, "time_limit", None if seconds > LONGEST_LIMIT else seconds)
        if self.iterations is not None:
            whole_number("iterations", self.iterations, lowest=0)
        if self.gap is not None:
            not_negative("gap", self.gap, "share")
        threads_in(self.threads)
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be a function, got {shown(self.progress)}")

    def counting(self) -> Limits:
        """Return the same limits with a progress whose seconds count from now.

        Phases count their own.
        """
        begin, progress = time.monotonic(), self.progress
        if progress is None:
            return self
        report = progress
        return replace(
            self,
            progress=lambda line: report(replace(line, seconds=time.monotonic() - begin)),
        )

    def muted(self) -> Limits:
        """Return the same limits, of which nobody hears values: they are in another unit."""
        progress = self.progress
        if progress is None:
            return self
        report = progress
        return replace(
            self, progress=lambda line: report(replace(line, objective=None, bound=None))
        )

    def tell(self, phase: str, objective: float) -> None:
        """Tell of a better placement, if somebody listens; who counts the seconds adds them."""
        if self.progress is not None:
            self.progress(Progress(0.0, phase, objective, is_step=True))


@dataclass(frozen=True, eq=False, repr=False)
class _Part(Frozen):
    """Facts that a method knows; those that it does not are None or empty."""

    def _known(self) -> dict[str, Any]:
        each = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in each if value not in (None, {})}

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values."""
        return {name: _plain(value) for name, value in self._known().items()}

    def or_else(self: Part, other: Part) -> Part:
        """Return this part, with the other's facts where this one knows none."""
        return replace(other, **self._known())


def _plain(value: Any) -> Any:
    """Return a value of a part as JSON has it."""
    if isinstance(value, _Part):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, eq=False, repr=False)
class ClusterStage(_Part):
    """How the paper's first stage went, which clusters the experts of every layer."""

    sizes: str
    layers_proven_without_search: int
    layers_searched: int
    largest_gap: float
    largest_deviation: float
    tolerance: float
    note: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class PlaceStage(_Part):
    """How the paper's second stage went, which places the clusters; its bound is of its own sum."""

    way: str
    experts_per_device: tuple[int, int]
    bottleneck: int | None = None
    bound: int | None = None
    gap: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SearchDetails(_Part):
    """How the placement was found; ``colocation`` counts what HiGHS was handed.

    Of many windows, ``windows``, a search sees means that stand for them, ``windows_searched``. Of
    many tokens a sample stands for all where expert sets are counted, ``set_tokens``.
    """

    trials: int | None = None
    counts_rounded_to_multiples_of: int | None = None
    device_cost: int | None = None
    node_cost: int | None = None
    way: str | None = None
    found_by: str | None = None
    experts_moved: int | None = None
    stage_1: ClusterStage | None = None
    stage_2: PlaceStage | None = None
    windows: int | None = None
    windows_searched: int | None = None
    set_tokens: int | None = None
    colocation: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class CapsDetails(_Part):
    """Load caps that were not kept, as imbalances by layer.

    ``raised`` has what was settled for. ``infeasible``, for layers where it is proven that no
    placement keeps the cap, has from where to where the smallest one lies that can be kept: twice
    the same number where that is known.
    """

    raised: Mapping[int, float] = field(default_factory=dict)
    infeasible: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values."""
        return {f"caps_{name}": value for name, value in super().to_dict().items()}


@dataclass(frozen=True, eq=False, repr=False)
class UnseenDetails(_Part):
    """What the search made small so that it generalises to unseen traffic, and why."""

    chosen: str
    reason: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LevelBound(_Part):
    """What was proven of one level of the topology: pairs that cross at least."""

    crossing_pairs: int
    iterations: int
    ended: str


@dataclass(frozen=True, eq=False, repr=False)
class BoundDetails(_Part):
    """How the bound was found, by level, and which one the answer itself ``refuted``."""

    levels: Mapping[str, LevelBound] = field(default_factory=dict)
    refuted: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values."""
        names = {"levels": "bound", "refuted": "bound_refuted"}
        return {names[name]: value for name, value in super().to_dict().items()}


@dataclass(frozen=True, eq=False, repr=False)
class Details(Frozen):
    """What a method knows of its answer besides the placement, in four parts.

    Examples
    --------
    >>> import moetuner as mt
    >>> load = [[8, 4, 2, 2]]
    >>> problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(2), max_imbalance=1)
    >>> details = mt.solve(problem).details
    >>> details.caps.infeasible, details.to_dict()["caps_raised"]
    ({0: (1.25, 1.25)}, {0: 1.25})
    """

    search: SearchDetails = field(default_factory=SearchDetails)
    caps: CapsDetails = field(default_factory=CapsDetails)
    unseen: UnseenDetails | None = None
    bound: BoundDetails = field(default_factory=BoundDetails)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values, one entry per fact."""
        found = {**self.search.to_dict(), **self.caps.to_dict(), **self.bound.to_dict()}
        return found if self.unseen is None else {**found, "unseen": self.unseen.to_dict()}

    def searched(self, **facts: Any) -> Details:
        """Return these details with facts of the search."""
        return replace(self, search=replace(self.search, **facts))

    def or_else(self, other: Details) -> Details:
        """Return these details, with the other's where these know nothing."""
        return Details(
            self.search.or_else(other.search),
            self.caps.or_else(other.caps),
            other.unseen if self.unseen is None else self.unseen,
            self.bound.or_else(other.bound),
        )


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
        What the method knows of its answer besides.
    caps
        Caps [L] that the search kept, which had to raise those that it knew no placement under;
        None where ``slots`` alone tell what they exceed.
    """

    slots: NDArray[np.int32]
    status: Status = "feasible"
    bound: float | None = None
    bound_source: str | None = None
    details: Details = field(default_factory=Details)
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
    is a load cap that had to be raised, as ``details.caps.raised`` says. ``history`` tells the way:
    the phases, and every change of the best objective and the bound, the answer's last.

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
    details: Details = field(default_factory=Details, repr=False)
    certificate: Certificate | None = None
    bound_scope: str | None = field(default=None, repr=False)  # the placement shows it
    violations: tuple[str, ...] = ()
    history: tuple[Progress, ...] = field(default=(), repr=False, compare=False)

    _also_shown = ("gap",)

    @property
    def bound_is_of_loads(self) -> bool:
        """Whether the bound knows loads alone, so that the gap to it says little.

        It takes every window's best placement, though there is one for all; and of time no traffic,
        or next to none.
        """
        return self.bound_source == LOADS and self.status != "optimal"

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective: how far from the optimum this can be at most.

        Where ``bound_is_of_loads``, it is mostly the bound that is far from the optimum.
        """
        if self.bound is None:
            return None
        if self.objective <= self.bound:
            return 0.0
        return (self.objective - self.bound) / self.objective

    def uninterrupted(self) -> Result:
        """Return this result; raise KeyboardInterrupt if one has ended its search.

        For whoever draws conclusions from several results, which the best so far does not allow.
        """
        if self.status == "interrupted":
            raise KeyboardInterrupt
        return self

    def _repr_html_(self) -> str:
        head = ("method", "status", "objective", "bound", "gap", "seconds")
        return html_table(head, [[getattr(self, name) for name in head]])


@dataclass(frozen=True)
class MoveCost:
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
        return int(moves_from(self.initial.held, slots).sum())


class Clock:
    """What is left of the limits, and where progress goes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.begin = time.monotonic()

    @property
    def gone(self) -> float:
        """Seconds since the clock was started."""
        return time.monotonic() - self.begin

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least 0; None without a limit."""
        limit = self.limits.time_limit
        return None if limit is None else max(limit - self.gone, 0.0)

    def is_over(self) -> bool:
        """Whether no time is left."""
        return self.left == 0

    def within(self, share: float = 1.0, *, keep: float = 0.0) -> Limits:
        """Return the limits with a share of the time that is left; all of it by default.

        ``keep`` seconds of it are kept back for what is to come.
        """
        left = self.left
        if left is None:
            return self.limits
        return replace(self.limits, time_limit=max(left - keep, 0.0) * share)

    def rest(self) -> Limits:
        """Return the time that is left, threads and progress, for what has its own iterations."""
        return replace(self.within(), iterations=None, gap=None)

    def report(self, phase: str) -> Callable[[float | None, float], None] | None:
        """Turn what HiGHS reports of a programme, whose unit is its own, into `Progress`."""
        progress = self.limits.progress
        if progress is None:
            return None
        report = progress

        def tell(objective: float | None, bound: float) -> None:
            gap = Progress(self.gone, phase, objective, bound).gap
            told = phase if gap is None else f"{phase}, {100 * gap:.1f} % from their optimum"
            report(Progress(self.gone, told))

        return tell
