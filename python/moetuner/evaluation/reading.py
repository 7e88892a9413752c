"""Read a trace once, and count its tokens in rows under any number of placements.

A row is whatever counts are kept of: a window in some order of arrival, the part of a window that
is of one fold, a sequence, or a home device. Counts add up in any order, so a trace is read in the
order of its file, whatever the rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import IdArray
from moetuner.files.ids import read_ahead
from moetuner.recording import labelling
from moetuner.trace import RoutingTrace

# Bytes of a trace that are counted at once: under all placements while they are in the cache.
SHARD_BYTES = 16 << 20

Integers = NDArray[np.integer[Any]]
# Returns the rows of a run of a reader's tokens [n].
RowOf = Callable[[slice], Integers]
# Is called with the share of the work that is done, from 0 to 1.
Progress = Callable[[float], None]


def scale_progress(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """Return a callback for a phase of the work, which takes it from one share to another."""
    return progress and (lambda share: progress(begin + (end - begin) * share))


def split_progress(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Return a callback for one of several equal parts of the work."""
    return scale_progress(progress, number / parts, (number + 1) / parts)


def find_windows(run: slice, place: Integers | None, size: int) -> NDArray[np.int64]:
    """Return the window of every item of a run [n], in windows of ``size`` items.

    ``place`` is the position of every item in the order in which they arrive; None as recorded.
    """
    position = np.arange(run.start, run.stop) if place is None else place[run]
    return position.astype(np.int64) // size


class RowReader:
    """Reads tokens of a trace into rows of counts, under any number of placements.

    Parameters
    ----------
    trace
        The trace.
    tokens
        Numbers of the tokens, rising [n].
    row_of
        Function that returns the rows of a run of these tokens.
    number, largest
        Number of rows, and of the tokens of the largest one.
    place
        Position of every token in the order in which they arrive [n]; its hash chooses between
        copies. None for the order of the recording.
    home
        Device that every token comes from [n]; None spreads homes evenly, by hash.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        tokens: Integers,
        row_of: RowOf,
        number: int,
        largest: int,
        *,
        place: Integers | None = None,
        home: Integers | None = None,
    ) -> None:
        self.trace, self.tokens = trace, tokens
        self._row_of, self._place, self._home = row_of, place, home
        self._sizes: Any = {"rows": number, "most_tokens": max(largest, 1)}
        self._replays: list[_core.Replay] = []

    @classmethod
    def by_window(
        cls, trace: RoutingTrace, tokens: Integers, window: int, place: Integers | None = None
    ) -> RowReader:
        """Build rows that are windows of ``window`` tokens, in the order in which these arrive."""
        number = max(-(-len(tokens) // window), 1)
        return cls(
            trace,
            tokens,
            lambda run: find_windows(run, place, window),
            number,
            min(window, len(tokens)),
            place=place,
        )

    def replay(
        self, slots: NDArray[np.int32], node_of_device: list[int], **options: Any
    ) -> _core.Replay:
        """Begin a replay of these tokens under a placement; ``options`` are the core's."""
        experts, top_k = self.trace.num_experts, self.trace.top_k
        replay = _core.Replay(slots, experts, top_k, node_of_device, **self._sizes, **options)
        self._replays.append(replay)
        return replay

    def count_experts(self, layers: int | None = None) -> _core.Replay:
        """Begin to count the load of experts, in all layers or in ``layers`` of them.

        Every expert has a device of its own, so loads of devices are those of experts.
        """
        experts, layers = self.trace.num_experts, layers or self.trace.layers
        one_per_device = np.tile(np.arange(experts, dtype=np.int32)[:, None], (layers, 1, 1))
        return self.replay(one_per_device, [0] * experts, visits=False)

    def push(self, ids: IdArray, numbers: Integers, threads: int | None, *, checked: bool) -> None:
        """Count the tokens with these numbers, rising, as far as they are among this reader's."""
        begin = bisect_left(self.tokens, numbers[0])
        run = slice(begin, bisect_left(self.tokens, numbers[-1] + 1, begin))
        count = run.stop - begin
        if not count:
            return
        if count < len(ids):
            wanted, has_gaps = self.tokens[run], numbers[-1] - numbers[0] >= len(numbers)
            ids = ids[np.searchsorted(numbers, wanted) if has_gaps else wanted - numbers[0]]
        row = self._row_of(run).astype(np.uint32)
        place = None if self._place is None else self._place[run].astype(np.uint64)
        home = None if self._home is None else self._home[run].astype(np.uint16)
        for replay in self._replays:
            replay.push(ids, row, threads, positions=place, homes=home, checked=checked)
            checked = True


def read(
    readers: Sequence[RowReader],
    *,
    layers: Integers | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Read the tokens of all readers of a trace, once, and count them for each of these.

    Parameters
    ----------
    readers
        Readers of one trace.
    layers
        Numbers of the layers that are counted, rising; None for all.
    threads
        Threads to use, all cores by default.
    progress
        Called with the share of the tokens that have been read.
    """
    trace = readers[0].trace
    is_read = np.zeros(trace.tokens, dtype=bool)
    for reader in readers:
        for piece in labelling.pieces(reader.tokens):
            is_read[piece] = True
    total, done = int(np.count_nonzero(is_read)), 0
    for ids, numbers in _pieces(trace, None if total == trace.tokens else is_read, threads):
        if layers is not None and len(layers) < trace.layers:
            ids = ids.take(layers, axis=1)
        for reader in readers:
            reader.push(ids, numbers, threads, checked=trace.ids.fresh)
        done += len(numbers)
        if progress is not None:
            progress(done / total)
        del ids  # else the next ones are read while these are still in memory


def _pieces(
    trace: RoutingTrace, is_read: NDArray[np.bool_] | None, threads: int | None
) -> Iterator[tuple[IdArray, Integers]]:
    """Yield ids and numbers of the marked tokens, or of all, in pieces that fit the cache."""
    numbers = None if is_read is None else np.flatnonzero(is_read)
    if numbers is None:
        pieces = trace.shards(SHARD_BYTES, threads=threads)
    else:
        pieces = trace.ids.chosen(numbers, SHARD_BYTES, threads)
        pieces = read_ahead(pieces) if trace.ids.fresh else pieces
    first = 0
    for ids in pieces:
        run = slice(first, first + len(ids))
        first = run.stop
        yield ids, np.arange(run.start, run.stop) if numbers is None else numbers[run]
        del ids  # else the next ones are read while these are still in memory


def count_loads_by_label(
    trace: RoutingTrace,
    label: NDArray[Any],
    number: int,
    layers: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Count experts' load [N,L,E] by labels of tokens [T], in all or evenly spaced ``layers``."""
    layers = trace.layers if layers is None else layers
    chosen = labelling.evenly_spaced(trace.layers, layers)
    tokens, largest = np.arange(trace.tokens), int(labelling.counts(label, number).max(initial=1))
    rows = RowReader(trace, tokens, lambda run: label[run], number, largest)
    replay = rows.count_experts(len(chosen))
    read([rows], layers=chosen, progress=progress)
    load: NDArray[np.float64] = replay.finish()[0].astype(np.float64)
    return load
