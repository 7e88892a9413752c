"""``moetuner inspect``: the content of a recording or a placement, or the moves between two."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from moetuner import _texts
from moetuner.cli import options
from moetuner.cli.options import kinds, list_options, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import show_moves
from moetuner.cli.options.pages import draw_into, figures_option
from moetuner.cli.options.placed import read_any
from moetuner.cli.options.serving import ServingOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, show_shares, working
from moetuner.cost import bytes_of_expert
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.options import ReplayOptions
from moetuner.files.cells import counted, listed, number, percent
from moetuner.formats import is_map
from moetuner.placement import EMPTY, Placement, blocks
from moetuner.problem.goals import AIMS, TRAFFIC_CAP
from moetuner.problem.made import Made
from moetuner.report.findings import Finding
from moetuner.report.hot_experts import HotExperts
from moetuner.report.outcome import find_times_of
from moetuner.report.page.structure import draw_structure
from moetuner.report.structure import Structure, structure
from moetuner.report.unreal import find_unreal
from moetuner.topology import Topology

MOST_GROUPS = 12
# Largest gain in crossing that is not worth a placement, however certain it is.
LITTLE = 0.005
# Devices of the placements that measure structure between layers.
DEVICES = 4
# Most files of INPUT that a line names.
NAMED = 3
SIZES = ("layers", "num_experts", "devices", "slots_per_device")
# Options for one placement, and for the moves from one to another.
PLACEMENT_OPTIONS = {
    *list_options(Machine),
    *list_options(options.LayerHints),
    *list_options(Output),
}
MOVES_OPTIONS = PLACEMENT_OPTIONS | {"expert_bytes"}


@dataclass(frozen=True)
class InspectedMachine(Machine):
    """The machine of the placement or recording that is inspected.

    Parameters
    ----------
    devices
        Number of devices, if a map does not say it; of a recording, those of the placements that
        measure structure between layers. [default: 4 for a recording]
    """


HELP = """Show what is in a trace or a placement, or what has to move.

The content of INPUT decides what is shown:

\b
  recordings      skew, groups and structure
  a placement     sizes, and what it was computed for; an engine's map too,
                  in any format of "moetuner export"
  two placements  what has to move from the first to the second

