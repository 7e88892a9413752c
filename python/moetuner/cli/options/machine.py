"""Options that describe the devices, and the topology that they make."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from moetuner._checks import DEVICE_LIMIT
from moetuner.cli.options import completing, declared, option_group
from moetuner.cli.options.paths import register_path
from moetuner.cli.options.traffic import Traffic
from moetuner.cost import DEFAULT_GPU, CostModel, cost_model_of
from moetuner.presets import GPUS, MACHINES
from moetuner.problem.settings import MACHINE
from moetuner.topology import Topology

DEVICES = click.IntRange(1, DEVICE_LIMIT)
# Where the context has the text of --topology.
TOPOLOGY = f"{__name__}.topology"


def _preset(
    context: click.Context, parameter: click.Parameter, value: str, names: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Return a preset's name and what is behind its colon; None, registered, for a file."""
    if Path(value).exists():
        register_path(context, parameter, Path(value))
        return None
    name, _, more = value.partition(":")
    if name not in names:
        raise click.BadParameter(f"must be a file or one of {', '.join(names)}, got '{value:.60}'")
    return name, more


def parse_topology(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Topology | None:
    """Read a topology from a file, or make a common machine of the nodes behind its name."""
    if value is None:
        return None
    context.meta[TOPOLOGY] = value
    preset = _preset(context, parameter, value, MACHINES)
    if preset is None:
        return Topology.load(value)
    name, nodes = preset
    if nodes and not (nodes.isascii() and nodes.isdigit() and len(nodes) <= 5):
        raise click.BadParameter(f"nodes must be a number, as in {name}:2, got '{nodes:.20}'")
    return Topology.preset(name, int(nodes or 1))


def parse_cost_model(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> CostModel | str | None:
    """Read a cost model from a file, or make a common GPU's for experts of the size behind it.

    A GPU alone is returned as it is: its experts are those of INPUT's model.
    """
    if value is None:
        return None
    preset = _preset(context, parameter, value, GPUS)
    if preset is None:
        model = CostModel.load(value)
        return model if model.name else replace(model, name=Path(value).name)
    gpu, size = preset
    if not size:
        return gpu
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", size, re.ASCII)
    if match is None:
        raise click.BadParameter(f"sizes must be as in {gpu}:4096x1024, got '{size:.20}'")
    return CostModel.preset(gpu, hidden=int(match[1]), intermediate=int(match[2]))


def cost_model_for(given: CostModel | str | None, traffic: Traffic) -> CostModel:
    """Return the cost model that was given, or that of a GPU with the experts of INPUT's model."""
    if isinstance(given, CostModel):
        return given
    return cost_model_of(traffic, given or DEFAULT_GPU)


@dataclass(frozen=True)
class Machine:
    """Devices and links, as far as options give them.

    Parameters
    ----------
    devices
        Number of devices. [required, unless --topology or a placement says it]
    devices_per_node
        Devices per node.
    machine
        Devices and links: a JSON or TOML file, or a common machine and its number of nodes, such as
        h100-nvl8-ib400:2.
    """

    devices: int | None = declared(DEVICES, "N", group=MACHINE)
    devices_per_node: int | None = declared(DEVICES, "M", group=MACHINE)
    machine: Topology | None = declared(
        str,
        "FILE|NAME",
        group=MACHINE,
        flag="--topology",
        callback=parse_topology,
        shell_complete=completing(*MACHINES, files=True),
    )

    def topology(self, devices: int | None = None) -> Topology:
        """Return the topology; ``devices`` are those of a placement, where there is one."""
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
        if self.devices not in (None, self.machine.devices):
            raise click.UsageError(
                f"'--devices' must be {self.machine.devices} as in '--topology', "
                f"got {self.devices}."
            )
        return self.machine

    def words(self) -> str:
        """Write the options again."""
        if self.machine is not None:
            given = click.get_current_context().meta.get(TOPOLOGY, self.machine.name)
            return f"--topology {shlex.quote(str(given))}"
        node = self.devices_per_node
        return f"--devices {self.devices}" + (f" --devices-per-node {node}" if node else "")


machine_options = option_group("machine", Machine)
