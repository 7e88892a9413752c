"""Instances of all benchmarks: routing of the sizes of real models, made from a seed or recorded.

In made routing a token has a latent type (a few types are frequent, many are rare); in every layer
a type has its own liking for experts, on top of some experts being popular with all, and noise
decides the rest. So loads are skewed and transitions structured, as in real routing: what one layer
says about the type is what makes the next layer predictable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import moetuner as mt

Floats = NDArray[np.float64]

# name: layers, experts, top-k, devices
SIZES = {
    "paper": (32, 8, 2, 4),  # Mixtral-8x7B on four devices, the paper's size
    "paper/8": (8, 8, 2, 4),  # its first layers
    "24x32": (24, 32, 4, 4),
    "24x32/8": (24, 32, 4, 8),
    "26x64": (26, 64, 6, 8),
    "48x128": (48, 128, 8, 8),
    "58x256": (58, 256, 8, 32),
    "94x128": (94, 128, 8, 16),
    "61x384": (61, 384, 8, 72),
}


def routing(
    layers: int,
    experts: int,
    top_k: int,
    *,
    tokens: int = 20_000,
    types: int = 24,
    structure: float = 1.2,
    skew: float = 0.15,
    seed: int = 0,
) -> mt.RoutingTrace:
    """Route tokens [T,L,K] by their latent types.

    Parameters
    ----------
    structure, skew
        Spread of a type's liking and of popularity, in units of the noise (Gumbel, as in sampling).
    """
    random = np.random.default_rng(seed)
    share = np.arange(1, types + 1) ** -0.5
    type_of = random.choice(types, size=tokens, p=share / share.sum())
    ids = np.empty((tokens, layers, top_k), dtype=np.uint16)
    for layer in range(layers):
        popular = skew * random.normal(size=experts)
        liking = structure * random.normal(size=(types, experts))
        noise = random.gumbel(size=(tokens, experts))
        score = popular + liking[type_of] + noise
        ids[:, layer] = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
    return mt.RoutingTrace.from_arrays(ids, num_experts=experts)


def problem(
    name: str,
    *,
    layers: int | None = None,
    max_imbalance: float | None = 1.05,
    seed: int = 0,
    devices_per_node: int | None = None,
) -> mt.Problem:
    """Make the problem of a named size, or its first layers."""
    all_layers, experts, top_k, devices = SIZES[name]
    trace = routing(layers or all_layers, experts, top_k, seed=seed)
    return mt.Problem(
        mt.RoutingStatistics.from_trace(trace, window=None),
        mt.Topology(devices, devices_per_node=devices_per_node),
        regime="follow",
        max_imbalance=max_imbalance,
    )


DOMAINS = 10
# Standard deviations of log loads: of an expert over all traffic; of a domain from it, which has
# heavy tails; of a window from its domain, along directions that all windows or those of a domain
# share, and on its own. Chosen so that methods come near to what a real model of this size gave on
# 8, 16 and 32 devices: EPLB and FlashLB within 0.5 %, annealing on the maximum within 1.5 %,
# contiguous within 3.3 % (docs/experiments.md).
EXPERT, DOMAIN, TAILS, WINDOW = 0.385, 0.584, 6, 0.252
SHARED, SHARED_DIRECTIONS, DIRECTION, DIRECTIONS = 0.133, 4, 0.043, 3
# Of eight experts that a token visits, one gets no more than an eighth of all visits.
LARGEST_SHARE = 1 / 8
TOKENS = 8192 * 8


def domains(layers: int, windows: int, seed: int, experts: int = 256) -> Floats:
    """Make windows of load [W,L,E]; window w is of domain w modulo ten."""
    rng = np.random.default_rng(seed)
    size = (layers, experts)
    expert = rng.normal(0, EXPERT, size)
    tails = rng.standard_t(TAILS, (DOMAINS, *size)) * np.sqrt((TAILS - 2) / TAILS)
    shared = rng.normal(0, SHARED / np.sqrt(SHARED_DIRECTIONS), (SHARED_DIRECTIONS, *size))
    direction = rng.normal(0, DIRECTION, (DOMAINS, DIRECTIONS, *size))
    load = np.empty((windows, *size))
    for window in range(windows):
        domain = window % DOMAINS
        log = expert + DOMAIN * tails[domain] + rng.normal(0, WINDOW, size)
        for directions in (shared, direction[domain]):
            log += np.einsum("k,kle->le", rng.normal(0, 1, len(directions)), directions)
        share = np.exp(log)
        share = np.minimum(share / share.sum(axis=1, keepdims=True), LARGEST_SHARE)
        load[window] = rng.poisson(share / share.sum(axis=1, keepdims=True) * TOKENS)
    return load


# Standard deviation of the logarithm of drifting loads, and tokens of a layer in a window.
SPREAD, DRIFTING_TOKENS = 0.8, 2**24


def drifting(
    layers: int, experts: int, windows: int, drift: float, seed: int, sizes: str = "alike"
) -> Floats:
    """Make windows of load [W,L,E], each drifted from the one before.

    The logarithm of an expert's load is an autoregressive process, whose steps are ``drift`` times
    its spread. ``sizes`` of windows are ``alike`` or one of ``window_tokens``.
    """
    random = np.random.default_rng(seed)
    tokens = window_tokens(sizes, windows, seed)
    state = random.normal(0, SPREAD, (layers, experts))
    load = np.empty((windows, layers, experts))
    for window in range(windows):
        share = np.exp(state)
        load[window] = random.poisson(tokens[window] * share / share.sum(axis=1, keepdims=True))
        state = np.sqrt(1 - drift**2) * state + drift * random.normal(0, SPREAD, state.shape)
    return load


# Fewest and most tokens of windows of very unlike size, at eight experts a token.
FEWEST, MOST = 200 * 8, 20_000 * 8
# Windows of a day.
DAY = 12


def window_tokens(sizes: str, windows: int, seed: int) -> Floats:
    """Return how often windows visit experts of a layer [W].

    ``alike``, ``scattered`` (the logarithm uniform), ``alternating`` between few and many, ``one in
    ten`` of many, or a ``day`` from few to many and back.
    """
    at = np.arange(windows)
    ratio = MOST / FEWEST
    if sizes == "alike":
        return np.full(windows, float(DRIFTING_TOKENS))
    if sizes == "scattered":
        return FEWEST * ratio ** np.random.default_rng([seed, 1]).random(windows)
    if sizes == "day":
        return FEWEST * ratio ** (0.5 - 0.5 * np.cos(2 * np.pi * at / DAY))
    return np.where(at % {"alternating": 2, "one in ten": 10}[sizes], FEWEST, MOST).astype(float)


@dataclass(frozen=True)
class Instance:
    """Traffic to be placed: a trace, or windows of load; devices, and slots of each in a layer.

    ``groups`` of experts are what hierarchical policies keep on a node.
    """

    name: str
    traffic: mt.RoutingTrace | mt.RoutingStatistics
    topology: mt.Topology
    width: int
    groups: int = 1

    def __str__(self) -> str:
        devices, nodes = self.topology.devices, self.topology.nodes
        where = f"{nodes} x {devices // nodes}" if nodes > 1 else f"{devices}"
        size = f"{self.traffic.layers} x {self.traffic.num_experts}"
        return f"{self.name}: {size} on {where} devices of {self.width} slots"

    def halves(self, seed: int) -> tuple[mt.RoutingTrace, ...] | tuple[mt.RoutingStatistics, ...]:
        """Return the half that is seen, chosen at random among sequences or windows; the other."""
        if isinstance(self.traffic, mt.RoutingTrace):
            return self.traffic.split(0.5, seed=seed)
        order = np.random.default_rng(seed).permutation(self.traffic.windows)
        half, group = len(order) // 2, self.traffic.group
        return tuple(
            replace(
                self.traffic,
                window_load=self.traffic.window_load[part],
                group=None if group is None else group[part],
            )
            for part in (np.sort(order[:half]), np.sort(order[half:]))
        )


def bundled() -> Instance:
    """Return the trace that comes with the package, on four devices."""
    file = resources.files("moetuner") / "data" / "small-moe.safetensors"
    with resources.as_file(file) as path:
        trace = mt.RoutingTrace.load(path)
    return Instance("bundled trace", trace, mt.Topology(4), trace.num_experts // 4)


def in_domains(layers: int = 58, windows: int = 80) -> Instance:
    """Return windows of ten domains, with copies on four nodes of eight devices."""
    load = domains(layers, windows, 0)
    names = tuple(f"domain {number}" for number in range(DOMAINS))
    group = np.arange(windows) % DOMAINS
    counts = mt.RoutingStatistics.from_load(load.astype(np.uint64), group=group, group_names=names)
    return Instance("domains", counts, mt.Topology(32, devices_per_node=8), 9, groups=8)


# Files of traffic that was recorded from real models.
RECORDED = (
    "gpt-oss-20b.npz",
    "qwen3-30b-a3b-languages.npz",
    "mixtral-8x7b-mmlu.npz",
    "deepseek-v3-phases.npz",
)


def recorded(data: Path) -> Iterator[Instance]:
    """Give what was recorded of real models, of the files that are in a folder."""
    path = data / RECORDED[0]
    if path.exists():
        trace = mt.RoutingTrace.load(path)
        for devices, per_node in ((2, None), (4, None), (8, None), (8, 4)):
            topology = mt.Topology(devices, devices_per_node=per_node)
            groups = 1 if per_node is None else 8
            width = trace.num_experts // devices
            yield Instance("gpt-oss-20b", trace, topology, width, groups)
    for file, topology, width, groups, joined in (
        (RECORDED[1], mt.Topology(16), 9, 1, 1),
        (RECORDED[2], mt.Topology(4), 3, 1, 64),
        (RECORDED[3], mt.Topology(32, devices_per_node=8), 9, 8, 1),
    ):
        path = data / file
        if path.exists():
            counts = _joined(mt.RoutingStatistics.load(path), joined)
            yield Instance(path.stem, counts, topology, width, groups)


def _joined(counts: mt.RoutingStatistics, windows: int) -> mt.RoutingStatistics:
    """Add up so many neighbouring windows of a group; what is left over is left out."""
    if windows == 1 or counts.group is None:
        return counts
    load, group = [], []
    for number in np.unique(counts.group):
        members = np.flatnonzero(counts.group == number)
        runs = members[: len(members) // windows * windows].reshape(-1, windows)
        load += [counts.window_load[run].sum(axis=0) for run in runs]
        group += [number] * len(runs)
    return replace(counts, window_load=np.stack(load), group=np.array(group))
