"""Windows: the windows of load that count in an objective, and their weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.chunks import chunks
from moetuner.problem.windows.clusters import MERGED, Cluster, find_clusters
from moetuner.recording.labelling import evenly_spaced

Floats = NDArray[np.float64]
Risk = Literal["mean"] | float

# Largest number of windows that a search uses as they are ("Long traces" in docs/experiments.md).
MOST = 512
# Evenly spaced windows by which a search ranks its final placements.
SAMPLED = 2048


@dataclass(frozen=True)
class Windows:
    """Windows of load, with their weights, groups and risk.

    Parameters
    ----------
    load
        Tokens [W,L,E] of any type: thousands of windows never are all in double precision.
    weight
        Weight of a window's tokens [W].
    group
        Group of every window [W]; None if groups do not matter.
    risk
        ``"mean"``, or the level of the conditional value at risk.
    minimax
        True if the worst group counts.
    extra
        Further windows, behind those of ``load`` [M,L,E]: of mixed arrival, or longer ones.
    reference
        Mean time of a step of the window's size [W]; None if all windows have one size.
    by_size
        The windows of each size, if there are several.
    """

    load: NDArray[Any]
    weight: Floats
    group: NDArray[np.int64] | None
    risk: Risk
    minimax: bool
    extra: Floats | None = None
    reference: Floats | None = None
    by_size: tuple[Windows, ...] = ()

    def __len__(self) -> int:
        """Return the number of windows, W."""
        return len(self.weight)

    def map(self, compute: Callable[[Floats], Floats]) -> Floats:
        """Return a function's results for all windows [W,...], from their chunks [w,L,E]."""
        results = [compute(chunk) for chunk in self.chunks()]
        return results[0] if len(results) == 1 else np.concatenate(results)

    def chunks(self) -> Iterator[Floats]:
        """Yield the loads of all windows in double precision, in chunks [w,L,E]."""
        if self.are_few:
            yield self.load
        else:
            for chunk in chunks(len(self.load), self.load[0].size):
                yield self.load[chunk].astype(np.float64)
        if self.extra is not None:
            yield self.extra

    @cached_property
    def total(self) -> Floats:
        """Tokens of all windows together [L,E], without weights."""
        total: Floats = self.load.sum(axis=0, dtype=np.float64)
        return total if self.extra is None else total + self.extra.sum(axis=0)

    @cached_property
    def tokens(self) -> Floats:
        """Tokens of every window, over all layers and once per expert [W]."""
        if self.by_size:
            return np.concatenate([windows.tokens for windows in self.by_size])
        return self.map(lambda load: load.sum(axis=(1, 2)))

    @cached_property
    def mean_tokens(self) -> float:
        """Weighted mean of ``tokens``."""
        return float((self.weight * self.tokens).sum() / self.weight.sum())

    @cached_property
    def searched(self) -> Windows:
        """Windows for searches: these, or if they are many, the means of clusters."""
        if self.are_few:
            return self
        if self.by_size:
            return _concatenate([windows.searched for windows in self.by_size])
        return _merge_alike(self)

    @cached_property
    def sampled(self) -> Windows:
        """A sample of these windows with the weight of all; these if they are not many."""
        if self.by_size:
            samples = [windows.sampled for windows in self.by_size]
            is_same = all(map(operator.is_, samples, self.by_size))
            return self if is_same else _concatenate(samples)
        used = np.flatnonzero(self.weight[: len(self.load)] > 0)
        if self.are_few or len(used) <= SAMPLED:
            return self
        chosen = used[evenly_spaced(len(used), SAMPLED)]
        # Windows of mixed arrival stay as they are.
        indices = np.concatenate([chosen, np.arange(len(self.load), len(self))])
        weight = self.weight[indices]
        weight[:SAMPLED] *= self.weight[used].sum() / weight[:SAMPLED].sum()
        return replace(
            self,
            load=self.load[chosen],
            weight=weight,
            group=None if self.group is None else self.group[indices],
            reference=None if self.reference is None else self.reference[indices],
        )

    @cached_property
    def clusters(self) -> list[Cluster]:
        """Clusters of similar windows: their group, their numbers, and their mean [L,E]."""
        counted = slice(len(self.load))  # further windows are in no cluster
        group = None if self.group is None else self.group[counted]
        return find_clusters(self.load, self.weight[counted], group)

    def scale_weights(self, factor: float, reference: float) -> Windows:
        """Return these windows with their weights multiplied by a factor, and with a reference."""
        changed = replace(
            self, weight=factor * self.weight, reference=np.full(len(self), reference)
        )
        if factor > 0 and not self.are_few:
            # Tokens and clusters do not depend on weights.
            vars(changed).update({name: getattr(self, name) for name in ("tokens", "clusters")})
        return changed

    @property
    def are_few(self) -> bool:
        """True if searches use these windows as they are: then loads are in double precision."""
        return self.load.dtype == np.float64

    @property
    def is_mean(self) -> bool:
        """True if the value is a weighted mean over windows."""
        return self.risk == "mean" and not self.minimax

    def value(self, cost: Floats, reference: Floats) -> float:
        """Compute the risk of cost over reference, both of every window [W]."""
        return float(self.values(cost, reference))

    def values(self, costs: Floats, reference: Floats) -> Floats:
        """Compute the ``value`` [...] of several costs [...,W] over one reference."""
        values = [self._value(costs, reference, windows) for windows in self._find_competing()]
        worst: Floats = np.max(values, axis=0)
        return worst

    def find_deciding_weights(self, cost: Floats, reference: Floats) -> Floats:
        """Return weights [W] under which the mean over windows has the value of these costs."""
        worst = max(
            self._find_competing(), key=lambda counted: float(self._value(cost, reference, counted))
        )
        weight = np.zeros(len(self.weight))
        weight[worst] = self.tail(cost[worst], reference[worst], self.weight[worst])
        mass = self.weight * reference
        scaled: Floats = weight * (mass.sum() / max((weight * mass).sum(), 1e-300))
        return scaled

    def _find_competing(self) -> list[NDArray[np.bool_]]:
        """Return masks of windows [W]: one for each group if the worst counts, else one for all."""
        if not self.minimax or self.group is None:
            return [np.ones(len(self.weight), dtype=bool)]
        return [self.group == number for number in np.unique(self.group)]

    def _value(self, cost: Floats, reference: Floats, mask: NDArray[np.bool_]) -> Floats:
        """Compute the risk of cost over reference in the windows of a mask [W]."""
        cost, reference, weight = cost[..., mask], reference[mask], self.weight[mask]
        weight = self.tail(cost, reference, weight) * weight
        total = (weight * reference).sum(axis=-1)
        ones = np.ones_like(total)
        mean: Floats = np.divide((weight * cost).sum(axis=-1), total, out=ones, where=total > 0)
        return mean

    def tail(self, cost: Floats, reference: Floats, weight: Floats) -> Floats:
        """Compute the share of every window [...,W] in the tail of largest cost over reference."""
        if self.risk == "mean":
            return np.ones_like(cost)
        mass = weight * reference
        ratio = np.divide(cost, reference, out=np.ones_like(cost), where=reference > 0)
        order = np.argsort(-ratio, axis=-1, kind="stable")
        tail_mass = (1 - float(self.risk)) * mass.sum()
        mass = mass[order]
        before = np.cumsum(mass, axis=-1) - mass
        share = np.clip((tail_mass - before) / np.where(mass > 0, mass, 1), 0, 1)
        tail: Floats = np.empty_like(cost)
        np.put_along_axis(tail, order, share, axis=-1)
        return tail


