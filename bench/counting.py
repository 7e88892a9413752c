"""Speed of the core against named peers: numpy, Python's json, and reading the file once.

    python bench/counting.py [transitions statistics text replay] [--repeat 5] [--bytes 2000000000]
    python bench/counting.py --record

*Transitions*: tables of pairs against numpy's bincount. *Statistics*: all counts of a trace file
like that of gpt-oss (24 layers, top-4 of 32), against reading the file once in pieces of 64 MiB,
into new memory and into the same; peak memory is that of a process of its own. *Text*: JSON lines
of moetuner and of Megatron-Core, and CSV; beside them Python's json on the same lines, thrown away.
*Replay*: `evaluate` against the same figures from numpy, layer by layer without a loop over tokens.

Both sides have the same input and must find the same numbers, and they take turns. Figures are
medians, with quartiles in brackets: of processor time on one thread, which a busy machine distorts
less, and by the clock where all threads work or a disk is read. Wanted: transitions 20x up to 64
experts and 10x beyond, statistics in ten times a reading and 512 MiB, text at 200 MB/s, replay 50x.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, benchmark, in_turns, spread
from numpy.typing import NDArray
from scale import alone, written

import moetuner as mt

Ids = NDArray[np.uint8] | NDArray[np.uint16]

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
# Layers, top-k and experts of a trace file, and tokens of a window.
FILE, WINDOW = (24, 4, 32), 4096
PIECE = 64 << 20
# Tokens, layers, top-k and experts of the lines that text repeats.
LINES = (4096, 24, 8, 64)


def routing(tokens: int, layers: int, top_k: int, experts: int, seed: int = 0) -> Ids:
    """Return expert ids [T,L,K]: the top-k of random scores, with popular and unpopular experts."""
    generator = np.random.default_rng(seed)
    popularity = np.linspace(1, 2, experts, dtype=np.float32)
    ids = np.empty((tokens, layers, top_k), dtype=np.uint8 if experts <= 256 else np.uint16)
    for layer in range(layers):
        scores = generator.random((tokens, experts), dtype=np.float32) * popularity
        ids[:, layer] = np.argpartition(scores, experts - top_k, axis=1)[:, experts - top_k :]
    return ids


def ratio(mine: list[float], theirs: list[float]) -> float:
    """Return the median of what turns of a peer took, over those of ours."""
    return statistics.median(theirs) / statistics.median(mine)


def milliseconds(seconds: list[float]) -> str:
    """Return median and quartiles."""
    return spread([1e3 * of for of in seconds])


def transitions_of(ids: Ids, experts: int) -> NDArray[np.int64]:
    """Count transitions [L-1,E,E] by one bincount per pair of layers."""
    layers = ids.shape[1]
    tables = np.empty((layers - 1, experts, experts), dtype=np.int64)
    for layer in range(layers - 1):
        left, right = ids[:, layer].astype(np.int64), ids[:, layer + 1].astype(np.int64)
        pairs = left[:, :, None] * experts + right[:, None, :]
        tables[layer] = np.bincount(pairs.ravel(), minlength=experts * experts).reshape(experts, -1)
    return tables


def transitions(report: Report, repeat: int, share: float) -> None:
    """Print a row per size."""
    row = report.table(
        "Transitions, one thread each, ms of the processor",
        *("tokens x layers x top-k of experts <36", "moetuner <24", "numpy <28", "ratio 6.1f"),
    )
    for tokens, layers, top_k, experts in TRANSITIONS:
        tokens = max(int(tokens * share), 1)
        ids = routing(tokens, layers, top_k, experts)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)

        def ours(trace: mt.RoutingTrace = trace) -> mt.RoutingStatistics:
            return mt.RoutingStatistics.from_trace(
                trace, window=None, coactivation=False, threads=1
            )

        def peer(ids: Ids = ids, experts: int = experts) -> NDArray[np.int64]:
            return transitions_of(ids, experts)

        assert np.array_equal(ours().transitions, peer())
        mine, theirs = in_turns({"ours": ours, "numpy": peer}, repeat, processor=True).values()
        name = f"{tokens} x {layers} x {top_k} of {experts}"
        row(name, milliseconds(mine), milliseconds(theirs), ratio(mine, theirs))


def reading(path: Path) -> tuple[float, float]:
    """Return the seconds to read a file once, into new memory for each piece and into the same."""
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(PIECE):
            pass
    fresh, piece = time.perf_counter() - begin, bytearray(PIECE)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return fresh, time.perf_counter() - begin


def counting(path: Path) -> float:
    """Return the seconds to count everything that is in a trace file."""
    begin = time.perf_counter()
    trace = mt.RoutingTrace.load(path)
    counted = mt.RoutingStatistics.from_trace(trace, window=WINDOW)
    seconds = time.perf_counter() - begin
    assert int(counted.window_load.sum()) == trace.tokens * trace.layers * trace.top_k
    return seconds


def all_statistics(report: Report, repeat: int, size: int) -> None:
    """Print what counting a file takes beside reading it."""
    layers, top_k, experts = FILE
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "trace.safetensors", size, layers, top_k, experts)
        size = path.stat().st_size
        counted, fresh, same, peak = [], [], [], 0.0
        for _ in range(repeat):
            taken = alone(counting, path)
            counted.append(taken.result)
            peak = max(peak, taken.peak)
            for seconds, into in zip(alone(reading, path).result, (fresh, same), strict=True):
                into.append(seconds)
    row = report.table(
        f"All statistics of a file of {size / 1e9:.2f} GB, windows of {WINDOW} tokens, seconds",
        *(
            "count <20",
            "read, new memory <20",
            "the same memory <20",
            "ratios <12",
            "peak, MiB 9.0f",
        ),
    )
    ratios = f"{ratio(fresh, counted):.1f}, {ratio(same, counted):.1f}"
    row(*(spread(of, 2) for of in (counted, fresh, same)), ratios, peak)


def megatron_lines(ids: Ids) -> Iterator[str]:
    """Give the lines of Megatron's router trace."""
    for layer in range(ids.shape[1]):
        about = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
        about |= {"num_tokens": len(ids), "topk": ids.shape[2]}
        yield json.dumps(about | {"top_indices": ids[:, layer].tolist()}) + "\n"


