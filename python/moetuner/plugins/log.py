"""Log lines of the plugins, each warning once, and metrics of their decisions."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any


def quote_error(error: BaseException) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split()) or repr(error)


class Log:
    """Lines and metrics of one engine's plugin.

    Parameters
    ----------
    logger
        The engine's logger, so that lines appear among its own.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self._once: set[str] = set()
        self._metrics: dict[str, Any] | None = None

    def say(
        self, text: str, rank: int = 0, level: int = logging.INFO, *, once: bool = False
    ) -> None:
        """Write a line, at DEBUG on ranks other than 0; with ``once``, each text only once."""
        if not (once and text in self._once):
            self.logger.log(logging.DEBUG if rank else level, "moetuner: %s", text)
        if once:
            self._once.add(text)

    def warn(self, text: str, rank: int = 0) -> None:
        """Write a warning once, at DEBUG on ranks other than 0."""
        self.say(text, rank, logging.WARNING, once=True)

    def count(self, before: float, after: float, moved: int, seconds: float) -> None:
        """Pass a decision to Prometheus, if the engine collects metrics of its processes."""
        if self._metrics is None:
            self._metrics = _metrics()
        if self._metrics:
            self._metrics["before"].set(before)
            self._metrics["after"].set(after)
            self._metrics["moved"].inc(moved)
            self._metrics["seconds"].observe(seconds)


def _metrics() -> dict[str, Any]:
    """Make the metrics; none if no process collects those of others."""
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
