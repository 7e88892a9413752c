"""What the self-test computes: one answer for each loop of the core that machines run differently.

Traffic is made of integers alone, so that no library and no processor has a say in it. Cases are
small, fixed in seed and steps, and without a clock. ``paper`` and ``exflow`` are left out: HiGHS,
which solves their programs, may choose another of equally good answers in another version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import evaluate
from moetuner.plugins.decision import rebalance_experts
from moetuner.problem import Problem
from moetuner.solver import solve
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

Arrays = Sequence[NDArray[Any]]
Case = Callable[["Traffic"], Arrays]

STEPS = 200
# Parts of a token that a table of a replay may count: a token starts on every one of 4 devices.
PARTS = 64
# Layers, experts, top-k and tokens. Sets of experts take one word, two, and lists.
SMALL = (6, 16, 2, 4_096)
MIDDLE = (4, 64, 6, 2_048)
WIDE = (2, 256, 8, 2_048)
WINDOW = 256
TOPICS = 8


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Compute a hash of every number: the finaliser of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def make_trace(layers: int, experts: int, top_k: int, tokens: int) -> RoutingTrace:
    """Return routing with topics: tokens of one topic want the same experts more often."""
    token = np.arange(tokens, dtype=np.uint64)[:, None, None]
    layer = np.arange(layers, dtype=np.uint64)[None, :, None]
    expert = np.arange(experts, dtype=np.uint64)[None, None, :]
    place = layer * np.uint64(experts) + expert
    sequence = token // np.uint64(32)
    topic = mix(sequence + np.uint64(1)) % np.uint64(TOPICS)
    liking = mix(topic * np.uint64(1 << 20) + place) % np.uint64(1 << 16)
    whim = mix((token << np.uint64(24)) + place + np.uint64(7)) % np.uint64(1 << 16)
    # The expert is part of the number that is sorted: no two are equal.
    score = np.sort((liking + whim) * np.uint64(experts) + expert, axis=2)
    ids = (score[:, :, : -top_k - 1 : -1] % np.uint64(experts)).astype(np.int64)
    return RoutingTrace.from_arrays(
        ids,
        num_experts=experts,
        sequence=sequence[:, 0, 0].astype(np.int64),
        group=(topic[:, 0, 0] % np.uint64(2)).astype(np.int64),
        group_names=("even", "odd"),
    )


@dataclass
class Traffic:
    """Traces and statistics of the cases, each made when first asked for.

    Parameters
    ----------
    threads
        Threads that count, solve and replay; all cores by default.
    """

    threads: int | None = None

    @cached_property
    def traces(self) -> dict[str, RoutingTrace]:
        """A trace of each size."""
        sizes = {"small": SMALL, "middle": MIDDLE, "wide": WIDE}
        return {name: make_trace(*size) for name, size in sizes.items()}

    @cached_property
    def statistics(self) -> dict[str, RoutingStatistics]:
        """Counts of each trace, in windows, by group."""
        return {name: self.count(name) for name in self.traces}

    def count(self, name: str) -> RoutingStatistics:
        """Count a trace."""
        return RoutingStatistics.from_trace(
            self.traces[name], window=WINDOW, sets=True, by_group=True, threads=self.threads
        )


def count(name: str) -> Case:
    """Return a case that gives every table of a trace's statistics."""

    def answer(traffic: Traffic) -> Arrays:
        statistics = traffic.statistics[name]
        tables = (statistics.window_load, statistics.coactivation, statistics.transitions)
        sets = statistics.sets or ()
        return [
            *(table for table in tables if table is not None),
            *(table for layer in sets for table in (layer.ids, layer.counts)),
        ]

    return answer


def place(name: str, method: Any, nodes: int = 1, devices: int = 4, **arguments: Any) -> Case:
    """Return a case that gives the slots of a placement."""

    def answer(traffic: Traffic) -> Arrays:
        topology = Topology(devices, devices_per_node=devices // nodes)
        problem = Problem(traffic.statistics[name], topology, **arguments)
        steps = STEPS if method in ("joint", "heuristic") else None
        result = solve(problem, method, iterations=steps, threads=traffic.threads)
        return [result.placement.slots]

    return answer


def replay(name: str) -> Case:
    """Return a case that gives every table of a replay."""

    def answer(traffic: Traffic) -> Arrays:
        topology = Topology(4, devices_per_node=2)
        problem = Problem(traffic.statistics[name], topology, objective="balance")
        placement = solve(problem, "eplb", threads=traffic.threads).placement
        figures = evaluate(
            placement, traffic.traces[name], topology, window=WINDOW, threads=traffic.threads
        )
        tables = [figures.traffic[table] * PARTS for table in sorted(figures.traffic)]
        return [np.rint(table).astype(np.int64) for table in tables]

    return answer


def decide(_: Traffic) -> Arrays:
    """Return what the plugins' policy decides on the loads of a map that it decided on before."""
    layers, experts, slots, ranks = 8, 64, 80, 8
    before, after = make_loads(1, layers, experts)
    running = rebalance_experts(before, slots, None, 2, ranks)
    return [rebalance_experts(after, slots, None, 2, ranks, running)]


def make_loads(windows: int, layers: int, experts: int) -> NDArray[np.int64]:
    """Return loads before and after popularity has drifted [2, windows, layers, experts]."""
    number = np.arange(2 * windows * layers * experts, dtype=np.uint64)
    popular = mix(number % np.uint64(layers * experts) + np.uint64(3)) % np.uint64(1 << 12)
    drift = mix(number + np.uint64(11)) % np.uint64(1 << 10)
    loads = (popular * popular // np.uint64(1 << 8) + drift).astype(np.int64)
    return loads.reshape(2, windows, layers, experts)


TRAFFIC: dict[str, Any] = {"objective": "traffic", "max_imbalance": 1.2}
FOLLOW: dict[str, Any] = {**TRAFFIC, "regime": "follow"}
BALANCE: dict[str, Any] = {"objective": "balance"}

# Further ones, of the same loops under other rules, are tests.
CASES: dict[str, Case] = {
    "counts of 16 experts": count("small"),
    "counts of 64 experts": count("middle"),
    "counts of 256 experts": count("wide"),
    "replay of 16 experts": replay("small"),
    "replay of 256 experts": replay("wide"),
    "eplb, balance, copies": place("middle", "eplb", 1, 8, **BALANCE, slots_per_device=10),
    "quick, balance, copies": place("wide", "quick", 1, 16, **BALANCE, slots_per_device=18),
    "heuristic, traffic": place("small", "heuristic", **TRAFFIC),
    "joint, time": place("small", "joint"),
    "joint, time, nodes": place("middle", "joint", 2, 8),
    "joint, time, copies": place("small", "joint", slots_per_device=5),
    "joint, balance, copies": place("small", "joint", **BALANCE, slots_per_device=5),
    "joint, traffic, dispatch": place("small", "joint", **TRAFFIC),
    "joint, traffic, follow, copies": place("small", "joint", **FOLLOW, slots_per_device=5),
    "policy, from a map": decide,
}
