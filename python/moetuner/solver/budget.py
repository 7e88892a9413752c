"""Time, effort and progress: the clock of a solve, and the reports of how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moetuner._checks import at_least, not_negative, one_of, shown, threads_in, whole_number
from moetuner.frozen import Frozen
from moetuner.solver.effort import EFFORTS, Effort

# Seconds from which a time limit, or infinity, counts as none.
LONGEST_LIMIT = 1e9


@dataclass(frozen=True, eq=False, repr=False)
class Progress(Frozen):
    """One line of a long solve.

    It has the seconds since the solve began, the phase, and the best objective and bound (None
    while unknown). ``is_step`` marks the end of a step of the search. Without a time limit those
    lines are the same in every run, but for their seconds; other lines depend on when progress was
    polled.

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
        return gap_between(self.objective, self.bound)


def gap_between(objective: float | None, bound: float | None) -> float | None:
    """Return (objective - bound) / objective, at least 0; None while one of them is unknown."""
    if objective is None or bound is None:
        return None
    return (objective - bound) / objective if objective > bound else 0.0


@dataclass(frozen=True)
class Budget:
    """Seconds, steps and threads that a stage may use; the clock starts when it is made.

    Without ``time_limit`` the answer depends on the problem and the seed alone.

    Parameters
    ----------
    time_limit
        Seconds; the best placement so far is returned.
    iterations
        Search steps of each start; None for the default of the problem's size.
    gap
        Stop when (objective - bound) / objective is at most this.
    cutoff
        Value of a known answer; full slots that seem to have none below it are not searched.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    progress
        Called now and then, from the calling thread.
    effort
        Amount of search without a time limit: ``brief``, ``default`` or ``thorough``.
    """

    time_limit: float | None = None
    iterations: int | None = None
    gap: float | None = None
    threads: int | None = None
    progress: Callable[[Progress], None] | None = None
    effort: str = "default"
    cutoff: float | None = None
    begin: float = field(default_factory=lambda: time.monotonic(), compare=False)

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            at_least("time_limit", self.time_limit, 0, " seconds")
            seconds = float(self.time_limit)
            object.__setattr__(self, "time_limit", None if seconds > LONGEST_LIMIT else seconds)
        if self.iterations is not None:
            whole_number("iterations", self.iterations, lowest=0)
        if self.gap is not None:
            not_negative("gap", self.gap, "share")
        if self.cutoff is not None:
            not_negative("cutoff", self.cutoff, "value")
        threads_in(self.threads)
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be a function, got {shown(self.progress)}")
        one_of("effort", self.effort, EFFORTS)

    @property
    def work(self) -> Effort:
        """Bounds on the work; under a time limit only the time is bounded."""
        if self.time_limit is None:
            return EFFORTS[self.effort]
        return replace(EFFORTS["thorough"], layer_work=math.inf)

    @property
    def elapsed(self) -> float:
        """Seconds since the budget was made."""
        return time.monotonic() - self.begin

    @property
    def seconds_left(self) -> float | None:
        """Seconds that are left, at least 0; None without a limit."""
        return None if self.time_limit is None else max(self.time_limit - self.elapsed, 0.0)

    def is_over(self) -> bool:
        """Return whether no time is left."""
        return self.seconds_left == 0

    def within(self, share: float = 1.0, *, keep: float = 0.0) -> Budget:
        """Return a budget of a share of the seconds left, less ``keep`` seconds for later steps."""
        seconds_left = self.seconds_left
        limit = None if seconds_left is None else max(seconds_left - keep, 0.0) * share
        return replace(self, time_limit=limit, begin=time.monotonic())

    def muted(self) -> Budget:
        """Return the same budget without progress values, for values in another unit."""
        report = self.progress
        if report is None:
            return self
        return replace(
            self, progress=lambda line: report(replace(line, objective=None, bound=None))
        )

    def phase(self, name: str) -> Callable[[float, int | None], None] | None:
        """Return a progress callback for the core that names a phase; None if nobody listens."""
        report = self.progress
        return None if report is None else lambda seconds, _: report(Progress(seconds, name))

    def report(self, phase: str) -> Callable[[float | None, float], None] | None:
        """Return a progress callback for HiGHS, whose objective and bound have their own unit."""
        report = self.progress
        if report is None:
            return None

        def programme(objective: float | None, bound: float) -> None:
            gap = Progress(self.elapsed, phase, objective, bound).gap
            name = phase if gap is None else f"{phase}, {100 * gap:.1f} % from their optimum"
            report(Progress(self.elapsed, name))

        return programme


class History:
    """Every change of the best objective and of the bound, in order, with seconds since the start.

    Parameters
    ----------
    listener
        Function that is called now and then with the last line.
    """

    def __init__(self, listener: Callable[[Progress], None] | None = None) -> None:
        self.listener = listener
        self.lines: list[Progress] = []
        self.begin = time.monotonic()

    def add(self, line: Progress) -> None:
        """Add a line; the best objective only falls, and the bound only rises."""
        line, is_new = replace(line, seconds=time.monotonic() - self.begin), True
        if self.lines:
            last = self.lines[-1]
            both = (last, line)
            objectives = [entry.objective for entry in both if entry.objective is not None]
            bounds = [entry.bound for entry in both if entry.bound is not None]
            line = replace(
                line, objective=min(objectives, default=None), bound=max(bounds, default=None)
            )
            changed = (line.phase, line.objective, line.bound)
            is_new = line.is_step or changed != (last.phase, last.objective, last.bound)
        if is_new:
            self.lines.append(line)
        # The end of a step is not reported: nothing would catch what a listener raises there.
        if self.listener is not None and not line.is_step:
            self.listener(line)

    def finish(self, objective: float, bound: float | None) -> tuple[Progress, ...]:
        """Return all lines, the answer's as the last."""
        seconds = time.monotonic() - self.begin
        return (*self.lines, Progress(seconds, "answer", objective, bound, is_step=True))
