"""Find kinds of sequences, or windows, that route alike: traffic may repeat few prompts.

Two sequences of one kind differ by the noise of their tokens alone. Where all sequences differ by
much more than that, each is a kind of its own; where none does, all traffic is of one kind. A load
table that drifts slowly has no kinds: its windows are alike because they are near in time, so they
are samples with autocorrelation (``samples``).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.reading import Progress, RowReader, read, scale_progress
from moetuner.recording import labelling
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Likeness = Literal["text", "part of the text", "experts", "in a row"]

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
# Share of the shorter of two texts that the longer one must have, if both share a document.
SHARES = 0.4
# The same if one repeats the other, as generations do that were cut off or went on.
REPEATS = 0.9
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
# Fewest tokens of a passage by which shared text is found.
PASSAGE = 4
# Expected number of pairs of passages in a trace that are the same by chance.
BY_CHANCE = 0.01
# Largest number of passages; of more, a sample is compared.
PASSAGES = 1 << 22
# Odd factor of the rolling hash of passages.
FACTOR = 0x9E3779B97F4A7C15
# A passage that more than this share of the sequences have is no text of theirs: a system prompt.
OF_ALL = 0.5
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
# Groups of fewer windows on average have no level of their own.
FEW_PER_GROUP = 4


def find_sequence_kinds(
    trace: RoutingTrace, labels: NDArray[np.int32], progress: Progress | None = None
) -> tuple[Integers | None, Likeness, bool]:
    """Return the kind [S] of the sequences in ``labels`` [S]; None where each is a kind of its own.

    Sequences that share a document are of one kind, and so are those that route alike. Where kinds
    are not few, those of a stretch of time that route alike are of one kind. Two groups share no
    kind. Also return what sequences of a kind have in common, and whether in every group
    sequences differ by no more than the noise of their tokens. ``progress`` gets the share of two
    readings of the trace.
    """
    number = len(labels)
    assert trace.sequence is not None
    label, group = labelling.ranks(trace.sequence, labels), np.zeros(number, dtype=np.int64)
    if trace.group is not None:
        group[label] = trace.group
    text, likeness = number_texts(trace, label, number, scale_progress(progress, 0, 1 / 2))
    texts, first = np.unique(text, return_index=True)
    layers = min(LAYERS, trace.layers, CELLS // max(number * trace.num_experts, 1))
    if layers < 1:
        return (text if len(texts) < number else None), likeness, False
    report = scale_progress(progress, 1 / 2, 1)
    count = count_loads_by_label(trace, label, number, layers, report)[first]
    kind, all_alike = _find_kinds_by_group(count, group[first])
    like_kinds: Likeness = "experts"
    if EACH * (int(kind.max(initial=-1)) + 1) > len(texts):
        time = labelling.first_of(label, number)[first]
        kind, like_kinds = find_stretches(count, group[first], time), "in a row"
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
    chosen = labelling.evenly_spaced(statistics.layers, layers)
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


def number_texts(
    trace: RoutingTrace, label: Integers, number: int, progress: Progress | None = None
) -> tuple[Integers, Likeness]:
    """Return the number of the text of every sequence [S], and how much of a text is repeated.

    That is "text" where sequences of one number repeat all of it, else "part of the text".
    ``label`` is the sequence of every token [T]. Two tokens are the same where all layers route
    them to the same experts. Passages that most sequences have in common are no text.
    """
    passage, owner = _list_passages(trace, label, number, progress)
    # Sort, so that equal passages follow one another, and keep each once per sequence.
    order = np.argsort(passage, kind="stable")
    passage, owner = passage[order], owner[order]
    is_new = np.diff(passage, prepend=~passage[:1]).astype(bool)
    is_first = is_new | np.diff(owner, prepend=-1).astype(bool)
    passage, owner, is_new = passage[is_first], owner[is_first], is_new[is_first]
    number_of_passage = np.cumsum(is_new) - 1
    is_text = (np.bincount(number_of_passage) <= OF_ALL * number)[number_of_passage]
    size = np.bincount(owner[is_text], minlength=number)
    # Sequences that have a passage in common are linked, each with the next one.
    links = np.flatnonzero(~is_new[1:] & is_text[1:])
    pair, shared = np.unique(owner[links] * number + owner[links + 1], return_counts=True)
    one, other = pair // number, pair % number
    share = shared / np.minimum(size[one], size[other])
    merged = np.flatnonzero(share >= SHARES)
    repeats = bool((share[merged] >= REPEATS).all())
    # Sequences that have only passages which most have are one text.
    common = np.flatnonzero(size == 0)
    pairs = [*zip(one[merged].tolist(), other[merged].tolist(), strict=True)]
    pairs += [(int(common[0]), sequence) for sequence in common[1:].tolist()]
    return _merge_pairs(pairs, number), "text" if repeats else "part of the text"


def _list_passages(
    trace: RoutingTrace, label: Integers, number: int, progress: Progress | None
) -> tuple[NDArray[np.uint64], Integers]:
    """Return codes of passages, runs of tokens of one sequence, and the sequence of each.

    Passages are so long that no two are the same by chance. A shorter sequence is one passage.
    """
    rng = np.random.default_rng(0)
    table = rng.integers(0, 1 << 63, (trace.layers, trace.num_experts), dtype=np.uint64)
    token, done = np.empty(trace.tokens, dtype=np.uint64), 0
    for shard in trace.shards():
        token[done : done + len(shard)] = _core.code_tokens(shard, table)
        done += len(shard)
        if progress is not None:
            progress(done / trace.tokens)
        del shard  # else memory holds it while the next one is read
    frequency = np.unique(token[:: max(len(token) // PASSAGES, 1)], return_counts=True)[1]
    # The probability that two tokens are the same by chance.
    collision, size = float(((frequency / max(frequency.sum(), 1)) ** 2).sum()), PASSAGE
    if 0 < collision < 1:
        size = max(size, math.ceil(math.log(len(token) / BY_CHANCE) / -math.log(collision)))
    order, length = labelling.sorted_by(label, number), labelling.counts(label, number)
    first, every = np.cumsum(length) - length, np.uint64(max(len(token) // PASSAGES, 1))
    # A rolling hash: prefix sums of tokens times powers of an odd number. The difference of two
    # sums, shifted to the power of its first token, is the code of the tokens between.
    longest = min(labelling.PIECE + size, len(token))
    powers = np.cumprod(np.full(longest, FACTOR, dtype=np.uint64))
    shift = np.cumprod(np.full(longest, pow(FACTOR, -1, 1 << 64), dtype=np.uint64))
    codes, owners = [], []
    for begin in range(0, max(len(token), 1), labelling.PIECE):
        tokens = token[order[begin : begin + longest]]
        sums = np.append(np.uint64(0), np.cumsum(tokens * powers[: len(tokens)]))
        owner = label[order[begin : begin + labelling.PIECE]].astype(np.int64)
        place = np.arange(begin, begin + len(owner))
        end = np.minimum(place + size, first[owner] + length[owner])
        code = (sums[end - begin] - sums[place - begin]) * shift[: len(place)]
        is_passage = (end - place == size) | (place == first[owner])
        is_listed = is_passage & ((code >> np.uint64(32)) % every == 0)
        codes.append(code[is_listed])
        owners.append(owner[is_listed])
    return np.concatenate(codes), np.concatenate(owners)


def _merge_pairs(pairs: list[tuple[int, int]], number: int) -> Integers:
    """Return the connected component of each of ``number`` items [S] that pairs link.

    Components are numbered in the order of their first items.
    """
    parent = list(range(number))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = one = parent[parent[one]]
        return one

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    roots = [root(one) for one in range(number)]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


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
    share = subtract_levels(share, group)
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
    share = subtract_levels(share, group)
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


def number_groups(windows: int, group: NDArray[np.integer[Any]] | None) -> NDArray[np.int64]:
    """Return the number of each window's group [W]; all 0 where groups have few windows."""
    if group is None:
        return np.zeros(windows, dtype=np.int64)
    names, label = np.unique(group, return_inverse=True)
    if windows < FEW_PER_GROUP * len(names):
        return np.zeros(windows, dtype=np.int64)
    number: NDArray[np.int64] = label.astype(np.int64)
    return number


def subtract_levels(share: Floats, group: NDArray[np.integer[Any]] | None) -> Floats:
    """Subtract from shares [W,F] the mean of their group, where groups have enough windows."""
    label, levelled = number_groups(len(share), group), share.copy()
    for number in range(int(label.max(initial=0)) + 1):
        levelled[label == number] -= share[label == number].mean(axis=0)
    return levelled


def count_loads_by_label(
    trace: RoutingTrace,
    label: NDArray[Any],
    number: int,
    layers: int | None = None,
    progress: Progress | None = None,
) -> Floats:
    """Count experts' load [N,L,E] by labels of tokens [T], in all or evenly spaced ``layers``."""
    layers = trace.layers if layers is None else layers
    chosen = labelling.evenly_spaced(trace.layers, layers)
    tokens, largest = np.arange(trace.tokens), int(labelling.counts(label, number).max(initial=1))
    rows = RowReader(trace, tokens, lambda run: label[run], number, largest)
    replay = rows.count_experts(len(chosen))
    read([rows], layers=chosen, progress=progress)
    load: Floats = replay.finish()[0].astype(np.float64)
    return load
