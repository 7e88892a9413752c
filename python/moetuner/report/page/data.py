"""PageData: what a page shows, made from results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import Evaluation
from moetuner.evaluation.auditing import Audit, audit_of
from moetuner.evaluation.comparison import Comparison, compare, verdict
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.units import loads_of
from moetuner.placement import Placement, PlacementDiff
from moetuner.report.advice.values import Advice
from moetuner.report.cells import counted, in_bytes, percent
from moetuner.report.outcome import Outcome
from moetuner.solver import Trade
from moetuner.solver.result import Result
from moetuner.topology import Topology

Number = tuple[str, str, str]

# Colour and words of a verdict.
GAINED = {
    "worth it": ("good", "The change is worth it"),
    "certain but small": ("unsure", "The gain is certain but small"),
    "worse": ("bad", "The change makes it worse"),
    "no evidence": ("unsure", "There is no evidence of a gain"),
    "too few": ("unsure", "There is too little traffic to say"),
}


class Origin(NamedTuple):
    """Where the numbers of a page come from: the input in a line, its files, and the command."""

    description: str
    files: Sequence[Path]
    command: str


@dataclass(frozen=True)
class PageData:
    """Results that a page is made of, and words around them.

    Parameters
    ----------
    title
        What the page is about.
    sentence, reasons, warnings
        The verdict, which stands alone; what it rests on; what to know first.
    answer
        Which colour the verdict has: ``"good"``, ``"bad"`` or ``"unsure"``.
    judged, note, others
        What the numbers of the first screen are made of: the figure that the verdict is on, a note
        on how sure it is, and others.
    paid
        A note on what has to move.
    names, evaluations
        Of the running and the proposed placement, on the same traffic.
    traffic
        A sentence on what traffic the evaluations are of.
    origin, contents
        Where it comes from, and the JSON that the page carries, with its settings.
    load
        Tokens of every expert in that traffic [L,E].
    token_bytes, expert_bytes
        Bytes of a row and of an expert; None where not known.
    result, audit, advice, trades
        What else there is to show.
    timed
        Whether the search had a time limit, so that its answer depends on the clock anyway.
    """

    title: str
    sentence: str
    answer: str
    judged: Comparison
    note: str
    paid: str
    names: tuple[str, str]
    evaluations: tuple[Evaluation, Evaluation]
    traffic: str
    origin: Origin
    contents: dict[str, Any]
    load: NDArray[Any]
    others: tuple[Number, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    token_bytes: float | None = None
    expert_bytes: float | None = None
    result: Result | None = None
    audit: Audit | None = None
    advice: Advice | None = None
    trades: tuple[Trade, ...] = ()
    timed: bool = False

    @property
    def settings(self) -> list[Setting]:
        """How the placements were replayed."""
        return [each.replayed.setting for each in self.evaluations if each.replayed is not None]

    @property
    def placements(self) -> list[Placement]:
        """The running and the proposed placement."""
        return [each.placement for each in self.settings]

    @property
    def topology(self) -> Topology:
        """The machine."""
        return self.settings[0].topology

    @property
    def subtitle(self) -> str:
        """What the input and the machine are."""
        topology = self.topology
        machine = counted(topology.devices, "device")
        if topology.nodes > 1:
            machine += f" in {topology.nodes} nodes"
        if topology.name:
            machine += f" ({topology.name})"
        return f"{self.origin.description}; {machine}"

    @property
    def numbers(self) -> tuple[Number, ...]:
        """Numbers of the first screen: name, value and a note."""
        judged, figure = self.judged, FIGURES[self.judged.measure]
        change = f"{judged.before:.4g} → {figure.with_unit(judged.after)}"
        before, after = (each.imbalance for each in self.evaluations)
        if self.advice is not None:
            both = self.advice.main.figures["imbalance"]
            before, after = both.before, both.after
        busiest = f"{before:.2f} → {after:.2f} x"
        size = self.moves.bytes_moved
        moved = counted(self.moves.experts_moved, "expert") if size is None else in_bytes(size)
        return (
            (figure.label.capitalize(), change, self.note or "too few to say how sure"),
            (FIGURES["imbalance"].title, busiest, "of the mean load"),
            *self.others,
            ("To move", moved, self.paid),
        )

    @cached_property
    def moves(self) -> PlacementDiff:
        """What goes from device to device."""
        before, after = self.placements
        return before.diff(after, topology=self.topology, expert_bytes=self.expert_bytes)

    @property
    def commands(self) -> tuple[str, ...]:
        """What comes next."""
        return tuple(self.contents.get("commands", ()))

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Names and values: the command, the checksum of files, and settings."""
        digest, settings = hashlib.sha256(), self.contents.get("settings", {})
        are_files = all(path.is_file() for path in self.origin.files)
        for path in self.origin.files if are_files else ():
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return (
            ("Command", self.origin.command),
            ("SHA-256 of INPUT", digest.hexdigest() if are_files else "not a file"),
            *(
                (name.replace("_", " "), str(value))
                for name, value in settings.items()
                if value is not None and not isinstance(value, dict | list)
            ),
        )


