"""Metrics of the plugins' decisions for Prometheus, of rank 0 alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from moetuner._core import __version__
from moetuner.plugins.settings import METRICS_FOLDER

# Quantiles over the layers: the median, the 95th percentile and the maximum.
QUANTILES = (0.5, 0.95, 1.0)
NAN = float("nan")
# Results of decisions: the map was taken, the engine's own map holds for this decision or from now
# on, or the engine runs another map than the one that it took.
TAKEN, OWN, OFF, NOT_IN_FORCE = "taken", "own map", "off", "not in force"


@dataclass(frozen=True)
class Figures:
    """What a map that was taken brings.

    Parameters
    ----------
    before, after
        Slowest rank / mean of ranks as the engine ran and with the map, by quantile over layers.
    gain
        Share of the slowest ranks' tokens that the map saves, summed over layers.
    moved
        Copies of experts that move to other ranks.
    bytes
        Bytes of these copies; None if the engine does not say the size of an expert.
    made
        Unix time at which the placement was made.
    distance
        Distance of the last loads from those that the map was computed from, by quantile.
    has_drifted
        1 if traffic has drifted from them, 0 if not; NaN if that is not known.
    seen
        Share of the slowest ranks' tokens that the map in force has saved.
    """

    before: Mapping[float, float] = field(default_factory=dict)
    after: Mapping[float, float] = field(default_factory=dict)
    gain: float = NAN
    moved: int = 0
    bytes: int | None = None
    made: float = NAN
    distance: Mapping[float, float] = field(default_factory=dict)
    has_drifted: float = NAN
    seen: float = NAN


class Metrics:
    """The series of a process, some thirty in all, none of them per expert or layer."""

    def __init__(self, client: Any) -> None:
        mode = {"multiprocess_mode": "mostrecent"}
        self._client = client
        self._decisions = client.Counter(
            "moetuner_decisions", "Decisions by their result and its reason", ["result", "reason"]
        )
        self._in_force = client.Gauge(
            "moetuner_map_in_force", "1 if the engine serves moetuner's map, 0 if its own", **mode
        )
        self._imbalance = client.Gauge(
            "moetuner_imbalance",
            "Slowest rank / mean of ranks on the last live loads, quantiles over layers",
            ["map", "quantile"],
            **mode,
        )
        self._gain = client.Gauge(
            "moetuner_predicted_gain",
            "Share of the slowest ranks' tokens that the last map saves, summed over layers",
            **mode,
        )
        self._seen = client.Gauge(
            "moetuner_seen_gain",
            "Share of the slowest ranks' tokens that the map in force has saved on live loads",
            **mode,
        )
        self._distance = client.Gauge(
            "moetuner_traffic_distance",
            "Share of tokens that go to other experts than when the placement was computed, "
            "quantiles over layers",
            ["quantile"],
            **mode,
        )
        self._has_drifted = client.Gauge(
            "moetuner_traffic_has_drifted",
            "1 if traffic has left what the placement was computed from, 0 if not",
            **mode,
        )
        self._made = client.Gauge(
            "moetuner_placement_timestamp_seconds",
            "Unix time at which the placement in force was made",
            **mode,
        )
        self._moved = client.Counter(
            "moetuner_copies_moved", "Copies of experts moved to other ranks"
        )
        self._bytes: Any = None
        self._seconds = client.Summary(
            "moetuner_decision_seconds", "Seconds of decisions by their part", ["part"]
        )
        build = client.Gauge("moetuner_build_info", "Version of moetuner", ["version"], **mode)
        build.labels(__version__).set(1)

    def count(self, result: str, reason: str) -> None:
        """Count a decision."""
        self._decisions.labels(result, reason).inc()

    def time(self, computed: float, waited: float) -> None:
        """Add the seconds in which a rank decided, and those in which ranks agreed."""
        self._seconds.labels("decide").observe(computed)
        self._seconds.labels("agree").observe(waited)

    def confirm(self) -> None:
        """Show that the engine runs moetuner's map."""
        self._in_force.set(1)

    def show(self, figures: Figures, *, ours: bool) -> None:
        """Set all gauges; those of a map are no number while the engine serves its own."""
        self._in_force.set(ours)
        for name, values in (("before", figures.before), ("after", figures.after)):
            for quantile in QUANTILES:
                value = values.get(quantile, NAN)
                self._imbalance.labels(name, f"{quantile:g}").set(value)
        for quantile in QUANTILES:
            distance = figures.distance.get(quantile, NAN)
            self._distance.labels(f"{quantile:g}").set(distance)
        self._has_drifted.set(figures.has_drifted)
        self._gain.set(figures.gain)
        self._seen.set(figures.seen)
        self._made.set(figures.made)
        self._moved.inc(figures.moved)
        if figures.bytes is not None:
            if self._bytes is None:
                text = "Bytes of the copies of experts moved to other ranks"
                self._bytes = self._client.Counter("moetuner_moved_bytes", text)
            self._bytes.inc(figures.bytes)


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
    """Serve the metrics of this process, once; return the port, which the system chooses for 0.

    Raises
    ------
    ImportError
        If ``prometheus_client`` is not installed.
    OSError
        If the port is taken, or not allowed.
    """
    server = importlib.import_module("prometheus_client").start_http_server(port)
    # Versions before 0.19 return nothing.
    return int(server[0].server_port) if server else port


@cache
def _make_metrics() -> Metrics:
    return Metrics(importlib.import_module("prometheus_client"))
