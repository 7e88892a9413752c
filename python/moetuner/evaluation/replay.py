"""Counts of a placement on traffic, by window: replayed from a trace, or expected of statistics.

``figures`` turns these into figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import ArgumentError, instance
from moetuner.evaluation import copies
from moetuner.evaluation.arrival import Order, find_places, mix, mix_windows
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import Progress, Rows, read
from moetuner.placement import EMPTY, Placement
from moetuner.recording import Recording
from moetuner.serving import Serving
from moetuner.statistics import TABLE_LIMIT, RoutingStatistics, check_recording
from moetuner.topology import Topology
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
        Tokens of the traffic; None where it is not known.
    load
        Tokens of every device, once per expert [W,L,D].
    mixed
        The same in windows of mixed arrival, those that are steps; None if not asked for.
    visits
        Tokens with an expert on the device [W,L,D]; estimated where only pairs of experts are
        known; ``load`` where neither sets nor pairs are, which is an upper bound.
    node_visits
        Tokens with an expert on the node [W,L,N]; None where not known.
    follow
        Pairs of neighbouring layers' experts by their devices [L-1,D,D]; None where not known.
    dispatch
        Rows from home to device of work [L,D,D], zero on the diagonal.
    active
        Experts of a device that have a token [W,L,D]; None if not asked for.
    is_full_window
        Whether a window has all of its tokens [W], as ``RoutingStatistics.is_step`` has it: means
        over windows are those of full ones.
    crossed
        Sums over the tokens of a window of the share of each one's pairs of neighbouring layers'
        experts that are on different devices [W]; None where not asked for.
    divided_load
        Tokens of every device [L,D] if a linear programme divides those of all windows at once;
        None where that is the sum of ``load``.
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
    divided_load: Floats | None = None

    @property
    def total_load(self) -> Numbers:
        """Tokens of every device of all windows together [L,D]."""
        return self.load.sum(axis=0) if self.divided_load is None else self.divided_load

    def select(self, windows: slice) -> Counts:
        """Return the counts of a run of windows; counts of all windows together stay."""
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
        What is replayed, and how the model is served.
    options
        How it is replayed.
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

    def in_windows(self, window: int | None) -> Setting:
        """Return the same in windows of so many tokens."""
        return replace(self, serving=replace(self.serving, window=window))

    def with_options(self, **options: Any) -> Setting:
        """Return the same, replayed otherwise."""
        return replace(self, options=replace(self.options, **options))

    @property
    def with_active(self) -> bool:
        """Whether times depend on how many experts have tokens."""
        model = self.serving.cost_model
        return model is not None and model.expert_us > 0

    @property
    def counts_slots(self) -> bool:
        """Whether a replay counts the tokens of every slot: which copies have any is seen there."""
        return self.with_active and self.placement.has_copies

    @property
    def takes_turns(self) -> bool:
        """Whether the copy that serves a token depends on the tokens before."""
        return self.serving.rule.in_turns and self.placement.has_copies

    @property
    def divides(self) -> bool:
        """Whether a dispatcher divides the tokens of a window over copies, and none by itself."""
        return self.serving.rule.needs_windows and self.placement.has_copies

    @property
    def slot_shares(self) -> Floats:
        """The share of its expert's tokens that every slot serves [L,D,S]."""
        return copies.compute_slot_shares(self.placement, self.topology, self.serving.split)

    def begin_replay(self, rows: Rows, **wanted: Any) -> _core.Replay:
        """Begin to replay tokens in their rows; ``wanted`` is as for the core."""
        split = self.serving.rule.token_rule
        nodes = self.topology.node_of_device.tolist()
        return rows.replay(self.placement.slots, nodes, split=split, **wanted)


def check_model(placement: Placement, traffic: Recording, topology: Topology) -> None:
    """Raise unless placement, traffic and topology are of one model and machine."""
    instance("placement", placement, Placement)
    check_recording(traffic)
    expected = (traffic.layers, traffic.num_experts, topology.devices)
    actual = (placement.layers, placement.num_experts, placement.devices)
    if actual != expected:
        nouns = ("layer", "expert", "device")
        differ = [at for at in range(len(nouns)) if actual[at] != expected[at]]
        texts = [
            " and ".join(
                f"{sizes[at]:,} {nouns[at]}{'' if sizes[at] == 1 else 's'}" for at in differ
            )
            for sizes in (expected, actual)
        ]
        like = (
            "the topology"
            if differ == [2]
            else "the input and topology"
            if 2 in differ
            else "the input"
        )
        raise ValueError(f"placement must have {texts[0]} like {like}, got {texts[1]}")


