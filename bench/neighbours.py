"""Whether the search has converged: a neighbouring problem's answer is an answer of this one.

    python bench/neighbours.py [--draws 200]

Problems are drawn: 1 to 4 layers of 8 to 64 experts on 2 to 8 devices, with up to three slots more
than experts need, in 1 to 40 windows, for ``time`` and ``balance``. Each has four neighbours:
another seed, other names of its experts, a slot less on every device, and the other goal. A figure
says by how much the answer is worse than a neighbour's, by its own objective, in per cent; below 0
it is better. Wanted: none above 0.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from harness import benchmark

import moetuner as mt

WANTED = 0.5
OTHER = {"time": "balance", "balance": "time"}


class Pair(NamedTuple):
    """A drawn problem beside a neighbour; how much worse its answer is, in per cent."""

    neighbour: str
    worse: float
    problem: str


def draw(seed: int) -> tuple[mt.Problem, np.random.Generator]:
    """Return a drawn problem, and the generator that drew it."""
    random = np.random.default_rng(seed)
    layers, experts = int(random.integers(1, 5)), int(random.choice([8, 16, 32, 64]))
    devices, windows = int(random.choice([2, 4, 8])), int(random.choice([1, 3, 8, 20, 40]))
    per_node = int(random.choice([size for size in (2, 4, 8) if size <= devices]))
    kinds = random.lognormal(
        0, random.choice([0.5, 1, 1.5]), (random.integers(1, 5), layers, experts)
    )
    tokens = random.choice([500, 5000, 50000]) * kinds / kinds.sum(axis=2, keepdims=True)
    load = random.poisson(tokens[np.arange(windows) % len(tokens)]).astype(np.uint64)
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(devices, devices_per_node=per_node),
        slots_per_device=experts // devices + int(random.integers(0, 4)),
        objective=str(random.choice(list(OTHER))),
    )
    return problem, random


def neighbours(problem: mt.Problem, random: np.random.Generator) -> dict[str, mt.Placement]:
    """Return the answers of neighbouring problems, as placements of this one."""
    experts, slots = problem.num_experts, problem.slots
    found = {"another seed": mt.solve(problem, "heuristic", seed=1).placement}
    names = random.permutation(experts)
    load = problem.statistics.window_load[:, :, names]
    renamed = replace(problem, statistics=mt.RoutingStatistics.from_load(load))
    others = mt.solve(renamed, "heuristic").placement.slots
    found["other names"] = mt.Placement(
        np.where(others < 0, others, names[others]), num_experts=experts
    )
    if (slots - 1) * problem.devices >= experts:
        smaller = replace(problem, slots_per_device=slots - 1)
        fewer = mt.solve(smaller, "heuristic").placement.slots
        empty = np.full_like(fewer[:, :, :1], -1)
        found["a slot less"] = mt.Placement(
            np.concatenate([fewer, empty], axis=2), num_experts=experts
        )
    found["the other goal"] = mt.solve(
        replace(problem, objective=OTHER[problem.goal]), "heuristic"
    ).placement
    return found


def compare(seed: int) -> list[Pair]:
    """Return a drawn problem beside all its neighbours."""
    problem, random = draw(seed)
    objective = mt.solve(problem, "heuristic").objective
    windows = len(problem.statistics.window_load)
    name = (
        f"{seed}: {problem.goal}, {windows} windows, {problem.layers} x {problem.num_experts} on "
        f"{problem.devices} of {problem.slots} slots"
    )
    return [
        Pair(neighbour, 100 * (objective / problem.value(placement) - 1), name)
        for neighbour, placement in neighbours(problem, random).items()
    ]


def main() -> None:
    """Print the distribution by neighbour, and the worst pairs."""
    with benchmark(__doc__, draws=200) as (asked, report):
        pairs = [pair for seed in range(asked.draws) for pair in compare(seed)]
        table = report.table(
            "Worse than a neighbour's answer, %",
            *("neighbour <16", "pairs 6d", "median 8.3f", "95 % 8.3f", "99 % 8.3f", "worst 8.3f"),
            "above 0.5 10d",
        )
        for neighbour in dict.fromkeys(pair.neighbour for pair in pairs):
            worse = np.array([pair.worse for pair in pairs if pair.neighbour == neighbour])
            quantiles = np.quantile(worse, [0.5, 0.95, 0.99, 1])
            table(neighbour, len(worse), *quantiles, int((worse > WANTED).sum()))
        worst = report.table("The worst pairs", "problem <58", "neighbour <16", "worse 8.3f")
        for pair in sorted(pairs, key=lambda pair: -pair.worse)[:12]:
            worst(pair.problem, pair.neighbour, pair.worse)


if __name__ == "__main__":
    main()
