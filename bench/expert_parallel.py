"""An expert-parallel layer on four processes: its time, what it sends, and where the time goes.

    python bench/expert_parallel.py [--ranks 4] [--tokens 4096] [--repeat 15] [--quick]

Gloo over loopback, one thread per process; H 512, I 512, 32 experts, top-4, float32. Tokens of a
rank prefer eight experts of their own, as requests of one domain do. Placements run in turns and
medians are compared; every result is checked against the first one's. Rows are one per token and
distinct device; beside them what one row per token and expert would be, and takes, by the same
code. "exchange" is the share of the collectives in the layer's time, without waiting for the
slowest rank.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import permutations
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

import moetuner as mt
from moetuner.evaluation.rows import dispatch_rows
from moetuner.torch import ExpertParallelMoE, GroupedExperts

HIDDEN, INNER, EXPERTS, TOP_K = 512, 512, 32, 4


def routing(ranks: int, tokens: int) -> np.ndarray:
    """Experts of tokens [T,K], whose ranks have favourites that no numbering knows of."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(tokens, EXPERTS)) + 0.5 * rng.normal(size=EXPERTS)
    favourites = rng.permutation(EXPERTS).reshape(ranks, -1)
    for rank, mine in enumerate(np.array_split(np.arange(tokens), ranks)):
        scores[mine[:, None], favourites[rank]] += 1.5
    return np.argsort(-scores, axis=1)[:, :TOP_K]


def placements(ids: np.ndarray, ranks: int) -> dict[str, mt.Placement]:
    """Contiguous; solved for co-activation; and with its devices named by the tokens' homes."""
    trace = mt.RoutingTrace.from_arrays(ids[:, None], num_experts=EXPERTS)
    statistics = mt.RoutingStatistics.from_trace(trace, window=None)
    problem = mt.Problem(statistics, mt.Topology(ranks), regime="dispatch", max_imbalance=1.1)
    solved = mt.solve(problem).placement

    def named(order: tuple[int, ...]) -> mt.Placement:
        return mt.Placement(solved.slots[:, list(order)], num_experts=EXPERTS)

    def rows(placement: mt.Placement) -> int:
        return int(dispatch_rows(placement, trace).sum())

    return {
        "contiguous": mt.solve(problem, "contiguous").placement,
        "moetuner": solved,
        "moetuner, at home": min(map(named, permutations(range(ranks))), key=rows),
    }


@contextmanager
def timed_exchanges() -> Iterator[list[float]]:
    """Add up the seconds of collectives, after a barrier, and of the barriers: [2]."""
    seconds = [0.0, 0.0]
    original = dist.all_to_all_single

    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        dist.barrier()
        ready = time.perf_counter()
        done = original(*arguments, **options)
        seconds[0] += time.perf_counter() - ready
        seconds[1] += ready - begin
        return done

    with mock.patch.object(dist, "all_to_all_single", timed):
        yield seconds


def work(rank: int, store: str, ranks: int, tokens: int, repeat: int, answer: Any) -> None:
    """Run all layers on this rank; rank 0 answers with a row per placement."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=120)
    where = f"file://{store}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=limit)
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5
    x = torch.randn(tokens, HIDDEN, generator=generator)
    w = torch.rand(tokens, TOP_K, generator=generator)
    w /= w.sum(dim=1, keepdim=True)
    ids = routing(ranks, tokens)
    mine = np.array_split(np.arange(tokens), ranks)[rank]
    x, index, w = x[mine], torch.from_numpy(ids[mine].copy()), w[mine]
    first = int(mine[0])

    layers, pairs = {}, {}
    for name, placement in placements(ids, ranks).items():
        slots = torch.from_numpy(placement.slots[0, rank].astype(np.int64))
        experts = GroupedExperts(up[slots], down[slots]).requires_grad_(False)
        layers[name] = ExpertParallelMoE(experts, placement, 0)
        pairs[name] = ExpertParallelMoE(experts, placement, 0)

    def distinct(name: str) -> torch.Tensor:
        return layers[name](x, index, w, first_token=first)

    def each_pair(name: str) -> torch.Tensor:
        rows = x.repeat_interleave(TOP_K, dim=0)
        out = pairs[name](rows, index.reshape(-1, 1), w.reshape(-1, 1))
        return out.view(len(x), TOP_K, HIDDEN).sum(dim=1)

    def slowest(seconds: float) -> float:
        out = torch.tensor(seconds)
        dist.all_reduce(out, dist.ReduceOp.MAX)
        return out.item()

    times: dict[tuple[str, str], list[float]] = {}
    expected = distinct("contiguous")
    for _ in range(repeat):
        for name in layers:
            for kind, call in (("distinct", distinct), ("pair", each_pair)):
                dist.barrier()
                begin = time.perf_counter()
                answer = call(name)
                taken = slowest(time.perf_counter() - begin)
                times.setdefault((name, kind), []).append(taken)
                torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
    rows = []
    for name, layer in layers.items():
        shares = []
        for _ in range(max(repeat // 3, 2)):
            dist.barrier()
            begin = time.perf_counter()
            with timed_exchanges() as (seconds):
                distinct(name)
            total = time.perf_counter() - begin - seconds[1]
            shares.append(seconds[0] / total)
        sent = torch.from_numpy(layer.traffic.rows_sent)
        size = torch.from_numpy(
            layer.traffic.dispatch_bytes_sent + layer.traffic.combine_bytes_sent
        )
        other = torch.from_numpy(pairs[name].traffic.rows_sent)
        steps, pair_steps = layer.traffic.steps, pairs[name].traffic.steps
        largest = size.max()
        received = torch.from_numpy(layer.traffic.rows_received).sum()
        for value in (sent, other):
            dist.all_reduce(value)
        for value in (largest, received):
            dist.all_reduce(value, dist.ReduceOp.MAX)
        rows.append(
            (
                name,
                1e3 * float(np.median(times[name, "distinct"])),
                1e3 * float(np.median(times[name, "pair"])),
                float(np.median(shares)),
                int(sent.sum()) // steps,
                int(other.sum()) // pair_steps,
                int(received) // steps,
                int(largest) / steps / 2**20,
            )
        )
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print a row per placement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="256 tokens, twice")
    options = parser.parse_args()
    tokens, repeat = (256, 2) if options.quick else (options.tokens, options.repeat)
    context = torch.multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", options.ranks, tokens, repeat, answer)
        torch.multiprocessing.spawn(work, arguments, nprocs=options.ranks)
    print(f"{options.ranks} ranks, {tokens} tokens, median of {repeat}\n")
    print(f"{'':18} {'layer':>8} {'per pair':>9} {'exchange':>9} {'rows sent':>10}", end=" ")
    print(f"{'per pair':>9} {'busiest in':>11} {'MiB to a peer':>14}")
    for name, layer, pair, share, sent, other, received, size in answer.get():
        print(f"{name:18} {layer:5.1f} ms {pair:6.1f} ms {100 * share:7.0f} % {sent:10}", end=" ")
        print(f"{other:9} {received:11} {size:14.2f}")


if __name__ == "__main__":
    main()
