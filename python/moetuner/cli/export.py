"""``moetuner export``: write a placement in the format of an engine."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError
from moetuner.cli import options
from moetuner.cli.options import argument, kinds, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import show_moves
from moetuner.cli.options.placed import read_any
from moetuner.cli.output import Output, working, write_json
from moetuner.cost import bytes_of_expert
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.files.cells import percent
from moetuner.files.opened import Opened
from moetuner.formats import (
    WRITERS,
    Writer,
    find_form,
    find_readers,
    list_cautions,
    open_input,
    read_map,
    read_placement,
    write_placement,
)
from moetuner.formats.hints import Hints
from moetuner.formats.ktransformers import choose_gpu_experts, write_chosen
from moetuner.formats.layout import check_placement, find_faults
from moetuner.placement import EMPTY, Placement
from moetuner.problem.made import Made
from moetuner.recording import Recording
from moetuner.report import recording
from moetuner.serving.engines import ENGINES
from moetuner.statistics import count_loads
from moetuner.topology import Topology

MOVES, KTRANSFORMERS = "moves", "ktransformers"
# Engines that take a placement as a checkpoint whose experts are in its order.
RENUMBERING = tuple(name for name, engine in ENGINES.items() if engine.renumbers)
FORMS = "\n\n".join(
    f"{name}: {writer.title}, {' or '.join(writer.suffixes)}." for name, writer in WRITERS.items()
)


@dataclass(frozen=True)
class OnGpu:
    """The number of experts on a GPU that cannot hold all, for ktransformers.

    Parameters
    ----------
    gpu_experts
        Experts of a layer on the GPU, on average over layers, as --kt-num-gpu-experts counts them:
        those chosen most often in INPUT.
    each_layer
        As many of every layer, and not the most chosen ones of all layers.
    gpu_bytes
        Instead of --gpu-experts: bytes of a layer's experts on the GPU, on average.
    expert_bytes
        Bytes of an expert, for --gpu-bytes.  [default: as the model of INPUT says]
    """

    gpu_experts: int | None = option(kinds.SIZE, "N")
    each_layer: bool = option(is_flag=True, default=False)
    gpu_bytes: float | None = option(kinds.Number(min=0, min_open=True), "BYTES")
    expert_bytes: float | None = option(kinds.Number(min=0, min_open=True), "BYTES")

    def per_layer(self, traffic: Recording) -> int:
        """Return the number of experts on the GPU, on average over layers."""
        if (self.gpu_experts is None) == (self.gpu_bytes is None):
            raise click.UsageError("'--to ktransformers' needs '--gpu-experts' or '--gpu-bytes'.")
        if self.gpu_bytes is None:
            experts = self.gpu_experts or 0
        else:
            size = self.expert_bytes or bytes_of_expert(traffic.expert_size, traffic.model)
            if size is None:
                raise click.UsageError(
                    "'--gpu-bytes' needs '--expert-bytes': INPUT names no model whose size is known"
                )
            experts = int(self.gpu_bytes // size)
        if not 1 <= experts <= traffic.num_experts:
            raise click.UsageError(
                f"must keep 1 to {traffic.num_experts} experts of a layer on the GPU, got {experts}"
            )
        return experts

    def choose(self, traffic: Recording, experts: int) -> NDArray[np.bool_]:
        """Return which experts [L,E] of traffic are on the GPU, so many on average over layers."""
        load = count_loads(traffic).total_load
        return choose_gpu_experts(load, experts, each_layer=self.each_layer)


class FormChoice(click.Choice[str]):
    """A format of a map; the error for an engine without one says how it gets the placement."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name of a format."""
        engine = ENGINES.get(str(value).lower())
        if engine is not None and value not in self.choices:
            placed = engine.make_serve_recipe(1, 0).variables.items()
            serve = " ".join(f"{name}={file}" for name, file in placed)
            # The user means this engine, so no other format is suggested.
            raise click.UsageError(
                f"'--to {value}': {engine.title} loads no map, so nothing is to export: its plugin "
                f"serves moetuner's own placement ({serve}, docs/engines/plugins.md)."
            )
        return super().convert(value, param, ctx)


