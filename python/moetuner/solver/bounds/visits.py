"""Proven lower bounds on the devices and nodes that tokens visit, with their certificates.

With one copy of each expert there are two bounds for every level of the topology; the sum over
levels bounds the sum. If all contents of a device can be enumerated, experts have prices: visits
are at least the sum of prices plus, for each device, the minimum over contents of visits less
prices (`rust/bound/visits`). Otherwise pairs stand for sets. A token whose K experts are on d
devices has p co-located pairs, and no (p, d) is below the lower convex hull of the partitions of K.
So with any tangent of the hull for each distinct set, ``d >= alpha - beta p``, visits are at least
a constant less a weighted number of co-located pairs, which `pairs` bounds.

With copies, an expert's tokens may go to any of its devices. Only capacity bounds visits then: a
token's experts need at least as many devices as their number over the slots of one device.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.arrays import Floats, Integers
from moetuner.solver.bounds import pairs
from moetuner.solver.bounds.certificate import Visits
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, Bound, Run, Stage
from moetuner.statistics import RoutingStatistics
from moetuner.statistics.sets import ExpertSets
from moetuner.topology import Topology

# Slopes are whole multiples of one over this, as 1 / 2, 1 / 3, 1 / 4, 1 / 5 and 1 / 16 are.
UNIT = 240
# Sums of whole numbers below this are exact in floating point.
EXACT = 2.0**53
# Most co-located pairs by which one step moves a tangent.
FARTHEST = 2


@dataclass(frozen=True)
class _Level:
    """A level of the topology, devices or nodes: price of a visit, members, slots and caps."""

    problem: Problem
    name: str
    price: float
    part_of: Integers
    capacity: Integers
    caps: NDArray[np.uint64]

    @property
    def parts(self) -> int:
        return int(self.capacity.shape[1])

    @property
    def sets(self) -> tuple[ExpertSets, ...]:
        return self.problem.statistics.sets or ()

    @property
    def least(self) -> int:
        """Least visits by capacity alone."""
        rows = zip(self.sets, self.capacity, strict=True)
        return sum(
            _count_tokens(layer_sets) * -(-layer_sets.top_k // int(slots.max()))
            for layer_sets, slots in rows
        )

    @property
    def seen(self) -> tuple[Any, Any, Any, Any]:
        """Arguments of the core: sets, load [L,E], caps [L], and slots [L,parts]."""
        sets = [(layer_sets.ids, layer_sets.counts) for layer_sets in self.sets]
        return sets, self.problem.load, self.caps, self.capacity.astype(np.uintp)

    @property
    def corners(self) -> list[tuple[Integers, Integers]]:
        """Vertices of the hull of every layer."""
        rows = zip(self.sets, self.capacity, strict=True)
        return [
            find_hull(layer_sets.top_k, int(slots.max()), self.parts) for layer_sets, slots in rows
        ]

    def count_visits(self, part_of: Integers) -> int:
        """Count the visits of a placement, the part of every expert [L,E]."""
        visits = 0
        for layer_sets, parts in zip(self.sets, part_of, strict=True):
            visited = np.sort(parts[layer_sets.ids], axis=1)
            others = (np.diff(visited, axis=1) != 0).sum(axis=1)
            visits += int((1 + others) @ layer_sets.counts.astype(np.int64))
        return visits

    @property
    def weighing_seconds(self) -> float:
        """Seconds that it takes to weigh the pairs of all sets."""
        pairs_of = (len(layer_sets) * math.comb(layer_sets.top_k, 2) for layer_sets in self.sets)
        return effort.TANGENT_SECONDS * sum(pairs_of)


@dataclass(frozen=True)
class _Proven:
    """A lower bound on visits of all tokens, the name of its proof, and the proof."""

    visits: int
    source: str
    proof: Visits
    interrupted: bool = False


def least_visits(problem: Problem) -> float:
    """Compute a lower bound on the visits of every placement, with copies or without."""
    cost = sum(level.price * level.least for level in _levels(problem, problem.caps.whole))
    return cost / max(problem.objective_function.tokens, 1)


def least_seconds(problem: Problem) -> float:
    """Compute the least seconds for a bound: those of the work that cannot be interrupted."""
    if problem.statistics.sets is None:
        return 0.0
    levels = _levels(problem, problem.caps.whole)
    if problem.num_experts > effort.PRICE_EXPERTS:
        return len(levels) * (levels[0].weighing_seconds + pairs.least_seconds(problem))
    slots = [int(capacity.max()) for level in levels for capacity in level.capacity]
    contents = [math.comb(problem.num_experts, capacity) for capacity in slots]
    orders = max(layer_sets.top_k for layer_sets in levels[0].sets)
    return effort.PRICE_SECONDS * orders * sum(n for n in contents if n <= effort.PRICE_CONTENTS)


def bound(
    problem: Problem, slots: NDArray[np.int32], caps: NDArray[np.uint64], *, budget: Budget
) -> Bound:
    """Return a lower bound on the visits of all tokens, with single copies under caps [L].

    The slots [L,D,S] are a good placement to begin from, with one copy of each expert.
    """
    device_of = Placement(slots, num_experts=problem.num_experts).device_of
    proofs: list[Visits] = []
    cost, sources, interrupted = 0.0, [], False
    tokens, levels = max(problem.objective_function.tokens, 1), _levels(problem, caps)
    for number, level in enumerate(levels):
        level_budget = budget.within(1 / (len(levels) - number))
        report = pairs.make_reporter(level_budget, _share, level.price / tokens, cost / tokens)
        proven = _Proven(level.least, "capacity", Visits(level.parts))
        ways = (_bound_by_prices, _bound_by_tangents) if level.parts > 1 else ()
        for way in ways:
            # The second way is for levels that the first cannot bound, or not in time.
            if level_budget.is_over() or interrupted or proven.visits > level.least:
                break
            better = way(level, level.part_of[device_of], level_budget.within(), report)
            interrupted = better is not None and better.interrupted
            if better is not None and better.visits > level.least:
                proven = better
        cost += level.price * proven.visits
        sources.append(proven.source if len(levels) == 1 else f"{proven.source} ({level.name})")
        proofs.append(proven.proof)
    whole_cost = math.floor(cost)
    certificate = pairs.make_certificate(problem, caps, "visits", whole_cost, visits=tuple(proofs))
    return Bound(whole_cost, " + ".join(sources), certificate, interrupted=interrupted)


def _share(price: float, before: float, visits: int) -> float:
    """Return the bound on visits per token, from one level's visits and the levels before it."""
    return before + price * visits


