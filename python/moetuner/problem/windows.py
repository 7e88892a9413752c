"""Which windows of load count, and how much each does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError, is_number, shown
from moetuner._texts import suggestion
from moetuner.evaluation.arrival import WINDOWS_MIXED, mix_windows
from moetuner.evaluation.blocks import blocks, by_block
from moetuner.serving.arrival import Arrival, share_mixed
from moetuner.statistics import Loads, RoutingStatistics, narrowest

Floats = NDArray[np.float64]
Risk = Literal["mean"] | float

# Windows that a search sees as they are. More are merged by likeness into so many (and one more for
# every group at most), whatever their number is: its memory is bounded by them ("Long traces" in
# docs/experiments.md).
MOST, MERGED = 512, 128
# Windows, at even distances, by which a search ranks the few placements that it ends with.
SAMPLED = 2048
# Tokens of an expert in a window whose number chance changes by a millionth at most, and the seed
# by which fewer are drawn in windows of mixed arrival.
CERTAIN, SEED = 1e12, 1
# How many times as many windows are mixed into a longer one, and how many longer ones there are at
# the least; and what unseen traffic adds to the variance of a mean, in variances of a window over
# the number of windows ("Mixed windows" in docs/experiments.md).
LONGER, FEWEST, UNSEEN = 4, 8, 3
# Longer windows that a group must fill to be searched on them as recorded; of a group that fills
# fewer they are scaled from shorter runs ("Short recordings" in docs/experiments.md).
FILLED = 2
# Numbers that windows are compared by, and rounds of the clustering.
COMPARED, ROUNDS = 64, 5
# Largest of the numbers: sums of their products are exact, so that all machines merge alike.
LARGEST = 1 << 20


@dataclass(frozen=True)
class Windows:
    """Windows of load.

    Parameters
    ----------
    load
        Tokens [W,L,E], of whatever type: there are thousands of windows, and never all of them in
        double precision.
    weight
        How much a window's tokens count [W].
    group
        Group of every window [W]; None where groups do not matter.
    risk
        ``"mean"``, or the level of the conditional value at risk.
    minimax
        Whether the worst group counts.
    more
        More windows, behind those of ``load`` [M,L,E]: of mixed arrival, or longer ones; None for
        none.
    reference
        What a step takes by whose time all others are weighed [W]; None where all are alike.
    parts
        The same, by size, where windows are of several.
    """

    load: NDArray[Any]
    weight: Floats
    group: NDArray[np.int64] | None
    risk: Risk
    minimax: bool
    more: Floats | None = None
    reference: Floats | None = None
    parts: tuple[Windows, ...] = ()

    def __len__(self) -> int:
        """Return the number of windows, W."""
        return len(self.weight)

    def map(self, compute: Callable[[Floats], Floats]) -> Floats:
        """Compute something of every window [W,...], of a block of them [w,L,E] at a time."""
        parts = [compute(block) for block in self.blocks()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self) -> Iterator[Floats]:
        """Yield the loads of all windows in double precision, a block of them [w,L,E] at a time."""
        if self.load.dtype == np.float64:
            yield self.load
        else:
            for run in blocks(len(self.load), self.load[0].size):
                yield self.load[run].astype(np.float64)
        if self.more is not None:
            yield self.more

    @cached_property
    def total(self) -> Floats:
        """Tokens of all windows together [L,E], each counted once."""
        total: Floats = self.load.sum(axis=0, dtype=np.float64)
        return total if self.more is None else total + self.more.sum(axis=0)

    @cached_property
    def tokens(self) -> Floats:
        """Tokens of every window, over all layers and once per expert [W]."""
        if self.parts:
            return np.concatenate([part.tokens for part in self.parts])
        return self.map(lambda load: load.sum(axis=(1, 2)))

    @cached_property
    def mean_tokens(self) -> float:
        """Tokens of a window, likewise, on average by weight."""
        return float((self.weight * self.tokens).sum() / self.weight.sum())

    @cached_property
    def searched(self) -> Windows:
        """Windows that a search sees instead of these: these, or where they are many, means."""
        if self.load.dtype == np.float64:
            return self
        return (
            _joined([part.searched for part in self.parts])
            if self.parts
            else _representatives(self)
        )

    @cached_property
    def sampled(self) -> Windows:
        """Some of these windows, which count as all of them; these where they are not many."""
        if self.parts:
            sampled = [part.sampled for part in self.parts]
            changed = any(one is not part for one, part in zip(sampled, self.parts, strict=True))
            return _joined(sampled) if changed else self
        used = np.flatnonzero(self.weight[: len(self.load)] > 0)
        if self.load.dtype == np.float64 or len(used) <= SAMPLED:
            return self
        chosen = used[np.linspace(0, len(used) - 1, SAMPLED).round().astype(np.int64)]
        # Those of mixed arrival stay as they are.
        every = np.concatenate([chosen, np.arange(len(self.load), len(self))])
        weight = self.weight[every]
        weight[:SAMPLED] *= self.weight[used].sum() / weight[:SAMPLED].sum()
        return replace(
            self,
            load=self.load[chosen],
            weight=weight,
            group=None if self.group is None else self.group[every],
            reference=None if self.reference is None else self.reference[every],
        )

    @cached_property
    def clusters(self) -> list[tuple[int, NDArray[np.int64], Floats]]:
        """Windows that are alike: their group, their numbers, and their mean [L,E]."""
        load = self.load
        features = _features(load)
        used = np.flatnonzero(self.weight[: len(load)] > 0)
        labels = np.zeros(len(load), dtype=np.int64)
        if self.group is not None:
            labels = self.group[: len(load)]
        found = []
        for label in np.unique(labels[used]).tolist():
            of_label = used[labels[used] == label]
            cluster = _clusters(features[of_label], max(len(of_label) * MERGED // len(used), 1))
            for number in np.unique(cluster):
                members = of_label[cluster == number]
                runs = [load[members[run]] for run in blocks(len(members), load[0].size)]
                total = np.sum([run.sum(axis=0, dtype=np.float64) for run in runs], axis=0)
                found.append((label, members, total / len(members)))
        return found

    def reweighed(self, factor: float, reference: float) -> Windows:
        """Return the same windows at so many times their weights, by a reference of each."""
        changed = replace(
            self, weight=factor * self.weight, reference=np.full(len(self), reference)
        )
        if factor > 0 and self.load.dtype != np.float64:
            # What does not depend on weights is not computed anew.
            vars(changed).update({name: getattr(self, name) for name in ("tokens", "clusters")})
        return changed

    @property
    def is_mean(self) -> bool:
        """Whether the value is a weighted mean over windows."""
        return self.risk == "mean" and not self.minimax

    def value(self, cost: Floats, reference: Floats) -> float:
        """Compute the risk of cost over reference, both of every window [W], summed over layers."""
        return float(self.values(cost, reference))

    def values(self, costs: Floats, reference: Floats) -> Floats:
        """Compute the ``value`` [...] of each of several costs [...,W] over one reference."""
        parts = [self._value(costs, reference, counted) for counted in self._parts()]
        worst: Floats = np.max(parts, axis=0)
        return worst

    def reweight(self, cost: Floats, reference: Floats) -> Floats:
        """Return weights [W] under which the mean over windows is what the value is made of."""
        worst = max(self._parts(), key=lambda counted: float(self._value(cost, reference, counted)))
        weight = np.zeros(len(self.weight))
        weight[worst] = self.tail(cost[worst], reference[worst], self.weight[worst])
        mass = self.weight * reference
        scaled: Floats = weight * (mass.sum() / max((weight * mass).sum(), 1e-300))
        return scaled

    def _parts(self) -> list[NDArray[np.bool_]]:
        """Return windows that compete: of every group if the worst one counts, else all as one."""
        if not self.minimax or self.group is None:
            return [np.ones(len(self.weight), dtype=bool)]
        return [self.group == number for number in np.unique(self.group)]

    def _value(self, cost: Floats, reference: Floats, counted: NDArray[np.bool_]) -> Floats:
        cost, reference, weight = cost[..., counted], reference[counted], self.weight[counted]
        part = self.tail(cost, reference, weight) * weight
        total = (part * reference).sum(axis=-1)
        ones = np.ones_like(total)
        mean: Floats = np.divide((part * cost).sum(axis=-1), total, out=ones, where=total > 0)
        return mean

    def tail(self, cost: Floats, reference: Floats, weight: Floats) -> Floats:
        """Compute the part of every window [...,W] that is in the worst, by cost over reference."""
        if self.risk == "mean":
            return np.ones_like(cost)
        mass = weight * reference
        ratio = np.divide(cost, reference, out=np.ones_like(cost), where=reference > 0)
        order = np.argsort(-ratio, axis=-1, kind="stable")
        wanted = (1 - float(self.risk)) * mass.sum()
        mass = mass[order]
        before = np.cumsum(mass, axis=-1) - mass
        part = np.clip((wanted - before) / np.where(mass > 0, mass, 1), 0, 1)
        tail: Floats = np.empty_like(cost)
        np.put_along_axis(tail, order, part, axis=-1)
        return tail


def windows_of(
    statistics: RoutingStatistics,
    arrival: Arrival,
    risk: Risk,
    groups: Mapping[str, float] | Literal["minimax"] | None,
    tokens: int | None = None,
) -> Windows:
    """Return the windows that count, with their weights: as counted, or longer ones of ``tokens``.

    Of more windows than searches see the recorded ones stay as they are, and at most as many mixed
    ones as searches see stand behind them.
    """
    if not (isinstance(risk, str) and risk == "mean") and not (is_number(risk) and 0 <= risk < 1):
        raise ArgumentError(
            f"risk must be 'mean', or a level from 0 to below 1, got {shown(risk)}", "risk"
        )
    share = share_mixed(arrival)
    asked = ("windows", share, risk, _named(groups), tokens)
    if asked not in statistics.known:
        statistics.known[asked] = _find_windows(statistics, share, risk, groups, tokens)
    found: Windows = statistics.known[asked]
    return found


def _named(groups: Mapping[str, float] | Literal["minimax"] | None) -> object:
    """Return groups as a key."""
    return tuple(groups.items()) if isinstance(groups, Mapping) else groups


def _find_windows(
    statistics: RoutingStatistics,
    share: float,
    risk: Risk,
    groups: Mapping[str, float] | Literal["minimax"] | None,
    tokens: int | None,
) -> Windows:
    """Return what ``windows_of`` does, computed anew."""
    by_group = None if groups is None else _group_weights(statistics, groups)
    kind, times = (risk, groups == "minimax"), 1
    load: NDArray[Any] = statistics.window_load
    group, weight = statistics.group, _weigh(statistics, by_group)
    if tokens is not None and statistics.window is not None and tokens != statistics.window:
        times = tokens // statistics.window
        load, group, weight = _join(statistics, tokens, by_group)
    many = len(load) > MOST
    load = load if many else load.astype(np.float64)
    if share == 0 or statistics.windows < 2:
        return Windows(load, weight, group, *kind)
    mixed = _mix(statistics, _weigh(statistics, by_group), min(len(load), MOST), times)
    mixed_weight = np.full(len(mixed), share * weight.sum() / len(mixed))
    weights = np.concatenate([weight * (1 - share), mixed_weight])
    if group is not None:
        # Mixed windows are of no group; where groups compete, they are one of their own.
        group = np.concatenate([group, np.full(len(mixed), len(statistics.group_names))])
    if many and share < 1:
        return Windows(load, weights, group, *kind, mixed)
    # What weighs nothing is left out: the recorded windows at a share of one, not copied at all.
    used = weights > 0
    load = mixed if share == 1 else np.concatenate([load, mixed])[used]
    return Windows(load, weights[used], None if group is None else group[used], *kind)


def _weigh(statistics: RoutingStatistics, by_group: Floats | None) -> Floats:
    """Return the weights of windows [W]: those of their groups, and nothing for what is no step."""
    weight = statistics.is_step.astype(np.float64)
    return weight if by_group is None else weight * by_group[statistics.group]


def _join(
    statistics: RoutingStatistics, length: int, by_group: Floats | None
) -> tuple[Loads, NDArray[np.int64] | None, Floats]:
    """Return windows of ``length`` tokens [M,L,E], their groups [M] and weights [M].

    They are runs of windows of one group. A group that fills fewer than ``FILLED`` of them has
    windows that are scaled from shorter runs of all of its tokens, and that count as these do: what
    a search needs is a mean and how far steps are from it, which shorter runs tell as well.
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
            steps = int((statistics.is_step & (label == number)).sum())
            count = steps // _size_of_mean(times, steps)
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
    return narrowest(np.stack(loads)[order]), None if statistics.group is None else group, weight


