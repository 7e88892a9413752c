"""PageData: what a page shows, made from results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import Evaluation
from moetuner.evaluation.auditing import Audit, audit
from moetuner.evaluation.comparison import Comparison, compare, verdict
from moetuner.evaluation.figures import FIGURES
from moetuner.placement import Placement, PlacementDiff
from moetuner.report.advice.values import Advice
from moetuner.report.cells import counted, in_bytes, percent
from moetuner.report.outcome import Outcome
from moetuner.solver import Trade
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

Traffic = RoutingTrace | RoutingStatistics
Number = tuple[str, str, str]

# How much of a file is read at once.
CHUNK = 1 << 20
# Colour and words of a verdict.
GAINED = {
    "worth it": ("good", "The change is worth it"),
    "certain but small": ("unsure", "The gain is certain but small"),
    "worse": ("bad", "The change makes it worse"),
    "no evidence": ("unsure", "There is no evidence of a gain"),
    "too few": ("unsure", "There is too little traffic to say"),
}


@dataclass(frozen=True)
class Origin:
    """Where the numbers of a page come from.

    Parameters
    ----------
    description, files
        The input in a line, and its files.
    command
        What was called.
    window, threads
        Tokens of a window of a trace that is counted or replayed once more, and threads to use.
    """

    description: str
    files: Sequence[Path]
    command: str
    window: int | None = None
    threads: int | None = None

    def facts(self, settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        """Return names and values: the command, the checksum of files, and settings."""
        shown = {
            name.replace("_", " "): str(value)
            for name, value in settings.items()
            if value is not None and not isinstance(value, dict | list)
        }
        return (
            ("Command", self.command),
            ("SHA-256 of INPUT", _checksum(self.files)),
            *shown.items(),
        )

    def subtitle(self, topology: Topology) -> str:
        """Write what the input and the machine are."""
        machine = counted(topology.devices, "device")
        if topology.nodes > 1:
            machine += f" in {topology.nodes} nodes"
        if topology.name:
            machine += f" ({topology.name})"
        return f"{self.description}; {machine}"

    def load(self, traffic: Traffic) -> NDArray[np.float64]:
        """Count tokens of every expert [L,E]."""
        if isinstance(traffic, RoutingTrace):
            traffic = RoutingStatistics.from_trace(
                traffic, transitions=False, coactivation=False, threads=self.threads
            )
        return traffic.total_load.astype(np.float64)


@dataclass(frozen=True)
class PageData:
    """Results that a page is made of, and words around them.

    Parameters
    ----------
    title, subtitle
        What the page is about, and of what traffic and machine.
    sentence, reasons, warnings
        The verdict, which stands alone; what it rests on; what to know first.
    answer
        Which colour the verdict has: ``"good"``, ``"bad"`` or ``"unsure"``.
    numbers
        Three numbers of the first screen: name, value and a note.
    names, placements, evaluations
        Of the running and the proposed placement, on the same traffic.
    topology
        The machine.
    traffic
        A sentence on what traffic the evaluations are of.
    load
        Tokens of every expert in that traffic [L,E]; None where not counted.
    token_bytes, expert_bytes
        Bytes of a row and of an expert; None where not known.
    result, audit, advice, trades, moves
        What else there is to show.
    timed
        Whether the search had a time limit, so that its answer depends on the clock anyway.
    commands
        What comes next.
    facts
        Where it comes from: name and value.
    contents
        The JSON that the page carries.
    """

    title: str
    subtitle: str
    sentence: str
    answer: str
    names: tuple[str, str]
    placements: tuple[Placement, Placement]
    evaluations: tuple[Evaluation, Evaluation]
    topology: Topology
    traffic: str
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    numbers: tuple[Number, ...] = ()
    load: NDArray[Any] | None = None
    token_bytes: float | None = None
    expert_bytes: float | None = None
    result: Result | None = None
    audit: Audit | None = None
    advice: Advice | None = None
    trades: tuple[Trade, ...] = ()
    moves: PlacementDiff | None = None
    timed: bool = False
    commands: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    contents: dict[str, Any] = field(default_factory=dict)


def of_advice(advice: Advice, origin: Origin, contents: dict[str, Any]) -> PageData:
    """Make the data of an advice, with its JSON and the commands in it."""
    judged = advice.main
    topology, size = advice.problem.topology, advice.settings["expert_bytes"]
    running = advice.settings["initial"].replace("_", " ")
    moving, paid = advice.moving, "bytes of an expert not known"
    if moving.seconds is not None:
        paid = "does not pay" if moving.steps is None else f"paid back in {moving.steps:,.0f} steps"
    moves = advice.placements[0].diff(advice.placements[1], topology=topology, expert_bytes=size)
    model, window = advice.problem.cost_model, judged.window
    where = "unseen windows" if window is None else f"windows of {window:,} tokens"
    return PageData(
        title=f"moetuner: {advice.answer}",
        subtitle=origin.subtitle(topology),
        sentence=advice.sentence,
        answer={"worth a trial": "good", "not now": "bad"}.get(advice.answer, "unsure"),
        names=("running" if running == "given" else running, "proposed"),
        placements=advice.placements,
        evaluations=(advice.running, advice.proposed),
        topology=topology,
        traffic=f"Unseen traffic of the first split, in {where}.",
        reasons=advice.reasons[1:],
        warnings=advice.warnings,
        numbers=(
            _number(
                judged.gain, note=judged.gain.sure and f"{judged.gain.much} ({judged.gain.sure})"
            ),
            _busiest(judged.before["imbalance"], judged.after["imbalance"]),
            _to_move(moves, paid),
        ),
        load=advice.problem.load.astype(np.float64),
        token_bytes=None if model is None else model.token_bytes,
        expert_bytes=size,
        result=advice.result,
        audit=advice.audit,
        advice=advice,
        moves=moves,
        commands=tuple(contents["commands"]),
        facts=origin.facts(contents["settings"]),
        contents=contents,
    )


def of_outcomes(
    before: Outcome,
    after: Outcome,
    judged_on: Traffic,
    origin: Origin,
    contents: dict[str, Any],
    **others: Any,
) -> PageData:
    """Make the data of two outcomes of one problem, judged on the same traffic.

    ``others`` are as for ``of_placements``.
    """
    problem, worth = after.problem, after.worth
    audited = None
    if judged_on.group is not None:
        audited = audit(
            after.result.placement,
            judged_on,
            problem.topology,
            baseline=before.result.placement,
            window=origin.window or 1,
            cost_model=worth.cost_model,
            regime=problem.regime,
            split=problem.split,
            threads=origin.threads,
        )
    timed = contents["settings"]["time_limit"] is not None
    numbers: tuple[Number, ...] = ()
    if worth.is_known:
        gap, note = "-", "no bound was proven"
        if after.gap is not None:
            gap, note = percent(after.gap), f"of the bound, by {after.result.bound_source}"
        elif after.result.bound_is_of_loads:
            note = "the bound is of loads alone"
        numbers = (("The optimum is within", gap, note),)
    return of_placements(
        (before.result.method, after.result.method),
        (before.result.placement, after.result.placement),
        (before.evaluation, after.evaluation),
        judged_on,
        problem.topology,
        origin,
        # All but the seconds that solves took is the same in every run.
        contents if timed else _timeless(contents),
        measure=worth.figure,
        numbers=numbers,
        result=after.result,
        timed=timed,
        token_bytes=None if problem.cost_model is None else problem.cost_model.token_bytes,
        audit=audited,
        **others,
    )


def of_placements(
    names: tuple[str, str],
    placements: tuple[Placement, Placement],
    evaluations: tuple[Evaluation, Evaluation],
    judged_on: Traffic,
    topology: Topology,
    origin: Origin,
    contents: dict[str, Any],
    *,
    traffic: str,
    measure: str | None = None,
    numbers: tuple[Number, ...] = (),
    expert_bytes: float | None = None,
    **others: Any,
) -> PageData:
    """Make the data of two placements on the same traffic, judged by a figure of evaluations.

    ``others`` are fields of the data.
    """
    judged = replace(_judged(evaluations, measure), names=names)
    answer, words = GAINED[judged.answer]
    sentence = f"{words}: {judged.sentence}"
    moves = placements[0].diff(placements[1], topology=topology, expert_bytes=expert_bytes)
    busiest = [each.imbalance for each in evaluations]
    if not moves.experts_moved and busiest[0] == busiest[1]:
        sentence = f"There is nothing to gain: {names[0]} and {names[1]} place all experts alike."
    warnings: tuple[str, ...] = (traffic,)
    if judged.measure == "predicted_layer_us":
        warnings += ("Times are predicted by a cost model, not measured.",)
    return PageData(
        title=f"moetuner: {names[1]} against {names[0]}",
        subtitle=origin.subtitle(topology),
        sentence=sentence,
        answer=answer,
        names=names,
        placements=placements,
        evaluations=evaluations,
        topology=topology,
        traffic=traffic,
        warnings=warnings,
        numbers=(
            _number(judged, f"of {judged.units} sequences or windows"),
            _busiest(*busiest),
            *numbers,
            _to_move(moves, f"from {names[0]} to {names[1]}"),
        ),
        load=origin.load(judged_on),
        expert_bytes=expert_bytes,
        moves=moves,
        facts=origin.facts(contents.get("settings", {})),
        contents={**contents, "verdict": judged.answer},
        **others,
    )


def _judged(evaluations: tuple[Evaluation, Evaluation], measure: str | None) -> Comparison:
    """Judge by what was made small; by time or imbalance where that has no interval."""
    if measure is None or FIGURES[measure].per not in ("token", "pair"):
        return verdict(*evaluations)
    if None in [getattr(each, measure) for each in evaluations]:
        return verdict(*evaluations)
    return replace(compare([evaluations], [measure])[measure], splits=())


def _number(judged: Comparison, note: str) -> Number:
    figure = FIGURES[judged.measure]
    change = f"{judged.before:.4g} → {figure.with_unit(judged.after)}"
    return (figure.label.capitalize(), change, note or "too few to say how sure")


def _busiest(before: float, after: float) -> Number:
    return (FIGURES["imbalance"].title, f"{before:.2f} → {after:.2f} x", "of the mean load")


def _to_move(moves: PlacementDiff, note: str) -> Number:
    size = moves.bytes_moved
    return (
        "To move",
        counted(moves.experts_moved, "expert") if size is None else in_bytes(size),
        note,
    )


def _timeless(contents: dict[str, Any]) -> dict[str, Any]:
    """Return contents without the seconds that solves took."""
    rest = {key: each for key, each in contents.items() if key != "solve_seconds"}
    if "methods" in rest:
        rest["methods"] = {name: _timeless(each) for name, each in rest["methods"].items()}
    return rest


def _checksum(paths: Sequence[Path]) -> str:
    """Compute the checksum of files, one after the other."""
    if not all(path.is_file() for path in paths):
        return "not a file"
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