def recompute(
    problem: Problem,
    caps: NDArray[np.uint64],
    proofs: tuple[Visits, ...],
    *,
    threads: int | None = None,
) -> int:
    """Recompute the bound on visits that prices and tangents prove under caps [L]."""
    if problem.statistics.sets is None:
        raise ValueError("certificate must have a proof of pairs, as INPUT has no expert sets")
    levels = _levels(problem, caps)
    wanted, proven = [level.parts for level in levels], [proof.parts for proof in proofs]
    if wanted != proven:
        raise ValueError(f"certificate must be for parts {wanted}, got {proven}")
    cost = 0.0
    for level, proof in zip(levels, proofs, strict=True):
        visits = level.least
        if len(proof.prices):
            by_layer = _core.verify_visits(level.seen, proof.prices, threads=threads)
            visits = max(visits, int(by_layer.sum()))
        weighed = _weigh_pairs(level, proof.slopes) if len(proof.slopes) else None
        if weighed is not None and proof.pairs is not None:
            whole_caps = weighed[0].caps.whole
            apart = pairs.recompute(weighed[0], whole_caps, (proof.pairs,), threads=threads)
            visits = max(visits, -(-(weighed[1] + apart) // UNIT))
        cost += level.price * visits
    return math.floor(cost)


def _levels(problem: Problem, caps: NDArray[np.uint64]) -> list[_Level]:
    """Return the levels at which visits have a price: devices, and nodes on top."""
    device_cost, node_cost = problem.objective_function.visit_costs
    device, node = np.arange(problem.devices), problem.topology.node_of_device
    levels = [_Level(problem, "devices", device_cost, device, problem.capacity, caps)]
    if node_cost > 0:
        capacity = np.zeros((problem.layers, problem.topology.nodes), dtype=np.int64)
        np.add.at(capacity.T, node, problem.capacity.T)
        node_caps = pairs.join_caps(problem, caps, int(np.bincount(node).max()))
        levels.append(_Level(problem, "nodes", node_cost, node, capacity, node_caps))
    return levels


def _count_tokens(sets: ExpertSets) -> int:
    return int(sets.counts.sum(dtype=np.uint64))


# Prices of experts.


def _bound_by_prices(
    level: _Level, start: Integers, budget: Budget, report: pairs.Report
) -> _Proven | None:
    """Return a bound by prices of experts; None if experts, or contents of a part, are too many."""
    if level.problem.num_experts > effort.PRICE_EXPERTS:
        return None
    work = effort.PRICE_WORK if budget.time_limit is None else math.inf
    priced = _core.bound_visits(
        level.seen,
        start.astype(np.uint16),
        rounds=effort.PRICE_ROUNDS,
        work=work,
        gap=budget.gap or 0.0,
        time_limit=budget.seconds_left,
        threads=budget.threads,
        progress=report,
    )
    if priced is None:
        return None
    visits, prices, interrupted = priced
    proof = Visits(level.parts, prices=prices)
    return _Proven(int(visits.sum()), "contents of devices", proof, interrupted)


# Tangents.


def find_hull(top_k: int, capacity: int, parts: int) -> tuple[Integers, Integers]:
    """Return the vertices of the hull: least co-located pairs, and the parts visited, which fall.

    Pairs are least if the experts are spread evenly; no part has more than ``capacity`` of them.
    """
    spread = np.arange(min(top_k, parts), -(-top_k // capacity) - 1, -1, dtype=np.int64)
    size, larger = np.divmod(top_k, spread)
    return (larger * (size + 1) * size + (spread - larger) * size * (size - 1)) // 2, spread


def find_tangents(
    slopes: Integers, corners: tuple[Integers, Integers]
) -> tuple[Integers, Integers]:
    """Return where tangents with slopes [N] meet the axis, times ``UNIT``, and their vertices."""
    together, spread = corners
    height = UNIT * spread[None] + slopes[:, None] * together[None]
    vertex: Integers = height.argmin(axis=1)
    return height.min(axis=1), vertex


def _weigh_pairs(level: _Level, slopes: NDArray[Any]) -> tuple[Problem, int] | None:
    """Return pairs of experts weighted by the slopes of their sets, as a problem, and a constant.

    Visits, times ``UNIT``, are at least that constant plus the weighted pairs apart. The slopes are
    those of all layers, one layer after the other. None where sums would be rounded.
    """
    sets, experts = level.sets, level.problem.num_experts
    lengths = [len(layer_sets) for layer_sets in sets]
    if len(slopes) != sum(lengths):
        raise ValueError(f"certificate must have {sum(lengths)} slopes, got {len(slopes)}")
    largest = max(_count_tokens(layer_sets) * layer_sets.top_k**2 for layer_sets in sets)
    if UNIT * largest * len(sets) >= EXACT:
        return None
    tables = np.zeros((len(sets), experts, experts), dtype=np.uint64)
    by_layer = np.split(slopes.astype(np.int64), np.cumsum(lengths)[:-1])
    constant = 0
    for table, layer_sets, slope, corners in zip(
        tables, sets, by_layer, level.corners, strict=True
    ):
        counts, ids = layer_sets.counts.astype(np.int64), layer_sets.ids.astype(np.int64)
        constant += int(find_tangents(slope, corners)[0] @ counts)
        weights = (counts * slope).astype(np.float64)
        half = np.zeros(experts * experts)
        for one, other in itertools.combinations(ids.T, 2):
            half += np.bincount(one * experts + other, weights, experts * experts)
        constant -= int(half.sum())
        table[:] = half.reshape(experts, experts)
        table += table.T.copy()
    statistics = RoutingStatistics(level.problem.load[None], coactivation=tables)
    # All parts get the slots of the largest: they can hold whatever the real ones can.
    weighed = Problem(
        statistics,
        Topology(level.parts),
        slots_per_device=int(level.capacity.max()),
        regime="dispatch",
        objective="traffic",
    )
    return weighed, constant


def _count_together(sets: ExpertSets, part_of: Integers) -> Integers:
    """Count the pairs of each set [N] that share a part."""
    part_of_expert = part_of[sets.ids]
    together = np.zeros(len(sets), dtype=np.int64)
    for one, other in itertools.combinations(part_of_expert.T, 2):
        together += one == other
    return together


def _bound_by_tangents(
    level: _Level, start: Integers, budget: Budget, report: pairs.Report
) -> _Proven | None:
    """Return a bound by tangents, which first move towards placements that their pairs prefer."""
    timed = budget.time_limit is not None
    if any(len(corner[0]) < 2 for corner in level.corners):
        return None  # no bound is above that of capacity
    finishing = level.weighing_seconds + pairs.least_seconds(level.problem)
    if budget.time_limit is not None and budget.time_limit < finishing:
        return None
    if not timed:
        # Sums of rows and columns take a small part of the time, and say what the rest can reach.
        first = _bound_by_slopes(level, _move_slopes(level, start, budget, 0)[0], budget, 0)
        wanted = (1 - effort.HOPELESS) * level.count_visits(start)
        if first is None or first.visits < wanted:
            return first
    count = effort.TANGENT_STEPS
    if not timed:
        work = effort.TANGENT_WORK / (level.problem.layers * level.problem.num_experts**2)
        count = min(count, int(work))
    searching = budget.within(effort.SEARCH_SHARE, keep=finishing)
    slopes, interrupted = _move_slopes(level, start, searching, count)
    iterations = None if timed else budget.work.tangent_iterations
    proven = _bound_by_slopes(level, slopes, budget, iterations)
    if proven is not None and report is not None:
        report(budget.elapsed, -proven.visits)
    return proven and replace(proven, interrupted=interrupted or proven.interrupted)


def _bound_by_slopes(
    level: _Level, slopes: Integers, budget: Budget, iterations: int | None
) -> _Proven | None:
    """Return a bound by pairs weighted by slopes, in so many iterations or as many as fit."""
    weighed = _weigh_pairs(level, slopes)
    if weighed is None:
        return None
    if iterations is not None:
        iterations = min(int(pairs.count_affordable(weighed[0])), iterations)
        if iterations < effort.TANGENT_ITERATIONS:
            iterations = 0  # few iterations prove less than the sums of rows and columns
    proven = pairs.bound(
        weighed[0],
        weighed[0].caps.whole,
        budget=replace(budget.within(), progress=None, gap=None),
        iterations=iterations,
    )
    if proven is None or proven.certificate is None:
        return None
    visits = -(-(weighed[1] + int(proven.value)) // UNIT)
    (pair_proof,) = proven.certificate.proofs
    proof = Visits(level.parts, slopes=slopes.astype(np.uint8), pairs=pair_proof)
    return _Proven(visits, f"tangents + {proven.source}", proof, proven.interrupted)


def _move_slopes(
    level: _Level, start: Integers, budget: Budget, count: int
) -> tuple[Integers, bool]:
    """Return slopes of all sets after steps from a placement [L,E], and if interrupted."""
    sets, corners, interrupted = level.sets, level.corners, False
    edges = [-np.diff(spread) / np.diff(together) * UNIT for together, spread in corners]
    slopes: list[Floats] = []
    for layer_sets, parts, (vertices, _), edge in zip(sets, start, corners, edges, strict=True):
        # Tangents touch the hull at the vertex of the placement, between the slopes of its edges.
        at = _count_together(layer_sets, parts)
        right, left = (
            np.searchsorted(vertices, at, side).clip(1, len(edge)) - 1 for side in ("right", "left")
        )
        slopes.append(np.sqrt(edge[left] * edge[right]))

    def rounded() -> Integers:
        return np.rint(np.concatenate(slopes)).astype(np.int64)

    for step in range(count):
        step_budget = budget.within(keep=level.weighing_seconds)
        weighed = None if step_budget.time_limit == 0 else _weigh_pairs(level, rounded())
        if weighed is None:
            break
        # A good placement for the weighted pairs.
        slots, _, interrupted, _ = _core.search(
            pairs.make_chain(weighed[0], weighed[0].caps.whole),
            seed=step,
            trials=effort.TANGENT_TRIALS,
            time_limit=step_budget.seconds_left,
            threads=step_budget.threads,
        )
        if interrupted or budget.is_over():
            break
        part_of = Placement(slots, num_experts=level.problem.num_experts).device_of
        for layer, (layer_sets, corner, edge) in enumerate(zip(sets, corners, edges, strict=True)):
            vertex = find_tangents(np.rint(slopes[layer]).astype(np.int64), corner)[1]
            ahead = corner[0][vertex] - _count_together(layer_sets, part_of[layer])
            ahead = ahead.clip(-FARTHEST, FARTHEST)
            size = effort.TANGENT_STEP * (edge[0] - edge[-1]) / math.sqrt(step + 1)
            slopes[layer] = (slopes[layer] + size * ahead).clip(edge[-1], edge[0])
    return rounded(), interrupted


def _prove(run: Run, budget: Budget) -> None:
    """Prove a bound on visits, with a certificate where all devices are equal."""
    problem, slots, value = run.problem, run.best.slots, run.best.value
    if problem.may_copy:
        run.prove(Bound(_undo_rounding(least_visits(problem), value), "capacity"))
        return
    # Where devices differ, or experts have rules, the bound ignores the caps.
    plain = problem.is_plain
    caps = problem.caps.raised_for(slots) if plain else problem.load.sum(axis=1)
    proven = bound(problem, slots, caps, budget=budget)
    least = _undo_rounding(proven.value / max(run.objective.tokens, 1), value)
    run.prove(replace(proven, value=least, certificate=proven.certificate if plain else None))


def _undo_rounding(least: float, value: float) -> float:
    """Return a bound, lowered to the value if only rounding has lifted it above."""
    return min(least, value) if least <= value * (1 + ROUNDING) else least


def _reserve(run: Run, seconds_left: float) -> float:
    """Return the share of the seconds left that prices or tangents need; 0 if they cannot end."""
    if run.problem.may_copy:
        return 0.0
    least, share = least_seconds(run.problem), 1 - effort.SEARCH_SHARE
    if seconds_left and run.problem.num_experts <= effort.PRICE_EXPERTS:
        # Prices need only so many times the least seconds to become as good as they get.
        share = min(share, effort.PRICE_TIMES * least / seconds_left)
    return share if share * seconds_left >= least else 0.0


VISIT_BOUND = Stage(
    _prove,
    applies=lambda run: not run.problem.aim.costs_loads and run.objective.has_expert_sets,
    least=lambda _: -1.0,
    reserve=_reserve,
)
