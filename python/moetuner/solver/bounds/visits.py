"""Proven bounds of the devices and nodes that tokens visit, with what proves them.

Of one copy of each expert there are two, for every level of the topology, and the sum over levels
is a bound of the sum. Where all that a device can hold can be tried, experts have prices: visits
are no fewer than the prices and, for each device, the least of its visits less the prices of what
it holds (`rust/bound/visits`). Elsewhere pairs stand for sets: a token whose K experts lie on d
devices has p co-located pairs, and no (p, d) is below the lower convex hull of the partitions of K.
So with any tangent of the hull for each distinct set, ``d >= alpha - beta p``, visits are no fewer
than a constant less a weighted number of co-located pairs, which `pairs` bounds.

With copies an expert's tokens may go to any of its devices. What is left is capacity: a token's
experts do not fit on fewer devices than their number over the slots of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.bounds import pairs
from moetuner.solver.bounds.certificate import Certificate, Visits
from moetuner.solver.budget import Budget, Progress
from moetuner.solver.run import ROUNDING, Bound, Run, Stage
from moetuner.statistics import ExpertSets, RoutingStatistics
from moetuner.topology import Topology

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

# Slopes are whole multiples of one by this: 1 / 2, 1 / 3, 1 / 4, 1 / 5 and 1 / 16 are.
UNIT = 240
# Sums of whole numbers below this are exact in floating point.
EXACT = 2.0**53
# Vertices of the hull, by its slope, are no further apart than this for one step.
FARTHEST = 2


@dataclass(frozen=True)
class _Level:
    """Devices, or nodes: what a visit of one costs, where each device belongs, slots and caps."""

    name: str
    price: float
    part_of: Counts
    capacity: Counts
    caps: NDArray[np.uint64]

    @property
    def parts(self) -> int:
        return int(self.capacity.shape[1])

    def least(self, sets: Sequence[ExpertSets]) -> int:
        """Return the visits that capacity alone asks for."""
        rows = zip(sets, self.capacity, strict=True)
        return sum(_tokens(of) * -(-of.top_k // int(capacity.max())) for of, capacity in rows)


def least_visits(problem: Problem) -> float:
    """Compute what no placement's visits are below, with copies or without."""
    sets = _sets(problem)
    levels = _levels(problem, problem.caps.whole)
    cost = sum(level.price * level.least(sets) for level in levels)
    return cost / max(problem.objective_function.tokens, 1)


def least_seconds(problem: Problem) -> float:
    """Compute the seconds below which no bound is worth beginning: what cannot be broken off."""
    if problem.statistics.sets is None:
        return 0.0
    levels = list(_levels(problem, problem.caps.whole))
    if problem.experts > effort.PRICE_EXPERTS:
        seconds = _weighing_seconds(_sets(problem)) + pairs.least_seconds(problem)
        return len(levels) * seconds
    slots = [int(capacity.max()) for level in levels for capacity in level.capacity]
    contents = [math.comb(problem.experts, capacity) for capacity in slots]
    orders = max(of.top_k for of in _sets(problem))
    return effort.PRICE_SECONDS * orders * sum(n for n in contents if n <= effort.PRICE_CONTENTS)


