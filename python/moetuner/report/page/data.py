"""The data of a page: the results that it shows, and their tiles on the first screen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from moetuner.charts import Chart
from moetuner.cost import compute_move_us
from moetuner.evaluation import Evaluation
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.losses import Losses
from moetuner.evaluation.replay import Setting
from moetuner.files.cells import (
    counted,
    digits,
    duration,
    in_bytes,
    percent,
)
from moetuner.placement import Placement, PlacementDiff
from moetuner.report.advice.values import Advice
from moetuner.report.findings import TERMINAL
from moetuner.report.hot_experts import HotExperts
from moetuner.report.page.words import write_settings
from moetuner.serving.phases import name_phase
from moetuner.serving.recipes import Recipe
from moetuner.solver import Trade
from moetuner.solver.result import Result
from moetuner.topology import Topology


class Tile(NamedTuple):
    """A number of the first screen: its label, value, a note, and rows of other placements."""

    label: str
    value: str
    note: str = ""
    rows: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Table:
    """A table of numbers; ``total_rows`` is the number of all rows, where only some are shown."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    total_rows: int | None = None


@dataclass(frozen=True)
class Panel:
    """Charts, tables and notes that answer a question of the page.

    Parameters
    ----------
    charts, tables, notes
        Charts, tables and sentences; tables without a chart stand open.
    words
        End of the sentence on how to read the charts.
    key
        Key of the question, and its anchor.
    """

    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    words: str = ""
    key: str = ""