For recordings, --for, --cost-model, --regime, --split or --arrival also predict the time of the
contiguous placement, as "moetuner solve" does. Between two placements, a copy comes from the
nearest device that holds the expert, on the machine of the second if no option gives another.
"""


@options.command("inspect", example="trace.safetensors", help=HELP)
def command(
    *,
    source: Source,
    machine: InspectedMachine,
    max_imbalance: float = option(kinds.Number(min=1, infinite=True), "X", TRAFFIC_CAP),
    serving: ServingOptions,
    seed: int = options.seed_option(),
    expert_bytes: float | None = options.expert_bytes_option(),
    figures: Path | None = figures_option(),
    output: Output,
) -> None:
    """Show a recording, a placement, or what has to move between two placements.

    Parameters
    ----------
    max_imbalance
        Load cap of the placements that measure structure.
    expert_bytes
        Bytes of one expert of one layer, for what has to move. [default: of the model's experts, if
        known]
    figures
        Write charts of hot experts and of skew as SVG and PNG; needs Chrome or Chromium.
    """
    files = source.input_files
    if not all(map(is_map, source.inputs.values())):
        _check_options({*options.list_flags()} - {"expert_bytes"}, "two placements")
        topology = machine.topology(machine.given or DEVICES)
        with working("looking for structure") as report:
            measured = structure(
                source.traffic,
                topology.devices,
                max_imbalance=max_imbalance,
                seed=seed,
                threads=source.threads,
                progress=show_shares(report, "", then="structure"),
            )
        _show_structure(output, source, measured)
        contents = {"input": source.facts, **measured.to_dict()}
        if serving.is_given:
            contents["contiguous"] = _show_served(output, source, serving, topology)
        if figures is not None:
            draw_into(figures, draw_structure(measured), output)
        output.finish(contents)
        return
    _check_options(MOVES_OPTIONS, "recordings")
    if len(files) > 2:
        raise click.UsageError(
            f"INPUT must be one placement, or two to compare, got {counted(len(files), 'file')}."
        )
    placements = [read_any(file, machine, source) for file in source.inputs.values()]
    if len(files) == 2:
        _show_moves(output, files, placements, machine, expert_bytes)
    else:
        _check_options(PLACEMENT_OPTIONS, "two placements")
        _show_placement(output, files[0], *placements[0])


def _check_options(names: Collection[str], others: str) -> None:
    """Raise if an option was typed that is not for the kind of files that are inspected."""
    context = click.get_current_context()
    for name, flag in options.list_flags().items():
        is_typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_typed and name not in names:
            raise click.UsageError(f"'{flag}' is for {others}.")


def _show_structure(output: Output, source: Source, measured: Structure) -> None:
    """Print INPUT, and its skew, groups and structure."""
    output.say(*source.lines, "")
    _show_skew(output, measured)
    if (unreal := find_unreal(source.traffic, measured)) is not None:
        output.tell(unreal)
        output.say("")
    _show_groups(output, measured)
    _show_crossings(output, measured)
    _show_hot_experts(output, measured.hot_experts)


def _show_served(
    output: Output, source: Source, options: ServingOptions, topology: Topology
) -> dict[str, float | None]:
    """Print and return the figures of the contiguous placement, with the given serving options."""
    source, serving = options.resolve(source, topology)
    traffic = source.traffic
    placement = blocks(traffic.layers, traffic.num_experts, topology.devices)
    replayed = ReplayOptions(threads=source.threads)
    with working("replaying") as report:
        progress = show_shares(report, "of the tokens", then="figures")
        [[evaluation]] = evaluate_each([placement], traffic, [serving], replayed, progress=progress)
    output.say("", *serving.explain())
    figures = {"imbalance": evaluation.imbalance, "us": evaluation.predicted_layer_us}
    output.tell(Finding("contiguous placement", figures), *find_times_of(serving, traffic))
    names = ("imbalance", "imbalance_mixed", "predicted_layer_us")
    return {name: getattr(evaluation, name) for name in names}


def _show_skew(output: Output, structure: Structure) -> None:
    """Print skew and information by layer: least, median and most, and the layer of the most."""
    values: dict[str, tuple[Sequence[float], int]] = {
        "busiest expert / mean load": (structure.skew, 2),
        "experts never used": (structure.unused, 0),
    }
    if structure.information and structure.information_chance:
        values["information on next layer, bits"] = (structure.information, 2)
        values["  in addition, expected by chance"] = (structure.information_chance, 2)
    rows = []
    for name, (layers, decimals) in values.items():
        spread = [number(float(value), decimals) for value in np.quantile(layers, (0, 0.5, 1))]
        rows.append((name, *spread, str(int(np.argmax(layers)))))
    output.table(("per layer", "least", "median", "most", "in layer"), rows)
    output.say("")


def _show_groups(output: Output, structure: Structure) -> None:
    """Print the distance of groups to the mix; of many groups, those with the largest distance."""
    if not structure.group_share:
        output.tell(Finding("no groups"))
        output.say("")
        return
    names = sorted(structure.group_share, key=lambda name: -structure.group_distance[name])
    rows = [
        (name, percent(structure.group_share[name]), number(structure.group_distance[name], 3))
        for name in names[:MOST_GROUPS]
    ]
    output.table(("group", "share", "distance"), rows)
    if len(names) > MOST_GROUPS:
        output.say(f"and {len(names) - MOST_GROUPS} groups nearer to the mix; --json has all")
    output.say("distance to the mix of all groups, from 0 (the same experts) to 1 (all others)", "")


def _show_hot_experts(output: Output, hot: HotExperts) -> None:
    """Print the share of the picks that the hottest experts take, and its finding."""
    rows = {"most used, a fixed set": hot.static, "least recently used is dropped": hot.cache}
    head = (
        f"share of {'unseen ' if hot.is_unseen else ''}picks",
        *(f"{percent(size).replace('.0', '')} of experts" for size in hot.sizes),
    )
    output.say("")
    cells = [(name, *map(percent, shares)) for name, shares in rows.items() if shares is not None]
    output.table(head, cells)
    least = min(hot.static_of_group, key=hot.static_of_group.__getitem__, default=None)
    details = {
        "low": min(hot.static_of_layer),
        "high": max(hot.static_of_layer),
        "group": least,
        "of_group": None if least is None else hot.static_of_group[least],
        "later": hot.static_later,
    }
    output.tell(hot.finding, Finding("half of the experts", details))


def _show_crossings(output: Output, structure: Structure) -> None:
    """Print the crossing reached and under independence, and what their gap means."""
    if structure.crossing_contiguous is None:
        output.tell(Finding("no transitions"))
        return
    if structure.crossing is None or structure.crossing_independent is None:
        output.tell(Finding("nothing held out"))
        return
    rows = {
        "contiguous": structure.crossing_contiguous,
        "independence null": structure.crossing_independent,
        f"searched, load cap {structure.max_imbalance:g}": structure.crossing,
    }
    head = ("crossing on held-out sequences", f"{structure.devices} devices")
    output.table(head, [(name, number(crossing, 4)) for name, crossing in rows.items()])
    output.tell(_conclude(structure.gain, structure.crossing_independent - structure.crossing))


def _conclude(gain: tuple[float, float] | None, difference: float) -> Finding:
    """Return what the gap between a searched placement and the independence null means."""
    if gain is None:
        return Finding("too few sequences", {"least": FEWEST})
    low, high = gain
    if high < LITTLE:
        return Finding("no structure")
    if low <= 0:
        return Finding("uncertain structure", {"low": low, "high": high})
    return Finding("structure", {"kept": difference, "low": low, "high": high})


def _show_placement(output: Output, placement_file: Path, placement: Placement, made: Made) -> None:
    """Print a placement's sizes, and what it was computed for."""
    sizes = {name: int(getattr(placement, name)) for name in SIZES}
    sizes["empty_slots"] = int((placement.slots == EMPTY).sum())
    sizes["copies"] = int((placement.replicas - 1).sum())
    date = datetime.fromtimestamp(placement_file.stat().st_mtime).astimezone()
    moment = date.isoformat(" ", "minutes")
    output.say(
        f"{_texts.name(placement_file.name)}: {counted(placement.layers, 'layer')}, "
        f"{counted(placement.num_experts, 'expert')}, {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}; {sizes['copies']:,} copies beyond one of "
        f"each expert, {counted(sizes['empty_slots'], 'empty slot')}; checksum "
        f"{placement.checksum}",
        *_origins(placement, made, moment),
    )
    names = ("model", "topology", "fingerprint", "objective", "bound", "bound_scope")
    contents: dict[str, Any] = {"placement": str(placement_file), "file_date": date.isoformat()}
    contents["checksum"] = placement.checksum
    contents |= sizes | {name: getattr(placement, name) for name in names}
    output.finish(contents | {"settings": placement.settings})


