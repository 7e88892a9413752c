"""Find the sequences whose texts repeat each other, or have a document in common."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.reading import Progress
from moetuner.recording import labelling
from moetuner.recording.labelling import Labelled
from moetuner.trace import RoutingTrace

Integers = NDArray[np.int64]
Likeness = Literal["text", "part of the text", "experts", "in a row"]

# Share of the shorter of two texts that the longer one must have, if both share a document.
SHARES = 0.4
# The same if one repeats the other, as generations do that were cut off or went on.
REPEATS = 0.9
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


def number_texts(
    trace: RoutingTrace, sequences: Labelled, progress: Progress | None = None
) -> tuple[Integers, Likeness]:
    """Return the number of the text of every sequence [S], and how much of a text is repeated.

    That is "text" where sequences of one number repeat all of it, else "part of the text". Two
    tokens are the same where all layers route them to the same experts. Passages that most
    sequences have in common are no text.
    """
    number = len(sequences.labels)
    passage, owner = _list_passages(trace, sequences, progress)
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
    trace: RoutingTrace, sequences: Labelled, progress: Progress | None
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
    label, length = sequences.rank, sequences.sizes
    order, first = labelling.sorted_by(label, len(length)), np.cumsum(length) - length
    every = np.uint64(max(len(token) // PASSAGES, 1))
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