def bound(
    problem: Problem, slots: NDArray[np.int32], caps: NDArray[np.uint64], *, budget: Budget
) -> Bound:
    """Bound visits of all tokens from below, of one copy of each expert under caps [L].

    The slots [L,D,S] are a placement to begin from: a good one, with one copy of each expert.
    """
    sets = _sets(problem)
    device_of = Placement(slots, num_experts=problem.experts).device_of
    proofs: list[Visits] = []
    cost, sources, interrupted = 0.0, [], False
    levels = list(_levels(problem, caps))
    for number, level in enumerate(levels):
        part = budget.within(1 / (len(levels) - number))
        start = level.part_of[device_of]
        report = _reporter(part, cost, level.price, problem.objective_function.tokens)
        least = level.least(sets)
        proven = _Proven(least, Visits(level.parts, np.zeros(0), np.zeros(0, np.uint8)), "capacity")
        for way in (_by_prices, _by_tangents) if level.parts > 1 else ():
            # The second is for what the first cannot do, or not in time.
            if part.is_over() or interrupted or proven.visits > least:
                break
            better = way(problem, level, start, part.within(), report)
            interrupted = better is not None and better.interrupted
            if better is not None and better.visits > least:
                proven = better
        cost += level.price * proven.visits
        sources.append(proven.source if len(levels) == 1 else f"{proven.source} ({level.name})")
        proofs.append(proven.proof)
    certificate = Certificate(
        problem.statistics.fingerprint,
        problem.regime,
        problem.slots,
        caps,
        "visits",
        math.floor(cost),
        visits=tuple(proofs),
    )
    return Bound(certificate.cost, " + ".join(sources), certificate, interrupted=interrupted)


def verified(
    problem: Problem,
    caps: NDArray[np.uint64],
    proofs: tuple[Visits, ...],
    *,
    threads: int | None = None,
) -> int:
    """Recompute what prices and tangents prove of visits under caps [L].

    Raises
    ------
    ValueError
        If there are no expert sets, or the proofs are of another topology or other sets.
    """
    if problem.statistics.sets is None:
        raise ValueError("certificate must have a proof of pairs, as INPUT has no expert sets")
    levels = list(_levels(problem, caps))
    wanted, given = [level.parts for level in levels], [proof.parts for proof in proofs]
    if wanted != given:
        raise ValueError(f"certificate must be for parts {wanted}, got {given}")
    cost = 0.0
    for level, proof in zip(levels, proofs, strict=True):
        visits = level.least(problem.statistics.sets)
        if len(proof.prices):
            by_layer = _core.verify_visits(_seen(problem, level), proof.prices, threads=threads)
            visits = max(visits, int(by_layer.sum()))
        if len(proof.slopes) and proof.pairs is not None:
            weighed = _weighed(problem, level, _by_layer(problem, proof.slopes))
            if weighed is not None:
                whole = weighed.problem.caps.whole
                apart = pairs.verified(weighed.problem, whole, (proof.pairs,), threads=threads)
                visits = max(visits, weighed.visits(apart))
        cost += level.price * visits
    return math.floor(cost)


def _levels(problem: Problem, caps: NDArray[np.uint64]) -> Iterator[_Level]:
    """Split the price of visits: of devices, and of nodes on top."""
    device_cost, node_cost = problem.objective_function.visit_costs
    device, node = np.arange(problem.devices), problem.topology.node_of_device
    yield _Level("devices", device_cost, device, problem.capacity, caps)
    if node_cost > 0:
        capacity = np.zeros((problem.layers, problem.topology.nodes), dtype=np.int64)
        np.add.at(capacity.T, node, problem.capacity.T)
        # The product of two large counts would wrap.
        total = problem.load.sum(axis=1, dtype=np.uint64).tolist()
        size = int(np.bincount(node).max())
        most = [min(int(cap) * size, load) for cap, load in zip(caps, total, strict=True)]
        yield _Level("nodes", node_cost, node, capacity, np.array(most, dtype=np.uint64))


def _sets(problem: Problem) -> tuple[ExpertSets, ...]:
    assert problem.statistics.sets is not None
    return problem.statistics.sets


def _tokens(sets: ExpertSets) -> int:
    return int(sets.counts.sum(dtype=np.uint64))


@dataclass(frozen=True)
class _Proven:
    visits: int
    proof: Visits
    source: str
    interrupted: bool = False


Report = Callable[[float, int], None] | None


def _reporter(budget: Budget, before: float, price: float, all_tokens: int) -> Report:
    """Return what reports visits of a level, on top of what other levels cost."""
    progress = budget.progress
    if progress is None:
        return None

    def report(seconds: float, visits: int) -> None:
        progress(Progress(seconds, "bound", None, (before + price * visits) / max(all_tokens, 1)))

    return report


