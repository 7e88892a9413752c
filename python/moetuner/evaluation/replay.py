"""Count what a placement does to traffic, by window: replayed from a trace, or expected of counts.

``figures`` computes figures of these counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import ArgumentError, instance
from moetuner.evaluation import copies
from moetuner.evaluation.arrival import Order, find_places, mix, mix_windows
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import Progress, RowReader, read
from moetuner.files.cells import counted
from moetuner.placement import EMPTY, Placement
from moetuner.recording import Recording
from moetuner.serving import Serving
from moetuner.statistics import RoutingStatistics, check_recording
from moetuner.statistics.limits import TABLE_LIMIT
from moetuner.topology import Topology, sum_by_node
from moetuner.trace import RoutingTrace, as_trace

Numbers = NDArray[Any]
Integers = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Counts of a placement on some traffic.

    Parameters
    ----------
    tokens
        Number of tokens of the traffic; None where it is not known.
    load
        Tokens of every device, once per expert [W,L,D].
    mixed
        The same in full windows of mixed arrival; None where these are not counted.
    visits
        Tokens with an expert on the device [W,L,D]; estimated where only pairs of experts are
        known; ``load`` where neither sets nor pairs are, which is an upper bound.
    node_visits
        Tokens with an expert on the node [W,L,N]; None where not known.
    follow
        Pairs of neighbouring layers' experts by their devices [L-1,D,D]; None where not known.
    dispatch
        Rows from home device to the device of the expert [L,D,D], zero on the diagonal.
    active
        Experts of a device that have a token [W,L,D]; None where these are not counted.
    is_full_window
        True where a window has all of its tokens [W], as ``RoutingStatistics`` has it: means over
        windows are those of full ones.
    crossed
        For every token the share of its pairs of neighbouring layers' experts that are on different
        devices, summed over the tokens of a window [W]; None where these are not counted.
    lp_split_load
        Tokens of every device [L,D] if a linear programme splits those of all windows at once; None
        where that is the sum of ``load``.
    """

    tokens: int | None
    load: Numbers
    mixed: Numbers | None
    visits: Numbers
    node_visits: Numbers | None
    follow: Numbers | None
    dispatch: Numbers
    active: Numbers | None
    is_full_window: NDArray[np.bool_]
    crossed: Floats | None = None
    lp_split_load: Floats | None = None

    @property
    def total_load(self) -> Numbers:
        """Tokens of every device, summed over windows [L,D]."""
        return self.load.sum(axis=0) if self.lp_split_load is None else self.lp_split_load

    @cached_property
    def total_visits(self) -> Floats:
        """Visits of every device, summed over windows [L,D]; above 0, so that shares have them."""
        total: Floats = np.maximum(self.visits.sum(axis=0, dtype=np.float64), 1e-300)
        return total

    def select(self, windows: slice) -> Counts:
        """Return the counts of a run of windows; counts that have no windows stay as they are."""
        return replace(
            self,
            load=self.load[windows],
            mixed=None,
            visits=self.visits[windows],
            node_visits=None if self.node_visits is None else self.node_visits[windows],
            active=None if self.active is None else self.active[windows],
            is_full_window=self.is_full_window[windows],
        )