def own_lines(ids: Ids, per: str) -> Iterator[str]:
    """Give lines of moetuner's own, of a token or of 64."""
    for at, token in enumerate(ids):
        about: dict[str, Any] = {"sequence": at // 64, "group": "ab"[at // 64 % 2]}
        if per == "token":
            yield json.dumps({"experts": token.tolist(), **about}, separators=(",", ":")) + "\n"
        elif at % 64 == 0:
            tokens = ids[at : at + 64].tolist()
            yield json.dumps({"tokens": tokens, **about}, separators=(",", ":")) + "\n"


def csv_lines(ids: Ids) -> Iterator[str]:
    """Give lines of CSV."""
    for token, layer in np.ndindex(ids.shape[:2]):
        for expert in ids[token, layer]:
            yield f"{token},{layer},{expert},{token // 64}\n"


def text(report: Report, repeat: int, megabytes: int) -> None:
    """Print a row per form of text."""
    tokens, layers, top_k, experts = LINES
    ids = routing(tokens, layers, top_k, experts)
    head = f'{{"num_experts": {experts}}}\n'
    forms: dict[str, tuple[str, str, Iterator[str], bool]] = {
        "JSON lines per token": ("t.jsonl", head, own_lines(ids, "token"), True),
        "JSON lines per sequence": ("s.jsonl", head, own_lines(ids, "sequence"), True),
        "Megatron's router trace": ("router_trace_rank0.jsonl", "", megatron_lines(ids), True),
        # Tokens are numbered through: no part of it can stand there again.
        "CSV": (
            *("rows.csv", "token,layer,expert,sequence\n"),
            *(csv_lines(ids[: megabytes * 111]), False),
        ),
    }
    row = report.table(
        f"Text of {megabytes} MB, MB/s of a processor",
        *("form <24", "moetuner <24", "Python's json <24", "ratio 6.1f"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for form, (name, first, some, repeats) in forms.items():
            path, lines = Path(folder) / name, "".join(some)
            times = max(1, megabytes * 10**6 // len(lines)) if repeats else 1
            path.write_text(first + lines * times)
            works: dict[str, Callable[[], object]] = {
                "ours": lambda path=path: mt.open_input(path, num_experts=experts)
            }
            if repeats:
                each = path.read_bytes().splitlines()
                works["json"] = lambda each=each: [json.loads(line) for line in each]
            taken = in_turns(works, repeat, processor=True)
            size = path.stat().st_size / 1e6
            speeds = [spread([size / of for of in seconds], 0) for seconds in taken.values()]
            row(form, *speeds, *([ratio(*taken.values())] if repeats else ["-", "-"]))


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
        """Share of pairs that leave their device."""
        total = self.follow.sum()
        return float((total - np.einsum("ldd->", self.follow)) / total)

    @property
    def imbalance(self) -> float:
        """Largest / mean load, the mean over windows and layers."""
        return float((self.load.max(axis=2) / self.load.mean(axis=2)).mean())


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
    return Figures(load, follow, visits, int(visits.sum()) / per_token, node_visits / per_token)


def check(ours: mt.Evaluation, theirs: Figures) -> None:
    """Assert that both found the same."""
    assert np.array_equal(ours.traffic["follow"], theirs.follow)
    visits = ours.traffic["dispatch"].sum(axis=1) * len(theirs.visits[0])
    assert np.allclose(visits, theirs.visits * (len(theirs.visits[0]) - 1))
    assert ours.fanout == theirs.fanout
    assert ours.node_fanout == theirs.node_fanout
    assert ours.crossing == theirs.crossing
    assert np.isclose(ours.imbalance, theirs.imbalance, rtol=1e-12)


def replay(report: Report, repeat: int, share: float, window: int = 512) -> None:
    """Print a row per size and number of threads."""
    row = report.table(
        "Replay of a placement, ms: of the processor on one thread, by the clock on all",
        *("tokens x layers x top-k of experts, devices <44", "threads 7s", "moetuner <24"),
        *("numpy <28", "ratio 6.1f"),
    )
    for tokens, layers, top_k, experts, devices, per_node in REPLAYS:
        tokens = max(int(tokens * share), 1)
        ids = routing(tokens, layers, top_k, experts)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
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
                placement, trace, topology, window=window, mixed=False, threads=threads
            )

        def peer(ids: Ids = ids, of: tuple[NDArray[np.uint8], ...] = bytes_of) -> Figures:
            return replayed(ids, *of, window)

        check(ours(1), peer())
        assert ours(1).to_dict() == ours(None).to_dict()
        for name, threads in (("1", 1), ("all", None)):
            works = {"ours": lambda threads=threads: ours(threads), "numpy": peer}
            mine, theirs = in_turns(works, repeat, processor=name == "1").values()
            label = f"{tokens} x {layers} x {top_k} of {experts}, {devices}"
            row(label, name, milliseconds(mine), milliseconds(theirs), ratio(mine, theirs))


def main() -> None:
    """Print the tables that were asked for."""
    parts = ["transitions", "statistics", "text", "replay"]
    how = {"repeat": 5, "bytes": 2_000_000_000, "megabytes": 32, "share": 1.0}
    with benchmark(__doc__, {"parts": parts}, **how) as (given, report):
        if "transitions" in given.parts:
            transitions(report, given.repeat, given.share)
        if "statistics" in given.parts:
            all_statistics(report, given.repeat, given.bytes)
        if "text" in given.parts:
            text(report, given.repeat, given.megabytes)
        if "replay" in given.parts:
            replay(report, given.repeat, given.share)


if __name__ == "__main__":
    main()
