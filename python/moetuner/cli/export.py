"""``moetuner export``: a placement in the format of whoever serves the model."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.output import Output
from moetuner.formats import eplb
from moetuner.placement import Placement

WRITERS = {"json": Placement.save, "eplb": eplb.write}


@click.command("export")
@click.argument("placement_file", metavar="PLACEMENT", type=options.IN_FILE)
@click.option("--to", "form", type=click.Choice(list(WRITERS)), required=True, help="Format.")
@click.option(
    "--out",
    "out_file",
    type=options.OutFile(),
    required=True,
    metavar="FILE",
    help="File to write.",
)
@options.json_option
def command(placement_file: Path, form: str, out_file: Path, json_file: Path | None) -> None:
    """Write a placement in another format.

    json: moetuner's own. eplb: .npz with the three arrays that DeepSeek's balancer returns,
    physical_to_logical_map [L,P], logical_to_physical_map [L,E,X] and logical_replica_count [L,E];
    slot p is on device p // (P / devices).
    """
    placement = Placement.load(placement_file)
    WRITERS[form](placement, out_file)
    output = Output(json_file)
    output.say(f"wrote {out_file}")
    output.finish({"placement": str(placement_file), "format": form, "out": str(out_file)})
