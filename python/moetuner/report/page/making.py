"""Make the data of a page from an advice, an outcome or a judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moetuner import _checks as check
from moetuner import _texts
from moetuner.cost import bytes_of_expert
from moetuner.evaluation import Evaluation
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.judgement import Judgement, judge
from moetuner.files.cells import (
    capitalised,
    counted,
    digits,
    percent,
    sentence,
    unit_of_time,
)
from moetuner.formats.recipes import find_way_back, list_serving_recipes
from moetuner.placement import Placement
from moetuner.report.advice.values import Advice
from moetuner.report.findings import PYTHON, Finding, Voice
from moetuner.report.hot_experts import hold_out_hot_experts
from moetuner.report.loads import count_part_loads
from moetuner.report.outcome import Outcome, find_times
from moetuner.report.page.data import Origin, PageData, Tile, write_windows
from moetuner.report.words import say
from moetuner.serving import ENGINE_SETTINGS
from moetuner.serving.recipes import Recipe
from moetuner.solver import Trade

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