class Origin(NamedTuple):
    """Origin of the numbers of a page: a line on the input, its files, and the command.

    ``notes`` are sentences on assumptions about the input.
    """

    description: str
    files: Sequence[Path]
    command: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageData:
    """The results that a page shows, and the sentences around them.

    Parameters
    ----------
    sentence, todo
        The verdict, in a sentence that stands alone; and what to do next.
    answer
        Colour of the verdict: ``"good"``, ``"bad"`` or ``"unsure"``.
    gains, others
        Tiles of the first screen: gains in windows of each size, and tiles that only some pages
        have.
    names
        Names of the running and the proposed placement.
    traffic, load
        A sentence on the traffic that placements were judged on, and its load by expert [L,E].
    contents
        The JSON that the page carries, with its settings.
    token_bytes, expert_bytes
        Bytes of a row and of an expert; None where unknown.
    result, advice, trades
        Results that have panels of their own, where there are any.
    unit
        Unit of the objective of the result and of its bound.
    timed
        True if the search had a time limit, so that its answer depends on the clock anyway.
    """

    title: str
    sentence: str
    answer: str
    todo: str
    gains: tuple[Tile, ...]
    names: tuple[str, str]
    judgement: Judgement
    traffic: str
    origin: Origin
    contents: dict[str, Any]
    load: NDArray[Any]
    recipes: tuple[Recipe, ...] = ()
    others: tuple[Tile, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    token_bytes: float | None = None
    expert_bytes: float | None = None
    hot_experts: HotExperts | None = None
    result: Result | None = None
    unit: str = ""
    advice: Advice | None = None
    trades: tuple[Trade, ...] = ()
    timed: bool = False

    @property
    def evaluations(self) -> tuple[Evaluation, Evaluation]:
        """Evaluations of the running and the proposed placement."""
        return self.judgement.before, self.judgement.after

    @property
    def settings(self) -> list[Setting]:
        """Settings of the replays of both placements."""
        replays = (evaluation.replayed for evaluation in self.evaluations)
        return [replay.setting for replay in replays if replay is not None]

    @property
    def placements(self) -> list[Placement]:
        """The running and the proposed placement."""
        return [setting.placement for setting in self.settings]

    @property
    def topology(self) -> Topology:
        """The machine."""
        return self.settings[0].topology

    @property
    def subtitle(self) -> str:
        """Description of the input and the machine."""
        topology = self.topology
        machine = counted(topology.devices, "device")
        if topology.nodes > 1:
            machine += f" in {topology.nodes} nodes"
        if topology.name:
            machine += f" ({topology.name})"
        return f"{self.origin.description}; {machine}"

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles of the first screen."""
        losses = self.evaluations[1].losses
        return (
            *self.gains,
            self._show_busiest(),
            self._show_memory(),
            self._show_moving(),
            *(self._show_losses(domain, losses[domain]) for domain in losses),
            *self.others,
            self._show_traffic(),
        )

    def _show_busiest(self) -> Tile:
        """Show the load of the busiest device under both placements."""
        ratios = [evaluation.imbalance for evaluation in self.evaluations]
        if self.advice is not None:
            imbalance = self.advice.main.whole["imbalance"]
            ratios = [imbalance.before, imbalance.after]
        before, after = (FIGURES["imbalance"].text(ratio) for ratio in ratios)
        return Tile("Busiest device", f"{after} x the mean", f"{before} x with {self.names[0]}")

    def _show_traffic(self) -> Tile:
        """Show how many tokens, or windows, the placements were judged on."""
        tokens = self.evaluations[0].tokens
        if tokens is None:
            windows = len(self.evaluations[0].imbalance_per_window)
            return Tile("Judged on", counted(windows, "window"), self.traffic)
        return Tile("Judged on", counted(tokens, "token"), self.traffic)

    def _show_losses(self, domain: str, losses: Losses) -> Tile:
        """Show the share of losses of a device, or a node, that lose an expert."""
        before = self.evaluations[0].losses.get(domain)
        fatal_before = 1.0 if before is None else before.fatal
        note = f"lose an expert of some layer; {percent(fatal_before)} do with {self.names[0]}"
        if losses.imbalance_after is not None:
            note += f"; after a loss the busiest has {digits(losses.imbalance_after)} x the mean"
        return Tile(f"Fatal losses of a {domain}", percent(losses.fatal), note)

    def _show_memory(self) -> Tile:
        """Show the memory that experts take on the fullest device."""
        before, after = (
            int((placement.slots >= 0).sum(axis=(0, 2)).max()) for placement in self.placements
        )
        size = self.expert_bytes
        text_before, text_after = (
            f"{experts:,} experts" if size is None else in_bytes(experts * size)
            for experts in (before, after)
        )
        note = f"{'as much as' if before == after else text_before} with {self.names[0]}"
        return Tile("Expert memory per device", text_after, note)

    def _show_moving(self) -> Tile:
        """Show how many experts move, how long that takes, and when it is paid back."""
        moved, copies = self.moves.experts_moved, int((self.placements[1].slots >= 0).sum())
        size, model, advice = self.expert_bytes, self.settings[1].serving.cost_model, self.advice
        share = f"{moved:,} of {copies:,} experts"
        if size is None:
            return Tile("To move", share, f"pass {TERMINAL.expert_size} to see bytes")
        notes = [share]
        if moved and model is not None:
            us = compute_move_us(model, self.moves.pairs, self.topology, size)
            notes.append(f"{duration(us)} at the bandwidth of the links")
        if moved and advice is not None:
            steps = advice.moving.steps
            notes.append(
                "does not pay" if steps is None else f"paid back in {counted(int(steps), 'step')}"
            )
        return Tile(
            "To move", f"{in_bytes(moved * size)} of {in_bytes(copies * size)}", "; ".join(notes)
        )

    @cached_property
    def moves(self) -> PlacementDiff:
        """Experts that move from device to device."""
        before, after = self.placements
        return before.diff(after, topology=self.topology, expert_bytes=self.expert_bytes)

    @property
    def windows(self) -> str:
        """Size of the windows of the evaluations."""
        return write_windows(self.settings[0].window, self.evaluations[0])

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Labels and values: the command, the checksum of files, and settings."""
        return (
            ("Command", self.origin.command),
            ("SHA-256 of INPUT", _compute_checksum(self.origin.files)),
            *write_settings(self.contents.get("settings", {})),
        )


def _compute_checksum(paths: Sequence[Path]) -> str:
    """Compute the SHA-256 of files, one after the other; "not a file" if any of them is none."""
    if not paths or not all(path.is_file() for path in paths):
        return "not a file"
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def write_windows(window: int | None, evaluation: Evaluation) -> str:
    """Write the size of the windows that are balanced, and the phase that has them."""
    if window is None:
        is_trace = evaluation.tokens is not None
        return "all tokens as one window" if is_trace else "windows as recorded"
    phase = name_phase(window)
    return f"windows of {window:,} tokens" + (f" ({phase})" if phase else "")