@options.command(
    "export", example="placement.json --to eplb --out experts.npz", epilog=f"Formats:\n\n{FORMS}"
)
def command(
    *,
    placement_file: Path | None = argument("[PLACEMENT]", kinds.IN_INPUT, required=False),
    form: str | None = option(
        FormChoice([*WRITERS, KTRANSFORMERS, MOVES, *RENUMBERING]), flag="--to"
    ),
    out_file: Path | None = option(kinds.OutFile(), "FILE"),
    check_file: Path | None = option(kinds.IN_FILE, "FILE"),
    engine: str | None = option(click.Choice(list(ENGINES)), flag="--for"),
    layer_hints: options.FileHints,
    checkpoint: Path | None = option(kinds.IN_INPUT, "FOLDER"),
    initial_file: Path | None = option(kinds.IN_FILE, "PLACEMENT"),
    on_gpu: OnGpu,
    machine: Machine,
    output: Output,
) -> None:
    """Write a placement as an engine loads it, or check one.

    PLACEMENT is moetuner's own, or a map in any of the formats. A placement that the engine could
    not load is refused; the message names the option of "moetuner solve" that avoids it. Format
    eplb is for many engines: it fills empty slots with further copies of experts. Format moves is
    JSON: layer, expert, source and target device of every move from --initial, and counts by pair
    of devices. Formats megatron, deepspeed and transformers need torch: they renumber experts and
    routers of --checkpoint, so that engines with contiguous experts run the placement. Format
    ktransformers takes recorded traffic in the place of PLACEMENT, and writes which of its experts
    the GPU holds.

    Parameters
    ----------
    form
        Format to write.
    out_file
        File to write.
    check_file
        Check a map that another program wrote, instead: print why an engine could not load it.
    engine
        Engine that loads the map of --check, if several engines use its format.
    checkpoint
        Checkpoint of transformers, for engines that load a placement as a renumbered one; --out is
        the folder to write that to.
    initial_file
        The running placement, for moves.
    """
    hints = Hints(**layer_hints.hints, devices=machine.devices)
    if check_file is not None:
        if placement_file is not None or out_file is not None:
            raise click.UsageError("'--check' takes neither PLACEMENT nor '--out'.")
        _check(check_file, form, engine, hints, output)
        return
    if placement_file is None or form is None:
        missing = "argument 'PLACEMENT'" if placement_file is None else "option '--to'"
        raise click.UsageError(f"Missing {missing} (or '--check').")
    if out_file is None:
        raise click.UsageError("Missing option '--out'.")
    if form == KTRANSFORMERS:
        _write_chosen(placement_file, on_gpu, layer_hints, out_file, output)
        return
    placement, made = read_any(placement_file, machine, layer_hints)
    output.say(*_differences(made, WRITERS[form].engine if form in WRITERS else form))
    contents: dict[str, Any] = {"placement": str(placement_file), "format": form}
    contents["out"] = str(out_file)
    try:
        if form == MOVES:
            topology = machine.topology(placement.devices, made.machine)
            _write_moves(placement, initial_file, topology, out_file, output)
        elif form in RENUMBERING:
            _renumber(placement, form, checkpoint, out_file, output)
        else:
            contents |= _write_map(placement, form, hints, out_file, output)
    except ImportError as error:
        raise click.ClickException(str(error)) from None
    output.say(f"wrote {out_file}", *_how_to_serve(placement, made, WRITERS.get(form)))
    output.finish(contents)


def _write_map(
    placement: Placement, form: str, hints: Hints, out_file: Path, output: Output
) -> dict[str, int]:
    """Write a map of experts, and print what it assumes; return the slots that were filled."""
    empty, filled = int((placement.slots == EMPTY).sum()), {}
    if form == "eplb" and empty:
        filled["filled_slots"] = empty
        fewest = "tokens" if "load" in placement.settings else "copies"
        output.say(
            f"filled {empty} empty slots of {placement.slots.size} with further copies of "
            f"experts with the fewest {fewest}, as engines have none; what was predicted is of "
            'empty ones. "moetuner solve --fill-slots" searches full slots'
        )
    hidden, dense = hints.hidden_layers, hints.dense_layers
    write_placement(placement, form, out_file, hidden_layers=hidden, dense_layers=dense)
    if WRITERS[form].hints == ("dense_layers",) and hidden is None and dense is None:
        output.say(
            "layers are numbered from 0; if the model has dense ones, --dense-layers names them"
        )
    return filled


def _how_to_serve(placement: Placement, made: Made, writer: Writer | None) -> Iterator[str]:
    """Write the settings with which the engine of a map serves it."""
    if writer is None or writer.engine is None:
        return
    engine = ENGINES[writer.engine]
    split = made.serving.get("split", "")
    if placement.has_copies and split in engine.splits_by:
        yield f"The placement is for split {split}: serve it with {engine.splits_by[split]}."
    if engine.serve_note:
        yield f"To serve it, {engine.serve_note}."


