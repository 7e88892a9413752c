"""Population: what a counted recording was drawn from, and how two of them are added.

A counted recording has exact loads of everything that was recorded, and a sample of its rows:
stretches of consecutive ones, drawn by a hash of what is in them. The stretches with the smallest
hashes are kept (bottom-k sampling: Cohen and Kaplan, 2007). So the sample of several recordings
follows from the samples of each, in any order of adding, on any number of machines. Recordings are
in the order of their times; those without a time are in the order in which they were added.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner.files import contents
from moetuner.frozen import Frozen, freeze
from moetuner.recording import labelling

Unit = Literal["token", "window"]
Table = NDArray[np.uint64]
Integers = NDArray[np.int64]

# Rows of a stretch: tokens of two long steps of prefill, or as many windows of decode as have them.
STRETCH: dict[Unit, int] = {"token": 1 << 14, "window": 32}
# Rows of a sample by default: 128 long steps of prefill, or 2,048 windows of decode.
SAMPLE: dict[Unit, int] = {"token": 1 << 20, "window": 1 << 11}
# Rows of a stretch that enter its hash, evenly spaced.
HASHED = 8
# Above all hashes, which have 64 bits.
NO_LIMIT = 1 << 64
# Added to labels of sequences, which have 32 bits and a sign, where they are held without one; and
# bits of such a label.
LABEL_OFFSET, LABEL_BITS = 1 << 31, 32
# Limit of sums, excluded, as in statistics: two of them still fit 64 bits, and then are refused.
SUM_LIMIT = 1 << 63
# Times of recordings are below this.
TIME_LIMIT = 1 << 62
# Tables whose sums have that limit, and limits of the numbers of others.
SUMS = ("load", "rows", "stretch_rows")
LIMITS = dict.fromkeys(("labels", "stretch_lowest", "stretch_highest"), 1 << LABEL_BITS)


@dataclass(frozen=True, eq=False, repr=False)
class Population(Frozen):
    """What the rows of a counted recording were drawn from.

    Parameters
    ----------
    load
        Tokens of every group, layer and expert [G,L,E], of all rows; a single group without groups.
    rows
        Tokens, or windows, of every group [G].
    labels
        Label that every sequence had in its recording [n], plus ``LABEL_OFFSET``, by its number in
        the sample; empty where sequences have the labels that they had.
    recording_hashes
        Hash of every recording that was counted [R], rising; 0 of one without rows.
    stretch_hash, stretch_rows
        Hash and rows of every stretch that is kept [N], in the order of their rows.
    stretch_recording, stretch_place
        Hash of the recording that every stretch is of, and its number there [N].
    stretch_time
        Time of that recording plus 1 [N], by which recordings are in order; 0 without a time.
    stretch_lowest, stretch_highest
        Lowest and highest label of all sequences of that recording [N], plus ``LABEL_OFFSET``; 0
        without labels.
    sample
        Most rows that are kept, where they are of several stretches.
    limit
        Stretches are kept whose hash is below this; ``NO_LIMIT`` where all are.
    unreadable
        Number of recordings that could not be read.
    sequences
        Number of sequences; None where they are not labelled. Each counts once in every recording
        that has tokens of it.
    """

    load: Table
    rows: Table
    labels: Table
    recording_hashes: Table
    stretch_hash: Table
    stretch_rows: Table
    stretch_recording: Table
    stretch_place: Table
    stretch_time: Table
    stretch_lowest: Table
    stretch_highest: Table
    sample: int
    limit: int = NO_LIMIT
    unreadable: int = 0
    sequences: int | None = None

    def __post_init__(self) -> None:
        for name in TABLES:
            table, dimensions = np.asarray(getattr(self, name)), 3 if name == "load" else 1
            is_counts = table.dtype.kind == "u" or (table.dtype.kind == "i" and (table >= 0).all())
            if table.ndim != dimensions or not is_counts:
                raise ValueError(
                    f"{name} of a population must be counts of {dimensions} dimensions, got "
                    f"{check.shown(table)}"
                )
            table = freeze(table.astype(np.uint64))
            vars(self)[name] = table
            limit = LIMITS.get(name)
            if limit is not None and int(table.max(initial=0)) >= limit:
                raise ValueError(
                    f"{name} of a population must be below {limit}, got {int(table.max())}"
                )
            if name in SUMS and not float(table.sum(dtype=np.float64)) < SUM_LIMIT:
                raise ValueError(
                    f"{name} of a population must add up to less than 2**63, got a count of "
                    f"{int(table.max())}"
                )
        for name in NUMBERS:
            value = getattr(self, name)
            if not (name == "sequences" and value is None):
                lowest = 1 if name in ("sample", "limit") else 0
                check.whole_number(name, value, lowest=lowest, highest=NO_LIMIT)
        lengths = {len(getattr(self, name)) for name in OF_STRETCHES}
        if len(lengths) > 1 or len(self.rows) != len(self.load):
            raise ValueError(
                f"tables of a population must fit each other, got {len(self.load)} and "
                f"{len(self.rows)} groups, and {sorted(lengths)} stretches"
            )
        if not mark_below(self.stretch_hash, self.limit).all():
            raise ValueError(f"stretches of a population must have hashes below {self.limit}")
        hashes = self.recording_hashes
        if (hashes[1:] < hashes[:-1]).any() or not np.isin(self.stretch_recording, hashes).all():
            raise ValueError(
                "recording_hashes of a population must rise, and have the recording of every "
                "stretch"
            )

    @property
    def recordings(self) -> int:
        """Number of recordings that were counted."""
        return len(self.recording_hashes)

    @property
    def repeated(self) -> dict[str, int]:
        """How often recordings were counted that were counted more than once, by their hash."""
        hashes, times = np.unique(
            self.recording_hashes[self.recording_hashes > 0], return_counts=True
        )
        return {
            show_hash(number): count
            for number, count in zip(hashes.tolist(), times.tolist(), strict=True)
            if count > 1
        }

    @property
    def size(self) -> int:
        """Number of all rows, which are tokens or windows."""
        return int(self.rows.sum())

    @property
    def is_whole(self) -> bool:
        """Whether every row is in the sample."""
        return int(self.stretch_rows.sum()) == self.size

    def facts(self) -> dict[str, Any]:
        """Return how much was counted, for JSON."""
        return {
            "recordings": self.recordings,
            "unreadable": self.unreadable,
            "rows": self.size,
            "sequences": self.sequences,
        }

    def check_fits(
        self,
        sequence: NDArray[np.integer[Any]] | None,
        rows: NDArray[np.integer[Any]],
        layers: int,
        experts: int,
    ) -> None:
        """Raise unless a sample of these sequences [n] and rows of groups [G] may be of it."""
        load, number = (len(rows), layers, experts), int(rows.sum())
        stretches = int(self.stretch_rows.sum())
        if self.load.shape != load or stretches != number:
            raise ValueError(
                f"population must have load {list(load)} and {number} rows in its stretches, got "
                f"{list(self.load.shape)} and {stretches}"
            )
        if self.limit == NO_LIMIT and not self.is_whole and not self.repeated:
            raise ValueError(
                "rows of a population must be those of its stretches, as all stretches are kept, "
                f"got {self.size} and {stretches}"
            )
        self.check_drawn("rows", rows)
        if len(self.labels) and (
            sequence is None
            or int(sequence.min(initial=0)) < 0
            or int(sequence.max(initial=0)) >= len(self.labels)
        ):
            raise ValueError(
                f"population must have a label for every sequence, got {len(self.labels)}"
            )

    def check_drawn(self, name: Literal["rows", "load"], drawn: NDArray[np.integer[Any]]) -> None:
        """Raise unless a table has what was drawn, and no more where all rows are in the sample."""
        table = getattr(self, name)
        wrong = table != drawn if self.is_whole else table < drawn
        for place in map(tuple, np.argwhere(wrong)[:1].tolist()):
            rule = "what its sample has, as all rows are in it"
            if not self.is_whole:
                rule = "at least what its sample has"
            raise ValueError(
                f"{name} of a population must be {rule}, {drawn[place]} at {[*map(int, place)]}, "
                f"got {table[place]}"
            )

    def check_choices(self, top_k: int) -> None:
        """Raise unless in every layer all rows, which are tokens, chose so many experts each."""
        choices = self.load.sum(axis=2)
        for group, rows in enumerate(self.rows.tolist()):
            wrong = np.flatnonzero(choices[group] != rows * top_k)
            for layer in wrong[:1].tolist():
                raise ValueError(
                    f"load of a population must be {rows * top_k} choices in every layer, {top_k} "
                    f"of each of {rows} tokens, got {choices[group, layer]} at {[group, layer]}"
                )

    def find_labels(self, sequence: NDArray[np.integer[Any]]) -> Integers:
        """Return the labels that sequences [n] had in their recordings."""
        if not len(self.labels):
            return sequence.astype(np.int64)
        labels: Integers = self.labels.astype(np.int64)[sequence] - LABEL_OFFSET
        return labels

    def add(self, other: Population) -> tuple[Population, Integers]:
        """Add the population of another recording, without the labels of sequences.

        Returns
        -------
        tuple
            The sum, and the numbers of its sample's rows [n] among those of both samples, one after
            the other.
        """
        if self.sample != other.sample:
            raise ValueError(
                "counted recordings must have samples of the same size, got "
                f"{self.sample:,} and {other.sample:,}"
            )
        stretches = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in OF_STRETCHES
        }
        hashes, sizes = stretches["stretch_hash"], stretches["stretch_rows"].astype(np.int64)
        first_row = np.cumsum(sizes) - sizes
        order = order_stretches(stretches)
        limit = find_limit(hashes[order], sizes[order], self.sample, min(self.limit, other.limit))
        order = order[mark_below(hashes[order], limit)]
        sequences = (self.sequences, other.sequences)
        total = Population(
            self.load + other.load,
            self.rows + other.rows,
            np.empty(0, np.uint64),
            np.sort(np.concatenate([self.recording_hashes, other.recording_hashes])),
            **cast(Any, {name: table[order] for name, table in stretches.items()}),
            sample=self.sample,
            limit=limit,
            unreadable=self.unreadable + other.unreadable,
            sequences=None if None in sequences else sum(filter(None, sequences)),
        )
        return total, labelling.number_runs(first_row[order], sizes[order])

    def number_sequences(self, labels: Integers) -> tuple[Integers, Population]:
        """Return the sequence of every row of the sample [n], and the population with ``labels``.

        ``labels`` [n] are those that rows have in their recordings. Sequences of different
        recordings are different, and numbered from 0; pieces of one recording keep its labels.
        """
        recordings, first = np.unique(self.stretch_recording, return_index=True)
        # Recordings by number, in the order of their stretches.
        number = first.argsort().argsort()[np.searchsorted(recordings, self.stretch_recording)]
        of_row = np.repeat(number, self.stretch_rows.astype(np.int64))
        pairs, sequence = np.unique(
            (of_row << LABEL_BITS) + labels + LABEL_OFFSET, return_inverse=True
        )
        label = pairs & ((1 << LABEL_BITS) - 1)
        lowest, highest = (
            table.astype(np.int64)[np.sort(first)][pairs >> LABEL_BITS]
            for table in (self.stretch_lowest, self.stretch_highest)
        )
        if are_numbered_together(label, lowest, highest):
            return labels, self
        return sequence.ravel(), replace(self, labels=label.astype(np.uint64))

    def to_tables(self) -> contents.Population:
        """Return the tables and the numbers, for files."""
        return (
            {name: getattr(self, name) for name in TABLES},
            {name: getattr(self, name) for name in NUMBERS},
        )

    @classmethod
    def from_tables(cls, stored: contents.Population | None) -> Population | None:
        """Return the population that a file holds; None if it holds none."""
        if stored is None:
            return None
        values: dict[str, Any] = {**stored[0], **stored[1]}
        for name in sorted(values.keys() ^ {*TABLES, *NUMBERS}):
            rule = "must have no" if name in values else "must have"
            raise ValueError(f"population {rule} {name!r:.60}")
        return cls(**values)


# Names of a population's tables, of those of stretches, and of its numbers.
TABLES = tuple(field.name for field in fields(Population) if field.type == "Table")
OF_STRETCHES = tuple(name for name in TABLES if name.startswith("stretch_"))
NUMBERS = tuple(field.name for field in fields(Population) if field.name not in TABLES)


def add_populations(
    one: Any, other: Any
) -> tuple[Integers, dict[str, Any], NDArray[np.integer[Any]] | None]:
    """Add the populations of two counted recordings of one kind, model and list of groups.

    Returns
    -------
    tuple
        The numbers of the sum's rows [n] among those of both, one after the other; fields of the
        sum that traces and tables have; and the sequence of each row, if it is known.

    Raises
    ------
    ValueError
        If one of them was not counted, or they differ in what must be the same.

    Warns
    -----
    UserWarning
        If a recording was counted in both.
    """
    if one.population is None or other.population is None:
        raise ValueError(
            "recordings are added where both were counted: add what moetuner.count returns"
        )
    names_of_sizes = ("layers", "num_experts", "top_k", "window", "model", "expert_size")
    check_same(one, other, names_of_sizes, "counted recordings")
    names = [None if side.group is None else side.group_names for side in (one, other)]
    if names[0] != names[1]:
        texts = ["no groups" if value is None else ", ".join(value) for value in names]
        raise ValueError(
            "counted recordings must have the same groups in the same order, got "
            f"{texts[0]}; and {texts[1]}"
        )
    population, rows = one.population.add(other.population)
    _warn_of_repeated(one.population, other.population)
    sequence = None
    if one.sequence is not None and other.sequence is not None:
        labels = [side.population.find_labels(side.sequence) for side in (one, other)]
        sequence, population = population.number_sequences(np.concatenate(labels)[rows])
    fields: dict[str, Any] = {"population": population, "group_names": one.group_names}
    fields["group"] = None
    if names[0] is not None:
        fields["group"] = np.concatenate([one.group, other.group])[rows]
    for name in ("model", "expert_size"):
        # What one of them does not say is what the other says, so that a third must say it too.
        fields[name] = getattr(one, name) or getattr(other, name)
    return rows, fields, sequence


def _warn_of_repeated(one: Population, other: Population) -> None:
    """Warn if a recording with rows was counted in both."""
    both = np.intersect1d(one.recording_hashes, other.recording_hashes)
    repeated = both[both > 0].tolist()
    for number in repeated[:1]:
        more = "" if len(repeated) == 1 else f" and {len(repeated) - 1} more"
        warnings.warn(
            f"recording {show_hash(number)}{more} is in both counts, so its tokens count twice: "
            "add the counts of every recording once",
            UserWarning,
            stacklevel=4,
        )


def check_same(one: Any, other: Any, names: Iterable[str], noun: str) -> None:
    """Raise unless two recordings have the same values of these names.

    A missing name or size fits any; windows without a length fit no others.
    """
    for name in names:
        both = getattr(one, name), getattr(other, name)
        if both[0] != both[1] and (name == "window" or None not in both):
            raise ValueError(
                f"{noun} must have the same {name}, got {' and '.join(map(check.shown, both))}"
            )


def order_stretches(stretches: dict[str, Table]) -> Integers:
    """Return the numbers of distinct stretches, in the order of the sum that they are of [N].

    ``stretches`` are the tables of one recording after the other, by name. The order of adding is
    that of recordings without a time; it does not matter to those that have one. What is there
    twice, because its recording was added twice, is kept once.
    """
    time, recording = stretches["stretch_time"], stretches["stretch_recording"]
    # Sorting is stable, so stretches of one recording stay in their order.
    order = np.lexsort([np.where(time > 0, recording, np.uint64(0)), time])
    identity = np.stack([recording, stretches["stretch_place"]], axis=1)[order]
    first = np.unique(identity, axis=0, return_index=True)[1]
    distinct: Integers = order[np.sort(first)]
    return distinct


def find_limit(
    hashes: Table, rows: NDArray[np.integer[Any]], sample: int, limit: int = NO_LIMIT
) -> int:
    """Return the hash below which stretches [N] are kept, so that at most ``sample`` rows are.

    Stretches of the smallest hash are always kept. The limit of a sum of recordings is the same
    whether it is found from all stretches or from those below the limit of each: where a recording
    alone exceeds the sample, the sum does so no later.
    """
    distinct, place = np.unique(hashes, return_inverse=True)
    sizes = np.bincount(place, weights=rows, minlength=len(distinct))
    too_many = np.flatnonzero(np.cumsum(sizes)[1:] > sample)
    return min(limit, int(distinct[1 + too_many[0]])) if too_many.size else limit


def mark_below(hashes: Table, limit: int) -> NDArray[np.bool_]:
    """Return which hashes [N] are below a limit, which may have one bit more than they have."""
    if limit >= NO_LIMIT:
        return np.ones(len(hashes), dtype=bool)
    return hashes < np.uint64(limit)


def are_numbered_together(labels: Integers, lowest: Integers, highest: Integers) -> bool:
    """Return whether recordings number their sequences together, as pieces of one recording do.

    Each of the labels [n] is of a recording with these lowest and highest ones. No label may be in
    two recordings, but for a sequence that was cut: it is the last one of a piece, the first one of
    the next, and all of a piece between them.
    """
    distinct, place, times = np.unique(labels, return_inverse=True, return_counts=True)
    has_others = lowest < highest
    marks = (
        (labels == highest) & has_others,
        (labels == lowest) & has_others,
        (lowest < labels) & (labels < highest),
    )
    lasts, firsts, insides = (
        np.bincount(place.ravel(), weights=mark, minlength=len(distinct)) for mark in marks
    )
    is_cut = (lasts <= 1) & (firsts <= 1) & (lasts + firsts > 0) & (insides == 0)
    return bool(is_cut[times > 1].all())


def show_hash(number: int) -> str:
    """Write a hash of 64 bits as people read it."""
    return f"{number:016x}"


def compute_hash(*contents: bytes) -> int:
    """Compute a hash of 64 bits, the same on all machines."""
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return int.from_bytes(digest.digest(), "little")