@dataclass(frozen=True)
class Setting:
    """A placement, how it is served, and how that is replayed.

    Parameters
    ----------
    placement, serving
        The placement, and how the model is served.
    options
        Settings of the replay.
    """

    placement: Placement
    serving: Serving
    options: ReplayOptions = field(default_factory=ReplayOptions)

    @property
    def topology(self) -> Topology:
        """The machine."""
        return self.serving.topology

    @property
    def window(self) -> int | None:
        """Tokens whose load is balanced together; None for all, or for windows that are given."""
        return self.serving.window

    def with_options(self, **options: Any) -> Setting:
        """Return the setting with other options of the replay."""
        return replace(self, options=replace(self.options, **options))

    @property
    def needs_active_experts(self) -> bool:
        """True if times depend on how many experts have tokens."""
        model = self.serving.cost_model
        return model is not None and model.expert_us > 0

    @property
    def counts_slots(self) -> bool:
        """True if a replay counts the tokens of every slot, which gives the active copies."""
        return self.needs_active_experts and self.placement.has_copies

    @property
    def takes_turns(self) -> bool:
        """True if the copy that serves a token depends on the tokens before."""
        return self.serving.rule.in_turns and self.placement.has_copies

    @property
    def has_lp_split(self) -> bool:
        """True if a dispatcher splits all tokens of a window at once, by a linear programme."""
        return self.serving.rule.needs_windows and self.placement.has_copies

    @property
    def slot_shares(self) -> Floats:
        """The share of its expert's tokens that every slot serves [L,D,S]."""
        return copies.compute_slot_shares(self.placement, self.topology, self.serving.split)

    def begin_replay(self, rows: RowReader, **options: Any) -> _core.Replay:
        """Begin a replay of rows of tokens; ``options`` are the core's."""
        split = self.serving.rule.token_rule
        nodes = self.topology.node_of_device.tolist()
        return rows.replay(self.placement.slots, nodes, split=split, **options)


def check_model(placement: Placement, traffic: Recording, topology: Topology) -> None:
    """Raise unless placement, traffic and topology are of one model and machine."""
    instance("placement", placement, Placement)
    check_recording(traffic)
    sizes = {
        "layer": (traffic.layers, placement.layers),
        "expert": (traffic.num_experts, placement.num_experts),
        "device": (topology.devices, placement.devices),
    }
    differing = {noun: pair for noun, pair in sizes.items() if pair[0] != pair[1]}
    if not differing:
        return
    expected = " and ".join(counted(size, noun) for noun, (size, _) in differing.items())
    actual = " and ".join(counted(size, noun) for noun, (_, size) in differing.items())
    like = "the input and topology" if "device" in differing else "the input"
    if list(differing) == ["device"]:
        like = "the topology"
    raise ValueError(f"placement must have {expected} like {like}, got {actual}")


def drop_groups(recording: Recording) -> Recording:
    """Return a trace without groups, so that none of them is replayed a second time by itself.

    Groups of counts stay: they tell which windows follow each other, and take no replay.
    """
    if not recording.ordered:
        return recording
    return replace(as_trace(recording), group=None, population=None)


def count_each(
    traffic: Recording,
    settings: Sequence[Setting],
    progress: Progress | None = None,
    order: Order | None = None,
) -> Iterator[dict[str | None, Counts]]:
    """Yield the counts under each setting, of all traffic (None) and of every group by itself.

    Settings differ in their placements and windows alone, and a trace is read once for all of them.
    Each window is as long as the shortest one, or several times as long. Tokens arrive in an
    ``order`` [T], by default as recorded. ``progress`` gets the share of the tokens that were read.
    """
    if isinstance(traffic, RoutingStatistics):
        yield from _expected_counts(traffic, settings)
        return
    if any(setting.has_lp_split for setting in settings):
        raise ArgumentError(
            f"traffic must be counts for split {settings[0].serving.split!r}, which divides "
            "windows and no single tokens: RoutingStatistics.from_trace(trace, window=512)",
            "traffic",
        )
    trace = as_trace(traffic)
    _check_table_bytes(trace, settings)
    if order is not None and any(setting.takes_turns for setting in settings):
        # Whose turn it is depends on the tokens before: they are read in the order of arrival.
        trace, order = trace.take(order), None
    replays = {
        group: _GroupReplay(trace, settings, rows, order)
        for group, rows in trace.group_rows().items()
    }
    readers = [reader for replay in replays.values() for reader in replay.readers]
    read(readers, threads=settings[0].options.threads, progress=progress)
    # Numbers and places of tokens take more memory than all counts, and are not read again.
    del readers
    for replay in replays.values():
        replay.readers.clear()
    for number in range(len(settings)):
        yield {group: replay.finish(number) for group, replay in replays.items()}


