"""Find kinds of sequences, or windows, that route alike: traffic may repeat few prompts.

Two sequences of one kind differ by the noise of their tokens alone. Where all sequences differ by
much more than that, each is a kind of its own; where none does, all traffic is of one kind. A load
table that drifts slowly has no kinds: its windows are alike because they are near in time, so they
are samples with autocorrelation (``samples``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.reading import Progress, count_loads_by_label, scale_progress
from moetuner.evaluation.samples.levels import subtract_levels
from moetuner.evaluation.samples.texts import Likeness, number_texts
from moetuner.recording.labelling import Labelled, evenly_spaced
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Largest number of counts [S,L,E] in memory, and of layers that are compared; of many sequences
# fewer layers are compared, or none.
CELLS = 1 << 24
LAYERS = 8
# Largest number of kinds.
MOST = 256
# Standard deviations of its noise by which a sequence may be from the mean of its kind.
NEAR = 4.0
# Largest number of sequences that are compared pairwise, to find small changes of a prompt.
COMPARED = 4096
# Quantile of the squared distances of all pairs that stands for the distance of two prompts of one
# subject: most pairs may be of two subjects.
LOCAL = 0.1
# A small change of a prompt may explain this share of that distance.
CHANGED = 0.45
# The next kind must be so many times as far, in squared distance, as members of a kind are.
SEPARATE = 5.0
# Least mean squared distance of kinds, in multiples of that which noise gives two sequences.
APART = 3.0
# Least mean number of sequences of a kind.
EACH = 2
# Largest number of sequences that are compared pairwise in the order of time; of more, neighbours
# are added up.
IN_ORDER = 1024
# Least share of the sequences in a stretch of time that is looked for: a shorter one is less than a
# fold, and decides nothing.
STRETCH = 1 / 20
# Least share of what sets sequences of a stretch apart from the others that they have in common.
# Subjects that follow one another have up to a half, one law has all of it.
COMMON = 0.7
# Standard errors of the likeness of any two sequences by which those of a stretch are more alike.
# As many stretches are tried as there are pairs.
SCORE = 6.0
# Share of the windows in one kind above which traffic is steady but for some windows.
STEADY = 0.75
# Share of the windows that are not in the main group of their kind, from which groups share kinds.
SHARED = 0.1
# Standard errors by which the most similar kinds must be nearer in time than any two, to be pieces
# of a path.
NEARER = 1.5
# Two windows are far apart if more than one third of all windows lie between them.
FAR = 3
# Kinds recur if pairs of one kind are far apart at least half as often as any two windows are.
AGAIN = 0.5


def find_sequence_kinds(
    trace: RoutingTrace, sequences: Labelled, progress: Progress | None = None
) -> tuple[Integers | None, Likeness, bool]:
    """Return the kind of every sequence of a trace [S]; None where each is a kind of its own.

    Sequences that share a document are of one kind, and so are those that route alike. Where kinds
    are not few, those of a stretch of time that route alike are of one kind. Two groups share no
    kind. Also return what sequences of a kind have in common, and whether in every group
    sequences differ by no more than the noise of their tokens. ``progress`` gets the share of two
    readings of the trace.
    """
    number = len(sequences.labels)
    group = np.zeros(number, dtype=np.int64)
    if trace.group is not None:
        group[sequences.rank] = trace.group
    text, likeness = number_texts(trace, sequences, scale_progress(progress, 0, 1 / 2))
    texts, first = np.unique(text, return_index=True)
    layers = min(LAYERS, trace.layers, CELLS // max(number * trace.num_experts, 1))
    if layers < 1:
        return (text if len(texts) < number else None), likeness, False
    report = scale_progress(progress, 1 / 2, 1)
    count = count_loads_by_label(trace, sequences.rank, number, layers, report)[first]
    kind, all_alike = _find_kinds_by_group(count, group[first])
    like_kinds: Likeness = "experts"
    if EACH * (int(kind.max(initial=-1)) + 1) > len(texts):
        stretch = find_stretches(count, group[first], sequences.first[first])
        kind, like_kinds = stretch, "in a row"
    kinds = int(kind.max(initial=-1)) + 1
    if kinds < len(texts):
        likeness = like_kinds
    return (kind[text] if kinds < number else None), likeness, all_alike


def find_window_kinds(statistics: RoutingStatistics) -> tuple[Integers | None, bool]:
    """Return the kind of every window [W] of loads, or None, and whether all windows are alike."""
    number = statistics.windows
    layers = min(LAYERS, statistics.layers, CELLS // max(number * statistics.num_experts, 1))
    used = statistics.window_load.any(axis=(1, 2))
    if layers < 1 or not used.all():
        return None, False
    chosen = evenly_spaced(statistics.layers, layers)
    count = statistics.window_load[:, chosen].astype(np.float64)
    joint, group = _find_few_kinds(count, are_windows=True), statistics.group
    if joint is not None and np.bincount(joint).max() > STEADY * number:
        return None, not joint.any()
    if group is None or (joint is not None and _are_shared(joint, group)):
        return joint, False
    if int(np.diff(group).astype(bool).sum()) >= 2 * len(np.unique(group)):
        # Groups that take turns may share kinds, each around the mean of the group.
        joint = _find_few_kinds(count, group, are_windows=True)
        if joint is not None and _are_shared(joint, group):
            return (joint if np.bincount(joint).max() <= STEADY * number else None), False
    kind, all_alike = _find_kinds_by_group(count, group, are_windows=True)
    return (kind if EACH * (int(kind.max()) + 1) <= number else None), all_alike


def _are_shared(kind: Integers, group: Integers) -> bool:
    """Return whether groups share kinds [W]: a tenth of the windows is not of its main group.

    True of a single group.
    """
    size = np.zeros((int(kind.max()) + 1, int(group.max()) + 1))
    np.add.at(size, (kind, group), 1)
    in_main_group = size.max(axis=1).sum()
    return bool(in_main_group < (1 - SHARED) * len(kind)) or size.shape[1] == 1


def _find_kinds_by_group(
    count: Floats, group: Integers, *, are_windows: bool = False
) -> tuple[Integers, bool]:
    """Return the kind of every sequence of counts [S,L,E], found in every group by itself.

    Also return whether the sequences of every group are alike.
    """
    kind, total, all_alike = np.arange(len(count)), 0, True
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        kind_in_group = _find_few_kinds(count[members], are_windows=are_windows)
        if are_windows and kind_in_group is None and len(members) >= 2 * EACH:
            return np.arange(len(count)), False  # windows without kinds may be alike in time
        all_alike = all_alike and kind_in_group is not None and not kind_in_group.any()
        if kind_in_group is None or not kind_in_group.any():
            kind_in_group = np.arange(len(members))
        kind[members] = total + kind_in_group
        total += int(kind_in_group.max()) + 1
    return kind, all_alike


def _find_few_kinds(
    count: Floats, group: Integers | None = None, *, are_windows: bool = False
) -> Integers | None:
    """Return the kind of every sequence, or window, of counts [S,L,E]; None if kinds are not few.

    All are of kind 0 if they are alike. Sequences of one kind differ by no more than noise, or by
    much less than those of two kinds. With ``group`` [S], shares are compared around the mean of
    their group. Windows that change little by little are of no kinds.
    """
    number = len(count)
    if number < 2 * EACH:
        return None
    tokens = count[:, 0].sum(axis=1)
    share = (count / np.maximum(count.sum(axis=2, keepdims=True), 1)).reshape(number, -1)
    noise, limit = _measure_noise(share, tokens, count.shape, are_windows=are_windows)
    subtract_levels(share, group)
    kind = _cluster(share, tokens, noise, limit)
    if kind is not None or number > COMPARED:
        is_path = are_windows and kind is not None and _is_path(share, kind)
        return None if is_path else kind
    # Where noise does not explain all differences, small changes of a prompt may.
    products = share @ share.T
    square = products.diagonal() - noise
    distance = square[:, None] + square - 2 * products
    nearby = float(np.quantile(distance[~np.eye(number, dtype=bool)], LOCAL))
    kind = _cluster(share, tokens, noise, limit, CHANGED * max(nearby, 0.0))
    if kind is None or not _are_apart(distance, kind) or (are_windows and _is_path(share, kind)):
        return None
    return kind


def find_stretches(count: Floats, group: Integers, time: NDArray[np.integer[Any]]) -> Integers:
    """Return the stretch of time that every sequence of counts [S,L,E] is of, or its own number.

    Sequences of a stretch are next to each other by ``time`` [S], and have in common most of what
    sets them apart from all others: the burst of one tenant is one sample, however long it is.
    """
    number, order = len(count), np.argsort(time, kind="stable")
    if number < 2 / STRETCH:
        return np.arange(number)
    # Of many sequences, neighbours are added up.
    step = np.arange(number) * min(number, IN_ORDER) // number
    starts = np.flatnonzero(np.diff(step, prepend=-1))
    summed = np.add.reduceat(count[order], starts, axis=0)
    score = _score_stretches(summed, group[order][starts])
    stretch = np.arange(number)
    ranges = [(0, len(starts))]
    while ranges:
        begin, end = ranges.pop()
        scores = score[begin : end + 1, begin : end + 1]
        first, last = (begin + place for place in divmod(int(scores.argmax()), len(scores)))
        if score[first, last] < SCORE:
            continue
        stretch[order[(first <= step) & (step < last)]] = number + first
        ranges += [(begin, first), (last, end)]
    pairs = np.stack([stretch, group], axis=1)
    kind: Integers = np.unique(pairs, axis=0, return_inverse=True)[1].ravel().astype(np.int64)
    return kind


def _score_stretches(count: Floats, group: Integers) -> Floats:
    """Compute by how many standard errors stretches of counts [S,L,E] are alike [S+1,S+1].

    Rows are the first sequences of stretches, columns those behind their last. The score is 0 of
    what is too short, or has too little in common.
    """
    number, tokens = len(count), count[:, 0].sum(axis=1)
    share = (count / np.maximum(count.sum(axis=2, keepdims=True), 1)).reshape(number, -1)
    noise, _ = _measure_noise(share, tokens, count.shape, are_windows=False)
    subtract_levels(share, group)
    products = share @ share.T
    # Squares of shares, without the noise of their tokens, which products of two do not have.
    squares = np.append(0, np.cumsum(products.diagonal() - noise))
    np.fill_diagonal(products, 0)
    error = float(products[~np.eye(number, dtype=bool)].std())
    sums = np.zeros((number + 1, number + 1))
    sums[1:, 1:] = products.cumsum(axis=0).cumsum(axis=1)
    corner = sums.diagonal()
    inside = corner[None, :] + corner[:, None] - sums - sums.T
    length = np.subtract.outer(np.arange(number + 1), np.arange(number + 1)).T
    is_long = length >= max(STRETCH * number, 2)
    pairs = np.where(is_long, length * (length - 1.0), 1.0)
    common = inside / pairs
    own = np.subtract.outer(squares, squares).T / np.where(is_long, length, 1)
    score: Floats = common / max(error, 1e-300) * np.sqrt(pairs / 2)
    return np.where(is_long & (common >= COMMON * own), score, 0.0)


def _measure_noise(
    share: Floats, tokens: Floats, shape: tuple[int, ...], *, are_windows: bool
) -> tuple[Floats, Floats]:
    """Compute the noise of every sequence's shares [S,F], and the limit of what it explains.

    Noise [S] is the expected squared distance from a sequence's shares to those of endless tokens.
    A squared distance is more than chance beyond the limit [S] times the noise. ``shape`` is that
    of the counts [S,L,E].
    """
    number, layers, experts = shape
    # Tokens choose distinct experts, so their counts vary less than a multinomial's.
    variance = share * (1 - share)
    noise = variance.sum(axis=1) / np.maximum(tokens, 1)
    # The relative variance of the squared distance that noise gives.
    noise_variance = np.full(number, 2 / max(layers * (experts - 1), 1))
    if are_windows:
        # The fewer experts have most of many tokens, the more the noise itself varies.
        squares = (variance**2).sum(axis=1)
        noise_variance = 2 * squares / np.maximum(variance.sum(axis=1) ** 2, 1e-300)
    return noise, 1 + NEAR * np.sqrt(noise_variance)


def _cluster(
    share: Floats, tokens: Floats, noise: Floats, limit: Floats, changed: float = 0.0
) -> Integers | None:
    """Cluster sequences by their shares [S,F]; return the kind of each [S], or None if many.

    The longest sequences come first. A sequence joins the kind with the nearest mean. It begins a
    new kind if it is further from all means than ``limit`` [S] times its noise [S], and further
    than its noise and a small change of a prompt (``changed``).
    """
    number = len(share)
    means, weight = np.empty((MOST, share.shape[1])), np.zeros(MOST)
    kind, used = np.empty(number, dtype=np.int64), 0
    for one in np.argsort(-tokens, kind="stable"):
        distance = ((means[:used] - share[one]) ** 2).sum(axis=1)
        # A kind's mean has noise too, that of all its tokens.
        explained = noise[one] * (1 + tokens[one] / weight[:used])
        allowed = np.maximum(explained * limit[one], explained + changed)
        ratio = distance / np.maximum(allowed, 1e-300)  # one expert alone has no noise
        nearest = int(ratio.argmin()) if used else 0
        if not used or ratio[nearest] > 1:
            if used == min(MOST, number // EACH):
                return None
            nearest, used = used, used + 1
            means[nearest] = share[one]
        weight[nearest] += tokens[one]
        means[nearest] += (share[one] - means[nearest]) * (tokens[one] / weight[nearest])
        kind[one] = nearest
    if used < 2:
        return np.zeros(number, dtype=np.int64)
    between = ((means[:used, None] - means[None, :used]) ** 2).sum(axis=2)
    typical = float(between[~np.eye(used, dtype=bool)].mean())
    return kind if typical >= APART * 2 * float(np.median(noise)) else None


def _are_apart(distance: Floats, kind: Integers) -> bool:
    """Return whether kinds are far apart, compared with the distances of their members [S,S].

    Subjects of many prompts blend into each other; variants of one prompt do not.
    """
    size = np.bincount(kind)
    member = np.equal.outer(kind, np.arange(len(size))).astype(np.float64)
    totals = member.T @ distance @ member
    several = size > 1
    if len(size) < 2 or not several.any():
        return False
    # Noise was subtracted from all distances, so that of a sequence to itself is negative.
    within = totals.diagonal() - member.T @ distance.diagonal()
    within = within[several] / (size * (size - 1))[several]
    others = totals / np.outer(size, size)
    np.fill_diagonal(others, np.inf)
    return bool(np.median(others.min(axis=1)[several]) > SEPARATE * max(np.median(within), 0.0))


def _is_path(share: Floats, kind: Integers) -> bool:
    """Return whether kinds of windows of shares [W,F] are pieces of a path that does not recur.

    The two most similar pieces of a path are neighbours in time. The two most similar kinds of
    windows that come in any order are as far apart in time as any two kinds.
    """
    number, kinds = len(kind), int(kind.max()) + 1
    if kinds < 3:
        return False
    member = np.equal.outer(np.arange(kinds), kind).astype(np.float64)
    means = member @ share / member.sum(axis=1, keepdims=True)
    square = (means**2).sum(axis=1)
    distance = square[:, None] + square - 2 * means @ means.T
    np.fill_diagonal(distance, np.inf)
    times = [np.flatnonzero(kind == one) for one in range(kinds)]
    ranks = np.empty(kinds)
    for one, nearest in enumerate(distance.argmin(axis=1)):
        # Time from every window, and then from every kind, to the nearest window of this kind.
        gap = abs(np.subtract.outer(times[one], np.arange(number))).min(axis=0)
        gap_of_kind = np.full(kinds, number)
        np.minimum.at(gap_of_kind, kind, gap)
        others, nearest_gap = np.delete(gap_of_kind, one), gap_of_kind[nearest]
        smaller, equal = (others < nearest_gap).sum(), (others == nearest_gap).sum()
        ranks[one] = (smaller + equal / 2) / (kinds - 1)
    # Two kinds are mostly nearest to each other, so there are half as many independent ranks.
    if ranks.mean() >= 1 / 2 - NEARER / math.sqrt(6 * kinds):
        return False
    far = number // FAR
    far_pairs = sum(int((np.subtract.outer(time, time) > far).sum()) for time in times)
    pairs = sum(len(time) * (len(time) - 1) // 2 for time in times)
    far_share_of_any = (number - far) * (number - far - 1) / (number * (number - 1))
    return far_pairs < AGAIN * far_share_of_any * pairs
