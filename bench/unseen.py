"""Balance on traffic that no method has seen: ours, EPLB, and the peers' released code.

    pip download --no-deps --dest build/wheels vllm-ascend==0.26.0rc1 sglang==0.5.23
    pip install torch numba scipy
    python bench/unseen.py [--qwen FILE] [--mixtral FILE] [--layers 75] [--wheels build/wheels]

Three instances, each with copies of experts on devices with equal slots:

- windows of a generated model of 75 layers and 256 experts, each of one of ten domains; forty are
  seen, forty are not. *Mixed* windows are means of ten, one of each domain;
- a load table of languages (`--qwen`): all but one are seen, the mean over which one;
- a load table of prompts with subjects (`--mixtral`): windows of sixteen prompts of a subject, half
  of the prompts of each subject seen.

Imbalance is max / mean load of devices, the mean over windows and layers. Seconds are of the clock.
Without wheels the peers are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Table, arguments, imbalance, timed
from numpy.typing import NDArray
from peers import WHEELS, Policy, Size, flashlb, sglang_windows

import moetuner as mt
from moetuner import _core
from moetuner.solver.effort import trials_of

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]
# Windows [W,L,E], their groups [W], devices and slots per device in; slots [L,D,S] out.
Method = Callable[[Floats, NDArray[np.int64], int, int], Slots]

DOMAINS = 10
# Standard deviations of log loads: of an expert over all traffic; of a domain from it, which has
# heavy tails; of a window from its domain, along directions that all windows or those of a domain
# share, and on its own. Chosen so that methods come near to what a real model of this size gave on
# 8, 16 and 32 devices: EPLB and FlashLB within 0.5 %, annealing on the maximum within 1.5 %,
# contiguous within 3.3 % (RESULTS.md).
EXPERT, DOMAIN, TAILS, WINDOW = 0.385, 0.584, 6, 0.252
SHARED, SHARED_DIRECTIONS, DIRECTION, DIRECTIONS = 0.133, 4, 0.043, 3
# Of eight experts that a token visits, one gets no more than an eighth of all visits.
LARGEST_SHARE = 1 / 8
TOKENS = 8192 * 8


def generated(layers: int, windows: int, seed: int, experts: int = 256) -> Floats:
    """Windows of load [W,L,E]; window w is of domain w modulo ten."""
    rng = np.random.default_rng(seed)
    size = (layers, experts)
    expert = rng.normal(0, EXPERT, size)
    tails = rng.standard_t(TAILS, (DOMAINS, *size)) * np.sqrt((TAILS - 2) / TAILS)
    shared = rng.normal(0, SHARED / np.sqrt(SHARED_DIRECTIONS), (SHARED_DIRECTIONS, *size))
    direction = rng.normal(0, DIRECTION, (DOMAINS, DIRECTIONS, *size))
    load = np.empty((windows, *size))
    for window in range(windows):
        mine = window % DOMAINS
        log = expert + DOMAIN * tails[mine] + rng.normal(0, WINDOW, size)
        for directions in (shared, direction[mine]):
            log += np.einsum("k,kle->le", rng.normal(0, 1, len(directions)), directions)
        share = np.exp(log)
        share = np.minimum(share / share.sum(axis=1, keepdims=True), LARGEST_SHARE)
        load[window] = rng.poisson(share / share.sum(axis=1, keepdims=True) * TOKENS)
    return load


def contiguous(load: Floats, group: NDArray[np.int64], devices: int, slots: int) -> Slots:
    """Experts in order, the first ones again in slots to spare."""
    order = np.arange(devices * slots) % load.shape[2]
    return np.tile(order.reshape(devices, slots).astype(np.int32), (load.shape[1], 1, 1))


def eplb(load: Floats, group: NDArray[np.int64], devices: int, slots: int) -> Slots:
    """Place by EPLB's global policy: copies of the heaviest part, the heaviest copy first."""
    total = load.sum(axis=0)
    layers, experts = total.shape
    placed = np.full((layers, devices, slots), -1, np.int32)
    for layer, tokens in enumerate(total):
        copies = np.ones(experts)
        for _ in range(devices * slots - experts):
            copies[np.argmax(tokens / copies)] += 1
        item = np.repeat(np.arange(experts), copies.astype(int))
        part = (tokens / copies)[item]
        used, filled = np.zeros(devices), np.zeros(devices, int)
        for one in np.argsort(-part, kind="stable"):
            device = int(np.argmin(np.where(filled < slots, used, np.inf)))
            placed[layer, device, filled[device]] = item[one]
            used[device] += part[one]
            filled[device] += 1
    return placed


def on_maximum(load: Floats, group: NDArray[np.int64], devices: int, slots: int) -> Slots:
    """Anneal on the maximum of the windows seen, with as many trials as `solve` takes."""
    layers = _core.Layers(
        np.ascontiguousarray(load),
        np.ones(len(load)),
        np.full((load.shape[1], devices), slots),
        [0] * devices,
        [1.0] * devices,
        nearest=False,
        norm=0,
    )
    trials = trials_of(devices * slots, len(load))
    return layers.place(layers.construct(), trials=trials)[0]


def ours(chosen: list[str]) -> Method:
    """Solve as users do, noting what was chosen."""

    def place(load: Floats, group: NDArray[np.int64], devices: int, slots: int) -> Slots:
        names = tuple(str(number) for number in range(int(group.max()) + 1))
        statistics = mt.RoutingStatistics.from_load(
            np.round(load).astype(np.uint64), group=group, group_names=names
        )
        problem = mt.Problem(
            statistics, mt.Topology(devices), slots_per_device=slots, objective="balance"
        )
        result = mt.solve(problem, "heuristic")
        chosen.append(result.details.unseen.chosen)
        return result.placement.slots

    return place


