"""The ranks: each runs the layers that the benchmark asks for, and stamps every exchange.

All are forks of one process, so that torch is imported once.

Stamps are of the machine's clock, which all ranks share, so that what a rank waits for the others
is known without a barrier. Tasks come by standard input, a line of JSON each, and a line answers
each; so a rank whose benchmark is gone ends by itself.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import layer_norm

import moetuner as mt
from moetuner.torch import ExpertParallelMoE, GroupedExperts

Stamp = tuple[float, float]
# What a difference of rounding is at most, in doubles, and how much larger after each layer: five
# times what was measured, which is 4e-15, and 1.18 a layer.
FIRST, GROWTH = 2e-14, 1.2


class Clock:
    """When this rank entered and left each exchange, and its experts.

    Attributes
    ----------
    exchanges, computed
        Since the beginning of the step.
    sent
        Bytes of rows sent to every rank [D] since then.
    late
        How often a pace could not be kept.
    """

    def __init__(self) -> None:
        self.late = 0
        self._exchange = dist.all_to_all_single
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.exchanges: list[Stamp] = []
        self.computed: list[Stamp] = []
        self.sent = np.zeros(dist.get_world_size(), dtype=np.int64)

    def exchange(self, out: Tensor, rows: Tensor, *splits: list[int], **options: Any) -> Any:
        """Exchange as torch does, stamp it, and count what goes out if it has splits."""
        begin = time.perf_counter()
        done = self._exchange(out, rows, *splits, **options)
        self.exchanges.append((begin, time.perf_counter()))
        if splits:
            self.sent += np.array(splits[1]) * (rows[:1].numel() * rows.element_size())
        return done


class PacedExperts:
    """The experts of a rank's slots, as fast as on a part of a core.

    Ranks share the cores of this machine. So each one sleeps after its experts until they have
    taken ``pace`` times the seconds of a core that they used: which other ranks compute meanwhile
    then makes no difference, as between GPUs.
    """

    def __init__(self, experts: GroupedExperts, clock: Clock, pace: float) -> None:
        self.experts, self.clock, self.pace = experts, clock, pace

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Compute rows [N,H], the first ``counts[0]`` of them by slot 0 and so on [S]."""
        begin, processor = time.perf_counter(), time.thread_time()
        out: Tensor = self.experts(rows, counts)
        until = begin + self.pace * (time.thread_time() - processor)
        left = until - time.perf_counter()
        if left > 0:
            time.sleep(left)
        else:
            self.clock.late += 1
        self.clock.computed.append((begin, time.perf_counter()))
        return out

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the slots."""
        return self.experts.weights()


class Layers:
    """The layers of a model under one placement, on this rank.

    Parameters
    ----------
    up, down
        Weights of the experts, the same in all layers [E,2I,H] and [E,H,I].
    placement
        Where the experts are.
    clock, pace
        As of ``PacedExperts``.
    """

    def __init__(
        self, up: Tensor, down: Tensor, placement: mt.Placement, clock: Clock, pace: float
    ) -> None:
        self.placement = placement
        self.clock, self.ranks, self.rank = clock, dist.get_world_size(), dist.get_rank()
        slots = [
            torch.from_numpy(layer_slots[self.rank].astype(np.int64))
            for layer_slots in placement.slots
        ]
        grouped = (
            GroupedExperts(up[layer_slots], down[layer_slots]).requires_grad_(False)
            for layer_slots in slots
        )
        self.experts = [PacedExperts(grouped_experts, clock, pace) for grouped_experts in grouped]
        every = range(placement.layers)
        self.layers = [ExpertParallelMoE(self.experts[n], placement, n) for n in every]
        flat = torch.from_numpy(placement.slots.reshape(placement.layers, -1).astype(np.int64))
        self.slot_of, self.width = flat.argsort(dim=1), placement.slots_per_device

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor, ends: list[float]) -> Any:
        """Run the tokens that are at home here, [T,H] and [T,L,K], through all layers."""
        home = torch.arange(self.rank, len(x), self.ranks)
        state, chosen, weights = x[home], ids[home], weights[home]
        for number, layer in enumerate(self.layers):
            state = normal(state + layer(state, chosen[:, number], weights))
            ends.append(time.perf_counter())
        return state, home

    def pairs(self, x: Tensor, ids: Tensor, weights: Tensor, ends: list[float]) -> Any:
        """Do as `dispatch`, with a row for each expert of a token instead of each device."""
        home = torch.arange(self.rank, len(x), self.ranks)
        state, chosen, weights = x[home], ids[home], weights[home].reshape(-1, 1)
        for number, layer in enumerate(self.layers):
            rows = state.repeat_interleave(ids.shape[2], dim=0)
            out = layer(rows, chosen[:, number].reshape(-1, 1), weights)
            state = normal(state + out.view(*state.shape[:1], -1, state.shape[1]).sum(dim=1))
            ends.append(time.perf_counter())
        return state, home

    def follow(self, x: Tensor, ids: Tensor, weights: Tensor, ends: list[float]) -> Any:
        """Run tokens [T,H] of one expert a layer [T,L,1], whose states stay where it was."""
        slot = torch.stack([table[ids[:, n, 0]] for n, table in enumerate(self.slot_of)])
        token = torch.nonzero(slot[0] // self.width == self.rank)[:, 0]
        state = x[token]
        for number, experts in enumerate(self.experts):
            own = slot[number, token] - self.rank * self.width
            order = own.argsort(stable=True)
            state, token = state[order], token[order]
            out = experts(state, own.bincount(minlength=self.width))
            state = normal(state + weights[token] * out)
            if number + 1 < len(self.experts):
                state, token = self._move(state, token, slot[number + 1, token] // self.width)
            ends.append(time.perf_counter())
        return state, token

    def _move(self, state: Tensor, token: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Send states, with their tokens' numbers beside them, to their next rank."""
        order, send = target.argsort(stable=True), target.bincount(minlength=self.ranks)
        came = torch.empty_like(send)
        dist.all_to_all_single(came, send)
        integer = torch.int32 if state.dtype == torch.float32 else torch.int64
        numbers = token.to(integer)[:, None].view(state.dtype)
        rows = torch.cat([state, numbers], dim=1)[order]
        arrived = rows.new_empty(int(came.sum()), rows.shape[1])
        dist.all_to_all_single(arrived, rows, came.tolist(), send.tolist())
        return arrived[:, :-1], arrived[:, -1:].clone().view(integer)[:, 0].long()


