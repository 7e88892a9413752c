"""Make the next commands, with the options that they need."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetuner.cli import options
from moetuner.cli.options import recipe
from moetuner.cli.options.groups import FILES
from moetuner.cli.options.machine import (
    Machine,
    cost_model_for,
    find_preset_name,
    write_node_sizes,
)
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.traffic import Source
from moetuner.files.cells import layer_list
from moetuner.formats.recipes import find_way_back, list_serving_recipes
from moetuner.placement import Placement
from moetuner.problem import TRAFFIC_CAP
from moetuner.problem.objective import choose_goal
from moetuner.problem.reading import SCALES
from moetuner.report.advice.request import count_running_slots
from moetuner.report.advice.values import Advice
from moetuner.report.findings import TERMINAL
from moetuner.report.words import write
from moetuner.report.words.parts import name_running
from moetuner.serving import ENGINE_SETTINGS
from moetuner.serving.engines import ENGINES, find_engine
from moetuner.serving.phases import WINDOWS
from moetuner.serving.recipes import Recipe
from moetuner.serving.running import Running

# Share of INPUT that is held out, as "moetuner advise" does.
HOLDOUT = 0.5
# Files to which the commands write the running placement (if it is in no file yet), the proposed
# placement, and the one that few moves reach.
RUNNING_FILE, PLACED_FILE, FEW_MOVES_FILE = "running.json", "placement.json", "few-moves.json"


def list_recipes_after(
    source: Source, advice: Advice, unseen: Collection[Path] = (), *, from_all: bool = False
) -> list[Recipe]:
    """Return the commands to run after advice, each with every option that changes its answer.

    With ``from_all``, one more command computes the placement to serve from all of INPUT.
    """
    typed = {name: text for name, text in options.list_typed().items() if name != "unseen"}
    if advice.answer == "not now":
        win = "what there is to win, layer by layer"
        again = "again, when traffic, engine or the number of devices has changed"
        return [
            recipe("inspect", source.input_files, options.list_typed(Source), win),
            recipe("advise", ["NEWER"], _name_groups_of(typed, "NEWER"), again),
        ]
    if advice.answer != "worth a trial":
        return _record_more(source, advice, typed)
    trying = _list_trial(source, advice, typed, unseen, from_all=from_all)
    files = {_proposed_file(advice): ""}
    files |= {file: phase for phase, _, file in _list_phases_apart(advice)}
    serving = []
    for file, phase in files.items():
        for line in list_recipes_to_serve(
            source,
            advice.placements[1],
            file,
            engine=advice.settings["engine"],
            split=advice.problem.split,
            nodes=advice.problem.topology.nodes,
        ):
            note = "; ".join(filter(None, (f"the engine for {phase}" if phase else "", line.why)))
            serving.append(replace(line, why=note))
    return [*trying, *serving]


def _list_phases_apart(advice: Advice) -> list[tuple[str, str, str]]:
    """Return phase, share of prefill and file of placements for two engines, where two pay."""
    is_apart = any(
        finding.kind == "phases apart" and finding.numbers["two_pay"] for finding in advice.findings
    )
    if not is_apart or len(advice.judged) < 2:
        return []
    names = {"decode": "0", "prefill": "1"}
    taken = _running_file(advice)
    return [
        (phase, share, options.choose_file_name(taken, f"{phase}.json"))
        for phase, share in names.items()
    ]


def _record_more(source: Source, advice: Advice, typed: dict[str, Any]) -> list[Recipe]:
    """Return the commands that record more traffic, with INPUT's engine or by ``collect``."""
    engine = advice.settings["engine"] or next(map(find_engine, source.readers), None)
    if engine is not None and ENGINES[engine].record:
        page = f"docs/engines/{engine.replace('-', '_')}.md"
        why = f"record into MORE, a file for each kind of traffic: {page}"
        return [
            ENGINES[engine].make_record_recipe(advice.problem.devices, why),
            # The groups then have the names of the files.
            recipe("advise", ["MORE"], {**typed, "group_by": FILES, "only": None}),
        ]
    typed = _name_groups_of(typed, "MORE")
    if advice.main.window is None:
        return [recipe("advise", ["MORE"], typed, "MORE: more windows, of all kinds of traffic")]
    why = "more sequences, of all kinds; or as the engine records them, see docs/engines"
    collect = recipe("collect", ["MODEL"], {"dataset": "FILE", "out_file": "MORE"}, why)
    return [collect, recipe("advise", ["MORE"], typed)]


