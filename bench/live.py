"""The live policy beside engines' own, judged on the windows of load that come next.

    pip download --no-deps --dest build/wheels vllm==0.33.0 sglang==0.5.23
    pip install torch
    python bench/live.py [--wheels DIR] [--data DIR] [--decisions 8] [--seeds 1] [--first-seed 0]

Called as engines call them: every so many windows a policy decides on the loads since its last
decision, and its map is in force until the next one. All begin with the engines' initial map. vLLM
and SGLang's default add windows up before they decide; *ours* gets the same sum, *ours, windows*
every window, as SGLang's call has them. Engines count at most ``window_size`` passes (vLLM) or a
buffer's (SGLang) before a decision; here that is the whole interval.

Balancedness is mean / max rank load, the mean over layers and the windows in force. Copies come to
a rank that did not have them, a decision. Milliseconds are of the processor, medians, all in turns.

Loads drift: the logarithm of an expert's load is an autoregressive process, whose steps are 5, 15
or 30 % of its spread. With ``--data``, real load tables too. The last tables are curves, one of
drifting loads and one of each recorded table: every policy with fewer and fewer copies a decision;
engines' own, which have no budget, then change only those layers that gain most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from harness import arguments, timed
from peers import (
    WHEELS,
    Floats,
    Map,
    Policy,
    Size,
    available,
    copies_moved,
    sglang,
    torch_module,
    vllm,
)

from moetuner.plugins import rebalance_experts

SIZES = (Size(58, 256, 288, 32), Size(61, 384, 416, 32), Size(94, 512, 576, 64))
DRIFTS, INTERVALS = (0.05, 0.15, 0.3), (1, 4, 16)
# Standard deviation of the logarithm of loads, and tokens of a layer in a window.
SPREAD, TOKENS = 0.8, 2**24
# Tokens of a window of a recorded trace.
TRACE_WINDOW = 4096


def drifting(size: Size, windows: int, drift: float, seed: int) -> Floats:
    """Return windows of load [W,L,E], each drifted from the one before."""
    random = np.random.default_rng(seed)
    shape = (size.layers, size.experts)
    state = random.normal(0, SPREAD, shape)
    load = np.empty((windows, *shape))
    for window in range(windows):
        share = np.exp(state)
        load[window] = random.poisson(TOKENS * share / share.sum(axis=1, keepdims=True))
        state = np.sqrt(1 - drift**2) * state + drift * random.normal(0, SPREAD, shape)
    return load


def recorded(data: Path) -> list[tuple[str, Size, Floats]]:
    """Return real loads [W,L,E], in the order in which they were recorded."""
    trace = np.load(data / "gpt-oss-20b.npz")
    ids, experts = trace["expert_ids"].astype(np.int64), int(trace["num_experts"])
    layers = ids.shape[1]
    cell = np.arange(layers)[:, None] * experts + ids
    whole = range(0, len(ids) - TRACE_WINDOW + 1, TRACE_WINDOW)
    counts = [
        np.bincount(cell[at : at + TRACE_WINDOW].ravel(), minlength=layers * experts)
        for at in whole
    ]
    gpt_oss = np.stack(counts).reshape(-1, layers, experts).astype(np.float64)
    cases = [("gpt-oss-20b", Size(layers, experts, 40, 8), gpt_oss)]
    for name, slots, ranks in (
        ("deepseek-v3-phases", 288, 32),
        ("qwen3-30b-a3b-languages", 144, 16),
    ):
        load = np.load(data / f"{name}.npz")["load"].astype(np.float64)
        cases.append((name, Size(*load.shape[1:], slots, ranks), load))
    return cases


def rank_loads(size: Size, load: Floats, experts: Map) -> Floats:
    """Return the load of every rank [W,L,D]; copies share evenly."""
    of_slot = np.empty((len(load), size.layers, size.slots))
    for layer, row in enumerate(experts):
        of_slot[:, layer] = (load[:, layer] / np.bincount(row, minlength=size.experts))[:, row]
    return of_slot.reshape(len(load), size.layers, size.ranks, size.width).sum(axis=3)


def balancedness(size: Size, load: Floats, experts: Map) -> float:
    """Mean / max rank load, the mean over windows and layers that have load."""
    of_rank = rank_loads(size, load, experts)
    most = of_rank.max(axis=2)
    return float((of_rank.mean(axis=2)[most > 0] / most[most > 0]).mean())


def ours(size: Size, *, windows: bool = False, budget: int | None = None) -> Policy:
    """Return the plugins' policy, on the sum of windows or on each of them."""

    def place(load: Floats, old: Map) -> Map:
        weight = load if windows else load.sum(axis=0)
        sizes = (size.slots, size.groups, size.nodes, size.ranks)
        return rebalance_experts(weight, *sizes, old, budget=budget)

    return place