def normal(state: Tensor) -> Tensor:
    """Keep states of the same size over all layers."""
    return layer_norm(state, state.shape[1:])


def alone(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Run tokens through all layers with all experts in one process, each expert on its own."""
    for number in range(ids.shape[1]):
        out = torch.zeros_like(x)
        for expert in range(len(up)):
            token, nth = torch.nonzero(ids[:, number] == expert, as_tuple=True)
            one = GroupedExperts(up[expert, None], down[expert, None])
            values = one(x[token], torch.tensor([len(token)]))
            out.index_add_(0, token, weights[token, nth, None] * values)
        x = normal(x + out)
    return x


def replay(task: dict[str, Any], clock: Clock, pace: float) -> dict[str, Any]:
    """Run every step under every placement in turns; gives stamps, and bytes sent.

    The task names a file with steps' experts [W,T,L,K] and placements' slots [P,L,D,S], the
    ``regimes``, the size of ``hidden`` and ``inner``, and whether to ``check`` the results of the
    first step against those of one process. Regimes count as placements: one after the other.
    """
    task_arrays = np.load(task["file"])
    steps, experts = torch.from_numpy(task_arrays["ids"]).long(), int(task_arrays["experts"])
    hidden, inner = task["hidden"], task["inner"]
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, inner, generator=generator) / inner**0.5
    x = torch.randn(steps.shape[1], hidden, generator=generator)
    weights = torch.full((steps.shape[1], steps.shape[3]), 1 / steps.shape[3])
    models = []
    for slots in task_arrays["slots"]:
        placement = mt.Placement(slots, num_experts=experts)
        models.append(Layers(up, down, placement, clock, pace))
    runs = [getattr(model, regime) for regime in task["regimes"] for model in models]
    if task["check"]:
        for regime in task["regimes"]:
            for model in models:
                check(model, regime, x, steps[0], weights, up, down)
    clock.late = 0
    stamps = [stamped(partial(run, x, step, weights), clock) for step in steps for run in runs]
    names = ("exchanges", "computed", "ends", "sent")
    parts = (np.array(arrays) for arrays in zip(*stamps, strict=True))
    named = zip(names, parts, strict=True)
    shape = (len(steps), len(runs))
    late = np.array(clock.late / (len(stamps) * task_arrays["slots"].shape[1]))
    return {"late": late, **{name: part.reshape(*shape, *part.shape[1:]) for name, part in named}}


def check(
    model: Layers, regime: str, x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> None:
    """Compare the results of a step with those of one process, in doubles; raise if they differ.

    Sums of another order round otherwise, and a layer hands on what came before a sixth larger: in
    float32 2e-6 after the first layer, 1.4e-4 after 26, 3e-3 after 48. After a hundred nothing
    would be left to compare, so that doubles are checked. Of what is timed, float32, the tokens
    that end here are the same ones.
    """
    exact = Layers(up.double(), down.double(), model.placement, model.clock, 0.0)
    token = getattr(model, regime)(x, ids, weights, [])[1]
    x, weights, up, down = (tensor.double() for tensor in (x, weights, up, down))
    state, expected = getattr(exact, regime)(x, ids, weights, [])
    torch.testing.assert_close(token, expected)
    compare(state, alone(x[token], ids[token], weights[token], up, down), ids.shape[1])


def compare(state: Tensor, expected: Tensor, layers: int) -> None:
    """Raise where doubles differ by more than the rounding of so many layers."""
    torch.testing.assert_close(state, expected, rtol=0, atol=FIRST * GROWTH**layers)


def stamped(run: Callable[[list[float]], Any], clock: Clock) -> tuple[NDArray[Any], ...]:
    """Run all layers from a barrier; gives stamps of exchanges [L,X,2], experts and ends; bytes."""
    clock.begin()
    dist.barrier()
    ends = [time.perf_counter()]
    run(ends)
    layers = len(clock.computed)
    exchanges, each = np.array(clock.exchanges), -(-len(clock.exchanges) // layers)
    # What does not move on from the last layer takes no time.
    none = np.full((layers * each - len(exchanges), 2), ends[-1])
    exchanges = np.concatenate([exchanges.reshape(-1, 2), none]).reshape(layers, each, 2)
    sent = clock.sent * (np.arange(len(clock.sent)) != dist.get_rank())
    return exchanges, np.array(clock.computed), np.array(ends), sent


def enter(space: str) -> None:
    """Move this process into a network namespace."""
    with Path(space).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), space)


def serve(rank: int, ranks: int, folder: Path, pace: float) -> None:
    """Join the others, and answer tasks until there are no more."""
    torch.set_num_threads(1)
    where, limit = f"file://{folder / 'store'}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=limit)
    clock = Clock()
    with mock.patch.object(dist, "all_to_all_single", clock.exchange), torch.no_grad():
        try:
            for line in sys.stdin:
                answer = replay(json.loads(line), clock, pace)
                np.savez(folder / f"answer{rank}.npz", **answer)
                print("done", flush=True)
        except Exception as error:
            # Before its connections close: what other ranks say of that comes later.
            failure = {"at": time.perf_counter(), "error": f"{type(error).__name__}: {error}"}
            (folder / f"failed{rank}").write_text(json.dumps(failure))
            raise


def main() -> None:
    """Fork all ranks, and say their processes, one a line; then each rank that ends, and how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pace", type=float)
    parser.add_argument("ranks", nargs="+", metavar="TASKS,ANSWERS,NAMESPACE")
    asked = parser.parse_args()
    rows = [row.split(",", 2) for row in asked.ranks]
    pipes, spaces = [(int(row[0]), int(row[1])) for row in rows], [row[2] for row in rows]
    rank_of: dict[int, int] = {}
    for rank, (tasks, answers) in enumerate(pipes):
        process = os.fork()
        if process == 0:
            with (asked.folder / f"errors{rank}").open("w") as errors:
                for number, end in enumerate((tasks, answers, errors.fileno())):
                    os.dup2(end, number)
            close(pipes)
            if spaces[rank]:
                enter(spaces[rank])
            return serve(rank, len(rows), asked.folder, asked.pace)
        rank_of[process] = rank
        print(process, flush=True)
    close(pipes)
    while rank_of:
        process, status = os.wait()
        print(rank_of.pop(process), os.waitstatus_to_exitcode(status), flush=True)
    return None


def close(pipes: list[tuple[int, int]]) -> None:
    """Close what only the ranks themselves hold, so that its end is theirs."""
    for end in itertools.chain.from_iterable(pipes):
        os.close(end)


if __name__ == "__main__":
    main()
