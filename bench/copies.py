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
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from balance import WHEELS, vllm_module
from numpy.typing import NDArray
from transitions import seconds

import moetuner as mt
from moetuner import _core

LAYERS, EXPERTS, DEVICES, SLOTS = 58, 256, 32, 288
GROUPS, NODES = 8, 4

Policy = Callable[[NDArray[np.float64]], NDArray[Any]]


def peers(wheels: Path) -> dict[str, Policy]:
    """Policies by name: load [L,E] in, expert of every slot [L,P] out."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb", "sglang.srt.eplb.eplb_algorithms"):
        package = types.ModuleType(name)
        wheel = next(iter(sorted(wheels.glob("sglang-*.whl"))))
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    vllm = vllm_module(next(iter(sorted(wheels.glob("vllm-*.whl")))))
    plain: Any = importlib.import_module("sglang.srt.eplb.eplb_algorithms.deepseek")
    vec: Any = importlib.import_module("sglang.srt.eplb.eplb_algorithms.deepseek_vec")

    def call_vllm(groups: int, nodes: int) -> Policy:
        return lambda load: vllm.rebalance_experts(
            torch.from_numpy(load), SLOTS, groups, nodes, DEVICES
        ).numpy()

    def call_plain(hierarchical: bool) -> Policy:
        return lambda load: plain.rebalance_experts(
            torch.from_numpy(load), SLOTS, GROUPS, NODES, DEVICES, hierarchical
        )[0].numpy()

    def call_vec(hierarchical: bool) -> Policy:
        return lambda load: vec.rebalance_experts(
            tokens_per_expert=torch.from_numpy(load)[None],
            num_physical_experts=SLOTS,
            num_local_physical_experts=SLOTS // DEVICES,
            num_groups=GROUPS,
            num_nodes=NODES,
            enable_hierarchical=hierarchical,
        )[0].numpy()

    return {
        "vLLM, global": call_vllm(1, 1),
        "vLLM, hierarchical": call_vllm(GROUPS, NODES),
        "SGLang deepseek, global": call_plain(False),
        "SGLang deepseek, hierarchical": call_plain(True),
        "SGLang deepseek_vec, global": call_vec(False),
        "SGLang deepseek_vec, hierarchical": call_vec(True),
    }


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
            ours = not name.startswith(("vLLM", "SGLang"))
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
