"""Limits as time goes by, and progress by phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from moetuner.solver.result import Limits, Progress


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