# Prices of experts.


def _seen(problem: Problem, level: _Level) -> tuple[Any, Any, Any, Any]:
    """Return what the core sees of a level: sets, load [L,E], caps [L], and slots [L,parts]."""
    kinds = [(of.ids, of.counts) for of in _sets(problem)]
    return kinds, problem.load, level.caps, level.capacity.astype(np.uintp)


def _by_prices(
    problem: Problem, level: _Level, start: Counts, budget: Budget, report: Report
) -> _Proven | None:
    """Bound visits by prices of experts; None where contents of a part are too many to try.

    Or experts, for the programme that makes the prices.
    """
    if problem.experts > effort.PRICE_EXPERTS:
        return None
    rounds, work = effort.PRICE_ROUNDS, math.inf
    if budget.time_limit is None:
        programmes = effort.PROGRAMME_WORK / (problem.layers * problem.experts**3)
        rounds, work = int(np.clip(programmes, 1, rounds)), effort.PRICE_WORK

    def progress(seconds: float, negated: int | None) -> None:
        if report is not None and negated is not None:
            report(seconds, -negated)

    priced = _core.bound_visits(
        _seen(problem, level),
        start.astype(np.uint16),
        rounds=rounds,
        work=work,
        gap=budget.gap or 0.0,
        time_limit=budget.left,
        threads=budget.threads,
        progress=None if report is None else progress,
    )
    if priced is None:
        return None
    visits, prices, interrupted = priced
    proof = Visits(level.parts, prices, np.zeros(0, np.uint8))
    return _Proven(int(visits.sum()), proof, "contents of devices", interrupted)


# Tangents.


