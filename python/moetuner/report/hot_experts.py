"""How much of the work a few experts do: whether a fixed set of them is worth keeping near.

A set is chosen by counts of one half of a recording and judged on the other: beside a cache of as
many experts, which drops the least recently used, and beside routing without preference, which
finds in a set the set's share of all experts. Where nothing can be held out, nothing is decided:
the busiest of equally likely experts take more than their share of the picks by chance.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import ArgumentError
from moetuner.evaluation.units import hold_out
from moetuner.frozen import Frozen
from moetuner.recording import Recording
from moetuner.report.findings import Finding
from moetuner.report.words import say
from moetuner.statistics import as_counts, count_loads
from moetuner.trace import RoutingTrace

Counts = NDArray[np.uint64]
# Shares of all experts that sets have.
SIZES = (0.25, 0.5, 0.75)
# The share whose figures decide, and are given by kind and by layer.
HALF = 0.5
# Picks that are more than those without preference, or than a set's, as far as that matters.
WORTH = 0.05
# Tokens at most that a cache is followed over.
TOKENS = 1 << 20

Answer = Literal[
    "a static set is worth it", "a cache serves better", "routing is flat", "nothing is held out"
]


@dataclass(frozen=True, eq=False, repr=False)
class HotExperts(Frozen):
    """What part of the picks the hottest experts take.

    Parameters
    ----------
    sizes
        Shares of all experts of all layers that the sets have.
    is_unseen
        Whether the picks are of traffic that the sets were not chosen by.
    static
        Share of the picks that the most used experts take, of each size.
    chance
        The same of experts that are equally likely: the size, where sets were not chosen by these
        picks; else the share of the busiest experts of as many picks that are drawn at random.
    cache
        The same of a cache that drops the least recently used experts of each layer; None of
        counts, which have no order.
    static_of_layer
        Share of a layer's picks that the set of half of all experts takes [L].
    static_of_group
        Share of the picks of each group that the half takes which all other groups use most.
    static_later
        Share of the picks of the later half of a recording that the half takes which the earlier
        one uses most; None if there is no later one.
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
        """What the half of all experts says: a fixed set, a cache, neither, or nothing."""
        if not self.is_unseen:
            return "nothing is held out"
        at = self.sizes.index(HALF)
        static = self.static[at]
        if self.cache is not None and self.cache[at] > static + WORTH:
            return "a cache serves better"
        return "a static set is worth it" if static > HALF + WORTH else "routing is flat"

    @property
    def sentence(self) -> str:
        """The answer with its figures."""
        return say(self.finding)

    @property
    def finding(self) -> Finding:
        """The answer, and the shares of the half that it is on."""
        at = self.sizes.index(HALF)
        numbers = {
            "answer": self.answer,
            "static": self.static[at],
            "cache": None if self.cache is None else self.cache[at],
            "chance": self.chance[at],
            "is_unseen": self.is_unseen,
        }
        return Finding("hot experts", numbers)


def count_loads_by_group(traffic: Recording, threads: int | None = None) -> dict[str, Counts]:
    """Count tokens of the experts of every group that has some [L,E]."""
    if traffic.group is None or not traffic.group.size:
        return {}
    windows = count_loads(traffic, threads=threads)
    assert windows.group is not None
    loads = {
        name: windows.window_load[windows.group == number].sum(axis=0, dtype=np.uint64)
        for number, name in enumerate(windows.group_names)
    }
    return {name: load for name, load in loads.items() if load.any()}


def hold_out_hot_experts(
    traffic: Recording, *, seed: int = 0, threads: int | None = None
) -> HotExperts:
    """Measure the hottest experts on a half of traffic that is held out, as far as one can be."""
    # Loads of windows can be held out, pairs of all windows cannot.
    traffic = traffic.without_pairs()
    parts: tuple[Recording, Recording] = (traffic, traffic)
    # Of a single token or window nothing can be held out.
    with suppress(ArgumentError):
        parts = hold_out(traffic, 0.5, seed=seed)
    seen, unseen = (count_loads(part, threads=threads).total_load for part in parts)
    loads = count_loads_by_group(traffic, threads)
    return measure_hot_experts(traffic, seen, unseen, parts[1], loads, threads)


