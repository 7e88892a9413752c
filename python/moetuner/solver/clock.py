"""Limits as time goes by, and progress by phase."""

from __future__ import annotations

import time
from collections.abc import Callable

from moetuner.solver.result import Limits, Progress


class Clock:
    """What is left of the limits, and where progress goes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.begin = time.monotonic()

    def rest(self) -> Limits:
        """Return the limits for what follows: the same, less the time that is gone."""
        left = self.limits.time_limit
        if left is not None:
            left = max(left - (time.monotonic() - self.begin), 0.0)
        return Limits(left, threads=self.limits.threads, progress=self.limits.progress)

    def report(self, phase: str) -> Callable[[float | None, float], None] | None:
        """Turn what HiGHS reports into `Progress` of a phase."""
        progress = self.limits.progress
        if progress is None:
            return None
        report = progress
        return lambda objective, bound: report(
            Progress(time.monotonic() - self.begin, phase, objective, bound)
        )
