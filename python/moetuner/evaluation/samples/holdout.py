"""Hold some of the traffic out: other sequences, kinds or windows than those that are seen.

Held-out runs of windows keep a correlation length from the traffic that the solver sees.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError, is_number, seed_in, shown
from moetuner.evaluation.arrival import overlay
from moetuner.evaluation.samples import find_samples, measure_correlation_length
from moetuner.evaluation.samples.levels import FEW_PER_GROUP
from moetuner.recording import AnyRecording, Recording, labelling
from moetuner.statistics import check_recording

Integers = NDArray[np.integer[Any]]

# Gaps between seen and held-out runs take at most 1 / 4 of the traffic.
GAPS_PER_TRAFFIC = 4
# Multiples of the golden ratio, modulo 1, are far from each other: so are the runs that consecutive
# seeds hold out.
GOLDEN = (math.sqrt(5) - 1) / 2


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
