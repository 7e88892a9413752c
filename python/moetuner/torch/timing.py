"""Timing the experts of one MoE layer where this runs, for a cost model."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moetuner.torch.parallel.experts import GroupedExperts

# Tokens of the batches; microseconds of a call after which no larger batch is timed, and of all
# calls of a batch.
BATCHES, LONGEST_US, ENOUGH_US = [2**n for n in range(14)], 1e6, 3e5
# Bytes that are written before each call: more than the last-level cache of the device holds.
SWEEP = {"cuda": 2**28, "cpu": 2**26}

Times = list[tuple[int, int, float]]


class Stopwatch:
    """Microseconds of a call with caches as cold as between two layers.

    The median of some calls; on a CPU, where others may run, the least.
    """

    def __init__(self, device: torch.device, repeat: int = 20) -> None:
        self.device, self.repeat = device, repeat
        self.sweep = torch.empty(SWEEP.get(device.type, 2**26), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Call to warm up, then ``repeat`` times, fewer if a call takes long."""
        fastest = min(self._once(call) for _ in range(3))
        repeat = min(self.repeat, max(int(ENOUGH_US / fastest), 4))
        times = [self._once(call) for _ in range(repeat)]
        return statistics.median(times) if self.device.type == "cuda" else min(times)

    def _once(self, call: Callable[[], object]) -> float:
        self.sweep.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begin)
        events: Any = torch.cuda.Event
        begin_event, end_event = (events(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return float(1e3 * begin_event.elapsed_time(end_event))


def default_device() -> str:
    """Return cuda where torch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(device: torch.device) -> torch.dtype:
    """Return the type of weights: 16 bits, but 32 where few CPUs multiply 16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def random_experts(
    hidden: int, intermediate: int, experts: int, device: torch.device
) -> GroupedExperts:
    """Build gated experts with random weights, in bfloat16; float32 where that is slow."""
    torch.manual_seed(0)
    up, down = (
        torch.randn(experts, *shape, device=device, dtype=dtype_of(device)) / hidden**0.5
        for shape in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    return GroupedExperts(up, down).requires_grad_(False)


def time_experts(
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    *,
    device: str | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Times, str]:
    """Time the experts of a layer in batches of one token and more, evenly spread.

    Each batch is timed on as many experts as it can visit, and on a quarter of them.

    Parameters
    ----------
    hidden, intermediate
        Sizes of an expert.
    experts
        Experts on the device.
    top_k
        Experts that a token visits.
    device
        As torch names it; by default cuda, else cpu.
    progress
        Called with the share of the batches that are timed.

    Returns
    -------
    tuple
        Tokens (each counted once per expert), active experts and microseconds of every batch, and
        the name of the device.
    """
    where = torch.device(device or default_device())
    layer, watch = random_experts(hidden, intermediate, experts, where), Stopwatch(where)
    times: Times = []
    for number, batch in enumerate(BATCHES):
        progress(number / len(BATCHES))
        count, most = batch * top_k, min(batch * top_k, experts)
        rows = torch.randn(count, hidden, device=where, dtype=dtype_of(where))
        for active in sorted({max(most // 4, 1), most}):
            shares = torch.zeros(experts, dtype=torch.int64)
            shares[:active] = count // active
            shares[: count % active] += 1
            counts = shares.to(where)
            times.append((count, active, watch(partial(layer, rows, counts))))
        if times[-1][2] > LONGEST_US:
            break
    is_gpu = where.type == "cuda"
    return times, torch.cuda.get_device_name(where) if is_gpu else platform.processor() or "a CPU"