def _size_of_mean(size: int, windows: int) -> int:
    """Return the windows of a mean that is as far from that of all ``windows`` as unseen ones are.

    Means of ``size`` windows of unseen traffic are further from the mean of what was seen than
    these from each other: by chance twice a window's variance over the number of windows, and more
    as neighbours are alike. Means of fewer windows vary by as much.
    """
    return max(int(1 / (1 / size + UNSEEN / windows)), 1)


def _mix(statistics: RoutingStatistics, weight: Floats, count: int, times: int) -> Floats:
    """Return windows of mixed arrival [M,L,E], each as long as ``times`` of those counted.

    A longer step has tokens of more sequences. They are means of as few windows as unseen traffic
    asks for, so that a search does not put experts together whose loads rise together from prompt
    to prompt.
    """
    steps = slice(None) if statistics.is_step.all() else statistics.is_step
    load, weight, size = statistics.window_load[steps], weight[steps], WINDOWS_MIXED
    if times > 1:
        count, size = max(count, FEWEST), LONGER * WINDOWS_MIXED
    drawn = mix_windows(load, weight, count, size=_size_of_mean(size, len(load)))
    mean = np.concatenate([part for _, part in drawn]) * times
    return _draw_tokens(mean, float(weight.mean()))


def _draw_tokens(mean: Floats, weight: float) -> Floats:
    """Draw the tokens of windows of mixed arrival around their means [M,L,E] of such a weight.

    They are of many sequences, so that they are nearly independent, and their numbers vary by
    Poisson's law. The means alone would be more even than any step, and no expert without a token.
    """
    tokens = mean / max(weight, 1e-300)
    drawn = np.random.default_rng(SEED).poisson(np.minimum(tokens, CERTAIN))
    mixed: Floats = np.where(tokens < CERTAIN, drawn, tokens) * weight
    return mixed