def _name_groups_of(typed: dict[str, Any], name: str) -> dict[str, Any]:
    """Return typed options for another recording, whose groups another --group-by file names."""
    names = typed.get("group_by")
    if names is None or names == FILES:
        return typed
    # The names of other requests, windows or sequences, as NEWER.csv:kind for mine.csv:kind.
    ending = re.search(r"(\.\w+(:.*)?)?$", str(names))
    return {**typed, "group_by": f"{name}{ending[0] if ending else ''}"}


def _list_trial(
    source: Source,
    advice: Advice,
    typed: dict[str, Any],
    unseen: Collection[Path],
    *,
    from_all: bool,
) -> list[Recipe]:
    """Return the commands that compute the proposed placement, and judge it as advice did."""
    problem, main, settings = advice.problem, advice.main, advice.settings
    initial, window, traffic = settings["initial"], settings["windows"][0], source.traffic
    solving = _list_solve_options(advice, typed, holds_out=not (traffic.has_pairs or unseen))
    why = "the placement that was judged"
    if traffic.has_pairs:
        why = "from all of INPUT with its pairs, which cannot be held out"
    elif not unseen and not from_all:
        why += "; leave out --holdout to use all of INPUT for serving"

    def solve(slots: int, why: str, **others: Any) -> Recipe:
        is_default = slots * problem.devices == problem.num_experts
        is_default &= problem.topology.slots_per_device is None
        solving["slots_per_device"] = None if is_default else slots
        # An engine has full slots in any case; so has the map for no engine in particular.
        fills = advice.settings["engine"] is None and slots > problem.single_slots
        solving["fill_slots"] = fills or None
        return recipe("solve", source.input_files, {**solving, **others}, why)

    commands = []
    baseline, placed = _running_file(advice), _proposed_file(advice)
    if initial not in ("given", "contiguous"):
        slots = count_running_slots(initial, problem.num_experts, problem.devices)
        baseline, method = RUNNING_FILE, Running.parse(initial).method
        running = f"what runs: {name_running(initial)}"
        commands.append(solve(slots, running, method=method, out_file=baseline))
    if problem.has_slots_for(advice.placements[0]):
        solving["initial_file"] = initial if baseline is None else baseline
    commands.append(solve(problem.slots, why, out_file=placed))
    step = advice.step
    if step is not None:
        finding = next(f for f in advice.findings if f.kind == "few moves")
        instead = f"or with few moves: {write(finding, TERMINAL)}"
        # All digits of the bytes: a budget that is rounded down is one expert less.
        budget = step.experts if step.bytes is None else step.bytes
        limits = {"move_budget": f"{budget:.0f}", "expert_bytes": typed.get("expert_bytes")}
        file = options.choose_file_name(_running_file(advice), FEW_MOVES_FILE)
        commands.append(solve(problem.slots, instead, out_file=file, **limits))
    values = options.list_typed(Source)
    values |= {"expert_bytes": typed.get("expert_bytes"), "baseline": baseline}
    values |= {"window": None if main.window == window else main.window}
    values |= {"report_file": "report.html"}
    commands.append(recipe("evaluate", [placed, *(unseen or source.input_files)], values))
    for copies, name, why in (
        (advice.fewer_copies, "no-more-memory.json", "or without more memory than now"),
        (advice.larger_copies, "more.json", "or with more memory: your choice"),
    ):
        if copies is not None:
            slots = problem.slots + copies - advice.chosen_copies
            file = options.choose_file_name(_running_file(advice), name)
            commands.append(solve(slots, why, out_file=file))
    for phase, share, file in _list_phases_apart(advice):
        why = f"or an engine for each phase: the one for {phase}"
        commands.append(solve(problem.slots, why, out_file=file, phases=share))
    if from_all and "holdout" in solving:
        purpose = "the placement to serve: from all of INPUT"
        commands.append(solve(problem.slots, purpose, holdout=None, out_file=placed))
    return commands


def _list_solve_options(
    advice: Advice, typed: dict[str, Any], *, holds_out: bool
) -> dict[str, Any]:
    """Return the options with which "moetuner solve" repeats the search of advice."""
    problem, window = advice.problem, advice.settings["windows"][0]
    values = {**typed, "expert_bytes": None, "seed": advice.settings["seed"]}
    # The sizes of windows that the search used, which are not the defaults of INPUT.
    if window is None:  # INPUT has windows of its own
        values |= {"window": None, "arrival": None}
    elif {*problem.shares} == {window}:
        values["window"] = window
    else:
        values |= {"window": None, "phases": f"{problem.shares.get(WINDOWS[1], 0.0):g}"}
    if holds_out:
        values["holdout"] = HOLDOUT
    return values


