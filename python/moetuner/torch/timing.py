"""Time the experts of one MoE layer on this machine, for a cost model."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moetuner.torch.parallel.experts import GroupedExperts

# Tokens of the batches; microseconds of a call from which no larger batch is timed; microseconds
# that all calls of a batch take, about.
BATCHES, LONGEST_US, ENOUGH_US = [2**n for n in range(12)], 5e5, 3e5
# Bytes that are written before each call, more than the device's last-level cache holds.
SWEEP = {"cuda": 2**28, "cpu": 2**26}


class Stopwatch:
    """Measures the microseconds of a call with cold caches, as they are between two layers.

    The time is the median of several calls. On a CPU, where other programs may run, it is the
    minimum.
    """

    def __init__(self, device: torch.device, repeat: int = 20) -> None:
        self.device, self.repeat = device, repeat
        self.sweep = torch.empty(SWEEP.get(device.type, 2**26), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Return the time of ``repeat`` calls after a warm-up, or of fewer if a call takes long."""
        fastest = min(self._time_once(call) for _ in range(3))
        repeat = min(self.repeat, max(int(ENOUGH_US / fastest), 4))
        times = [self._time_once(call) for _ in range(repeat)]
        return statistics.median(times) if self.device.type == "cuda" else min(times)

    def _time_once(self, call: Callable[[], object]) -> float:
        """Return the microseconds of one call."""
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


def time_experts(
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    *,
    device: str | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[list[tuple[int, int, float]], str]:
    """Time the gated experts of a layer in batches of growing size, spread evenly over experts.

    Returns tokens (each counted once per expert), active experts and microseconds of every batch,
    and the name of the device. Each batch is timed on 1, 4, 16, ... and on all experts, as far as
    it has tokens for so many. A CPU is timed on one core, as others may be busy.
    """
    torch_device = torch.device(device or default_device())
    # Few CPUs multiply matrices of 16 bits fast.
    dtype = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    up, down = (
        torch.zeros(experts, *shape, device=torch_device, dtype=dtype).uniform_(-0.01, 0.01)
        for shape in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    layer, watch = GroupedExperts(up, down).requires_grad_(False), Stopwatch(torch_device)
    times: list[tuple[int, int, float]] = []
    threads = torch.get_num_threads()
    if torch_device.type == "cpu":
        torch.set_num_threads(1)
    for number, batch in enumerate(BATCHES):
        progress(number / len(BATCHES))
        tokens = batch * top_k
        rows = torch.randn(tokens, hidden, device=torch_device, dtype=dtype)
        for active in sorted({experts, *(4**n for n in range(8) if 4**n < experts)}):
            if active > tokens:
                continue
            tokens_of_expert = torch.zeros(experts, dtype=torch.int64)
            tokens_of_expert[:active] = tokens // active
            tokens_of_expert[: tokens % active] += 1
            counts = tokens_of_expert.to(torch_device)
            times.append((tokens, active, watch(partial(layer, rows, counts))))
        if times[-1][2] > LONGEST_US:
            break
    torch.set_num_threads(threads)
    if torch_device.type == "cuda":
        return times, torch.cuda.get_device_name(torch_device)
    return times, f"one core ({platform.machine()})"
