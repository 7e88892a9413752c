"""Kinds of sequences that route alike, which show that traffic repeats few prompts.

Two sequences of one kind differ by the noise of their tokens alone. Where all sequences differ by
much more than that, each is of its own kind; where none does, all traffic routes alike and nothing
tells prompts apart. Windows of a load table that changes little by little are of no kinds: those
that are near each other in time are alike, and what is cut out of such a path has neighbours.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.evaluation.reading import Progress, Rows, read, scale_progress
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Likeness = Literal["text", "part of the text", "experts"]

# Cells of counts [S,L,E] that are held; of more, fewer layers are looked at, and none of too many.
CELLS = 1 << 24
LAYERS = 8
# Most kinds that are looked for.
MOST = 256
# Standard deviations of its noise by which a sequence may be from its kind.
NEAR = 4.0
# Part of what sequences differ by, in their squared distance, that is a small change of a prompt:
# of what one pair in ten differs by at most, as most pairs may be of two subjects. How much further
# the next kind must be, and sequences that are compared two by two for that.
CHANGED, LOCAL, SEPARATE, COMPARED = 0.45, 0.1, 5.0, 4096
# How much kinds must differ, in terms of the noise of a sequence, for anything to be said.
APART = 3.0
# Kinds are few if there is one for so many sequences or more.
EACH = 2
# Parts of the shorter of two texts that the longer one must have, to share a document with it, and
# to repeat it: generations that were cut off, or went on, are repeated text.
SHARES, REPEATS = 0.4, 0.9
# Passages by which shared text is found: fewest tokens of each; how often any two may be the same
# by chance, in all of a trace; and how many there may be, else one of several is looked at.
PASSAGE, BY_CHANCE, PASSAGES = 4, 0.01, 1 << 22
FACTOR = 0x9E3779B97F4A7C15
# A passage that more than this part of the sequences have is of all traffic, as system prompts are.
OF_ALL = 0.5
# Part of the windows that are of one kind, above which traffic is steady but for some windows.
STEADY = 0.75
# Part of the windows that are of kinds of other groups, where kinds are not those of a group each.
SHARED = 0.1
# Standard errors by which kinds that are most alike must be nearer in time than others, to be
# pieces of a path.
NEARER = 1.5
# Windows beyond this part of all are far apart in time, and the part of the pairs of one kind that
# are as far apart, of those that any two windows are, from which kinds come again all the time.
FAR, AGAIN = 3, 0.5
# Groups of fewer windows on average have no level of their own.
FEW_PER_GROUP = 4


def find_sequence_kinds(
    trace: RoutingTrace, labels: NDArray[np.int32], progress: Progress | None = None
) -> tuple[Integers | None, Likeness, bool]:
    """Find the kinds of the sequences in ``labels`` [S], numbered; None where each is its own.

    Sequences that share a document are of one kind, and so are those that route alike. Groups are
    kinds that are known, so each is looked at by itself. Also return what those of a kind have in
    common, and whether no group has sequences that differ by more than the noise of their tokens.
    ``progress`` gets the share of two readings of the trace.
    """
    number = len(labels)
    assert trace.sequence is not None
    label, of_sequence = check.ranks(trace.sequence, labels), np.zeros(number, dtype=np.int64)
    if trace.group is not None:
        of_sequence[label] = trace.group
    text, likeness = number_texts(trace, label, number, scale_progress(progress, 0, 1 / 2))
    texts, first = np.unique(text, return_index=True)
    layers = min(LAYERS, trace.layers, CELLS // max(number * trace.num_experts, 1))
    if layers < 1:
        return (text if len(texts) < number else None), likeness, False
    report = scale_progress(progress, 1 / 2, 1)
    count = count_loads_by_label(trace, label, number, layers, report)[first]
    kind, all_alike = _find_kinds_by_group(count, of_sequence[first])
    if EACH * (int(kind.max(initial=-1)) + 1) > len(texts):
        kind = np.arange(len(texts))
    kinds = int(kind.max(initial=-1)) + 1
    if kinds < len(texts):
        likeness = "experts"
    return (kind[text] if kinds < number else None), likeness, all_alike


def find_window_kinds(statistics: RoutingStatistics) -> tuple[Integers | None, bool]:
    """Find the kinds of the windows of loads [W], as ``find_sequence_kinds`` those of sequences."""
    number = statistics.windows
    layers = min(LAYERS, statistics.layers, CELLS // max(number * statistics.experts, 1))
    used = statistics.window_load.any(axis=(1, 2))
    if layers < 1 or not used.all():
        return None, False
    chosen = np.unique(np.linspace(0, statistics.layers - 1, layers).round().astype(np.int64))
    count = statistics.window_load[:, chosen].astype(np.float64)
    joint, group = _find_few_kinds(count, are_windows=True), statistics.group
    if joint is not None and np.bincount(joint).max() > STEADY * number:
        return None, not joint.any()
    if group is None or (joint is not None and _are_shared(joint, group)):
        return joint, False
    if int(np.diff(group).astype(bool).sum()) >= 2 * len(np.unique(group)):
        # What takes turns may be of one kind at a time, at the level of each group.
        joint = _find_few_kinds(count, group, are_windows=True)
        if joint is not None and _are_shared(joint, group):
            return (joint if np.bincount(joint).max() <= STEADY * number else None), False
    kind, all_alike = _find_kinds_by_group(count, group, are_windows=True)
    return (kind if EACH * (int(kind.max()) + 1) <= number else None), all_alike


def _are_shared(kind: Integers, group: Integers) -> bool:
    """Return whether kinds [W] are not those of one group each: of ten windows, one is of more."""
    size = np.zeros((int(kind.max()) + 1, int(group.max()) + 1))
    np.add.at(size, (kind, group), 1)
    return bool(size.max(axis=1).sum() < (1 - SHARED) * len(kind)) or size.shape[1] == 1


def number_texts(
    trace: RoutingTrace, label: Integers, number: int, progress: Progress | None = None
) -> tuple[Integers, Likeness]:
    """Return numbers of texts of sequences [S], which those that share one have in common.

    Also return whether they repeat all of it. ``label`` is the sequence of every token [T]. Experts
    of all layers tell tokens apart. What most sequences have in common is no text of its own.
    """
    passage, owner = _list_passages(trace, label, number, progress)
    # Equal passages follow one another, by sequence, each once in a sequence.
    order = np.argsort(passage, kind="stable")
    passage, owner = passage[order], owner[order]
    is_new = np.diff(passage, prepend=~passage[:1]).astype(bool)
    once = is_new | np.diff(owner, prepend=-1).astype(bool)
    passage, owner, is_new = passage[once], owner[once], is_new[once]
    place = np.cumsum(is_new) - 1
    is_own = (np.bincount(place) <= OF_ALL * number)[place]
    size = np.bincount(owner[is_own], minlength=number)
    # Sequences that have the same passage are linked, each with the next one.
    links = np.flatnonzero(~is_new[1:] & is_own[1:])
    pair, shared = np.unique(owner[links] * number + owner[links + 1], return_counts=True)
    one, other = pair // number, pair % number
    part = shared / np.minimum(size[one], size[other])
    joined = np.flatnonzero(part >= SHARES)
    repeats = bool((part[joined] >= REPEATS).all())
    # Those that have nothing but what most have are one text.
    common = np.flatnonzero(size == 0)
    pairs = [*zip(one[joined].tolist(), other[joined].tolist(), strict=True)]
    pairs += [(int(common[0]), each) for each in common[1:].tolist()]
    return _merge_pairs(pairs, number), "text" if repeats else "part of the text"


def _list_passages(
    trace: RoutingTrace, label: Integers, number: int, progress: Progress | None
) -> tuple[NDArray[np.uint64], Integers]:
    """Return codes of passages, neighbouring tokens of a sequence, and the sequence of each.

    They are as long as it takes that no two are the same by chance; a shorter sequence is one.
    """
    rng = np.random.default_rng(0)
    table = rng.integers(0, 1 << 63, (trace.layers, trace.num_experts), dtype=np.uint64)
    token, done = np.empty(trace.tokens, dtype=np.uint64), 0
    for shard in trace.shards():
        token[done : done + len(shard)] = _core.code_tokens(shard, table)
        done += len(shard)
        if progress is not None:
            progress(done / trace.tokens)
        del shard  # else the next one is read while this one is still there
    common = np.unique(token[:: max(len(token) // PASSAGES, 1)], return_counts=True)[1]
    alike, size = float(((common / max(common.sum(), 1)) ** 2).sum()), PASSAGE
    if 0 < alike < 1:
        size = max(size, math.ceil(math.log(len(token) / BY_CHANCE) / -math.log(alike)))
    order, length = check.sorted_by(label, number), check.counts(label, number)
    first, every = np.cumsum(length) - length, np.uint64(max(len(token) // PASSAGES, 1))
    # Sums of tokens times powers of an odd number: what is between two of them, shifted, is a code.
    longest = min(check.PIECE + size, len(token))
    powers = np.cumprod(np.full(longest, FACTOR, dtype=np.uint64))
    shift = np.cumprod(np.full(longest, pow(FACTOR, -1, 1 << 64), dtype=np.uint64))
    codes, owners = [], []
    for begin in range(0, max(len(token), 1), check.PIECE):
        own = token[order[begin : begin + longest]]
        sums = np.append(np.uint64(0), np.cumsum(own * powers[: len(own)]))
        owner = label[order[begin : begin + check.PIECE]].astype(np.int64)
        place = np.arange(begin, begin + len(owner))
        end = np.minimum(place + size, first[owner] + length[owner])
        code = (sums[end - begin] - sums[place - begin]) * shift[: len(place)]
        is_long = (end - place == size) | (place == first[owner])
        is_listed = is_long & ((code >> np.uint64(32)) % every == 0)
        codes.append(code[is_listed])
        owners.append(owner[is_listed])
    return np.concatenate(codes), np.concatenate(owners)


def _merge_pairs(pairs: list[tuple[int, int]], number: int) -> Integers:
    """Return numbers of what pairs join of so many [S], in the order of the first of each."""
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
    """Return the kinds of counts [S,L,E], in every group by itself, and whether all are alike."""
    kind, total, all_alike = np.arange(len(count)), 0, True
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        found = _find_few_kinds(count[members], are_windows=are_windows)
        if are_windows and found is None and len(members) >= 2 * EACH:
            return np.arange(len(count)), False  # windows without kinds may be alike in time
        all_alike = all_alike and found is not None and not found.any()
        if found is None or not found.any():
            found = np.arange(len(members))
        kind[members] = total + found
        total += int(found.max()) + 1
    return kind, all_alike


def _find_few_kinds(
    count: Floats, group: Integers | None = None, *, are_windows: bool = False
) -> Integers | None:
    """Return the kind of sequences with counts [S,L,E], all 0 if alike; None if kinds are not few.

    Those of a kind differ by no more than noise; or else by a small part of what kinds differ by.
    Groups [S] have levels of their own.
    """
    number = len(count)
    if number < 2 * EACH:
        return None
    tokens = count[:, 0].sum(axis=1)
    share = (count / np.maximum(count.sum(axis=2, keepdims=True), 1)).reshape(number, -1)
    # Tokens choose distinct experts, so their counts vary less than a multinomial's.
    spread = share * (1 - share)
    noise = spread.sum(axis=1) / np.maximum(tokens, 1)
    vary = np.full(number, 2 / max(count.shape[1] * (count.shape[2] - 1), 1))
    if are_windows:
        # The fewer experts have most of many tokens, the more the noise itself varies.
        vary = 2 * (spread**2).sum(axis=1) / np.maximum(spread.sum(axis=1) ** 2, 1e-300)
    far = 1 + NEAR * np.sqrt(vary)
    share = subtract_levels(share, group)
    kind = _cluster(share, tokens, noise, far)
    if kind is not None or number > COMPARED:
        is_path = are_windows and kind is not None and _is_path(share, kind)
        return None if is_path else kind
    products = share @ share.T
    square = products.diagonal() - noise
    distance = square[:, None] + square - 2 * products
    nearby = float(np.quantile(distance[~np.eye(number, dtype=bool)], LOCAL))
    kind = _cluster(share, tokens, noise, far, CHANGED * max(nearby, 0.0))
    if kind is None or not _are_apart(distance, kind) or (are_windows and _is_path(share, kind)):
        return None
    return kind


def _cluster(
    share: Floats, tokens: Floats, noise: Floats, far: Floats, changed: float = 0.0
) -> Integers | None:
    """Return the kind of sequences of shares [S,F], noise and its limit [S]; None if many.

    Longest first, a sequence joins the kind whose mean it is nearest to, or begins one if it is
    further from all than noise explains, or noise and what may have changed.
    """
    number = len(share)
    means, weight = np.empty((MOST, share.shape[1])), np.zeros(MOST)
    kind, used = np.empty(number, dtype=np.int64), 0
    for one in np.argsort(-tokens, kind="stable"):
        distance = ((means[:used] - share[one]) ** 2).sum(axis=1)
        # A kind's mean has noise too, that of all its tokens.
        explained = noise[one] * (1 + tokens[one] / weight[:used])
        limit = np.maximum(explained * far[one], explained + changed)
        ratio = distance / np.maximum(limit, 1e-300)  # one expert alone has no noise
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
    """Return whether kinds are far from each other, for what their members [S,S] differ by.

    Subjects of many prompts go over into each other; prompts that were changed a little do not.
    """
    size = np.bincount(kind)
    member = np.equal.outer(kind, np.arange(len(size))).astype(np.float64)
    totals = member.T @ distance @ member
    several = size > 1
    if len(size) < 2 or not several.any():
        return False
    # What a sequence differs from itself by is less than nothing: the noise that was taken off.
    within = totals.diagonal() - member.T @ distance.diagonal()
    within = within[several] / (size * (size - 1))[several]
    others = totals / np.outer(size, size)
    np.fill_diagonal(others, np.inf)
    return bool(np.median(others.min(axis=1)[several]) > SEPARATE * max(np.median(within), 0.0))


def _is_path(share: Floats, kind: Integers) -> bool:
    """Return whether kinds of windows of shares [W,F] are pieces of a path that does not come back.

    Of distinct kinds those that are most alike are as far apart in time as any two. Of a path they
    are neighbours, unless all of its pieces come again.
    """
    number, kinds = len(kind), int(kind.max()) + 1
    if kinds < 3:
        return False
    member = np.equal.outer(np.arange(kinds), kind).astype(np.float64)
    means = member @ share / member.sum(axis=1, keepdims=True)
    square = (means**2).sum(axis=1)
    apart = square[:, None] + square - 2 * means @ means.T
    np.fill_diagonal(apart, np.inf)
    times = [np.flatnonzero(kind == one) for one in range(kinds)]
    ranks = np.empty(kinds)
    for one, nearest in enumerate(apart.argmin(axis=1)):
        # From every window to the nearest one of this kind, and from every kind.
        since = abs(np.subtract.outer(times[one], np.arange(number))).min(axis=0)
        of_kind = np.full(kinds, number)
        np.minimum.at(of_kind, kind, since)
        others, time = np.delete(of_kind, one), of_kind[nearest]
        ranks[one] = ((others < time).sum() + (others == time).sum() / 2) / (kinds - 1)
    # Most alike are mostly two of each other, so their ranks are worth half as many.
    if ranks.mean() >= 1 / 2 - NEARER / math.sqrt(6 * kinds):
        return False
    far = number // FAR
    pairs_far = sum(int((np.subtract.outer(each, each) > far).sum()) for each in times)
    pairs = sum(len(each) * (len(each) - 1) // 2 for each in times)
    of_any = (number - far) * (number - far - 1) / (number * (number - 1))
    return pairs_far < AGAIN * of_any * pairs


def number_groups(windows: int, group: NDArray[np.integer[Any]] | None) -> NDArray[np.int64]:
    """Return the number of each window's group [W]; all are one where groups have few windows."""
    if group is None:
        return np.zeros(windows, dtype=np.int64)
    names, label = np.unique(group, return_inverse=True)
    if windows < FEW_PER_GROUP * len(names):
        return np.zeros(windows, dtype=np.int64)
    number: NDArray[np.int64] = label.astype(np.int64)
    return number


def subtract_levels(share: Floats, group: NDArray[np.integer[Any]] | None) -> Floats:
    """Return shares [W,F] less the mean of their group, where groups have enough windows."""
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
    """Count load of experts by labels [T] of tokens [N,L,E], in all or so many layers."""
    layers = trace.layers if layers is None else layers
    chosen = np.unique(np.linspace(0, trace.layers - 1, layers).round().astype(np.int64))
    tokens, largest = np.arange(trace.tokens), int(check.counts(label, number).max(initial=1))
    rows = Rows(trace, tokens, lambda run: label[run], number, largest)
    counted = rows.count_experts(len(chosen))
    read([rows], layers=chosen, progress=progress)
    load: Floats = counted.finish()[0].astype(np.float64)
    return load