def hull(top_k: int, capacity: int, parts: int) -> tuple[Counts, Counts]:
    """Return vertices of the least co-located pairs for so many parts, with falling parts.

    They are those of experts that are spread evenly; no part has more than ``capacity`` of them.
    """
    spread = np.arange(min(top_k, parts), -(-top_k // capacity) - 1, -1, dtype=np.int64)
    size, more = np.divmod(top_k, spread)
    return (more * (size + 1) * size + (spread - more) * size * (size - 1)) // 2, spread


def touching(slopes: Counts, corners: tuple[Counts, Counts]) -> tuple[Counts, Counts]:
    """Return where tangents with slopes [N] meet the axis, times ``UNIT``, and their vertices."""
    together, spread = corners
    height = UNIT * spread[None] + slopes[:, None] * together[None]
    vertex: Counts = height.argmin(axis=1)
    return height.min(axis=1), vertex


@dataclass(frozen=True)
class _Weighed:
    """Pairs weighted by slopes, as a problem of their own, and visits if none were together."""

    problem: Problem
    alone: int

    def visits(self, apart: int) -> int:
        """Return visits that so many weighted pairs apart prove."""
        table = self.problem.statistics.coactivation_or_empty
        together = int(table.sum(dtype=np.uint64)) // 2 - apart
        return -((together - self.alone) // UNIT)


def _corners(problem: Problem, level: _Level) -> list[tuple[Counts, Counts]]:
    rows = zip(_sets(problem), level.capacity, strict=True)
    return [hull(of.top_k, int(capacity.max()), level.parts) for of, capacity in rows]


def _by_layer(problem: Problem, slopes: NDArray[np.uint8]) -> list[Counts]:
    """Split the slopes of all sets by layer."""
    lengths = [len(of) for of in _sets(problem)]
    if len(slopes) != sum(lengths):
        raise ValueError(f"certificate must have {sum(lengths)} slopes, got {len(slopes)}")
    return np.split(slopes.astype(np.int64), np.cumsum(lengths)[:-1])


def _weighed(problem: Problem, level: _Level, slopes: list[Counts]) -> _Weighed | None:
    """Weigh pairs of experts by the slopes of their sets; None where sums would be rounded."""
    sets, experts = _sets(problem), problem.experts
    most = max(_tokens(of) * of.top_k**2 for of in sets)
    if UNIT * most * problem.layers >= EXACT:
        return None
    tables = np.zeros((problem.layers, experts, experts), dtype=np.uint64)
    alone = 0
    for table, of, slope, corners in zip(
        tables, sets, slopes, _corners(problem, level), strict=True
    ):
        counts, ids = of.counts.astype(np.int64), of.ids.astype(np.int64)
        alone += int(touching(slope, corners)[0] @ counts)
        weights = (counts * slope).astype(np.float64)
        half = np.zeros(experts * experts)
        for one, other in itertools.combinations(ids.T, 2):
            half += np.bincount(one * experts + other, weights, experts * experts)
        table[:] = half.reshape(experts, experts)
        table += table.T.copy()
    statistics = RoutingStatistics(problem.load[None], coactivation=tables)
    # Parts that are all as large as the largest are bounded: they can hold whatever these can.
    capacity = int(level.capacity.max())
    topology = Topology(level.parts)
    weighed = Problem(
        statistics, topology, slots_per_device=capacity, regime="dispatch", objective="traffic"
    )
    return _Weighed(weighed, alone)


def _weighing_seconds(sets: Sequence[ExpertSets]) -> float:
    """Compute the seconds that weighing the pairs of all sets takes."""
    return effort.TANGENT_SECONDS * sum(len(of) * math.comb(of.top_k, 2) for of in sets)


def _together(sets: ExpertSets, part_of: Counts) -> Counts:
    """Count the pairs of each set [N] that share a part."""
    part = part_of[sets.ids]
    together = np.zeros(len(sets), dtype=np.int64)
    for one, other in itertools.combinations(part.T, 2):
        together += one == other
    return together


def _first_slopes(together: Counts, corners: tuple[Counts, Counts]) -> Floats:
    """Choose tangents that touch where a placement is: at a vertex, between those of its edges."""
    edges = -np.diff(corners[1]) / np.diff(corners[0]) * UNIT
    right = np.searchsorted(corners[0], together, side="right").clip(1, len(edges)) - 1
    left = np.searchsorted(corners[0], together, side="left").clip(1, len(edges)) - 1
    slopes: Floats = np.sqrt(edges[left] * edges[right])
    return slopes


def _preferred(weighed: Problem, seed: int, budget: Budget) -> tuple[Counts, bool]:
    """Search the parts [L,E] that weighted pairs prefer; and whether that was interrupted."""
    slots, _, interrupted, _ = _core.search(
        pairs.chain_of(weighed, weighed.caps.whole),
        seed=seed,
        trials=effort.TANGENT_TRIALS,
        time_limit=budget.left,
        threads=budget.threads,
    )
    return Placement(slots, num_experts=weighed.experts).device_of, interrupted


def _by_tangents(
    problem: Problem, level: _Level, start: Counts, budget: Budget, report: Report
) -> _Proven | None:
    """Bound visits by tangents; they move towards what the pairs that they weigh prefer."""
    timed = budget.time_limit is not None
    if any(len(of[0]) < 2 for of in _corners(problem, level)):
        return None  # capacity says it all
    finishing = _weighing_seconds(_sets(problem)) + pairs.least_seconds(problem)
    if budget.time_limit is not None and budget.time_limit < finishing:
        return None
    searching = budget.within(effort.TANGENT_SHARE, keep=finishing)
    whole, interrupted = _moved_slopes(problem, level, start, searching)
    weighed = _weighed(problem, level, whole)
    if weighed is None:
        return None
    affordable = int(min(pairs.affordable(weighed.problem), effort.BOUND_ITERATIONS))
    if affordable < effort.TANGENT_ITERATIONS:
        affordable = 0  # few prove less than none, which sum rows and columns
    proven = pairs.bound(
        weighed.problem,
        weighed.problem.caps.whole,
        budget=replace(budget.within(), progress=None, gap=None),
        iterations=None if timed else affordable,
    )
    if proven is None:
        return None
    assert proven.certificate is not None
    visits = weighed.visits(int(proven.value))
    if report is not None:
        report(budget.gone, visits)
    slope_bytes = np.concatenate(whole).astype(np.uint8)
    (pair_proof,) = proven.certificate.proofs
    proof = Visits(level.parts, np.zeros(0), slope_bytes, pair_proof)
    interrupted |= proven.interrupted
    return _Proven(visits, proof, f"tangents + {proven.source}", interrupted)


def _moved_slopes(
    problem: Problem, level: _Level, start: Counts, budget: Budget
) -> tuple[list[Counts], bool]:
    """Return slopes by layer after some steps from a placement [L,E], and if interrupted."""
    sets, corners, interrupted = _sets(problem), _corners(problem, level), False
    weighing = _weighing_seconds(sets)
    edges = [-np.diff(of[1]) / np.diff(of[0]) * UNIT for of in corners]
    slopes = [
        _first_slopes(_together(of, parts), corner)
        for of, parts, corner in zip(sets, start, corners, strict=True)
    ]

    def rounded() -> list[Counts]:
        return [np.rint(of).astype(np.int64) for of in slopes]

    count = effort.TANGENT_STEPS
    if budget.time_limit is None:
        count = min(count, int(effort.TANGENT_WORK / (problem.layers * problem.experts**2)))
    for step in range(count):
        part = budget.within(keep=weighing)
        weighed = None if part.time_limit == 0 else _weighed(problem, level, rounded())
        if weighed is None:
            break
        part_of, interrupted = _preferred(weighed.problem, step, part)
        if interrupted or budget.is_over():
            break
        for layer, (of, corner) in enumerate(zip(sets, corners, strict=True)):
            vertex = touching(np.rint(slopes[layer]).astype(np.int64), corner)[1]
            ahead = corner[0][vertex] - _together(of, part_of[layer])
            ahead = ahead.clip(-FARTHEST, FARTHEST)
            size = effort.TANGENT_STEP * (edges[layer][0] - edges[layer][-1]) / math.sqrt(step + 1)
            slopes[layer] = (slopes[layer] + size * ahead).clip(edges[layer][-1], edges[layer][0])
    return rounded(), interrupted


def _prove(run: Run, budget: Budget) -> None:
    """Bound what tokens visit at least, with what proves it where devices are all alike."""
    problem, slots, value = run.problem, run.best.slots, run.best.value
    if problem.may_copy:
        run.prove(Bound(_at_most(least_visits(problem), value), "capacity"))
        return
    # Nothing is known of caps where devices differ, or experts have rules.
    plain = problem.is_plain
    caps = problem.caps.raised_for(slots) if plain else problem.load.sum(axis=1)
    proven = bound(problem, slots, caps, budget=budget)
    least = _at_most(proven.value / max(run.objective.tokens, 1), value)
    run.prove(replace(proven, value=least, certificate=proven.certificate if plain else None))


def _at_most(least: float, value: float) -> float:
    """Return a bound that rounding has not lifted above the value."""
    return min(least, value) if least <= value * (1 + ROUNDING) else least


def _reserve(run: Run, left: float) -> float:
    """Return the share of so many seconds that prices or tangents need; 0 if they cannot end."""
    if run.problem.may_copy:
        return 0.0
    least, share = least_seconds(run.problem), 1 - effort.VISIT_SEARCH_SHARE
    if left and run.problem.experts <= effort.PRICE_EXPERTS:
        # Prices are soon as good as they get.
        share = min(share, effort.PRICE_TIMES * least / left)
    return share if share * left >= least else 0.0


VISIT_BOUND = Stage(
    _prove,
    applies=lambda run: run.problem.goal == "traffic" and run.objective.counts_visits,
    least=lambda _: -1.0,
    reserve=_reserve,
)