def _origins(placement: Placement, made: Made, moment: str) -> Iterator[str]:
    """Write who made a placement and when, its problem, its input, and its objective."""
    if made.plan is not None:
        running = _texts.name(str(made.plan.get("running")))
        devices = counted(placement.devices, "device")
        serve = "serves" if placement.devices == 1 else "serve"
        yield f"By plan from {running}: {made.plan.get('change')}, {devices} {serve}; {moment}"
    elif made.method is not None:
        yield (
            f"Made by moetuner {made.version}, method {made.method}, seed {made.seed}, effort "
            f"{made.effort}; file of {moment}"
        )
    else:
        yield (
            f"File of {moment}, which does not say what it was computed for: it is of an engine, "
            "or older."
        )
        return
    yield f"{'Served' if made.plan else 'Computed'} for {made.describe()}"
    if "cost_model" in made.serving:
        yield f"Times are of {made.serving['cost_model'].name or 'an unnamed cost model'}"
    if made.plan is not None:
        return
    recorded = made.input
    source = listed(list(recorded.files or ["traffic of no name"]), NAMED)
    sizes = [
        counted(size, unit)
        for size, unit in ((recorded.tokens, "token"), (recorded.windows, "window"))
        if size is not None
    ]
    if recorded.only:
        sizes.append(f"of {listed(list(recorded.only), NAMED)} alone")
    if made.holdout:
        sizes.append(f"{percent(made.holdout)} of it held out")
    model = "" if placement.model is None else f" of {_texts.name(placement.model)}"
    yield ", ".join([f"From {source}{model}", *sizes, f"fingerprint {placement.fingerprint}"])
    if placement.objective is not None:
        places = AIMS[made.wanted.get("objective") or "traffic"].decimals
        bound = "" if placement.bound is None else f"; lower bound {placement.bound:,.{places}f}"
        scope = f" of {placement.bound_scope}" if bound and placement.bound_scope else ""
        value = f"{placement.objective:,.{places}f} {made.unit or ''}"
        yield f"Objective {value}{bound}{scope}"


def _show_moves(
    output: Output,
    files: Sequence[Path],
    placements: Sequence[tuple[Placement, Made]],
    machine: Machine,
    expert_bytes: float | None,
) -> None:
    """Print the moves from one placement to another."""
    (before_file, after_file), ((before, made_before), (after, made_after)) = files, placements
    # Where both say it, the second one's file decides.
    made = [made_after, made_before]
    sizes_before, sizes_after = (
        (placement.layers, placement.devices, placement.num_experts)
        for placement in (before, after)
    )
    if sizes_before != sizes_after:
        # The same model on another number of devices.
        is_resized = sizes_before[::2] == sizes_after[::2]
        raise click.UsageError(
            f"{_texts.name(after_file.name)} must be a placement of the same model and machine: "
            f"{_write_sizes(sizes_before)} as {_texts.name(before_file.name)}, got "
            f"{_write_sizes(sizes_after)}"
            + ('; "moetuner plan --steps" lists the moves to other devices.' if is_resized else ".")
        )
    topology = machine.topology(after.devices, _first(origin.machine for origin in made))
    if expert_bytes is None:
        size = _first(origin.expert_size for origin in made)
        bits = _first(origin.input.weight_bits for origin in made)
        expert_bytes = bytes_of_expert(size, after.model or before.model, bits)
    diff = before.diff(after, expert_bytes=expert_bytes, topology=topology)
    show_moves(output, diff, topology)
    if expert_bytes is None and diff.experts_moved:
        output.say("Pass --expert-bytes to see bytes.")
    contents: dict[str, Any] = {"before": str(before_file), "after": str(after_file)}
    contents |= {"expert_bytes": expert_bytes, "topology": topology.to_dict()}
    output.finish(contents | diff.to_dict())


def _first(values: Iterable[Any]) -> Any:
    """Return the first value that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


def _write_sizes(sizes: tuple[int, int, int]) -> str:
    """Write layers, devices and experts."""
    return ", ".join(map(counted, sizes, ("layer", "device", "expert")))
