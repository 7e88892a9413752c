"""Count recordings of any size: exact loads of everything, and a sample for all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner.files.ids import in_memory
from moetuner.recording import AnyRecording, Recording
from moetuner.recording.population import (
    HASHED,
    LABEL_OFFSET,
    SAMPLE,
    STRETCH,
    TIME_LIMIT,
    Population,
    Table,
    compute_hash,
    find_limit,
    mark_below,
)
from moetuner.statistics import RoutingStatistics, check_recording, count_loads, sum_by_group
from moetuner.trace import RoutingTrace, as_trace

Report = Callable[[float], None]

# Bytes of a trace that are read at once, and share of the work that is done when all were counted.
SHARD_BYTES, COUNTED_SHARE = 16 << 20, 0.95


def count(
    traffic: AnyRecording,
    *,
    sample: int | None = None,
    time: int | None = None,
    threads: int | None = None,
    progress: Report | None = None,
) -> AnyRecording:
    """Count a recording: exact loads of all of it, and a sample of its rows, in memory.

    What is returned is a recording itself, for all that takes one, and of a size that does not grow
    with the recording. Counted recordings add up: ``count(one) + count(other)`` has the sample that
    both would have together, one after the other. With ``time`` the sum is the same in any order of
    adding, bit by bit; without it, in any grouping.

    Rows are tokens of a trace, or windows of load tables. The sample is stretches of consecutive
    rows, 16,384 tokens or 32 windows, drawn by a hash of what is in them; all of them where there
    are not more rows than ``sample``.

    Parameters
    ----------
    traffic
        A trace, or a load table: pairs and sets of a table belong to all of its windows, and are
        left out. What was counted already is returned as it is.
    sample
        Most tokens, or windows, to keep; by default 1,048,576 tokens, or 2,048 windows.
    time
        When it was recorded: a whole number from 0 that rises with time, such as seconds since 1970
        or the number of the shard. Sums are in this order. Recordings without a time come first, in
        the order in which they are added.
    threads
        Threads to use, all cores by default. The result does not depend on it.
    progress
        Called now and then with the share of the work that is done.

    Returns
    -------
    RoutingTrace or RoutingStatistics
        The sample; its ``population`` is what it was drawn from.

    Raises
    ------
    ValueError
        If an argument is wrong, an id in the trace's file is, or what was counted already has a
        sample of another size, or is given a time.

    Examples
    --------
    >>> import moetuner as mt
    >>> one, other = (
    ...     mt.RoutingTrace.from_arrays([[[0]], [[expert]]], num_experts=3) for expert in (1, 2)
    ... )
    >>> counted = mt.count(one) + mt.count(other)
    >>> counted.tokens, counted.population.load.tolist()
    (4, [[[2, 1, 1]]])
    """
    check_recording(traffic)
    size = SAMPLE[traffic.unit]
    if sample is not None:
        size = check.whole_number("sample", sample, highest=1 << 40)
    if time is not None:
        time = check.whole_number("time", time, lowest=0, highest=TIME_LIMIT - 1)
    threads = check.threads_in(threads)
    check.callable_or_none("progress", progress)
    if traffic.population is not None:
        _check_counted(traffic.population, sample, time)
        return traffic
    report = progress or (lambda _: None)
    starts = np.arange(0, traffic.length, STRETCH[traffic.unit])
    lengths = np.diff(np.append(starts, traffic.length))
    hashes = _hash_stretches(traffic, starts, lengths)
    limit = find_limit(hashes, lengths.astype(np.uint64), size)
    is_kept = mark_below(hashes, limit)
    load, rows = _count_by_group(traffic, threads, lambda share: report(COUNTED_SHARE * share))
    labels = np.empty(0) if traffic.sequence is None else traffic.sequence
    ends = (
        [int(end) + LABEL_OFFSET for end in (labels.min(), labels.max())] if labels.size else [0, 0]
    )
    own_hash = 0  # of a recording without rows
    if traffic.length:
        own_hash = compute_hash(hashes.astype("<u8").tobytes(), load.astype("<u8").tobytes())
    population = Population(
        load,
        rows,
        np.empty(0, np.uint64),
        np.array([own_hash], np.uint64),
        stretch_hash=hashes[is_kept],
        stretch_rows=lengths[is_kept].astype(np.uint64),
        stretch_recording=_repeat(own_hash, is_kept),
        stretch_place=np.flatnonzero(is_kept).astype(np.uint64),
        stretch_time=_repeat(0 if time is None else 1 + time, is_kept),
        stretch_lowest=_repeat(ends[0], is_kept),
        stretch_highest=_repeat(ends[1], is_kept),
        sample=size,
        limit=limit,
        sequences=traffic.sequences,
    )
    kept = traffic if is_kept.all() else traffic.take(np.repeat(is_kept, lengths))
    report(1.0)
    if isinstance(kept, RoutingTrace):
        kept = replace(kept, ids=in_memory(kept.ids.valid_array()))
    return cast(AnyRecording, replace(cast(Any, kept.without_pairs()), population=population))


def total(recordings: Iterable[AnyRecording]) -> AnyRecording:
    """Add counted recordings of shards, machines or days; raise for none."""
    members: list[Any] = check.listed("recordings", recordings, "counted recordings")
    if not members:
        raise ValueError("recordings must be at least one counted recording, got none")
    result, *others = members
    for other in others:
        if type(other) is not type(result):
            raise ValueError(
                f"counted recordings must be of one kind, got {result.noun} and {other.noun}"
            )
        result = result + other
    return cast(AnyRecording, result)


def _check_counted(population: Population, sample: int | None, time: int | None) -> None:
    """Raise if arguments are not those with which a population was counted."""
    if sample not in (None, population.sample):
        rule = f"sample must be {population.sample:,}, with which this recording was counted"
        raise check.ArgumentError(f"{rule}, got {sample:,}", "sample")
    if time is not None:
        rule = "time must be None, as this recording was counted before"
        raise check.ArgumentError(f"{rule}, got {time}", "time")


def _repeat(number: int, is_kept: NDArray[np.bool_]) -> Table:
    """Return a number for every stretch that is kept [N]."""
    return np.full(int(np.count_nonzero(is_kept)), number, dtype=np.uint64)


def _hash_stretches(
    recording: Recording, starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> Table:
    """Compute the hash of every stretch [N], from evenly spaced rows of it and its number."""
    places = starts[:, None] + lengths[:, None] * np.arange(HASHED) // HASHED
    numbers, index = np.unique(places, return_inverse=True)
    index = index.reshape(places.shape)
    if isinstance(recording, RoutingStatistics):
        contents = [row.astype("<u8").tobytes() for row in recording.window_load[numbers]]
    else:
        pieces = as_trace(recording).ids.chosen(numbers, SHARD_BYTES)
        contents = [row.astype("<u2").tobytes() for rows in pieces for row in rows]
    hashes = [
        compute_hash(number.to_bytes(8, "little"), *(contents[place] for place in of_stretch))
        for number, of_stretch in enumerate(index.tolist())
    ]
    return np.array(hashes, dtype=np.uint64)


def _count_by_group(
    recording: Recording, threads: int | None, report: Report
) -> tuple[Table, Table]:
    """Return the loads of groups [G,L,E], and their rows [G]; a single group without groups."""
    groups = 1 if recording.group is None else len(recording.group_names)
    group = np.zeros(recording.length, np.int64) if recording.group is None else recording.group
    # Windows of a trace are whole groups here; those of a table are as they were recorded.
    counts = count_loads(recording, window=None, threads=threads, progress=report)
    load = np.zeros((groups, counts.layers, counts.num_experts), dtype=np.uint64)
    load_of_groups = sum_by_group(counts)
    load[: len(load_of_groups)] = load_of_groups
    return load, np.bincount(group, minlength=groups).astype(np.uint64)
