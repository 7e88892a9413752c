"""Find the independent samples of traffic, deal them into folds, and hold some of them out.

Where sequences are labelled, they are the samples: tokens of one request route alike, those of two
requests do not. Where many sequences repeat few prompts, the samples are kinds of sequences.
Without labels the samples are windows, whose neighbours may be alike: their autocorrelation gives
the length over which they are. Runs longer than that are nearly independent, and held-out runs keep
that distance from the traffic that the solver sees.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError, is_number, seed_in, shown
from moetuner.evaluation.arrival import overlay
from moetuner.evaluation.kinds import (
    FEW_PER_GROUP,
    Likeness,
    find_sequence_kinds,
    find_window_kinds,
    number_groups,
    subtract_levels,
)
from moetuner.evaluation.reading import Progress
from moetuner.recording import AnyRecording, Recording, compute_once, labelling
from moetuner.statistics import RoutingStatistics, check_recording, count_loads
from moetuner.trace import RoutingTrace, as_trace

Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]
Name = Literal["sequence", "kind", "window"]

# Number of folds, where traffic has as many samples.
FOLDS = 20
# Where neighbouring windows are alike, folds are runs of windows, and the ends of neighbouring runs
# are alike. A run has at least so many samples, unless that leaves too few runs.
SAMPLES_PER_RUN = 3
FEWEST_RUNS = 3
# Largest number of windows that are compared pairwise; of more, neighbours are merged in pairs.
WINDOWS = 4096
# Standard errors above which the autocovariance at a lag is beyond chance, where those of all
# shorter lags are. Its weight rises from 0 there to 3/4 at twice as many, so no single window
# decides how many are independent.
SCORE_IN_SEQUENCE = 2.0
# The same for a lag whose shorter lags are not beyond chance: it is one of many that were tried.
SCORE_ALONE = 4.0
# The autocorrelation time is at least so many times the mean lag, weighted by correlation. Both are
# the same for a first-order autoregression that changes slowly.
TIMES_MEAN_LAG = 4
# Windows that are alike at a lag beyond 1 / 3 of all recur for the whole recording.
RECURRING_PART = 3
# Largest number of shares [W,L,E] that are compared; of more, evenly spaced layers are compared.
CELLS = 1 << 23
# Largest number of products of two shares, in the same way.
PRODUCTS = 1 << 34
# Shares are rounded to multiples of 1/SHARE_SCALE, so that sums of their products are exact in any
# order.
SHARE_SCALE = 1 << 16
# The autocorrelation of a trace is measured in pieces. Fewest tokens of a piece.
PIECE = 16
# Most pieces of a trace.
PIECES = 2048
# Gaps between seen and held-out runs take at most 1 / 4 of the traffic.
GAPS_PER_TRAFFIC = 4
# Multiples of the golden ratio, modulo 1, are far from each other: so are the runs that consecutive
# seeds hold out.
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Autocorrelation:
    """Autocorrelation of windows: how far apart two of them are independent.

    Parameters
    ----------
    correlation_time
        Integrated autocorrelation time in windows: as many are worth one independent window.
    correlation_length
        Windows over which neighbours are alike; 1 where they are no more alike than any two.
    """

    correlation_time: float = 1.0
    correlation_length: int = 1

    def number(self, windows: int) -> int:
        """Compute the effective sample size of a number of windows."""
        return int(windows / self.correlation_time + 1e-9)


INDEPENDENT = Autocorrelation()


class Folds(NamedTuple):
    """Parts of traffic of about equal size that are independent of each other.

    Parameters
    ----------
    fold
        The fold of every token, or window [n].
    number
        Number of folds.
    units
        Number of independent samples that were dealt into them.
    """

    fold: NDArray[np.integer[Any]]
    number: int
    units: int

    @property
    def freedom(self) -> int:
        """Degrees of freedom of a standard error from these folds (Kish's effective number - 1)."""
        sizes = np.bincount(self.fold, minlength=1).astype(np.float64)
        return max(round(float(sizes.sum() ** 2 / max((sizes**2).sum(), 1))) - 1, 1)


@dataclass(frozen=True)
class Samples:
    """Independent samples of traffic.

    Parameters
    ----------
    name
        ``"sequence"``, ``"kind"`` (of sequences or windows), or ``"window"``.
    number
        Number of samples; for windows their effective sample size.
    autocorrelation
        Autocorrelation of windows.
    sequences, kinds
        Labels of sequences, sorted, and the kind of each; both None where kinds are not few. For
        windows, ``kinds`` is the kind of each, or the window of counters that a step was drawn
        from.
    all_alike
        True if sequences differ by no more than the noise of their tokens.
    likeness
        Similarity of the sequences, or windows, of a kind.
    """

    name: Name
    number: int
    autocorrelation: Autocorrelation = INDEPENDENT
    sequences: NDArray[np.int32] | None = None
    kinds: Integers | None = None
    all_alike: bool = False
    likeness: Likeness = "experts"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that reports show, as JSON values."""
        return {
            "kind": self.name,
            "number": self.number,
            "block_length": self.autocorrelation.correlation_length,
            "all_alike": self.all_alike,
        }

    def deal(
        self, traffic: Recording, rows: Integers, window: int | None, *, folds: int | None = None
    ) -> Folds:
        """Deal tokens of a trace, or windows of a table [n], into folds.

        Whole sequences, or kinds, are dealt in random order, each to the smallest fold; without
        either, folds are runs. There are ``folds`` of them, by default as many as intervals need,
        but no more than samples.
        """
        label: Integers | None = None
        if traffic.sequence is not None:
            label = self.label_tokens(traffic.sequence)
        elif self.kinds is not None:
            # Where this traffic is a part of a recording, its windows are of fewer kinds.
            label = find_samples(traffic).kinds
        if label is None:
            return self._deal_runs(traffic, len(rows), window, folds)
        return _deal_samples(labelling.at(label, rows), folds)

    def _deal_runs(
        self, traffic: Recording, rows: int, window: int | None, folds: int | None
    ) -> Folds:
        """Deal rows of the traffic into folds that are runs of them, of equal length."""
        windows = max(rows // traffic.rows_in(window or choose_piece_size(traffic)), 1)
        samples = self.autocorrelation.number(windows)
        number = max(min(samples, folds or FOLDS), 1)
        if self.autocorrelation.correlation_length > 1 and folds is None:
            number = max(min(samples // SAMPLES_PER_RUN, FOLDS), min(samples, FEWEST_RUNS), 1)
        fold = np.arange(rows) * number // max(rows, 1)
        return Folds(fold.astype(np.min_scalar_type(number)), number, samples)

    def label_tokens(self, sequence: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the label of the sample that every token is of, given its sequence [t]."""
        if self.sequences is None or self.kinds is None:
            return sequence
        return labelling.at(self.kinds.astype(np.int32), labelling.ranks(sequence, self.sequences))


def _deal_samples(label: Integers, folds: int | None) -> Folds:
    """Deal whole samples into folds, given the sample of every row [n]."""
    labels = labelling.distinct(label)
    sample = labelling.ranks(label, labels)
    first, sizes = labelling.first_of(sample, len(labels)), labelling.counts(sample, len(labels))
    number = max(min(len(sizes), folds or FOLDS), 1)
    fold = np.empty(len(sizes), dtype=np.min_scalar_type(number))
    smallest = [(0, number_of_fold) for number_of_fold in range(number)]
    # The order is random: dealt from the longest sample to the shortest, folds would be more alike
    # than samples are wherever subjects differ in length.
    order = np.random.default_rng(0).permutation(len(sizes))
    for place in np.argsort(first)[order].tolist():
        size, fold[place] = heapq.heappop(smallest)
        heapq.heappush(smallest, (size + int(sizes[place]), int(fold[place])))
    return Folds(labelling.at(fold, sample), number, len(sizes))


def find_samples(
    traffic: Recording,
    *,
    window: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Find the independent samples of traffic.

    A trace without sequence labels is cut into windows of ``window`` tokens. ``progress`` gets the
    share of a trace's readings that is done.
    """
    is_cut = traffic.ordered and traffic.sequence is None
    # Every split asks for the same samples.
    return compute_once(
        traffic,
        ("samples", window if is_cut else None),
        lambda: _find_samples_anew(traffic, window, threads, progress),
    )


def _find_samples_anew(
    traffic: Recording, window: int | None, threads: int | None, progress: Progress | None
) -> Samples:
    """Compute what ``find_samples`` returns."""
    if isinstance(traffic, RoutingStatistics):
        return _find_samples_of_windows(traffic)
    if traffic.sequence is not None:
        return _find_samples_of_sequences(as_trace(traffic), progress)
    if window is None:
        window = choose_piece_size(traffic)
    loads = count_loads(traffic, window=window, threads=threads, progress=progress)
    autocorrelation = measure_autocorrelation(loads.window_load, loads.group)
    number = autocorrelation.number(max(traffic.length // (window or 1), 1))
    return Samples("window", number, autocorrelation)


def _find_samples_of_windows(table: RoutingStatistics) -> Samples:
    """Find the samples of a load table: kinds of its windows or, where these are not few, windows.

    Steps that were drawn from one window of counters are of one kind, or count as one window.
    """
    if table.drawn_from is not None:
        _, first, label, sizes = np.unique(
            table.drawn_from, return_index=True, return_inverse=True, return_counts=True
        )
        load = np.zeros((len(first), table.layers, table.num_experts), np.uint64)
        np.add.at(load, label, table.window_load.astype(np.uint64))
        group = None if table.group is None else table.group[first]
        samples = _find_samples_of_windows(
            RoutingStatistics(load, group=group, group_names=table.group_names)
        )
        if samples.kinds is not None:
            return replace(samples, kinds=samples.kinds[label])
        if samples.autocorrelation.correlation_length == 1:
            return replace(samples, kinds=label)
        windows, steps = samples.autocorrelation, int(sizes.max())
        return replace(
            samples,
            autocorrelation=Autocorrelation(
                steps * windows.correlation_time, steps * windows.correlation_length
            ),
        )
    kinds, _ = find_window_kinds(table)
    if kinds is not None:
        return Samples("kind", int(kinds.max()) + 1, kinds=kinds)
    autocorrelation = measure_autocorrelation(table.window_load, table.group)
    number = autocorrelation.number(int(table.is_full_window.sum()))
    return Samples("window", number, autocorrelation)


def _find_samples_of_sequences(trace: RoutingTrace, progress: Progress | None) -> Samples:
    """Find the samples of a trace with sequence labels: the sequences, or their kinds."""
    labels = labelling.distinct(cast("NDArray[np.int32]", trace.sequence))
    kinds, likeness, all_alike = find_sequence_kinds(trace, labels, progress)
    if kinds is None:
        return Samples("sequence", len(labels), all_alike=all_alike)
    number = int(kinds.max(initial=-1)) + 1
    return Samples("kind", number, sequences=labels, kinds=kinds, likeness=likeness)


def measure_autocorrelation(
    load: NDArray[np.unsignedinteger[Any]], group: NDArray[np.integer[Any]] | None = None
) -> Autocorrelation:
    """Compute the autocorrelation of windows from their loads [W,L,E], each group around its mean.

    The autocovariance of expert shares, summed over experts and layers, is compared with that of
    any two windows. Lags are taken in pairs (Geyer 1992), because windows that alternate are alike
    at every second lag only. Lags count up to the first pair that is not beyond chance; for longer
    periods, up to the last single lag that is clearly beyond it. The integrated autocorrelation
    time is the sum of these autocovariances over the variance without the noise of tokens.
    """
    share, noise = _compute_shares(load, group)
    merged = 1  # windows in one
    label = number_groups(len(share), group)
    while len(share) > WINDOWS:
        half = len(share) // 2
        share = np.round(share[: 2 * half].reshape(half, 2, -1).sum(axis=1) / 2)
        merged, noise = 2 * merged, noise / 2
        label = np.zeros(half, np.int64)  # two windows of different groups are merged
    covariance, weight, variance = _measure_lags(share, label)
    if not len(covariance):
        return INDEPENDENT
    # Two estimates of the variance without noise: the line through the first two lags, at lag 0,
    # and the variance less the noise that so many tokens have. Their geometric mean is steadier.
    second, largest = covariance[1] if len(covariance) > 1 else 0.0, float(covariance.max())
    by_line = max(2 * covariance[0] - second, largest)
    by_tokens = max(variance - noise, largest)
    scale = math.sqrt(by_tokens * min(by_line, by_tokens))
    correlation = weight * np.clip(covariance / scale, -1.0, 1.0)
    # Cut off where the cumulative sum is largest: what follows alternates, or is negative.
    correlation = correlation[: int(np.cumsum(correlation).argmax()) + 1]
    time = 1 + 2 * max(float(correlation.sum()), 0.0)
    # Where two slow processes take turns, correlations alternate and their sum is small, but each
    # process stays alike as long as ever: the mean lag shows it.
    mean_lag = float((np.arange(1, len(correlation) + 1) * correlation).sum()) / time
    time = max(time, TIMES_MEAN_LAG * mean_lag)
    if len(covariance) > len(share) / RECURRING_PART:
        # Windows that recur up to the end are worth no more than those of one period.
        time = max(time, float(weight[-1] * len(covariance)))
    last_lag = int(np.flatnonzero(weight >= 1 / 2).max(initial=-1)) + 1
    return Autocorrelation(merged * time, merged * max(round(time), last_lag, 1))


def _compute_shares(
    load: NDArray[np.unsignedinteger[Any]], group: NDArray[np.integer[Any]] | None
) -> tuple[Floats, float]:
    """Compute shares [W,L*E] less the mean of their group, as whole numbers, in order of time.

    Also compute the mean squared distance of a window from its expectation that the noise of its
    tokens explains.
    """
    windows, layers, experts = load.shape
    compared = min(windows, WINDOWS)
    fits = min(CELLS // max(windows * experts, 1), PRODUCTS // (compared**2 * experts), layers)
    chosen = labelling.evenly_spaced(layers, max(fits, 1))
    counts = load[:, chosen].astype(np.float64)
    total = counts.sum(axis=2, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    noise = (share * (1 - share)).sum(axis=2, keepdims=True) / np.maximum(total, 1)
    share = share.reshape(windows, -1)
    share = subtract_levels(share, group)
    # Windows without tokens must not look alike.
    share[total.sum(axis=(1, 2)) == 0] = 0
    return np.round(share * SHARE_SCALE), float(noise.sum()) / windows * SHARE_SCALE**2


def _measure_lags(share: Floats, label: NDArray[np.int64]) -> tuple[Floats, Floats, float]:
    """Compute autocovariances of windows [W,F] by lag, their weights, and the variance with noise.

    Lags end where windows are no more alike than any two; there may be none. The weight of a lag is
    from 0 to 1, by how far its autocovariance is beyond chance. The mean over any two windows of a
    group [W] is subtracted: around the mean of their group they are slightly anticorrelated, and
    windows of different groups are not correlated.
    """
    windows = len(share)
    if windows < 3 or not share.any():
        return np.empty(0), np.empty(0), 0.0
    products = share @ share.T
    squares = np.diagonal(products).copy()
    mean = _centre(products, label)
    error = float(products[~np.eye(windows, dtype=bool)].std())
    furthest = max(windows // 2, 1)
    covariances, pairs = np.empty(furthest), windows - np.arange(1, furthest + 1)
    for lag in range(1, furthest + 1):
        covariances[lag - 1] = np.diagonal(products, lag).mean()
    errors = max(error, 1e-300) / np.sqrt(pairs)
    score, weight, lags = covariances / errors, np.zeros(furthest), 0
    for first in range(0, furthest, 2):
        pair, second = slice(first, first + 2), slice(first + 1, first + 2)
        pair_score = float(covariances[pair].sum() / np.sqrt((errors[pair] ** 2).sum()))
        weight[pair] = _weigh_evidence(np.maximum(pair_score, score[pair]), SCORE_IN_SEQUENCE)
        if pair_score <= SCORE_IN_SEQUENCE:
            weight[second] = _weigh_evidence(score[second], SCORE_IN_SEQUENCE)
        if not weight[first]:
            break
        lags = first + 1 + int((weight[second] > 0).sum())
    weight[lags:] = 0
    # Neighbouring pairs of windows are alike, so they are fewer independent pairs than they seem.
    single = _weigh_evidence(score, SCORE_ALONE * math.sqrt(1 + lags))
    # Where windows recur at a lag, all shorter lags count as much.
    weight = np.maximum(weight, np.maximum.accumulate(single[::-1])[::-1])
    lags = int(np.flatnonzero(weight).max(initial=-1)) + 1
    return covariances[:lags], weight[:lags], float(squares.sum() / windows) - mean


def _weigh_evidence(score: Floats, least: float) -> Floats:
    """Compute weights from 0 to 1 of values that are so many standard errors above 0.

    The weight is 0 up to ``least``.
    """
    weight: Floats = 1 - (least / np.maximum(score, least)) ** 2
    return weight


def _centre(products: Floats, label: NDArray[np.int64]) -> float:
    """Subtract from products [W,W] of windows of one group their mean, in place.

    Returns the mean of what was subtracted, over windows. Products of windows of different groups
    have mean 0.
    """
    total = 0.0
    for number in np.unique(label):
        members = np.flatnonzero(label == number)
        pairs = np.ix_(members, members)
        products_of_group = products[pairs]
        distinct_pairs = len(members) * (len(members) - 1)
        off_diagonal = float(products_of_group.sum() - np.trace(products_of_group))
        mean = off_diagonal / max(distinct_pairs, 1)
        products[pairs] -= mean
        total += len(members) * mean
    return total / len(label)


def hold_out(
    traffic: AnyRecording, holdout: float = 0.5, *, seed: int = 0
) -> tuple[AnyRecording, AnyRecording]:
    """Split traffic into a part to solve for and a held-out part, as the commands split INPUT.

    Parameters
    ----------
    traffic
        A trace is split by sequence, or by kind where its sequences are of few kinds. Where many
        sequences run at once, runs of a part's tokens are interleaved, so that a window of the part
        has tokens of about as many sequences as a window of the whole. Without sequences, and for
        a load table, single windows are drawn where neighbours are no more alike than any two. Else
        runs of windows are held out, and both parts leave out the windows within a correlation
        length of these.
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
        return _take_together(traffic, seen), _take_together(traffic, ~seen)
    if gap == 1:
        count = min(max(round(holdout * number), 1), number - 1)
        unseen = np.isin(np.arange(number), rng.permutation(number)[:count])
        return traffic.take(~unseen), traffic.take(unseen)
    seen, unseen = np.zeros((2, number), dtype=bool)
    for section in split_into_sections(traffic.group, number):
        chosen = choose_runs(len(section), holdout, gap, seed)
        seen[section], unseen[section] = chosen
    return traffic.take(seen), traffic.take(unseen)


def _take_together(traffic: AnyRecording, rows: NDArray[np.bool_]) -> AnyRecording:
    """Return marked rows; of tokens, as many sequences are together as are in the traffic."""
    part, sequence = traffic.take(rows), traffic.sequence
    if sequence is None or part.sequence is None:
        return part
    order = overlay(part.sequence, sequence)
    return part if order is None else part.take(order)


def _label_rows(recording: Recording) -> tuple[Integers | None, int]:
    """Return the sample of every row, and the rows over which neighbours are alike.

    Labels are None where rows are no samples, but runs of them are.
    """
    sequence = recording.sequence
    if sequence is not None and (sequence != sequence[0]).any():
        label = find_samples(recording).label_tokens(sequence)
        # Where all are of one kind, sequences are held out, which are no evidence of other kinds.
        return (sequence if (label == label[0]).all() else label), 1
    if recording.ordered:
        return None, measure_correlation_length(recording)
    samples = find_samples(recording)
    return samples.kinds, samples.autocorrelation.correlation_length


def _draw(
    label: NDArray[np.integer[Any]], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw a share of the labels, and return which items [n] have one of them."""
    labels = labelling.distinct(label)
    count = min(max(round(share * labels.size), 1), labels.size - 1)
    return labelling.among(label, rng.permutation(labels)[:count])


def measure_correlation_length(trace: Recording) -> int:
    """Compute the correlation length of an unlabelled trace, in tokens."""
    piece = choose_piece_size(trace)
    loads = count_loads(trace, window=piece)
    return piece * measure_autocorrelation(loads.window_load, loads.group).correlation_length


def choose_piece_size(trace: Recording) -> int:
    """Return the tokens of the windows in which a trace's autocorrelation is measured."""
    return max(PIECE, -(-trace.length // PIECES))


def split_into_sections(group: NDArray[np.integer[Any]] | None, number: int) -> list[Integers]:
    """Split items [n] into sections of time, so that no group is in two of them.

    Some of each section is held out, so that both parts have the same mix of groups. Groups that
    take turns are in one section, as they may be alike at one time. Groups of few items have no
    section of their own.
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
    """Return which windows or tokens [n] are seen, and which runs of them are held out.

    A gap lies between seen and held-out ones. As many runs are held out as keep the gaps within a
    quarter of all, and at least one. Where there are two items or more, both parts have some. A run
    has the items of all groups at a time, as two groups may be alike at one time.
    """
    periods = max(number // (2 * GAPS_PER_TRAFFIC * gap), 1)
    length = number / periods
    gap = min(gap, max(int(length - 2) // 2, 0))
    longest = max(int(length) - 2 * gap - 1, 1)
    unseen_length = min(max(round(share * (length - 2 * gap)), 1), longest)
    start = int(length * ((seed * GOLDEN) % 1.0))
    place = (np.arange(number) - start) % number % length
    unseen = place < unseen_length
    seen = (place >= unseen_length + gap) & (place < length - gap)
    return seen, unseen
