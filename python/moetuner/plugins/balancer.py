"""The balancer that engines' plugins call: it proposes, agrees with all ranks, and reports."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moetuner._core import __version__
from moetuner.plugins.agreement import FindGroup, MapAgreement
from moetuner.plugins.decision import Case
from moetuner.plugins.files import Files
from moetuner.plugins.log import Background, Log
from moetuner.plugins.proposals import Form, Proposal, Proposed, Proposer
from moetuner.plugins.recorder import LoadRecorder
from moetuner.plugins.reports import Reports
from moetuner.plugins.running import ModelKey, RunningMaps
from moetuner.plugins.settings import Settings, find_idle_variables
from moetuner.plugins.verdicts import NO_DRAFT, Verdict


class Balancer:
    """Decisions and records of one engine, as the settings ask.

    A decision goes from one station to the next: a question of the engine, a proposal of this rank,
    the verdict of all ranks, and what the log and the metrics say of it. Files are read when the
    balancer is made, never while the engine waits. ``settings`` may be the error of reading them,
    which the other ranks are told; ``agreement`` is by default one with the usual patience.
    """

    def __init__(
        self, settings: Settings | str, log: Log, agreement: MapAgreement | None = None
    ) -> None:
        self.log = log
        if isinstance(settings, str):
            self.settings, files = Settings(rebalance=True), Files(error=settings)
        else:
            self.settings, files = settings, Files.read(settings)
        self._proposer = Proposer(self.settings, files, log)
        self._agreement = agreement or MapAgreement()
        self._background = Background(log)
        self._reports = Reports(log, self._background, self.settings.metrics_port)
        self._running = RunningMaps()
        folder = self.settings.record
        self._recorder = None if folder is None else LoadRecorder(folder)
        # Names of the engine's models by their number of layers.
        self._models: dict[int, set[str]] = {}
        self._is_off = False
        # True while vLLM rearranges for a map that its caller confirms.
        self.is_placing = False

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
        if balancer is not None and (error_of_files := balancer._proposer.files.error):
            log.warn(f"{error_of_files}; {engine} decides by itself", rank)
        return balancer

    @property
    def purpose(self) -> str:
        """A sentence on what the settings ask for."""
        settings, files = self.settings, self._proposer.files
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
            self._reports.expert_bytes[layers] = expert_bytes
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
        group: FindGroup = lambda: None,
        model: str | None = None,
        form: Form = lambda slots: slots,
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
        self._reports.begin(rank)
        self.confirm(old_map, num_ranks, model)
        if self._is_off and self._agreement.is_off(group):
            self._reports.stay_off()
            return None
        self._proposer.watch()
        sizes = num_replicas, num_groups, num_nodes, num_ranks
        make_case = partial(Case.from_arguments, weight, *sizes, old_map, sparse)
        propose = partial(self._proposer.propose, make_case, model, form, rank)
        proposal, verdict, took = self._agree(propose, group, wait)
        if proposal is None or verdict.do != "take":
            self._fall_back(verdict, model)
            with suppress(Exception):
                self._running.forget((model, (np.shape(weight)[-2], num_replicas)))
            return None
        self._reports.end_fall_back()
        if not quiet:
            self._expect(proposal, model, took)
        return proposal.answer

    def _agree(
        self, propose: Callable[[], Proposed], group: FindGroup, wait: float | None
    ) -> tuple[Proposal | None, Verdict, tuple[float, float]]:
        """Return this rank's proposal, the verdict on it, and the seconds of both.

        If all ranks have read their files again, they decide again by these.
        """
        while True:
            begin = time.perf_counter()
            proposal, post = propose()
            proposed = time.perf_counter()
            verdict = self._agreement.verdict(group, post, wait)
            took = proposed - begin, time.perf_counter() - proposed
            if verdict.do != "reload" or not self._proposer.take_offered():
                return proposal, verdict, took
            self.log.say(f"read its files again: {self.purpose}", self._reports.rank)

    def _fall_back(self, verdict: Verdict, model: str | None) -> None:
        """Leave this decision, or all from now on, to the engine's own map."""
        if verdict.cause == NO_DRAFT:
            text = f"{model}: the engine's own map for its layers, as {verdict.reason}"
            self.log.say(text, self._reports.rank, once=True)
            return
        self._is_off = verdict.do == "off"
        self._reports.fall_back(verdict)

    def _expect(self, proposal: Proposal, model: str | None, took: tuple[float, float]) -> None:
        """Expect that the engine runs the map that ranks took, and report it."""
        case, slots = proposal.case, proposal.slots
        key: ModelKey = model, (len(slots), slots[0].size)
        if model is not None or len(self._models.get(len(slots), ())) < 2:
            self._running.take(key, slots, case.slots)
        is_ours = not self._running.is_refused(key) or np.array_equal(slots, case.slots)
        # A copy, as an engine goes on with its arrays, and may reset them.
        proposal = replace(proposal, case=replace(case, windows=case.load[None]), answer=None)
        details = key, proposal, took, self._reports.rank, is_ours
        self._background.run("a decision is not described", self._reports.describe, *details)

    def expect(self, taken: ArrayLike, before: ArrayLike, ranks: int, model: str | None) -> None:
        """Expect that the engine runs a map [L,P] that ranks took, in place of the one before."""
        slots, ran = (np.asarray(table) for table in (taken, before))
        shape = len(slots), ranks, -1
        self._running.take((model, slots.shape), slots.reshape(shape), ran.reshape(shape))

    def expect_nothing(self) -> None:
        """Expect no map: the engine asked for some that it will not run."""
        self._running.expect_nothing()

    def confirm(self, running: ArrayLike | None, ranks: int, model: str | None) -> None:
        """Compare the engine's map [L,P] with the one that ranks took, and report it.

        Nothing is said before ranks have taken a map, nor of a map that was compared.
        """
        with suppress(Exception):
            slots = np.asarray(running)
            key = model, slots.shape
            compared = self._running.compare(key, slots.reshape(len(slots), ranks, -1))
            if compared is not None:
                self._reports.compare(compared)

    def record(self, weight: ArrayLike, rank: int = 0) -> None:
        """Record loads [L,E] or [W,L,E] on rank 0, if settings ask for it; never raise."""
        if self._recorder is not None and rank == 0:
            self._background.run("loads are not recorded", self._recorder.add, np.array(weight))

    def look_again(self) -> None:
        """Read the files again if that of MOETUNER_RELOAD changed, for the next decision."""
        self._proposer.look_again()

    def flush(self) -> None:
        """Wait until all windows are written, and all lines are logged."""
        self._background.flush()