def of_advice(advice: Advice, origin: Origin, contents: dict[str, Any]) -> PageData:
    """Make the data of an advice, with its JSON and the commands in it."""
    main, moving, model = advice.main, advice.moving, advice.problem.cost_model
    running = advice.settings["initial"].replace("_", " ")
    paid = "bytes of an expert not known"
    if moving.seconds is not None:
        paid = "does not pay" if moving.steps is None else f"paid back in {moving.steps:,.0f} steps"
    where = "unseen windows" if main.window is None else f"windows of {main.window:,} tokens"
    return PageData(
        title=f"moetuner: {advice.answer}",
        sentence=advice.sentence,
        answer={"worth a trial": "good", "not now": "bad"}.get(advice.answer, "unsure"),
        judged=main.gain,
        note=main.gain.sure and f"{main.gain.much} ({main.gain.sure})",
        paid=paid,
        names=("running" if running == "given" else running, "proposed"),
        evaluations=(advice.running, advice.proposed),
        traffic=f"Unseen traffic of the first split, in {where}.",
        origin=origin,
        contents=contents,
        load=advice.problem.load.astype(np.float64),
        reasons=advice.reasons[1:],
        warnings=advice.warnings,
        token_bytes=None if model is None else model.token_bytes,
        expert_bytes=advice.settings["expert_bytes"],
        result=advice.result,
        audit=advice.audit,
        advice=advice,
    )


def of_outcomes(
    before: Outcome, after: Outcome, origin: Origin, contents: dict[str, Any], **others: Any
) -> PageData:
    """Make the data of two outcomes of one problem, judged on the same traffic.

    ``others`` are as for ``of_evaluations``.
    """
    worth, result, model = after.worth, after.result, after.problem.cost_model
    numbers: tuple[Number, ...] = ()
    if worth.is_known:
        gap, note = "-", "no bound was proven"
        if after.gap is not None:
            gap, note = percent(after.gap), f"of the bound, by {result.bound_source}"
        elif result.bound_is_of_loads:
            note = "the bound is of loads alone"
        numbers = (("The optimum is within", gap, note),)
    timed = contents["settings"]["time_limit"] is not None
    return of_evaluations(
        (before.result.method, result.method),
        (before.evaluation, after.evaluation),
        origin,
        # All but the seconds that solves took is the same in every run.
        contents if timed else _timeless(contents),
        measure=worth.figure,
        others=numbers,
        result=result,
        timed=timed,
        token_bytes=None if model is None else model.token_bytes,
        **others,
    )


def of_evaluations(
    names: tuple[str, str],
    evaluations: tuple[Evaluation, Evaluation],
    origin: Origin,
    contents: dict[str, Any],
    *,
    traffic: str,
    measure: str | None = None,
    **others: Any,
) -> PageData:
    """Make the data of two evaluations of the same traffic, judged by a figure of them.

    ``traffic`` is a sentence on that, and ``others`` are fields of the data.
    """
    # By what was made small; by time or imbalance where that has no interval.
    if (
        measure is not None
        and FIGURES[measure].per in ("token", "pair")
        and None not in [getattr(each, measure) for each in evaluations]
    ):
        judged = replace(compare([evaluations], [measure])[measure], splits=())
    else:
        judged = verdict(*evaluations)
    judged = replace(judged, names=names)
    answer, words = GAINED[judged.answer]
    replayed = evaluations[1].replayed
    assert replayed is not None
    loads = loads_of(replayed.traffic, threads=replayed.setting.threads)
    if loads.group is not None and "audit" not in others:
        others["audit"] = audit_of(*evaluations)
    warnings: tuple[str, ...] = (traffic,)
    if judged.measure == "predicted_layer_us":
        model = replayed.setting.cost_model
        is_measured = model is not None and model.measured is not None
        unmeasured = "Times are predicted by a cost model, not measured."
        warnings += (model.origin if model is not None and is_measured else unmeasured,)
    page = PageData(
        title=f"moetuner: {names[1]} against {names[0]}",
        sentence=f"{words}: {judged.sentence}",
        answer=answer,
        judged=judged,
        note=f"of {judged.units} sequences or windows",
        paid=f"from {names[0]} to {names[1]}",
        names=names,
        evaluations=evaluations,
        traffic=traffic,
        origin=origin,
        contents={**contents, "verdict": judged.answer},
        load=loads.total_load.astype(np.float64),
        warnings=warnings,
        **others,
    )
    before, after = (each.imbalance for each in evaluations)
    if page.moves.experts_moved or before != after:
        return page
    nothing = f"There is nothing to gain: {names[0]} and {names[1]} place all experts alike."
    return replace(page, sentence=nothing)


def _timeless(contents: dict[str, Any]) -> dict[str, Any]:
    """Return contents without the seconds that solves took."""
    rest = {key: each for key, each in contents.items() if key != "solve_seconds"}
    if "methods" in rest:
        rest["methods"] = {name: _timeless(each) for name, each in rest["methods"].items()}
    return rest
