"""Measure the work of the hottest experts: whether a fixed set of them is worth keeping near.

A set is chosen by counts of one half of a recording and judged on the other. It is compared with a
cache of as many experts, which drops the least recently used one, and with routing without
preference, which picks from a set as often as the set's share of all experts. Where nothing can be
held out, there is no answer: by chance the busiest of equally likely experts take more than their
share of the picks.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import ArgumentError
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.frozen import Frozen
from moetuner.recording import Recording
from moetuner.report.findings import Finding
from moetuner.report.loads import Loads, count_part_loads
from moetuner.report.words import say
from moetuner.statistics import choose_hottest, count_loads
from moetuner.trace import RoutingTrace

# Sizes of sets, as shares of all experts.
SIZES = (0.25, 0.5, 0.75)
# Size of the set that decides, and whose figures are given by group and by layer.
HALF = 0.5
# Smallest difference in the share of picks, to chance or to a fixed set, that matters.
LEAST_DIFFERENCE = 0.05
# Most tokens that a cache is simulated over.
TOKENS = 1 << 20

Answer = Literal[
    "a static set is worth it", "a cache serves better", "routing is flat", "nothing is held out"
]


@dataclass(frozen=True, eq=False, repr=False)
class HotExperts(Frozen):
    """Shares of the picks that the hottest experts take.

    Parameters
    ----------
    sizes
        Sizes of the sets, as shares of all experts of all layers.
    is_unseen
        True if the picks are of other traffic than the sets were chosen by.
    static
        Share of the picks that a fixed set of the most used experts takes, by size.
    chance
        Share of the picks that a set takes if all experts are equally likely, by size: the size
        itself; where sets were chosen by these same picks, the share of the busiest experts of as
        many random picks.
    cache
        Share of the picks that a cache takes which drops the least recently used expert of a
        layer, by size; None for counts, which have no order.
    static_of_layer
        Share of a layer's picks that the set of half of all experts takes [L].
    static_of_group
        Share of the picks of each group that half of the experts take, chosen by all other groups.
    static_later
        Share of the picks of the later half of a recording that half of the experts take, chosen by
        the earlier half; None if there is no later half.
    """

    sizes: tuple[float, ...]
    is_unseen: bool
    static: tuple[float, ...]
    chance: tuple[float, ...]
    cache: tuple[float, ...] | None
    static_of_layer: tuple[float, ...]
    static_of_group: dict[str, float]
    static_later: float | None

    @property
    def answer(self) -> Answer:
        """Name what is worth it: a fixed set of half of the experts, a cache or neither."""
        if not self.is_unseen:
            return "nothing is held out"
        half = self.sizes.index(HALF)
        static = self.static[half]
        if self.cache is not None and self.cache[half] > static + LEAST_DIFFERENCE:
            return "a cache serves better"
        is_worth_it = static > HALF + LEAST_DIFFERENCE
        return "a static set is worth it" if is_worth_it else "routing is flat"

    @property
    def sentence(self) -> str:
        """The answer and its figures, as a sentence."""
        return say(self.finding)

    @property
    def finding(self) -> Finding:
        """The answer, and the shares that half of the experts take."""
        half = self.sizes.index(HALF)
        numbers = {
            "answer": self.answer,
            "static": self.static[half],
            "cache": None if self.cache is None else self.cache[half],
            "chance": self.chance[half],
            "is_unseen": self.is_unseen,
        }
        return Finding("hot experts", numbers)


def hold_out_hot_experts(
    traffic: Recording, *, seed: int = 0, threads: int | None = None
) -> HotExperts:
    """Measure the hottest experts on a held-out half of traffic, or on all where none can be."""
    # Windows can be held out, but not their share of the pairs of all windows.
    traffic = traffic.without_pairs()
    seen = unseen = traffic
    # A single token or window cannot be split.
    with suppress(ArgumentError):
        seen, unseen = hold_out(traffic, seed=seed)
    seen_load, unseen_load = (
        count_loads(recording, threads=threads).total_load for recording in (seen, unseen)
    )
    return measure_hot_experts(traffic, seen_load, unseen_load, unseen, threads)


def measure_hot_experts(
    traffic: Recording,
    seen_load: Loads,
    unseen_load: Loads,
    unseen: Recording,
    threads: int | None = None,
) -> HotExperts:
    """Compute the shares of picks that sets of experts take.

    Sets are chosen by ``seen_load`` [L,E] and judged by ``unseen_load``. ``unseen`` is the held-out
    part of the recording; all of it if nothing was held out.
    """
    is_unseen, is_hot = unseen is not traffic, _choose_hottest(seen_load, HALF)
    static = [_compute_share(unseen_load, _choose_hottest(seen_load, size)) for size in SIZES]
    layer_load = np.maximum(unseen_load.sum(axis=1, dtype=float), 1.0)
    groups, (early, late) = count_part_loads(traffic, threads)
    later = _compute_share(late, _choose_hottest(early, HALF))
    of_layer = (unseen_load * is_hot).sum(axis=1) / layer_load
    return HotExperts(
        sizes=SIZES,
        is_unseen=is_unseen,
        static=tuple(static),
        chance=SIZES if is_unseen else _draw_shares(unseen_load),
        cache=_simulate_cache(unseen, threads) if isinstance(unseen, RoutingTrace) else None,
        static_of_layer=tuple(of_layer.tolist()),
        static_of_group=_measure_groups(groups),
        static_later=later if traffic.length > 1 else None,
    )


def _choose_hottest(load: Loads, size: float) -> NDArray[np.bool_]:
    """Return which experts of all layers [L,E] are this share of them, the most used ones."""
    return choose_hottest(load, round(size * load.size))


def _compute_share(load: Loads, is_chosen: NDArray[np.bool_]) -> float:
    """Compute the share of the picks [L,E] that the chosen experts take."""
    return float(load[is_chosen].sum(dtype=np.float64) / max(load.sum(dtype=np.float64), 1.0))


def _draw_shares(load: Loads) -> tuple[float, ...]:
    """Compute the shares that the busiest experts take of as many random picks as load [L,E]."""
    rng, experts = np.random.default_rng(0), load.shape[1]
    even = np.full(experts, 1 / experts)
    drawn = rng.multinomial(load.sum(axis=1, dtype=np.int64), even).astype(np.uint64)
    return tuple(_compute_share(drawn, _choose_hottest(drawn, size)) for size in SIZES)


def _simulate_cache(trace: RoutingTrace, threads: int | None) -> tuple[float, ...]:
    """Compute the shares of picks that least-recently-used caches of each size have.

    Every layer caches as many experts. Tokens come one by one, as when one sequence is decoded.
    """
    orders = np.tile(np.arange(trace.num_experts, dtype=np.uint16), (trace.layers, 1))
    counts, tokens = np.zeros(orders.shape, dtype=np.uint64), 0
    for shard in trace.shards(threads=threads):
        orders, places = _core.count_recency(shard[: TOKENS - tokens], orders, threads)
        counts += places
        tokens += len(shard)
        if tokens >= TOKENS:
            break
    total = max(counts.sum(dtype=np.float64), 1.0)
    cached = [round(size * trace.num_experts) for size in SIZES]
    return tuple(float(counts[:, :number].sum(dtype=np.float64) / total) for number in cached)


def _measure_groups(loads: dict[str, Loads]) -> dict[str, float]:
    """Compute the share of each group's picks of half of the experts, chosen by other groups."""
    if len(loads) < 2:
        return {}
    total = sum(loads.values(), start=np.uint64(0))
    return {
        name: _compute_share(load, _choose_hottest(total - load, HALF))
        for name, load in loads.items()
    }
