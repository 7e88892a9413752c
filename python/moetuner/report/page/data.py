"""Make the data of a page from an advice, an outcome or a judgement."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner import _texts
from moetuner.cost import bytes_of_expert, compute_move_us
from moetuner.evaluation import Evaluation
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.judgement import Judgement, judge
from moetuner.evaluation.losses import Losses
from moetuner.evaluation.replay import Setting
from moetuner.files.cells import (
    capitalised,
    counted,
    digits,
    duration,
    in_bytes,
    percent,
    sentence,
    unit_of_time,
)
from moetuner.formats.recipes import find_way_back, list_serving_recipes
from moetuner.placement import Placement, PlacementDiff
from moetuner.report.advice.values import Advice
from moetuner.report.findings import PYTHON, TERMINAL, Finding, Voice
from moetuner.report.hot_experts import HotExperts, hold_out_hot_experts
from moetuner.report.loads import count_part_loads
from moetuner.report.outcome import Outcome, find_times
from moetuner.report.page.words import write_settings
from moetuner.report.words import say
from moetuner.serving import ENGINE_SETTINGS
from moetuner.serving.phases import name_phase
from moetuner.serving.recipes import Recipe
from moetuner.solver import Trade
from moetuner.solver.result import Result
from moetuner.topology import Topology

TRY = "Try it: serve the same traffic with both placements, and compare the times you measure."
KEEP = "Keep what runs. Ask again when the traffic, the engine or the machine has changed."
RECORD = "Record more traffic before you change anything, then ask again."
# Colour, words and next step of a verdict.
GAINED = {
    "worth it": ("good", "The change is worth it", TRY),
    "certain but small": ("unsure", "The gain is certain but small", KEEP),
    "worse": ("bad", "The change makes it worse", KEEP),
    "no evidence": ("unsure", "There is no evidence of a gain", RECORD),
    "too few": ("unsure", "There is too little traffic to say", RECORD),
}
ADVISED = {
    "worth a trial": ("good", TRY),
    "not now": ("bad", KEEP),
    "not enough evidence": ("unsure", RECORD),
}


class Tile(NamedTuple):
    """A number of the first screen: its label, value, a note, and rows of other placements."""

    label: str
    value: str
    note: str = ""
    rows: Sequence[tuple[str, str]] = ()


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
    title
        Title of the page.
    sentence, todo, reasons, warnings
        The verdict, in a sentence that stands alone; what to do next; and the reasons and the
        limits of the verdict.
    answer
        Colour of the verdict: ``"good"``, ``"bad"`` or ``"unsure"``.
    gains, others
        Tiles of the first screen: gains in windows of each size, and tiles that only some pages
        have.
    names, judgement
        Names of the running and the proposed placement, and the judgement of the change.
    traffic
        A sentence on the traffic that the placements were judged on.
    origin, contents
        Origin of the numbers, and the JSON that the page carries, with its settings.
    load
        Load of every expert in that traffic [L,E].
    recipes
        Commands to run next.
    token_bytes, expert_bytes
        Bytes of a row and of an expert; None where unknown.
    hot_experts
        Shares of the picks that the hottest experts take.
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


def make_advice_data(
    advice: Advice,
    origin: Origin,
    contents: dict[str, Any],
    recipes: Sequence[Recipe] = (),
    voice: Voice = PYTHON,
) -> PageData:
    """Make the page data of an advice, with its JSON and the commands to run next."""
    voice = voice._replace(is_page=True)
    answer, todo = ADVISED[advice.answer]
    running = advice.settings["initial"].replace("_", " ")
    names = ("running" if running == "given" else running, "proposed")
    model, judged_on = advice.problem.cost_model, advice.judged_on
    gains = []
    for judgement in advice.judged:
        over_eplb = advice.over_eplb.get(judgement.window)
        eplb = {} if over_eplb is None else {"EPLB": over_eplb.gain.before}
        gains.append(make_gain_tile(replace(judgement.gain, names=names), judgement, eplb))
    if advice.total is not None:
        total = advice.total
        gains.append(Tile("Prefill and decode in total", total.amount, total.interval_in_words))
    if advice.drift is not None and advice.drift.is_of_groups:
        groups = [", ".join(map(_texts.name, names)) for names in advice.groups_of_halves]
        for seen, gain in enumerate(advice.halves):
            label = f"Computed from {groups[seen]}; judged on {groups[1 - seen]}"
            gains.append(Tile(label, gain.amount, gain.interval_in_words))
    return PageData(
        title=f"moetuner: {advice.answer}",
        sentence=advice.say_answer(voice),
        answer=answer,
        todo=todo,
        gains=tuple(gains),
        names=names,
        judgement=advice.main,
        traffic=sentence(judged_on),
        origin=origin,
        contents=contents,
        load=advice.problem.load.astype(np.float64),
        recipes=tuple(recipes),
        reasons=advice.say("reason", voice=voice),
        warnings=advice.say("warning", voice=voice),
        token_bytes=None if model is None else model.token_bytes,
        expert_bytes=advice.settings["expert_bytes"],
        result=advice.result,
        unit=advice.problem.objective_function.unit,
        advice=advice,
    )


def make_results_data(
    results: Advice | tuple[Evaluation, Evaluation], names: tuple[str, str] = ("before", "after")
) -> PageData:
    """Make the page data of an advice, or of two evaluations of the same traffic."""
    pair = (results.running, results.proposed) if isinstance(results, Advice) else results
    evaluations = check.listed("results", pair, "evaluations, two of them, or an Advice")
    names_given = check.listed("names", names, "texts")
    for argument, values, kind in (
        ("results", evaluations, Evaluation),
        ("names", names_given, str),
    ):
        if len(values) != 2:
            raise ValueError(f"{argument} must be two, got {len(values)}")
        for value in values:
            check.instance(argument, value, kind)
    before, after = evaluations
    replays = [evaluation.replayed for evaluation in evaluations]
    if any(replay is None or replay.group is not None for replay in replays):
        raise ValueError("results must be as returned: not pickled, and not of a group alone")
    traffic, setting = after.replayed.traffic, after.replayed.setting
    model = f" of {_texts.name(traffic.model)}" if traffic.model else ""
    sizes = f"{counted(traffic.layers, 'layer')} of {counted(traffic.num_experts, 'expert')}"
    origin = Origin(f"Routing{model}, {sizes}", (), "moetuner.write_report")
    if isinstance(results, Advice):
        return make_advice_data(results, origin, results.to_dict())
    settings = {name: getattr(setting.serving, name) for name in (*ENGINE_SETTINGS, "window")}
    contents = {"settings": settings, "before": before.to_dict(), "after": after.to_dict()}
    judgement = judge(before, after, by_group=True, names=(names_given[0], names_given[1]))
    return make_judgement_data(
        judgement, origin, contents, traffic="The traffic that both were evaluated on."
    )


def make_outcome_data(
    judgement: Judgement,
    outcome: Outcome,
    origin: Origin,
    contents: dict[str, Any],
    *,
    traffic: str,
    trades: tuple[Trade, ...] = (),
    expert_bytes: float | None = None,
) -> PageData:
    """Make the page data of an outcome, judged beside another one."""
    objective, result, model = outcome.objective, outcome.result, outcome.problem.cost_model
    distance: tuple[Tile, ...] = ()
    if objective.has_needed_tables and outcome.gap is not None:
        note = f"proven by a lower bound ({result.bound_source})"
        distance = (Tile("Distance to the optimum", f"at most {percent(outcome.gap)}", note),)
    timed = contents["settings"]["time_limit"] is not None
    # Without the seconds of solves, the page is the same in every run.
    data = make_judgement_data(
        judgement,
        origin,
        contents if timed else _leave_out_seconds(contents),
        traffic=traffic,
        token_bytes=None if model is None else model.token_bytes,
        expert_bytes=expert_bytes,
    )
    return replace(
        data, others=distance, result=result, unit=objective.unit, trades=trades, timed=timed
    )


def make_judgement_data(
    judgement: Judgement,
    origin: Origin,
    contents: dict[str, Any],
    *,
    traffic: str,
    token_bytes: float | None = None,
    expert_bytes: float | None = None,
) -> PageData:
    """Make the page data of a judgement; ``traffic`` is a sentence on what it was judged on."""
    gain, replayed = replace(judgement.gain, splits=()), judgement.after.replayed
    assert replayed is not None
    answer, words, todo = GAINED[gain.answer]
    verdict = f"{words}: {gain.change_in_words}"
    if not gain.is_too_few:
        verdict += f" ({gain.interval_in_words})"
    threads = replayed.setting.options.threads
    warnings: tuple[str, ...] = ()
    if gain.measure == "predicted_layer_us":
        model = replayed.setting.serving.cost_model
        times = Finding("times of a model", {"weight_bits": model and model.weight_bits})
        if model is not None and model.measured is not None:
            times = find_times(model, replayed.traffic)
        warnings = (say(times),)
    contents = {**contents, "verdict": gain.answer}
    recipes: tuple[Recipe, ...] = ()
    if answer == "good":
        setting = replayed.setting
        recipes = _list_serving_commands(contents, setting.placement, setting.topology.nodes)
        contents["commands"] = [*map(str, recipes)]
        contents["go_back"] = find_way_back(contents.get("settings", {}).get("engine"))
    if expert_bytes is None:
        recorded = replayed.traffic
        expert_bytes = bytes_of_expert(recorded.expert_size, recorded.model)
    page = PageData(
        title=f"moetuner: {gain.names[1]} against {gain.names[0]}",
        sentence=f"{verdict}.",
        answer=answer,
        todo=todo,
        gains=(make_gain_tile(gain, judgement),),
        names=gain.names,
        judgement=judgement,
        traffic=traffic,
        origin=origin,
        contents=contents,
        load=count_part_loads(replayed.traffic, threads)[1].sum(axis=0, dtype=np.float64),
        recipes=recipes,
        reasons=(sentence(gain.doubt),) if gain.doubt else (),
        warnings=warnings,
        token_bytes=token_bytes,
        expert_bytes=expert_bytes,
        hot_experts=hold_out_hot_experts(replayed.traffic, threads=threads),
    )
    if page.moves.experts_moved or judgement.before.imbalance != judgement.after.imbalance:
        return page
    before, after = gain.names
    nothing = f"There is nothing to gain: {before} and {after} place all experts alike."
    return replace(page, sentence=nothing, todo=KEEP, reasons=())


def make_gain_tile(
    gain: Comparison, judgement: Judgement, others: Mapping[str, float] | None = None
) -> Tile:
    """Show a gain of a judgement, with the figures before and after.

    ``others`` has the figure of other placements, by name.
    """
    window, evaluation = judgement.window, judgement.after
    figure, is_time = FIGURES[gain.measure], gain.measure == "predicted_layer_us"
    values = {gain.names[0]: gain.before, **(others or {}), gain.names[1]: gain.after}
    # As tables of commands have them.
    rows = [(name, figure.text(value) + figure.unit) for name, value in values.items()]
    note = gain.interval_in_words or "too few sequences or windows for an interval"
    if is_time:
        layers = judgement.layers
        unit, scale = unit_of_time(max(gain.before * layers, 1e3))
        saved, step_time = (
            digits(us * layers / scale) for us in (abs(gain.before - gain.after), gain.before)
        )
        verb, step = "saves" if gain.gain >= 0 else "adds", "step" if window else "window"
        note = f"{verb} {saved} of {step_time} {unit} per {step} of {layers} layers; {note}"
    label = capitalised(f"{figure.label}, {write_windows(window, evaluation)}")
    return Tile(label, gain.amount, note, rows)


def write_windows(window: int | None, evaluation: Evaluation) -> str:
    """Write the size of the windows that are balanced, and the phase that has them."""
    if window is None:
        is_trace = evaluation.tokens is not None
        return "all tokens as one window" if is_trace else "windows as recorded"
    phase = name_phase(window)
    return f"windows of {window:,} tokens" + (f" ({phase})" if phase else "")


def _list_serving_commands(
    contents: dict[str, Any], placement: Placement, nodes: int
) -> tuple[Recipe, ...]:
    """Return the commands that load a written placement into its engine and serve it."""
    settings = contents.get("settings", {})
    file = contents.get("placement") or settings.get("placement")
    if not file:
        return ()
    engine, split = settings.get("engine"), settings.get("split")
    return tuple(list_serving_recipes(engine, placement, file, nodes=nodes, split=split))


def _leave_out_seconds(contents: dict[str, Any]) -> dict[str, Any]:
    """Return contents without the seconds that solves took."""
    rest = {key: value for key, value in contents.items() if key != "solve_seconds"}
    if "methods" in rest:
        methods = rest["methods"].items()
        rest["methods"] = {name: _leave_out_seconds(outcome) for name, outcome in methods}
    return rest
