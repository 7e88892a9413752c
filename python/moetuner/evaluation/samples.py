"""Independent units of traffic: what they are, how many there are, and how to hold some out.

Sequences are independent, where they are labelled: tokens of one request route alike, those of two
do not. Where many sequences repeat few prompts, the units are kinds of sequences. Without labels
only the order is known: windows with similar expert shares are not independent, and their
autocorrelation tells over how many windows they are alike. Longer runs are nearly independent, and
held-out runs keep that distance from what the solver sees.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner._checks import ArgumentError, is_number, seed_in, shown
from moetuner.evaluation.kinds import (
    FEW_PER_GROUP,
    Likeness,
    find_sequence_kinds,
    find_window_kinds,
    number_groups,
    subtract_levels,
)
from moetuner.evaluation.reading import Progress
from moetuner.recording import AnyRecording, Recording
from moetuner.statistics import RoutingStatistics, check_recording, count_loads
from moetuner.trace import RoutingTrace, as_trace

Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]
Name = Literal["sequence", "kind", "window"]

# Folds that traffic is dealt into, where it has as many units.
FOLDS = 20
# Folds that are runs of windows that are alike have so many units each, as the ends of neighbouring
# runs are alike; but there are no fewer than so many folds, where there are as many units.
RUN, FEWEST_RUNS = 3, 3
# Windows that are compared with each other; more are taken two by two.
WINDOWS = 4096
# Standard errors of any two windows from which those of a lag, or of two, are alike beyond chance,
# and where it is the only one of many. What is just as much counts nothing, and twice that counts
# three quarters: no single window decides how many are independent.
ALIKE, SURE = 2.0, 4.0
# What is alike lasts so many times the mean lag at which it is, each by its correlation: both ways
# of counting are one for a first-order autoregression that changes slowly.
LASTING = 4
# Windows that are alike at a lag beyond this part of all come back for ever.
RECURS = 3
# Cells of shares [W,L,E] that are looked at, and products of two of them; of more, evenly spaced
# layers are.
CELLS, PRODUCTS = 1 << 23, 1 << 34
# Shares are rounded to this part, so that sums of their products are exact in any order.
PART = 1 << 16
# Tokens of the shortest piece, and the most pieces, of a trace whose autocorrelation is measured.
PIECE, PIECES = 16, 2048
# Part of the traffic that may be lost between what is seen and what is held out.
LOST = 4
# Consecutive seeds begin the runs that they hold out at places far from each other.
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Blocks:
    """How far neighbouring windows are alike.

    Parameters
    ----------
    correlation_time
        Integrated autocorrelation time in windows: as many are worth one independent window.
    correlation_length
        Windows over which neighbours are alike, 1 where they are no more alike than others.
    """

    correlation_time: float = 1.0
    correlation_length: int = 1

    def number(self, windows: int) -> int:
        """Compute how many independent windows so many windows are worth."""
        return int(windows / self.correlation_time + 1e-9)


INDEPENDENT = Blocks()


class Folds(NamedTuple):
    """Some traffic in parts of about equal size that are independent of each other.

    Parameters
    ----------
    fold
        The fold of every token, or window [n].
    number
        How many there are.
    units
        How many independent units were dealt into them.
    """

    fold: NDArray[np.integer[Any]]
    number: int
    units: int

    @property
    def freedom(self) -> int:
        """Degrees of freedom of what folds tell: one less than equal folds that tell as much."""
        sizes = np.bincount(self.fold, minlength=1).astype(np.float64)
        return max(round(float(sizes.sum() ** 2 / max((sizes**2).sum(), 1))) - 1, 1)


@dataclass(frozen=True)
class Samples:
    """What is independent in some traffic.

    Parameters
    ----------
    name
        ``"sequence"``, ``"kind"`` (of sequences), or ``"window"`` where sequences are not known.
    number
        How many there are; of windows what they are worth if they were independent.
    blocks
        Of windows: how far neighbours are alike.
    sequences, kinds
        Labels of sequences, sorted, and the kind of each; None where kinds are not few. Of windows
        the kind of each, or where steps were drawn from few windows, the one of each.
    all_alike
        Whether sequences differ by no more than the noise of their tokens.
    likeness
        What is the same in sequences, or windows, of a kind.
    """

    name: Name
    number: int
    blocks: Blocks = INDEPENDENT
    sequences: NDArray[np.int32] | None = None
    kinds: Integers | None = None
    all_alike: bool = False
    likeness: Likeness = "experts"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that reports show, as JSON values."""
        return {
            "kind": self.name,
            "number": self.number,
            "block_length": self.blocks.correlation_length,
            "all_alike": self.all_alike,
        }

    def deal(
        self, traffic: Recording, rows: Integers, window: int | None, *, folds: int | None = None
    ) -> Folds:
        """Deal some tokens of a trace, or windows of a table [n], into folds.

        Whole sequences, or kinds, are dealt in random order, each to the shortest fold; where
        neither is known, runs are folds. There are ``folds`` of them, or as many as intervals need,
        but no more than units.
        """
        label: Integers | None = None
        if traffic.sequence is not None:
            label = self.label_tokens(traffic.sequence)
        elif self.kinds is not None:
            # A part of a recording has windows of fewer kinds.
            label = find_samples(traffic).kinds
        if label is None:
            windows = max(len(rows) // traffic.rows_in(window or choose_piece_size(traffic)), 1)
            units = self.blocks.number(windows)
            number = max(min(units, folds or FOLDS), 1)
            if self.blocks.correlation_length > 1 and folds is None:
                number = max(min(units // RUN, FOLDS), min(units, FEWEST_RUNS), 1)
            fold = np.arange(len(rows)) * number // max(len(rows), 1)
            return Folds(fold.astype(np.min_scalar_type(number)), number, units)
        label = check.at(label, rows)
        labels = check.distinct(label)
        unit = check.ranks(label, labels)
        first, sizes = check.first_of(unit, len(labels)), check.counts(unit, len(labels))
        number = max(min(len(sizes), folds or FOLDS), 1)
        fold = np.empty(len(sizes), dtype=np.min_scalar_type(number))
        shortest = [(0, own) for own in range(number)]
        # By length, folds would be more alike than samples are, where lengths tell subjects.
        order = np.random.default_rng(0).permutation(len(sizes))
        for place in np.argsort(first)[order].tolist():
            size, own = heapq.heappop(shortest)
            fold[place] = own
            heapq.heappush(shortest, (size + int(sizes[place]), own))
        return Folds(check.at(fold, unit), number, len(sizes))

    def label_tokens(self, sequence: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the unit of tokens of sequences [t]."""
        if self.sequences is None or self.kinds is None:
            return sequence
        return check.at(self.kinds.astype(np.int32), check.ranks(sequence, self.sequences))


def find_samples(
    traffic: Recording,
    *,
    window: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Return what is independent in traffic; unlabelled traces are cut into windows of tokens.

    ``progress`` gets the share of a trace's readings that is done.
    """
    is_cut = traffic.ordered and traffic.sequence is None
    # Every split asks for the same samples.
    known = ("samples", window if is_cut else None)
    if known not in traffic.known:
        traffic.known[known] = _find_samples_anew(traffic, window, threads, progress)
    samples: Samples = traffic.known[known]
    return samples


def _find_samples_anew(
    traffic: Recording, window: int | None, threads: int | None, progress: Progress | None
) -> Samples:
    if isinstance(traffic, RoutingStatistics):
        return _find_samples_of_windows(traffic)
    if traffic.sequence is not None:
        return _find_samples_of_sequences(as_trace(traffic), progress)
    if window is None:
        window = choose_piece_size(traffic)
    loads = count_loads(traffic, window=window, threads=threads, progress=progress)
    blocks = measure_blocks(loads.window_load, loads.group)
    return Samples("window", blocks.number(max(traffic.length // (window or 1), 1)), blocks)


def _find_samples_of_windows(table: RoutingStatistics) -> Samples:
    """Return what is independent in a load table: kinds of windows, or else blocks of them.

    Steps that were drawn from one window of counters are of its kind, or block.
    """
    if table.drawn_from is not None:
        _, first, label, sizes = np.unique(
            table.drawn_from, return_index=True, return_inverse=True, return_counts=True
        )
        load = np.zeros((len(first), table.layers, table.experts), np.uint64)
        np.add.at(load, label, table.window_load.astype(np.uint64))
        group = None if table.group is None else table.group[first]
        samples = _find_samples_of_windows(
            RoutingStatistics(load, group=group, group_names=table.group_names)
        )
        if samples.kinds is not None:
            return replace(samples, kinds=samples.kinds[label])
        if samples.blocks.correlation_length == 1:
            return replace(samples, kinds=label)
        blocks, steps = samples.blocks, int(sizes.max())
        return replace(
            samples,
            blocks=Blocks(steps * blocks.correlation_time, steps * blocks.correlation_length),
        )
    kinds, _ = find_window_kinds(table)
    if kinds is not None:
        return Samples("kind", int(kinds.max()) + 1, kinds=kinds)
    blocks = measure_blocks(table.window_load, table.group)
    return Samples("window", blocks.number(int(table.is_step.sum())), blocks)


def _find_samples_of_sequences(trace: RoutingTrace, progress: Progress | None) -> Samples:
    """Return what is independent in a trace with sequences: these, or their kinds."""
    labels = check.distinct(cast("NDArray[np.int32]", trace.sequence))
    kinds, likeness, all_alike = find_sequence_kinds(trace, labels, progress)
    if kinds is None:
        return Samples("sequence", len(labels), all_alike=all_alike)
    number = int(kinds.max(initial=-1)) + 1
    return Samples("kind", number, sequences=labels, kinds=kinds, likeness=likeness)


def measure_blocks(
    load: NDArray[np.unsignedinteger[Any]], group: NDArray[np.integer[Any]] | None = None
) -> Blocks:
    """Compute how far windows are alike from their loads [W,L,E], each group around its own mean.

    The autocovariance of expert shares, summed over experts and layers, is compared with what any
    two windows have. Lags count in neighbouring pairs, as kinds that take turns are alike at every
    second lag only (Geyer 1992), up to the first pair that is no larger; and up to the furthest lag
    that is larger beyond doubt, as those that take longer turns are. Noise of few tokens has none.
    The integrated autocorrelation time is the sum of what is left over its value at lag 0 without
    noise.
    """
    (share, noise), times = _compute_shares(load, group), 1
    label = number_groups(len(share), group)
    while len(share) > WINDOWS:
        half = len(share) // 2
        share, times = np.round(share[: 2 * half].reshape(half, 2, -1).sum(axis=1) / 2), 2 * times
        noise = noise / 2
        label = np.zeros(half, np.int64)  # two of different groups are of neither
    lags, weight, noisy = _measure_lags(share, label)
    if not len(lags):
        return INDEPENDENT
    # What a window has in common with no neighbour is noise, by a line through the first lags, or
    # is not, by the number of its tokens. The mean of both moves little by little.
    next_one, largest = lags[1] if len(lags) > 1 else 0.0, float(lags.max())
    line, clean = max(2 * lags[0] - next_one, largest), max(noisy - noise, largest)
    correlation = weight * np.clip(lags / math.sqrt(clean * min(line, clean)), -1.0, 1.0)
    # What alternates tells no more than what is alike until then.
    correlation = correlation[: int(np.cumsum(correlation).argmax()) + 1]
    time = 1 + 2 * max(float(correlation.sum()), 0.0)
    # Two paths that take turns are alike at every second lag: runs must last as long as each.
    lasting = float((np.arange(1, len(correlation) + 1) * correlation).sum()) / time
    time = max(time, LASTING * lasting)
    if len(lags) > len(share) / RECURS:
        # What comes back to the end is no more than comes before it is back.
        time = max(time, float(weight[-1] * len(lags)))
    reach = int(np.flatnonzero(weight >= 1 / 2).max(initial=-1)) + 1
    return Blocks(times * time, times * max(round(time), reach, 1))


def _compute_shares(
    load: NDArray[np.unsignedinteger[Any]], group: NDArray[np.integer[Any]] | None
) -> tuple[Floats, float]:
    """Return shares [W,L*E] less the mean of their group, as whole numbers, in order of time.

    Also return the squared distance that the noise of its tokens gives a window, in the mean.
    """
    windows, layers, experts = load.shape
    compared = min(windows, WINDOWS)
    fits = min(CELLS // max(windows * experts, 1), PRODUCTS // (compared**2 * experts), layers)
    chosen = np.unique(np.linspace(0, layers - 1, max(fits, 1)).round().astype(np.int64))
    part = load[:, chosen].astype(np.float64)
    total = part.sum(axis=2, keepdims=True)
    share = np.divide(part, total, out=np.zeros_like(part), where=total > 0)
    noise = (share * (1 - share)).sum(axis=2, keepdims=True) / np.maximum(total, 1)
    share = share.reshape(windows, -1)
    share = subtract_levels(share, group)
    # Unused windows say nothing.
    share[total.sum(axis=(1, 2)) == 0] = 0
    return np.round(share * PART), float(noise.sum()) / windows * PART**2


def _measure_lags(share: Floats, label: NDArray[np.int64]) -> tuple[Floats, Floats, float]:
    """Compute autocovariances of windows [W,F] as far as these are alike, and at lag 0 with noise.

    Also return how much each of them counts, from 0 to 1, by how far it is beyond chance. None
    where windows are no more alike than any two. Around the mean of their group any two of a
    group [W] are a little unlike, and those of different groups are not: without regard to that,
    neighbours of different groups would be alike.
    """
    windows = len(share)
    if windows < 3 or not share.any():
        return np.empty(0), np.empty(0), 0.0
    products = share @ share.T
    own = np.diagonal(products).copy()
    mean = _centre(products, label)
    error = float(products[~np.eye(windows, dtype=bool)].std())
    furthest = max(windows // 2, 1)
    covariances, pairs = np.empty(furthest), windows - np.arange(1, furthest + 1)
    for lag in range(1, furthest + 1):
        covariances[lag - 1] = np.diagonal(products, lag).mean()
    errors = max(error, 1e-300) / np.sqrt(pairs)
    sure, weight, reach = covariances / errors, np.zeros(furthest), 0
    for first in range(0, furthest, 2):
        two = slice(first, first + 2)
        both = float(covariances[two].sum() / np.sqrt((errors[two] ** 2).sum()))
        weight[two] = _weigh_evidence(
            np.maximum(both, [sure[first], *sure[first + 1 : first + 2]]), ALIKE
        )
        if both <= ALIKE:
            weight[first + 1 : first + 2] = _weigh_evidence(sure[first + 1 : first + 2], ALIKE)
        if not weight[first]:
            break
        reach = first + 1 + int((weight[first + 1 : first + 2] > 0).sum())
    weight[reach:] = 0
    # Pairs of windows that are alike as neighbours are tell less than so many.
    beyond = _weigh_evidence(sure, SURE * math.sqrt(1 + reach))
    # Up to what comes back, all that is between counts, too.
    weight = np.maximum(weight, np.maximum.accumulate(beyond[::-1])[::-1])
    reach = int(np.flatnonzero(weight).max(initial=-1)) + 1
    return covariances[:reach], weight[:reach], float(own.sum() / windows) - mean


def _weigh_evidence(sure: Floats, least: float) -> Floats:
    """Return how much counts what is so many standard errors from 0: nothing up to the least."""
    weight: Floats = 1 - (least / np.maximum(sure, least)) ** 2
    return weight


def _centre(products: Floats, label: NDArray[np.int64]) -> float:
    """Subtract from products [W,W] of windows of a group their mean; return the mean of those.

    Products of different groups have the mean zero.
    """
    total = 0.0
    for number in np.unique(label):
        chosen = np.flatnonzero(label == number)
        pairs = np.ix_(chosen, chosen)
        part = products[pairs]
        apart = len(chosen) * (len(chosen) - 1)
        mean = float(part.sum() - np.trace(part)) / max(apart, 1)
        products[pairs] -= mean
        total += len(chosen) * mean
    return total / len(label)


def hold_out(
    traffic: AnyRecording, holdout: float = 0.5, *, seed: int = 0
) -> tuple[AnyRecording, AnyRecording]:
    """Return a part of traffic to solve for, and one to judge on, as the commands split INPUT.

    Parameters
    ----------
    traffic
        A trace is split by sequence, by kind where its sequences are of few kinds. Without
        sequences, and for a load table, windows are drawn where neighbours are no more alike than
        others; else runs of them are held out, and what is as near to these as neighbours are
        alike is left out of both parts.
    holdout
        Share of the sequences or windows that is held out. 0 holds nothing out: both parts are all
        of the traffic.
    seed
        Random seed.

    Raises
    ------
    ValueError
        If ``holdout`` is not at least 0 and below 1, or the traffic cannot be split: a single
        token or window, or saved statistics, which count pairs over all windows.

    Examples
    --------
    >>> import moetuner as mt
    >>> loads = mt.RoutingStatistics.from_load([[[3, 1]], [[2, 2]], [[3, 1]], [[1, 3]]])
    >>> seen, unseen = mt.hold_out(loads)
    >>> seen.windows, unseen.windows
    (2, 2)
    """
    check_recording(traffic)
    if not (is_number(holdout) and 0 <= holdout < 1):
        raise ArgumentError(
            f"holdout must be at least 0 and below 1, got {shown(holdout)}", "holdout"
        )
    seed = seed_in(seed)
    if holdout == 0:
        return traffic, traffic
    if traffic.has_pairs:
        raise ArgumentError(
            f"holdout must be 0 where traffic is saved statistics, got {holdout}: pairs are "
            "counted over all windows; give the trace to judge on unseen sequences",
            "holdout",
        )
    number, rng = traffic.length, np.random.default_rng(seed)
    if number < 2:
        size = f"a trace of {number} tokens" if traffic.ordered else "a load table of one window"
        raise ArgumentError(f"holdout must be 0 for {size}, got {holdout}", "holdout")
    label, gap = _label_rows(traffic)
    if label is not None:
        seen = _draw(label, 1 - holdout, rng)
        return traffic.take(seen), traffic.take(~seen)
    if gap == 1:
        count = min(max(round(holdout * number), 1), number - 1)
        unseen = np.isin(np.arange(number), rng.permutation(number)[:count])
        return traffic.take(~unseen), traffic.take(unseen)
    seen, unseen = np.zeros((2, number), dtype=bool)
    for stretch in split_into_stretches(traffic.group, number):
        chosen = choose_runs(len(stretch), holdout, gap, seed)
        seen[stretch], unseen[stretch] = chosen
    return traffic.take(seen), traffic.take(unseen)


def _label_rows(recording: Recording) -> tuple[Integers | None, int]:
    """Return the unit of every row, None where only runs are; and how far neighbours are alike."""
    sequence = recording.sequence
    if sequence is not None and (sequence != sequence[0]).any():
        unit = find_samples(recording).label_tokens(sequence)
        # All of one kind: sequences are held out then, which are no evidence of others.
        return (sequence if (unit == unit[0]).all() else unit), 1
    if recording.ordered:
        return None, measure_correlation_length(recording)
    samples = find_samples(recording)
    return samples.kinds, samples.blocks.correlation_length


def _draw(
    unit: NDArray[np.integer[Any]], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw a share of the samples; return whose items [n] those are."""
    labels = check.distinct(unit)
    count = min(max(round(share * labels.size), 1), labels.size - 1)
    return check.among(unit, rng.permutation(labels)[:count])


def measure_correlation_length(trace: Recording) -> int:
    """Compute over how many tokens neighbours of an unlabelled trace are alike."""
    piece = choose_piece_size(trace)
    loads = count_loads(trace, window=piece)
    return piece * measure_blocks(loads.window_load, loads.group).correlation_length


def choose_piece_size(trace: Recording) -> int:
    """Return the tokens of a piece of a trace whose autocorrelation is measured."""
    return max(PIECE, -(-trace.length // PIECES))


def split_into_stretches(group: NDArray[np.integer[Any]] | None, number: int) -> list[Integers]:
    """Return the items [n] of stretches of time whose groups are of no other stretch.

    Of groups that follow one another each is held out by itself, so that what is judged is of the
    same mix as what is seen. Those that take turns are in one stretch: what two of them do at the
    same time may be alike. Groups of few items have no stretch of their own.
    """
    if group is None:
        return [np.arange(number)]
    names, first = np.unique(group, return_index=True)
    last = number - 1 - np.unique(group[::-1], return_index=True)[1]
    if number < FEW_PER_GROUP * len(names):
        return [np.arange(number)]
    cuts: list[int] = []
    end = 0
    for begin, place in sorted(zip(first.tolist(), range(len(names)), strict=True)):
        shortest = min(begin - (cuts[-1] if cuts else 0), number - begin)
        if begin > end and shortest >= FEW_PER_GROUP:
            cuts.append(begin)
        end = max(end, int(last[place]))
    return np.split(np.arange(number), cuts)


def choose_runs(
    number: int, share: float, gap: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Choose runs of windows or tokens to hold out, and what is seen, apart from them by a gap.

    Runs are as many as lose no more than a quarter of all to their gaps, and one at least; both
    parts have something where there are two. They are runs in time: of all groups at once, as what
    two groups do at the same time may be alike.
    """
    periods = max(number // (2 * LOST * gap), 1)
    length = number / periods
    gap = min(gap, max(int(length - 2) // 2, 0))
    of_unseen = min(max(round(share * (length - 2 * gap)), 1), max(int(length) - 2 * gap - 1, 1))
    start = int(length * ((seed * GOLDEN) % 1.0))
    place = (np.arange(number) - start) % number % length
    unseen = place < of_unseen
    seen = (place >= of_unseen + gap) & (place < length - gap)
    return seen, unseen
