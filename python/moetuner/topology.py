"""Topology: the devices a model is spread over, and what a byte costs between them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bytes per second and direction between two H100: NVLink 4 (900 GB/s both ways) inside a node, one 400 Gbit/s
# InfiniBand port per GPU between nodes (NVIDIA H100 and ConnectX-7 data sheets).
INTRA_NODE_BANDWIDTH = 450e9
INTER_NODE_BANDWIDTH = 50e9


@dataclass(frozen=True)
class Topology:
    """Devices in nodes of equal size.

    Parameters
    ----------
    devices
        Number of devices (expert-parallel ranks), D. Device d is in node ``d // devices_per_node``.
    devices_per_node
        Devices that share a fast link; all of them by default.
    intra_node_bandwidth, inter_node_bandwidth
        Bytes per second and direction between two devices of one node, and of different nodes.
    name
        Written into placements.

    Raises
    ------
    ValueError
        If a number is out of range or ``devices_per_node`` does not divide ``devices``.
    """

    devices: int
    devices_per_node: int | None = None
    intra_node_bandwidth: float = INTRA_NODE_BANDWIDTH
    inter_node_bandwidth: float = INTER_NODE_BANDWIDTH
    name: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= 65535:
            raise ValueError(f"devices must be from 1 to 65535, got {self.devices}")
        if self.devices_per_node is None:
            object.__setattr__(self, "devices_per_node", self.devices)
        if not 1 <= self.node_size <= self.devices or self.devices % self.node_size:
            raise ValueError(
                f"devices_per_node must divide devices ({self.devices}), got {self.devices_per_node}"
            )
        for field in ("intra_node_bandwidth", "inter_node_bandwidth"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"{field} must be a positive number of bytes per second, got {value}"
                )

    @property
    def node_size(self) -> int:
        """Devices per node."""
        assert self.devices_per_node is not None
        return self.devices_per_node

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.devices // self.node_size

    @property
    def node_of_device(self) -> NDArray[np.int64]:
        """Node of every device [D]."""
        return np.arange(self.devices) // self.node_size

    @property
    def bandwidth(self) -> NDArray[np.float64]:
        """Bytes per second from device to device [D,D]; infinite on the diagonal."""
        same_node = self.node_of_device[:, None] == self.node_of_device[None, :]
        bandwidth = np.where(same_node, self.intra_node_bandwidth, self.inter_node_bandwidth)
        np.fill_diagonal(bandwidth, np.inf)
        return bandwidth

    @property
    def cost(self) -> NDArray[np.int64]:
        """Integer cost of moving one token's state from device to device [D,D].

        Proportional to the time a byte takes, in sixteenths of the fastest link, reduced to lowest terms:
        1 between any two devices where all links are equal, 0 on the diagonal.
        """
        time = 1.0 / self.bandwidth
        if self.devices == 1:
            return np.zeros((1, 1), dtype=np.int64)
        fastest = time[time > 0].min()
        cost = np.rint(16 * time / fastest).astype(np.int64)
        return cost // np.gcd.reduce(cost, axis=None)

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """Read a topology from a JSON object whose keys are this class's parameters."""
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        known = set(cls.__dataclass_fields__)
        if not isinstance(fields, dict) or not set(fields) <= known:
            raise ValueError(
                f"{path}: a topology is a JSON object with keys out of {sorted(known)}"
            )
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
