"""Options that describe the devices, and the topology that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from moetuner._checks import DEVICE_LIMIT
from moetuner.cli.options import option
from moetuner.cli.options.kinds import FileText, Text
from moetuner.cost import DEFAULT_GPU, CostModel, bytes_of_expert, cost_model_of
from moetuner.presets import GPUS, MACHINES, MEASURED
from moetuner.recording import Recording
from moetuner.serving.settings import MACHINE
from moetuner.topology import Topology

DEVICES = click.IntRange(1, DEVICE_LIMIT)


def read_node_sizes(text: str) -> int | tuple[int, ...]:
    """Read the devices of a node, or of each node with commas between them."""
    sizes = tuple(map(DEVICES, text.split(",")))
    return sizes if len(sizes) > 1 else sizes[0]


def write_node_sizes(topology: Topology) -> str | None:
    """Write the devices of nodes as --devices-per-node takes them; None of one node."""
    sizes = [topology.node_size] if topology.has_equal_nodes else topology.node_sizes
    return ",".join(map(str, sizes)) if topology.nodes > 1 else None


def _preset(text: str, presets: Iterable[str]) -> tuple[str, str]:
    """Return the name of a preset, and the text behind its colon."""
    name, _, size = text.partition(":")
    if name not in presets:
        names = ", ".join(presets)
        raise click.BadParameter(f"must be a file or one of {names}, got '{text:.60}'")
    return name, size


def read_machine(text: str) -> tuple[str, Topology]:
    """Read a file, or the name of a common machine and its nodes; return text and topology."""
    if Path(text).exists():
        return text, Topology.load(text)
    name, nodes = _preset(text, MACHINES)
    if nodes and not (nodes.isascii() and nodes.isdigit() and len(nodes) <= 5):
        raise click.BadParameter(f"nodes must be a number, as in {name}:2, got '{nodes:.20}'")
    return text.rstrip(":"), Topology.preset(name, int(nodes or 1))


def find_preset_name(topology: Topology) -> str | None:
    """Return the text by which --topology names a common machine; None for any other machine."""
    name, _, nodes = (topology.name or "").partition(":")
    if name not in MACHINES or re.fullmatch(r"[1-9]\d{0,4}|", nodes, re.ASCII) is None:
        return None
    return topology.name if Topology.preset(name, int(nodes or 1)) == topology else None


def read_cost_model(text: str) -> CostModel | str:
    """Read a file, or the name of a GPU and the sizes of its experts.

    A model without a name gets that of its file. For a GPU the text is returned, as INPUT's model
    decides on the bits of weights, and on sizes that the text leaves out.
    """
    if Path(text).exists():
        model = CostModel.load(text)
        return model if model.name else replace(model, name=Path(text).name)
    name, size = _preset(text, (*GPUS, *MEASURED))
    if not size:
        return name
    if re.fullmatch(r"\d{1,7}x\d{1,7}", size, re.ASCII) is None:
        raise click.BadParameter(f"sizes must be as in {name}:4096x1024, got '{size:.20}'")
    _roofline(text)
    return text


def _roofline(text: str, weight_bits: float | None = None) -> CostModel:
    """Return the cost model of a GPU and the size of its experts."""
    name, hidden, intermediate = _split_roofline(text)
    return CostModel.preset(name, hidden=hidden, intermediate=intermediate, weight_bits=weight_bits)


def _split_roofline(text: str) -> tuple[str, int, int]:
    """Return the GPU, and the sizes of its experts."""
    name, _, size = text.partition(":")
    hidden, intermediate = map(int, size.split("x"))
    return name, hidden, intermediate


def bytes_in_cost_model(
    model: CostModel | str | None, weight_bits: float | None = None
) -> float | None:
    """Return the bytes of an expert by the sizes in --cost-model; None if it has no sizes."""
    if not isinstance(model, str) or ":" not in model:
        return None
    name, hidden, intermediate = _split_roofline(model)
    if name in MEASURED:
        weight_bits = 16.0
    return bytes_of_expert((hidden, intermediate), None, weight_bits)


NODES = Text(read_node_sizes)
TOPOLOGY = FileText(read_machine, words=MACHINES)
COST_MODEL = FileText(read_cost_model, words=(*GPUS, *MEASURED))


def cost_model_for(
    model: CostModel | str | None, traffic: Recording, weight_bits: float | None = None
) -> CostModel:
    """Return the cost model of an option, or of a GPU with the experts of INPUT's model."""
    if isinstance(model, CostModel):
        return model
    if model is not None and ":" in model:
        return _roofline(model, weight_bits)
    return cost_model_of(traffic, model or DEFAULT_GPU, weight_bits)


@dataclass(frozen=True)
class Machine:
    """The devices and links that options give.

    Parameters
    ----------
    devices
        Number of devices. [required, unless --topology or a placement gives it]
    devices_per_node
        Devices per node, or of each node, such as 4,3.
    machine
        Devices and links: a JSON or TOML file, or a common machine and its number of nodes, such as
        h100-nvl8-ib400:2.
    """

    devices: int | None = option(DEVICES, "N", group=MACHINE)
    devices_per_node: int | tuple[int, ...] | None = option(NODES, "M", group=MACHINE)
    machine: tuple[str, Topology] | None = option(
        TOPOLOGY, "FILE|NAME", group=MACHINE, flag="--topology"
    )

    @property
    def given(self) -> int | None:
        """Number of devices by options; None without these options."""
        return self.devices or (None if self.machine is None else self.machine[1].devices)

    def topology(self, devices: int | None = None, placed: Topology | None = None) -> Topology:
        """Return the topology.

        ``devices`` are those of a placement, where there is one, and ``placed`` is the machine that
        it was computed for, which is taken where no option gives another.
        """
        if devices is not None and self.devices not in (None, devices):
            raise click.UsageError(
                f"'--devices' must be {devices} as in the placement, got {self.devices}."
            )
        if self.machine is None:
            devices = devices if self.devices is None else self.devices
            if devices is None:
                raise click.UsageError("Missing option '--devices' (or '--topology').")
            if placed is not None and self.devices_per_node is None and devices == placed.devices:
                return placed
            return Topology(devices, self.devices_per_node)
        if self.devices_per_node is not None:
            raise click.UsageError("Give either '--devices-per-node' or '--topology', not both.")
        _, topology = self.machine
        if self.devices not in (None, topology.devices):
            raise click.UsageError(
                f"'--devices' must be {topology.devices} as in '--topology', got {self.devices}."
            )
        return topology
