"""What a solve takes and reaches as its input doubles, at its limits, and on files beyond memory.

    python bench/scale.py [axes limits long stream shards] [--bytes 2000000000] [--record]
    python bench/scale.py stream --bytes 50000000000
    python bench/scale.py effort [--names crossing] [--default-only]

*Axes*: a base problem (12 layers x top-4 of 128 experts on 8 devices, 16 windows of 512 tokens),
and one of its sizes doubled again and again; the last row is 94 layers x top-10 of 512 experts on
320 devices. Seconds are of `solve` at default effort without a limit, by the clock and of the
processor, the median of turns; the peak is the memory of a process that loads the statistics and
solves; *of contiguous* is the objective over that of the contiguous placement, *gap* that to the
proven bound. Slopes are of the logarithm over the logarithm of the size: 1 is proportional.

*Limits*: seconds of a call by the clock, what it is beyond its limit, and the processor's seconds
after the limit, which other jobs do not stretch. ``*`` marks what took longer than limit + 10 % +
0.2 s; *worse* an answer behind what ``balance`` places. *Effort*: default beside thorough, without
a limit, on the scorecard's cases; half an hour, so it runs if it is named. *Long*: 61 layers x
top-8 of 384 experts whose popularity drifts, on 72 devices, each step in a process of its own.

*Stream*: a generated trace (58 layers, top-8 of 256) on disk, counted as one recording by one
process: peak memory, and GB/s beside reading it. Beyond ``--shard-bytes`` shards are links to the
first one, and its pages leave the cache all the time; what really came from the disk is counted by
the kernel. *Shards*: the same files by `examples/merge_shards.py`, whose Dask workers count them.
All files are deleted at the end, also on Ctrl-C.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import HERE, Report, benchmark, timed
from instances import routing
from numpy.typing import NDArray

import moetuner as mt
from moetuner.evaluation import evaluate_each
from moetuner.files import safetensors
from moetuner.solver.stages.floor import balanced

BLOCK = 1 << 12
EXAMPLE = HERE.parent / "examples" / "merge_shards.py"


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

    about = {"format": "moetuner.trace", "version": "1", "num_experts": str(experts)}
    shape = (tokens, layers, top_k)
    safetensors.write(path, {"expert_ids": (np.dtype(np.uint8), shape, tiles())}, about)
    return path


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
    "windows": [16, 32, 64, 128, 256, 512],
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


def axes(report: Report, given: Any) -> None:
    """Print a row for every size of every axis, and slopes."""
    points = [
        (axis, BASE._replace(**{axis: size}))
        for axis, sizes in AXES.items()
        for size in sizes[: given.doublings + 1]
    ]
    points += [("largest", LARGEST)] if given.doublings >= 3 else []
    slopes: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    known: dict[tuple[str, Point], list[Taken]] = {}  # the base is on every axis
    with tempfile.TemporaryDirectory() as folder:
        for goal in given.goals:
            row = report.table(
                f"Solve for {goal}",
                *("axis <8", "layers x experts on devices, windows <46", "seconds 8.2f"),
                *("CPU-s 8.2f", "peak, MiB 9.0f", "of contiguous 13.3f", "gap 7.1%"),
            )
            for axis, point in points:
                path = Path(folder) / "-".join(map(str, point))
                if not path.exists():
                    alone(counted, point, path)
                if (goal, point) not in known:
                    turns = [alone(searched, path, point, goal) for _ in range(given.repeat)]
                    known[goal, point] = turns
                turns = known[goal, point]
                seconds, cpu = np.median([of.result[:2] for of in turns], axis=0)
                peak, imports = turns[0].peak, turns[0].imports
                _, _, part, gap = turns[0].result
                row(axis, str(point), seconds, cpu, peak, part, "-" if gap is None else gap)
                if axis in AXES:
                    size = float(getattr(point, axis))
                    slopes.setdefault((goal, axis), []).append((size, seconds, cpu, peak - imports))
    row = report.table(
        "Slopes of the logarithms",
        *("goal <9", "axis <8", "from 8.0f", "to 8.0f"),
        *("seconds 8.2f", "CPU-s 8.2f", "memory 8.2f"),
    )
    for (goal, axis), of in slopes.items():
        if len(of) > 1:
            size, *figures = np.log(np.maximum(of, 1e-3)).T
            slope = (np.polyfit(size, figure, 1)[0] for figure in figures)
            row(goal, axis, of[0][0], of[-1][0], *slope)


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
        *("61x384 sets", 9, 8, "joint"),
        {"objective": "time", **COPIES},
    ),
    "61x384 on 72, time, follow": (
        *("61x384 pairs", 1, 72, "joint"),
        {"objective": "time", "regime": "follow"},
    ),
    "61x384 on 72, crossing": ("61x384 pairs", 1, 72, "joint", FOLLOW),
    "61x384 on 72, paper": ("61x384 pairs", 1, 72, "paper", FOLLOW),
    "61x384 on 72, minimax": ("61x384 pairs", 1, 72, "joint", WORST),
    "94x512 on 320x2, balance": (
        *("94x512 loads", 1, 320, "joint"),
        {"objective": "balance", "slots_per_device": 2},
    ),
    "24x32 on 8, visits": ("24x32 all", 1, 8, "joint", CAPPED),
    "24x32 on 8, crossing": ("24x32 all", 1, 8, "joint", FOLLOW),
    "24x32 on 2x4x5, time": (
        *("24x32 all", 2, 4, "joint"),
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
    start = mt.Placement(balanced(problem), num_experts=problem.experts)
    excess = [float(problem.caps.excess(of).sum()) for of in (result.placement, start)]
    value = problem.objective_function.value(start)
    worse = method == "joint" and (excess[0], result.objective) > (excess[1], value)
    return {
        "seconds": seconds,
        "late": at_end - late[0] if late else 0.0,
        "objective": result.objective,
        "start": value,
        "status": result.status + (" worse" if worse else ""),
    }


def limits(report: Report, given: Any) -> None:
    """Print a row for every instance and limit."""
    row = report.table(
        "Solves under a limit, seconds",
        *("instance <30", "limit 6.2f", "took 7.2f", "beyond 8.2f", "mark <4", "CPU-s late 10.2f"),
        *("objective 10.4f", "balance places 14.4f", "status <24"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (counts, *_) in INSTANCES.items():
            if given.names and not any(part in name for part in given.names):
                continue
            path = Path(folder) / counts.replace(" ", "-")
            if not path.exists():
                alone(traffic, counts, path)
            for limit in given.limits:
                of = alone(limited, name, path, limit).result
                over = max(of["seconds"] - limit, 0)
                mark = "*" if over > 0.1 * limit + 0.2 else ""
                figures = of["late"], of["objective"], of["start"], of["status"]
                row(name, limit, of["seconds"], over, mark, *figures)


# --- effort


def effort(report: Report, given: Any) -> None:
    """Print what default and thorough effort take and reach, on two threads."""
    from scorecard import FOLLOW as CROSSING
    from scorecard import QUICK, SLOW, instance

    large = {"58x256, joint, crossing": ("58x256", 1, 32, "joint", {**CROSSING, "sets": False})}
    row = report.table(
        "Effort, seconds of the processor",
        *("case <46", "default-s 10.1f", "objective 12.7g"),
        *("thorough-s 11.1f", "objective 12.7g", "behind-% 9.3f"),
    )
    for name, (counts, nodes, per_node, method, rest) in (QUICK | SLOW | large).items():
        searches = method in ("joint", "heuristic") and "effort" not in rest
        if not searches or (given.names and not any(part in name for part in given.names)):
            continue
        how = {key: value for key, value in rest.items() if key != "iterations"}
        problem, moving = instance(counts, nodes, per_node, **how)
        cells: list[float] = []
        for level in ("default",) if given.default_only else ("default", "thorough"):
            asked = {**moving, "effort": level, "threads": 2}
            result, _, seconds = timed(
                lambda of=problem, by=method, asked=asked: mt.solve(of, by, **asked)
            )
            cells += [seconds, result.objective]
        if not given.default_only:
            cells.append(100 * (cells[1] / cells[3] - 1))
        row(name, *cells)


# --- long

LONG = (61, 384, 8, 512, 72)  # layers, experts, top-k, tokens of a window, devices


def drifting(path: Path, tokens: int) -> Path:
    """Write a trace whose tokens prefer experts that drift from window to window."""
    layers, experts, top_k, window, _ = LONG
    rng = np.random.default_rng(0)
    ids = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(tokens, layers, top_k))
    taste = rng.normal(0, 0.8, (layers, experts))
    kinds = rng.normal(0, 1.3, (12, layers, experts))
    mix = np.zeros(12)
    for first in range(0, tokens, window):
        count = min(window, tokens - first)
        mix = 0.97 * mix + rng.normal(0, 0.22, 12)
        part = np.exp(2 * mix) / np.exp(2 * mix).sum()
        logit = (taste + np.tensordot(part, kinds, 1)).astype(np.float32)
        for layer in range(layers):
            # Of all that is above noise the largest: -log(exponential) is Gumbel.
            noise = rng.standard_exponential((count, experts), dtype=np.float32)
            noise = -np.log(np.maximum(noise, np.float32(1e-30)))
            best = np.argpartition(logit[layer] + noise, -top_k, axis=1)[:, -top_k:]
            ids[first : first + count, layer] = best
    ids.flush()
    return path


def counting_long(path: Path, regime: str, saved: Path) -> float:
    """Count a long trace for a regime into a file, and return the seconds by the clock."""
    trace = mt.RoutingTrace.load(path, num_experts=LONG[1])
    sets = regime == "dispatch"
    statistics, seconds, _ = timed(
        lambda: mt.RoutingStatistics.from_trace(trace, window=LONG[3], sets=sets)
    )
    statistics.save(saved)
    return seconds


def solving_long(path: Path, regime: str, limit: float) -> float:
    """Solve within a limit, and return the seconds by the clock."""
    statistics = mt.RoutingStatistics.load(path)

    def solve() -> mt.Result:
        problem = mt.Problem(statistics, mt.Topology(LONG[4]), regime=regime)
        return mt.solve(problem, time_limit=limit)

    return timed(solve)[1]


def replaying_long(path: Path, count: int) -> float:
    """Replay so many random placements in both arrivals, and return the seconds by the clock."""
    layers, experts, _, window, devices = LONG
    trace, rng, width = mt.RoutingTrace.load(path, num_experts=experts), np.random.default_rng(0), 6
    placements = []
    for _ in range(count):
        slots = np.full((layers, devices * width), -1, dtype=np.int32)
        for layer in slots:
            layer[rng.permutation(len(layer))[:experts]] = rng.permutation(experts)
        shaped = slots.reshape(layers, devices, width)
        placements.append(mt.Placement(shaped, num_experts=experts))
    how = {"window": window, "cost_model": mt.CostModel.preset("h100"), "threads": 1}
    return timed(lambda: evaluate_each(placements, trace, mt.Topology(devices), **how))[1]


def long(report: Report, given: Any) -> None:
    """Print a row for every step with a long trace."""
    layers, experts, top_k, window, devices = LONG
    row = report.table(
        f"{given.tokens} tokens x {layers} x top-{top_k} of {experts} in windows of {window}, "
        f"{devices} devices",
        *("step <38", "seconds 8.1f", "CPU-s, all of it 16.1f", "peak, MiB 9.0f"),
    )
    with tempfile.TemporaryDirectory() as folder:
        path, saved = Path(folder) / "long.npy", Path(folder) / "counts"
        alone(drifting, path, given.tokens)

        def step(name: str, work: Callable[..., float], *arguments: Any) -> None:
            taken = alone(work, *arguments)
            row(name, taken.result, taken.cpu, taken.peak)

        for regime in ("follow", "dispatch"):
            step(f"{regime}: count", counting_long, path, regime, saved)
            step(f"{regime}: solve, time limit 10", solving_long, saved, regime, 10.0)
        for count in (1, 5):
            step(f"replay, both arrivals, placements: {count}", replaying_long, path, count)


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


def stream(report: Report, given: Any, paths: list[Path], real: int) -> None:
    """Print GB/s and peak memory of counting files, beside reading them."""
    size = real * len(paths) / 1e9
    layers, top_k, experts = MODEL
    row = report.table(
        f"{size:.1f} GB of routing ({layers} layers, top-{top_k} of {experts}) from the disk",
        *("what <32", "seconds 8.1f", "CPU-s 8.1f", "GB/s 7.2f", "peak, MiB 9.0f"),
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


def by_dask(report: Report, given: Any, paths: list[Path], real: int) -> None:
    """Print what Dask's workers take for the same files, by the example's own command."""
    if find_spec("dask") is None:
        report.say("Dask is not installed (pip install 'dask[bag]'): shards are not counted by it.")
        return
    size, out = real * len(paths) / 1e9, paths[0].parent / "statistics"
    one = alone(count_each, paths)
    row = report.table(
        f"{len(paths)} shards of {real / 1e9:.2f} GB, added up",
        *("how <34", "seconds 8.1f", "GB/s 7.2f", "same statistics <15"),
    )
    row("one process, all threads", one.seconds, size / one.seconds, "-")
    command = [sys.executable, str(EXAMPLE), *map(str, paths), "--out", str(out)]
    _, seconds, _ = timed(
        lambda: subprocess.run(
            [*command, "--window", str(WINDOW)], check=True, stdout=subprocess.DEVNULL
        )
    )
    same = mt.RoutingStatistics.load(out).fingerprint == one.result
    row("merge_shards.py, Dask's processes", seconds, size / seconds, "yes" if same else "NO")


def main() -> None:
    """Print the tables that were asked for."""
    # As Ctrl-C, so that no file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts: dict[str, Callable[[Report, Any], None]] = {
        "axes": axes,
        "limits": limits,
        "effort": effort,
        "long": long,
    }
    how = {"goals": list(GOALS), "doublings": 5, "repeat": 1, "names": [""][1:]}
    how |= {"limits": [0.05, 0.5, 5.0], "default_only": False, "tokens": 50_000}
    how |= {"bytes": 2_000_000_000, "shard_bytes": 1_000_000_000, "folder": tempfile.gettempdir()}
    chosen = ["axes", "limits", "long", "stream", "shards"]
    with benchmark(__doc__, {"parts": chosen}, **how) as (given, report):
        for part in given.parts:
            if part in parts:
                parts[part](report, given)
        if {"stream", "shards"} & {*given.parts}:
            free = shutil.disk_usage(given.folder).free
            each = min(given.shard_bytes, free // 2)
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                paths, real = shards(Path(folder), given.bytes, each)
                if "stream" in given.parts:
                    stream(report, given, paths, real)
                if "shards" in given.parts:
                    by_dask(report, given, paths, real)


if __name__ == "__main__":
    main()
