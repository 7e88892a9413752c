"""Recordings of any size: counting by several processes, and answers from counts.

    python bench/large.py [--tokens 524288000] [--shards 8] [--workers 1 2 4] [--data FOLDER]

Makes shards of the law of the bundled trace: every sequence draws its tokens from one of the
trace's. Processes count them, each shard by itself, and the counts are added: tokens a second,
memory of the largest process, and whether the bytes are the same. Then `advise` answers from the
counts. The second table has the bytes of a full sample by the shape of the model. The third one
has the answers of `advise` from a recording and from counts of five pieces of it, cut anywhere: the
bundled trace, parts of the large recording, recordings of ``--data`` where that is there, and load
tables in two pieces. *apart* is the difference of the gains, in widths of the trace's interval.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, benchmark

import moetuner as mt
from moetuner.counting import total

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
# Tokens of a sequence, and devices.
LENGTH, DEVICES = 256, 8
# Layers, experts and top-k of models.
SHAPES = {"24 x 32": (24, 32, 4), "58 x 256": (58, 256, 8), "94 x 512": (94, 512, 8)}
# Tokens that a shape's sample is measured on; tables beside the tokens do not grow with them.
MEASURED = 1 << 16


def make_shard(trace: mt.RoutingTrace, tokens: int, seed: int) -> mt.RoutingTrace:
    """Return sequences, each of which draws its tokens from one of the trace's."""
    rng = np.random.default_rng(seed)
    of_sequence = [np.flatnonzero(trace.sequence == label) for label in np.unique(trace.sequence)]
    lengths = np.array([len(rows) for rows in of_sequence])
    first = np.cumsum(lengths) - lengths
    chosen = rng.integers(len(lengths), size=tokens // LENGTH)
    drawn = rng.random((len(chosen), LENGTH), dtype=np.float32) * lengths[chosen][:, None]
    rows = np.concatenate(of_sequence)[(first[chosen][:, None] + drawn.astype(np.int64)).ravel()]
    return mt.RoutingTrace.from_arrays(
        trace.expert_ids[rows],
        num_experts=trace.num_experts,
        sequence=np.repeat(np.arange(len(chosen), dtype=np.int32), LENGTH),
        group=None if trace.group is None else trace.group[rows],
        group_names=trace.group_names,
        model=trace.model,
        expert_size=trace.expert_size,
    )


def write_shard(path: Path, tokens: int, seed: int) -> None:
    """Write a shard of the law of the bundled trace."""
    make_shard(mt.RoutingTrace.load(BUNDLED), tokens, seed).save(path)


def count(path: Path) -> tuple[mt.RoutingTrace, int]:
    """Return the counts of a shard, and the most memory that this process has taken, in bytes."""
    counted = mt.count(mt.RoutingTrace.load(path), threads=1)
    return counted, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def count_all(paths: list[Path], workers: int) -> tuple[mt.RoutingTrace, float, int]:
    """Count shards on so many processes; return counts, seconds, and memory of the largest one."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(abs, range(workers)))  # they have started
        began = time.perf_counter()
        counted, memory = zip(*pool.map(count, paths), strict=True)
        return total(counted), time.perf_counter() - began, max(memory)


def advise(path: Path, *options: str) -> tuple[dict[str, Any], float, float]:
    """Return what ``moetuner advise`` answers on a file, its seconds, and its MB of memory."""
    command = [sys.executable, "-m", "moetuner", "advise", str(path), "--devices", str(DEVICES)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--json", "-", "--quiet", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    usage = os.wait4(process.pid, 0)[2]
    return answer, time.perf_counter() - began, usage.ru_maxrss / 1024


def in_pieces(recording: Any, number: int) -> Iterator[Any]:
    """Yield so many pieces of a recording, cut at places that have nothing to do with it."""
    ends = np.linspace(0, recording.length, number + 1).astype(int)
    rows = np.arange(recording.length)
    return (recording.take(rows[begin:end]) for begin, end in pairwise(ends))


def print_workers(report: Report, paths: list[Path], workers: list[int], folder: Path) -> None:
    """Print how fast processes count shards, and what advise takes from the counts."""
    tokens = sum(mt.RoutingTrace.load(path).tokens for path in paths)
    size = sum(path.stat().st_size for path in paths)
    table = report.table(
        f"{tokens:,} tokens in {len(paths)} shards, {size / 1e9:.1f} GB, on so many processes",
        "processes 9d",
        "seconds 9.1f",
        "million tokens/s 17.1f",
        "of one process 15.2f",
        "MB of one 10.0f",
        "same bytes 11s",
    )
    count_all(paths, 2)  # from now on the files are in memory, as far as they fit
    first: tuple[bytes, float] | None = None
    for number in workers:
        counted, seconds, memory = count_all(paths, number)
        counted.save(folder / "counts.safetensors")
        contents = (folder / "counts.safetensors").read_bytes()
        first = first or (contents, seconds)
        same = "yes" if contents == first[0] else "NO"
        rate = tokens / seconds / 1e6
        table(number, seconds, rate, first[1] / seconds, memory / 1e6, same)
    answer, seconds, memory = advise(folder / "counts.safetensors")
    report.say(
        f"advise from the counts, {len(contents) / 1e6:.1f} MB: {seconds:.1f} s, {memory:.0f} MB; "
        f"{answer['answer']}."
    )


def print_sizes(report: Report, folder: Path) -> None:
    """Print the bytes of a sample of the default size, by shape."""
    table = report.table(
        f"Bytes of a full sample, of any recording; measured on {MEASURED:,} tokens",
        "model <9s",
        "sample, tokens 15d",
        "MB 9.0f",
        "of that without ids 20.1f",
    )
    rng = np.random.default_rng(0)
    for name, (layers, experts, top_k) in SHAPES.items():
        first = rng.integers(experts, size=(MEASURED, layers, 1))
        ids = (first + np.arange(top_k) * (experts // top_k)) % experts
        ids = ids.astype(np.uint8 if experts <= 256 else np.uint16)
        labels = {"sequence": np.arange(MEASURED) // LENGTH, "group": np.zeros(MEASURED, int)}
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts, **labels)
        counted = mt.count(trace)
        counted.save(folder / "shape.safetensors")
        assert counted.population is not None
        row = layers * top_k * ids.itemsize
        rest = (folder / "shape.safetensors").stat().st_size - MEASURED * (row + 6)
        sample = counted.population.sample
        table(name, sample, (sample * (row + 6) + rest) / 1e6, rest / 1e6)


def print_answers(report: Report, recordings: dict[str, Any], folder: Path) -> None:
    """Print what advise answers from recordings, and from counts of pieces of them."""
    table = report.table(
        "advise from a recording and from counts of its pieces: gains, percent",
        "recording <26s",
        "rows 9d",
        "counts 9d",
        "window 7s",
        "gain 7.2f",
        "low 7.2f",
        "high 7.2f",
        "counts' gain 13.2f",
        "low 7.2f",
        "high 7.2f",
        "apart 6.2f",
        "answers <40s",
    )
    for name, recording in recordings.items():
        counted = total(map(mt.count, in_pieces(recording, 5 if recording.ordered else 2)))
        answers = []
        for place, kind in enumerate((recording, counted)):
            path = folder / f"{place}.safetensors"
            kind.save(path)
            answers.append(advise(path)[0])
        for one, other in zip(answers[0]["judged"], answers[1]["judged"], strict=True):
            gains = [
                [100 * (gain if gain is not None else np.nan) for gain in read_gain(judged)]
                for judged in (one, other)
            ]
            width = gains[0][2] - gains[0][1]
            words = {answer["answer"] for answer in answers}
            table(
                name,
                recording.length,
                counted.length,
                str(one["window"]),
                *gains[0],
                *gains[1],
                abs(gains[0][0] - gains[1][0]) / width if width > 0 else np.nan,
                " | ".join(sorted(words)),
            )


def read_gain(judged: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Return the gain of a phase, and the ends of its interval."""
    figure = judged["whole"][judged["measure"]]
    low, high = figure["interval"] or (None, None)
    return figure["gain"], low, high


def main() -> None:
    """Print the tables."""
    options: dict[str, Any] = {"tokens": 524_288_000, "shards": 8, "workers": [1, 2, 4]}
    options["data"] = Path
    with (
        benchmark(__doc__, **options) as (chosen, report),
        tempfile.TemporaryDirectory() as temporary,
    ):
        folder, trace = Path(temporary), mt.RoutingTrace.load(BUNDLED)
        paths = [folder / f"shard-{number}.safetensors" for number in range(chosen.shards)]
        tokens = [chosen.tokens // chosen.shards] * chosen.shards
        # In a process of its own, as the memory of this one would count as that of its children.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            list(pool.map(write_shard, paths, tokens, range(chosen.shards)))
        print_workers(report, paths, chosen.workers, folder)
        print_sizes(report, folder)
        recordings: dict[str, Any] = {"bundled": trace}
        for path in sorted(chosen.data.glob("*.npz")) if chosen.data else ():
            recording = mt.open_input(path)
            if recording.length >= 2:
                recordings[path.stem] = recording
        large = mt.RoutingTrace.load(paths[0])
        for size in (1 << 22, 1 << 24):
            if size <= large.tokens:
                recordings[f"law, {size >> 20} million tokens"] = large.take(np.arange(size))
        print_answers(report, recordings, folder)


if __name__ == "__main__":
    main()
