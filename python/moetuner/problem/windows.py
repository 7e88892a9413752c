"""Windows: the windows of load that count in an objective, and their weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError, is_number, shown
from moetuner._texts import suggestion
from moetuner.evaluation.arrival import WINDOWS_MIXED, mix_windows
from moetuner.evaluation.chunks import by_chunk, chunks
from moetuner.recording import compute_once
from moetuner.recording.labelling import evenly_spaced
from moetuner.serving.arrival import Arrival, share_mixed
from moetuner.statistics import WINDOW, RoutingStatistics
from moetuner.statistics.tables import Loads, narrow

Floats = NDArray[np.float64]
Risk = Literal["mean"] | float

# Largest number of windows that a search uses as they are ("Long traces" in docs/experiments.md).
MOST = 512
# More windows are merged into so many clusters of similar windows, plus at most one per group. That
# bounds the memory of a search.
MERGED = 128
# Evenly spaced windows by which a search ranks its final placements.
SAMPLED = 2048
# Tokens of an expert in windows of mixed arrival are drawn with this seed.
SEED = 1
# So many tokens are not drawn: their standard deviation is a millionth of them.
CERTAIN = 1e12
# A longer window of mixed arrival is the mean of so many times as many windows as a short one.
LONGER = 4
# Smallest number of longer windows of mixed arrival. On halves of gpt-oss-20b's prompts (8, 16 and
# 32 devices, three splits) 8 of them leave the goal of the answer 0.6 to 3.5 % below what is
# evaluated on the same traffic, and 32 leave it within 1.6 %; unseen prefill takes 0.2 to 1 % less.
FEWEST = 32
# Variance that unseen traffic adds to a mean, in variances of a window over the number of windows
# ("Mixed windows" in docs/experiments.md).
UNSEEN = 3
# The same for counted windows that are longer than those of decode: a sequence is in few of them,
# so that less of their variance is that of single sequences.
UNSEEN_LONGER = 1
# Longer windows that a group must fill to be searched on them as recorded; for a group that fills
# fewer, shorter runs are scaled ("Short recordings" in docs/experiments.md).
FILLED = 2
# Number of features by which windows are clustered.
FEATURES = 64
# Rounds of the clustering.
ROUNDS = 5
# Largest feature: sums of products of features are exact, so clusters are the same on all machines.
LARGEST = 1 << 20


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
    def clusters(self) -> list[tuple[int, NDArray[np.int64], Floats]]:
        """Clusters of similar windows: their group, their numbers, and their mean [L,E]."""
        load = self.load
        features = _compute_features(load)
        used = np.flatnonzero(self.weight[: len(load)] > 0)
        labels = np.zeros(len(load), dtype=np.int64)
        if self.group is not None:
            labels = self.group[: len(load)]
        clusters = []
        for label in np.unique(labels[used]).tolist():
            in_group = used[labels[used] == label]
            cluster = _cluster(features[in_group], max(len(in_group) * MERGED // len(used), 1))
            for number in np.unique(cluster):
                members = in_group[cluster == number]
                loads = [load[members[chunk]] for chunk in chunks(len(members), load[0].size)]
                total = np.sum([part.sum(axis=0, dtype=np.float64) for part in loads], axis=0)
                clusters.append((label, members, total / len(members)))
        return clusters

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


def choose_windows(
    statistics: RoutingStatistics,
    arrival: Arrival,
    risk: Risk,
    groups: Mapping[str, float] | Literal["minimax"] | None,
    tokens: int | None = None,
) -> Windows:
    """Return the windows that count, with their weights: as counted, or longer ones of ``tokens``.

    Mixed windows follow the recorded ones; there are at most ``MOST`` of them.
    """
    if not (isinstance(risk, str) and risk == "mean") and not (is_number(risk) and 0 <= risk < 1):
        raise ArgumentError(
            f"risk must be 'mean', or a level from 0 to below 1, got {shown(risk)}", "risk"
        )
    share = share_mixed(arrival)
    weights = tuple(groups.items()) if isinstance(groups, Mapping) else groups
    return compute_once(
        statistics,
        ("windows", share, risk, weights, tokens),
        lambda: _compute_windows(statistics, share, risk, groups, tokens),
    )


def _compute_windows(
    statistics: RoutingStatistics,
    share: float,
    risk: Risk,
    groups: Mapping[str, float] | Literal["minimax"] | None,
    tokens: int | None,
) -> Windows:
    """Compute what ``choose_windows`` returns; ``share`` is the weight of mixed windows."""
    by_group = None if groups is None else _weigh_groups(statistics, groups)
    rules = (risk, groups == "minimax")
    times = 1  # counted windows in one
    load: NDArray[Any] = statistics.window_load
    group, weight = statistics.group, _weigh_windows(statistics, by_group)
    if tokens is not None and statistics.window is not None and tokens != statistics.window:
        times = tokens // statistics.window
        load, group, weight = _join_windows(statistics, tokens, by_group)
    are_many = len(load) > MOST
    load = load if are_many else load.astype(np.float64)
    if share == 0 or statistics.windows < 2:
        return Windows(load, weight, group, *rules)
    mixed = _mix_windows(
        statistics, _weigh_windows(statistics, by_group), min(len(load), MOST), times
    )
    mixed_weight = np.full(len(mixed), share * weight.sum() / len(mixed))
    weights = np.concatenate([weight * (1 - share), mixed_weight])
    if group is not None:
        # Mixed windows have no group; where groups compete, they are one more group.
        group = np.concatenate([group, np.full(len(mixed), len(statistics.group_names))])
    if are_many and share < 1:
        return Windows(load, weights, group, *rules, mixed)
    # Windows without weight are left out; at a share of one the recorded ones are not even copied.
    used = weights > 0
    load = mixed if share == 1 else np.concatenate([load, mixed])[used]
    return Windows(load, weights[used], None if group is None else group[used], *rules)


def _weigh_windows(statistics: RoutingStatistics, by_group: Floats | None) -> Floats:
    """Return the weights of windows [W]: those of their groups, 0 for a window that is no step."""
    weight = statistics.is_full_window.astype(np.float64)
    return weight if by_group is None else weight * by_group[statistics.group]


def _join_windows(
    statistics: RoutingStatistics, length: int, by_group: Floats | None
) -> tuple[Loads, NDArray[np.int64] | None, Floats]:
    """Return windows of ``length`` tokens [M,L,E], their groups [M] and weights [M].

    Each is the sum of a run of windows of one group. If a group fills fewer than ``FILLED`` of
    them, shorter runs of all of its tokens are scaled up, with the weight of their tokens: a search
    needs the mean and the variance of steps, which shorter runs have as well.
    """
    tokens = statistics.window_load.sum(axis=(1, 2), dtype=np.float64)
    label = np.zeros(statistics.windows, np.int64) if statistics.group is None else statistics.group
    filled = statistics.runs(length)
    times = filled.shape[1]
    loads, places, groups, weights = [], [], [], []
    for number in np.unique(label):
        runs = list(filled[label[filled[:, 0]] == number])
        scale = np.ones(len(runs))
        if len(runs) < FILLED:
            steps = int((statistics.is_full_window & (label == number)).sum())
            count = steps // choose_mean_size(times, steps)
            runs = np.array_split(np.flatnonzero(label == number), count)
            totals = np.array([tokens[run].sum() for run in runs])
            scale = times * max(tokens.max(), 1) / np.maximum(totals, 1)
        for run, factor in zip(runs, scale.tolist(), strict=True):
            total = statistics.window_load[run].sum(axis=0, dtype=np.uint64)
            loads.append(np.rint(total * factor).astype(np.uint64))
            places.append(run[0])
            groups.append(number)
            weights.append(1 / factor)
    order = np.argsort(places, kind="stable")
    group, weight = np.array(groups, np.int64)[order], np.array(weights)[order]
    if by_group is not None:
        weight *= by_group[group]
    return narrow(np.stack(loads)[order]), None if statistics.group is None else group, weight


def choose_mean_size(size: int, windows: int, unseen: float = UNSEEN) -> int:
    """Return how many seen windows to average, so that means vary like those of unseen windows.

    Means of ``size`` unseen windows vary more around the mean of the seen ones than means of seen
    windows do. Chance adds twice a window's variance over the number of windows; similar neighbours
    add more, ``unseen`` in all. So fewer seen windows are averaged.
    """
    return max(int(1 / (1 / size + unseen / windows)), 1)


def _mix_windows(statistics: RoutingStatistics, weight: Floats, count: int, times: int) -> Floats:
    """Return windows of mixed arrival [M,L,E], each as long as ``times`` counted ones.

    A longer step has tokens of more sequences. Each window is a mean of few counted ones
    (``choose_mean_size``), so that a search separates experts whose loads rise together from
    prompt to prompt.
    """
    steps = slice(None) if statistics.is_full_window.all() else statistics.is_full_window
    load, weight, size = statistics.window_load[steps], weight[steps], WINDOWS_MIXED
    is_counted_longer = statistics.window is not None and statistics.window > WINDOW
    if times > 1 or is_counted_longer:
        count, size = max(count, FEWEST), LONGER * WINDOWS_MIXED
    unseen = UNSEEN_LONGER if is_counted_longer else UNSEEN
    drawn = mix_windows(load, weight, count, size=choose_mean_size(size, len(load), unseen))
    mean = np.concatenate([load for _, load in drawn]) * times
    return _draw_tokens(mean, float(weight.mean()))


def _draw_tokens(mean: Floats, weight: float) -> Floats:
    """Draw the tokens of windows of mixed arrival [M,L,E] around their means.

    The tokens of a step come from many sequences, so they are nearly independent, and their numbers
    have a Poisson distribution. The means alone would be more even than any step, and leave no
    expert without a token.
    """
    tokens = mean / max(weight, 1e-300)
    drawn = np.random.default_rng(SEED).poisson(np.minimum(tokens, CERTAIN))
    mixed: Floats = np.where(tokens < CERTAIN, drawn, tokens) * weight
    return mixed


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


def _compute_features(load: NDArray[Any]) -> Floats:
    """Compute integer features [W,n] of windows [W,L,E]: their loads, summed with random signs.

    They keep distances between windows in expectation (Johnson and Lindenstrauss, 1984; with signs
    Achlioptas, 2003). Loads are shares of their window's tokens.
    """
    size = load[0].size
    signs = np.random.default_rng(0).integers(0, 2, (size, FEATURES)) * 2.0 - 1
    features = np.empty((len(load), FEATURES))
    for chunk in chunks(len(load), size):
        rows = load[chunk].reshape(-1, size)
        total = rows.sum(axis=1, dtype=np.float64)
        # Sums of whole numbers below 2^24 are exact in single precision, in any order.
        kind = np.float32 if total.max(initial=0) < 1 << 24 else np.float64
        features[chunk] = rows.astype(kind) @ signs.astype(kind)
        features[chunk] /= np.maximum(total, 1)[:, None]
    scale = LARGEST / max(float(np.abs(features).max()), 1e-300)
    return np.rint(features * scale)


def _cluster(points: Floats, count: int) -> NDArray[np.int64]:
    """Return the cluster of every point [n], of integer points [n,d] (k-means, Lloyd, 1982).

    The first centres are evenly spaced points, so from all times.
    """
    centre = points[np.linspace(0, len(points) - 1, count).round().astype(np.int64)]
    for _ in range(ROUNDS):
        square = (centre**2).sum(axis=1)
        nearest = by_chunk(points, lambda rows: (square - 2 * rows @ centre.T).argmin(axis=1))  # noqa: B023
        size = np.bincount(nearest, minlength=count)
        total = np.stack(
            [np.bincount(nearest, column, minlength=count) for column in points.T], axis=1
        )
        mean = np.rint(total / np.maximum(size, 1)[:, None])
        centre = np.where(size[:, None] > 0, mean, centre)
    return nearest


def _weigh_groups(
    statistics: RoutingStatistics, groups: Mapping[str, float] | Literal["minimax"]
) -> Floats:
    """Return the weight of every group [G], checked."""
    if statistics.group is None:
        raise ArgumentError(
            "groups needs windows with groups; these statistics have none", "groups"
        )
    names = list(statistics.group_names)
    weight = np.ones(len(names))
    if isinstance(groups, str):
        if groups != "minimax":
            raise ArgumentError(
                f"groups must be 'minimax' or weights by name, got {shown(groups)}", "groups"
            )
        return weight
    for name, value in groups.items():
        if name not in names:
            rule = f"groups names {shown(name)}, which is none of {', '.join(names)}"
            raise ArgumentError(rule + suggestion(name, names), "groups")
        number = names.index(name)
        if not statistics.window_load[statistics.group == number].any():
            raise ArgumentError(f"groups names {shown(name)}, which has no tokens", "groups")
        weight[number] = value
    if not weight[statistics.group].any():
        raise ArgumentError("groups leaves no window with a weight above 0", "groups")
    return weight
