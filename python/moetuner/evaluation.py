"""evaluate(): replays a placement on a trace, token by token, and says what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.placement import EMPTY, Placement
from moetuner.statistics import TABLE_LIMIT, RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace
from moetuner.traffic import dispatch_rows, homes_of


@dataclass(frozen=True)
class Evaluation:
    """What a placement does to traffic. Fields that the input cannot tell are None.

    Parameters
    ----------
    tokens
        Tokens replayed.
    imbalance
        Largest / mean device load in a layer and window, averaged over layers and windows; 1 is
        perfect.
    imbalance_total
        The same on the sum of all windows, averaged over layers.
    imbalance_worst
        The largest of any layer and window.
    imbalance_per_layer
        Averaged over windows [L].
    crossing
        Share of transitions whose two experts are on different devices.
    fanout, node_fanout
        Distinct devices (nodes) that a token visits in a layer, on average.
    traffic
        Tokens moved from device to device, by regime. ``follow`` [L-1,D,D]: pairs of neighbouring
        layers' experts, the diagonal stays. ``dispatch`` [L,D,D]: from home device to device of
        work, for homes spread evenly or as given; as much comes back.
    predicted_layer_us
        Predicted time of a layer in microseconds; None without a cost model.
    by_group
        The same for every group of the trace that has tokens.
    """

    tokens: int | None
    imbalance: float
    imbalance_total: float
    imbalance_worst: float
    imbalance_per_layer: tuple[float, ...]
    crossing: float | None
    fanout: float | None
    node_fanout: float | None
    traffic: dict[str, NDArray[Any]]
    predicted_layer_us: float | None = None
    by_group: dict[str, Evaluation] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values; traffic is summed over layers."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["imbalance_per_layer"] = list(self.imbalance_per_layer)
        fields["traffic"] = {
            regime: table.sum(axis=0).tolist() for regime, table in self.traffic.items()
        }
        fields["by_group"] = {name: group.to_dict() for name, group in self.by_group.items()}
        return fields


def evaluate(
    placement: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | None = None,
    *,
    window: int | None = None,
    home: ArrayLike | Literal["blocks"] | None = None,
    threads: int | None = None,
) -> Evaluation:
    """Replay a placement.

    Parameters
    ----------
    placement
        What to replay. Copies of an expert share its tokens evenly.
    traffic
        A trace, replayed token by token; or statistics, which tell balance and crossing but not
        fanout.
    topology
        Nodes of the devices; one node by default.
    window
        Tokens whose load is balanced together; None for the whole trace. Statistics bring their own
        windows.
    home
        Device that each token of a trace comes from [T], or ``"blocks"`` (see ``dispatch_rows``):
        then ``traffic["dispatch"]`` counts its rows exactly. None spreads homes evenly.
    threads
        Threads to use, all cores by default; the answer does not depend on it.

    Raises
    ------
    ValueError
        If placement, traffic and topology are not of one model and machine.
    """
    topology = topology or Topology(placement.devices)
    experts = traffic.num_experts if isinstance(traffic, RoutingTrace) else traffic.experts
    found = (traffic.layers, experts, topology.devices)
    wanted = (placement.layers, placement.num_experts, placement.devices)
    if found != wanted:
        raise ValueError(
            f"placement must have {found[0]} layers, {found[1]} experts and {found[2]} devices "
            f"like the input and topology, got {wanted[0]}, {wanted[1]} and {wanted[2]}"
        )
    if isinstance(traffic, RoutingStatistics):
        if home is not None:
            raise ValueError("home needs a trace: statistics have no tokens")
        return _evaluate_statistics(placement, traffic)

    _check_table_bytes(traffic, topology, window)

    def replay() -> _core.Replay:
        nodes = topology.node_of_device.tolist()
        return _core.Replay(placement.slots, experts, traffic.top_k, nodes, window=window)

    whole = replay()
    names = traffic.group_names if traffic.group is not None else ()
    groups = [replay() for _ in names]
    first = 0
    for shard in traffic.shards():
        whole.push(shard, threads)
        if traffic.group is not None:
            label = traffic.group[first : first + len(shard)]
            for group, part in enumerate(groups):
                mine = label == group
                if mine.any():
                    part.push(shard[mine], threads)
        first += len(shard)
    by_group = {name: _tally(part) for name, part in zip(names, groups, strict=True)}
    evaluation = _tally(whole, {name: group for name, group in by_group.items() if group.tokens})
    return evaluation if home is None else _with_homes(evaluation, placement, traffic, home)


def _with_homes(
    evaluation: Evaluation,
    placement: Placement,
    trace: RoutingTrace,
    home: ArrayLike | Literal["blocks"],
) -> Evaluation:
    """Replace the dispatch traffic, of all tokens and of every group, by rows from given homes."""
    homes = homes_of(home, trace.tokens, placement.devices)
    by_group = {
        name: _with_homes(
            group,
            placement,
            trace.select(groups=name),
            homes[trace.group == trace.group_names.index(name)],
        )
        for name, group in evaluation.by_group.items()
    }
    dispatch = dispatch_rows(placement, trace, homes)
    traffic = {**evaluation.traffic, "dispatch": dispatch}
    return replace(evaluation, traffic=traffic, by_group=by_group)


def _check_table_bytes(trace: RoutingTrace, topology: Topology, window: int | None) -> None:
    windows = 1 if window is None else max(1, -(-trace.tokens // max(window, 1)))
    # Load and visits of devices, visits of nodes; once more for groups, whose windows add up to it.
    counts = windows * trace.layers * (2 * topology.devices + topology.nodes)
    size = 8 * counts * (1 if trace.group is None else 2)
    if size > TABLE_LIMIT:
        raise ValueError(
            f"counts must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for {windows} "
            f"windows, {trace.layers} layers, {topology.devices} devices: make windows longer"
        )


def _tally(replay: _core.Replay, by_group: dict[str, Evaluation] | None = None) -> Evaluation:
    tokens, load, follow, visits, node_visits = replay.finish()
    _, layers, devices = visits.shape
    home = np.repeat(visits.sum(axis=0)[:, None, :] / devices, devices, axis=1)
    home[:, np.arange(devices), np.arange(devices)] = 0
    per_token = max(tokens, 1) * layers
    return Evaluation(
        tokens=tokens,
        **_imbalance(load),
        crossing=_crossing(follow),
        fanout=int(visits.sum()) / per_token,
        node_fanout=int(node_visits.sum()) / per_token,
        traffic={"follow": follow, "dispatch": home},
        by_group=by_group or {},
    )


def _evaluate_statistics(placement: Placement, statistics: RoutingStatistics) -> Evaluation:
    """Balance and crossing from counts; copies take equal parts of an expert's load."""
    layers, devices = placement.layers, placement.devices
    share = np.zeros((layers, devices, placement.num_experts))
    layer, device, slot = np.nonzero(placement.slots != EMPTY)
    expert = placement.slots[layer, device, slot]
    share[layer, device, expert] = 1 / placement.replicas[layer, expert]
    load = np.einsum("wle,lde->wld", statistics.window_load.astype(np.float64), share)
    traffic: dict[str, NDArray[Any]] = {}
    crossing = None
    if statistics.transitions is not None:
        tables = statistics.transitions.astype(np.float64)
        traffic["follow"] = np.einsum(
            "lde,lef,lgf->ldg", share[:-1], tables, share[1:], optimize=True
        )
        crossing = _crossing(traffic["follow"])
    return Evaluation(
        tokens=None,
        **_imbalance(load),
        crossing=crossing,
        fanout=None,
        node_fanout=None,
        traffic=traffic,
    )


def _imbalance(load: NDArray[Any]) -> dict[str, Any]:
    """Imbalances of device loads [W,L,D]; layers and windows without load count as balanced."""

    def ratio(load: NDArray[Any]) -> NDArray[np.float64]:
        mean = load.mean(axis=-1)
        ratios: NDArray[np.float64] = np.ones_like(mean)
        np.divide(load.max(axis=-1), mean, out=ratios, where=mean > 0)
        return ratios

    windowed = ratio(load)
    return {
        "imbalance": float(windowed.mean()),
        "imbalance_total": float(ratio(load.sum(axis=0)).mean()),
        "imbalance_worst": float(windowed.max()),
        "imbalance_per_layer": tuple(windowed.mean(axis=0).tolist()),
    }


def _crossing(follow: NDArray[Any]) -> float:
    total = follow.sum(dtype=np.float64)
    kept = np.einsum("ldd->", follow, dtype=np.float64)
    return float((total - kept) / total) if total else 0.0
