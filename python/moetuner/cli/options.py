"""Options that several subcommands share, and what becomes of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from moetuner._machines import GPUS, MACHINES
from moetuner.cost import CostModel
from moetuner.topology import Topology

Command = TypeVar("Command", bound=Callable[..., Any])

WINDOW = 512


class OutFile(click.Path):
    """A file to write, refused before any work is done if it cannot be written.

    Parameters
    ----------
    suffix
        Ending that the name must have.
    standard_output
        Whether "-" stands for standard output.
    """

    def __init__(self, suffix: str = "", *, standard_output: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=standard_output, path_type=Path)
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the directory as well as the file."""
        path = Path(str(super().convert(value, param, ctx)))
        if self.allow_dash and str(path) == "-":
            return path
        if not path.parent.is_dir():
            self.fail(f"directory '{path.parent}' does not exist; make it first", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"directory '{path.parent}' is not writable", param, ctx)
        if not path.name.endswith(self.suffix):
            self.fail(f"must end in {self.suffix}, got '{path.name}'", param, ctx)
        return path


class Number(click.FloatRange):
    """A number in a range; NaN is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what compares with nothing."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        return number


def parse_topology(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Topology | None:
    """Read a topology from a file, or make a common machine of the nodes behind its name."""
    if value is None:
        return None
    if Path(value).exists():
        return Topology.load(value)
    name, _, nodes = value.partition(":")
    if name not in MACHINES:
        known = ", ".join(MACHINES)
        raise click.BadParameter(f"must be a file or one of {known}, got '{value:.60}'")
    if nodes and not (nodes.isascii() and nodes.isdigit() and len(nodes) <= 5):
        raise click.BadParameter(f"nodes must be a number, as in {name}:2, got '{nodes:.20}'")
    return Topology.preset(name, int(nodes or 1))


def parse_cost_model(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> CostModel | None:
    """Read a cost model from a file, or make a common GPU's for experts of the size behind it."""
    if value is None:
        return None
    if Path(value).exists():
        return CostModel.load(value)
    gpu, _, size = value.partition(":")
    if gpu not in GPUS:
        known = ", ".join(GPUS)
        raise click.BadParameter(f"must be a file or one of {known}, got '{value:.60}'")
    if not size:
        return CostModel.preset(gpu)
    found = re.fullmatch(r"(\d{1,7})x(\d{1,7})", size, re.ASCII)
    if found is None:
        raise click.BadParameter(f"sizes must be as in {gpu}:4096x1024, got '{size:.20}'")
    return CostModel.preset(gpu, hidden=int(found[1]), intermediate=int(found[2]))


IN_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def together(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Make one decorator of several options, listed in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


input_options = together(
    [
        click.argument("input_file", metavar="INPUT", type=IN_FILE),
        click.option(
            "--num-experts",
            type=click.IntRange(1, 65536),
            metavar="E",
            help="Experts per layer, where INPUT does not say (.npy).",
        ),
    ]
)
window_option = click.option(
    "--window",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help=f"Tokens whose load is balanced together; a trace is cut into {WINDOW} by default, "
    "statistics have their own.",
)
node_options = together(
    [
        click.option(
            "--devices-per-node",
            type=click.IntRange(1, 65535),
            metavar="M",
            help="Devices of a node.",
        ),
        click.option(
            "--topology",
            "machine",
            callback=parse_topology,
            metavar="FILE|NAME",
            help="JSON or TOML file of a topology, or a common machine and its number of nodes, "
            "such as h100-nvl8-ib400:2.",
        ),
    ]
)
time_options = together(
    [
        click.option(
            "--cost-model",
            callback=parse_cost_model,
            metavar="FILE|GPU",
            help="Predict times: a file, or a common GPU and an expert's hidden and intermediate "
            "sizes, such as h100:4096x1024 (in 8 bits; DeepSeek-V3's sizes by default).",
        ),
        click.option(
            "--regime",
            type=click.Choice(["follow", "dispatch"]),
            default="dispatch",
            show_default=True,
            help="What moves in predicted times: tokens from expert to expert, or from their home "
            "device and back.",
        ),
    ]
)
problem_options = together(
    [
        click.option(
            "--devices",
            type=click.IntRange(1, 65535),
            metavar="N",
            help="Devices to place on.  [required, or --topology]",
        ),
        node_options,
        click.option(
            "--slots-per-device",
            type=click.IntRange(min=1),
            metavar="S",
            help="Slots of a device in a layer; just enough by default.",
        ),
        click.option(
            "--regime",
            type=click.Choice(["follow", "dispatch"]),
            default="follow",
            show_default=True,
            help="Whether tokens move from expert to expert, or fan out from their home device.",
        ),
        click.option(
            "--max-imbalance",
            type=Number(min=1),
            default=1.05,
            show_default=True,
            metavar="X",
            help="Cap on max / mean device load in every layer; inf for none.",
        ),
        window_option,
        click.option(
            "--time-limit",
            type=Number(min=0),
            metavar="SECONDS",
            help="Of each solve; the answer then depends on the machine.",
        ),
    ]
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of all random choices.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="All cores by default; the answer does not depend on it.",
)
json_option = click.option(
    "--json",
    "json_file",
    type=OutFile(standard_output=True),
    metavar="FILE",
    help='Write everything as JSON too; "-" for standard output, then nothing else goes there.',
)


def topology_of(
    devices: int | None, devices_per_node: int | None, topology: Topology | None
) -> Topology:
    """Make the topology that the options describe."""
    if topology is None:
        if devices is None:
            raise click.UsageError("Missing option '--devices' (or '--topology').")
        return Topology(devices, devices_per_node)
    if devices_per_node is not None:
        raise click.UsageError("Give either '--devices-per-node' or '--topology', not both.")
    if devices is not None and devices != topology.devices:
        raise click.UsageError(
            f"'--devices' must be {topology.devices} as in '--topology', got {devices}."
        )
    return topology