def measure_hot_experts(
    traffic: Recording,
    seen: Counts,
    unseen: Counts,
    part: Recording,
    loads: dict[str, Counts],
    threads: int | None = None,
) -> HotExperts:
    """Compute the shares of picks that sets of experts take.

    Parameters
    ----------
    traffic
        All of a recording.
    seen, unseen
        Tokens of the experts by which sets are chosen, and by which they are judged [L,E].
    part
        What was not seen: all of it if nothing was held out.
    loads
        Tokens of the experts in all of the recording, by group [L,E].
    threads
        Threads to use.
    """
    chosen, is_unseen = _choose_hottest(seen, HALF), part is not traffic
    of_layer = (unseen * chosen).sum(axis=1) / np.maximum(unseen.sum(axis=1, dtype=float), 1.0)
    return HotExperts(
        sizes=SIZES,
        is_unseen=is_unseen,
        static=tuple(_compute_share(unseen, _choose_hottest(seen, size)) for size in SIZES),
        chance=SIZES if is_unseen else _draw_shares(unseen),
        cache=_follow_cache(part, threads) if isinstance(part, RoutingTrace) else None,
        static_of_layer=tuple(of_layer.tolist()),
        static_of_group=_measure_groups(loads),
        static_later=_measure_later_half(traffic, threads),
    )


def _choose_hottest(load: Counts, size: float) -> NDArray[np.bool_]:
    """Return the most used of all experts of all layers [L,E]; of equals the first ones."""
    chosen = np.zeros(load.size, dtype=bool)
    order = np.argsort(-load.ravel().astype(np.float64), kind="stable")
    chosen[order[: round(size * load.size)]] = True
    return chosen.reshape(load.shape)


def _compute_share(load: Counts, chosen: NDArray[np.bool_]) -> float:
    """Compute the share of picks [L,E] that are of the chosen experts."""
    return float(load[chosen].sum(dtype=np.float64) / max(load.sum(dtype=np.float64), 1.0))


def _draw_shares(load: Counts) -> tuple[float, ...]:
    """Draw as many picks of each layer [L,E] as there are, and return what the busiest take."""
    rng, experts = np.random.default_rng(0), load.shape[1]
    even = np.full(experts, 1 / experts)
    drawn = rng.multinomial(load.sum(axis=1, dtype=np.int64), even).astype(np.uint64)
    return tuple(_compute_share(drawn, _choose_hottest(drawn, size)) for size in SIZES)


def _follow_cache(trace: RoutingTrace, threads: int | None) -> tuple[float, ...]:
    """Compute the share of picks that caches hold which drop the least recently used experts.

    As many experts of each layer; token after token, as when one sequence is decoded.
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
    held = [round(size * trace.num_experts) for size in SIZES]
    return tuple(float(counts[:, :number].sum(dtype=np.float64) / total) for number in held)


def _measure_groups(loads: dict[str, Counts]) -> dict[str, float]:
    """Compute what half of the experts, by all other groups, takes of the picks of each group."""
    if len(loads) < 2:
        return {}
    total = sum(loads.values(), start=np.uint64(0))
    return {
        name: _compute_share(load, _choose_hottest(total - load, HALF))
        for name, load in loads.items()
    }


def _measure_later_half(traffic: Recording, threads: int | None) -> float | None:
    """Compute what half of the experts, by the earlier half, takes of the picks of the later."""
    if traffic.length < 2:
        return None
    window = -(-traffic.length // 2)
    without = dict.fromkeys(("transitions", "coactivation", "sets"), False)
    load = as_counts(traffic, window=window, threads=threads, **without).window_load
    early, late = (
        windows.sum(axis=0, dtype=np.uint64) for windows in np.split(load, [len(load) // 2])
    )
    return _compute_share(late, _choose_hottest(early, HALF))
