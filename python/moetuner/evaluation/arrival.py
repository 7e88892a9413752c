"""Order traffic as it may arrive: as recorded, or mixed by continuous batching.

A recording often has one kind of text after the other (bursts). A busy engine serves many sequences
at once, so that every step has some of each kind. Imbalance depends on the order, so both orders
are replayed.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.chunks import chunks
from moetuner.recording import Recording, labelling
from moetuner.serving.arrival import Arrival, share_mixed

# Sequences of a batch: as many as engines serve by default, but no more than a quarter of all where
# there are few, so that the batch stays full until near the end.
MOST_AT_ONCE = 256
FEWEST_AT_ONCE = 8

# Windows that are averaged into one where sequences are unknown.
WINDOWS_MIXED = 16

# Sequences that run at once are counted in pieces of a recording. Most tokens of a piece.
PIECE = 512
# Most pieces that are counted.
PIECES = 64
# Fewest pieces of a recording in which they can be counted.
FEWEST_PIECES = 8
# Runs that ``overlay`` interleaves are so many mean durations of a sequence long.
DURATIONS = 2

Order = NDArray[np.signedinteger[Any]]
Integers = NDArray[np.integer[Any]]


def list_orders(
    recording: Recording, arrival: Arrival, *, seed: int = 0
) -> list[tuple[float, Order | None]]:
    """Return the orders in which the tokens of a recording arrive, with their weights.

    None is the order of the recording. Counts have windows already, so they have no other order.
    """
    share = share_mixed(arrival)
    if share == 0 or not recording.ordered:
        return [(1.0, None)]
    mixed = (share, draw_mixed_order(recording.sequence, recording.length, seed=seed))
    return [mixed] if share == 1 else [(1 - share, None), mixed]


def find_places(order: Order | None, rows: Integers) -> Integers | None:
    """Return the position of rows [n], rising, among each other in an order of all [T].

    None is the order of the recording.
    """
    if order is None:
        return None
    place = np.full(len(order), -1, dtype=order.dtype)
    for piece in labelling.pieces(rows):
        place[piece] = 0
    first = 0
    for piece in labelling.pieces(order):
        served = piece[place[piece] == 0] if len(rows) < len(order) else piece
        place[served] = np.arange(first, first + len(served))
        first += len(served)
    return place if len(rows) == len(order) else labelling.at(place, rows)


def mix(
    sequence: NDArray[np.int32] | None, tokens: Integers, place: Integers | None, *, seed: int
) -> Integers | None:
    """Return the positions [n] of tokens after mixing their sequences [T].

    ``place`` [n] are their positions before, by default as recorded.
    """
    if sequence is not None:
        sequence = labelling.at(sequence, tokens)
        if place is not None:
            served = np.empty_like(sequence)
            served[place] = sequence
            sequence = served
    every = np.arange(len(tokens))
    mixed = find_places(draw_mixed_order(sequence, len(tokens), seed=seed), every)
    return mixed if place is None or mixed is None else labelling.at(mixed, place)


def choose_batch_size(sequences: int) -> int:
    """Return the sequences of a batch, given the number of all."""
    return min(MOST_AT_ONCE, max(-(-sequences // 4), FEWEST_AT_ONCE))


def draw_mixed_order(sequence: NDArray[np.int32] | None, tokens: int, *, seed: int = 0) -> Order:
    """Order the tokens of a trace [T] as continuous batching would serve them.

    Sequences wait in random order. As many as fit run at once and advance by one token per step;
    where one has ended the next one begins. Without labels every token is a sequence.
    """
    rng = np.random.default_rng(seed)
    kind: type[np.signedinteger[Any]] = np.int32 if tokens < 1 << 31 else np.int64
    if sequence is None:
        order = np.arange(tokens, dtype=kind)
        # Shuffling many tokens takes seconds, and Ctrl-C is handled while this waits for a thread.
        shuffling = threading.Thread(target=rng.shuffle, args=(order,), daemon=True)
        shuffling.start()
        shuffling.join()
        return order
    if not tokens:
        return np.empty(0, dtype=kind)
    # Sequence by sequence, in the order of their labels, which is that of most recordings.
    grouped = None
    if (sequence[:-1] > sequence[1:]).any():
        labels = labelling.distinct(sequence)
        rank = labelling.ranks(sequence, labels)
        grouped = labelling.sorted_by(rank, len(labels))
        sequence = labelling.at(rank, grouped)
    first = np.append(0, np.flatnonzero(sequence[:-1] != sequence[1:]) + 1)
    lengths = np.diff(np.append(first, tokens))

    free = [(0, place) for place in range(choose_batch_size(len(lengths)))]
    served: list[list[int]] = [[] for _ in free]
    for waiting in rng.permutation(len(lengths)).tolist():
        step, place = heapq.heappop(free)
        served[place].append(waiting)
        heapq.heappush(free, (step + int(lengths[waiting]), place))
    # The tokens that a place serves follow one another, and those of the next place follow them.
    ordered = np.array([number for sequences in served for number in sequences])
    tokens_of_places = labelling.number_runs(first[ordered].astype(kind), lengths[ordered])
    if grouped is not None:
        tokens_of_places = labelling.at(grouped, tokens_of_places)
    steps = np.array([int(lengths[sequences].sum()) for sequences in served])
    return _take_steps(tokens_of_places, steps)


def _take_steps(tokens: Order, steps: NDArray[np.int64]) -> Order:
    """Return tokens [T] step by step, given them place by place and the steps of each place [P]."""
    order, begin, step, done = np.empty_like(tokens), np.cumsum(steps) - steps, 0, 0
    for end in np.unique(steps).tolist():
        running = begin[steps > step]
        while step < end:
            until = min(end, step + max(labelling.PIECE // len(running), 1))
            rows = running + np.arange(step, until)[:, None]
            order[done : done + rows.size] = tokens[rows].ravel()
            done, step = done + rows.size, until
    return order


def count_together(sequence: NDArray[np.int32], piece: int) -> float:
    """Return the mean number of sequences that so many consecutive tokens are of, given [T]."""
    starts = labelling.evenly_spaced(max(len(sequence) - piece, 0) + 1, PIECES).tolist()
    return float(np.mean([len(np.unique(sequence[first : first + piece])) for first in starts]))


def overlay(sequence: NDArray[np.int32], sequence_of_all: NDArray[np.int32]) -> Order | None:
    """Order the tokens of a part [T] so that as many sequences are together as in all tokens.

    A part has only some of the sequences that were served together. Where they are less than two
    thirds as many at once, consecutive runs of tokens are interleaved, token by token. A run is
    longer than a sequence, so that different sequences meet, and no longer than needed, as traffic
    changes. None where the order is to stay.
    """
    piece = min(PIECE, len(sequence) // FEWEST_PIECES)
    if not piece:
        return None
    remaining = count_together(sequence, piece)
    times = round(count_together(sequence_of_all, piece) / remaining)
    if times < 2:
        return None
    duration = remaining * len(sequence) / len(labelling.distinct(sequence))
    # Where all sequences last as long as the recording there are no others to meet.
    if times * duration > len(sequence):
        return None
    length = math.ceil(DURATIONS * duration)
    kind: type[np.signedinteger[Any]] = np.int32 if len(sequence) < 1 << 31 else np.int64
    order: Order = np.arange(len(sequence), dtype=kind)
    remainder = order
    while length := min(length, len(remainder) // times):
        runs = len(remainder) // (times * length)
        laid, remainder = np.split(remainder, [runs * times * length])
        laid[:] = laid.reshape(runs, times, length).transpose(0, 2, 1).ravel()
    return order


def mix_windows(
    windows: NDArray[Any],
    weight: NDArray[np.float64] | None = None,
    count: int | None = None,
    *,
    size: int = WINDOWS_MIXED,
    seed: int = 0,
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Mix windows [W,...] of loads: each mixed one is the mean of several drawn at random.

    Yields slices and mixed windows, as many as there were or ``count`` of them. Each is the mean of
    ``size`` distinct windows, or of all where there are fewer, by their ``weight`` [W].
    """
    rng = np.random.default_rng(seed)
    total, size = len(windows), min(len(windows), size)
    count = total if count is None else count
    for chunk in chunks(count, size * windows[0].size):
        draws = range(chunk.start, chunk.stop)
        drawn = np.stack([rng.choice(total, size, replace=False) for _ in draws])
        mixed = windows[drawn]
        if weight is not None:
            mixed = mixed * weight[drawn].reshape(*drawn.shape, *[1] * (windows.ndim - 1))
        yield chunk, mixed.mean(axis=1)
