"""``moetuner export``: a placement in the format of whoever serves the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.moves import show_pairs
from moetuner.cli.output import Output, working
from moetuner.files import naming, replacing
from moetuner.formats import WRITERS, form_of, read_placement, write_placement
from moetuner.formats.engines import ENGINES
from moetuner.formats.hints import Hints
from moetuner.formats.layout import check_placement, faults
from moetuner.placement import EMPTY, Placement

MOVES = "moves"
# Engines that take a placement as a checkpoint whose experts are in its order.
RENUMBERING = tuple(name for name, engine in ENGINES.items() if not engine.may_copy)
FORMS = "\n\n".join(
    f"{name}: {writer.title}, {' or '.join(writer.suffixes)}." for name, writer in WRITERS.items()
)


@click.command("export", epilog=f"Formats:\n\n{FORMS}")
@click.argument("placement_file", metavar="[PLACEMENT]", type=options.IN_FILE, required=False)
@click.option("--to", "form", type=click.Choice([*WRITERS, MOVES, *RENUMBERING]), help="Format.")
@click.option("--out", "out_file", type=options.OutFile(), metavar="FILE", help="File to write.")
@click.option(
    "--check",
    "check_file",
    type=options.IN_FILE,
    metavar="FILE",
    help="Instead: check a map that somebody else wrote, and say what an engine could not load.",
)
@click.option(
    "--for",
    "engine",
    type=click.Choice(list(ENGINES)),
    help="Engine that is to load what is checked, where its format does not tell.",
)
@click.option(
    "--num-experts",
    type=click.IntRange(1, 65536),
    metavar="E",
    help="Experts per layer of the model, to check a map against.",
)
@options.hidden_layers_option
@options.dense_layers_option
@click.option(
    "--checkpoint",
    "checkpoint_folder",
    type=options.InFile(folders=True),
    metavar="FOLDER",
    help="Checkpoint as transformers writes it, for engines that take a placement as one: --out "
    "is the folder of the renumbered one.",
)
@click.option(
    "--initial",
    "initial_file",
    type=options.IN_FILE,
    metavar="PLACEMENT",
    help="The placement that runs, for moves.",
)
@machine_options
@options.json_option
def command(
    placement_file: Path | None,
    form: str | None,
    out_file: Path | None,
    check_file: Path | None,
    engine: str | None,
    num_experts: int | None,
    hidden_layers: int | None,
    dense_layers: tuple[int, ...] | None,
    checkpoint_folder: Path | None,
    initial_file: Path | None,
    machine: Machine,
    json_file: Path | None,
) -> None:
    """Write a placement in another format, or what has to move to get to it.

    PLACEMENT is one of moetuner, or a map in any of the formats. What the engine could not load is
    refused, with the option of "moetuner solve" that avoids it; only eplb, which is for many,
    fills empty slots with further copies, no two of an expert on one device, and says so. moves:
    JSON with (layer, expert, device from, device to) of every expert that a device of --initial
    lacks, and how many go between every two devices. megatron, deepspeed, transformers: the model
    of --checkpoint with its experts and routers renumbered, so that engines which put contiguous
    experts on a device run the placement; needs torch.
    """
    hints = Hints(
        num_experts=num_experts,
        devices=machine.devices,
        hidden_layers=hidden_layers,
        dense_layers=dense_layers,
    )
    output = Output(json_file)
    if check_file is not None:
        if placement_file is not None or out_file is not None:
            raise click.UsageError("'--check' takes neither PLACEMENT nor '--out'.")
        _check(check_file, form, engine, hints, output)
        return
    for name, value in (("argument 'PLACEMENT'", placement_file), ("option '--to'", form)):
        if value is None:
            raise click.UsageError(f"Missing {name} (or '--check').")
    if out_file is None:
        raise click.UsageError("Missing option '--out'.")
    assert placement_file is not None
    assert form is not None
    placement = read_placement(
        placement_file, devices=machine.devices, num_experts=num_experts, dense_layers=dense_layers
    )
    answer: dict[str, Any] = {
        "placement": str(placement_file),
        "format": form,
        "out": str(out_file),
    }
    if form == MOVES:
        if initial_file is None:
            raise click.UsageError("'--to moves' needs '--initial', the placement to move from.")
        diff = Placement.load(initial_file).diff(
            placement, topology=machine.topology(placement.devices)
        )
        with replacing(out_file) as temporary:
            temporary.write_text(json.dumps(diff.to_dict()) + "\n")
        output.say(f"{diff.experts_moved} experts move")
        show_pairs(output, diff)
    elif form in RENUMBERING:
        _renumber(placement, form, checkpoint_folder, out_file)
    else:
        empty = int((placement.slots == EMPTY).sum())
        if form == "eplb" and empty:
            answer["filled_slots"] = empty
            output.say(
                f"filled {empty} empty slots of {placement.slots.size} with further copies, as "
                'engines have none; "moetuner solve --fill-slots" chooses them by their load'
            )
        try:
            write_placement(placement, form, out_file, hints)
        except ValueError as error:
            raise click.ClickException(options.as_options(str(error))) from None
        if form == "tensorrt-llm" and hidden_layers is None and dense_layers is None:
            output.say(
                "layers are numbered from 0; if the model has dense ones, --dense-layers names them"
            )
    output.say(f"wrote {out_file}")
    output.finish(answer)


def _renumber(placement: Placement, engine: str, checkpoint: Path | None, out_folder: Path) -> None:
    """Write a checkpoint with its experts in the order of a placement.

    Raises
    ------
    click.ClickException
        If the engine could not run the placement, or torch is not installed.
    """
    title = ENGINES[engine].title
    if checkpoint is None or not checkpoint.is_dir():
        raise click.UsageError(
            f"'--to {engine}' needs '--checkpoint', a folder as transformers writes it: {title} "
            "has no file for a placement and runs the one that the numbers of its experts are."
        )
    try:
        check_placement(placement, engine)
    except ValueError as error:
        raise click.ClickException(options.as_options(str(error))) from None
    try:
        from moetuner.torch import permute_state_dict
    except ImportError as error:
        raise click.ClickException(str(error)) from None
    with working(f"writing {out_folder}"):
        permute_state_dict(checkpoint, placement, out_folder)


def _check(path: Path, form: str | None, engine: str | None, hints: Hints, output: Output) -> None:
    """Say what a map is, and what is wrong with it.

    Raises
    ------
    click.ClickException
        If anything is.
    """
    if form is not None and form not in WRITERS:
        raise click.UsageError(f"'--check' is of maps; {form} is none.")
    form = form or form_of(path)
    writer = WRITERS[form]
    with naming(path):
        layout = writer.of.read_map(path, hints)
    engine = engine or writer.engine
    rows, slots = layout.experts.shape
    output.say(f"{path.name}: {writer.title}, {rows} rows of {slots} slots")
    found = [options.as_options(fault) for fault in faults(layout, writer.rows, engine, hints)]
    for fault in found:
        output.say(f"- {fault}")
    unknown = {
        "--devices": layout.devices or hints.devices,
        "--num-experts": layout.num_experts or hints.num_experts,
        "--hidden-layers": hints.hidden_layers,
    }
    missing = [name for name, value in unknown.items() if value is None]
    if missing and not found:
        output.say(f"not checked, as it was not said: {', '.join(missing)}")
    title = "an engine" if engine is None else ENGINES[engine].title
    if not found:
        output.say(f"nothing is wrong with it for {title}")
    output.finish({"file": str(path), "format": form, "engine": engine, "faults": found})
    if found:
        more = "" if len(found) == 1 else f" (and {len(found) - 1} more)"
        raise click.ClickException(f"{path}: {title} could not load it: {found[0]}{more}")
