"""Measure the structure of routing that a placement could use, before a placement is computed.

For a trace, statistics or a load table ``structure`` computes how skewed the load is, how far
groups differ, and how much inter-layer placement can gain: the crossing of a searched placement on
unseen traffic, beside the independence null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import at_least, callable_or_none, seed_in, threads_in
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.halves import halve
from moetuner.evaluation.intervals import FEWEST, estimate_spread
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import Progress, scale_progress
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.samples import Samples, find_samples
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.frozen import Frozen, html_table
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.goals import TRAFFIC_CAP
from moetuner.recording import Recording
from moetuner.report.hot_experts import HotExperts, hold_out_hot_experts, measure_hot_experts
from moetuner.report.loads import count_part_loads
from moetuner.serving import Serving
from moetuner.solver import Method, solve
from moetuner.statistics import RoutingStatistics, as_counts, check_recording, measure_distance
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

# Steps per start: within a hundredth of what ten times as many reach, in a fraction of a second.
ITERATIONS = 200_000

# Mean count of a cell of the null's tables. With fewer pairs than cells, rounding would leave some
# cells with a pair and others without, which a search takes for structure.
COUNTS_PER_CELL = 1 << 16

# How long steps take, in passes over half of a trace: finding samples, and halving the unseen half.
PASSES_OF_SAMPLES, PASSES_OF_HALVES = 4, 3
# The same for all steps: these two, counts of both halves, three solves and crossings, and hot
# experts.
PASSES = 16


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
        Share of the load that each group has.
    group_distance
        Total variation distance between a group's expert shares and those of all traffic, averaged
        over layers: the share of the group's tokens that would have to go to other experts to look
        like the mix. 0 means alike, 1 disjoint.
    information
        Mutual information between the experts of neighbouring layers in bits [L-1], at most
        log2(E), less ``information_chance``; None without transitions. Too low with few pairs.
    information_chance
        Bits that as many pairs of independent layers with the same loads seem to have [L-1].
    devices, max_imbalance
        Devices and load cap of the placements whose crossings are measured.
    held_out
        True if there is traffic that the searches have not seen. On seen traffic noise looks like
        structure, so without unseen traffic nothing is searched.
    crossing
        Crossing of the searched placement; None if nothing is held out or there are no transitions
        (a load table, a single layer).
    crossing_contiguous
        Crossing of experts in blocks, as engines load them; None without transitions.
    crossing_independent
        The independence null: the crossing after the same search if every layer routed with the
        same loads, but independently of its neighbour. None where ``crossing`` is None.
    gain
        95 % interval, over held-out sequences, of the null less the crossing. None where there are
        too few of them.
    hot_experts
        Share of the picks that the hottest experts take.
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
    max_imbalance: float = TRAFFIC_CAP,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Structure:
    """Measure the structure of traffic that a placement could use.

    Parameters
    ----------
    traffic
        A trace, half of whose sequences are held out. Saved statistics cannot be split, so they do
        not show what a search can gain. A load table shows skew and groups.
    devices
        Devices of the placements whose crossings are measured.
    max_imbalance
        Load cap of the searches.
    seed
        Random seed of the split and the searches.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    progress
        Called now and then with the share of the work that is done.

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
    held_out, passes = traffic.ordered and traffic.length > 1, _Passes(progress)
    progress_of_samples, units = passes.begin(PASSES_OF_SAMPLES), None
    if held_out:
        units = find_samples(traffic, threads=threads, progress=progress_of_samples)
    halves = hold_out(traffic, seed=seed) if held_out else (traffic, traffic)
    seen, unseen = (_count_transitions(half, threads, passes.begin()) for half in halves)
    statistics = seen + unseen if held_out else seen
    load = statistics.total_load
    # Halves of a trace without sequences leave some tokens out; groups have all of them.
    groups, loads = count_part_loads(traffic, threads)
    share, distance = _compare_groups(groups, loads.sum(axis=0, dtype=np.uint64))

    tables = statistics.transitions_or_empty
    bits = chance = None
    crossings = _Crossings()
    if tables.any():
        bits, chance = _measure_beyond_chance(tables, np.random.default_rng(seed))
        searches = _Searches(topology, max_imbalance, seed, threads, passes)
        crossings = searches.measure(seen, unseen, halves[1], units)
    total = load.sum(axis=1, dtype=np.float64)
    skew = np.where(total > 0, _compute_shares(load).max(axis=1) * load.shape[1], 1.0)
    if held_out:
        hot_experts = measure_hot_experts(
            traffic, seen.total_load, unseen.total_load, halves[1], threads
        )
    else:
        hot_experts = hold_out_hot_experts(traffic, seed=seed, threads=threads)
    return Structure(
        skew=tuple(skew.tolist()),
        unused=tuple((load == 0).sum(axis=1).tolist()),
        group_share=share,
        group_distance=distance,
        information=bits,
        information_chance=chance,
        devices=devices,
        max_imbalance=max_imbalance,
        held_out=held_out,
        crossing=crossings.searched,
        crossing_contiguous=crossings.contiguous,
        crossing_independent=crossings.independent,
        gain=crossings.gain,
        hot_experts=hot_experts,
    )


class _Passes:
    """The passes of a measurement over traffic, and the share of them that ``progress`` gets."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0

    def begin(self, number: int = 1) -> Progress | None:
        """Return a function for the progress of the next pass, or of several."""
        first, self.done = self.done, self.done + number
        return scale_progress(self.progress, first / PASSES, self.done / PASSES)

    def end(self) -> None:
        """Report the end of a pass that reports no progress of its own."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done / PASSES)


