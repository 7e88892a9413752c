"""Make the next commands, with the options that they need."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options.groups import FILES
from moetuner.cli.options.machine import Machine, cost_model_for, find_preset_name, write_node_sizes
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.traffic import Source
from moetuner.files import same_file
from moetuner.files.cells import layer_list
from moetuner.formats.recipes import find_way_back, list_serving_recipes
from moetuner.placement import Placement
from moetuner.problem.goals import AIMS
from moetuner.problem.objective import choose_goal
from moetuner.problem.reading import SCALES
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
# Options that are written even with their default: next commands name these files.
NAMED_FILES = ("out_file", "report_file")


def recipe(name: str, files: Iterable[str | Path], values: dict[str, Any], why: str = "") -> Recipe:
    """Return a command on some files, with values of its options and its purpose."""
    menu = click.get_current_context().find_root().command
    assert isinstance(menu, click.Group)
    words = _list_words(menu.commands[name], values)
    return Recipe(("moetuner", name, *map(str, files), *words), why)


def _list_words(command: click.Command, values: dict[str, Any]) -> list[str]:
    """Return a command's options with their values, in the order of its parameters.

    Defaults are left out.
    """
    words: list[str] = []
    for parameter in command.params:
        name, value = str(parameter.name), values.get(str(parameter.name))
        if not isinstance(parameter, click.Option) or value is None or value is False:
            continue
        plain = {str(parameter.default), str(getattr(parameter, "usual", None))}
        if name in NAMED_FILES or str(value) not in plain:
            for argument in value if isinstance(value, list) else [value]:
                words.append(max(parameter.opts, key=len))
                words += [] if argument is True else [str(argument)]
    return words


def choose_file_name(running: str | Path | None, name: str) -> str:
    """Return the name of a file to write, with "new-" in front if it is the running placement's."""
    return f"new-{name}" if running is not None and same_file(running, name) else name


