"""Balancing without replicas: moetuner's eplb and lpt against the policy in vLLM's released wheel.

    pip download --no-deps --dest build/wheels vllm==0.33.0
    pip install --group bench
    python bench/balance.py [--wheel FILE] [--seeds 5] [--repeat 5]

The policy is imported straight out of the wheel, without installing it. Skewed loads, one instance
per seed; times are medians over instances and repetitions, interleaved; ratios likewise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Table, arguments, imbalance, in_turns, skewed_loads
from numpy.typing import NDArray
from peers import WHEELS, Size, vllm

import moetuner as mt
from moetuner import _core

SIZES = [(58, 256, 32), (58, 256, 8)]  # layers, experts, devices

# Load [L,E] and devices in, slots [L,D,S] out.
Policy = Callable[[NDArray[np.uint64], int], NDArray[Any]]


def of_vllm(wheel: Path | None) -> Policy | str:
    """Return the default policy of vLLM; where it cannot run, the reason."""
    wheels = WHEELS if wheel is None else wheel.parent
    try:
        reason = vllm(wheels, Size(1, 2, 2, 2))
    except ImportError as error:
        return str(error)

    def balance(load: NDArray[np.uint64], devices: int) -> NDArray[Any]:
        size = Size(*load.shape, load.shape[1], devices)
        policy = vllm(wheels, size)
        assert not isinstance(policy, str)
        return policy(load[None].astype(np.int64), size.initial()).reshape(len(load), devices, -1)

    return reason if isinstance(reason, str) else balance


def native(load: NDArray[np.uint64], devices: int) -> NDArray[Any]:
    """Pack loads [L,E] by the core alone, onto slots [L,D,S]."""
    size = load.shape[1] // devices
    device_of = _core.pack(load, devices, (size, size), threads=1)[0]
    return mt.Placement.from_assignment(device_of, devices).slots


def solved(method: str) -> Policy:
    """Return a method as users call it."""

    def solve(load: NDArray[np.uint64], devices: int) -> NDArray[Any]:
        problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(devices))
        return mt.solve(problem, method, threads=1).placement.slots

    return solve


def main() -> None:
    """Print a row per size and method."""
    given = arguments(__doc__, wheel=Path, seeds=5, repeat=5)
    peer = of_vllm(given.wheel)
    named = {} if isinstance(peer, str) else {"vLLM": peer}
    if isinstance(peer, str):
        print(f"vLLM's policy is left out: {peer}")
    named["lpt, core alone"] = native
    for method in ("eplb", "lpt"):
        named[f"{method}, solve()"] = solved(method)
    first = next(iter(named))
    row = Table(
        *("layers x experts on devices <28", "method <18", "ms 8.2f", "ratio 6.1f"),
        *("imbalance 10.5f", f"layers better and worse; instances worse (than {first}) <1"),
    )
    for layers, experts, devices in SIZES:
        times: dict[str, list[float]] = {name: [] for name in named}
        ratios: dict[str, list[NDArray[Any]]] = {name: [] for name in named}
        for seed in range(given.seeds):
            load = skewed_loads(layers, experts, seed).astype(np.uint64)
            for name, policy in named.items():
                ratios[name].append(imbalance(load[None], policy(load, devices))[0])
            works = {name: lambda of=of: of(load, devices) for name, of in named.items()}
            for name, seconds in in_turns(works, given.repeat).items():
                times[name] += seconds
        for name in named:
            pairs = zip(times[first], times[name], strict=True)
            faster = statistics.median(theirs / mine for theirs, mine in pairs)
            mine, theirs = np.array(ratios[name]), np.array(ratios[first])
            counts = f"{(mine < theirs).sum()}, {(mine > theirs).sum()}"
            counts += f"; {(mine.mean(axis=1) > theirs.mean(axis=1)).sum()}"
            label = f"{layers} x {experts} on {devices}"
            row(label, name, 1e3 * statistics.median(times[name]), faster, mine.mean(), counts)


if __name__ == "__main__":
    main()
