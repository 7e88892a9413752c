"""Measures of a placement window by window, and the sequence that each window belongs to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner import _counts, _figures
from moetuner._counts import Counts, Rules
from moetuner._figures import Regime
from moetuner.cost import CostModel
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace
from moetuner.traffic import copies, mixed

Floats = NDArray[np.float64]

# Tokens whose pairs are compared at once.
AT_ONCE = 1 << 11


# By name, numerators and denominators [W]: their sums, divided, are the figure.
Measures = dict[str, tuple[Floats, Floats]]


def of_traffic(
    traffic: RoutingTrace | RoutingStatistics,
    rules: Rules,
    model: CostModel | None,
    regime: Regime,
) -> dict[str | None, Measures]:
    """Give measures per window of all traffic (None: a group may have any name) and of groups."""
    if isinstance(traffic, RoutingStatistics):
        whole, groups = _counts.of_statistics(traffic, rules)
        tokens = crossing = None
    else:
        whole, groups = _counts.of_trace(traffic, rules)
        crossing = crossings(rules.placement, traffic)
        tokens = _tokens(traffic)

    def part(name: str | None, counts: Counts) -> Measures:
        lengths = crossed = None
        if tokens is not None and rules.window is not None:
            starts = np.arange(0, len(tokens[name]), rules.window)
            lengths = np.diff(starts, append=len(tokens[name]))
            if crossing is not None and starts.size:
                crossed = np.add.reduceat(crossing[tokens[name]], starts)
        return measures(counts, lengths, crossed, rules.topology, model, regime)

    found: dict[str | None, Measures] = {None: part(None, whole)}
    found.update({name: part(name, counts) for name, counts in groups.items()})
    return found


def _tokens(trace: RoutingTrace) -> dict[str | None, NDArray[np.int64]]:
    """Find the tokens of all traffic (None) and of every group that has some."""
    found: dict[str | None, NDArray[np.int64]] = {None: np.arange(trace.tokens)}
    if trace.group is not None:
        for number, name in enumerate(trace.group_names):
            found[name] = np.flatnonzero(trace.group == number)
    return {name: tokens for name, tokens in found.items() if name is None or tokens.size}


def units_of(
    traffic: RoutingTrace | RoutingStatistics, window: int
) -> dict[str | None, NDArray[np.int64]]:
    """Say what each window goes with when resampling [W], for all traffic (None) and groups."""
    units: dict[str | None, NDArray[np.int64]] = {}
    if isinstance(traffic, RoutingStatistics):
        units[None] = np.arange(traffic.windows)
        if traffic.group is not None:
            for number, group in enumerate(traffic.group_names):
                mine = np.flatnonzero(traffic.group == number)
                units.update({group: mine} if mine.size else {})
        return units
    for name, tokens in _tokens(traffic).items():
        if traffic.sequence is None:
            units[name] = np.arange(max(-(-len(tokens) // window), 1))
        else:
            units[name] = owners(traffic.sequence[tokens], window)
    return units


def measures(
    counts: Counts,
    lengths: NDArray[np.int64] | None,
    crossing: Floats | None,
    topology: Topology,
    model: CostModel | None,
    regime: Regime,
) -> Measures:
    """Give the measures that are known.

    Imbalance and time count every window alike, as ``evaluate`` does; fanout and crossing every
    token. ``lengths`` are tokens per window [W], ``crossing`` the summed shares of pairs that cross
    [W].
    """
    load = counts.load
    ones = np.ones(len(load))
    found = {"imbalance": (_figures.ratios(load, topology.speed_of_device).mean(axis=1), ones)}
    if model is not None:
        times = _figures.layer_us(counts, topology, model, regime)
        found["predicted_layer_us"] = (times.mean(axis=1), ones)
    if lengths is not None:
        tokens = lengths.astype(np.float64)
        layers = load.shape[1]
        found["fanout"] = (counts.visits.sum(axis=(1, 2)) / layers, tokens)
        if counts.node_visits is not None and topology.nodes > 1:
            found["node_fanout"] = (counts.node_visits.sum(axis=(1, 2)) / layers, tokens)
        if crossing is not None:
            found["crossing"] = (crossing, tokens)
    return found


def owners(sequence: NDArray[np.int32], window: int) -> NDArray[np.int64]:
    """Sequence [W] that has the most tokens of each window of a run of tokens [t]."""
    _, label = np.unique(sequence, return_inverse=True)
    at = np.arange(len(label)) // window
    size = int(label.max(initial=0)) + 1
    pair, count = np.unique(at * size + label, return_counts=True)
    order = np.lexsort((count, pair // size))
    last = np.flatnonzero(np.diff(pair[order] // size, append=-1))
    owner: NDArray[np.int64] = pair[order][last] % size
    return owner


def crossings(placement: Placement, trace: RoutingTrace) -> Floats | None:
    """Share of every token's pairs of neighbouring layers' experts that are on two devices [T].

    Copies of an expert take the same tokens as in ``evaluate`` with an even split. None for a model
    of one layer.
    """
    if trace.layers < 2:
        return None
    lists = [copies(slots, placement.num_experts) for slots in placement.slots]
    most = max(table.shape[1] for table, _ in lists)
    device = np.stack(
        [np.pad(table, ((0, 0), (0, most - table.shape[1])), "edge") for table, _ in lists]
    )
    device //= placement.slots_per_device
    number = np.stack([count for _, count in lists])
    layer = np.arange(trace.layers)[None, :, None]
    found = np.empty(trace.tokens)
    first = 0
    for shard in trace.shards():
        for begin in range(0, len(shard), AT_ONCE):
            ids = shard[begin : begin + AT_ONCE].astype(np.int64)
            hashed = mixed(np.arange(first, first + len(ids)))[:, None, None]
            on = device[layer, ids, hashed % number[layer, ids]]
            apart = on[:, :-1, :, None] != on[:, 1:, None, :]
            found[first : first + len(ids)] = apart.mean(axis=(1, 2, 3))
            first += len(ids)
    return found
