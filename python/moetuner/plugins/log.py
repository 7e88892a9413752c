"""What the plugins say: a line when something changes, each warning once, and metrics."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any


class Log:
    """Lines and metrics of one engine's plugin.

    Parameters
    ----------
    logger
        The engine's, so that lines appear among its own.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self._warned: set[str] = set()
        self._said: dict[object, str] = {}
        self._metrics: dict[str, Any] | None = None

    def say(self, text: str, rank: int = 0, *, about: object = None) -> None:
        """Write a line at INFO on rank 0 and at DEBUG on others.

        With ``about``, a line that repeats the last one about the same thing goes to DEBUG as well.
        """
        again = about is not None and self._said.get(about) == text
        if about is not None:
            self._said[about] = text
        level = logging.INFO if rank == 0 and not again else logging.DEBUG
        self.logger.log(level, "moetuner: %s", text)

    def warn(self, text: str, rank: int = 0) -> None:
        """Write a warning once, at DEBUG on ranks other than 0."""
        if text not in self._warned:
            self._warned.add(text)
            self.logger.log(logging.WARNING if rank == 0 else logging.DEBUG, "moetuner: %s", text)

    def count(self, before: float, after: float, moved: int, seconds: float) -> None:
        """Give a decision to Prometheus, where the engine collects from its processes."""
        if self._metrics is None:
            self._metrics = _metrics()
        if self._metrics:
            self._metrics["before"].set(before)
            self._metrics["after"].set(after)
            self._metrics["moved"].inc(moved)
            self._metrics["seconds"].observe(seconds)


def _metrics() -> dict[str, Any]:
    """Make the metrics; none where no process collects those of others."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return {}
    try:
        client, mode = importlib.import_module("prometheus_client"), "mostrecent"
        text = "Balancedness (mean / slowest rank) of the last window, "
        return {
            "before": client.Gauge(
                "moetuner_balancedness_before", text + "as it ran", multiprocess_mode=mode
            ),
            "after": client.Gauge(
                "moetuner_balancedness_after", text + "with the new map", multiprocess_mode=mode
            ),
            "moved": client.Counter(
                "moetuner_copies_moved", "Copies of experts moved to other ranks"
            ),
            "seconds": client.Histogram("moetuner_decision_seconds", "Seconds of one decision"),
        }
    except Exception:
        return {}
