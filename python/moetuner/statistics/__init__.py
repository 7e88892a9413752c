"""RoutingStatistics: windows of load, transitions, co-activation, expert sets. They add up."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.files import contents, naming
from moetuner.files.ids import LeftOut
from moetuner.files.opened import Opened, opened
from moetuner.frozen import Frozen
from moetuner.recording import Recording, compute_once, labelling
from moetuner.recording.population import Population, add_populations, check_same
from moetuner.statistics.limits import (
    PAIRS,
    check_table_bytes,
    choose_shard_bytes,
    choose_stride,
)
from moetuner.statistics.sets import ExpertSets, from_tables, to_tables
from moetuner.statistics.steps import draw_window, scale_window
from moetuner.statistics.tables import Loads, check_counts, narrow
from moetuner.trace import RoutingTrace, as_trace

# Fields that belong to all windows together, so that other windows do not have them.
OF_ALL_WINDOWS = (*PAIRS, "sets", "set_tokens", "population")
# Options of counting, and the fields that they fill, on which the fingerprint depends.
COUNTED = {"by_group": "group"} | {name: name for name in ("sets", "transitions", "coactivation")}
# Fields that files keep as metadata, not as tables.
METADATA = ("window", "set_tokens", "group_names", "model", "expert_size", "top_k")

# Tokens of a window by default: about the tokens of a step of decode.
WINDOW = 512

# Smallest distance of two loads beyond chance, mean of layers, that counts as drift.
LEAST_DRIFT = 0.05


# Smallest number of steps that are drawn from windows of counters.
STEPS = 32


@dataclass(frozen=True, eq=False, repr=False)
class RoutingStatistics(Recording, Frozen):
    """Counts of a trace, or load tables: all that a placement is computed from.

    Parameters
    ----------
    window_load
        Tokens per window, layer and expert [W,L,E], in 64 bits. Tables above ``NARROW_BYTES`` have
        the narrowest unsigned type that holds them: convert them before adding or multiplying, as
        numpy's small integers wrap around.
    transitions
        Tokens routed to expert e in layer l and to f in layer l+1 [L-1,E,E]; None if not counted.
    coactivation
        Tokens routed to e and f in one layer [L,E,E], symmetric, zero diagonal; None if not
        counted.
    window
        Tokens per window; None if windows have no common length (a whole trace, a prompt, a
        language).
    sets
        Distinct expert sets of every layer, for the exact fanout; None if not counted.
    set_tokens
        Tokens whose sets were counted, if only a sample was; None if all or none were.
    group
        Group of every window [W], an index into ``group_names``; None without groups.
    expert_size
        Hidden and intermediate size of an expert, for predicted times; None if not known.
    left_out
        Hidden layers of the model, and the numbers of those without experts, if the recording had
        rows for them, else None. Files do not keep it.
    top_k
        Experts per token and layer, if a recording of counts says it, else None.
    drawn_from
        Window of counters from which each window was drawn [W], if several were drawn from one;
        else None. Confidence intervals treat such windows as one sample. Files do not keep it.
    population
        What the windows were drawn from, if ``moetuner.count`` drew them; else None.

    Examples
    --------
    >>> import moetuner as mt
    >>> trace = mt.RoutingTrace.from_arrays([[[0, 1]], [[2, 3]]], num_experts=4)
    >>> statistics = mt.RoutingStatistics.from_trace(trace, window=1)
    >>> statistics.window_load.tolist()
    [[[1, 1, 0, 0]], [[0, 0, 1, 1]]]
    >>> statistics.total_load.tolist()
    [[1, 1, 1, 1]]
    """

    _also_shown = ("windows", "layers", "num_experts")
    ordered = False
    unit = "window"
    noun = "counts"

    window_load: Loads
    transitions: NDArray[np.uint64] | None = None
    coactivation: NDArray[np.uint64] | None = None
    _: KW_ONLY
    window: int | None = None
    group: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    model: str | None = None
    sets: tuple[ExpertSets, ...] | None = None
    expert_size: tuple[int, int] | None = None
    set_tokens: int | None = None
    left_out: LeftOut | None = None
    top_k: int | None = None
    drawn_from: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    population: Population | None = None

    def __post_init__(self) -> None:
        load = check_counts("load", self.window_load, "[windows, layers, experts]")
        if 0 in load.shape:
            raise ValueError(
                f"load must have at least one window, layer and expert, got {list(load.shape)}"
            )
        vars(self).update(
            window_load=narrow(load),
            window=check.window_in(self.window),
            group_names=check.names(self.group_names),
            expert_size=check.expert_size(self.expert_size),
        )
        _, layers, experts = load.shape
        for name, table in self._pairs.items():
            if table is not None:
                shape = (layers - PAIRS[name], experts, experts)
                pairs = check_counts(name, table, "[.., experts, experts]").astype("u8", copy=False)
                if pairs.shape != shape:
                    raise ValueError(f"{name} must be {list(shape)}, got {list(pairs.shape)}")
                vars(self)[name] = pairs
        for layer, counts in enumerate(self.coactivation if self.coactivation is not None else ()):
            if counts.diagonal().any() or not np.array_equal(counts, counts.T):
                rule = "symmetric with a zero diagonal"
                raise ValueError(f"coactivation must be {rule}, layer {layer} is not")
        if self.sets is not None:
            self._check_sets()
        if self.set_tokens is not None:
            if self.sets is None:
                raise ValueError("set_tokens must be None without sets")
            check.whole_number("set_tokens", self.set_tokens)
        if self.group is not None:
            group = check.groups(self.group, self.windows, self.group_names, np.int64)
            vars(self)["group"] = group
        if self.top_k is not None:
            check.whole_number("top_k", self.top_k, highest=experts)
        check.text_or_none("model", self.model)
        self._check_population()
        if self.population is not None:
            self.population.check_drawn("load", sum_by_group(self))

    def _check_sets(self) -> None:
        """Check that every layer has sets, and that their experts exist."""
        sets = check.listed("sets", self.sets, "expert sets")
        if len(sets) != self.layers:
            raise ValueError(f"sets must be those of {self.layers} layers, got {len(sets)}")
        for layer, layer_sets in enumerate(sets):
            check.instance(f"sets of layer {layer}", layer_sets, ExpertSets)
            highest = int(layer_sets.ids.max(initial=0))
            if highest >= self.num_experts:
                raise ValueError(
                    f"sets must have expert ids below {self.num_experts}, layer {layer} has "
                    f"{highest}"
                )
        vars(self)["sets"] = tuple(sets)

    @classmethod
    def from_trace(
        cls,
        trace: RoutingTrace,
        *,
        window: int | None = WINDOW,
        transitions: bool = True,
        coactivation: bool = True,
        sets: bool = True,
        by_group: bool = False,
        threads: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> RoutingStatistics:
        """Count a trace, shard by shard; memory holds one shard and the counts.

        ``Problem`` counts a trace by itself, with the tables that its objective needs. This counts
        the tables of all objectives, so that the counts can be saved and used for several problems.

        Parameters
        ----------
        trace
            The routing to count.
        window
            Tokens per window of load; None counts the whole trace as one window.
        transitions, coactivation
            Whether to count these pairs.
        sets
            Whether to count distinct expert sets, from which traffic and times in regime dispatch
            are computed: 2 K + 8 bytes (while counting up to three times that) for each set of a
            layer. If a layer could have more than ``LAYER_SETS`` of them and ``PAIR_SETS`` for each
            pair of experts, or all layers more than ``MOST_SETS``, every n-th token is counted as a
            sample (``set_tokens``). Without sets, visits of devices are estimated from
            co-activation.
        by_group
            Whether to cut windows within groups, one group after the other, and label them.
        threads
            Threads to use, all cores by default. The counts do not depend on it.
        progress
            Called now and then with the share of the tokens that are counted.

        Raises
        ------
        ValueError
            If an argument is wrong, an id in the trace's file is, or the tables would not fit
            memory.
        """
        check.instance(
            "trace", trace, RoutingTrace, hint=", such as RoutingTrace.from_arrays makes"
        )
        window, threads = check.window_in(window), check.threads_in(threads)
        tables = {"transitions": transitions, "coactivation": coactivation, "sets": sets}
        for name, value in {**tables, "by_group": by_group}.items():
            check.flag(name, value)
        check_table_bytes(trace, window, tables)
        check.callable_or_none("progress", progress)
        report = progress or (lambda _: None)
        every = choose_stride(trace) if sets else 1
        options: Any = {"window": window, "every": every, "threads": threads, "tables": tables}
        if not by_group:
            return cls._count(trace, None, report, **options)[0]
        if trace.group is None:
            raise check.ArgumentError(
                "by_group needs a trace with groups; this one has none", "by_group"
            )
        counts_by_group = {}
        if not any(tables.values()):
            counts_by_group = cls._count(trace, trace.group, report, **options)
        else:
            # Tables of pairs and sets are wide: memory holds those of one group at a time.
            numbers = np.unique(trace.group).tolist()
            for index, number in enumerate(numbers):

                def report_part(share: float, index: int = index) -> None:
                    report((index + share) / len(numbers))

                group_trace = trace.select(groups=[number])
                counts_by_group[number] = cls._count(group_trace, None, report_part, **options)[0]
        return cls.sum(
            replace(counts, group=np.full(counts.windows, number), group_names=trace.group_names)
            for number, counts in sorted(counts_by_group.items())
        )

    @classmethod
    def _count(
        cls,
        trace: RoutingTrace,
        group: NDArray[np.integer[Any]] | None,
        report: Callable[[float], None],
        *,
        window: int | None,
        every: int,
        threads: int | None,
        tables: Mapping[str, bool],
    ) -> dict[int, RoutingStatistics]:
        """Return counts by the group of a token [T], or of all tokens under 0, in one pass.

        Arguments are checked. The sets of one token in ``every`` are counted.
        """
        sizes = (trace.layers, trace.num_experts, trace.top_k)
        numbers = [0] if group is None else np.unique(group).tolist()
        counters = {
            number: _core.StatisticsCounter(*sizes, window=window, every=every, **tables)
            for number in numbers
        }
        counted = 0
        for shard in trace.shards(choose_shard_bytes(trace), threads=threads):
            group_of_token = None if group is None else group[counted : counted + len(shard)]
            for number in [0] if group_of_token is None else np.unique(group_of_token).tolist():
                ids = shard if group_of_token is None else shard[group_of_token == number]
                counters[number].push(ids, threads, checked=trace.ids.fresh)
                del ids
            counted += len(shard)
            report(counted / trace.tokens)
            del shard  # else memory holds two shards while the next one is read
        return {
            number: cls._finish(trace, counter, every=every, window=window, threads=threads)
            for number, counter in counters.items()
        }

    @classmethod
    def _finish(
        cls,
        trace: RoutingTrace,
        counter: _core.StatisticsCounter,
        *,
        every: int,
        window: int | None,
        threads: int | None,
    ) -> RoutingStatistics:
        """Build statistics of what a counter has counted of a trace."""
        tokens, load, *pairs, sets = counter.finish(threads)
        statistics = cls(
            load,
            window=window,
            model=trace.model,
            sets=None if sets is None else tuple(ExpertSets(*layer) for layer in sets),
            expert_size=trace.expert_size,
            set_tokens=None if every == 1 else -(-tokens // every),
        )
        # The core's tables need no check, which would take as long as writing them.
        vars(statistics).update(zip(PAIRS, pairs, strict=True))
        return statistics

    @classmethod
    def from_load(cls, load: ArrayLike, **fields: Any) -> RoutingStatistics:
        """Return the statistics of a load table [W,L,E] (or [L,E], one window), without pairs."""
        load = check.array_in("load", load)
        return cls(load[None] if load.ndim == 2 else load, **fields)

    def split(self, share: float, *, seed: int = 0) -> tuple[RoutingStatistics, RoutingStatistics]:
        """Split the windows in time: neighbours are similar, so a random split would leak.

        Pairs and sets were counted over all windows together, so neither part has them.

        Parameters
        ----------
        share
            Share of the windows, the first ones, that go to the first part; of every group, if
            there are groups.
        seed
            Not used: a cut in time has no choice. ``RoutingTrace.split`` has the same argument.

        Raises
        ------
        ValueError
            If ``share`` is not between 0 and 1, or there is one window.
        """
        if not (check.is_number(share) and 0 < share < 1) or self.windows == 1:
            condition = " of two windows or more" if self.windows == 1 else ""
            raise ValueError(f"share must be between 0 and 1{condition}, got {check.shown(share)}")
        check.seed_in(seed)
        group = np.zeros(self.windows, np.int64) if self.group is None else self.group
        first = np.zeros(self.windows, dtype=bool)
        for number in np.unique(group):
            members = np.flatnonzero(group == number)
            first[members[: max(round(share * len(members)), 1)]] = True
        first[-1] &= not first.all()
        without: dict[str, Any] = dict.fromkeys(OF_ALL_WINDOWS)
        parts = [
            replace(
                self,
                window_load=self.window_load[chosen],
                group=None if self.group is None else group[chosen],
                drawn_from=None if self.drawn_from is None else self.drawn_from[chosen],
                **without,
            )
            for chosen in (first, ~first)
        ]
        return parts[0], parts[1]

    @property
    def windows(self) -> int:
        """Number of windows, W."""
        return int(self.window_load.shape[0])

    @property
    def length(self) -> int:
        """Number of rows, which are windows."""
        return self.windows

    @property
    def has_pairs(self) -> bool:
        """Whether pairs were counted, over all windows together: selected windows have none."""
        return self.transitions is not None or self.coactivation is not None

    @property
    def is_empty(self) -> bool:
        """Whether every count is zero."""
        return not self.total_load.any()

    @property
    def choices(self) -> int:
        """How often experts were chosen, in all layers."""
        return int(self.total_load.sum())

    def facts(self) -> dict[str, Any]:
        """Return kind and sizes, for JSON."""
        kind = "load table" if self.transitions is None else "statistics"
        return {**super().facts(), "kind": kind, "windows": self.windows}

    def rows_in(self, window: int | None) -> int:
        """Return 1: rows are windows already, of any length."""
        check.window_in(window)
        return 1

    def take(self, rows: ArrayLike) -> RoutingStatistics:
        """Return some windows; pairs and sets stay those of all windows together.

        Parameters
        ----------
        rows
            Mask of the windows [W], or numbers of windows in the order wanted, each once.

        Examples
        --------
        >>> import moetuner as mt
        >>> table = mt.RoutingStatistics.from_load([[[1, 0]], [[0, 2]], [[3, 0]]])
        >>> table.take([2, 0]).window_load.tolist()
        [[[3, 0]], [[1, 0]]]
        """
        wanted = labelling.rows("rows", rows, self.windows)
        if not (wanted.any() if wanted.dtype == np.bool_ else wanted.size):
            raise check.ArgumentError("rows must be at least one window, got none", "rows")
        labels: dict[str, Any] = {"group": self.group, "drawn_from": self.drawn_from}
        labels = {n: None if label is None else label[wanted] for n, label in labels.items()}
        return replace(self, window_load=self.window_load[wanted], population=None, **labels)

    def without_pairs(self) -> RoutingStatistics:
        """Return the loads alone, without pairs and sets, which belong to all windows together."""
        return replace(self, transitions=None, coactivation=None, sets=None, set_tokens=None)

    @cached_property
    def is_full_window(self) -> NDArray[np.bool_]:
        """Whether a window is a whole step, which counts in means over windows [W].

        The remaining tokens behind the full windows of a trace or group are no step: their time
        says nothing about a step. Windows of unknown length are all steps.
        """
        is_full_window = np.ones(self.windows, dtype=bool)
        if self.window is None:
            return is_full_window
        tokens = self.window_load.sum(axis=(1, 2), dtype=np.uint64)
        label = np.zeros(self.windows, dtype=np.int64) if self.group is None else self.group
        order = np.argsort(label, kind="stable")
        is_full, label = (tokens == tokens.max())[order], label[order]
        is_rest = ~is_full[1:] & is_full[:-1] & (label[1:] == label[:-1])
        is_full_window[order[1:][is_rest]] = False
        return is_full_window

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return int(self.window_load.shape[1])

    @property  # of traces it is a field
    def num_experts(self) -> int:  # type: ignore[override]
        """Experts per layer, E."""
        return int(self.window_load.shape[2])

    @cached_property
    def total_load(self) -> NDArray[np.uint64]:
        """Load over all windows [L,E]."""
        total: NDArray[np.uint64] = self.window_load.sum(axis=0, dtype=np.uint64)
        return total

    @cached_property
    def set_load(self) -> NDArray[np.uint64]:
        """Load over all windows [L,E]; from the expert sets if they are a sample."""
        if self.sets is None or self.set_tokens is None:
            return self.total_load
        return np.stack([layer_sets.load(self.num_experts) for layer_sets in self.sets])

    @property
    def _pairs(self) -> dict[str, NDArray[np.uint64] | None]:
        """Tables of pairs of experts by name; None if not counted."""
        return {name: getattr(self, name) for name in PAIRS}

    @property
    def transitions_or_empty(self) -> NDArray[np.uint64]:
        """Transitions; an empty array [0,E,E] if they were not counted."""
        empty = np.zeros((0, self.num_experts, self.num_experts), dtype=np.uint64)
        return empty if self.transitions is None else self.transitions

    @property
    def coactivation_or_empty(self) -> NDArray[np.uint64]:
        """Co-activation; an empty array [0,E,E] if it was not counted."""
        empty = np.zeros((0, self.num_experts, self.num_experts), dtype=np.uint64)
        return empty if self.coactivation is None else self.coactivation

    @cached_property
    def top_k_of_layer(self) -> list[int] | None:
        """Experts of a token in every layer [L], from co-activated pairs; None without them.

        A token of k experts has k - 1 pairs for each of them.
        """
        if self.coactivation is None:
            return None
        pairs = self.coactivation.sum(axis=(1, 2), dtype=np.float64)
        load = np.maximum(self.total_load.sum(axis=1, dtype=np.float64), 1)
        top_k = np.clip(np.rint(1 + pairs / load), 2, max(self.num_experts, 2))
        counts: list[int] = np.where(pairs > 0, top_k, 1).astype(np.int64).tolist()
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of all counts: two statistics with the same fingerprint are the same."""
        digest = hashlib.sha256()
        for table in (self.window_load, *self._pairs.values()):
            digest.update(b"none" if table is None else repr(table.shape).encode())
            for row in () if table is None else table:  # a copy in 64 bits of one row at a time
                digest.update(np.ascontiguousarray(row, dtype="<u8").data)
        for layer in self.sets or ():
            digest.update(repr(layer.ids.shape).encode())
            digest.update(np.ascontiguousarray(layer.ids, dtype="<u2").data)
            digest.update(np.ascontiguousarray(layer.counts, dtype="<u8").data)
        return digest.hexdigest()[:16]

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Add the statistics of two traces: windows one after the other, pairs summed.

        Pairs, sets, the model's name and its sizes are dropped if only one side has them. Groups
        are the same if they have the same name. Counted recordings, as ``moetuner.count`` returns
        them, are in the order of their times, and keep a name or a size that one side has.

        Raises
        ------
        ValueError
            If they are of other sizes, models or windows, or only one of them has groups.
        """
        if not isinstance(other, RoutingStatistics):
            return NotImplemented
        if self.population is not None or other.population is not None:
            rows, labels, _ = add_populations(self, other)
            labels |= {"window": self.window, "top_k": self.top_k or other.top_k}
            load = np.concatenate([self.window_load, other.window_load])[rows]
            return RoutingStatistics(load, **labels)
        if self.window_load.shape[1:] != other.window_load.shape[1:]:
            raise ValueError(
                "statistics must have the same layers and experts, got "
                f"{list(self.window_load.shape[1:])} and {list(other.window_load.shape[1:])}"
            )
        if (self.group is None) != (other.group is None):
            raise ValueError("statistics must both have groups, or none, got groups of only one")
        check_same(self, other, ("model", "expert_size", "top_k", "window"), "statistics")
        group, names = labelling.join_groups([self, other])
        fields: dict[str, Any] = {"window": self.window, "group": group}
        fields["group_names"] = names if group is not None else ()
        for name in ("model", "expert_size", "top_k"):
            fields[name] = getattr(self, name) and getattr(other, name)
        fields["left_out"] = self.left_out if self.left_out == other.left_out else None
        for name, table in self._pairs.items():
            added = other._pairs[name]
            fields[name] = None if table is None or added is None else table + added
        if self.sets is not None and other.sets is not None:
            fields["sets"] = tuple(map(operator.add, self.sets, other.sets))
            if self.set_tokens or other.set_tokens:
                sides = ((self.sets, self.set_tokens), (other.sets, other.set_tokens))
                fields["set_tokens"] = sum(
                    sample or int(sets[0].counts.sum()) for sets, sample in sides
                )
        load = np.concatenate([self.window_load, other.window_load])
        return RoutingStatistics(load, **fields)

    @classmethod
    def sum(cls, parts: Iterable[RoutingStatistics]) -> RoutingStatistics:
        """Add the statistics of shards, ranks or days."""
        members = check.listed("parts", parts, "statistics")
        if not members:
            raise ValueError("parts to sum must be at least one RoutingStatistics, got none")
        for part in members:
            check.instance("each of the parts", part, RoutingStatistics)
        total: RoutingStatistics = reduce(operator.add, members)
        return total

    def per_step(
        self, tokens: int, *, top_k: int = 1, drawn: bool = True, seed: int = 0
    ) -> RoutingStatistics:
        """Draw single steps from the loads of windows, for counters that sum over many steps.

        A mean of many steps is more even than each of them. So the choices of every step are drawn
        at random, in proportion to its window's loads; the totals of layers keep their proportions.
        Every window becomes one step. From few windows several steps each are drawn, 32 or more in
        all, which ``drawn_from`` marks. A single window is scaled instead, as its steps would
        differ by chance alone. Windows without load are dropped, and so are pairs and sets.

        Parameters
        ----------
        tokens
            Tokens of a step.
        top_k
            Experts per token and layer; 1 if load counts tokens once, or ``tokens`` counts each
            token once per expert.
        drawn
            Whether to draw steps; else every window is scaled to the mean of its steps, rounded
            by the largest remainder.
        seed
            Random seed. The steps depend on the loads, too.

        Examples
        --------
        >>> import moetuner as mt
        >>> counters = mt.RoutingStatistics.from_load(40 * [[[600, 300, 100]]])
        >>> counters.per_step(5).window_load[:3].tolist()
        [[[3, 1, 1]], [[3, 2, 0]], [[5, 0, 0]]]
        >>> counters.per_step(5, drawn=False).window_load[0].tolist()
        [[3, 2, 0]]
        """
        tokens = check.whole_number("tokens", tokens, highest=1 << 40)
        choices = tokens * check.whole_number("top_k", top_k, highest=1 << 12)
        check.flag("drawn", drawn)
        check.seed_in(seed)
        used = np.flatnonzero(self.window_load.any(axis=(1, 2)))
        if not used.size:
            raise ValueError("load must have a count above 0 to be scaled, got only zeros")
        several = -(-STEPS // len(used)) if drawn and len(used) > 1 else 1
        if not drawn or len(used) == 1:
            scaled = [scale_window(self.window_load[window], choices) for window in used]
        else:
            used = np.repeat(used, several)
            scaled = [
                draw_window(self.window_load[window], choices, [seed, number])
                for number, window in enumerate(used)
            ]
        fields: dict[str, Any] = dict.fromkeys(OF_ALL_WINDOWS)
        fields |= {"window": tokens, "group": None if self.group is None else self.group[used]}
        fields["drawn_from"] = used if several > 1 else None
        return replace(self, window_load=cast(Any, np.stack(scaled)), **fields)

    def joined(self, tokens: int) -> RoutingStatistics:
        """Join consecutive windows of each group to longer ones, as of prefill instead of decode.

        Remaining windows that do not fill a longer one are dropped, and so are pairs and sets.

        Parameters
        ----------
        tokens
            Tokens of a longer window, a multiple of ``window``.

        Raises
        ------
        ValueError
            If they are no multiple, or no group fills a longer window.

        Examples
        --------
        >>> import moetuner as mt
        >>> statistics = mt.RoutingStatistics.from_load([[[1, 0]], [[0, 1]], [[1, 0]]], window=1)
        >>> statistics.joined(2).window_load.tolist()
        [[[1, 1]]]
        """
        tokens = check.whole_number("tokens", tokens, highest=1 << 40)
        return compute_once(self, ("joined", tokens), lambda: self._join(tokens))

    def _join(self, tokens: int) -> RoutingStatistics:
        """Return what ``joined`` does, computed anew."""
        runs = self.runs(tokens)
        if not len(runs):
            raise ValueError(f"tokens must be those of windows that INPUT fills, got {tokens:,}")
        load = np.stack([self.window_load[run].sum(axis=0, dtype=np.uint64) for run in runs])
        fields: dict[str, Any] = dict.fromkeys(OF_ALL_WINDOWS)
        for name in ("group", "drawn_from"):
            label = getattr(self, name)
            fields[name] = None if label is None else label[runs[:, 0]]
        return replace(self, window_load=cast(Any, load), window=tokens, **fields)

    def runs(self, tokens: int) -> NDArray[np.int64]:
        """Return the numbers of the windows [M,n] that make up longer ones of so many tokens."""
        tokens, window = check.whole_number("tokens", tokens, highest=1 << 40), self.window
        if window is None or tokens % window:
            length = "of unknown length" if window is None else f"of {window:,} tokens"
            raise ValueError(f"tokens must be a multiple of windows {length}, got {tokens:,}")
        label = np.zeros(self.windows, np.int64) if self.group is None else self.group
        size, runs = tokens // window, []
        for number in np.unique(label):
            steps = np.flatnonzero(self.is_full_window & (label == number))
            runs.append(steps[: len(steps) // size * size].reshape(-1, size))
        joined = np.concatenate(runs)
        return joined[np.argsort(joined[:, 0], kind="stable")]

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        pairs = {"load": self.window_load, **self._pairs, "group": self.group}
        metadata: Any = {name: getattr(self, name) for name in METADATA}
        metadata["population"] = self.population and self.population.to_tables()
        contents.write_statistics(check.path_in(path), pairs | to_tables(self.sets), metadata)

    @classmethod
    def load(cls, path: str | Path | Opened) -> RoutingStatistics:
        """Read statistics that ``save`` wrote, or a load table.

        A load table is an ``.npz`` with ``load`` [W,L,E] or [L,E] and optionally ``group`` [W],
        ``group_names`` and ``model``; it knows no pairs.

        Raises
        ------
        ValueError
            If the file is cut off, damaged, or something else.
        OSError
            If it cannot be read.
        """
        file = opened(path)
        tables, metadata = contents.read_statistics(file)
        with naming(file.path):
            metadata |= {name: tables.get(name) for name in (*PAIRS, "group")}
            metadata["population"] = Population.from_tables(metadata.get("population"))
            return cls.from_load(tables["load"], sets=from_tables(tables), **metadata)


def check_recording(value: object, name: str = "traffic") -> None:
    """Raise TypeError for a value that is no recording."""
    check.instance(name, value, RoutingTrace, RoutingStatistics)


def as_counts(recording: Recording, **options: Any) -> RoutingStatistics:
    """Return the counts of a trace, by ``RoutingStatistics.from_trace``; counts as they are."""
    if isinstance(recording, RoutingStatistics):
        return recording
    return RoutingStatistics.from_trace(as_trace(recording), **options)


def count_loads(
    recording: Recording,
    *,
    window: int | None = None,
    by_group: bool = True,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> RoutingStatistics:
    """Return the loads of a trace alone; counts as they are.

    With ``by_group``, a window has tokens of one group. ``progress`` is called with the share of a
    trace's tokens that are counted.
    """
    return as_counts(
        recording,
        window=window,
        by_group=by_group and recording.group is not None and recording.length > 0,
        transitions=False,
        coactivation=False,
        sets=False,
        threads=threads,
        progress=progress,
    )


def sum_by_group(counts: RoutingStatistics) -> NDArray[np.uint64]:
    """Compute the loads of groups [G,L,E]; a single group without groups."""
    if counts.group is None:
        return counts.total_load[None]
    load = np.zeros((len(counts.group_names), counts.layers, counts.num_experts), dtype=np.uint64)
    for number in np.unique(counts.group).tolist():
        load[number] = counts.window_load[counts.group == number].sum(axis=0, dtype=np.uint64)
    return load


def choose_hottest(
    load: NDArray[np.integer[Any]], number: int, *, each_layer: bool = False
) -> NDArray[np.bool_]:
    """Return which experts [L,E] have the highest loads: ``number`` in all, or in each layer.

    Of experts with the same load the first ones are chosen.
    """
    rows = load if each_layer else load.reshape(1, -1)
    order = np.argsort(-rows.astype(np.int64), axis=1, kind="stable")
    is_chosen = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(is_chosen, order[:, :number], True, axis=1)
    return is_chosen.reshape(load.shape)


def measure_distance(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the total variation distance between the shares of two loads [...,E].

    That is the share of tokens that would have to go to other experts to make the two equal.
    """
    loads = (np.asarray(one, np.float64), np.asarray(other, np.float64))
    shares = [load / np.maximum(load.sum(axis=-1, keepdims=True), 1) for load in loads]
    apart: NDArray[np.float64] = np.abs(shares[0] - shares[1]).sum(axis=-1) / 2
    return apart
