"""What a placement makes of traffic, in counts per window: replayed from a trace, or expected.

``evaluation`` turns these into figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import IdArray
from moetuner.evaluation import copies
from moetuner.evaluation import expected as expected_
from moetuner.evaluation.arrival import Arrival, mixed_order, mixed_windows
from moetuner.evaluation.blocks import by_block
from moetuner.evaluation.copies import Split
from moetuner.placement import EMPTY, Placement
from moetuner.statistics import TABLE_LIMIT, RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

# Bytes of a trace that are replayed at once: under all placements while they are in the cache.
SHARD_BYTES = 16 << 20

Numbers = NDArray[Any]
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
        The same in windows of mixed arrival [W,L,D]; None if not asked for.
    visits
        Tokens with an expert on the device [W,L,D]; ``load`` where experts of one token are not
        known, which is an upper bound.
    node_visits
        Tokens with an expert on the node [W,L,N]; None where not known.
    follow
        Pairs of neighbouring layers' experts by their devices [L-1,D,D]; None where not known.
    dispatch
        Rows from home to device of work [L,D,D], zero on the diagonal.
    active
        Experts of a device that have a token [W,L,D]; None if not asked for.
    """

    tokens: int | None
    load: Numbers
    mixed: Numbers | None
    visits: Numbers
    node_visits: Numbers | None
    follow: Numbers | None
    dispatch: Numbers
    active: Numbers | None

    def run(self, windows: slice) -> Counts:
        """Return the counts of some windows; what is of all windows together stays."""
        return replace(
            self,
            load=self.load[windows],
            mixed=None,
            visits=self.visits[windows],
            node_visits=None if self.node_visits is None else self.node_visits[windows],
            active=None if self.active is None else self.active[windows],
        )


@dataclass(frozen=True)
class Setting:
    """What stays the same for all traffic of one evaluation."""

    placement: Placement
    topology: Topology
    window: int | None
    split: Split
    with_active: bool
    threads: int | None
    with_mixed: bool = True
    mixed_seed: int = 0
    # For whoever replays what was replayed once more; what is replayed here is in its order.
    arrival: Arrival = "bursts"

    def replay(self, trace: RoutingTrace, *, pairs: bool) -> _core.Replay:
        """Begin to replay a trace like this one."""
        return _core.Replay(
            self.placement.slots,
            trace.num_experts,
            trace.top_k,
            self.topology.node_of_device.tolist(),
            window=self.window,
            split=self.split,
            pairs=pairs,
        )

    def labelled(
        self, trace: RoutingTrace, rows: int, most: int, *, visits: bool = True
    ) -> _core.LabelledReplay:
        """Begin to replay tokens of a trace like this one in rows of at most so many tokens."""
        return _core.LabelledReplay(
            self.placement.slots,
            trace.num_experts,
            trace.top_k,
            self.topology.node_of_device.tolist(),
            rows=rows,
            most=most,
            split=self.split,
            visits=visits,
        )

    @property
    def needs_experts(self) -> bool:
        """Whether loads of experts are needed beside those of devices."""
        return self.with_active or self.split == "nearest"


def of_trace(
    trace: RoutingTrace,
    settings: Sequence[Setting],
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[Counts, dict[str, Counts]]]:
    """Replay a trace once for all settings, which differ in their placements alone.

    Yields what was counted under each: of all of it, and of every group that has tokens by itself.
    ``progress`` gets the share of the tokens that were read.
    """
    _check_table_bytes(trace, settings)
    parts = [_Part(trace, settings, np.arange(trace.tokens))]
    names: list[str] = []
    if trace.group is not None:
        for number, name in enumerate(trace.group_names):
            mine = np.flatnonzero(trace.group == number)
            if mine.size:
                names.append(name)
                parts.append(_Part(trace, settings, mine))
    first = 0
    for shard in trace.shards(SHARD_BYTES, threads=settings[0].threads):
        for part in parts:
            part.push(shard, first)
        first += len(shard)
        if progress is not None:
            progress(first / trace.tokens)
        del shard  # else the next shard is read while this one is still held
    for number in range(len(settings)):
        whole, *groups = [part.finish(number) for part in parts]
        yield whole, dict(zip(names, groups, strict=True))