# What files hold: one of the two.


def drop_groups(recording: Recording) -> Recording:
    """Return traffic of which no group is replayed by itself: each is replayed once more.

    Groups of counts stay: they say which windows follow each other, and take no replay.
    """
    return replace(as_trace(recording), group=None) if recording.ordered else recording


def count_each(
    traffic: Recording,
    settings: Sequence[Setting],
    progress: Progress | None = None,
    order: Order | None = None,
) -> Iterator[dict[str | None, Counts]]:
    """Count traffic, once for all settings, which differ in their placements and windows alone.

    Windows of a trace are as long as the shortest of them or several times that, and are of its
    tokens as they arrive in an ``order`` [T], by default as recorded. Yields what was counted under
    each, of all rows, a group by itself. ``progress`` gets the share of a trace's tokens that were
    read.
    """
    if isinstance(traffic, RoutingStatistics):
        yield from _expected_counts(traffic, settings)
        return
    if any(each.divides for each in settings):
        raise ArgumentError(
            f"traffic must be counts for split {settings[0].serving.split!r}, which divides "
            "windows and no single tokens: RoutingStatistics.from_trace(trace, window=512)",
            "traffic",
        )
    trace = as_trace(traffic)
    _check_table_bytes(trace, settings)
    if order is not None and any(each.takes_turns for each in settings):
        # Whose turn it is depends on the tokens before: they are read in the order of arrival.
        trace, order = trace.take(order), None
    parts = {
        group: _GroupReplay(trace, settings, rows, order)
        for group, rows in trace.group_rows().items()
    }
    readers = [rows for part in parts.values() for rows in part.readers]
    read(readers, threads=settings[0].options.threads, progress=progress)
    for number in range(len(settings)):
        yield {group: part.finish(number) for group, part in parts.items()}


def _expected_counts(
    statistics: RoutingStatistics, settings: Sequence[Setting]
) -> Iterator[dict[str | None, Counts]]:
    """Yield what is expected under each setting, of all windows and of every group."""
    load, is_full_window = statistics.window_load, statistics.is_step
    for expected in (Expected(statistics, setting) for setting in settings):
        by_group = {
            group: replace(
                expected.counts(load[rows], is_full_window=is_full_window[rows]),
                divided_load=expected.divide_all(load[rows]),
            )
            for group, rows in statistics.group_rows().items()
        }
        # Which experts meet, in which layers, is only known of all windows together.
        yield {
            group: counts if group is None else replace(counts, tokens=None, follow=None)
            for group, counts in by_group.items()
        }