def _merge_alike(windows: Windows) -> Windows:
    """Return the means of clusters of windows, with the weight of all windows."""
    load, weight, group = windows.load, windows.weight, windows.group
    clusters = windows.clusters
    means = [mean for _, _, mean in clusters]
    weights = [weight[members].sum() for _, members, _ in clusters]
    groups = [label for label, _, _ in clusters]
    merged, merged_weight, merged_group = np.array(means), np.array(weights), np.array(groups)
    if windows.extra is not None:
        # Mixed windows are drawn at random, so the first ones can stand for all.
        added = slice(len(load), len(load) + MERGED)
        scale = weight[len(load) :].sum() / max(weight[added].sum(), 1e-300)
        merged = np.concatenate([merged, windows.extra[:MERGED]])
        merged_weight = np.concatenate([merged_weight, weight[added] * scale])
        if group is not None:
            merged_group = np.concatenate([merged_group, group[added]])
    origins = None if group is None else merged_group
    reference = None
    if windows.reference is not None:
        reference = np.full(len(merged), windows.reference[0])
    rules = (windows.risk, windows.minimax)
    return Windows(merged, merged_weight, origins, *rules, reference=reference)


def join_sizes(
    by_size: Sequence[Windows], shares: Sequence[float], costs: Sequence[float]
) -> Windows:
    """Join windows of several sizes, with weights that give each size its share of the time.

    ``costs`` are the mean times of a step of each size. Weights add up to the number of windows.
    """
    scales = [
        share / max(cost * windows.weight.sum(), 1e-300)
        for windows, share, cost in zip(by_size, shares, costs, strict=True)
    ]
    unit = sum(map(len, by_size)) / sum(
        scale * windows.weight.sum() for scale, windows in zip(scales, by_size, strict=True)
    )
    return _concatenate(
        [
            windows.scale_weights(scale * unit, cost)
            for windows, scale, cost in zip(by_size, scales, costs, strict=True)
        ]
    )


def _concatenate(by_size: Sequence[Windows]) -> Windows:
    """Return the windows of all sizes, one size after another."""
    first, *others = by_size
    extra_chunks = [] if first.extra is None else [first.extra]
    extra: Floats | None = np.concatenate(
        [*extra_chunks, *(chunk for windows in others for chunk in windows.chunks())]
    )
    load = first.load
    if first.are_few:
        load, extra = np.concatenate([load, extra]), None
    groups = [windows.group for windows in by_size if windows.group is not None]
    references = [windows.reference for windows in by_size if windows.reference is not None]
    return Windows(
        load,
        np.concatenate([windows.weight for windows in by_size]),
        np.concatenate(groups) if groups else None,
        first.risk,
        first.minimax,
        extra,
        np.concatenate(references) if references else None,
        tuple(by_size),
    )