class _Part:
    """Some tokens of a trace under replay, for all settings.

    What placements have in common is counted once. Pairs of experts give those of devices where
    several placements have one copy of each. Loads of experts in windows of mixed arrival give
    those of devices where experts have one copy, or copies take turns.
    """

    def __init__(
        self, trace: RoutingTrace, settings: Sequence[Setting], tokens: NDArray[np.int64]
    ) -> None:
        self._trace, self._settings, self._tokens = trace, settings, tokens
        common = settings[0]
        single = [not setting.placement.has_copies for setting in settings]
        self._shares_pairs = sum(single) > 1 and trace.layers > 1
        self._replays = {
            number: setting.replay(trace, pairs=not (single[number] and self._shares_pairs))
            for number, setting in enumerate(settings)
        }
        needs_experts = any(setting.needs_experts for setting in settings)
        self._experts: _core.StatisticsCounter | None = None
        if needs_experts or self._shares_pairs:
            self._experts = _core.StatisticsCounter(
                trace.layers,
                trace.num_experts,
                trace.top_k,
                window=common.window if needs_experts else None,
                transitions=self._shares_pairs,
                coactivation=False,
            )
        self._window, self._place = common.window or 1, _mixed_places(trace, common, tokens)
        # Loads of devices in mixed order, by setting; those of experts (-1) serve the others.
        self._mixed: dict[int, _core.LabelledReplay] = {}
        if self._place is not None:
            rows = -(-len(tokens) // self._window)
            for number, setting in enumerate(settings):
                if not single[number] and setting.split != "round_robin":
                    self._mixed[number] = setting.labelled(trace, rows, self._window, visits=False)
            if len(self._mixed) < len(settings):
                self._mixed[-1] = _of_experts(trace, rows, self._window)

    def push(self, shard: IdArray, first: int) -> None:
        """Replay those of a shard's tokens that are of this part."""
        begin, end = np.searchsorted(self._tokens, [first, first + len(shard)])
        if begin == end:
            return
        mine = shard if end - begin == len(shard) else shard[self._tokens[begin:end] - first]
        threads, checked = self._settings[0].threads, self._trace.ids.fresh
        for replay in self._replays.values():
            replay.push(mine, threads, checked=checked)
            checked = True
        if self._experts is not None:
            self._experts.push(mine, threads, checked=True)
        if self._place is not None:
            place = self._place[begin:end]
            window = (place // self._window).astype(np.uint32)
            for mixed in self._mixed.values():
                mixed.push(mine, window, threads, positions=place, checked=True)

    def finish(self, number: int) -> Counts:
        """Return what was counted under a setting, once."""
        setting = self._settings[number]
        tokens, load, follow, visits, node_visits = self._replays.pop(number).finish()
        expert_load, transitions = self._counted
        if self._shares_pairs and not setting.placement.has_copies:
            assert transitions is not None
            placement, topology, split = setting.placement, setting.topology, setting.split
            follow = expected_.followed(placement, topology, split, transitions).astype(np.uint64)
        mixed = None
        if setting.with_mixed:  # one window is the same in any order
            mixed = load if self._place is None else self._mixed_load(number)
        return Counts(
            tokens=tokens,
            load=load,
            mixed=mixed,
            visits=visits,
            node_visits=node_visits,
            follow=follow,
            dispatch=expected_.dispatched(
                setting.placement, setting.topology, setting.split, visits.sum(axis=0), expert_load
            ),
            active=_active(setting, expert_load),
        )

    @cached_property
    def _counted(self) -> tuple[Numbers | None, Numbers | None]:
        """Loads of experts [W,L,E] and their transitions [L-1,E,E], where they were counted."""
        if self._experts is None:
            return None, None
        _, load, transitions, _, _ = self._experts.finish(self._settings[0].threads)
        return load, transitions

    @cached_property
    def _mixed_experts(self) -> Numbers:
        """Loads of experts in windows of mixed arrival [L,W,E]."""
        return self._mixed.pop(-1).finish()[0]

    def _mixed_load(self, number: int) -> Numbers:
        """Return loads of devices in windows of mixed arrival [W,L,D] under a setting."""
        if number in self._mixed:
            return self._mixed.pop(number).finish()[0].transpose(1, 0, 2)
        setting = self._settings[number]
        if setting.placement.has_copies:
            return _in_turns(setting.placement, self._mixed_experts)
        share = copies.slot_shares(setting.placement, setting.topology, setting.split)

        def served(load: Numbers) -> Numbers:
            of_devices = copies.served(setting.placement, share, load)
            return of_devices.astype(np.min_scalar_type(int(of_devices.max(initial=0))))

        return by_block(self._mixed_experts.transpose(1, 0, 2), served)


def _mixed_places(
    trace: RoutingTrace, setting: Setting, tokens: NDArray[np.int64]
) -> NDArray[np.uint64] | None:
    """Return the places of tokens [t] in mixed order, None if they are not asked for.

    Nor are they if all tokens share a window.
    """
    if not setting.with_mixed or setting.window is None or len(tokens) <= setting.window:
        return None
    sequence = None if trace.sequence is None else trace.sequence[tokens]
    place = np.empty(len(tokens), dtype=np.uint64)
    order = mixed_order(sequence, len(tokens), seed=setting.mixed_seed)
    place[order] = np.arange(len(tokens), dtype=np.uint64)
    return place


def _of_experts(trace: RoutingTrace, rows: int, most: int) -> _core.LabelledReplay:
    """Begin to count loads of experts by rows: of a placement with a device for each."""
    experts = np.arange(trace.num_experts, dtype=np.int32)
    slots = np.tile(experts[None, :, None], (trace.layers, 1, 1))
    nodes = [0] * trace.num_experts
    return _core.LabelledReplay(
        slots, trace.num_experts, trace.top_k, nodes, rows=rows, most=most, visits=False
    )


def _active(setting: Setting, expert_load: Numbers | None) -> Numbers | None:
    """Count experts with a token [W,L,D] if they are asked for."""
    if not setting.with_active:
        return None
    assert expert_load is not None
    share = copies.slot_shares(setting.placement, setting.topology, setting.split)
    return expected_.active(setting.placement, share, expert_load)


def _in_turns(placement: Placement, load: Numbers) -> Numbers:
    """Return loads of devices [W,L,D] whose copies take turns, of loads of experts [L,W,E].

    Of the n tokens of a window that come after s others, the j-th of c copies serves those whose
    number is j modulo c.
    """
    served = np.zeros((load.shape[1], placement.layers, placement.devices), dtype=np.int64)
    for layer, slots in enumerate(placement.slots):
        after = np.cumsum(load[layer], axis=0, dtype=np.int64)
        before = after - load[layer]
        seen = np.zeros(placement.num_experts, dtype=np.int64)
        for device, slot in np.argwhere(slots != EMPTY):
            expert = slots[device, slot]
            turn, of = seen[expert], placement.replicas[layer, expert]
            seen[expert] += 1
            ends = [(tokens[:, expert] - 1 - turn) // of for tokens in (after, before)]
            served[:, layer, device] += ends[0] - ends[1]
    return served


def of_statistics(
    statistics: RoutingStatistics, setting: Setting
) -> tuple[Counts, dict[str, Counts]]:
    """Compute what counts lead one to expect, of all windows and of every group that has some."""
    expected = Expected(statistics, setting)
    whole = expected.counts(statistics.window_load)
    groups = {}
    if statistics.group is not None:
        for number, name in enumerate(statistics.group_names):
            mine = statistics.group == number
            if mine.any():
                # Which experts meet, in which layers, is only known of all windows together.
                part = expected.counts(statistics.window_load[mine])
                groups[name] = replace(part, tokens=None, follow=None)
    return whole, groups


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
        self._setting = setting
        topology = setting.topology
        self._share = copies.slot_shares(setting.placement, topology, setting.split)
        self._follow: Floats | None = None
        if follows and statistics.transitions is not None:
            self._follow = expected_.followed(
                setting.placement, topology, setting.split, statistics.transitions
            )
        self._tokens: int | None = None
        if statistics.sets is not None:
            self._tokens = int(statistics.sets[0].counts.sum())
            placement, sets = setting.placement, statistics.sets
            of_devices, of_nodes = visits or expected_.visits(
                placement, topology, setting.split, sets, setting.threads
            )
            load = copies.served(placement, self._share, statistics.set_load[None])[0]
            # Visits for each token of load: in every window as in all.
            self._met = _ratio(of_devices, load)
            self._met_nodes = _ratio(of_nodes, _of_nodes(load, topology))

    def counts(self, window_load: Numbers, total: Numbers | None = None) -> Counts:
        """Compute the expected counts of windows of load [W,L,E].

        Where these are a part of all windows, ``total`` has the load of all [1,L,E].
        """
        setting, topology = self._setting, self._setting.topology
        load = copies.served(setting.placement, self._share, window_load)
        mixed = None
        if setting.with_mixed:
            mixed = np.empty_like(load)
            for place, windows in mixed_windows(load, seed=setting.mixed_seed):
                mixed[place] = windows
        visits, node_visits = load, None
        if self._tokens is not None:
            visits, node_visits = load * self._met, _of_nodes(load, topology) * self._met_nodes
        return Counts(
            tokens=self._tokens,
            load=load,
            mixed=mixed,
            visits=visits,
            node_visits=node_visits,
            follow=self._follow,
            dispatch=expected_.dispatched(
                setting.placement,
                topology,
                setting.split,
                visits.sum(axis=0),
                window_load if total is None else total,
            ),
            active=None
            if not setting.with_active
            else expected_.active(setting.placement, self._share, window_load),
        )


def _of_nodes(load: Floats, topology: Topology) -> Floats:
    """Load of nodes [...,N] of that of devices [...,D]."""
    parts = load.reshape(*load.shape[:-1], topology.nodes, topology.node_size)
    total: Floats = parts.sum(axis=-1)
    return total


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _check_table_bytes(trace: RoutingTrace, settings: Sequence[Setting]) -> None:
    window, topology = settings[0].window, settings[0].topology
    windows = 1 if window is None else max(1, -(-trace.tokens // max(window, 1)))
    width = np.min_scalar_type((window or trace.tokens) * trace.top_k).itemsize
    # Load and visits of devices, visits of nodes, and load in mixed order; while they are put
    # together, some of it twice.
    columns = len(settings) * 2 * (2 * topology.devices + topology.nodes)
    columns += 2 * trace.num_experts
    # Once more for groups, whose windows add up to the trace's.
    size = width * windows * trace.layers * columns * (1 if trace.group is None else 2)
    if size > TABLE_LIMIT:
        raise ValueError(
            f"counts must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for {windows} "
            f"windows, {trace.layers} layers, {topology.devices} devices: make windows longer"
        )
