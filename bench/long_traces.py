"""Traces of thousands of windows: processor, memory, and what merging windows costs in quality.

    python bench/long_traces.py steps [--tokens 2000000] [--cache FOLDER]
    python bench/long_traces.py quality gpt-oss-20b.npz

``steps`` makes 61 layers x top-8 of 384 experts, whose popularity drifts, in windows of 512 tokens,
and takes each step in a process of its own: seconds by the clock and of the processor, and the most
memory that the operating system saw. A solve has 10 seconds; its count and the size of its inputs
are in its memory, and not in its seconds. ``quality`` places layers of a real trace in
small windows by balance, on all windows seen and on fewer, and judges them on unseen sequences.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from harness import arguments, timed

import moetuner as mt
from moetuner.evaluation import evaluate_each
from moetuner.problem import windows as windows_

LAYERS, EXPERTS, TOP_K, WINDOW, DEVICES = 61, 384, 8, 512, 72
Steps = dict[str, list[float]]
T = TypeVar("T")


def written(path: Path, tokens: int) -> Path:
    """Write a trace whose tokens prefer experts that drift from window to window."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    shape = (tokens, LAYERS, TOP_K)
    ids = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=shape)
    taste = rng.normal(0, 0.8, (LAYERS, EXPERTS))
    kinds = rng.normal(0, 1.3, (12, LAYERS, EXPERTS))
    mix = np.zeros(12)
    for first in range(0, tokens, WINDOW):
        count = min(WINDOW, tokens - first)
        mix = 0.97 * mix + rng.normal(0, 0.22, 12)
        part = np.exp(2 * mix) / np.exp(2 * mix).sum()
        logit = (taste + np.tensordot(part, kinds, 1)).astype(np.float32)
        for layer in range(LAYERS):
            noisy = logit[layer] + rng.gumbel(size=(count, EXPERTS)).astype(np.float32)
            best = np.argpartition(noisy, -TOP_K, axis=1)[:, -TOP_K:]
            ids[first : first + count, layer] = best
    ids.flush()
    return path


def taken(work: Callable[[], Steps]) -> None:
    """Take steps in a process of its own, and print what they took."""

    def child() -> None:
        answer = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        for name, (seconds, cpu) in answer.items():
            print(f"{name:<34} {seconds:8.1f} s {cpu:8.1f} CPU-s {peak:6.2f} GB", flush=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()


def noted(steps: Steps, name: str, work: Callable[[], T]) -> T:
    """Do some work and note what it took."""
    result, *steps[name] = timed(work)
    return result


def steps(trace: mt.RoutingTrace) -> None:
    """Count, solve and replay, each by itself."""

    def solving(regime: str) -> Steps:
        steps: Steps = {}
        statistics = noted(
            steps,
            f"{regime}: count",
            lambda: mt.RoutingStatistics.from_trace(
                trace, window=WINDOW, sets=regime == "dispatch"
            ),
        )

        def solve() -> mt.Result:
            problem = mt.Problem(statistics, mt.Topology(DEVICES), regime=regime)
            return mt.solve(problem, time_limit=10)

        result = noted(steps, f"{regime}: solve, time limit 10", solve)
        print(f"  objective {result.objective:.2f}, {result.details.search}")
        return steps

    def replaying(count: int) -> Steps:
        rng = np.random.default_rng(0)
        width = -(-EXPERTS // DEVICES)
        placements = []
        for _ in range(count):
            slots = np.full((LAYERS, DEVICES * width), -1, dtype=np.int32)
            for layer in slots:
                layer[rng.permutation(len(layer))[:EXPERTS]] = rng.permutation(EXPERTS)
            shaped = slots.reshape(LAYERS, DEVICES, width)
            placements.append(mt.Placement(shaped, num_experts=EXPERTS))
        model = mt.CostModel.preset("h100")
        steps: Steps = {}
        how = {"window": WINDOW, "cost_model": model, "threads": 1}
        name = f"replay, both arrivals, {count} placements"
        noted(steps, name, lambda: evaluate_each(placements, trace, mt.Topology(DEVICES), **how))
        return steps

    taken(lambda: solving("follow"))
    taken(lambda: solving("dispatch"))
    for count in (1, 5):
        taken(lambda count=count: replaying(count))


def quality(path: Path) -> None:
    """Judge placements of a search on all windows, and on fewer, on unseen sequences."""
    parts = mt.RoutingTrace.load(path).split(0.5, seed=0)
    counted = {"window": 16, "transitions": False, "coactivation": False}
    seen, unseen = (
        mt.RoutingStatistics.from_trace(part.select(layers=range(0, part.layers, 4)), **counted)
        for part in parts
    )
    for slots in (4, 5):
        problem = mt.Problem(seen, mt.Topology(8), objective="balance", slots_per_device=slots)
        load = seen.window_load.astype(np.float64)
        ones = np.ones(len(load))
        every = np.linspace(0, len(load) - 1, windows_.MOST).astype(np.int64)
        scaled = np.full(windows_.MOST, len(load) / windows_.MOST)
        ways = {
            f"all {len(load)}": windows_.Windows(load, ones, None, "mean", False),
            f"{windows_.MOST} of them": windows_.Windows(load[every], scaled, None, "mean", False),
            f"{windows_.MERGED} means": problem.windows.searched,
        }
        for name, windows in ways.items():
            answer, cpu = [], time.process_time()
            some = replace(problem)
            vars(some)["windows"] = windows
            for seed in range(3):
                placement = mt.solve(some, "heuristic", seed=seed, threads=1).placement
                answer.append(mt.evaluate(placement, unseen).imbalance)
            cpu = (time.process_time() - cpu) / 3
            print(f"8 x {slots}, {name:<14} unseen {np.mean(answer):.4f}  {cpu:5.1f} CPU-s")


def main() -> None:
    """Run what was asked for."""
    places = {"what": ("steps", "quality"), "trace": []}
    given = arguments(__doc__, places, tokens=2_000_000, cache=Path(tempfile.gettempdir()))
    trace = Path(given.trace[0]) if given.trace else None
    if given.what == "quality":
        quality(trace)
        return
    path = trace or written(given.cache / f"long-{given.tokens}.npy", given.tokens)
    steps(mt.RoutingTrace.load(path, num_experts=EXPERTS))


if __name__ == "__main__":
    main()
