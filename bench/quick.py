"""Balance in windows within milliseconds: the quick search by trials, and FlashLB beside it.

    pip download --no-deps --dest build/wheels vllm-ascend==0.26.0rc1
    pip install torch numba scipy
    python bench/quick.py [--wheels build/wheels] [--seeds 2] [--repeat 3] [--large] [--data FOLDER]

Windows of the generated model of `bench/unseen.py`, half of them seen, judged on the others; one
thread, milliseconds of the processor, medians, all methods in turns. *Mixed* windows are means of
ten unseen ones, one of each domain. `--large` has 384 and 512 experts; `--data` a folder with real
load tables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Table, arguments, imbalance, timed
from numpy.typing import NDArray
from peers import WHEELS, flashlb
from unseen import eplb, generated, of_peer

import moetuner as mt
from moetuner.plugins import rebalance_experts

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]
# Windows [W,L,E], devices and slots per device in; slots [L,D,S] out.
Method = Callable[[Floats, int, int], Slots]


def plugin(load: Floats, devices: int, width: int) -> Slots:
    """Place as the plugins do at an engine's first call."""
    answer = rebalance_experts(load, devices * width, None, 1, devices)
    return answer.reshape(-1, devices, width).astype(np.int32)


def solved(method: str, per_slot: int | None = None) -> Method:
    """Solve as users do, by so many trials for a slot."""

    def place(load: Floats, devices: int, width: int) -> Slots:
        statistics = mt.RoutingStatistics.from_load(np.round(load).astype(np.uint64))
        problem = mt.Problem(
            statistics, mt.Topology(devices), slots_per_device=width, objective="balance"
        )
        trials = None if per_slot is None else per_slot * devices * width
        return mt.solve(problem, method, threads=1, iterations=trials).placement.slots

    return place


def compare(
    title: str,
    cases: list[tuple[Floats, Floats]],
    size: tuple[int, int],
    methods: dict[str, Method],
    repeat: int,
) -> None:
    """Print a row per method, for cases of windows seen and unseen."""
    devices, width = size
    windows, layers, experts = cases[0][0].shape
    print(
        f"\n{title}: {windows} windows, {layers} x {experts} on {devices} x {width}, "
        f"{len(cases)} instances"
    )
    times: dict[str, list[float]] = {name: [] for name in methods}
    figures: dict[str, list[list[float]]] = {name: [] for name in methods}
    for seen, unseen in cases:
        tens = unseen[: len(unseen) // 10 * 10]
        mixed = tens.reshape(-1, 10, *unseen.shape[1:]).mean(axis=1) if len(tens) else unseen
        for turn in range(repeat):
            for name, method in methods.items():
                slots, _, seconds = timed(lambda of=method: of(seen, devices, width))
                times[name].append(1e3 * seconds)
                if turn == 0:
                    judged = (imbalance(of, slots).mean() for of in (seen, unseen, mixed))
                    figures[name].append([float(of) for of in judged])
    row = Table("method <22", "ms 9.1f", "seen 8.4f", "unseen 8.4f", "mixed 8.4f")
    for name in methods:
        row(name, np.median(times[name]), *np.mean(figures[name], axis=0))


def tables(folder: Path) -> list[tuple[str, list[tuple[Floats, Floats]], tuple[int, int]]]:
    """Read real load tables: languages, each left out once, and prompts by halves of subjects."""
    load = np.load(folder / "qwen3-30b-a3b-languages.npz")["load"].astype(np.float64)
    languages = [(np.delete(load, out, axis=0), load[[out]]) for out in range(len(load))]
    table = np.load(folder / "mixtral-8x7b-mmlu.npz")
    prompts, random = table["load"].astype(np.float64), np.random.default_rng(0)
    halves: tuple[list[Floats], list[Floats]] = ([], [])
    for subject in np.unique(table["group"]):
        mine = random.permutation(np.flatnonzero(table["group"] == subject))
        for half, part in zip(halves, np.array_split(mine, 2), strict=True):
            half.extend(
                prompts[part[at : at + 64]].sum(axis=0) for at in range(0, len(part) - 63, 64)
            )
    subjects = [(np.stack(halves[0])[:64], np.stack(halves[1]))]
    return [("languages", languages, (16, 9)), ("prompts", subjects, (4, 3))]


def main() -> None:
    """Print a table per size."""
    given = arguments(__doc__, wheels=WHEELS, seeds=2, repeat=3, large=False, data=Path)
    methods: dict[str, Method] = {
        "EPLB": lambda load, *size: eplb(load, np.zeros(0, np.int64), *size)
    }
    peer = of_peer(flashlb, given.wheels)
    if isinstance(peer, str):
        print(f"no FlashLB: {peer}")
    else:
        flash = peer
        methods["FlashLB"] = lambda load, *size: flash(load, np.zeros(0, np.int64), *size)
        methods["FlashLB"](generated(1, 4, 0, 64), 8, 9)  # what is compiled, is by now
    methods["plugins"] = plugin
    for per_slot in (0, 12, 50, 150, 500):
        methods[f"quick, {per_slot} a slot"] = solved("quick", per_slot)
    methods["heuristic"] = solved("heuristic")

    def cases(layers: int, experts: int, windows: int = 64) -> list[tuple[Floats, Floats]]:
        all_of = (generated(layers, 2 * windows, seed, experts) for seed in range(given.seeds))
        return [(load[:windows], load[windows:]) for load in all_of]

    compare("generated", cases(58, 256), (32, 9), methods, given.repeat)
    if given.large:
        few = {name: methods[name] for name in ("EPLB", "plugins", "heuristic")}
        compare("generated", cases(61, 384)[:1], (72, 6), few, 1)
        compare("generated", cases(94, 512)[:1], (320, 2), few, 1)
    if given.data is not None:
        for title, some, size in tables(given.data):
            compare(title, some, size, methods, 1)


if __name__ == "__main__":
    main()
