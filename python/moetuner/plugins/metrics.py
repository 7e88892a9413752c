"""Metrics of the plugins' decisions for Prometheus, of rank 0 alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._core import __version__
from moetuner.plugins.settings import METRICS_FOLDER
from moetuner.plugins.verdicts import CAUSES

# Quantiles over the layers: the median, the 95th percentile and the maximum.
QUANTILES = (0.5, 0.95, 1.0)
NAN = float("nan")
# Results of decisions: the map was taken, the engine's own map holds for this decision or from now
# on, or the engine runs another map than the one that it took.
TAKEN, OWN, OFF, NOT_IN_FORCE = "taken", "own map", "off", "not in force"
# Reasons of the first and the last of them; of the others they are those of a verdict.
LIVE, STORED, RUNS_OTHER = "live loads", "stored placement", "engine runs another"
RESULTS = [(TAKEN, LIVE), (TAKEN, STORED), (NOT_IN_FORCE, RUNS_OTHER)]
RESULTS += [(result, cause) for result in (OWN, OFF) for cause in CAUSES]

# Numbers of a gauge by the values of its labels.
Numbers = Mapping[tuple[str, ...], float]


def find_quantiles(values: NDArray[np.float64], *labels: str) -> Numbers:
    """Return the quantiles of values by labels and quantile; those of no values are no number."""
    numbers = np.quantile(values, QUANTILES).tolist() if values.size else [NAN] * len(QUANTILES)
    names = [(*labels, f"{quantile:g}") for quantile in QUANTILES]
    return dict(zip(names, numbers, strict=True))


def find_imbalance(before: NDArray[np.float64], after: NDArray[np.float64]) -> Numbers:
    """Return the quantiles of imbalance over layers, as the engine ran and with the map."""
    return {**find_quantiles(before, "before"), **find_quantiles(after, "after")}


def _gauge(text: str, default: Any = NAN, labels: tuple[str, ...] = ()) -> Any:
    return field(default_factory=lambda: default, metadata={"text": text, "labels": labels})


@dataclass(frozen=True)
class Figures:
    """What a map that was taken brings: each field is the gauge of its name.

    By default they are those of an engine that serves its own map.
    """

    map_in_force: bool = _gauge("1 if the engine serves moetuner's map, 0 if its own", False)
    imbalance: Mapping[tuple[str, ...], float] = _gauge(
        "Slowest rank / mean of ranks on the last live loads, quantiles over layers",
        find_imbalance(np.empty(0), np.empty(0)),
        ("map", "quantile"),
    )
    predicted_gain: float = _gauge(
        "Share of the slowest ranks' tokens that the last map saves, summed over layers, against "
        "the map that ran before it"
    )
    seen_gain: float = _gauge(
        "Share of the slowest ranks' tokens that the map in force has saved on live loads, against "
        "the engine's own map"
    )
    traffic_distance: Mapping[tuple[str, ...], float] = _gauge(
        "Share of tokens that go to other experts than when the placement was computed, "
        "quantiles over layers",
        find_quantiles(np.empty(0)),
        ("quantile",),
    )
    traffic_has_drifted: float = _gauge(
        "1 if traffic has left what the placement was computed from, 0 if not"
    )
    placement_timestamp_seconds: float = _gauge(
        "Unix time at which the placement in force was made"
    )


class Metrics:
    """The series of a process, some fifty in all, none of them per expert or layer."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._gauges = {
            gauge.name: self._make_gauge(gauge.name, **gauge.metadata) for gauge in fields(Figures)
        }
        version = self._make_gauge("build_info", "Version of moetuner", ["version"])
        version.labels(__version__).set(1)
        self._decisions = client.Counter(
            "moetuner_decisions", "Decisions by their result and its reason", ["result", "reason"]
        )
        self._moved = client.Counter(
            "moetuner_copies_moved", "Copies of experts moved to other ranks"
        )
        self._bytes: Any = None
        self._seconds = client.Summary(
            "moetuner_decision_seconds", "Seconds of decisions by their part", ["part"]
        )
        # Counters are there from the start: of one that appears with its first decision,
        # Prometheus sees no increase.
        for result, reason in RESULTS:
            self._decisions.labels(result, reason)

    def _make_gauge(self, name: str, text: str, labels: Sequence[str]) -> Any:
        mode = "mostrecent"
        return self._client.Gauge(f"moetuner_{name}", text, labels, multiprocess_mode=mode)

    def take(
        self, reason: str, figures: Figures, moved: int, size: int, took: tuple[float, float]
    ) -> None:
        """Add a decision that took a map, which moves so many copies of experts.

        ``size`` is the bytes of a copy, 0 if they are not known. ``took`` are the seconds in which
        a rank decided, and those in which ranks agreed.
        """
        self._decisions.labels(TAKEN, reason).inc()
        for part, seconds in zip(("decide", "agree"), took, strict=True):
            self._seconds.labels(part).observe(seconds)
        self._moved.inc(moved)
        if size and self._bytes is None:
            text = "Bytes of the copies of experts moved to other ranks"
            self._bytes = self._client.Counter("moetuner_moved_bytes", text)
        if size:
            self._bytes.inc(size * moved)
        self._show(figures)

    def fall_back(self, result: str, reason: str) -> None:
        """Add a decision after which the engine serves another map than ours."""
        self._decisions.labels(result, reason).inc()
        self._show(Figures())

    def confirm(self) -> None:
        """Show that the engine runs moetuner's map."""
        self._gauges["map_in_force"].set(1)

    def _show(self, figures: Figures) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(figures, name)
            for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
                (gauge.labels(*labels) if labels else gauge).set(number)


def find_metrics(port: int | None = None) -> Metrics | None:
    """Return the metrics of this process; None if neither a folder nor a port is for them."""
    if METRICS_FOLDER not in os.environ and port is None:
        return None
    try:
        return _make_metrics()
    except Exception:
        return None


@cache
def serve_metrics(port: int) -> int:
    """Return the port at which the metrics of this process are served from the first call on.

    The system chooses one for 0. Raises without ``prometheus_client``, and if the port is taken.
    """
    server = importlib.import_module("prometheus_client").start_http_server(port)
    # Versions before 0.19 return nothing.
    return int(server[0].server_port) if server else port


@cache
def _make_metrics() -> Metrics:
    return Metrics(importlib.import_module("prometheus_client"))
