"""How fast the core is beside named peers, and what a solve takes as its input doubles.

    python bench/scale.py [transitions sets text replay axes limits stream] [--turns 3] [--record]
    python bench/scale.py stream --bytes 50000000000
    python bench/scale.py effort [--names crossing] [--default-only]

*Transitions*: tables of pairs against numpy's bincount. *Sets*: distinct expert sets against
numpy's unique, and beside counting without them. *Text*: JSON lines of moetuner and of
Megatron-Core, and CSV; beside them Python's json on the same lines, thrown away. *Replay*:
`evaluate` against the same figures from numpy, layer by layer without a loop over tokens. Both
sides have the same input, must find the same numbers, and take turns. Figures are medians, with
quartiles in brackets: of processor time on one thread, which a busy machine distorts less, and by
the clock where all threads work. Wanted: transitions 20x up to 64 experts and 10x beyond, text at
200 MB/s, replay 50x.

*Axes*: a base problem (12 layers x top-4 of 128 experts on 8 devices, 16 windows of 512 tokens),
and one of its sizes doubled again and again; the last row is 94 layers x top-10 of 512 experts on
320 devices. Seconds are of `solve` at default effort without a limit, by the clock and of the
processor, the median of turns; the peak is the memory of a process that loads the statistics and
solves; *of contiguous* is the objective over that of the contiguous placement, *gap* that to the
proven bound. Slopes are of the logarithm over the logarithm of the size: 1 is proportional.

*Limits*: seconds of a call by the clock, what it is beyond its limit, and the processor's seconds
after the limit, which other jobs do not stretch. ``*`` marks what took longer than limit + 10 % +
0.2 s; *worse* an answer behind what ``balance`` places. *Effort*: default beside thorough, without
a limit, on the scorecard's cases; half an hour, so it runs if it is named.

*Stream*: a generated trace (58 layers, top-8 of 256) on disk, counted as one recording by one
process: peak memory, and GB/s beside reading it. Beyond ``--shard-bytes`` shards are links to the
first one, and its pages leave the cache all the time; what really came from the disk is counted by
the kernel. All files are deleted at the end, also on Ctrl-C. Wanted: 512 MiB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Report, benchmark, in_turns, spread, timed
from instances import routing
from numpy.typing import NDArray

import moetuner as mt
from moetuner.files import safetensors
from moetuner.solver.stages.floor import balanced
from moetuner.statistics.limits import LAYER_SETS

BLOCK = 1 << 12
Ids = NDArray[np.uint8] | NDArray[np.uint16]


class Taken(NamedTuple):
    """What came out of some work in a process, and the most memory of that process in MiB."""

    result: Any
    seconds: float
    cpu: float
    peak: float
    imports: float


def _measured(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Taken:
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    taken = timed(lambda: work(*arguments))
    return Taken(*taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, imports)


def alone(work: Callable[..., Any], *arguments: Any) -> Taken:
    """Do some work in a process of its own.

    A process that a program starts inherits the peak of its parent; one that a server forks does
    not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moetuner"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, work, arguments).result()