def make_recipe_to_audit(source: Source, advice: Advice, unseen: Collection[Path]) -> Recipe:
    """Return the command that shows the groups which the proposed placement serves worse."""
    files, initial = unseen or source.input_files, advice.settings["initial"]
    values: dict[str, Any] = {"window": advice.main.window, "baseline": None, "by_group": True}
    if initial != "contiguous":
        values["baseline"] = _running_file(advice) or RUNNING_FILE
    return recipe("evaluate", [_proposed_file(advice), *files], values)


def _running_file(advice: Advice) -> str | None:
    """Return the file of the running placement if --initial names one, else None."""
    return options.list_typed()["initial"] if advice.settings["initial"] == "given" else None


def _proposed_file(advice: Advice) -> str:
    """Return the file of the proposed placement, another one than that of the running placement."""
    return options.choose_file_name(_running_file(advice), PLACED_FILE)


def find_way_back_from(advice: Advice) -> str | None:
    """Return how to undo the proposed placement; None if none is proposed."""
    return find_way_back(advice.settings["engine"]) if advice.answer == "worth a trial" else None


def list_recipes_to_serve(
    source: Source,
    placement: Placement,
    file: str | Path,
    *,
    engine: str | None,
    split: str | None,
    nodes: int,
) -> list[Recipe]:
    """Return the commands that export a placement of INPUT's model, and serve it."""
    layers, dense = source.traffic.left_out or (source.hidden_layers, source.dense_layers)
    why = ""
    if not layers and dense is None:
        layers, dense = placement.layers, ()
        why = "if all layers of the model have experts"
    return list_serving_recipes(
        engine,
        placement,
        file,
        nodes=nodes,
        split=split,
        hidden_layers=str(layers or "N"),
        dense_layers="A-B" if dense is None else layer_list(dense),
        note=why,
        model=source.traffic.model,
    )


def _choose_windows(placed: Placed, worse: int | None) -> dict[str, Any]:
    """Return the options for windows of the size that a placement serves worse.

    A placement for several phases is computed for these phases again.
    """
    sizes = placed.made.phases
    if set(sizes) <= set(WINDOWS) and len(sizes) > 1 and placed.source.window == WINDOWS[0]:
        return {"window": None, "phases": sizes[WINDOWS[1]]}
    return {"window": placed.source.replay_window and (worse or placed.source.replay_window)}


def make_recipe_to_solve(
    placement_file: Path, placed: Placed, machine: Machine, window: int | None
) -> Recipe:
    """Return the command that computes a placement again, and judges it on unseen traffic.

    ``window`` is the size of the windows that the placement serves worse, in tokens.
    """
    placement, topology, made = placed.placement, placed.topology, placed.made
    typed, values = options.list_typed(), options.list_typed(Source, Machine)
    values |= {name: getattr(placed.source, name) for name in SCALES}
    name = made.find_spelling("topology", beside=placement_file, value=topology)
    name = find_preset_name(topology) if name is None else name
    if machine.machine is None and name is not None and machine.devices_per_node is None:
        values |= {"machine": name, "devices": None}
    elif machine.machine is None:
        values["devices"] = placement.devices
        values["devices_per_node"] = write_node_sizes(topology)
    values |= {name: placed.serving.chosen(name) for name in ENGINE_SETTINGS}
    goal, cap = made.wanted.get("objective"), made.wanted.get("max_imbalance")
    values |= {
        "objective": None if goal == choose_goal(None, cap) else goal,
        "max_imbalance": None if goal == "traffic" and cap == TRAFFIC_CAP else cap,
        "method": made.method,
        "seed": made.seed,
    }
    values |= {"engine": placed.serving.engine, **_choose_windows(placed, worse=window)}
    # The unseen part shows whether the new placement serves it better.
    values["holdout"] = None if placed.source.traffic.has_pairs else HOLDOUT
    model = placed.serving.cost_model
    usual = cost_model_for(None, placed.source.traffic, placed.source.weight_bits)
    if model is not None and model != usual:
        text = typed.get("cost_model")
        text = text or made.find_spelling("cost_model", beside=placement_file, value=model)
        values["cost_model"] = text or model.preset_text or model.name
    values["slots_per_device"] = placement.slots_per_device if placement.has_copies else None
    # The running placement is compared with, and experts that need not move stay.
    least_slots = -(-placement.num_experts // placement.devices)
    fits = placement.slots_per_device <= (values["slots_per_device"] or least_slots)
    # Only the default method starts from the running placement.
    if fits and values["method"] in (None, "joint"):
        values["initial_file"] = str(placement_file)
    values["out_file"] = options.choose_file_name(placement_file, PLACED_FILE)
    return recipe("solve", placed.source.input_files, values)