def _write_chosen(
    path: Path, on_gpu: OnGpu, layer_hints: options.FileHints, out_file: Path, output: Output
) -> None:
    """Write the experts that a GPU holds; print the share of recorded choices that they take."""
    file = Opened(path)
    traffic = open_input(file, **layer_hints.hints)
    output.say(recording.describe([path], traffic), *list_cautions(find_readers([file])))
    count = on_gpu.per_layer(traffic)
    chosen = on_gpu.choose(traffic, count)
    layers = chosen.sum(axis=1)
    contents = {"input": str(path), "format": KTRANSFORMERS, "out": str(out_file)}
    shares = {"share": _share(chosen, traffic), "unseen_share": None}
    sentence = f"they take {percent(shares['share'])} of the choices of INPUT, which chose them"
    with contextlib.suppress(ArgumentError):  # one token or window cannot be divided
        seen, unseen = hold_out(traffic.without_pairs())
        shares["unseen_share"] = _share(on_gpu.choose(seen, count), unseen)
        sentence += f"; {percent(shares['unseen_share'])} of one half if chosen by the other"
    spread = "each layer alike"
    if np.ptp(layers):
        spread = f"{layers.min()} to {layers.max()} in a layer"
    output.say(
        f"{layers.sum()} of {chosen.size} experts are on the GPU, {spread}: {sentence}. "
        f"As many chosen by chance take {percent(float(chosen.mean()))}."
    )
    hints = layer_hints.hints
    if traffic.left_out is not None:
        hidden, dense = traffic.left_out
        hints |= {"hidden_layers": hidden, "dense_layers": dense}
    write_chosen(chosen, out_file, Hints(**hints))
    output.say(
        f"wrote {out_file}; it is served by",
        f"  python -m sglang.launch_server --model MODEL --kt-weight-path MODEL "
        f"--kt-num-gpu-experts {count} --kt-expert-placement-strategy frequency "
        f"--init-expert-location {shlex.quote(str(out_file))}",
    )
    output.finish({**contents, "gpu_experts": layers.tolist(), **shares})


def _share(chosen: NDArray[np.bool_], traffic: Recording) -> float:
    """Return the share of the choices that the chosen experts take."""
    load = count_loads(traffic).total_load
    return float(load[chosen].sum() / load.sum())


def _differences(made: Made, engine: str | None) -> Iterator[str]:
    """Write a remark if a placement was computed for another engine."""
    computed_for = made.serving.get("engine")
    if computed_for in ENGINES and engine in ENGINES and computed_for != engine:
        yield (
            f"The placement was computed for {ENGINES[computed_for].title}; it is written for "
            f"{ENGINES[engine].title}."
        )


def _write_moves(
    placement: Placement, initial: Path | None, topology: Topology, path: Path, output: Output
) -> None:
    """Write the moves from a running placement, and print their number."""
    if initial is None:
        raise click.UsageError("'--to moves' needs '--initial', the placement to move from.")
    running = read_placement(initial, devices=placement.devices, num_experts=placement.num_experts)
    diff = running.diff(placement, topology=topology)
    write_json(path, diff.to_dict())
    show_moves(output, diff, topology)


def _renumber(
    placement: Placement, engine: str, checkpoint: Path | None, out_folder: Path, output: Output
) -> None:
    """Write a checkpoint with its experts in the order of a placement, and print warnings."""
    if checkpoint is None or not checkpoint.is_dir():
        raise click.UsageError(
            f"'--to {engine}' needs '--checkpoint', a folder as transformers writes it: "
            f"{ENGINES[engine].title} has no file for a placement and runs the one that the "
            "numbers of its experts are."
        )
    check_placement(placement, engine)
    from moetuner.torch import permute_state_dict

    with working(f"writing {out_folder}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        permute_state_dict(checkpoint, placement, out_folder)
    output.say(*(str(warning.message) for warning in caught))


def _check(path: Path, form: str | None, engine: str | None, hints: Hints, output: Output) -> None:
    """Print the sizes and faults of a map; fail if there are any."""
    if form is not None and form not in WRITERS:
        raise click.UsageError(f"'--check' is of maps; {form} is none.")
    file = Opened(path)
    form = form or find_form(file)
    writer = WRITERS[form]
    layout = read_map(file, hints, form)
    engine = engine or writer.engine
    rows, slots = layout.experts.shape
    output.say(f"{path.name}: {writer.title}, {rows} rows of {slots} slots")
    faults = find_faults(layout, engine, hints)
    output.say(*(f"- {fault}" for fault in faults))
    title = "an engine" if engine is None else ENGINES[engine].title
    if not faults:
        sizes = {
            "--devices": layout.devices or hints.devices,
            "--num-experts": layout.num_experts or hints.num_experts,
            "--hidden-layers": hints.hidden_layers,
        }
        missing = [name for name, value in sizes.items() if value is None]
        if missing:
            output.say(f"not checked without {', '.join(missing)}")
        output.say(f"nothing is wrong with it for {title}")
    output.finish({"file": str(path), "format": form, "engine": engine, "faults": faults})
    if faults:
        further = "" if len(faults) == 1 else f" (and {len(faults) - 1} more)"
        raise click.ClickException(f"{path}: {title} could not load it: {faults[0]}{further}")