def written(path: Path, size: int, layers: int, top_k: int, experts: int) -> Path:
    """Write a trace of so many bytes: one block of skewed routing over and over.

    What is counted does not change the time.
    """
    tokens = max(size // (layers * top_k), 1)
    rng = np.random.default_rng(0)
    block = np.empty((min(BLOCK, tokens), layers, top_k), np.uint8)
    for layer in range(layers):
        score = rng.gumbel(size=(len(block), experts)) + rng.normal(size=experts)
        block[:, layer] = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for first in range(0, tokens, BLOCK):
            yield block[: tokens - first]

    metadata = {"format": "moetuner.trace", "version": "1", "num_experts": str(experts)}
    shape = (tokens, layers, top_k)
    safetensors.write(path, {"expert_ids": (np.dtype(np.uint8), shape, tiles())}, metadata)
    return path


# --- peers

# tokens, layers, top-k, experts
TRANSITIONS = [
    (200_000, 32, 2, 8),
    (100_000, 24, 4, 32),
    (100_000, 16, 8, 64),
    (60_000, 48, 8, 128),
    (40_000, 58, 8, 256),
    (20_000, 16, 8, 384),
    (20_000, 16, 8, 512),
    (20_000, 16, 4, 512),
]
# tokens, layers, top-k, experts, devices, devices per node
REPLAYS = [(100_000, 24, 4, 32, 8, 4), (60_000, 48, 8, 128, 16, 8)]
# Tokens of a window in a replay.
STEP = 512
# Tokens, layers, top-k and experts of the lines that text repeats.
LINES = (4096, 24, 8, 64)
CSV_HEAD = "token,layer,expert,sequence\n"


def ratio(own: list[float], theirs: list[float]) -> float:
    """Return the median of what turns of a peer took, over those of ours."""
    return statistics.median(theirs) / statistics.median(own)


def milliseconds(seconds: list[float]) -> str:
    """Return median and quartiles."""
    return spread([1e3 * turn for turn in seconds])


def transitions_of(ids: Ids, experts: int) -> NDArray[np.int64]:
    """Count transitions [L-1,E,E] by one bincount per pair of layers."""
    layers = ids.shape[1]
    tables = np.empty((layers - 1, experts, experts), dtype=np.int64)
    for layer in range(layers - 1):
        left, right = ids[:, layer].astype(np.int64), ids[:, layer + 1].astype(np.int64)
        pairs = left[:, :, None] * experts + right[:, None, :]
        tables[layer] = np.bincount(pairs.ravel(), minlength=experts * experts).reshape(experts, -1)
    return tables


def transitions(report: Report, asked: Any) -> None:
    """Print a row per size."""
    row = report.table(
        "Transitions, one thread each, ms of the processor",
        "tokens x layers x top-k of experts <36",
        "moetuner <24",
        "numpy <28",
        "ratio 6.1f",
    )
    for tokens, layers, top_k, experts in TRANSITIONS:
        tokens = max(int(tokens * asked.share), 1)
        trace = routing(layers, experts, top_k, tokens=tokens, skew=SKEW)
        ids = trace.expert_ids[:]

        def ours(trace: mt.RoutingTrace = trace) -> mt.RoutingStatistics:
            return mt.RoutingStatistics.from_trace(
                trace, window=None, coactivation=False, sets=False, threads=1
            )

        def peer(ids: Ids = ids, experts: int = experts) -> NDArray[np.int64]:
            return transitions_of(ids, experts)

        assert np.array_equal(ours().transitions, peer())
        own, theirs = in_turns({"ours": ours, "numpy": peer}, asked.turns, processor=True).values()
        name = f"{tokens} x {layers} x {top_k} of {experts}"
        row(name, milliseconds(own), milliseconds(theirs), ratio(own, theirs))


def sets_of(ids: Ids, experts: int) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Count the sets of every layer: each as a number of its rising ids."""
    factors = experts ** np.arange(ids.shape[2], dtype=np.int64)[::-1]
    numbers = np.sort(ids, axis=2).astype(np.int64) @ factors
    return [np.unique(layer, return_counts=True) for layer in numbers.T]


def sets(report: Report, asked: Any) -> None:
    """Print a row per size whose sets fit a number."""
    row = report.table(
        "Pairs of a layer and expert sets, one thread each, ms of the processor",
        "tokens x layers x top-k of experts <36",
        "moetuner <24",
        "without sets <24",
        "numpy's sets alone <28",
        "to without 10.1f",
        "numpy to what sets add 22.1f",
    )
    for tokens, layers, top_k, experts in TRANSITIONS:
        if experts**top_k >= 2**63:
            continue
        # Of more tokens a sample would be counted.
        tokens = min(max(int(tokens * asked.share), 1), LAYER_SETS)
        trace = routing(layers, experts, top_k, tokens=tokens, skew=SKEW)
        ids = trace.expert_ids[:]
        count = partial(mt.RoutingStatistics.from_trace, trace, threads=1)
        found = count().sets
        assert found is not None
        for of_layer, (_, counts) in zip(found, sets_of(ids, experts), strict=True):
            assert np.array_equal(of_layer.counts, counts)
        works: dict[str, Callable[[], object]] = {
            "ours": count,
            "without": partial(count, sets=False),
            "numpy": partial(sets_of, ids, experts),
        }
        taken = in_turns(works, asked.turns, processor=True)
        name = f"{tokens} x {layers} x {top_k} of {experts}"
        shown = [milliseconds(seconds) for seconds in taken.values()]
        own, without, peer = (statistics.median(seconds) for seconds in taken.values())
        row(name, *shown, own / without, peer / (own - without))


def megatron_lines(ids: Ids) -> Iterator[str]:
    """Give the lines of Megatron's router trace."""
    for layer in range(ids.shape[1]):
        fields = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
        fields |= {"num_tokens": len(ids), "topk": ids.shape[2]}
        yield json.dumps(fields | {"top_indices": ids[:, layer].tolist()}) + "\n"


def own_lines(ids: Ids, per: str) -> Iterator[str]:
    """Give lines of moetuner's own, of a token or of 64."""
    for at, token in enumerate(ids):
        labels: dict[str, Any] = {"sequence": at // 64, "group": "ab"[at // 64 % 2]}
        if per == "token":
            yield json.dumps({"experts": token.tolist(), **labels}, separators=(",", ":")) + "\n"
        elif at % 64 == 0:
            tokens = ids[at : at + 64].tolist()
            yield json.dumps({"tokens": tokens, **labels}, separators=(",", ":")) + "\n"


def csv_lines(ids: Ids) -> Iterator[str]:
    """Give lines of CSV."""
    for token, layer in np.ndindex(ids.shape[:2]):
        for expert in ids[token, layer]:
            yield f"{token},{layer},{expert},{token // 64}\n"


def text(report: Report, asked: Any) -> None:
    """Print a row per form of text."""
    tokens, layers, top_k, experts = LINES
    ids = routing(layers, experts, top_k, tokens=tokens, skew=SKEW).expert_ids[:]
    head = f'{{"num_experts": {experts}}}\n'
    forms: dict[str, tuple[str, str, Iterator[str], bool]] = {
        "JSON lines per token": ("t.jsonl", head, own_lines(ids, "token"), True),
        "JSON lines per sequence": ("s.jsonl", head, own_lines(ids, "sequence"), True),
        "Megatron's router trace": ("router_trace_rank0.jsonl", "", megatron_lines(ids), True),
        # Tokens are numbered through: no part of it can stand there again.
        "CSV": ("rows.csv", CSV_HEAD, csv_lines(ids[: asked.megabytes * 111]), False),
    }
    row = report.table(
        f"Text of {asked.megabytes} MB, MB/s of a processor",
        "form <24",
        "moetuner <24",
        "Python's json <24",
        "ratio 6.1f",
    )
    with tempfile.TemporaryDirectory() as folder:
        for form, (name, first, written_lines, repeats) in forms.items():
            path, lines = Path(folder) / name, "".join(written_lines)
            times = max(1, asked.megabytes * 10**6 // len(lines)) if repeats else 1
            path.write_text(first + lines * times)
            works: dict[str, Callable[[], object]] = {
                "ours": lambda path=path: mt.open_input(path, num_experts=experts)
            }
            if repeats:
                each = path.read_bytes().splitlines()
                works["json"] = lambda each=each: [json.loads(line) for line in each]
            taken = in_turns(works, asked.turns, processor=True)
            size = path.stat().st_size / 1e6
            speeds = [spread([size / turn for turn in seconds], 0) for seconds in taken.values()]
            compared = [ratio(taken["ours"], taken["json"])] if repeats else ["-", "-"]
            row(form, *speeds, *compared)


@dataclass
class Figures:
    """Load [W,L,D], pairs from device to device [L-1,D,D], visits [L,D], fanout and node fanout."""

    load: NDArray[np.int64]
    follow: NDArray[np.int64]
    visits: NDArray[np.int64]
    fanout: float
    node_fanout: float
    # Those that tokens fill.
    windows: int

    @property
    def crossing(self) -> float:
        """Share of pairs that leave their device."""
        total = self.follow.sum()
        return float((total - np.einsum("ldd->", self.follow)) / total)

    @property
    def imbalance(self) -> float:
        """Largest / mean load, the mean over whole windows and layers."""
        whole = self.load[: self.windows]
        return float((whole.max(axis=2) / whole.mean(axis=2)).mean())


def distinct(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a value is the first of its kind in sorted rows."""
    first = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=first[:, 1:])
    return first


def replayed(
    ids: Ids, device_of: NDArray[np.uint8], node_of: NDArray[np.uint8], window: int
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
    fanouts = int(visits.sum()) / per_token, node_visits / per_token
    return Figures(load, follow, visits, *fanouts, max(tokens // window, 1))


def check(ours: mt.Evaluation, theirs: Figures) -> None:
    """Assert that both found the same."""
    assert np.array_equal(ours.traffic["follow"], theirs.follow)
    visits = ours.traffic["dispatch"].sum(axis=1) * len(theirs.visits[0])
    assert np.allclose(visits, theirs.visits * (len(theirs.visits[0]) - 1))
    assert ours.fanout == theirs.fanout
    assert ours.node_fanout == theirs.node_fanout
    assert ours.crossing == theirs.crossing
    assert np.isclose(ours.imbalance, theirs.imbalance, rtol=1e-12)


def replay(report: Report, asked: Any) -> None:
    """Print a row per size and number of threads."""
    row = report.table(
        "Replay of a placement, ms: of the processor on one thread, by the clock on all",
        "tokens x layers x top-k of experts, devices <44",
        "threads 7s",
        "moetuner <24",
        "numpy <28",
        "ratio 6.1f",
    )
    for tokens, layers, top_k, experts, devices, per_node in REPLAYS:
        tokens = max(int(tokens * asked.share), 1)
        trace = routing(layers, experts, top_k, tokens=tokens, skew=SKEW)
        ids = trace.expert_ids[:]
        generator = np.random.default_rng(0)
        even = np.arange(experts) % devices
        device_of = np.stack([generator.permutation(even) for _ in range(layers)])
        placement = mt.Placement.from_assignment(device_of, devices)
        topology = mt.Topology(devices, devices_per_node=per_node)
        bytes_of = device_of.astype(np.uint8), topology.node_of_device.astype(np.uint8)

        def ours(
            threads: int | None,
            placement: mt.Placement = placement,
            trace: mt.RoutingTrace = trace,
            topology: mt.Topology = topology,
        ) -> mt.Evaluation:
            return mt.evaluate(
                placement, trace, topology, window=STEP, mixed=False, threads=threads
            )

        def peer(
            ids: Ids = ids, devices_and_nodes: tuple[NDArray[np.uint8], ...] = bytes_of
        ) -> Figures:
            return replayed(ids, *devices_and_nodes, STEP)

        check(ours(1), peer())
        assert ours(1).to_dict() == ours(None).to_dict()
        for name, threads in (("1", 1), ("all", None)):
            works = {"ours": lambda threads=threads: ours(threads), "numpy": peer}
            own, theirs = in_turns(works, asked.turns, processor=name == "1").values()
            label = f"{tokens} x {layers} x {top_k} of {experts}, {devices}"
            row(label, name, milliseconds(own), milliseconds(theirs), ratio(own, theirs))


# --- axes


class Point(NamedTuple):
    """Sizes of a problem."""

    layers: int = 12
    experts: int = 128
    devices: int = 8
    windows: int = 16
    tokens: int = 8192
    top_k: int = 4
    slots: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.layers} x {self.experts} on {self.devices}, "
            f"{self.tokens} tokens in {self.windows} windows"
        )


BASE = Point()
# Some experts are popular with all tokens, as in recordings.
SKEW = 0.6
LARGEST = Point(94, 512, 320, 64, 16_384, 10, 2)
AXES = {
    "layers": [6, 12, 24, 48, 96],
    "experts": [64, 128, 256, 512],
    "devices": [4, 8, 16, 32, 64],
    "windows": [16, 64, 256, 1024, 4096],
    "tokens": [4096, 8192, 16_384, 32_768, 65_536],
}
GOALS: dict[str, dict[str, Any]] = {
    "time": {"objective": "time"},
    "crossing": {"objective": "traffic", "regime": "follow", "max_imbalance": 1.05},
}


def counted(point: Point, path: Path) -> float:
    """Count generated routing into a file, and return the processor's seconds of it."""
    trace = routing(point.layers, point.experts, point.top_k, tokens=point.tokens, skew=SKEW)
    window = -(-point.tokens // point.windows)
    statistics, _, cpu = timed(lambda: mt.RoutingStatistics.from_trace(trace, window=window))
    statistics.save(path)
    return cpu


def searched(path: Path, point: Point, goal: str) -> tuple[float, float, float, float | None]:
    """Return seconds by the clock and of the processor, the part of contiguous, and the gap."""
    problem = mt.Problem(
        mt.RoutingStatistics.load(path),
        mt.Topology(point.devices),
        slots_per_device=point.slots,
        **GOALS[goal],
    )
    result, seconds, cpu = timed(lambda: mt.solve(problem))
    contiguous = mt.solve(problem, "contiguous").objective
    return seconds, cpu, result.objective / contiguous, result.gap


def axes(report: Report, asked: Any) -> None:
    """Print a row for every size of every axis, and slopes."""
    points = [
        (axis, BASE._replace(**{axis: size}))
        for axis, sizes in AXES.items()
        for size in sizes[: asked.doublings + 1]
    ]
    points += [("largest", LARGEST)] if asked.doublings >= 3 else []
    slopes: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    known: dict[tuple[str, Point], list[Taken]] = {}  # the base is on every axis
    with tempfile.TemporaryDirectory() as folder:
        for goal in asked.goals:
            row = report.table(
                f"Solve for {goal}",
                "axis <8",
                "layers x experts on devices, windows <46",
                "seconds 8.2f",
                "CPU-s 8.2f",
                "peak, MiB 9.0f",
                "of contiguous 13.3f",
                "gap 7.1%",
            )
            for axis, point in points:
                path = Path(folder) / "-".join(map(str, point))
                if not path.exists():
                    alone(counted, point, path)
                if (goal, point) not in known:
                    turns = [alone(searched, path, point, goal) for _ in range(asked.repeat)]
                    known[goal, point] = turns
                turns = known[goal, point]
                seconds, cpu = np.median([turn.result[:2] for turn in turns], axis=0)
                peak, imports = turns[0].peak, turns[0].imports
                _, _, part, gap = turns[0].result
                row(axis, str(point), seconds, cpu, peak, part, "-" if gap is None else gap)
                if axis in AXES:
                    size = float(getattr(point, axis))
                    slopes.setdefault((goal, axis), []).append((size, seconds, cpu, peak - imports))
    row = report.table(
        "Slopes of the logarithms",
        "goal <9",
        "axis <8",
        "from 8.0f",
        "to 8.0f",
        "seconds 8.2f",
        "CPU-s 8.2f",
        "memory 8.2f",
    )
    for (goal, axis), rows in slopes.items():
        if len(rows) > 1:
            size, *figures = np.log(np.maximum(rows, 1e-3)).T
            slope = (np.polyfit(size, figure, 1)[0] for figure in figures)
            row(goal, axis, rows[0][0], rows[-1][0], *slope)


# --- limits

# name: layers, experts, top-k, tokens, tokens of a window, what is counted.
Traffic = tuple[int, int, int, int, int | None, dict[str, bool]]
SETS = {"transitions": False, "coactivation": True, "sets": True}
PAIRS = {"transitions": True, "coactivation": True, "sets": False}
LOADS = {"transitions": False, "coactivation": False, "sets": False}
TRAFFIC: dict[str, Traffic] = {
    "61x384 sets": (61, 384, 8, 16_384, None, SETS),
    "61x384 pairs": (61, 384, 8, 16_384, 256, PAIRS),
    "94x512 loads": (94, 512, 10, 8_192, 256, LOADS),
    "24x32 all": (24, 32, 4, 20_000, 1024, {"sets": True}),
}
# name: traffic, nodes, devices of a node, method, arguments of the problem.
Instance = tuple[str, int, int, str, dict[str, Any]]
CAPPED = {"objective": "traffic", "max_imbalance": 1.05}
FOLLOW = {**CAPPED, "regime": "follow"}
COPIES = {"slots_per_device": 6}
WORST = {"objective": "balance", "risk": 0.9, **COPIES}
INSTANCES: dict[str, Instance] = {
    "61x384 on 9x8, visits": ("61x384 sets", 9, 8, "joint", CAPPED),
    "61x384 on 9x8, visits, copies": ("61x384 sets", 9, 8, "joint", {**CAPPED, **COPIES}),
    "61x384 on 9x8, time": ("61x384 sets", 9, 8, "joint", {"objective": "time"}),
    "61x384 on 9x8, time, copies": (
        "61x384 sets",
        9,
        8,
        "joint",
        {"objective": "time", **COPIES},
    ),
    "61x384 on 72, time, follow": (
        "61x384 pairs",
        1,
        72,
        "joint",
        {"objective": "time", "regime": "follow"},
    ),
    "61x384 on 72, crossing": ("61x384 pairs", 1, 72, "joint", FOLLOW),
    "61x384 on 72, paper": ("61x384 pairs", 1, 72, "paper", FOLLOW),
    "61x384 on 72, minimax": ("61x384 pairs", 1, 72, "joint", WORST),
    "94x512 on 320x2, balance": (
        "94x512 loads",
        1,
        320,
        "joint",
        {"objective": "balance", "slots_per_device": 2},
    ),
    "24x32 on 8, visits": ("24x32 all", 1, 8, "joint", CAPPED),
    "24x32 on 8, crossing": ("24x32 all", 1, 8, "joint", FOLLOW),
    "24x32 on 2x4x5, time": (
        "24x32 all",
        2,
        4,
        "joint",
        {"objective": "time", "slots_per_device": 5},
    ),
}


def traffic(name: str, path: Path) -> None:
    """Write generated statistics."""
    layers, experts, top_k, tokens, window, counts = TRAFFIC[name]
    trace = routing(layers, experts, top_k, tokens=tokens)
    mt.RoutingStatistics.from_trace(trace, window=window, **counts).save(path)


def limited(name: str, path: Path, limit: float) -> dict[str, Any]:
    """Solve an instance under a limit, and return what is printed."""
    _, nodes, per_node, method, rules = INSTANCES[name]
    topology = mt.Topology(nodes * per_node, devices_per_node=per_node)
    problem = mt.Problem(mt.RoutingStatistics.load(path), topology, **rules)
    late: list[float] = []
    watch = threading.Timer(limit, lambda: late.append(time.process_time()))
    watch.daemon = True
    watch.start()
    result, seconds, _ = timed(lambda: mt.solve(problem, method, time_limit=limit))
    at_end = time.process_time()
    watch.cancel()
    start = mt.Placement(balanced(problem), num_experts=problem.num_experts)
    excess = [
        float(problem.caps.excess(placement).sum()) for placement in (result.placement, start)
    ]
    value = problem.objective_function.value(start)
    worse = method == "joint" and (excess[0], result.objective) > (excess[1], value)
    return {
        "seconds": seconds,
        "late": at_end - late[0] if late else 0.0,
        "objective": result.objective,
        "start": value,
        "status": result.status + (" worse" if worse else ""),
    }


def limits(report: Report, asked: Any) -> None:
    """Print a row for every instance and limit."""
    row = report.table(
        "Solves under a limit, seconds",
        "instance <30",
        "limit 6.2f",
        "took 7.2f",
        "beyond 8.2f",
        "mark <4",
        "CPU-s late 10.2f",
        "objective 10.4f",
        "balance places 14.4f",
        "status <24",
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (counts, *_) in INSTANCES.items():
            if asked.names and not any(part in name for part in asked.names):
                continue
            path = Path(folder) / counts.replace(" ", "-")
            if not path.exists():
                alone(traffic, counts, path)
            for limit in asked.limits:
                solved = alone(limited, name, path, limit).result
                over = max(solved["seconds"] - limit, 0)
                mark = "*" if over > 0.1 * limit + 0.2 else ""
                reached = [solved[key] for key in ("late", "objective", "start", "status")]
                row(name, limit, solved["seconds"], over, mark, *reached)


# --- effort


def effort(report: Report, asked: Any) -> None:
    """Print what default and thorough effort take and reach, on two threads."""
    from scorecard import FOLLOW as CROSSING
    from scorecard import QUICK, SLOW, make_problem

    large = {"58x256, joint, crossing": ("58x256", 1, 32, "joint", {**CROSSING, "sets": False})}
    row = report.table(
        "Effort, seconds of the processor",
        "case <46",
        "default-s 10.1f",
        "objective 12.7g",
        "thorough-s 11.1f",
        "objective 12.7g",
        "behind-% 9.3f",
    )
    for name, (counts, nodes, per_node, method, rest) in (QUICK | SLOW | large).items():
        searches = method in ("joint", "heuristic") and "effort" not in rest
        if not searches or (asked.names and not any(part in name for part in asked.names)):
            continue
        rules = {key: value for key, value in rest.items() if key != "iterations"}
        problem, moves = make_problem(counts, nodes, per_node, **rules)
        cells: list[float] = []
        for level in ("default",) if asked.default_only else ("default", "thorough"):
            solve = partial(
                mt.solve,
                problem,
                method,
                initial=moves.initial,
                move_budget=moves.budget,
                move_cost=moves.cost,
                effort=level,
                threads=2,
            )
            result, _, seconds = timed(solve)
            cells += [seconds, result.objective]
        if not asked.default_only:
            cells.append(100 * (cells[1] / cells[3] - 1))
        row(name, *cells)


# --- stream

MODEL = (58, 8, 256)  # layers, top-k, experts
WINDOW = 1 << 16
PIECE = 64 << 20


def shards(folder: Path, size: int, each: int) -> tuple[list[Path], int]:
    """Write the first shard, link the others to it, and return all and the bytes written."""
    first = written(folder / "shard-0.safetensors", min(size, each), *MODEL)
    with first.open("rb") as file:
        os.fsync(file.fileno())
    real = first.stat().st_size
    paths = [first]
    for number in range(1, max(round(size / real), 1)):
        paths.append(folder / f"shard-{number}.safetensors")
        paths[-1].hardlink_to(first)
    return paths, real


def from_disk(paths: list[Path], work: Callable[[list[Path]], Any]) -> tuple[Any, float]:
    """Do some work with files whose pages leave the cache all the time.

    Returns what it returned, and the bytes that this process had from the disk.
    """
    done = threading.Event()

    def forget() -> None:
        with paths[0].open("rb") as file:
            while not done.wait(0.05):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def had() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))

    thread, before = threading.Thread(target=forget), had()
    thread.start()
    try:
        return work(paths), had() - before
    finally:
        done.set()
        thread.join()


def read_each(paths: list[Path]) -> int:
    """Read all bytes, and return how many they are."""
    piece, total = bytearray(PIECE), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                total += count
    return total


def count_each(paths: list[Path]) -> str:
    """Count files one after the other, add up, and return the fingerprint of the sum."""
    traces = map(mt.RoutingTrace.load, paths)
    parts = (mt.RoutingStatistics.from_trace(trace, window=WINDOW) for trace in traces)
    return mt.RoutingStatistics.sum(parts).fingerprint


def count_as_one(paths: list[Path]) -> int:
    """Count files as one recording, as commands do, and return its tokens."""
    trace = mt.open_input(paths)
    assert isinstance(trace, mt.RoutingTrace)
    counts = mt.RoutingStatistics.from_trace(trace, window=WINDOW)
    assert int(counts.window_load.sum()) == trace.tokens * trace.layers * trace.top_k
    return trace.tokens


def stream(report: Report, asked: Any) -> None:
    """Write files, and print GB/s and peak memory of counting them, beside reading them."""
    free = shutil.disk_usage(asked.folder).free
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        paths, real = shards(Path(folder), asked.bytes, min(asked.shard_bytes, free // 2))
        count_shards(report, paths, real)


def count_shards(report: Report, paths: list[Path], real: int) -> None:
    """Print a row for reading files, and one for each way of counting them."""
    size = real * len(paths) / 1e9
    layers, top_k, experts = MODEL
    row = report.table(
        f"{size:.1f} GB of routing ({layers} layers, top-{top_k} of {experts}) from the disk",
        "what <32",
        "seconds 8.1f",
        "CPU-s 8.1f",
        "GB/s 7.2f",
        "peak, MiB 9.0f",
        "from the disk, GB 17.1f",
    )
    for name, work in (
        ("read, pieces of 64 MiB", read_each),
        ("count as one recording", count_as_one),
        ("count file by file, and add up", count_each),
    ):
        taken = alone(from_disk, paths, work)
        speed, disk = size / taken.seconds, taken.result[1] / 1e9
        row(name, taken.seconds, taken.cpu, speed, taken.peak, disk)
    linked = f"{len(paths) - 1} of {len(paths)} shards are links to them"
    report.say(f"{real / 1e9:.2f} GB were written; {linked}.")


def main() -> None:
    """Print the tables that were asked for."""
    # As Ctrl-C, so that no file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts: dict[str, Callable[[Report, Any], None]] = {
        "transitions": transitions,
        "sets": sets,
        "text": text,
        "replay": replay,
        "axes": axes,
        "limits": limits,
        "stream": stream,
        "effort": effort,
    }
    options = {"goals": list(GOALS), "doublings": 5, "repeat": 1, "names": [""][1:]}
    options |= {
        "turns": 5,
        "megabytes": 32,
        "share": 1.0,
        "limits": [0.05, 0.5, 5.0],
        "default_only": False,
    }
    options |= {"bytes": 2_000_000_000, "shard_bytes": 1_000_000_000}
    options |= {"folder": tempfile.gettempdir()}
    usual = [name for name in parts if name != "effort"]
    with benchmark(__doc__, {"parts": usual}, **options) as (asked, report):
        for part in asked.parts:
            parts[part](report, asked)


if __name__ == "__main__":
    main()
