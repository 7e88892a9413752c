"""Balancing with copies: balance() against the policies in vLLM's and SGLang's released wheels.

    pip download --no-deps --dest build/wheels vllm==0.33.0 sglang==0.5.23
    pip install --group bench
    python bench/copies.py [--wheels DIR] [--instances 200] [--repeat 20]

The policies are imported straight out of the wheels. Skewed loads, one instance per seed; an
instance is worse where the mean over layers of max / mean device load is. Hierarchical policies
get eight groups of experts on four nodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import WHEELS, Size, sglang, sglang_windows, vllm
from transitions import seconds

import moetuner as mt
from moetuner import _core

LAYERS, EXPERTS, DEVICES, SLOTS = 58, 256, 32, 288
GROUPS, NODES = 8, 4

Policy = Callable[[NDArray[np.float64]], NDArray[Any]]


def peers(wheels: Path) -> dict[str, Policy]:
    """Policies by name: load [L,E] in, expert of every slot [L,P] out."""
    found = {}
    for name, peer in (("vLLM", vllm), ("deepseek", sglang), ("deepseek_vec", sglang_windows)):
        for kind, groups, nodes in (("global", 1, 1), ("hierarchical", GROUPS, NODES)):
            size = Size(LAYERS, EXPERTS, SLOTS, DEVICES, groups, nodes)
            policy = peer(wheels, size)
            if isinstance(policy, str):
                raise SystemExit(policy)
            found[f"{name}, {kind}"] = of_one_window(policy, size.initial())
    return found


def of_one_window(policy: Callable[..., NDArray[Any]], old: NDArray[np.int64]) -> Policy:
    """Return the policy on one window, from a map that runs."""
    return lambda load: policy(load[None], old)


def imbalance(load: NDArray[np.float64], slots: NDArray[Any]) -> NDArray[Any]:
    """Largest / mean device load of every layer [L]; copies take equal parts."""
    slots = slots.reshape(LAYERS, -1)
    copies = np.stack([np.bincount(row[row >= 0], minlength=EXPERTS) for row in slots])
    assert copies.min() > 0
    share = np.concatenate([load / copies, np.zeros((LAYERS, 1))], axis=1)  # -1 is the last
    device = np.take_along_axis(share, slots, axis=1).reshape(LAYERS, DEVICES, -1).sum(axis=2)
    ratio: NDArray[np.float64] = device.max(axis=1) / device.mean(axis=1)
    return ratio


def main() -> None:
    """Print a row per policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, default=WHEELS)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=20)
    arguments = parser.parse_args()
    room, time = np.full((LAYERS, DEVICES), SLOTS // DEVICES), np.ones(DEVICES)

    def core(trials: int) -> Policy:
        return lambda load: _core.replicate_experts(load, room, time, trials=trials)

    def whole(load: NDArray[np.float64]) -> NDArray[Any]:
        per_device = SLOTS // DEVICES
        return mt.balance(load, devices=DEVICES, slots_per_device=per_device).slots

    policies: dict[str, Policy] = {
        "balance()": whole,
        "its core alone": lambda load: _core.replicate_experts(load, room, time),
        "without polish (eplb)": core(0),
        "patient (lpt)": core(100_000),
        **peers(arguments.wheels),
    }
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in policies}
    times = dict.fromkeys(policies, float("inf"))
    for seed in range(arguments.instances):
        random = np.random.default_rng(seed)
        load = np.floor(1e4 * random.lognormal(0, random.uniform(0.2, 2), (LAYERS, EXPERTS)))
        for name, policy in policies.items():
            found[name].append(imbalance(load, policy(load)))
            ours = not name.startswith(("vLLM", "deepseek"))
            for _ in range(arguments.repeat if ours and seed < 10 else int(seed < 10)):
                times[name] = min(times[name], seconds(lambda: policy(load)))
    mine = np.array(found["balance()"])
    print(f"{LAYERS} x {EXPERTS} to {SLOTS} slots on {DEVICES}, {len(mine)} instances")
    print(f"{'policy':34} {'best time':>9} {'imbalance':>9}   balance() is worse in")
    for name in policies:
        theirs = np.array(found[name])
        instances = int((mine.mean(axis=1) > theirs.mean(axis=1) + 1e-9).sum())
        layers = int((mine > theirs + 1e-9).sum())
        print(
            f"{name:34} {times[name] * 1e3:7.2f}ms {theirs.mean():9.5f}   "
            f"{instances} instances, {layers} of {mine.size} layers"
        )


if __name__ == "__main__":
    main()
