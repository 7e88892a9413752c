"""structure(): what there is in routing that a placement could use, before any is chosen.

Takes a trace, statistics or a load table and says how skewed the load is, how far groups differ,
and how much inter-layer placement can win: the crossing of a searched placement on traffic it has
not seen, beside the independence null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import (
    at_least,
    callable_or_none,
    seed_in,
    threads_in,
)
from moetuner.evaluation import evaluate
from moetuner.evaluation.halves import halve
from moetuner.evaluation.intervals import FEWEST, spread
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import Progress, part_of
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.units import hold_out, units_of
from moetuner.frozen import Frozen, html_table
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.report.hot_experts import (
    HotExperts,
    hold_out_hot_experts,
    loads_by_group,
    measure_hot_experts,
)
from moetuner.serving import Serving
from moetuner.solver import Method, solve
from moetuner.statistics import RoutingStatistics, as_counts, check_recording, measure_distance
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

# Steps per start: within a hundredth of what ten times as many reach, in a fraction of a second.
ITERATIONS = 200_000

# Whole counts of the null for every cell of a table: with fewer pairs than cells, rounding alone
# would leave some cells with a pair and others without, which a search takes for structure.
COUNTS_PER_CELL = 1 << 16

# What takes time, as passes over half of a trace: finding what is independent, counts of both
# halves, three solves and crossings, halves of one half, and hot experts.
UNITS, HALVES, PASSES = 4, 3, 16


@dataclass(frozen=True, eq=False, repr=False)
class Structure(Frozen):
    """Skew, differences between groups, and inter-layer structure.

    Parameters
    ----------
    skew
        Load of the busiest expert / mean load of an expert, per layer [L].
    unused
        Experts without a token, per layer [L].
    group_share
        Share of the load that each group brings.
    group_distance
        Total variation distance between a group's expert shares and those of all traffic, averaged
        over layers: the part of the group's tokens that would have to go to other experts to look
        like the mix. 0 is the same, 1 is disjoint.
    information
        Mutual information between the experts of neighbouring layers in bits [L-1], at most
        log2(E), less ``information_chance``; None without transitions. Of few pairs it is too low.
    information_chance
        Bits that as many pairs of independent layers with the same loads seem to have [L-1].
    devices, max_imbalance
        What the crossings are for.
    held_out
        Whether there is traffic that the searches have not seen. On what they saw, noise looks
        like structure, so without it nothing is searched.
    crossing
        Of the searched placement; None if nothing is held out or there are no transitions (a load
        table, a single layer).
    crossing_contiguous
        Of experts in blocks, as engines load them; None without transitions.
    crossing_independent
        The independence null: what the same search reaches if every layer routed with the same
        loads but independently of its neighbour. None where ``crossing`` is.
    gain
        How much less than the null crosses: 95 % interval over held-out sequences. None where
        these are too few to tell.
    hot_experts
        What part of the picks the hottest experts take.
    """

    skew: tuple[float, ...]
    unused: tuple[int, ...]
    group_share: dict[str, float]
    group_distance: dict[str, float]
    information: tuple[float, ...] | None
    information_chance: tuple[float, ...] | None
    devices: int
    max_imbalance: float
    held_out: bool
    crossing: float | None
    crossing_contiguous: float | None
    crossing_independent: float | None
    gain: tuple[float, float] | None
    hot_experts: HotExperts

    def _repr_html_(self) -> str:
        bits = ("", *(self.information or ("",) * (len(self.skew) - 1)))
        head = ("layer", "skew", "unused", "bits shared with the layer before")
        return html_table(
            head, zip(range(len(self.skew)), self.skew, self.unused, bits, strict=True)
        )


def structure(
    traffic: RoutingTrace | RoutingStatistics,
    devices: int = 4,
    *,
    max_imbalance: float = 1.05,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Structure:
    """Measure the structure of traffic that a placement could use.

    Parameters
    ----------
    traffic
        A trace: half of its sequences are held out. Saved statistics cannot be split, and so tell
        nothing of what a search can win. A load table tells skew and groups.
    devices
        Devices that the crossings are for.
    max_imbalance
        Load cap of the searches.
    seed
        Of the split and the searches.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    progress
        Called now and then with the share of what is to be read that has been.

    Examples
    --------
    >>> import moetuner as mt
    >>> structure = mt.structure(mt.RoutingStatistics.from_load([[9, 1, 1, 1]]), devices=2)
    >>> structure.skew
    (3.0,)
    """
    check_recording(traffic)
    callable_or_none("progress", progress)
    topology, seed, threads = Topology(devices), seed_in(seed), threads_in(threads)
    at_least("max_imbalance", max_imbalance, 1)
    held_out = traffic.ordered and traffic.length > 1

    def report_pass(number: int, passes: int = 1) -> Progress | None:
        return part_of(progress, number / PASSES, (number + passes) / PASSES)

    passed = UNITS + 2

    def report_next() -> None:
        nonlocal passed
        passed += 1
        if progress is not None:
            progress(passed / PASSES)

    if held_out:
        units_of(traffic, threads=threads, progress=report_pass(0, UNITS))
    parts = hold_out(traffic, 0.5 if held_out else 0, seed=seed)
    seen, unseen = (_pairs(part, threads, report_pass(UNITS + at)) for at, part in enumerate(parts))
    statistics = seen + unseen if held_out else seen
    load = statistics.total_load
    loads = loads_by_group(traffic, threads)
    # Halves of a trace without sequences leave some tokens out, groups none.
    of_all = np.stack([*loads.values()]).sum(axis=0, dtype=np.uint64) if loads else load
    share, distance = _groups(loads, of_all)

    def placed(method: Method, seen: RoutingStatistics) -> Placement:
        problem = Problem(seen, topology, regime="follow", max_imbalance=max_imbalance)
        result = solve(problem, method, seed=seed, iterations=ITERATIONS, threads=threads)
        report_next()
        return result.uninterrupted().placement

    def crossing(placement: Placement, unseen: RoutingTrace | RoutingStatistics) -> float | None:
        evaluation = evaluate(
            placement, unseen, window=None, cost_model=None, mixed=False, threads=threads
        )
        report_next()
        return evaluation.crossing

    tables = statistics.transitions_or_empty
    bits = chance = contiguous = searched = null = gain = None
    if tables.any():
        rng = np.random.default_rng(seed)
        chance = tuple(_bits(_drawn(table, rng)) for table in tables)
        bits = tuple(max(_bits(t) - c, 0.0) for t, c in zip(tables, chance, strict=True))
        contiguous = crossing(placed("contiguous", seen), unseen)
        if held_out:
            placement = placed("heuristic", seen)
            searched = crossing(placement, parts[1])
            null = crossing(placed("heuristic", _independent(seen)), _independent(unseen))
            gain = _gain(
                Setting(placement, Serving(topology, window=None), ReplayOptions(threads=threads)),
                traffic,
                parts[1],
                null,
                report_pass(PASSES - 1 - HALVES, HALVES),
            )
    total = load.sum(axis=1, dtype=np.float64)
    return Structure(
        skew=tuple(np.where(total > 0, _shares(load).max(axis=1) * load.shape[1], 1.0).tolist()),
        unused=tuple((load == 0).sum(axis=1).tolist()),
        group_share=share,
        group_distance=distance,
        information=bits,
        information_chance=chance,
        devices=devices,
        max_imbalance=max_imbalance,
        held_out=held_out,
        crossing=searched,
        crossing_contiguous=contiguous,
        crossing_independent=null,
        gain=gain,
        hot_experts=(
            # Both halves are counted.
            measure_hot_experts(
                traffic, seen.total_load, unseen.total_load, parts[1], loads, threads
            )
            if held_out
            else hold_out_hot_experts(traffic, seed=seed, threads=threads)
        ),
    )


def _gain(
    setting: Setting,
    traffic: Recording,
    unseen: Recording,
    null: float | None,
    progress: Callable[[float], None] | None,
) -> tuple[float, float] | None:
    """Compute the interval of the null less the crossing of unseen traffic, by its units."""
    units = units_of(traffic, threads=setting.options.threads)
    halved = halve(unseen, setting, units, by_group=False, progress=progress)
    crossing = spread(*halved[None]["crossing"])
    if null is None or crossing.interval is None or crossing.units < FEWEST:
        return None
    return null - crossing.interval[1], null - crossing.interval[0]


def _pairs(
    traffic: Recording, threads: int | None, progress: Callable[[float], None] | None
) -> RoutingStatistics:
    """Count the load and the transitions of a half of a trace."""
    return as_counts(
        traffic,
        window=None,
        coactivation=False,
        sets=False,
        threads=threads,
        progress=progress,
    )


def _independent(statistics: RoutingStatistics) -> RoutingStatistics:
    """Replace transitions by those of independent layers with the same loads, scaled up."""
    load = statistics.total_load.astype(np.float64)
    pairs = np.zeros_like(statistics.transitions_or_empty, dtype=np.uint64)
    for layer, table in enumerate(statistics.transitions_or_empty):
        total = int(table.sum(dtype=np.uint64))
        total = max(total, COUNTS_PER_CELL * table.size) if total else 0
        weights = np.outer(load[layer], load[layer + 1]).ravel()
        # Whole counts by weight: largest remainder, ties to the lower index.
        exact = weights * (total / max(float(weights.sum()), 1.0))
        counts = np.floor(exact)
        missing = min(max(total - int(counts.sum()), 0), counts.size)
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        pairs[layer] = counts.reshape(table.shape)
    return replace(statistics, transitions=pairs, coactivation=None)


def _groups(
    loads: dict[str, NDArray[np.uint64]], load: NDArray[np.uint64]
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute the share and distance of every group from its load and that of all [L,E]."""
    total = load.sum(dtype=np.float64)
    share = {name: float(each.sum(dtype=np.float64) / total) for name, each in loads.items()}
    distance = {name: float(measure_distance(each, load).mean()) for name, each in loads.items()}
    return share, distance


def _shares(load: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Load [L,E] as shares of its layer; zero where a layer has none."""
    total = load.sum(axis=1, keepdims=True, dtype=np.float64)
    shares: NDArray[np.float64] = np.divide(load, total, out=np.zeros(load.shape), where=total > 0)
    return shares


def _drawn(table: NDArray[np.uint64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many pairs of independent layers: few fill few cells, which looks like dependence."""
    share = np.outer(table.sum(axis=1, dtype=np.float64), table.sum(axis=0, dtype=np.float64))
    share /= max(float(share.sum()), 1.0)
    return rng.multinomial(int(table.sum(dtype=np.uint64)), share.ravel()).reshape(table.shape)


def _bits(table: NDArray[np.integer[Any]]) -> float:
    """Compute the mutual information of rows and columns of a table of counts."""
    joint = table / max(float(table.sum(dtype=np.float64)), 1.0)
    apart = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    there = joint > 0
    return float(max((joint[there] * np.log2(joint[there] / apart[there])).sum(), 0.0))
