"""``moetuner export``: a placement in the format of whoever serves the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, node_options
from moetuner.cli.options.moves import show_pairs
from moetuner.cli.output import Output
from moetuner.files import replacing
from moetuner.formats import WRITERS
from moetuner.formats.hints import Hints
from moetuner.placement import EMPTY, Placement

MOVES = "moves"


@click.command("export")
@click.argument("placement_file", metavar="PLACEMENT", type=options.IN_FILE)
@click.option("--to", "form", type=click.Choice([*WRITERS, MOVES]), required=True, help="Format.")
@click.option(
    "--out",
    "out_file",
    type=options.OutFile(),
    required=True,
    metavar="FILE",
    help="File to write.",
)
@click.option(
    "--initial",
    "initial_file",
    type=options.IN_FILE,
    metavar="PLACEMENT",
    help="The placement that runs, for moves.",
)
@node_options
@options.json_option
def command(
    placement_file: Path,
    form: str,
    out_file: Path,
    initial_file: Path | None,
    machine: Machine,
    json_file: Path | None,
) -> None:
    """Write a placement in another format, or what has to move to get to it.

    json: moetuner's own. eplb: .npz with the three arrays that DeepSeek's balancer returns,
    physical_to_logical_map [L,P], logical_to_physical_map [L,E,X] and logical_replica_count [L,E];
    slot p is on device p // (P / devices); empty slots are filled with further copies, no two of an
    expert on one device, and it says so. moves: JSON with (layer, expert, device from, device to)
    of every expert that a device of --initial lacks, and how many go between every two devices.
    """
    placement = Placement.load(placement_file)
    output = Output(json_file)
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
    else:
        if form == "eplb":
            full = placement.filled()
            empty = int((placement.slots == EMPTY).sum())
            if empty:
                answer["filled_slots"] = empty
                output.say(
                    f"filled {empty} empty slots of {placement.slots.size} with further copies, as "
                    'engines have none; "moetuner solve --fill-slots" chooses them by their load'
                )
            placement = full
        WRITERS[form].write(placement, out_file, Hints())
    output.say(f"wrote {out_file}")
    output.finish(answer)
