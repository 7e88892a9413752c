"""Replay: evaluate() against the same figures from numpy, on one thread and on all, in one run.

    python bench/replay.py [--repeat 5] [--window 512]

numpy works layer by layer, without a loop over tokens; both must find the same numbers.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
from harness import Table, arguments, in_turns
from numpy.typing import NDArray
from transitions import routing

import moetuner as mt

# tokens, layers, top-k, experts, devices, devices per node
ROWS = [(100_000, 24, 4, 32, 8, 4), (60_000, 48, 8, 128, 16, 8)]


@dataclass
class Figures:
    """Load [W,L,D], pairs from device to device [L-1,D,D], visits [L,D], fanout and node fanout."""

    load: NDArray[np.int64]
    follow: NDArray[np.int64]
    visits: NDArray[np.int64]
    fanout: float
    node_fanout: float

    @property
    def crossing(self) -> float:
        total = self.follow.sum()
        return float((total - np.einsum("ldd->", self.follow)) / total)

    @property
    def imbalance(self) -> float:
        return float((self.load.max(axis=2) / self.load.mean(axis=2)).mean())


def distinct(values: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a value is the first of its kind in sorted rows."""
    first = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=first[:, 1:])
    return first


def with_numpy(
    ids: NDArray[np.uint8], device_of: NDArray[np.uint8], node_of: NDArray[np.uint8], window: int
) -> Figures:
    """Replay expert ids [T,L,K] with the device of every expert [L,E]."""
    tokens, layers, _ = ids.shape
    devices = len(node_of)
    windows = -(-tokens // window)
    row_of_token = (np.arange(tokens) // window * devices)[:, None]
    load = np.empty((windows, layers, devices), dtype=np.int64)
    follow = np.empty((layers - 1, devices, devices), dtype=np.int64)
    visits = np.empty((layers, devices), dtype=np.int64)
    node_visits = 0
    before: NDArray[np.int64] | None = None
    for layer in range(layers):
        here = np.take(device_of[layer], ids[:, layer])
        counts = np.bincount((row_of_token + here).ravel(), minlength=windows * devices)
        load[:, layer] = counts.reshape(windows, devices)
        ordered = np.sort(here, axis=1)
        visits[layer] = np.bincount(ordered[distinct(ordered)], minlength=devices)
        # Nodes are runs of devices, so their order is that of the devices.
        node_visits += int(np.count_nonzero(distinct(np.take(node_of, ordered))))
        if before is not None:
            pairs = before[:, :, None] + here[:, None, :]
            table = np.bincount(pairs.ravel(), minlength=devices * devices)
            follow[layer - 1] = table.reshape(devices, devices)
        before = here.astype(np.int64) * devices
    per_token = tokens * layers
    return Figures(load, follow, visits, int(visits.sum()) / per_token, node_visits / per_token)


def check(ours: mt.Evaluation, theirs: Figures) -> None:
    assert np.array_equal(ours.traffic["follow"], theirs.follow)
    visits = ours.traffic["dispatch"].sum(axis=1) * len(theirs.visits[0])
    assert np.allclose(visits, theirs.visits * (len(theirs.visits[0]) - 1))
    assert ours.fanout == theirs.fanout
    assert ours.node_fanout == theirs.node_fanout
    assert ours.crossing == theirs.crossing
    assert np.isclose(ours.imbalance, theirs.imbalance, rtol=1e-12)


def main() -> None:
    """Print a row per size and number of threads."""
    given = arguments(__doc__, repeat=5, window=512)
    window = given.window
    row = Table(
        *("tokens x layers x top-k of experts, devices <44", "threads 7s", "moetuner, ms 12.1f"),
        *("numpy, ms 10.1f", "ratio 7.1f"),
    )
    for tokens, layers, top_k, experts, devices, per_node in ROWS:
        ids = routing(tokens, layers, top_k, experts)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
        generator = np.random.default_rng(0)
        even = np.arange(experts) % devices
        device_of = np.stack([generator.permutation(even) for _ in range(layers)])
        placement = mt.Placement.from_assignment(device_of, devices)
        topology = mt.Topology(devices, devices_per_node=per_node)
        devices_in_bytes = device_of.astype(np.uint8)
        node_of = topology.node_of_device.astype(np.uint8)

        def ours(
            threads: int | None,
            placement: mt.Placement = placement,
            trace: mt.RoutingTrace = trace,
            topology: mt.Topology = topology,
        ) -> mt.Evaluation:
            return mt.evaluate(
                placement, trace, topology, window=window, mixed=False, threads=threads
            )

        def peer(
            ids: NDArray[np.uint8] = ids,
            device_of: NDArray[np.uint8] = devices_in_bytes,
            node_of: NDArray[np.uint8] = node_of,
        ) -> Figures:
            return with_numpy(ids, device_of, node_of, window)

        check(ours(1), peer())
        assert ours(1).to_dict() == ours(None).to_dict()
        works = {"numpy": peer, "1": lambda: ours(1), "all": lambda: ours(None)}
        times = in_turns(works, given.repeat)
        label = f"{tokens} x {layers} x {top_k} of {experts}, {devices}"
        theirs = times.pop("numpy")
        for threads, mine in times.items():
            ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
            medians = (1e3 * statistics.median(of) for of in (mine, theirs))
            row(label, threads, *medians, ratio)


if __name__ == "__main__":
    main()