def _expected_counts(
    statistics: RoutingStatistics, settings: Sequence[Setting]
) -> Iterator[dict[str | None, Counts]]:
    """Yield the expected counts under each setting, of all windows (None) and of every group."""
    load, is_full_window = statistics.window_load, statistics.is_full_window
    for expected in (Expected(statistics, setting) for setting in settings):
        by_group = {
            group: replace(
                expected.counts(load[rows], is_full_window=is_full_window[rows]),
                lp_split_load=expected.count_lp_split_of_all(load[rows]),
            )
            for group, rows in statistics.group_rows().items()
        }
        # Tokens and pairs of experts are counted over all windows, not by group.
        yield {
            group: counts if group is None else replace(counts, tokens=None, follow=None)
            for group, counts in by_group.items()
        }


class _GroupReplay:
    """Replays of the tokens of a group, in the order in which they arrive, under all settings."""

    def __init__(
        self,
        trace: RoutingTrace,
        settings: Sequence[Setting],
        tokens: Integers,
        order: Order | None,
    ) -> None:
        self._settings, self._tokens = settings, len(tokens)
        # Longer windows are sums of the shortest ones.
        shortest = min(settings, key=lambda setting: setting.window or 0)
        self._window = shortest.window or max(len(tokens), 1)
        place = find_places(order, tokens)
        reader = RowReader.by_window(trace, tokens, self._window, place)
        self.readers = [reader]
        # Each placement is replayed once, under the number of its first setting.
        self._first = [_find_first(setting.placement, settings) for setting in settings]
        self._replays = {
            first: settings[first].begin_replay(
                reader, pairs=True, of_slots=settings[first].counts_slots
            )
            for first in dict.fromkeys(self._first)
        }
        self._tallies: dict[int, tuple[Numbers, ...]] = {}
        all_count_slots = all(setting.counts_slots for setting in settings)
        needs_active = shortest.needs_active_experts and not all_count_slots
        has_experts = needs_active or shortest.serving.rule.by_home
        self._experts = reader.count_experts() if has_experts else None
        self._expert_load: Numbers | None = None
        self._mixed: dict[int, _core.Replay] = {}
        self._mixed_loads: dict[int, Numbers] = {}
        is_mixed = any(setting.options.mixed for setting in settings)
        if is_mixed and len(tokens) > self._window:  # one window is the same in any order
            mixed_place = mix(trace.sequence, tokens, place, seed=shortest.options.mixed_seed)
            mixed = RowReader.by_window(trace, tokens, self._window, mixed_place)
            self.readers.append(mixed)
            for first in self._replays:
                # Where copies take turns, loads of devices follow from those of experts.
                self._mixed[first] = (
                    mixed.count_experts()
                    if settings[first].takes_turns
                    else settings[first].begin_replay(mixed, visits=False)
                )

    def finish(self, number: int) -> Counts:
        """Return the counts under the setting of a number; each can be asked for once, in order."""
        setting, first = self._settings[number], self._first[number]
        if first in self._replays:
            self._tallies[first] = self._replays.pop(first).finish()
        load, visits, node_visits, slot_load, follow, _ = self._tallies[first]
        if self._experts is not None:
            self._expert_load = self._experts.finish()[0]
            self._experts = None
        if first in self._mixed:
            self._mixed_loads[first] = self._mixed.pop(first).finish()[0]
        multiple = (setting.window or self._window) // self._window
        experts = None if self._expert_load is None else _sum_windows(self._expert_load, multiple)
        load, visits, node_visits, slot_load = (
            _sum_windows(table, multiple) for table in (load, visits, node_visits, slot_load)
        )
        mixed = load if setting.options.mixed else None
        if setting.options.mixed and first in self._mixed_loads:
            mixed = _sum_windows(self._mixed_loads[first], multiple)
            mixed = _split_in_turns(setting.placement, mixed) if setting.takes_turns else mixed
        if first not in self._first[number + 1 :]:
            del self._tallies[first]
        full_windows = max(self._tokens // (multiple * self._window), 1)
        dispatch, active = _count_by_experts(
            setting, setting.slot_shares, visits, experts, slot_load=slot_load
        )
        return Counts(
            tokens=self._tokens,
            load=load,
            mixed=None if mixed is None else mixed[:full_windows],
            visits=visits,
            node_visits=node_visits,
            follow=follow,
            dispatch=dispatch,
            active=active,
            is_full_window=np.arange(len(load)) < full_windows,
        )


def _find_first(placement: Placement, settings: Sequence[Setting]) -> int:
    """Return the number of the first setting of a placement."""
    return next(number for number, setting in enumerate(settings) if setting.placement is placement)


def _sum_windows(table: Numbers, multiple: int) -> Numbers:
    """Sum counts [W,...] over runs of ``multiple`` windows; the last run may have fewer."""
    if multiple == 1:
        return table
    kind = np.min_scalar_type(int(table.max(initial=0)) * multiple)
    sums: Numbers = np.add.reduceat(table, np.arange(0, len(table), multiple), 0, kind)
    return sums


def _split_in_turns(placement: Placement, load: Numbers) -> Numbers:
    """Compute loads of devices [W,L,D] from those of experts [W,L,E], where copies take turns.

    Tokens of an expert are numbered through all windows. Copy j of c serves the tokens whose number
    is j modulo c.
    """
    served = np.zeros((len(load), placement.layers, placement.devices), dtype=np.int64)
    for layer, slots in enumerate(placement.slots):
        after = np.cumsum(load[:, layer], axis=0, dtype=np.int64)
        before = after - load[:, layer]
        next_turn = np.zeros(placement.num_experts, dtype=np.int64)
        for device, slot in np.argwhere(slots != EMPTY):
            expert = slots[device, slot]
            turn, replicas = next_turn[expert], placement.replicas[layer, expert]
            next_turn[expert] += 1
            ends = [(tokens[:, expert] - 1 - turn) // replicas for tokens in (after, before)]
            served[:, layer, device] += ends[0] - ends[1]
    return served


def _count_by_experts(
    setting: Setting,
    share: Floats,
    visits: Numbers,
    load: Numbers | None,
    total: Numbers | None = None,
    slot_load: Numbers | None = None,
) -> tuple[Floats, Numbers | None]:
    """Return rows from homes [L,D,D] and active experts [W,L,D], which depend on experts' loads.

    Rows are summed over all windows; ``total`` [1,L,E] is the load of all where ``load`` [W,L,E] is
    that of some windows. A replay that counts slots, ``slot_load`` [W,L,D*S], gives active copies
    exactly; else they are estimated.
    """
    placement, topology, split = setting.placement, setting.topology, setting.serving.split
    total_load = load if total is None else total
    rows = copies.count_rows(placement, topology, split, visits.sum(axis=0), total_load)
    if slot_load is not None and setting.counts_slots:
        return rows, copies.count_busy_slots(placement, slot_load)
    if not setting.needs_active_experts or load is None:
        return rows, None
    return rows, copies.count_active_experts(placement, share, load)


class Expected:
    """Expected counts of a placement on load tables: copies take shares of the tokens."""

    def __init__(
        self,
        statistics: RoutingStatistics,
        setting: Setting,
        *,
        follows: bool = True,
        visits: tuple[Floats, Floats] | None = None,
    ) -> None:
        """Count visits and pairs; without ``follows`` leave out pairs of neighbouring layers.

        ``visits`` are those of devices [L,D] and nodes [L,N], if they have been counted before.
        """
        self._setting, self._share = setting, setting.slot_shares
        placement, topology, split = setting.placement, setting.topology, setting.serving.split
        self._follow: Floats | None = None
        if follows and statistics.transitions is not None:
            self._follow = copies.count_pairs(placement, topology, split, statistics.transitions)
        self._tokens: int | None = None
        # Visits for each token of load, of devices [L,D] and of nodes [L,N], alike in all windows.
        # None without sets and pairs: then a token visits a device for each of its experts.
        self._visits_per_load: tuple[Floats, Floats] | None = None
        if statistics.sets is not None:
            self._tokens = int(statistics.sets[0].counts.sum())
            device_visits, node_visits = visits or copies.count_visits(
                placement, topology, split, statistics.sets, setting.options.threads
            )
            load = copies.serve(placement, self._share, statistics.set_load[None])[0]
            by_node = sum_by_node(load, topology)
            self._visits_per_load = (
                _divide_or_zero(device_visits, load),
                _divide_or_zero(node_visits, by_node),
            )
        elif statistics.coactivation is not None and statistics.top_k_of_layer is not None:
            pairs, top_k = statistics.coactivation, statistics.top_k_of_layer
            self._visits_per_load = copies.estimate_visits_per_load(
                placement, topology, split, pairs, top_k, setting.options.threads
            )

    def counts(
        self,
        window_load: Numbers,
        total: Numbers | None = None,
        is_full_window: NDArray[np.bool_] | None = None,
    ) -> Counts:
        """Compute the expected counts of windows of load [W,L,E], all of them full by default.

        Where these are some of the windows, ``total`` [1,L,E] is the load of all.
        """
        setting, topology = self._setting, self._setting.topology
        load = self._serve(window_load)
        is_full_window = (
            np.ones(len(load), dtype=bool) if is_full_window is None else is_full_window
        )
        mixed = None
        if setting.options.mixed:
            windows = window_load if self._has_lp_split else load
            full_windows = windows if is_full_window.all() else windows[is_full_window]
            mixed = np.empty((len(full_windows), *load.shape[1:]))
            for place, drawn in mix_windows(full_windows, seed=setting.options.mixed_seed):
                mixed[place] = self._serve(drawn) if self._has_lp_split else drawn
        # A programme says how many tokens go where, not which: visits and rows assume even shares.
        even_load = load
        if self._has_lp_split:
            even_load = copies.serve(setting.placement, self._share, window_load)
        visits, node_visits = even_load, None
        if self._visits_per_load is not None:
            per_device, per_node = self._visits_per_load
            visits, node_visits = (
                even_load * per_device,
                sum_by_node(even_load, topology) * per_node,
            )
        dispatch, active = _count_by_experts(setting, self._share, visits, window_load, total)
        return Counts(
            tokens=self._tokens,
            load=load,
            mixed=mixed,
            visits=visits,
            node_visits=node_visits,
            follow=self._follow,
            dispatch=dispatch,
            active=active,
            is_full_window=is_full_window,
        )

    def count_lp_split_of_all(self, window_load: Numbers) -> Floats | None:
        """Compute tokens of devices [L,D] if a programme splits all windows [W,L,E] as one.

        None for other splits.
        """
        if not self._has_lp_split:
            return None
        total: Floats = self._serve(window_load.sum(axis=0, keepdims=True))[0]
        return total

    @property
    def _has_lp_split(self) -> bool:
        """True if a programme splits tokens over copies; else shares are alike in all windows."""
        return self._setting.has_lp_split

    def _serve(self, load: Numbers) -> Floats:
        """Compute tokens that devices serve [W,L,D] from those of experts [W,L,E]."""
        setting = self._setting
        return copies.count_loads(
            setting.placement, setting.topology, setting.serving.split, load, self._share
        )


def _divide_or_zero(part: Floats, total: Floats) -> Floats:
    """Return quotients, which are 0 where the total is 0."""
    return np.divide(part, total, out=np.zeros_like(part), where=total > 0)


def _check_table_bytes(trace: RoutingTrace, settings: Sequence[Setting]) -> None:
    """Raise if tables of counts do not fit memory."""
    window, topology = min(setting.window or 0 for setting in settings), settings[0].topology
    settings = list({id(setting.placement): setting for setting in settings}.values())
    windows = max(1, -(-trace.tokens // (window or max(trace.tokens, 1))))
    width = np.min_scalar_type((window or trace.tokens) * trace.top_k).itemsize
    # Load and visits of devices, visits of nodes, and load in mixed order; while they are put
    # together, some of it twice.
    columns = len(settings) * 2 * (2 * topology.devices + topology.nodes) + 2 * trace.num_experts
    columns += sum(setting.placement.slots[0].size for setting in settings if setting.counts_slots)
    # Once more for groups, whose windows add up to the trace's.
    size = width * windows * trace.layers * columns * (1 if trace.group is None else 2)
    if size > TABLE_LIMIT:
        raise ValueError(
            f"counts must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for {windows} "
            f"windows, {trace.layers} layers, {topology.devices} devices: make windows longer"
        )
