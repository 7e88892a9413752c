"""Balancing without replicas: moetuner's eplb and lpt against the policy in vLLM's released wheel.

    pip download --no-deps --dest build/wheels vllm==0.33.0
    pip install --group bench
    python bench/balance.py [--wheel FILE] [--seeds 5] [--repeat 5]

The policy is imported straight out of the wheel, without installing it. Skewed loads, one instance
per seed; times are medians over instances and repetitions, interleaved; ratios likewise.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import WHEELS, vllm_policy, wheel_of
from transitions import seconds

import moetuner as mt
from moetuner import _core

SIZES = [(58, 256, 32), (58, 256, 8)]  # layers, experts, devices

Policy = Callable[[NDArray[np.uint64], int], NDArray[np.int64]]


def of_vllm(wheel: Path | None) -> Policy | str:
    """Default policy of vLLM: load [L,E] and devices in, device of every expert [L,E] out.

    Where it cannot run: the reason.
    """
    wheel = wheel or wheel_of(WHEELS, "vllm")
    if wheel is None or not wheel.exists():
        return f"no wheel of vllm in {wheel or WHEELS}"
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return "torch is not installed"
    policy = vllm_policy(wheel)

    def balance(load: NDArray[np.uint64], devices: int) -> NDArray[np.int64]:
        experts = load.shape[1]
        weight = torch.from_numpy(load.astype(np.int64))
        slots: NDArray[np.int64] = policy.rebalance_experts(weight, experts, 1, 1, devices).numpy()
        device_of: NDArray[np.int64] = np.empty_like(slots)
        device = np.broadcast_to(np.arange(experts) // (experts // devices), slots.shape)
        np.put_along_axis(device_of, slots, device, axis=1)
        return device_of

    return balance


def loads(layers: int, experts: int, seed: int) -> NDArray[np.uint64]:
    """Log-normal popularity, drawn anew for every layer: the heaviest tenth does a third."""
    popularity = np.random.default_rng(seed).lognormal(0, 0.8, (layers, experts))
    load: NDArray[np.uint64] = np.floor(
        1e6 * popularity / popularity.sum(axis=1, keepdims=True)
    ).astype(np.uint64)
    return load


def imbalance(load: NDArray[np.uint64], device_of: NDArray[Any], devices: int) -> NDArray[Any]:
    """Largest / mean device load of every layer [L]."""
    of_device = np.stack(
        [
            np.bincount(row, weight.astype(np.float64), minlength=devices)
            for row, weight in zip(device_of.astype(np.int64), load, strict=True)
        ]
    )
    ratio: NDArray[np.float64] = of_device.max(axis=1) / of_device.mean(axis=1)
    return ratio


def policies(peer: Policy | None) -> dict[str, Policy]:
    def native(improve: bool) -> Policy:
        def pack(load: NDArray[np.uint64], devices: int) -> NDArray[np.int64]:
            slots = _core.lpt(load, devices, load.shape[1] // devices, improve=improve, threads=1)
            return mt.Placement(slots).device_of

        return pack

    def solved(method: str) -> Policy:
        def solve(load: NDArray[np.uint64], devices: int) -> NDArray[np.int64]:
            problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(devices))
            return mt.solve(problem, method, threads=1).placement.device_of.astype(np.int64)

        return solve

    named = {
        "eplb, core alone": native(False),
        "eplb, solve()": solved("eplb"),
        "lpt, core alone": native(True),
        "lpt, solve()": solved("lpt"),
    }
    return {**({"vLLM": peer} if peer else {}), **named}


def main() -> None:
    """Print a row per size and method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, help="default: the one in build/wheels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    peer = of_vllm(arguments.wheel)
    if isinstance(peer, str):
        print(f"vLLM's policy is left out: {peer}")
    named = policies(None if isinstance(peer, str) else peer)
    first = next(iter(named))
    print(f"{'layers x experts on devices':28} {'method':18} {'time':>9} {'ratio':>7}", end="")
    print(f" {'imbalance':>10}  layers better, worse; instances worse (than {first})")
    for layers, experts, devices in SIZES:
        times: dict[str, list[float]] = {name: [] for name in named}
        found: dict[str, list[NDArray[Any]]] = {name: [] for name in named}
        for seed in range(arguments.seeds):
            load = loads(layers, experts, seed)
            for name, policy in named.items():
                found[name].append(imbalance(load, policy(load, devices), devices))
            for _ in range(arguments.repeat):
                for name, policy in named.items():
                    times[name].append(seconds(lambda: policy(load, devices)))
        for name in named:
            pairs = zip(times[first], times[name], strict=True)
            ratio = statistics.median(theirs / mine for theirs, mine in pairs)
            mine, theirs = np.array(found[name]), np.array(found[first])
            better, worse = int((mine < theirs).sum()), int((mine > theirs).sum())
            instances = int((mine.mean(axis=1) > theirs.mean(axis=1)).sum())
            label = f"{layers} x {experts} on {devices}"
            print(
                f"{label:28} {name:18} {statistics.median(times[name]) * 1e3:7.2f}ms {ratio:6.1f}x "
                f"{mine.mean():10.5f}  {better}, {worse}; {instances}"
            )


if __name__ == "__main__":
    main()
