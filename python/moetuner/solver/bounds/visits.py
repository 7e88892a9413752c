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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.bounds import pairs
from moetuner.solver.bounds.certificate import Certificate, Visits
from moetuner.solver.result import Clock, Limits, Progress
from moetuner.statistics import ExpertSets, RoutingStatistics
from moetuner.topology import Topology

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

# Slopes are whole multiples of one by this: 1 / 2, 1 / 3, 1 / 4, 1 / 5 and 1 / 16 are.
UNIT = 240
# Sums of whole numbers below this are exact in floating point.
EXACT = 2.0**53
# Vertices of the hull, by its slope, are no further apart than this for one step.
REACH = 2


@dataclass(frozen=True)
class Bounded:
    """A proven bound of the visits of all tokens, in visits of devices, and how it was found."""

    cost: int
    source: str
    visits: tuple[Visits, ...]
    interrupted: bool = False


@dataclass(frozen=True)
class _Level:
    """Devices, or nodes: what a visit of one costs, where each device belongs, slots and caps."""

    name: str
    price: float
    part_of: Counts
    room: Counts
    caps: NDArray[np.uint64]

    @property
    def parts(self) -> int:
        return int(self.room.shape[1])

    def least(self, sets: Sequence[ExpertSets]) -> int:
        """Return the visits that capacity alone asks for."""
        rows = zip(sets, self.room, strict=True)
        return sum(_tokens(of) * -(-of.top_k // int(room.max())) for of, room in rows)


def least_visits(problem: Problem) -> float:
    """Compute what no placement's visits are below, with copies or without."""
    sets = _sets(problem)
    levels = _levels(problem, problem.caps.whole)
    cost = sum(level.price * level.least(sets) for level in levels)
    return cost / max(Objective(problem).tokens, 1)


def least_seconds(problem: Problem) -> float:
    """Compute the seconds below which no bound is worth beginning: what cannot be broken off."""
    if problem.statistics.sets is None:
        return 0.0
    levels = list(_levels(problem, problem.caps.whole))
    if problem.experts > effort.PRICE_EXPERTS:
        each = _weighing_seconds(_sets(problem)) + pairs.least_seconds(problem)
        return len(levels) * each
    rooms = [int(room.max()) for level in levels for room in level.room]
    contents = [math.comb(problem.experts, room) for room in rooms]
    orders = max(of.top_k for of in _sets(problem))
    return effort.PRICE_SECONDS * orders * sum(n for n in contents if n <= effort.PRICE_CONTENTS)


def bound(
    problem: Problem, slots: NDArray[np.int32], caps: NDArray[np.uint64], *, limits: Limits
) -> Bounded:
    """Bound visits from below, of one copy of each expert under caps [L] on device loads.

    The slots [L,D,S] are a placement to begin from: a good one, with one copy of each expert.
    """
    clock, sets = Clock(limits), _sets(problem)
    device_of = Placement(slots, num_experts=problem.experts).device_of
    found: list[Visits] = []
    cost, sources, interrupted = 0.0, [], False
    levels = list(_levels(problem, caps))
    for number, level in enumerate(levels):
        mine = clock.within(1 / (len(levels) - number))
        start = level.part_of[device_of]
        tell = _teller(mine, cost, level.price, Objective(problem).tokens)
        least = level.least(sets)
        proven = _Proven(least, Visits(level.parts, np.zeros(0), np.zeros(0, np.uint8)), "capacity")
        here = Clock(mine)
        for way in (_by_prices, _by_tangents) if level.parts > 1 else ():
            # The second is for what the first cannot do, or not in time.
            left = here.within()
            if left.time_limit == 0 or interrupted or proven.visits > least:
                break
            better = way(problem, level, start, left, tell)
            interrupted = better is not None and better.interrupted
            if better is not None and better.visits > least:
                proven = better
        cost += level.price * proven.visits
        sources.append(proven.source if len(levels) == 1 else f"{proven.source} ({level.name})")
        found.append(proven.proof)
    return Bounded(math.floor(cost), " + ".join(sources), tuple(found), interrupted)


def certified(problem: Problem, caps: NDArray[np.uint64], found: Bounded) -> Certificate:
    """Make the certificate of a bound of visits under caps [L]."""
    fingerprint = problem.statistics.fingerprint
    return Certificate(
        fingerprint, problem.regime, problem.slots, caps, "visits", found.cost, visits=found.visits
    )


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
            each = _core.verify_visits(*_seen(problem, level), proof.prices, threads=threads)
            visits = max(visits, int(each.sum()))
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
    device_cost, node_cost = Objective(problem).visit_costs
    each, node = np.arange(problem.devices), problem.topology.node_of_device
    yield _Level("devices", device_cost, each, problem.capacity, caps)
    if node_cost > 0:
        room = np.zeros((problem.layers, problem.topology.nodes), dtype=np.int64)
        np.add.at(room.T, node, problem.capacity.T)
        # The product of two large counts would wrap.
        total = problem.load.sum(axis=1, dtype=np.uint64).tolist()
        size = int(np.bincount(node).max())
        most = [min(int(cap) * size, load) for cap, load in zip(caps, total, strict=True)]
        yield _Level("nodes", node_cost, node, room, np.array(most, dtype=np.uint64))


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


Tell = Callable[[float, int], None] | None


def _teller(limits: Limits, before: float, price: float, all_tokens: int) -> Tell:
    """Return what reports visits of a level, on top of what other levels cost."""
    progress = limits.progress
    if progress is None:
        return None

    def tell(seconds: float, visits: int) -> None:
        progress(Progress(seconds, "bound", None, (before + price * visits) / max(all_tokens, 1)))

    return tell


# Prices of experts.

Seen = tuple[
    list[tuple[NDArray[np.uint16], NDArray[np.uint64]]],
    NDArray[np.uint64],
    NDArray[np.uint64],
    NDArray[np.uint64],
]


def _seen(problem: Problem, level: _Level) -> Seen:
    """Return what the core sees of a level: sets, load [L,E], caps [L], and slots [L,parts]."""
    kinds = [(of.ids, of.counts) for of in _sets(problem)]
    return kinds, problem.load, level.caps, level.room.astype(np.uint64)


def _by_prices(
    problem: Problem, level: _Level, start: Counts, limits: Limits, tell: Tell
) -> _Proven | None:
    """Bound visits by prices of experts; None where contents of a part are too many to try.

    Or experts, for the programme that makes the prices.
    """
    if problem.experts > effort.PRICE_EXPERTS:
        return None
    rounds, work = effort.PRICE_ROUNDS, math.inf
    if limits.time_limit is None:
        programmes = effort.PROGRAMME_WORK / (problem.layers * problem.experts**3)
        rounds, work = int(np.clip(programmes, 1, rounds)), effort.PRICE_WORK

    def report(seconds: float, negated: int | None) -> None:
        if tell is not None and negated is not None:
            tell(seconds, -negated)

    found = _core.bound_visits(
        *_seen(problem, level),
        start.astype(np.uint16),
        rounds=rounds,
        work=work,
        gap=limits.gap or 0.0,
        time_limit=limits.time_limit,
        threads=limits.threads,
        progress=None if tell is None else report,
    )
    if found is None:
        return None
    visits, prices, _, interrupted = found
    proof = Visits(level.parts, prices, np.zeros(0, np.uint8))
    return _Proven(int(visits.sum()), proof, "contents of devices", interrupted)


# Tangents.


def hull(top_k: int, room: int, parts: int) -> tuple[Counts, Counts]:
    """Return vertices of the least co-located pairs for so many parts, with falling parts.

    They are those of experts that are spread evenly; no part has more than ``room`` of them.
    """
    spread = np.arange(min(top_k, parts), -(-top_k // room) - 1, -1, dtype=np.int64)
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
    rows = zip(_sets(problem), level.room, strict=True)
    return [hull(of.top_k, int(room.max()), level.parts) for of, room in rows]


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
    for table, of, each, corners in zip(
        tables, sets, slopes, _corners(problem, level), strict=True
    ):
        counts, ids = of.counts.astype(np.int64), of.ids.astype(np.int64)
        alone += int(touching(each, corners)[0] @ counts)
        weights = (counts * each).astype(np.float64)
        half = np.zeros(experts * experts)
        for one, other in itertools.combinations(ids.T, 2):
            half += np.bincount(one * experts + other, weights, experts * experts)
        table[:] = half.reshape(experts, experts)
        table += table.T.copy()
    statistics = RoutingStatistics(problem.load[None], coactivation=tables)
    # Parts that are all as large as the largest are bounded: they can hold whatever these can.
    room = int(level.room.max())
    topology = Topology(level.parts)
    weighed = Problem(
        statistics, topology, slots_per_device=room, regime="dispatch", objective="traffic"
    )
    return _Weighed(weighed, alone)


def _weighing_seconds(sets: Sequence[ExpertSets]) -> float:
    """Compute the seconds that weighing the pairs of all sets takes."""
    return effort.TANGENT_SECONDS * sum(len(of) * math.comb(of.top_k, 2) for of in sets)


def _together(sets: ExpertSets, part_of: Counts) -> Counts:
    """Count the pairs of each set [N] that share a part."""
    part = part_of[sets.ids]
    found = np.zeros(len(sets), dtype=np.int64)
    for one, other in itertools.combinations(part.T, 2):
        found += one == other
    return found


def _first_slopes(together: Counts, corners: tuple[Counts, Counts]) -> Floats:
    """Choose tangents that touch where a placement is: at a vertex, between those of its edges."""
    edges = -np.diff(corners[1]) / np.diff(corners[0]) * UNIT
    right = np.searchsorted(corners[0], together, side="right").clip(1, len(edges)) - 1
    left = np.searchsorted(corners[0], together, side="left").clip(1, len(edges)) - 1
    slopes: Floats = np.sqrt(edges[left] * edges[right])
    return slopes


def _preferred(weighed: Problem, seed: int, limits: Limits) -> tuple[Counts, bool]:
    """Search the parts [L,E] that weighted pairs prefer; and whether that was interrupted."""
    slots, _, _, interrupted, _ = _core.search(
        weighed.load,
        np.repeat(weighed.caps.whole[:, None], weighed.devices, axis=1),
        Objective(weighed).link_cost,
        weighed.slots,
        coactivation=weighed.statistics.coactivation,
        seed=seed,
        trials=effort.TANGENT_TRIALS,
        time_limit=limits.time_limit,
        threads=limits.threads,
    )
    return Placement(slots, num_experts=weighed.experts).device_of, interrupted


def _by_tangents(
    problem: Problem, level: _Level, start: Counts, limits: Limits, tell: Tell
) -> _Proven | None:
    """Bound visits by tangents; they move towards what the pairs that they weigh prefer."""
    begin, clock = time.monotonic(), Clock(limits)
    sets, corners = _sets(problem), _corners(problem, level)
    if any(len(of[0]) < 2 for of in corners):
        return None  # capacity says it all
    weighing = _weighing_seconds(sets)
    finishing = weighing + pairs.least_seconds(problem)
    if limits.time_limit is not None and limits.time_limit < finishing:
        return None
    edges = [-np.diff(of[1]) / np.diff(of[0]) * UNIT for of in corners]
    slopes = [
        _first_slopes(_together(of, parts), each)
        for of, parts, each in zip(sets, start, corners, strict=True)
    ]

    def rounded() -> list[Counts]:
        return [np.rint(each).astype(np.int64) for each in slopes]

    searching, interrupted = clock.within(effort.TANGENT_SHARE, keep=finishing), False
    steps = Clock(searching)
    count, timed = effort.TANGENT_STEPS, limits.time_limit is not None
    if not timed:
        count = min(count, int(effort.TANGENT_WORK / (problem.layers * problem.experts**2)))
    for step in range(count):
        now = steps.within(keep=weighing)
        if now.time_limit == 0:
            break
        weighed = _weighed(problem, level, rounded())
        if weighed is None:
            break
        part_of, interrupted = _preferred(weighed.problem, step, now)
        if interrupted or steps.within().time_limit == 0:
            break
        for layer, (of, each) in enumerate(zip(sets, corners, strict=True)):
            vertex = touching(np.rint(slopes[layer]).astype(np.int64), each)[1]
            ahead = (each[0][vertex] - _together(of, part_of[layer])).clip(-REACH, REACH)
            size = effort.TANGENT_STEP * (edges[layer][0] - edges[layer][-1]) / math.sqrt(step + 1)
            slopes[layer] = (slopes[layer] + size * ahead).clip(edges[layer][-1], edges[layer][0])
    whole = rounded()
    weighed = _weighed(problem, level, whole)
    if weighed is None:
        return None
    affordable = int(min(pairs.affordable(weighed.problem), effort.BOUND_ITERATIONS))
    if affordable < effort.TANGENT_ITERATIONS:
        affordable = 0  # few prove less than none, which sum rows and columns
    proven = pairs.bound(
        weighed.problem,
        weighed.problem.caps.whole,
        limits=replace(clock.within(), progress=None, gap=None),
        iterations=None if timed else affordable,
    )
    if proven is None:
        return None
    visits = weighed.visits(proven.cost)
    if tell is not None:
        tell(time.monotonic() - begin, visits)
    slope_bytes = np.concatenate(whole).astype(np.uint8)
    (pair_proof,) = proven.certificate.proofs
    proof = Visits(level.parts, np.zeros(0), slope_bytes, pair_proof)
    interrupted |= proven.interrupted
    return _Proven(visits, proof, f"tangents + {proven.source}", interrupted)