def _representatives(windows: Windows) -> Windows:
    """Return means of windows that are alike, each of one group, which count as all of them."""
    load, weight, group = windows.load, windows.weight, windows.group
    clusters = windows.clusters
    means = [mean for _, _, mean in clusters]
    weights = [weight[members].sum() for _, members, _ in clusters]
    groups = [label for label, _, _ in clusters]
    merged, merged_weight, of_merged = np.array(means), np.array(weights), np.array(groups)
    if windows.more is not None:
        # They are drawn at random: some say what all of them do.
        added = slice(len(load), len(load) + MERGED)
        part = weight[len(load) :].sum() / max(weight[added].sum(), 1e-300)
        merged = np.concatenate([merged, windows.more[:MERGED]])
        merged_weight = np.concatenate([merged_weight, weight[added] * part])
        if group is not None:
            of_merged = np.concatenate([of_merged, group[added]])
    origins = None if group is None else of_merged
    reference = None
    if windows.reference is not None:
        reference = np.full(len(merged), windows.reference[0])
    rules = (windows.risk, windows.minimax)
    return Windows(merged, merged_weight, origins, *rules, reference=reference)


def weighed(parts: Sequence[Windows], shares: Sequence[float], costs: Sequence[float]) -> Windows:
    """Join windows of several sizes, so that each size has its share of the time.

    Of its steps each takes a cost on average. The weights are as many as there are windows.
    """
    scale = [
        share / max(cost * part.weight.sum(), 1e-300)
        for part, share, cost in zip(parts, shares, costs, strict=True)
    ]
    unit = sum(map(len, parts)) / sum(
        by * part.weight.sum() for by, part in zip(scale, parts, strict=True)
    )
    return _joined(
        [
            part.reweighed(by * unit, cost)
            for part, by, cost in zip(parts, scale, costs, strict=True)
        ]
    )