def partly(size: Size, policy: Policy, budget: int) -> Policy:
    """Return a policy that changes the layers that gain most, as far as a budget of copies goes."""

    def place(load: Floats, old: Map) -> Map:
        new = policy(load, old)
        total = load.sum(axis=0, keepdims=True)
        slowest = [rank_loads(size, total, each)[0].max(axis=1) for each in (old, new)]
        answer, left = old.copy(), budget
        one = Size(1, size.experts, size.slots, size.ranks)
        for layer in np.argsort(slowest[1] - slowest[0], kind="stable"):
            copies = copies_moved(one, old[layer], new[layer])
            if copies <= left:
                answer[layer] = new[layer]
                left -= copies
        return answer

    return place


@dataclass
class Run:
    """What a policy did: its map, and of every decision balancedness, copies, milliseconds."""

    now: Map
    balanced: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        figures = np.mean(self.balanced), np.mean(self.moved), np.median(self.took)
        return "{:.4f} {:6.0f} {:5.0f}".format(*figures)


def serve(size: Size, load: Floats, every: int, runs: dict[str, tuple[Policy, Run]]) -> None:
    """Decide every so many windows; all policies in turns."""
    for at in range(every, len(load), every):
        for policy, run in runs.values():
            new, _, seconds = timed(lambda: policy(load[at - every : at], run.now))
            run.took.append(1e3 * seconds)
            run.moved.append(copies_moved(size, run.now, new))
            run.balanced.append(balancedness(size, load[at : at + every], new))
            run.now = new


def row(
    label: str, size: Size, loads: list[Floats], every: int, policies: dict[str, Policy]
) -> None:
    """Print what every policy does, and ours against the better of the engines' own."""
    runs = {name: (policy, Run(size.initial())) for name, policy in policies.items()}
    for load in loads:
        for _, run in runs.values():
            run.now = size.initial()
        serve(size, load, every, runs)
    figures = {name: run for name, (_, run) in runs.items()}
    peers = [run for name, run in figures.items() if not name.startswith("ours")]
    words = [f"{name} {run}" for name, run in figures.items()]
    if peers:
        best = max(peers, key=lambda run: float(np.mean(run.balanced)))
        for name, run in figures.items():
            if name.startswith("ours"):
                gain = np.mean(run.balanced) - np.mean(best.balanced)
                moves = np.mean(run.moved) / max(np.mean(best.moved), 1)
                words.append(f"{name}: {gain:+.4f}, {moves:.2f} of the copies")
    print(f"{label:38}", *words, sep=" | ", flush=True)


def policies_of(size: Size, wheels: Path, windows: bool) -> dict[str, Policy]:
    """Return the policies of a row by name, engines' own where their wheels are there."""
    policies = available({"vLLM": vllm, "SGLang": sglang}, wheels, size)
    policies["ours"] = ours(size)
    if windows:
        policies["ours, windows"] = ours(size, windows=True)
    return policies


def curve(size: Size, load: Floats, wheels: Path) -> None:
    """Print balancedness by copies a decision, of all policies."""
    for share in (0.01, 0.03, 0.06, 0.12, 0.18, 0.35, 0.7, 1.0):
        budget = int(share * size.layers * size.slots)
        policies = policies_of(size, wheels, windows=False)
        limited = {
            name: partly(size, policy, budget) if name != "ours" else ours(size, budget=budget)
            for name, policy in policies.items()
        }
        row(f"at most {budget} copies", size, [load], 1, limited)


def main() -> None:
    """Print all tables."""
    every_size = list(range(len(SIZES)))
    given = arguments(
        __doc__,
        wheels=WHEELS,
        data=Path,
        decisions=8,
        seeds=1,
        first_seed=0,
        sizes=every_size,
    )
    torch_module()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    print("balancedness on the next windows, copies a decision, milliseconds")
    for size in (SIZES[number] for number in given.sizes):
        print(f"\n{size}")
        for drift in DRIFTS:
            for every in INTERVALS:
                count = (given.decisions + 1) * every
                loads = [drifting(size, count, drift, seed) for seed in seeds]
                label = f"drift {drift:.0%}, decides every {every}"
                row(label, size, loads, every, policies_of(size, given.wheels, every > 1))
    size = Size(58, 256, 288, 32, groups=8, nodes=4)
    print(f"\n{size}, 8 groups whole on 4 nodes")
    for drift in DRIFTS:
        loads = [drifting(size, given.decisions + 1, drift, seed) for seed in seeds]
        row(f"drift {drift:.0%}", size, loads, 1, policies_of(size, given.wheels, windows=False))
    real = [] if given.data is None else recorded(given.data)
    if real:
        print("\nrecorded loads")
        for name, size, load in real:
            for every in (1, 2) if len(load) < 16 else (1, 2, 4):
                label = f"{name}, {size}, every {every}"
                row(label, size, [load], every, policies_of(size, given.wheels, every > 1))
    drifted = drifting(SIZES[0], given.decisions + 1, 0.15, given.first_seed)
    for name, size, load in (("drift 15 %", SIZES[0], drifted), *real):
        print(f"\n{name}, {size}, deciding every window, by copies a decision")
        curve(size, load, given.wheels)


if __name__ == "__main__":
    main()
