"""Find the independent samples of traffic, and deal them into folds.

Where sequences are labelled, they are the samples: tokens of one request route alike, those of two
requests do not. Where many sequences repeat few prompts, the samples are kinds of sequences.
Without labels the samples are windows, whose neighbours may be alike: their autocorrelation gives
the length over which they are. Runs longer than that are nearly independent.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.reading import Progress
from moetuner.evaluation.samples.autocorrelation import (
    INDEPENDENT,
    Autocorrelation,
    measure_autocorrelation,
)
from moetuner.evaluation.samples.kinds import find_sequence_kinds, find_window_kinds
from moetuner.evaluation.samples.texts import Likeness
from moetuner.recording import Recording, compute_once, labelling
from moetuner.statistics import RoutingStatistics, count_loads
from moetuner.trace import RoutingTrace, as_trace

Integers = NDArray[np.integer[Any]]
Name = Literal["sequence", "kind", "window"]

# Number of folds, where traffic has as many samples.
FOLDS = 20
# Where neighbouring windows are alike, folds are runs of windows, and the ends of neighbouring runs
# are alike. A run has at least so many samples, unless that leaves too few runs.
SAMPLES_PER_RUN = 3
FEWEST_RUNS = 3
# The autocorrelation of a trace is measured in pieces. Fewest tokens of a piece.
PIECE = 16
# Most pieces of a trace.
PIECES = 2048


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
    _, sample, first, sizes = labelling.by_label(label)
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
    window = choose_piece_size(traffic) if window is None else window
    loads = count_loads(traffic, window=window, threads=threads, progress=progress)
    autocorrelation = measure_autocorrelation(loads.window_load, loads.group)
    number = autocorrelation.number(max(traffic.length // window, 1))
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
        counters = RoutingStatistics(load, group=group, group_names=table.group_names)
        samples = _find_samples_of_windows(counters)
        if samples.kinds is not None:
            return replace(samples, kinds=samples.kinds[label])
        if samples.autocorrelation.correlation_length == 1:
            return replace(samples, kinds=label)
        windows, steps = samples.autocorrelation, int(sizes.max())
        time, length = steps * windows.correlation_time, steps * windows.correlation_length
        return replace(samples, autocorrelation=Autocorrelation(time, length))
    kinds, _ = find_window_kinds(table)
    if kinds is not None:
        return Samples("kind", int(kinds.max()) + 1, kinds=kinds)
    autocorrelation = measure_autocorrelation(table.window_load, table.group)
    number = autocorrelation.number(int(table.is_full_window.sum()))
    return Samples("window", number, autocorrelation)


def _find_samples_of_sequences(trace: RoutingTrace, progress: Progress | None) -> Samples:
    """Find the samples of a trace with sequence labels: the sequences, or their kinds."""
    assert trace.sequence is not None
    sequences = labelling.by_label(trace.sequence)
    kinds, likeness, all_alike = find_sequence_kinds(trace, sequences, progress)
    if kinds is None:
        return Samples("sequence", len(sequences.labels), all_alike=all_alike)
    number = int(kinds.max(initial=-1)) + 1
    return Samples("kind", number, sequences=sequences.labels, kinds=kinds, likeness=likeness)


def measure_correlation_length(trace: Recording) -> int:
    """Compute the correlation length of an unlabelled trace, in tokens."""
    piece = choose_piece_size(trace)

    def measure() -> int:
        loads = count_loads(trace, window=piece)
        return piece * measure_autocorrelation(loads.window_load, loads.group).correlation_length

    # Every split asks for it.
    return compute_once(trace, "correlation length", measure)


def choose_piece_size(trace: Recording) -> int:
    """Return the tokens of the windows in which a trace's autocorrelation is measured."""
    return max(PIECE, -(-trace.length // PIECES))