def _joined(parts: Sequence[Windows]) -> Windows:
    """Return the windows of all parts as one list."""
    first, *others = parts
    behind = [] if first.more is None else [first.more]
    more: Floats | None = np.concatenate(
        [*behind, *(block for part in others for block in part.blocks())]
    )
    load = first.load
    if load.dtype == np.float64:
        load, more = np.concatenate([load, more]), None
    groups = [part.group for part in parts if part.group is not None]
    references = [part.reference for part in parts if part.reference is not None]
    return Windows(
        load,
        np.concatenate([part.weight for part in parts]),
        np.concatenate(groups) if groups else None,
        first.risk,
        first.minimax,
        more,
        np.concatenate(references) if references else None,
        tuple(parts),
    )


def _features(load: NDArray[Any]) -> Floats:
    """Sum the loads of windows [W,L,E] with random signs: whole numbers [W,n], far where they are.

    Distances are kept in expectation (Johnson and Lindenstrauss, 1984; with signs Achlioptas,
    2003). Loads are taken as shares of their window's tokens.
    """
    size = load[0].size
    signs = np.random.default_rng(0).integers(0, 2, (size, COMPARED)) * 2.0 - 1
    features = np.empty((len(load), COMPARED))
    for run in blocks(len(load), size):
        rows = load[run].reshape(-1, size)
        total = rows.sum(axis=1, dtype=np.float64)
        # Sums of whole numbers below 2^24 are exact in single precision, in any order.
        kind = np.float32 if total.max(initial=0) < 1 << 24 else np.float64
        features[run] = rows.astype(kind) @ signs.astype(kind)
        features[run] /= np.maximum(total, 1)[:, None]
    scale = LARGEST / max(float(np.abs(features).max()), 1e-300)
    return np.rint(features * scale)


def _clusters(points: Floats, count: int) -> NDArray[np.int64]:
    """Assign points [n,d] of whole numbers to clusters [n] that are near their means (Lloyd, 1982).

    It begins with points at even distances, so with some of all times.
    """
    centre = points[np.linspace(0, len(points) - 1, count).round().astype(np.int64)]
    for _ in range(ROUNDS):
        square = (centre**2).sum(axis=1)
        nearest = by_block(points, lambda rows: (square - 2 * rows @ centre.T).argmin(axis=1))  # noqa: B023
        size = np.bincount(nearest, minlength=count)
        total = np.stack(
            [np.bincount(nearest, column, minlength=count) for column in points.T], axis=1
        )
        mean = np.rint(total / np.maximum(size, 1)[:, None])
        centre = np.where(size[:, None] > 0, mean, centre)
    return nearest


def _group_weights(
    statistics: RoutingStatistics, groups: Mapping[str, float] | Literal["minimax"]
) -> Floats:
    """Return what a window of every group counts [G]."""
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