class _Crossings(NamedTuple):
    """The crossings that a ``Structure`` has."""

    contiguous: float | None = None
    searched: float | None = None
    independent: float | None = None
    gain: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Searches:
    """Short searches for placements of few crossings."""

    topology: Topology
    max_imbalance: float
    seed: int
    threads: int | None
    passes: _Passes

    @property
    def _serving(self) -> Serving:
        """How placements are served whose crossings are measured: all traffic is one window."""
        return Serving(self.topology, window=None)

    @property
    def _options(self) -> ReplayOptions:
        return ReplayOptions(mixed=False, threads=self.threads)

    def measure(
        self,
        seen: RoutingStatistics,
        unseen: RoutingStatistics,
        unseen_half: Recording,
        units: Samples | None,
    ) -> _Crossings:
        """Measure the crossings of placements that are computed from seen transitions.

        A search is judged on the unseen half, by the recording's samples; without these only the
        contiguous placement is measured.
        """
        contiguous = self._measure_crossing(self._place("contiguous", seen), unseen)
        if units is None:
            return _Crossings(contiguous)
        placement = self._place("heuristic", seen)
        searched = self._measure_crossing(placement, unseen_half)
        independent = self._measure_crossing(
            self._place("heuristic", _make_independent(seen)), _make_independent(unseen)
        )
        setting = Setting(placement, self._serving, self._options)
        progress = self.passes.begin(PASSES_OF_HALVES)
        gain = _measure_gain(setting, units, unseen_half, independent, progress)
        return _Crossings(contiguous, searched, independent, gain)

    def _place(self, method: Method, seen: RoutingStatistics) -> Placement:
        """Return a placement of few crossings of the seen transitions."""
        problem = Problem(seen, self.topology, regime="follow", max_imbalance=self.max_imbalance)
        result = solve(problem, method, seed=self.seed, iterations=ITERATIONS, threads=self.threads)
        self.passes.end()
        return result.uninterrupted().placement

    def _measure_crossing(self, placement: Placement, unseen: Recording) -> float | None:
        """Return the crossing of a placement on unseen traffic."""
        [[evaluation]] = evaluate_each([placement], unseen, [self._serving], self._options)
        self.passes.end()
        return evaluation.crossing


def _measure_gain(
    setting: Setting,
    units: Samples,
    unseen: Recording,
    null: float | None,
    progress: Callable[[float], None] | None,
) -> tuple[float, float] | None:
    """Compute the interval of the null less the crossing of unseen traffic; None if too short."""
    figures = halve(unseen, setting, units, by_group=False, progress=progress)[None]
    crossing = estimate_spread(*figures["crossing"])
    if null is None or crossing.interval is None or crossing.units < FEWEST:
        return None
    return null - crossing.interval[1], null - crossing.interval[0]


def _count_transitions(
    traffic: Recording, threads: int | None, progress: Callable[[float], None] | None
) -> RoutingStatistics:
    """Count the load and the transitions of a half of a trace."""
    return as_counts(
        traffic, window=None, coactivation=False, sets=False, threads=threads, progress=progress
    )


def _make_independent(statistics: RoutingStatistics) -> RoutingStatistics:
    """Return statistics with the transitions of independent layers with the same loads, scaled."""
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


def _compare_groups(
    loads: dict[str, NDArray[np.uint64]], load: NDArray[np.uint64]
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute each group's share of the load, and its distance from all traffic, of loads [L,E]."""
    total = load.sum(dtype=np.float64)
    shares, distances = {}, {}
    for group, group_load in loads.items():
        shares[group] = float(group_load.sum(dtype=np.float64) / total)
        distances[group] = float(measure_distance(group_load, load).mean())
    return shares, distances


def _compute_shares(load: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Compute load [L,E] as shares of its layer; zero where a layer has none."""
    total = load.sum(axis=1, keepdims=True, dtype=np.float64)
    shares: NDArray[np.float64] = np.divide(load, total, out=np.zeros(load.shape), where=total > 0)
    return shares


def _draw_pairs(table: NDArray[np.uint64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a table of as many pairs of independent layers with the same loads.

    Few pairs fill few cells, which looks like dependence.
    """
    share = np.outer(table.sum(axis=1, dtype=np.float64), table.sum(axis=0, dtype=np.float64))
    share /= max(float(share.sum()), 1.0)
    return rng.multinomial(int(table.sum(dtype=np.uint64)), share.ravel()).reshape(table.shape)


def _measure_beyond_chance(
    tables: NDArray[np.uint64], rng: np.random.Generator
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the bits of neighbouring layers beyond chance, and by chance, of transitions."""
    by_chance = [_measure_information(_draw_pairs(table, rng)) for table in tables]
    bits = [
        max(_measure_information(table) - bits_by_chance, 0.0)
        for table, bits_by_chance in zip(tables, by_chance, strict=True)
    ]
    return tuple(bits), tuple(by_chance)


def _measure_information(table: NDArray[np.integer[Any]]) -> float:
    """Compute the mutual information in bits of rows and columns of a table of counts."""
    joint = table / max(float(table.sum(dtype=np.float64)), 1.0)
    product = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    filled = joint > 0
    return float(max((joint[filled] * np.log2(joint[filled] / product[filled])).sum(), 0.0))
