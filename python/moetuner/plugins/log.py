"""Log lines of the plugins, each warning once, and metrics of their decisions."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
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

    def count_result(self, result: str, *, is_ours: bool) -> None:
        """Pass the result of a decision to Prometheus: "taken", "own map" or "off"."""
        if metrics := _find_metrics():
            metrics["decisions"].labels(result=result).inc()
            metrics["ours"].set(int(is_ours))

    def forget(self) -> None:
        """Write warnings again that were written before: what they warned of had ended."""
        self._once.clear()

    def count(self, before: float, after: float, moved: int, seconds: float) -> None:
        """Pass a decision to Prometheus, if the engine collects metrics of its processes."""
        if metrics := _find_metrics():
            metrics["before"].set(before)
            metrics["after"].set(after)
            metrics["moved"].inc(moved)
            metrics["seconds"].observe(seconds)


def _find_metrics() -> dict[str, Any]:
    """Return the metrics of this process; none if no process collects those of others."""
    return _make_metrics() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else {}


@cache
def _make_metrics() -> dict[str, Any]:
    """Make the metrics, once: a process may have the plugins of several engines."""
    try:
        client, mode = importlib.import_module("prometheus_client"), "mostrecent"
        text = "Balancedness (mean / slowest rank) of the last window, "
        return {
            "decisions": client.Counter(
                "moetuner_decisions", "Decisions by what became of them", ["result"]
            ),
            "ours": client.Gauge(
                "moetuner_map_in_force",
                "1 if the last map that ranks took is moetuner's, 0 if it is the engine's own",
                multiprocess_mode=mode,
            ),
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
