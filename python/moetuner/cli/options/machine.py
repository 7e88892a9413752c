"""Options that describe the devices, and the topology that they make."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import click

from moetuner._checks import DEVICE_LIMIT
from moetuner.cli import options
from moetuner.cli.options.traffic import Traffic
from moetuner.cost import DEFAULT_GPU, CostModel, cost_model_of
from moetuner.presets import GPUS, MACHINES
from moetuner.topology import Topology

# Where the context keeps what --topology was given.
GIVEN = f"{__name__}.topology"


@dataclass(frozen=True)
class Machine:
    """What was said of devices and links."""

    devices: int | None = None
    devices_per_node: int | None = None
    machine: Topology | None = None

    def topology(self, devices: int | None = None) -> Topology:
        """Make the topology; ``devices`` are those of a placement, where there is one."""
        if devices is not None and self.devices not in (None, devices):
            raise click.UsageError(
                f"'--devices' must be {devices} as in the placement, got {self.devices}."
            )
        if self.machine is None:
            devices = devices if self.devices is None else self.devices
            if devices is None:
                raise click.UsageError("Missing option '--devices' (or '--topology').")
            return Topology(devices, self.devices_per_node)
        if self.devices_per_node is not None:
            raise click.UsageError("Give either '--devices-per-node' or '--topology', not both.")
        if self.devices is not None and self.devices != self.machine.devices:
            raise click.UsageError(
                f"'--devices' must be {self.machine.devices} as in '--topology', "
                f"got {self.devices}."
            )
        return self.machine

    def words(self) -> str:
        """Return the options that say the same."""
        if self.machine is not None:
            given = click.get_current_context().meta.get(GIVEN, self.machine.name)
            return f"--topology {shlex.quote(str(given))}"
        node = self.devices_per_node
        return f"--devices {self.devices}" + (f" --devices-per-node {node}" if node else "")


def parse_topology(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Topology | None:
    """Read a topology from a file, or make a common machine of the nodes behind its name."""
    if value is None:
        return None
    context.meta[GIVEN] = value
    if Path(value).exists():
        options.claim(context, parameter, Path(value))
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
) -> CostModel | str | None:
    """Read a cost model from a file, or make a common GPU's for experts of the size behind it.

    A GPU alone is given back as it is: its experts are those of INPUT's model.
    """
    if value is None:
        return None
    if Path(value).exists():
        options.claim(context, parameter, Path(value))
        model = CostModel.load(value)
        return model if model.name else replace(model, name=Path(value).name)
    gpu, _, size = value.partition(":")
    if gpu not in GPUS:
        known = ", ".join(GPUS)
        raise click.BadParameter(f"must be a file or one of {known}, got '{value:.60}'")
    if not size:
        return gpu
    found = re.fullmatch(r"(\d{1,7})x(\d{1,7})", size, re.ASCII)
    if found is None:
        raise click.BadParameter(f"sizes must be as in {gpu}:4096x1024, got '{size:.20}'")
    return CostModel.preset(gpu, hidden=int(found[1]), intermediate=int(found[2]))


def cost_model_for(given: CostModel | str | None, traffic: Traffic) -> CostModel:
    """Return the cost model that was given, or that of a GPU with the experts of INPUT's model."""
    if isinstance(given, CostModel):
        return given
    return cost_model_of(traffic, given or DEFAULT_GPU)


_nodes = (
    click.option(
        "--devices-per-node",
        type=click.IntRange(1, DEVICE_LIMIT),
        metavar="M",
        help="Devices of a node.",
    ),
    click.option(
        "--topology",
        "machine",
        callback=parse_topology,
        shell_complete=options.completing(*MACHINES, files=True),
        metavar="FILE|NAME",
        help="JSON or TOML file of a topology, or a common machine and its number of nodes, "
        "such as h100-nvl8-ib400:2.",
    ),
)
machine_options = options.gathered(
    "machine",
    Machine,
    (
        click.option(
            "--devices",
            type=click.IntRange(1, DEVICE_LIMIT),
            metavar="N",
            help="Number of devices.  [required, unless --topology or a placement says it]",
        ),
        *_nodes,
    ),
)