@dataclass(frozen=True)
class Following:
    """The commands that follow an advice, each with every option that changes its answer."""

    source: Source
    advice: Advice
    unseen: Collection[Path]

    @cached_property
    def commands(self) -> list[Recipe]:
        """The commands that repeat the answer, and lead to the engine or to more evidence."""
        return self._list_recipes(from_all=False)

    @cached_property
    def on_page(self) -> list[Recipe]:
        """The same, with that for all of INPUT, which the terminal names in a remark."""
        return self._list_recipes(from_all=True)

    @property
    def go_back(self) -> str | None:
        """How to undo the proposed placement; None if none is proposed."""
        is_proposed = self.advice.answer == "worth a trial"
        return find_way_back(self.advice.settings["engine"]) if is_proposed else None

    @property
    def audit(self) -> Recipe:
        """The command that shows the groups which the proposed placement serves worse."""
        files = self.unseen or self.source.input_files
        values: dict[str, Any] = {"window": self.advice.main.window, "by_group": True}
        if self.advice.settings["initial"] != "contiguous":
            values["baseline"] = self.running_file or RUNNING_FILE
        return recipe("evaluate", [self.name_file(PLACED_FILE), *files], values)

    @cached_property
    def typed(self) -> dict[str, Any]:
        """The typed options that other commands have too."""
        return {name: text for name, text in options.list_typed().items() if name != "unseen"}

    @cached_property
    def running_file(self) -> str | None:
        """The file of the running placement if --initial names one, else None."""
        return self.typed["initial"] if self.advice.settings["initial"] == "given" else None

    def name_file(self, name: str) -> str:
        """Return the name of a file to write, another one than that of the running placement."""
        return choose_file_name(self.running_file, name)

    def _list_recipes(self, *, from_all: bool) -> list[Recipe]:
        """Return the commands to run.

        With ``from_all``, one more command computes the placement to serve from all of INPUT.
        """
        if self.advice.answer == "not now":
            win = "what there is to win, layer by layer"
            again = "again, when traffic, engine or the number of devices has changed"
            return [
                recipe("inspect", self.source.input_files, options.list_typed(Source), win),
                recipe("advise", ["NEWER"], self._name_groups_of("NEWER"), again),
            ]
        if self.advice.answer != "worth a trial":
            return self._record_more()
        return [*self._list_trial(from_all=from_all), *self._serve()]

    def _serve(self) -> Iterator[Recipe]:
        """Make the commands that export and serve the placements that the trial computes."""
        advice = self.advice
        files = {self.name_file(PLACED_FILE): ""}
        files |= {file: phase for phase, _, file in self._list_phases_apart()}
        for file, phase in files.items():
            placement, nodes = advice.placements[1], advice.problem.topology.nodes
            for line in list_recipes_to_serve(
                self.source, placement, file, advice.settings, nodes=nodes
            ):
                notes = (f"the engine for {phase}" if phase else "", line.why)
                yield replace(line, why="; ".join(filter(None, notes)))

    def _list_phases_apart(self) -> list[tuple[str, str, str]]:
        """Return phase, share of prefill and file of placements for two engines, if two pay."""
        is_apart = any(
            finding.kind == "phases apart" and finding.numbers["two_pay"]
            for finding in self.advice.findings
        )
        if not is_apart or len(self.advice.judged) < 2:
            return []
        names = {"decode": "0", "prefill": "1"}
        return [(phase, share, self.name_file(f"{phase}.json")) for phase, share in names.items()]

    def _record_more(self) -> list[Recipe]:
        """Return the commands that record more traffic, with INPUT's engine or by ``collect``."""
        advice = self.advice
        engine = advice.settings["engine"] or next(map(find_engine, self.source.readers), None)
        if engine is not None and ENGINES[engine].record:
            page = f"docs/engines/{engine.replace('-', '_')}.md"
            why = f"record into MORE, a file for each kind of traffic: {page}"
            return [
                ENGINES[engine].make_record_recipe(advice.problem.devices, why),
                # The groups then have the names of the files.
                recipe("advise", ["MORE"], {**self.typed, "group_by": FILES, "only": None}),
            ]
        typed = self._name_groups_of("MORE")
        if advice.main.window is None:
            why = "MORE: more windows, of all kinds of traffic"
            return [recipe("advise", ["MORE"], typed, why)]
        why = "more sequences, of all kinds; or as the engine records them, see docs/engines"
        collect = recipe("collect", ["MODEL"], {"dataset": "FILE", "out_file": "MORE"}, why)
        return [collect, recipe("advise", ["MORE"], typed)]

    def _name_groups_of(self, name: str) -> dict[str, Any]:
        """Return typed options for another recording, whose groups another --group-by names."""
        names = self.typed.get("group_by")
        if names is None or names == FILES:
            return self.typed
        # The names of other requests, windows or sequences, as NEWER.csv:kind for mine.csv:kind.
        ending = re.search(r"(\.\w+(:.*)?)?$", str(names))
        return {**self.typed, "group_by": f"{name}{ending[0] if ending else ''}"}

    def _list_trial(self, *, from_all: bool) -> list[Recipe]:
        """Return the commands that compute the proposed placement, and judge it as advice did."""
        advice, problem, unseen = self.advice, self.advice.problem, self.unseen
        initial, traffic = advice.settings["initial"], self.source.traffic
        solving = self._list_solve_options(holds_out=not (traffic.has_pairs or unseen))
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
            return recipe("solve", self.source.input_files, {**solving, **others}, why)

        commands = []
        baseline, placed = self.running_file, self.name_file(PLACED_FILE)
        if initial not in ("given", "contiguous"):
            baseline, running = RUNNING_FILE, Running.parse(initial)
            slots = running.count_slots(problem.num_experts, problem.devices)
            named = f"what runs: {name_running(initial)}"
            commands.append(solve(slots, named, method=running.method, out_file=baseline))
        if problem.has_slots_for(advice.placements[0]):
            solving["initial_file"] = initial if baseline is None else baseline
        commands.append(solve(problem.slots, why, out_file=placed))
        if advice.step is not None:
            finding = next(f for f in advice.findings if f.kind == "few moves")
            instead = f"or with few moves: {write(finding, TERMINAL)}"
            # All digits of the bytes: a budget that is rounded down is one expert less.
            budget = advice.step.experts if advice.step.bytes is None else advice.step.bytes
            limits = {
                "move_budget": f"{budget:.0f}",
                "expert_bytes": self.typed.get("expert_bytes"),
            }
            file = self.name_file(FEW_MOVES_FILE)
            commands.append(solve(problem.slots, instead, out_file=file, **limits))
        commands.append(self._evaluate(placed, baseline))
        for copies, name, instead in (
            (advice.fewer_copies, "no-more-memory.json", "or without more memory than now"),
            (advice.larger_copies, "more.json", "or with more memory: your choice"),
        ):
            if copies is not None:
                slots = problem.slots + copies - advice.chosen_copies
                commands.append(solve(slots, instead, out_file=self.name_file(name)))
        for phase, share, file in self._list_phases_apart():
            instead = f"or an engine for each phase: the one for {phase}"
            commands.append(solve(problem.slots, instead, out_file=file, phases=share))
        if from_all and "holdout" in solving:
            purpose = "the placement to serve: from all of INPUT"
            commands.append(solve(problem.slots, purpose, holdout=None, out_file=placed))
        return commands

    def _evaluate(self, placed: str, baseline: str | None) -> Recipe:
        """Return the command that judges the proposed placement as advice did."""
        window, first = self.advice.main.window, self.advice.settings["windows"][0]
        values = {
            **options.list_typed(Source),
            "expert_bytes": self.typed.get("expert_bytes"),
            "baseline": baseline,
            "window": None if window == first else window,
            "report_file": "report.html",
        }
        return recipe("evaluate", [placed, *(self.unseen or self.source.input_files)], values)

    def _list_solve_options(self, *, holds_out: bool) -> dict[str, Any]:
        """Return the options with which "moetuner solve" repeats the search of advice."""
        settings, problem = self.advice.settings, self.advice.problem
        window = settings["windows"][0]
        values = {**self.typed, "expert_bytes": None, "seed": settings["seed"]}
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


def list_recipes_to_serve(
    source: Source,
    placement: Placement,
    file: str | Path,
    serving: Mapping[str, Any],
    *,
    nodes: int,
) -> list[Recipe]:
    """Return the commands that export a placement of INPUT's model, and serve it.

    ``serving`` has its engine and its split, if it has any.
    """
    layers, dense = source.traffic.left_out or (source.hidden_layers, source.dense_layers)
    why = ""
    if not layers and dense is None:
        layers, dense = placement.layers, ()
        why = "if all layers of the model have experts"
    return list_serving_recipes(
        serving.get("engine"),
        placement,
        file,
        nodes=nodes,
        split=serving.get("split"),
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
        "max_imbalance": None if goal in AIMS and cap == AIMS[goal].cap else cap,
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
    values["out_file"] = choose_file_name(placement_file, PLACED_FILE)
    return recipe("solve", placed.source.input_files, values)
