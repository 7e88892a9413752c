"""Topology: the devices of a machine, and the costs of the links between them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner.files import naming, read_whole
from moetuner.files.text import parse_json
from moetuner.frozen import Frozen, as_json, freeze
from moetuner.presets import MACHINES

# The way of tokens after a layer: from expert to expert of the next layer (follow), as in the
# paper; or from home to every distinct device of their experts and back (dispatch), as in engines.
Regime = Literal["follow", "dispatch"]

# Bytes per second and direction between two H100: NVLink 4 (900 GB/s both ways) inside a node, one
# 400 Gbit/s InfiniBand port per GPU between nodes (NVIDIA H100 and ConnectX-7 data sheets).
INTRA_NODE_BANDWIDTH = 450e9
INTER_NODE_BANDWIDTH = 50e9


@dataclass(frozen=True, eq=False, repr=False)
class Tier(Frozen):
    """Groups of devices that share a link.

    Parameters
    ----------
    devices
        Devices of a group.
    bandwidth
        Bytes per second and direction of a device's port to the devices of its group outside its
        smaller groups.
    latency
        Seconds until the first byte arrives.

    Examples
    --------
    >>> import moetuner as mt
    >>> topology = mt.Topology(16, tiers=(mt.Tier(8, 450e9), mt.Tier(16, 50e9)))
    >>> topology.nodes
    2
    """

    devices: int
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        check.whole_number("devices", self.devices, highest=check.DEVICE_LIMIT)
        _set_link(self, "bandwidth", "latency")


def _set_link(link: Any, bandwidth: str, latency: str) -> None:
    """Check bandwidth and latency, which are fields of a frozen value, and set them."""
    rate = check.positive(bandwidth, getattr(link, bandwidth), "number of bytes per second")
    seconds = check.not_negative(latency, getattr(link, latency), "number of seconds")
    vars(link).update({bandwidth: rate, latency: seconds})


@dataclass(frozen=True, eq=False, repr=False)
class Topology(Frozen):
    """Devices in nodes, and links of two tiers or more.

    Parameters
    ----------
    devices
        Number of devices (expert-parallel ranks), D. The first node has the first devices.
    devices_per_node
        Devices that share a fast link: a number for all nodes, or one for each node; by default
        all devices are in one node.
    intra_node_bandwidth, inter_node_bandwidth
        Bytes per second and direction between two devices of one node, and of different nodes.
    name
        Written into placements.
    intra_node_latency, inter_node_latency
        Seconds until the first byte arrives.
    tiers
        Instead of nodes and their links: groups of devices, each group inside one of the next tier,
        the smallest (the nodes) first and all devices last.
    link_cost
        Cost of moving one token's state from device to device [D,D], in any unit: symmetric, not
        negative, zero on the diagonal. It replaces the costs that follow from bandwidths.
    speed
        Relative speed of every device [D]; equal by default.
    slots_per_device
        Slots of every device in a layer [D]; by default those of the problem, equal on all devices.

    Raises
    ------
    ValueError
        If a number is out of range, or nodes and tiers do not divide each other.

    Examples
    --------
    >>> import moetuner as mt
    >>> mt.Topology(16, devices_per_node=8).nodes
    2
    >>> mt.Topology(7, devices_per_node=[4, 3]).node_of_device.tolist()
    [0, 0, 0, 0, 1, 1, 1]
    >>> mt.Topology.preset("h100-nvl8-ib400", nodes=2).devices
    16
    """

    devices: int
    devices_per_node: int | Sequence[int] | None = None
    _: KW_ONLY
    intra_node_bandwidth: float = INTRA_NODE_BANDWIDTH
    inter_node_bandwidth: float = INTER_NODE_BANDWIDTH
    name: str | None = None
    intra_node_latency: float = 0.0
    inter_node_latency: float = 0.0
    tiers: tuple[Tier, ...] = ()
    link_cost: ArrayLike | None = field(default=None, repr=False)
    speed: Sequence[float] | None = None
    slots_per_device: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check.whole_number("devices", self.devices, highest=check.DEVICE_LIMIT)
        check.text_or_none("name", self.name)
        vars(self)["tiers"] = tuple(check.listed("tiers", self.tiers, "Tier values"))
        if self.tiers:
            self._set_from_tiers()
        self._set_nodes()
        for end in ("intra_node", "inter_node"):
            _set_link(self, f"{end}_bandwidth", f"{end}_latency")
        # Tables are tuples, so that topologies can be compared and hashed, and not changed.
        if self.link_cost is not None:
            cost = check_link_cost(self.link_cost, self.devices)
            vars(self)["link_cost"] = tuple(map(tuple, cost.tolist()))
        if self.speed is not None:
            speeds = enumerate(check.per_device("speed", self.speed, self.devices))
            vars(self)["speed"] = tuple(
                float(check.positive(f"speed of device {device}", value))
                for device, value in speeds
            )
        if self.slots_per_device is not None:
            slots = enumerate(
                check.per_device("slots_per_device", self.slots_per_device, self.devices)
            )
            vars(self)["slots_per_device"] = tuple(
                check.whole_number(
                    f"slots_per_device of device {d}", value, highest=check.SLOT_LIMIT
                )
                for d, value in slots
            )

    def _set_nodes(self) -> None:
        """Check the devices of nodes; nodes of one size have a number, others a tuple."""
        sizes: Any = self.devices if self.devices_per_node is None else self.devices_per_node
        if isinstance(sizes, list | tuple) or (isinstance(sizes, np.ndarray) and sizes.ndim):
            sizes = tuple(
                check.whole_number(
                    f"devices_per_node of node {node}", size, highest=check.DEVICE_LIMIT
                )
                for node, size in enumerate(sizes)
            )
            if sum(sizes) != self.devices:
                raise check.ArgumentError(
                    f"devices_per_node must add up to devices ({self.devices}), "
                    f"got {check.shown([*sizes])}",
                    "devices_per_node",
                )
            vars(self)["devices_per_node"] = sizes if len({*sizes}) > 1 else sizes[0]
            return
        size = check.whole_number("devices_per_node", sizes, highest=check.DEVICE_LIMIT)
        if self.devices % size:
            raise check.ArgumentError(
                f"devices_per_node must divide devices ({self.devices}), got {size}",
                "devices_per_node",
            )
        vars(self)["devices_per_node"] = size

    def _set_from_tiers(self) -> None:
        """Check tiers, and set the fields of nodes and their links from the first two."""
        for tier in self.tiers:
            check.instance("tiers", tier, Tier)
        sizes = [tier.devices for tier in self.tiers]
        nested = all(b % a == 0 and b > a for a, b in pairwise(sizes))
        if not nested or sizes[-1] != self.devices:
            raise ValueError(
                "tiers must be groups of devices, each size a multiple of the one before and the "
                f"last all {self.devices} devices, got {sizes}"
            )
        values: dict[str, Any] = {"devices_per_node": self.tiers[0].devices}
        for end, tier in (("intra_node", self.tiers[0]), ("inter_node", self.tiers[:2][-1])):
            values |= {f"{end}_bandwidth": tier.bandwidth, f"{end}_latency": tier.latency}
        defaults = {parameter.name: parameter.default for parameter in fields(self)}
        for name, value in values.items():
            if getattr(self, name) not in (value, defaults[name]):
                raise ValueError(
                    f"{name} must be left out where tiers are given, got {getattr(self, name)}"
                )
            vars(self)[name] = value

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Devices of every node."""
        sizes = self.devices_per_node
        if isinstance(sizes, tuple):
            return sizes
        assert isinstance(sizes, int)
        return (sizes,) * (self.devices // sizes)

    @property
    def node_size(self) -> int:
        """Devices of the largest node."""
        return max(self.node_sizes)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.node_sizes)

    @property
    def has_equal_nodes(self) -> bool:
        """Whether all nodes have equally many devices."""
        return not isinstance(self.devices_per_node, tuple)

    @property
    def has_nested_nodes(self) -> bool:
        """Whether nodes are in larger groups, of which not all devices are."""
        return len(self.levels) > 2

    @cached_property
    def levels(self) -> tuple[Tier, ...]:
        """Tiers from the nodes to the whole machine, also for a topology without ``tiers``."""
        if self.tiers:
            return self.tiers
        node = Tier(self.node_size, self.intra_node_bandwidth, self.intra_node_latency)
        if self.nodes == 1:
            return (node,)
        return (node, Tier(self.devices, self.inter_node_bandwidth, self.inter_node_latency))

    @property
    def node_of_device(self) -> NDArray[np.int64]:
        """Node of every device [D]."""
        return np.repeat(np.arange(self.nodes), self.node_sizes)

    @property
    def tier(self) -> NDArray[np.int64]:
        """Tier of the link between devices [D,D]: 0 for a device itself, 1 in a node, else 2 up."""
        device = np.arange(self.devices)
        larger = [device // level.devices for level in self.levels[1:-1]]
        group = np.stack([device, self.node_of_device, *larger][: len(self.levels)])
        tier: NDArray[np.int64] = (group[:, :, None] != group[:, None, :]).sum(axis=0)
        return tier

    @property
    def bandwidth(self) -> NDArray[np.float64]:
        """Bytes per second from device to device [D,D]; infinite on the diagonal."""
        return np.array([np.inf, *(level.bandwidth for level in self.levels)])[self.tier]

    @property
    def latency(self) -> NDArray[np.float64]:
        """Seconds until the first byte arrives [D,D]; zero on the diagonal."""
        return np.array([0.0, *(level.latency for level in self.levels)])[self.tier]

    @property
    def speed_of_device(self) -> NDArray[np.float64]:
        """Relative speed of every device [D], 1 by default."""
        return np.ones(self.devices) if self.speed is None else np.array(self.speed)

    @property
    def time_of_device(self) -> NDArray[np.float64]:
        """Time of every device per token [D], as a share of the slowest device's."""
        time: NDArray[np.float64] = self.speed_of_device.min() / self.speed_of_device
        return time

    @cached_property
    def cost(self) -> NDArray[np.int64]:
        """Integer cost of moving one token's state from device to device [D,D].

        It is proportional to the time of a byte, in sixteenths of that on the fastest link, or to
        a given ``link_cost``: 1 between any two devices if all links are equal, 0 on the diagonal.
        Integer costs are divided by their common divisor, and kept if all are then up to 65535.
        Others are scaled so that the largest is 65535, and rounded, positive ones to 1 or more. The
        error of a cost is then at most 1/65535 of the largest.
        """
        fastest = max(level.bandwidth for level in self.levels)
        cost = np.rint(16 * fastest / self.bandwidth)
        if self.link_cost is not None:
            cost = np.array(self.link_cost, dtype=np.float64)
        return freeze(scale_to_integers(cost))

    @property
    def has_equal_devices(self) -> bool:
        """Whether all devices have the same speed and the same number of slots."""
        return len(set(self.speed or ())) <= 1 and len(set(self.slots_per_device or ())) <= 1

    def without(self, lost: Collection[int], join: int = 0) -> Topology:
        """Return the machine without the lost devices, the others numbered anew.

        Nodes keep what is left of them, of a machine with two tiers at most. Tiers of more than
        nodes are of equal groups, so there is one node then, and all links are as slow as the
        slowest.

        Devices that ``join`` come last, with speed 1. They fill the last node, if it has lost a
        device, and then nodes of their own. A single node takes all of them in.
        """
        check.whole_number("join", join, lowest=0, highest=check.DEVICE_LIMIT - self.devices)
        is_lost = check.chosen("lost", lost, self.devices)
        if is_lost.all():
            raise check.ArgumentError("lost must leave a device", "lost")
        if not is_lost.any() and not join:
            return self
        remaining = np.flatnonzero(~is_lost).tolist()
        inner, *_, outer = (*self.levels, *self.levels)
        sizes = None
        if self.has_nested_nodes:
            inner = outer
        elif self.nodes > 1:
            left = sum_by_node((~is_lost).astype(np.int64), self).tolist()
            replaced = min(join, self.node_size - left[-1]) if left[-1] else 0
            left[-1] += replaced
            new_nodes, others = divmod(join - replaced, self.node_size)
            left += [self.node_size] * new_nodes + [others]
            sizes = [size for size in left if size]
        links = None
        if self.link_cost is not None:
            links = np.full((len(remaining) + join,) * 2, np.max(self.link_cost))
            kept_cost = np.array(self.link_cost)[np.ix_(remaining, remaining)]
            links[: len(remaining), : len(remaining)] = kept_cost
            np.fill_diagonal(links, 0)
            links = links if links.any() else None
        speed, slots = self.speed, self.slots_per_device
        if slots is not None:
            slots = (*(slots[d] for d in remaining), *([max(slots)] * join))
        return Topology(
            len(remaining) + join,
            sizes,
            intra_node_bandwidth=inner.bandwidth,
            inter_node_bandwidth=outer.bandwidth,
            name=self.name,
            intra_node_latency=inner.latency,
            inter_node_latency=outer.latency,
            link_cost=links,
            speed=None if speed is None else [*(speed[d] for d in remaining), *([1.0] * join)],
            slots_per_device=slots,
        )

    @classmethod
    def preset(cls, machine: str, /, nodes: int = 1, **others: Any) -> Topology:
        """Return a common machine, such as ``"h100-nvl8-ib400"``, of some nodes.

        Parameters
        ----------
        machine
            Its name in ``presets.py``, which has the sources of the numbers.
        nodes
            Number of nodes.
        others
            Parameters of the class, which replace the machine's.

        Raises
        ------
        ValueError
            If there is no such machine, or it cannot have that many nodes.
        """
        check.one_of("preset", machine, MACHINES)
        nodes = check.whole_number("nodes", nodes, highest=check.DEVICE_LIMIT)
        numbers = MACHINES[machine]
        arguments: dict[str, Any] = {
            "devices": numbers.devices_per_node * nodes,
            **numbers._asdict(),
        }
        del arguments["memory"]
        arguments["name"] = machine if nodes == 1 else f"{machine}:{nodes}"
        return cls(**(arguments | others))

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """Read a topology from a JSON or TOML file.

        Its keys are the parameters of this class; each of ``tiers`` is a table with the parameters
        of ``Tier``. ``preset`` and ``nodes`` name a common machine, whose numbers the other keys
        replace.

        Raises
        ------
        ValueError
            If the file is neither, or describes no topology.
        OSError
            If it cannot be read.
        """
        path = check.path_in(path)
        with naming(path):
            return from_keys(parse(read_whole(path)))

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters that differ from their defaults, for ``from_keys``."""
        changed: dict[str, Any] = {
            parameter.name: as_json(getattr(self, parameter.name))
            for parameter in fields(self)
            if getattr(self, parameter.name) != parameter.default
            and not (self.tiers and parameter.name.startswith(LINKS))
        }
        return changed


def sum_by_node(table: NDArray[Any], topology: Topology) -> NDArray[Any]:
    """Sum numbers of devices [...,D] by node [...,N]."""
    if topology.has_equal_nodes:
        by_node = table.reshape(*table.shape[:-1], topology.nodes, topology.node_size)
        return np.asarray(by_node.sum(axis=-1))
    first = np.cumsum((0, *topology.node_sizes[:-1]))
    return np.asarray(np.add.reduceat(table, first, axis=-1))


def from_keys(values: Mapping[str, Any]) -> Topology:
    """Build a topology from the keys of a file, see ``Topology.load``."""
    values, keys = dict(values), [parameter.name for parameter in fields(Topology)]
    keys += ["preset", "nodes"] if "preset" in values else []
    for key in (key for key in values if key not in keys):
        hint = " (nodes needs preset)" if key == "nodes" else ""
        raise ValueError(f"keys must be out of {keys}, got {key!r}{hint}")
    if "tiers" in values:
        values["tiers"] = tuple(Tier(**tier) for tier in values["tiers"])
    if "preset" in values:
        return Topology.preset(values.pop("preset"), **values)
    return Topology(**values)


# Beginnings of the parameters that follow from tiers.
LINKS = ("devices_per_node", "intra_node", "inter_node")


# Largest cost: searches hold costs in 16 bits.
HIGHEST_COST = (1 << 16) - 1


def check_link_cost(values: ArrayLike, devices: int) -> NDArray[np.float64]:
    """Return a matrix of costs [D,D] as floats, checked."""
    array = check.array_in("link_cost", values)
    if array.shape != (devices, devices) or array.dtype.kind not in "iuf":
        raise ValueError(
            f"link_cost must be numbers [{devices}, {devices}], one per pair of devices, "
            f"got {check.shown(array)}"
        )
    cost: NDArray[np.float64] = array.astype(np.float64)
    for wrong, rule in (
        (~np.isfinite(cost), "finite"),
        (cost < 0, "at least 0"),
        (np.diag(np.diagonal(cost) != 0), "0 from a device to itself"),
        (cost != cost.T, "the same in both directions"),
    ):
        if wrong.any():
            a, b = (int(i) for i in np.argwhere(wrong)[0])
            cost_shown = f"{cost[a, b]:g} from device {a} to {b}"
            back = f" and {cost[b, a]:g} back" if rule.endswith("directions") else ""
            raise ValueError(f"link_cost must be {rule}, got {cost_shown}{back}")
    if devices > 1 and not cost.any():
        raise ValueError("link_cost must be above 0 for some pair of devices, got 0 for all")
    return cost


def scale_to_integers(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return costs as integers up to ``HIGHEST_COST``: in lowest terms if possible, else scaled."""
    if (cost == np.floor(cost)).all() and cost.max() < 2.0**53:
        integers = cost.astype(np.int64)
        integers //= max(np.gcd.reduce(integers, axis=None), 1)  # one device has no links
        if integers.max() <= HIGHEST_COST:
            return integers
    scaled = np.rint(cost * (HIGHEST_COST / cost.max())).astype(np.int64)
    return np.where(cost > 0, np.maximum(scaled, 1), 0)


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(content: bytes) -> dict[str, Any]:
    """Read JSON or TOML, told apart by the first character: no TOML file begins with a brace."""
    try:
        text = content.decode()
        return parse_json(text) if text.lstrip()[:1] == "{" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"must be a JSON object or TOML: {error}") from None
