"""What a placement makes of traffic, in counts per window: replayed from a trace, or expected.

``evaluation`` turns these into figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import IdArray
from moetuner.evaluation import copies
from moetuner.evaluation import expected as expected_
from moetuner.evaluation.arrival import mixed_order, mixed_windows
from moetuner.evaluation.copies import Split
from moetuner.placement import Placement
from moetuner.statistics import TABLE_LIMIT, ExpertSets, RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

# Tokens that are fetched at once in an order other than the trace's.
FETCH = 1 << 16

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
    active: Floats | None


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

    @property
    def needs_experts(self) -> bool:
        """Whether loads of experts are needed beside those of devices."""
        return self.with_active or self.split == "nearest"


def of_trace(trace: RoutingTrace, setting: Setting) -> tuple[Counts, dict[str, Counts]]:
    """Replay a trace: all of it, and every group that has tokens by itself."""
    _check_table_bytes(trace, setting)
    parts = [_Part(trace, setting, np.arange(trace.tokens))]
    names: list[str] = []
    if trace.group is not None:
        for number, name in enumerate(trace.group_names):
            mine = np.flatnonzero(trace.group == number)
            if mine.size:
                names.append(name)
                parts.append(_Part(trace, setting, mine))
    first = 0
    for shard in trace.shards(threads=setting.threads):
        for part in parts:
            part.push(shard, first)
        first += len(shard)
    whole, *groups = [part.finish() for part in parts]
    return whole, dict(zip(names, groups, strict=True))


class _Part:
    """Some tokens of a trace under replay."""

    def __init__(self, trace: RoutingTrace, setting: Setting, tokens: NDArray[np.int64]) -> None:
        self._trace, self._setting, self._tokens = trace, setting, tokens
        self._replay = setting.replay(trace, pairs=True)
        self._experts: _core.StatisticsCounter | None = None
        if setting.needs_experts:
            self._experts = _core.StatisticsCounter(
                trace.layers,
                trace.num_experts,
                trace.top_k,
                window=setting.window,
                transitions=False,
                coactivation=False,
            )

    def push(self, shard: IdArray, first: int) -> None:
        """Replay those of a shard's tokens that are of this part."""
        begin, end = np.searchsorted(self._tokens, [first, first + len(shard)])
        if begin == end:
            return
        mine = shard if end - begin == len(shard) else shard[self._tokens[begin:end] - first]
        self._replay.push(mine, self._setting.threads, checked=self._trace.ids.fresh)
        if self._experts is not None:
            self._experts.push(mine, self._setting.threads, checked=True)

    def finish(self) -> Counts:
        """Return what was counted, once replayed in mixed order too."""
        setting = self._setting
        tokens, load, follow, visits, node_visits = self._replay.finish()
        expert_load = None if self._experts is None else self._experts.finish(setting.threads)[1]
        return Counts(
            tokens=tokens,
            load=load,
            mixed=self._mixed(load) if setting.with_mixed else None,
            visits=visits,
            node_visits=node_visits,
            follow=follow,
            dispatch=expected_.dispatched(
                setting.placement, setting.topology, setting.split, visits.sum(axis=0), expert_load
            ),
            active=None if not setting.with_active else self._active(expert_load),
        )

    def _active(self, expert_load: Numbers | None) -> Floats:
        assert expert_load is not None
        setting = self._setting
        share = copies.slot_shares(setting.placement, setting.topology, setting.split)
        return expected_.active(setting.placement, share, expert_load)

    def _mixed(self, load: Numbers) -> Numbers:
        """Replay in mixed order; one window is the same in any order."""
        if len(load) == 1:
            return load
        setting, sequence = self._setting, self._trace.sequence
        mine = None if sequence is None else sequence[self._tokens]
        order = self._tokens[mixed_order(mine, len(self._tokens), seed=setting.mixed_seed)]
        ids = self._trace.expert_ids
        replay = setting.replay(self._trace, pairs=False)
        for at in range(0, len(order), FETCH):
            part = cast(IdArray, np.ascontiguousarray(ids[order[at : at + FETCH]]))
            replay.push(part, setting.threads)
        return replay.finish()[1]


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


class Counted(Protocol):
    """Counts of all windows together, as ``RoutingStatistics`` has them."""

    @property
    def total_load(self) -> NDArray[np.uint64]:
        """Load [L,E]."""
        ...

    @property
    def transitions(self) -> NDArray[np.uint64] | None:
        """Pairs of neighbouring layers [L-1,E,E]."""
        ...

    @property
    def sets(self) -> tuple[ExpertSets, ...] | None:
        """Expert sets, layer by layer."""
        ...


class Expected:
    """A placement under traffic of which there are counts: copies take shares of the tokens."""

    def __init__(
        self,
        statistics: Counted,
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
            placement = setting.placement
            of_devices, of_nodes = visits or expected_.visits(
                placement, self._share, statistics.sets, topology.node_of_device, setting.threads
            )
            load = copies.served(placement, self._share, statistics.total_load[None])[0]
            # Visits for each token of load: in every window as in all.
            self._met = _ratio(of_devices, load)
            self._met_nodes = _ratio(of_nodes, _of_nodes(load, topology))

    def counts(self, window_load: Numbers) -> Counts:
        """Compute the expected counts of windows of load [W,L,E]."""
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
                setting.placement, topology, setting.split, visits.sum(axis=0), window_load
            ),
            active=(
                expected_.active(setting.placement, self._share, window_load)
                if setting.with_active
                else None
            ),
        )


def _of_nodes(load: Floats, topology: Topology) -> Floats:
    """Load of nodes [...,N] of that of devices [...,D]."""
    parts = load.reshape(*load.shape[:-1], topology.nodes, topology.node_size)
    total: Floats = parts.sum(axis=-1)
    return total


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _check_table_bytes(trace: RoutingTrace, setting: Setting) -> None:
    window = setting.window
    windows = 1 if window is None else max(1, -(-trace.tokens // max(window, 1)))
    # Load and visits of devices, visits of nodes, twice: in both arrivals.
    columns = 2 * (2 * setting.topology.devices + setting.topology.nodes)
    columns += trace.num_experts if setting.needs_experts else 0
    # Once more for groups, whose windows add up to the trace's.
    size = 8 * windows * trace.layers * columns * (1 if trace.group is None else 2)
    if size > TABLE_LIMIT:
        raise ValueError(
            f"counts must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for {windows} "
            f"windows, {trace.layers} layers, {setting.topology.devices} devices: make windows "
            "longer"
        )
