"""Time and memory of counting a trace file, against the time of reading it once.

Writes a trace like that of gpt-oss (24 layers, top-4 of 32 experts), reads it in 64 MiB pieces,
counts all statistics from it, and prints both times, their ratio and the peak memory of the process
that counted. Each step is a process of its own: on Linux a process inherits the peak of its parent.

    python bench/statistics_file.py [--bytes 2000000000] [--window 4096] [--threads N]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import moetuner as mt
from moetuner.files import safetensors

LAYERS, TOP_K, EXPERTS = 24, 4, 32
BLOCK = 1 << 12
PIECE = 64 << 20


def tiles(tokens: int) -> Iterator[NDArray[np.uint8]]:
    """Skewed random routing, one block over and over: what is counted does not change the time."""
    rng = np.random.default_rng(0)
    noise = rng.gumbel(size=(BLOCK, LAYERS, EXPERTS)) + rng.normal(size=(LAYERS, EXPERTS))
    block = np.argsort(-noise, axis=2)[:, :, :TOP_K].astype(np.uint8)
    for first in range(0, tokens, BLOCK):
        yield block[: tokens - first]


def write(path: Path, size: int) -> None:
    tokens = size // (LAYERS * TOP_K)
    about = {"format": "moetuner.trace", "version": "1", "num_experts": str(EXPERTS)}
    shape = (tokens, LAYERS, TOP_K)
    safetensors.write(path, {"expert_ids": (np.dtype(np.uint8), shape, tiles(tokens))}, about)


def read(path: Path) -> dict[str, float]:
    """Seconds to read the file once, into new memory for each piece and into the same memory."""
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(PIECE):
            pass
    fresh = time.perf_counter() - start
    piece = bytearray(PIECE)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return {"fresh": fresh, "same": time.perf_counter() - start}


def count(path: Path, window: int, threads: int | None) -> dict[str, float]:
    """Seconds to count everything, and peak memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    trace = mt.RoutingTrace.load(path)
    statistics = mt.RoutingStatistics.from_trace(trace, window=window, threads=threads)
    seconds = time.perf_counter() - start
    assert int(statistics.window_load.sum()) == trace.tokens * LAYERS * TOP_K
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "before_mib": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--directory", type=Path, help="where to write the file for a while")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, path = arguments.step[0], Path(arguments.step[1])
        if step == "write":
            write(path, arguments.bytes)
        else:
            counting = (path, arguments.window, arguments.threads)
            print(json.dumps(read(path) if step == "read" else count(*counting)))
        return

    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        file = str(Path(directory) / "trace.safetensors")

        def run(step: str) -> str:
            command: list[str] = [sys.executable, *sys.argv, "--step", step, file]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return str(done.stdout)

        run("write")
        before, counted, after = (json.loads(run(step)) for step in ("read", "count", "read"))
    fresh, same = (min(before[kind], after[kind]) for kind in ("fresh", "same"))
    print(f"file        {arguments.bytes / 1e9:8.2f} GB, read in pieces of {PIECE >> 20} MiB")
    print(f"read        {fresh:8.2f} s into new memory, {same:.2f} s into the same (faster of two)")
    print(f"count       {counted['seconds']:8.2f} s, all statistics, windows of {arguments.window}")
    ratios = counted["seconds"] / fresh, counted["seconds"] / same
    print(f"ratio       {ratios[0]:8.2f} and {ratios[1]:.2f}")
    print(f"peak memory {counted['peak_mib']:8.0f} MiB, {counted['before_mib']:.0f} of it imports")


if __name__ == "__main__":
    main()
