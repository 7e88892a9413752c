"""Making a page of what a subcommand found."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.cli.options import figures_folder
from moetuner.cli.options.moves import in_bytes
from moetuner.cli.options.traffic import Source, Traffic, count
from moetuner.cli.output import Output, working
from moetuner.evaluation import Evaluation
from moetuner.evaluation.auditing import audit
from moetuner.evaluation.verdicts import PRICE, Verdict, gain, verdict
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.report.advice.values import Advice
from moetuner.report.cells import counted, percent
from moetuner.report.outcome import Outcome
from moetuner.report.page import write_page
from moetuner.report.page.figures import write_figures
from moetuner.report.page.shown import Shown
from moetuner.solver import Trade
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

# How much of a file is read at once.
CHUNK = 1 << 20
GAINED = {
    "worth it": ("good", "The change is worth it"),
    "certain but small": ("unsure", "The gain is certain but small"),
    "worse": ("bad", "The change makes it worse"),
    "no evidence": ("unsure", "There is no evidence of a gain"),
    "too few": ("unsure", "There is too little traffic to say"),
}


def write_advice(
    path: Path | None, source: Source, advice: Advice, contents: dict[str, Any], output: Output
) -> None:
    """Write the page of an advice."""
    judged = max(advice.judged, key=lambda each: each.gain.mean)
    gain = judged.gain
    low, high = gain.interval or (None, None)
    ends = "too few to say how sure"
    if low is not None and high is not None:
        ends = f"gain {percent(gain.mean)} (95 %: {100 * low:.1f} to {100 * high:.1f} %)"
    moving = advice.moving
    size = counted(moving.experts, "expert") if moving.bytes is None else in_bytes(moving.bytes)
    paid = "bytes of an expert not known"
    if moving.seconds is not None:
        paid = "does not pay" if moving.steps is None else f"paid back in {moving.steps:,.0f} steps"
    busiest = (judged.before["imbalance"], judged.after["imbalance"])
    first, second = judged.verdict.before, judged.verdict.after
    running = advice.settings["initial"].replace("_", " ")
    names = ("running" if running == "given" else running, "proposed")
    where = "unseen windows"
    if judged.window is not None:
        where = f"windows of {judged.window:,} tokens"
    shown = Shown(
        title=f"moetuner: {advice.answer}",
        subtitle=_subtitle(source, advice.problem.topology),
        sentence=advice.sentence,
        answer={"worth a trial": "good", "not now": "bad"}.get(advice.answer, "unsure"),
        names=names,
        placements=advice.placements,
        running=advice.running,
        proposed=advice.proposed,
        topology=advice.problem.topology,
        traffic=f"Unseen traffic of the first split, in {where}.",
        reasons=advice.reasons[1:],
        warnings=advice.warnings,
        numbers=(
            ("Predicted layer time, unseen traffic", f"{first:.1f} → {second:.1f} us", ends),
            ("Busiest device", f"{busiest[0]:.2f} → {busiest[1]:.2f} x", "of the mean load"),
            ("To move", size, paid),
        ),
        load=advice.problem.load.astype(np.float64),
        token_bytes=_token_bytes(advice.problem),
        expert_bytes=advice.settings["expert_bytes"],
        result=advice.result,
        audit=advice.audit,
        advice=advice,
        moves=advice.placements[0].diff(
            advice.placements[1],
            topology=advice.problem.topology,
            expert_bytes=advice.settings["expert_bytes"],
        ),
        commands=tuple(contents["commands"]),
        facts=_facts(source, contents["settings"]),
        contents=contents,
    )
    _write(path, shown, output)


def write_comparison(
    path: Path | None,
    source: Source,
    before: Outcome,
    after: Outcome,
    contents: dict[str, Any],
    output: Output,
    *,
    traffic: str,
    judged_on: Traffic,
    commands: tuple[str, ...] = (),
    trades: tuple[Trade, ...] = (),
    expert_bytes: float | None = None,
) -> None:
    """Write the page of two outcomes of one problem."""
    problem = after.problem
    audited = None
    if judged_on.group is not None:
        with working("comparing groups"):
            audited = audit(
                after.result.placement,
                judged_on,
                problem.topology,
                baseline=before.result.placement,
                window=source.replayed or 1,
                cost_model=after.worth.cost_model,
                regime=problem.regime,
                split=problem.split,
                threads=source.threads,
            )
    timed = contents["settings"]["time_limit"] is not None
    if not timed:
        # All else is the same in every run.
        contents = _timeless(contents)
    numbers: tuple[tuple[str, str, str], ...] = ()
    if after.worth.is_known:
        gap, note = "-", "no bound was proven"
        if after.gap is not None:
            gap, note = percent(after.gap), f"of the bound, by {after.result.bound_source}"
        elif after.result.bound_is_of_loads:
            note = "the bound is of loads alone"
        numbers = (("The optimum is within", gap, note),)
    write_pair(
        path,
        source,
        problem.topology,
        names=(before.result.method, after.result.method),
        placements=(before.result.placement, after.result.placement),
        evaluations=(before.evaluation, after.evaluation),
        contents=contents,
        output=output,
        traffic=traffic,
        load=load_of(source, judged_on),
        result=after.result,
        timed=timed,
        numbers=numbers,
        measure=after.worth.figure,
        token_bytes=_token_bytes(problem),
        commands=commands,
        audit=audited,
        trades=trades,
        expert_bytes=expert_bytes,
    )


def write_pair(
    path: Path | None,
    source: Source,
    topology: Topology,
    *,
    names: tuple[str, str],
    placements: tuple[Placement, Placement],
    evaluations: tuple[Evaluation, Evaluation],
    contents: dict[str, Any],
    output: Output,
    traffic: str,
    measure: str | None = None,
    numbers: tuple[tuple[str, str, str], ...] = (),
    expert_bytes: float | None = None,
    **others: Any,
) -> None:
    """Write the page of two placements on the same traffic, judged by a figure of evaluations."""
    with working("judging"):
        judged = _verdict(*evaluations, measure)
    answer, words = GAINED[judged.answer]
    sentence = f"{words}: {_judged(judged, names)}"
    moves = placements[0].diff(placements[1], topology=topology, expert_bytes=expert_bytes)
    if not moves.experts_moved and evaluations[0].imbalance == evaluations[1].imbalance:
        sentence = f"There is nothing to gain: {names[0]} and {names[1]} place all experts alike."
    moved = counted(moves.experts_moved, "expert")
    if moves.bytes_moved is not None:
        moved = in_bytes(moves.bytes_moved)
    busiest = [each.imbalance for each in evaluations]
    shown = Shown(
        title=f"moetuner: {names[1]} against {names[0]}",
        subtitle=_subtitle(source, topology),
        sentence=sentence,
        answer=answer,
        names=names,
        placements=placements,
        running=evaluations[0],
        proposed=evaluations[1],
        topology=topology,
        traffic=traffic,
        warnings=(traffic, "Times are predicted by a cost model, not measured.")
        if judged.measure == "predicted_layer_us"
        else (traffic,),
        numbers=(
            _measured(judged),
            ("Busiest device", f"{busiest[0]:.2f} → {busiest[1]:.2f} x", "of the mean load"),
            *numbers,
            ("To move", moved, f"from {names[0]} to {names[1]}"),
        ),
        expert_bytes=expert_bytes,
        moves=moves,
        facts=_facts(source, contents.get("settings", {})),
        contents={**contents, "verdict": judged.answer},
        **others,
    )
    _write(path, shown, output)


def load_of(source: Source, traffic: Traffic) -> NDArray[Any]:
    """Count tokens of every expert [L,E]."""
    counted = traffic
    if not isinstance(traffic, RoutingStatistics):
        counted = count(traffic, source.counted, source.threads)
    assert isinstance(counted, RoutingStatistics)
    return counted.total_load.astype(np.float64)


def _verdict(before: Evaluation, after: Evaluation, measure: str | None) -> Verdict:
    """Judge by what was made small; by time or imbalance where that has no interval."""
    if measure in (None, "predicted_layer_us", "imbalance", "imbalance_mixed"):
        return verdict(before, after)
    old, new = getattr(before, measure), getattr(after, measure)
    if old is None or new is None:
        return verdict(before, after)
    found = gain(before, after, measure)
    _, low, high = found.interval
    return Verdict(measure, old, new, found.value, low, high, found.units, PRICE)


def _judged(judged: Verdict, names: tuple[str, str]) -> str:
    word = "less" if judged.gain >= 0 else "more"
    measure = {"predicted_layer_us": "predicted time of a layer"}.get(
        judged.measure, judged.measure
    )
    text = f"{names[1]} has {100 * abs(judged.gain):.1f} % {word} {measure} than {names[0]}"
    if judged.low is not None and judged.high is not None:
        text += f" (gain, 95 %: {100 * judged.low:.1f} to {100 * judged.high:.1f} %)"
    return f"{text}."


def _measured(judged: Verdict) -> tuple[str, str, str]:
    unit = " us" if judged.measure == "predicted_layer_us" else ""
    name = "Predicted layer time" if unit else judged.measure.capitalize()
    note = f"of {judged.units} sequences or windows"
    if judged.measure != "imbalance":
        name = name.replace("_", " ")
    return (name, f"{judged.before:.4g} → {judged.after:.4g}{unit}", note)


def _timeless(contents: dict[str, Any]) -> dict[str, Any]:
    """Return contents without the seconds that solves took."""
    found = {key: each for key, each in contents.items() if key != "solve_seconds"}
    if "methods" in found:
        found["methods"] = {name: _timeless(each) for name, each in found["methods"].items()}
    return found


def _token_bytes(problem: Problem) -> float | None:
    return None if problem.cost_model is None else problem.cost_model.token_bytes


def _subtitle(source: Source, topology: Topology) -> str:
    machine = counted(topology.devices, "device")
    if topology.nodes > 1:
        machine += f" in {topology.nodes} nodes"
    if topology.name:
        machine += f" ({topology.name})"
    return f"{source.describe()}; {machine}"


def _facts(source: Source, settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return where numbers come from: the command, sums of files, and settings."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if words[0] in ("__main__.py", "-c"):
        words[0] = "moetuner"
    facts = [("Command", shlex.join(words)), ("SHA-256 of INPUT", _sum(source.input_files))]
    facts += [
        (name.replace("_", " "), str(value))
        for name, value in settings.items()
        if value is not None and not isinstance(value, dict | list)
    ]
    return tuple(facts)


def _sum(paths: Sequence[Path]) -> str:
    """Compute the checksum of files, one after the other."""
    if not all(path.is_file() for path in paths):
        return "not a file"
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    return found.hexdigest()


def _write(path: Path | None, shown: Shown, output: Output) -> None:
    if path is not None:
        with working("writing the report"):
            write_page(path, shown)
        output.say(f"wrote {path}")
    folder = figures_folder()
    if folder is not None:
        with working("drawing figures"):
            number = write_figures(folder, shown)
        output.say(f"wrote {number} figures into {folder}/")