def of_peer(peer: Callable[[Path, Size], Policy | str], wheels: Path) -> Method | str:
    """Return a peer's policy from the engines' initial map; where it cannot run, the reason."""
    reason = peer(wheels, Size(1, 2, 2, 2))
    if isinstance(reason, str):
        return reason

    def place(load: Floats, group: NDArray[np.int64], devices: int, slots: int) -> Slots:
        size = Size(load.shape[1], load.shape[2], devices * slots, devices)
        policy = peer(wheels, size)
        assert not isinstance(policy, str)
        return policy(load, size.initial()).reshape(-1, devices, slots).astype(np.int32)

    return place


def compare(
    title: str,
    load: Floats,
    group: NDArray[np.int64],
    judged: dict[str, Floats],
    methods: dict[str, Method],
    sizes: tuple[tuple[int, int], ...],
) -> None:
    """Print a row per size and method."""
    print(f"\n{title}: {len(load)} windows seen, {load.shape[1]} layers, {load.shape[2]} experts")
    row = Table(
        "devices/slots 13s", "method 14s", *(f"{name} 8.4f" for name in judged), "seconds 8.2f"
    )
    for devices, slots in sizes:
        for name, method in methods.items():
            placed, seconds, _ = timed(lambda: method(load, group, devices, slots))
            figures = (imbalance(table, placed).mean() for table in judged.values())
            row(f"{devices}/{devices * slots}", name, *figures, seconds)


def model_of_domains(methods: dict[str, Method], layers: int, seed: int) -> None:
    """Compare on the generated model."""
    load = generated(layers, 80, seed)
    seen, unseen = load[:40], load[40:]
    mixed = unseen.reshape(4, DOMAINS, *load.shape[1:]).mean(axis=1)
    judged = {"seen": seen, "unseen": unseen, "mixed": mixed}
    group = np.arange(40) % DOMAINS
    compare(f"generated, seed {seed}", seen, group, judged, methods, ((8, 33), (16, 17), (32, 9)))
    alike = {name: method for name, method in methods.items() if name != "FlashLB"}
    compare("without copies", seen, group, judged, alike, ((32, 8),))


def languages(file: Path, methods: dict[str, Method], step: int) -> None:
    """Compare on a language that was left out, the mean over which one."""
    load = np.load(file)["load"].astype(np.float64)[:, ::step]
    print(f"\n{file.name}: imbalance - 1, a language left out, mean over {len(load)}")
    row = Table("devices/slots 13s", "method 14s", "seen 8.4f", "unseen 8.4f", "of EPLB's 1s")
    for devices, slots in ((8, 17), (16, 9)):
        figures: dict[str, Floats] = {}
        for name, method in methods.items():
            excess = []
            for out in range(len(load)):
                seen = np.delete(load, out, axis=0)
                placed = method(seen, np.arange(len(seen)), devices, slots)
                excess.append([imbalance(of, placed).mean() - 1 for of in (seen, load[[out]])])
            figures[name] = np.mean(excess, axis=0)
            ratio = figures[name] / figures.get("EPLB", figures[name])
            parts = f"{ratio[0]:6.2f}x {ratio[1]:6.3f}x" if "EPLB" in figures else ""
            row(f"{devices}/{devices * slots}", name, *figures[name], parts)


def prompts(file: Path, methods: dict[str, Method]) -> None:
    """Compare on windows of sixteen prompts of a subject, half of each subject's prompts seen."""
    table = np.load(file)
    load, subject = table["load"].astype(np.float64), table["group"]
    rng = np.random.default_rng(0)
    halves: tuple[list[Floats], list[Floats]] = ([], [])
    group = []
    for number in np.unique(subject):
        mine = rng.permutation(np.flatnonzero(subject == number))
        for half, part in zip(
            halves, (mine[: len(mine) // 2], mine[len(mine) // 2 :]), strict=True
        ):
            for at in range(0, len(part) // 16 * 16, 16):
                half.append(load[part[at : at + 16]].sum(axis=0))
                group.extend([number] if half is halves[0] else [])
    seen, unseen = (np.stack(half) for half in halves)
    judged = {"seen": seen, "unseen": unseen}
    compare(file.name, seen, np.array(group), judged, methods, ((4, 3),))


def main() -> None:
    """Print all tables."""
    options = arguments(__doc__, qwen=Path, mixtral=Path, layers=75, step=1, seed=0, wheels=WHEELS)
    chosen: list[str] = []
    methods: dict[str, Method] = {"contiguous": contiguous, "EPLB": eplb}
    for name, peer in (("FlashLB", flashlb), ("deepseek_vec", sglang_windows)):
        answer = of_peer(peer, options.wheels)
        if isinstance(answer, str):
            print(f"no {name}: {answer}")
        else:
            methods[name] = answer
    methods["maximum"] = on_maximum
    methods["ours"] = ours(chosen)
    if options.layers:
        model_of_domains(methods, options.layers, options.seed)
    if options.mixtral is not None:
        prompts(options.mixtral, methods)
    if options.qwen is not None:
        languages(options.qwen, methods, options.step)
    print("\nchosen:", ", ".join(f"{name} {chosen.count(name)}x" for name in sorted(set(chosen))))


if __name__ == "__main__":
    main()