class _GroupReplay:
    """Some tokens of a trace under replay, in the order in which they arrive, for all settings."""

    def __init__(
        self,
        trace: RoutingTrace,
        settings: Sequence[Setting],
        tokens: Integers,
        order: Order | None,
    ) -> None:
        self._settings, self._tokens = settings, tokens
        # Longer windows are sums of the shortest ones.
        one = min(settings, key=lambda each: each.window or 0)
        self._window = one.window or max(len(tokens), 1)
        place = find_places(order, tokens)
        rows = Rows.by_window(trace, tokens, self._window, place)
        self.readers = [rows]
        # Of each placement once, whatever the windows.
        self._at = [_find_first(each.placement, settings) for each in settings]
        self._replays = {
            at: settings[at].begin_replay(rows, pairs=True, of_slots=settings[at].counts_slots)
            for at in dict.fromkeys(self._at)
        }
        self._tallies: dict[int, tuple[Numbers, ...]] = {}
        counts_all = all(each.counts_slots for each in settings)
        has_experts = (one.with_active and not counts_all) or one.serving.rule.by_home
        self._experts = rows.count_experts() if has_experts else None
        self._expert_load: Numbers | None = None
        self._mixed: dict[int, _core.Replay] = {}
        self._mixed_loads: dict[int, Numbers] = {}
        is_mixed = any(each.options.mixed for each in settings)
        if is_mixed and len(tokens) > self._window:  # one window is the same in any order
            mixed_place = mix(trace.sequence, tokens, place, seed=one.options.mixed_seed)
            mixed = Rows.by_window(trace, tokens, self._window, mixed_place)
            self.readers.append(mixed)
            for at in self._replays:
                # Where copies take turns, loads of experts tell those of devices.
                self._mixed[at] = (
                    mixed.count_experts()
                    if settings[at].takes_turns
                    else settings[at].begin_replay(mixed, visits=False)
                )

    def finish(self, number: int) -> Counts:
        """Return what was counted under a setting, once."""
        setting, at = self._settings[number], self._at[number]
        if at in self._replays:
            self._tallies[at] = self._replays.pop(at).finish()
        load, visits, node_visits, of_slots, follow, _ = self._tallies[at]
        if self._experts is not None:
            self._expert_load = self._experts.finish()[0]
            self._experts = None
        if at in self._mixed:
            self._mixed_loads[at] = self._mixed.pop(at).finish()[0]
        times = (setting.window or self._window) // self._window
        experts = None if self._expert_load is None else _sum_windows(self._expert_load, times)
        load, visits, node_visits, of_slots = (
            _sum_windows(table, times) for table in (load, visits, node_visits, of_slots)
        )
        mixed = load if setting.options.mixed else None
        if setting.options.mixed and at in self._mixed_loads:
            mixed = _sum_windows(self._mixed_loads[at], times)
            mixed = _split_in_turns(setting.placement, mixed) if setting.takes_turns else mixed
        if at not in self._at[number + 1 :]:
            del self._tallies[at]
        steps = max(len(self._tokens) // (times * self._window), 1)
        dispatch, active = _count_by_experts(
            setting, setting.slot_shares, visits, experts, of_slots=of_slots
        )
        return Counts(
            tokens=len(self._tokens),
            load=load,
            mixed=None if mixed is None else mixed[:steps],
            visits=visits,
            node_visits=node_visits,
            follow=follow,
            dispatch=dispatch,
            active=active,
            is_full_window=np.arange(len(load)) < steps,
        )


def _find_first(placement: Placement, settings: Sequence[Setting]) -> int:
    """Return the number of the first setting of a placement."""
    return next(at for at, each in enumerate(settings) if each.placement is placement)


def _sum_windows(table: Numbers, times: int) -> Numbers:
    """Add up counts of so many windows after each other [W,...]; the last are of what is left."""
    if times == 1:
        return table
    kind = np.min_scalar_type(int(table.max(initial=0)) * times)
    joined: Numbers = np.add.reduceat(table, np.arange(0, len(table), times), 0, kind)
    return joined


def _split_in_turns(placement: Placement, load: Numbers) -> Numbers:
    """Return loads of devices [W,L,D] whose copies take turns, of loads of experts [W,L,E].

    Of the n tokens of a window that come after s others, the j-th of c copies serves those whose
    number is j modulo c.
    """
    served = np.zeros((len(load), placement.layers, placement.devices), dtype=np.int64)
    for layer, slots in enumerate(placement.slots):
        after = np.cumsum(load[:, layer], axis=0, dtype=np.int64)
        before = after - load[:, layer]
        turn_of = np.zeros(placement.num_experts, dtype=np.int64)
        for device, slot in np.argwhere(slots != EMPTY):
            expert = slots[device, slot]
            turn, replicas = turn_of[expert], placement.replicas[layer, expert]
            turn_of[expert] += 1
            ends = [(tokens[:, expert] - 1 - turn) // replicas for tokens in (after, before)]
            served[:, layer, device] += ends[0] - ends[1]
    return served


def _count_by_experts(
    setting: Setting,
    share: Floats,
    visits: Numbers,
    load: Numbers | None,
    total: Numbers | None = None,
    of_slots: Numbers | None = None,
) -> tuple[Floats, Numbers | None]:
    """Return rows from homes [L,D,D] and active experts [W,L,D], which loads of experts decide.

    Homes are of all windows together: their load is ``total`` [1,L,E] where ``load`` [W,L,E] is of
    some of them. Which copies are active is seen where ``of_slots`` [W,L,D*S] were replayed.
    """
    placement, topology, split = setting.placement, setting.topology, setting.serving.split
    of_all = load if total is None else total
    rows = copies.count_rows(placement, topology, split, visits.sum(axis=0), of_all)
    if of_slots is not None and setting.counts_slots:
        return rows, copies.count_busy_slots(placement, of_slots)
    if not setting.with_active or load is None:
        return rows, None
    return rows, copies.count_active_experts(placement, share, load)


class Expected:
    """A placement under traffic of which there are counts: copies take shares of the tokens."""

    def __init__(
        self,
        statistics: RoutingStatistics,
        setting: Setting,
        *,
        follows: bool = True,
        visits: tuple[Floats, Floats] | None = None,
    ) -> None:
        """Without ``follows`` leave out pairs of neighbouring layers.

        ``visits`` of devices [L,D] and nodes [L,N] are counted unless they are known.
        """
        self._setting, self._share = setting, setting.slot_shares
        placement, topology, split = setting.placement, setting.topology, setting.serving.split
        self._follow: Floats | None = None
        if follows and statistics.transitions is not None:
            self._follow = copies.count_pairs(placement, topology, split, statistics.transitions)
        self._tokens: int | None = None
        # Visits for each token of load, of devices [L,D] and of nodes [L,N]: in every window as in
        # all. None where nothing tells them: then a token visits one for each of its experts.
        self._met: tuple[Floats, Floats] | None = None
        if statistics.sets is not None:
            self._tokens = int(statistics.sets[0].counts.sum())
            of_devices, of_nodes = visits or copies.count_visits(
                placement, topology, split, statistics.sets, setting.options.threads
            )
            load = copies.serve(placement, self._share, statistics.set_load[None])[0]
            by_node = _sum_by_node(load, topology)
            self._met = _divide_or_zero(of_devices, load), _divide_or_zero(of_nodes, by_node)
        elif statistics.coactivation is not None and statistics.top_k_of_layer is not None:
            pairs, top_k = statistics.coactivation, statistics.top_k_of_layer
            self._met = copies.estimate_visits_per_load(
                placement, topology, split, pairs, top_k, setting.options.threads
            )

    def counts(
        self,
        window_load: Numbers,
        total: Numbers | None = None,
        is_full_window: NDArray[np.bool_] | None = None,
    ) -> Counts:
        """Compute the expected counts of windows of load [W,L,E], all of them steps by default.

        Where these are a part of all windows, ``total`` has the load of all [1,L,E].
        """
        setting, topology = self._setting, self._setting.topology
        load = self._serve(window_load)
        is_full_window = (
            np.ones(len(load), dtype=bool) if is_full_window is None else is_full_window
        )
        mixed = None
        if setting.options.mixed:
            windows = window_load if self._divides else load
            steps = windows if is_full_window.all() else windows[is_full_window]
            mixed = np.empty((len(steps), *load.shape[1:]))
            for place, drawn in mix_windows(steps, seed=setting.options.mixed_seed):
                mixed[place] = self._serve(drawn) if self._divides else drawn
        # Which tokens a programme sends where is not known: visits and rows are of even shares.
        shared = load
        if self._divides:
            shared = copies.serve(setting.placement, self._share, window_load)
        visits, node_visits = shared, None
        if self._met is not None:
            of_devices, of_nodes = self._met
            visits, node_visits = shared * of_devices, _sum_by_node(shared, topology) * of_nodes
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

    def divide_all(self, window_load: Numbers) -> Floats | None:
        """Return tokens of devices [L,D] if a programme divides windows [W,L,E] as one, or None."""
        if not self._divides:
            return None
        total: Floats = self._serve(window_load.sum(axis=0, keepdims=True))[0]
        return total

    @property
    def _divides(self) -> bool:
        """Whether a programme divides tokens over copies; else shares are alike in all windows."""
        return self._setting.divides

    def _serve(self, load: Numbers) -> Floats:
        """Return tokens that devices serve [W,L,D], of those of experts [W,L,E]."""
        setting = self._setting
        return copies.count_loads(
            setting.placement, setting.topology, setting.serving.split, load, self._share
        )


def _sum_by_node(load: Floats, topology: Topology) -> Floats:
    """Add up the load of nodes [...,N] from that of devices [...,D]."""
    parts = load.reshape(*load.shape[:-1], topology.nodes, topology.node_size)
    total: Floats = parts.sum(axis=-1)
    return total


def _divide_or_zero(part: Floats, total: Floats) -> Floats:
    """Divide where the total is above 0; elsewhere the quotient is 0."""
    return np.divide(part, total, out=np.zeros_like(part), where=total > 0)


def _check_table_bytes(trace: RoutingTrace, settings: Sequence[Setting]) -> None:
    window, topology = min(each.window or 0 for each in settings), settings[0].topology
    settings = list({id(each.placement): each for each in settings}.values())
    windows = max(1, -(-trace.tokens // (window or max(trace.tokens, 1))))
    width = np.min_scalar_type((window or trace.tokens) * trace.top_k).itemsize
    # Load and visits of devices, visits of nodes, and load in mixed order; while they are put
    # together, some of it twice.
    columns = len(settings) * 2 * (2 * topology.devices + topology.nodes) + 2 * trace.num_experts
    columns += sum(each.placement.slots[0].size for each in settings if each.counts_slots)
    # Once more for groups, whose windows add up to the trace's.
    size = width * windows * trace.layers * columns * (1 if trace.group is None else 2)
    if size > TABLE_LIMIT:
        raise ValueError(
            f"counts must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for {windows} "
            f"windows, {trace.layers} layers, {topology.devices} devices: make windows longer"
        )
