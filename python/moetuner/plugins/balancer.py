"""The balancer that engines' plugins call: it decides with all ranks, records and logs."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._core import __version__
from moetuner.placement import compute_checksum as checksum_placement
from moetuner.plugins.agreement import MapAgreement
from moetuner.plugins.decision import Case, Slots
from moetuner.plugins.files import Files, Stored, compute_checksum
from moetuner.plugins.log import Log, quote_error
from moetuner.plugins.metrics import (
    NOT_IN_FORCE,
    OFF,
    OWN,
    QUANTILES,
    TAKEN,
    Figures,
    find_metrics,
    serve_metrics,
)
from moetuner.plugins.recorder import LoadRecorder
from moetuner.plugins.rounds import Group
from moetuner.plugins.running import ModelKey, RunningMaps
from moetuner.plugins.settings import Settings, find_idle_variables
from moetuner.plugins.traffic import LiveTraffic
from moetuner.plugins.verdicts import CAUSES, OTHER, Post, Verdict

# Seconds between two looks at the file of MOETUNER_RELOAD.
LOOK_SECONDS = 0.5
# Why a draft model has no map of ours. It is none of the main model's fall-backs.
NO_DRAFT = "no file is of the draft model's layers"
# Only one thread reads files again at a time; a second caller then finds that they are read.
READING = threading.Lock()


class Balancer:
    """Decisions and records of one engine, as the settings ask.

    Files are read when it is made, never while the engine waits.

    Parameters
    ----------
    settings
        Settings of the environment, or the error of reading them.
    log
        Where lines are logged.
    agreement
        Agreement of ranks; by default with the usual patience.
    """

    def __init__(
        self, settings: Settings | str, log: Log, agreement: MapAgreement | None = None
    ) -> None:
        self.log = log
        self.settings = Settings(rebalance=True) if isinstance(settings, str) else settings
        self.files = (
            Files(error=settings) if isinstance(settings, str) else Files.read(self.settings)
        )
        self._agreement = agreement or MapAgreement()
        self._off = False
        self._pending: Files | None = None
        self._seen = _signature(self.settings.reload)
        self._looks = self._is_served = False
        self._recorder = (
            None if self.settings.record is None else LoadRecorder(self.settings.record)
        )
        self._background: ThreadPoolExecutor | None = None
        self._models: dict[int, set[str]] = {}
        # The last case of every model, by its layers, experts and name.
        self._cases: dict[tuple[int, int, str | None], Case] = {}
        self._running = RunningMaps()
        # True while vLLM rearranges for a map that its caller confirms.
        self.is_placing = False
        # Lines on the engine's own map since ranks took one of ours, and the cause of the last.
        self._fallbacks: set[str] = set()
        self._cause = ""
        # Unix time of the last live decision that changed a map.
        self._made = time.time()
        # Bytes of an expert of a layer, by the number of layers of its model.
        self._expert_bytes: dict[int, int] = {}
        # What is seen of a model's traffic, by its name and the shape of its map.
        self._traffic: defaultdict[ModelKey, LiveTraffic] = defaultdict(LiveTraffic)
        self._rank = 0

    @classmethod
    def from_environment(cls, log: Log, engine: str) -> Balancer | None:
        """Make the balancer that the environment asks for; None if it asks for nothing.

        Warn of variables that do nothing, and of files that cannot be read. With a wrong variable
        there is a balancer, too, which tells the other ranks.
        """
        # Engines have many processes; only the first one logs for those that start like it.
        rank = int(multiprocessing.parent_process() is not None)
        for line in find_idle_variables():
            log.warn(line, rank)
        try:
            settings = Settings.from_environment()
            balancer = None if settings is None else cls(settings, log)
        except ValueError as error:
            balancer = cls(str(error), log)
        if balancer is not None and balancer.files.error:
            log.warn(f"{balancer.files.error}; {engine} decides by itself", rank)
        return balancer

    @property
    def purpose(self) -> str:
        """A sentence on what the settings ask for."""
        settings, files = self.settings, self.files
        if files.error:
            return f"takes part with nothing, as {files.error}"
        parts = []
        if files.placements:
            parts.append("serves " + " and ".join(map(str, files.placements)))
        elif settings.rebalance:
            with_pairs = f", with the pairs of {settings.profile}" if files.profile else ""
            parts.append(f"rebalances by live loads{with_pairs}")
        if settings.record:
            parts.append(f"records loads in {settings.record}")
        if settings.reload:
            parts.append(f"reads its files again when {settings.reload} changes")
        if not parts:
            parts.append("has weights that change follow the engine's own moves of experts")
        return "; ".join(parts) + f"; checksum {files.checksum}; moetuner {__version__}"

    @property
    def registered(self) -> str:
        """A line that claims no more than that the engine may ask."""
        return f"registered, not asked yet; when asked, it {self.purpose}"

    def take_model(self, layers: int, name: str | None, expert_bytes: int = 0) -> None:
        """Remember a model of the engine by its number of layers; 0 bytes are not known."""
        if expert_bytes:
            self._expert_bytes[layers] = expert_bytes
        self._models.setdefault(layers, set()).update([name] if name else [])

    def name_model(self, layers: int) -> str | None:
        """Return the name of the only model with so many layers; None if there are several."""
        names = self._models.get(layers, set())
        return next(iter(names)) if len(names) == 1 else None

    def decide(
        self,
        weight: ArrayLike,
        num_replicas: int,
        num_groups: int | None,
        num_nodes: int,
        num_ranks: int,
        old_map: ArrayLike | None = None,
        *,
        group: Callable[[], Group | None] = lambda: None,
        model: str | None = None,
        form: Callable[[NDArray[np.int64]], Any] = lambda slots: slots,
        rank: int = 0,
        wait: float | None = None,
        quiet: bool = False,
        sparse: Sequence[int] | None = (),
    ) -> Any:
        """Return the expert of every slot [L,P] in an engine's form; None for the engine's own map.

        All ranks of a group get a map, or all get None. It never raises.

        Parameters
        ----------
        weight, num_replicas, num_groups, num_nodes, num_ranks, old_map
            As ``rebalance_experts`` takes them.
        group
            Function that returns the ranks that exchange experts; None if this process is alone.
        model
            Name of the model, if the engine has it.
        form
            Function from the map to the engine's form; it may refuse a map by raising.
        rank
            Rank of this process; only rank 0 logs.
        wait
            Seconds that ranks wait for each other, if not the default.
        quiet
            If True, do not log: the engine asks for the same decision again.
        sparse
            Layers with experts of an engine that counts others too, empty where only their load
            tells; None for an engine that does not count others.
        """
        if not self.settings.decides:
            return None
        self._rank = rank
        if rank == 0 and self.settings.metrics_port is not None and not self._is_served:
            self._is_served = True
            self._run_in_background("metrics are not served", self._serve_metrics)
        self.confirm(old_map, num_ranks, model)
        if self._off and self._agreement.is_off(group):
            self._count(OFF, self._cause, rank)
            return None
        if self.settings.reload is not None and not self._looks:
            # Started once, in the process that decides.
            self._looks = True
            threading.Thread(target=self._watch, name="moetuner-reload", daemon=True).start()
        arguments = (weight, num_replicas, num_groups, num_nodes, num_ranks, old_map, sparse)
        while True:
            begin, pending = time.perf_counter(), self._pending
            decided, post = self._decide_alone(arguments, model, form, pending)
            agreeing = time.perf_counter()
            verdict = self._agreement.verdict(group, post, wait)
            if verdict.do != "reload" or pending is None:
                break
            self.files = pending
            if self._pending is pending:
                self._pending = None
            self.log.say(f"read its files again: {self.purpose}", rank)
        if verdict.do != "take" or decided is None:
            if verdict.do == "own" and verdict.reason == NO_DRAFT:
                text = f"{model}: the engine's own map for its layers, as {NO_DRAFT}"
                self.log.say(text, rank, once=True)
                return None
            self._fall_back(verdict)
            with suppress(Exception):
                self._running.forget((model, (np.shape(weight)[-2], num_replicas)))
            return None
        for text in self._fallbacks:
            self.log.forget(text)
        self._fallbacks.clear()
        answer, case, slots, stored = decided
        if not quiet:
            key = model, (len(slots), slots[0].size)
            if model is not None or len(self._models.get(len(slots), ())) < 2:
                self._running.take(key, slots, case.slots)
            ours = not self._running.is_refused(key) or np.array_equal(slots, case.slots)
            # A copy, as an engine goes on with its arrays, and may reset them.
            case = replace(case, windows=case.load[None])
            took = agreeing - begin, time.perf_counter() - agreeing
            details = key, case, slots, stored, rank, ours, took
            self._run_in_background("a decision is not described", self._describe, *details)
        return answer

    def _fall_back(self, verdict: Verdict) -> None:
        """Log and count that all ranks take the engine's own map."""
        self._off = verdict.do == "off"
        until = " from now on" if self._off else ""
        text = f"all ranks take the engine's own map{until}: {verdict.reason}"
        self.log.warn(text, int(not verdict.speaks))
        self._fallbacks.add(text)
        self._cause = verdict.cause if verdict.cause in CAUSES else OTHER
        self._count(OFF if self._off else OWN, self._cause, self._rank)

    def expect(self, taken: ArrayLike, before: ArrayLike, ranks: int, model: str | None) -> None:
        """Expect that the engine runs a map [L,P] that ranks took, in place of the one before."""
        slots, ran = (np.asarray(table) for table in (taken, before))
        shape = len(slots), ranks, -1
        self._running.take((model, slots.shape), slots.reshape(shape), ran.reshape(shape))

    def forget_taken(self) -> None:
        """Expect nothing: the engine asked for maps that it will not run."""
        self._running.expect_nothing()

    def confirm(self, running: ArrayLike | None, ranks: int, model: str | None) -> None:
        """Compare the engine's map [L,P] with the one that ranks took; log changes, and count.

        Nothing is said before ranks have taken a map, nor of a map that was compared.
        """
        with suppress(Exception):
            slots = np.asarray(running)
            key = model, slots.shape
            compared = self._running.compare(key, slots.reshape(len(slots), ranks, -1))
            if compared is None:
                return
            if compared.is_new:
                level = logging.INFO if compared.is_ours else logging.WARNING
                self.log.say(compared.text, self._rank, level)
            if not compared.is_ours:
                self._count(NOT_IN_FORCE, "engine runs another", self._rank)
            elif compared.is_new and self._rank == 0:
                self._run_in_background("the map in force is not shown", self._show_in_force)

    def _show_in_force(self) -> None:
        if (metrics := find_metrics(self.settings.metrics_port)) is not None:
            metrics.confirm()

    def _serve_metrics(self) -> None:
        """Serve metrics at the port of the settings, and log where."""
        port = self.settings.metrics_port
        assert port is not None
        try:
            self.log.say(f"serves metrics at port {serve_metrics(port)}", once=True)
        except OSError as error:
            raise OSError(f"port {port} of MOETUNER_METRICS_PORT: {quote_error(error)}") from error

    def _count(self, result: str, reason: str, rank: int) -> None:
        """Count a decision after which the engine does not serve our map."""

        def count() -> None:
            if (metrics := find_metrics(self.settings.metrics_port)) is not None:
                metrics.count(result, reason)
                metrics.show(Figures(), ours=False)

        if rank == 0:
            self._run_in_background("a decision is not counted", count)

    def _decide_alone(
        self,
        arguments: tuple[Any, ...],
        model: str | None,
        form: Callable[[NDArray[np.int64]], Any],
        pending: Files | None,
    ) -> tuple[tuple[Any, Case, Slots, Stored | None] | None, Post]:
        """Decide by the files of this rank; return answer, case, slots and file, and the post."""
        files = self.files
        post = Post(files.checksum, reloads=self.settings.reload is not None)
        try:
            case, stored = Case.from_arguments(*arguments), None
            if pending is not None and self._serves(pending, case, model, form):
                post = replace(post, pending=pending.checksum)
            if files.error:
                return None, replace(post, error=files.error, unread=True)
            sizes = len(case.slots), case.experts, model
            self._cases[sizes] = replace(case, windows=case.load[None])
            if files.lack_draft(case, model):
                return None, replace(post, error=NO_DRAFT)
            if files.placements:
                stored, slots = files.slots(case, model)
                if text := stored.warning(model):
                    self.log.warn(text, self._rank)
            else:
                slots = case.rebalance(self.settings.rules, files.profile).slots
            full = case.make_map(slots)
            answer = form(full)
        except Exception as error:
            return None, replace(post, error=quote_error(error))
        slots = full.astype(np.int32).reshape(case.slots.shape)
        return (answer, case, slots, stored), replace(post, map=compute_checksum(slots.tobytes()))

    def _serves(
        self,
        pending: Files,
        case: Case,
        model: str | None,
        form: Callable[[NDArray[np.int64]], Any],
    ) -> bool:
        """Return whether files that were read again serve all models here; warn if they do not.

        These are the model of the case, and every other one that the files in use can serve.
        """
        rules = self.settings.rules
        if pending.lack_draft(case, model) and self.files.fault(case, model, rules):
            # A draft model that had nothing before needs nothing now.
            return False
        why = pending.fault(case, model, rules)
        if pending.placements and not why:
            try:
                form(case.make_map(pending.slots(case, model)[1]))
            except Exception as error:
                why = quote_error(error)
        for (*_, name), other in self._cases.items():
            if not why and not self.files.fault(other, name, rules):
                why = pending.fault(other, name, rules)
        if why:
            self._warn_not_taken(why)
        return not why

    def _warn_not_taken(self, why: str) -> None:
        self.log.warn(f"read again, not taken: {why}", self._rank)

    def _describe(
        self,
        key: ModelKey,
        case: Case,
        slots: Slots,
        stored: Stored | None,
        rank: int,
        ours: bool,
        took: tuple[float, float],
    ) -> None:
        """Log what a map changes, at DEBUG if it changes nothing; pass its figures to metrics."""
        layers, ranks, width = slots.shape
        changed = int((slots != case.slots).any(axis=(1, 2)).sum())
        before, after = case.balancedness(case.slots), case.balancedness(slots)
        moved = case.copies_moved(slots)
        gain = "no load yet"
        if after is not None:
            was = "" if before is None else f"{before:.3f} -> "
            gain = f"balancedness {was}{after:.3f}"
        source = "live loads" if stored is None else f"{stored.path} ({stored.checksum})"
        decided, agreed = (1e3 * seconds for seconds in took)
        self.log.say(
            f"{source}: {gain}, {changed} layers change, {moved} copies move; map "
            f"{checksum_placement(slots)} of {layers} layers x {ranks * width} slots on "
            f"{ranks} ranks, decided in {decided:.1f} ms, agreed in {agreed:.1f} ms",
            rank if changed else 1,
        )
        if changed:
            self._made = time.time()
        metrics = find_metrics(self.settings.metrics_port) if rank == 0 else None
        if metrics is not None:
            size = self._expert_bytes.get(layers)
            seen = self._traffic[key].follow(case, slots, stored, before)
            figures = Figures(
                _find_quantiles(case.imbalance(case.slots)),
                _find_quantiles(case.imbalance(slots)),
                1 - before / after if before and after else float("nan"),
                moved,
                None if size is None else size * moved,
                self._made if stored is None else stored.made,
                _find_quantiles(seen.distances),
                seen.has_drifted,
                seen.gain,
            )
            metrics.count(TAKEN, "live loads" if stored is None else "stored placement")
            metrics.time(*took)
            metrics.show(figures, ours=ours)

    def failed(self, what: str, error: BaseException) -> None:
        """Warn of an error, once per text."""
        self.log.warn(f"{what}: {quote_error(error)}")

    def record(self, weight: ArrayLike, rank: int = 0) -> None:
        """Record loads [L,E] or [W,L,E] on rank 0, if settings ask for it; never raise."""
        if self._recorder is not None and rank == 0:
            self._run_in_background("loads are not recorded", self._recorder.add, np.array(weight))

    def flush(self) -> None:
        """Wait until all windows are written, and all lines are logged."""
        if self._background is not None:
            self._background.shutdown()
            self._background = None

    def _run_in_background(
        self, failure: str, work: Callable[..., object], *arguments: Any
    ) -> None:
        """Run work that must not delay the engine in another thread; warn if it fails."""

        def run() -> None:
            try:
                work(*arguments)
            except Exception as error:
                self.failed(failure, error)

        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="moetuner")
        self._background.submit(run)

    def _watch(self) -> None:
        while True:
            self.look_again()
            time.sleep(LOOK_SECONDS)

    def look_again(self) -> None:
        """Read the files again if that of MOETUNER_RELOAD changed, for the next decision."""
        with READING:
            seen = _signature(self.settings.reload)
            if seen == self._seen:
                return
            self._seen = seen
            files = Files.read(self.settings)
            if files.error:
                self._warn_not_taken(files.error)
            self._pending = files


def _find_quantiles(values: NDArray[np.float64]) -> dict[float, float]:
    """Return quantiles of values; none of no values."""
    if not values.size:
        return {}
    return dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True))


def _signature(path: Path | None) -> tuple[int, ...] | None:
    """Return time, size and inode of a file, which change when it does; None if it is missing."""
    if path is not None:
        with suppress(OSError):
            status = path.stat()
            return (status.st_mtime_ns, status.st_size, status.st_ino)
    return None
