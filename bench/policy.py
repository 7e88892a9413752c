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

from typing import Any

import numpy as np
from harness import Table, arguments, imbalance, skewed_loads, timed
from peers import (
    WHEELS,
    Floats,
    Map,
    Policy,
    Size,
    available,
    copies_moved,
    flashlb,
    sglang,
    sglang_windows,
    swift_balancer,
    torch_module,
    vllm,
)
from unseen import generated

from moetuner.plugins import rebalance_experts

SIZE = Size(layers=58, experts=256, slots=288, ranks=32)


def loads(seed: int) -> Floats:
    """Return skewed loads [L,E]."""
    return skewed_loads(SIZE.layers, SIZE.experts, seed)


def score(load: Floats, experts: Map) -> float:
    """Largest / mean rank load, mean over windows and layers."""
    windows = load[None] if load.ndim == 2 else load
    return float(imbalance(windows, experts.reshape(SIZE.layers, SIZE.ranks, SIZE.width)).mean())


def ours(**rules: Any) -> Policy:
    """Return the plugins' policy; ``old=False`` for an engine's first call."""
    runs = rules.pop("old", True)

    def place(load: Floats, old: Map) -> Map:
        weight = load[0] if len(load) == 1 else load
        running = old if runs else None
        return rebalance_experts(weight, SIZE.slots, None, 1, SIZE.ranks, running, **rules)

    return place


def table(
    title: str,
    policies: dict[str, Policy],
    cases: list[tuple[Floats, Map, Floats]],
    repeat: int,
    yardstick: str,
) -> None:
    """Print a row per policy, for cases of windows, running map, and windows to be judged on."""
    print(f"\n{title}, {len(cases)} instances")
    times: dict[str, list[float]] = {name: [] for name in policies}
    scores: dict[str, list[float]] = {name: [] for name in policies}
    moved: dict[str, list[int]] = {name: [] for name in policies}
    for load, old, judged in cases:
        for name, policy in policies.items():
            for _ in range(repeat):
                slots, _, seconds = timed(lambda: policy(load, old))
                times[name].append(1e3 * seconds)
            scores[name].append(score(judged, slots))
            moved[name].append(copies_moved(SIZE, old, slots))
    row = Table(
        *("policy <24", "ms 8.2f", "imbalance 10.4f", "copies 8.0f"), f"worse than {yardstick} <1"
    )
    for name in policies:
        pairs = zip(scores[name], scores.get(yardstick, scores[name]), strict=True)
        worse = str(sum(mine > theirs for mine, theirs in pairs))
        row(name, np.median(times[name]), np.mean(scores[name]), np.mean(moved[name]), worse)


def main() -> None:
    """Print three tables."""
    given = arguments(__doc__, wheels=WHEELS, instances=200, slow=5, repeat=5, windows=64)
    torch_module()
    there: dict[str, Policy] = available(
        {
            "DeepSeek, SGLang": sglang,
            "vLLM": vllm,
            "deepseek_vec, SGLang": sglang_windows,
            "SwiftBalancer": swift_balancer,
            "FlashLB": flashlb,
        },
        given.wheels,
        SIZE,
    )
    for peer in there.values():
        peer(loads(0)[None], SIZE.initial())  # what is compiled or loaded, is by now
    old = SIZE.initial()
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
        runs = rebalance_experts(load, SIZE.slots, None, 1, SIZE.ranks)
        load = np.floor(load * np.random.default_rng([seed, 1]).lognormal(0, 0.2, load.shape))
        drifted.append((load[None], runs, load))
    table("one window, drifted", running, drifted, given.repeat, "DeepSeek, SGLang")

    if "SwiftBalancer" in there:
        print("\nas many copies as SwiftBalancer brings: imbalance of it, and of ours")
        for name, some in (("initial", slow), ("drifted", drifted)):
            for load, runs, judged in some:
                theirs = there["SwiftBalancer"](load, runs)
                budget = copies_moved(SIZE, runs, theirs)
                mine = ours(budget=budget)(load, runs)
                copies = f"{budget} copies, {copies_moved(SIZE, runs, mine)} of ours"
                print(f"{name}: {copies}: {score(judged, theirs):.4f} {score(judged, mine):.4f}")

    for seed in range(2):
        load = generated(SIZE.layers, 2 * given.windows, seed)
        seen, unseen = load[: given.windows], load[given.windows :]
        several = {name: of for name, of in there.items() if name != "SwiftBalancer"}
        several |= {"ours, first call": ours(old=False), "ours": ours(budget=10**6)}
        title = f"{given.windows} windows, judged on as many others, seed {seed}"
        table(title, several, [(seen, old, unseen)], 3, "FlashLB")


if __name__ == "__main__":
    main()
