"""Balancing with copies: balance() against the policies in vLLM's and SGLang's released wheels.

    pip download --no-deps --dest build/wheels vllm==0.33.0 sglang==0.5.23
    pip install --group bench
    python bench/copies.py [--wheels DIR] [--instances 200] [--repeat 20]

The policies are imported straight out of the wheels. Skewed loads, one instance per seed; an
instance is worse where the mean over layers of max / mean device load is. Hierarchical policies
get eight groups of experts on four nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Table, arguments, imbalance, timed
from numpy.typing import NDArray
from peers import WHEELS, Size, sglang, sglang_windows, vllm

import moetuner as mt
from moetuner import _core

LAYERS, EXPERTS, DEVICES, SLOTS = 58, 256, 32, 288
GROUPS, NODES = 8, 4

# Load [L,E] in, expert of every slot out.
Policy = Callable[[NDArray[np.float64]], NDArray[Any]]


def peers(wheels: Path) -> dict[str, Policy]:
    """Return policies of engines by name."""
    policies: dict[str, Policy] = {}
    for name, peer in (("vLLM", vllm), ("deepseek", sglang), ("deepseek_vec", sglang_windows)):
        for kind, groups, nodes in (("global", 1, 1), ("hierarchical", GROUPS, NODES)):
            size = Size(LAYERS, EXPERTS, SLOTS, DEVICES, groups, nodes)
            policy = peer(wheels, size)
            if isinstance(policy, str):
                raise SystemExit(policy)
            policies[f"{name}, {kind}"] = lambda load, of=policy, size=size: of(
                load[None], size.initial()
            )
    return policies


def main() -> None:
    """Print a row per policy."""
    given = arguments(__doc__, wheels=WHEELS, instances=200, repeat=20)
    capacity, time = np.full((LAYERS, DEVICES), SLOTS // DEVICES), np.ones(DEVICES)

    def core(**trials: int) -> Policy:
        return lambda load: _core.replicate_experts(load, capacity, time, **trials)

    policies: dict[str, Policy] = {
        "balance()": lambda load: (
            mt.balance(load, devices=DEVICES, slots_per_device=SLOTS // DEVICES).slots
        ),
        "its core alone": core(),
        "without polish (eplb)": core(trials=0),
        "patient (lpt)": core(trials=100_000),
        **peers(given.wheels),
    }
    ratios: dict[str, list[NDArray[Any]]] = {name: [] for name in policies}
    times = dict.fromkeys(policies, float("inf"))
    for seed in range(given.instances):
        random = np.random.default_rng(seed)
        load = np.floor(1e4 * random.lognormal(0, random.uniform(0.2, 2), (LAYERS, EXPERTS)))
        for name, policy in policies.items():
            slots = policy(load).reshape(LAYERS, DEVICES, -1)
            ratios[name].append(imbalance(load[None], slots)[0])
            ours = not name.startswith(("vLLM", "deepseek"))
            for _ in range(given.repeat if ours and seed < 10 else int(seed < 10)):
                times[name] = min(times[name], timed(lambda: policy(load))[1])
    mine = np.array(ratios["balance()"])
    print(f"{LAYERS} x {EXPERTS} to {SLOTS} slots on {DEVICES}, {len(mine)} instances")
    row = Table("policy <34", "best ms 9.2f", "imbalance 9.5f", "balance() is worse in <1")
    for name in policies:
        theirs = np.array(ratios[name])
        instances = int((mine.mean(axis=1) > theirs.mean(axis=1) + 1e-9).sum())
        layers = int((mine > theirs + 1e-9).sum())
        worse = f"{instances} instances, {layers} of {mine.size} layers"
        row(name, 1e3 * times[name], theirs.mean(), worse)


if __name__ == "__main__":
    main()
