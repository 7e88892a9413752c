"""Say what decisions bring: lines in the log, and metrics of rank 0, in a thread of its own."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from moetuner.placement import compute_checksum
from moetuner.plugins import metrics
from moetuner.plugins.log import Background, Log, quote_error
from moetuner.plugins.proposals import Proposal
from moetuner.plugins.running import Compared, ModelKey
from moetuner.plugins.traffic import LiveTraffic
from moetuner.plugins.verdicts import CAUSES, OTHER, Verdict


class Reports:
    """What the log, and Prometheus at a port, get of the decisions of one process."""

    def __init__(self, log: Log, background: Background, port: int | None) -> None:
        self.log, self._background, self._port = log, background, port
        self.rank, self._has_begun = 0, False
        # Lines on the engine's own map since ranks took one of ours, and the cause of the last.
        self._fallbacks: set[str] = set()
        self._cause = OTHER
        # Unix time of the last live decision that changed a map.
        self._made = time.time()
        # Bytes of an expert of a layer, by the number of layers of its model.
        self.expert_bytes: dict[int, int] = {}
        self._traffic: defaultdict[ModelKey, LiveTraffic] = defaultdict(LiveTraffic)

    def begin(self, rank: int) -> None:
        """Begin a decision of a rank; before the first of rank 0 there are metrics, all zero."""
        self.rank = rank
        if rank == 0 and not self._has_begun:
            self._has_begun = True
            self._background.run("metrics are not served", self._begin)

    def _begin(self) -> None:
        metrics.find_metrics(self._port)
        if self._port is None:
            return
        try:
            self.log.say(f"serves metrics at port {metrics.serve_metrics(self._port)}", once=True)
        except OSError as error:
            text = f"port {self._port} of MOETUNER_METRICS_PORT: {quote_error(error)}"
            raise OSError(text) from error

    def fall_back(self, verdict: Verdict) -> None:
        """Log and count that all ranks take the engine's own map."""
        until = " from now on" if verdict.do == "off" else ""
        text = f"all ranks take the engine's own map{until}: {verdict.reason}"
        self.log.warn(text, int(not verdict.speaks))
        self._fallbacks.add(text)
        self._cause = verdict.cause if verdict.cause in CAUSES else OTHER
        self._count(metrics.OFF if verdict.do == "off" else metrics.OWN, self._cause)

    def stay_off(self) -> None:
        """Count a decision for which ranks were not asked, as they have stopped asking."""
        self._count(metrics.OFF, self._cause)

    def end_fall_back(self) -> None:
        """Let the lines of fall-backs be written again, as ranks took a map."""
        for text in self._fallbacks:
            self.log.forget(text)
        self._fallbacks.clear()

    def compare(self, compared: Compared) -> None:
        """Log and count whether the engine runs the map that ranks took."""
        if compared.is_new:
            level = logging.INFO if compared.is_ours else logging.WARNING
            self.log.say(compared.text, self.rank, level)
        if not compared.is_ours:
            self._count(metrics.NOT_IN_FORCE, metrics.RUNS_OTHER)
        elif compared.is_new:
            self._show("the map in force is not shown", metrics.Metrics.confirm)

    def describe(
        self,
        key: ModelKey,
        proposal: Proposal,
        took: tuple[float, float],
        rank: int,
        is_ours: bool,
    ) -> None:
        """Log what a map changes, at DEBUG if it changes nothing; pass its figures to metrics.

        ``took`` is as in ``Metrics.take``, and ``is_ours`` whether the engine is expected to run
        the map. A rank may begin another decision meanwhile.
        """
        case, slots, stored = proposal.case, proposal.slots, proposal.stored
        layers, ranks, width = slots.shape
        changed = int((slots != case.slots).any(axis=(1, 2)).sum())
        before, after = case.balancedness(case.slots), case.balancedness(slots)
        moved = case.copies_moved(slots)
        gain = "no load yet"
        if after is not None:
            was = "" if before is None else f"{before:.3f} -> "
            gain = f"balancedness {was}{after:.3f}"
        source = metrics.LIVE if stored is None else f"{stored.path} ({stored.checksum})"
        decided, agreed = (1e3 * seconds for seconds in took)
        self.log.say(
            f"{source}: {gain}, {changed} layers change, {moved} copies move; map "
            f"{compute_checksum(slots)} of {layers} layers x {ranks * width} slots on "
            f"{ranks} ranks, decided in {decided:.1f} ms, agreed in {agreed:.1f} ms",
            rank if changed else 1,
        )
        if changed:
            self._made = time.time()
        series = metrics.find_metrics(self._port) if rank == 0 else None
        if series is None:
            return
        figures = replace(
            self._traffic[key].follow(case, slots, stored, before),
            map_in_force=is_ours,
            imbalance=metrics.find_imbalance(case.imbalance(case.slots), case.imbalance(slots)),
            predicted_gain=1 - before / after if before and after else metrics.NAN,
            placement_timestamp_seconds=self._made if stored is None else stored.made,
        )
        reason = metrics.LIVE if stored is None else metrics.STORED
        series.take(reason, figures, moved, self.expert_bytes.get(layers, 0), took)

    def _count(self, result: str, reason: str) -> None:
        """Count a decision after which the engine does not serve our map."""
        failure = "a decision is not counted"
        self._show(failure, lambda series: series.fall_back(result, reason))

    def _show(self, failure: str, change: Callable[[metrics.Metrics], None]) -> None:
        """Change the metrics of rank 0 in the background, if there are some."""

        def show() -> None:
            if (series := metrics.find_metrics(self._port)) is not None:
                change(series)

        if self.rank == 0:
            self._background.run(failure, show)
