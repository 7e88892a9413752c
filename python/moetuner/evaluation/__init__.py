"""evaluate(): replays a placement on a trace, token by token, and says what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._checks import flag, instance, one_of, seed_in, threads_in, window_in
from moetuner.cost import CostModel
from moetuner.evaluation import arrival as arrival_
from moetuner.evaluation import copies, replay
from moetuner.evaluation.arrival import Arrival
from moetuner.evaluation.by_unit import of_traffic
from moetuner.evaluation.copies import Split
from moetuner.evaluation.figures import FIGURES, Replay, Weighed, busiest_port
from moetuner.evaluation.intervals import Sums
from moetuner.evaluation.replay import Counts, Setting
from moetuner.evaluation.rows import dispatch_rows, homes_of
from moetuner.evaluation.units import Units
from moetuner.frozen import Frozen, html_table
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace


@dataclass(frozen=True)
class Replayed:
    """What was evaluated, for those who ask what other sequences would have brought.

    Parameters
    ----------
    traffic, setting, model, regime
        What was replayed, and how.
    group
        Group of the traffic; None for all.
    """

    traffic: RoutingTrace | RoutingStatistics
    setting: Setting
    model: CostModel | None
    regime: Regime
    group: str | None = None

    def sums(self, units: Units, *, only_whole: bool = False) -> dict[str | None, dict[str, Sums]]:
        """Compute what every unit adds to the figures of all traffic (None) and of every group."""
        setting = replace(self.setting, with_mixed=False)
        return of_traffic(
            self.traffic, setting, self.model, self.regime, units, only_whole=only_whole
        )


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Frozen):
    """What a placement does to traffic. Fields that the input cannot tell are None.

    Parameters
    ----------
    tokens
        Tokens replayed.
    imbalance
        Largest / mean device load in a layer and window, averaged over layers and windows; 1 is
        perfect. Where devices differ in speed, the slowest device's time over that of loads in
        proportion to speeds. Windows are those of the order in which traffic arrives, as are those
        of predicted times.
    imbalance_mixed
        The same if sequences are served together, as by continuous batching: in windows of the same
        tokens in mixed order, or for counts, in means of 16 windows drawn at random. It depends on
        the traffic's size, not on the placement alone: of up to 32 sequences eight run at once, of
        more a quarter, up to 256; the more, the more even a window is. So figures compare only on
        the same traffic, and those of groups not with that of all. Which run together is by chance:
        another ``mixed_seed`` says how much that matters.
    imbalance_total
        The same on the sum of all windows, averaged over layers.
    imbalance_worst
        The largest of any layer and window.
    imbalance_per_layer
        Averaged over windows [L].
    imbalance_per_window
        Averaged over layers [W]; where windows as recorded and mixed ones are weighed, as recorded.
    crossing
        Share of transitions whose two experts are on different devices.
    fanout, node_fanout
        Distinct devices (nodes) that a token visits in a layer, on average.
    slots_used
        Slots of a device in a layer that hold an expert, on average; the others are free.
    traffic
        Rows moved from device to device, by regime. ``follow`` [L-1,D,D]: pairs of neighbouring
        layers' experts, the diagonal stays. ``dispatch`` [L,D,D]: from home device to device of
        work, for homes spread evenly or as given; as much comes back.
    busiest_port
        Rows ``out`` of and ``in`` to the device with the most of them, by regime and for every tier
        of links, of a layer on average. ``dispatch`` is one way; the way back is its mirror image.
    predicted_layer_us
        Predicted time of a layer in microseconds, averaged over windows and layers; None without a
        cost model.
    predicted_layer_us_p50, predicted_layer_us_p95, predicted_layer_us_p99
        The times that so many percent of windows and layers do not exceed.
    predicted_us_per_layer
        Predicted time of every layer in microseconds, averaged over windows [L].
    by_group
        The same for every group of the traffic that has tokens or windows.
    replayed
        What was evaluated; not saved.

    Examples
    --------
    >>> import moetuner as mt
    >>> trace = mt.RoutingTrace.from_arrays([[[0, 1]], [[2, 3]]], num_experts=4)
    >>> found = mt.evaluate(mt.Placement([[[0, 1], [2, 3]]]), trace)
    >>> found.imbalance_total, found.fanout
    (1.0, 1.0)
    """

    tokens: int | None
    imbalance: float
    imbalance_mixed: float | None
    imbalance_total: float
    imbalance_worst: float
    imbalance_per_layer: tuple[float, ...]
    crossing: float | None
    fanout: float | None
    node_fanout: float | None
    slots_used: float
    traffic: dict[str, NDArray[Any]]
    busiest_port: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    predicted_layer_us: float | None = None
    predicted_layer_us_p50: float | None = None
    predicted_layer_us_p95: float | None = None
    predicted_layer_us_p99: float | None = None
    predicted_us_per_layer: tuple[float, ...] | None = None
    imbalance_per_window: tuple[float, ...] = ()
    by_group: dict[str, Evaluation] = field(default_factory=dict)
    replayed: Replayed | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the traffic behind when an evaluation is pickled or copied."""
        return {**self.__dict__, "replayed": None}

    def _repr_html_(self) -> str:
        names = [name for name in FIGURES if getattr(self, name) is not None]
        rows = [("all", self), *self.by_group.items()]
        return html_table(
            ("group", *names),
            [(of, *(getattr(each, name) for name in names)) for of, each in rows],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values; traffic is summed over layers."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del fields["replayed"]
        for name in ("imbalance_per_layer", "imbalance_per_window", "predicted_us_per_layer"):
            fields[name] = None if fields[name] is None else list(fields[name])
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
    split: Split = "even",
    cost_model: CostModel | None = None,
    regime: Regime = "dispatch",
    arrival: Arrival = "bursts",
    home: ArrayLike | Literal["blocks"] | None = None,
    mixed: bool = True,
    mixed_seed: int = 0,
    threads: int | None = None,
) -> Evaluation:
    """Replay a placement.

    Parameters
    ----------
    placement
        What to replay.
    traffic
        A trace, replayed token by token; or statistics, which tell balance and crossing but not
        fanout.
    topology
        Nodes and speeds of the devices; one node of equal devices by default.
    window
        Tokens whose load is balanced together; None for the whole trace. Statistics bring their own
        windows.
    split
        Which of an expert's copies serves a token: ``"even"`` by a hash of its position (vLLM),
        ``"nearest"`` the one on its home device, else one of its node, else any (SGLang's static
        dispatch), ``"round_robin"`` in turns (TensorRT-LLM). Statistics split loads in the shares
        that follow.
    cost_model
        Gives the predicted times. Statistics without expert sets do not know which experts a token
        met together: each is then sent to on its own, which is an upper bound.
    regime
        What moves in the predicted times: rows from their homes to devices and back in each layer,
        as in today's engines, or on to the next layer's device.
    arrival
        Which tokens of a trace share a window, in imbalances and predicted times: those that follow
        one another (``"bursts"``), those of sequences that are served together (``"mixed"``), or
        both, by the weight of mixed windows from 0 to 1. Statistics keep their windows.
    home
        Device that each token of a trace comes from [T], or ``"blocks"`` (see ``dispatch_rows``):
        then ``traffic["dispatch"]`` counts its rows exactly. None spreads homes evenly.
    mixed
        Whether to replay a trace once more in mixed order; where not, ``imbalance_mixed`` is None.
    mixed_seed
        Of the mixed order: which sequences, or windows of statistics, meet.
    threads
        Threads to use, all cores by default; the answer does not depend on it.

    Raises
    ------
    ValueError
        If placement, traffic and topology are not of one model and machine.

    Examples
    --------
    >>> import moetuner as mt
    >>> trace = mt.RoutingTrace.from_arrays([[[0, 1]], [[2, 3]]], num_experts=4)
    >>> mt.evaluate(mt.Placement([[[0, 1], [2, 3]]]), trace).fanout
    1.0
    >>> mt.evaluate(mt.Placement([[[0, 2], [1, 3]]]), trace).fanout
    2.0
    """
    return evaluate_each(
        [placement],
        traffic,
        topology,
        window=window,
        split=split,
        cost_model=cost_model,
        regime=regime,
        arrival=arrival,
        home=home,
        mixed=mixed,
        mixed_seed=mixed_seed,
        threads=threads,
    )[0]


def evaluate_each(
    placements: Sequence[Placement],
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | None = None,
    *,
    window: int | None = None,
    split: Split = "even",
    cost_model: CostModel | None = None,
    regime: Regime = "dispatch",
    arrival: Arrival = "bursts",
    home: ArrayLike | Literal["blocks"] | None = None,
    mixed: bool = True,
    mixed_seed: int = 0,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Evaluation]:
    """Replay several placements of one model and machine, and read the trace once for all.

    Takes what ``evaluate`` takes, and returns what it returns for each of them. ``progress`` gets
    the share of a trace that has been replayed.
    """
    if not placements:
        return []
    topology = topology_of(placements[0], topology)
    for placement in placements:
        check_model(placement, traffic, topology)
    copies.check(split)
    window, threads = window_in(window), threads_in(threads)
    check_times(cost_model, regime)
    flag("mixed", mixed)
    settings = [
        Setting(
            placement,
            topology,
            window,
            split,
            cost_model is not None and cost_model.expert_us > 0,
            threads,
            mixed_seed=seed_in(mixed_seed, "mixed_seed"),
            arrival=arrival,
        )
        for placement in placements
    ]
    orders = arrival_.orders(traffic, arrival, seed=mixed_seed)
    # Where tokens are replayed in mixed order anyway, their windows are not counted once more.
    is_mixed = any(order is not None for _, order in orders)
    counting = [replace(each, with_mixed=mixed and not is_mixed) for each in settings]
    if home is not None and isinstance(traffic, RoutingStatistics):
        raise ValueError("home needs a trace: statistics have no tokens")
    if home is not None and split != "even":
        raise ValueError(f"home needs split 'even', got {split!r}: others know homes only spread")
    runs: list[Iterator[tuple[Counts, dict[str, Counts]]]] = []
    for number, (_, order) in enumerate(orders):
        if isinstance(traffic, RoutingStatistics):
            runs.append(replay.of_statistics(traffic, setting) for setting in counting)
        else:
            part = _part_of(progress, number, len(orders))
            runs.append(replay.of_trace(arrival_.in_order(traffic, order), counting, part))
    evaluated = []
    for setting, *parts in zip(settings, *runs, strict=True):
        if home is not None and isinstance(traffic, RoutingTrace):
            parts = [
                _with_homes(counts, groups, setting.placement, traffic, home)
                for counts, groups in parts
            ]
        named: dict[str | None, list[Counts]] = {None: [counts for counts, _ in parts]}
        named |= {name: [groups[name] for _, groups in parts] for name in parts[0][1]}
        evaluations = {}
        for name, of_orders in named.items():
            weighed = [(weight, of) for (weight, _), of in zip(orders, of_orders, strict=True)]
            # Where tokens are replayed in mixed order anyway, that is the last order.
            in_mixed_order = of_orders[-1].load if mixed and is_mixed else of_orders[0].mixed
            evaluations[name] = _evaluation(
                Replay(weighed, in_mixed_order, setting, cost_model, regime), traffic, name
            )
        by_group = {name: of for name, of in evaluations.items() if name is not None}
        evaluated.append(replace(evaluations[None], by_group=by_group))
    return evaluated


def _part_of(
    progress: Callable[[float], None] | None, number: int, of: int
) -> Callable[[float], None] | None:
    """Return what reports the share of one of several runs as that of all."""
    return None if progress is None else lambda share: progress((number + share) / of)


def topology_of(placement: Placement, topology: Topology | None) -> Topology:
    """Return the topology that was given, or one node of the placement's devices."""
    instance("placement", placement, Placement)
    if topology is None:
        return Topology(placement.devices)
    instance("topology", topology, Topology, hint=", such as Topology(devices=8)")
    return topology


def check_times(cost_model: CostModel | None, regime: Regime) -> None:
    """Raise unless these are a cost model, or none, and a regime."""
    if cost_model is not None:
        instance("cost_model", cost_model, CostModel, hint=", such as CostModel.preset('h100')")
    one_of("regime", regime, get_args(Regime))


def check_model(
    placement: Placement, traffic: RoutingTrace | RoutingStatistics, topology: Topology
) -> None:
    """Raise unless placement, traffic and topology are of one model and machine."""
    instance("placement", placement, Placement)
    instance("traffic", traffic, RoutingTrace, RoutingStatistics)
    experts = traffic.num_experts if isinstance(traffic, RoutingTrace) else traffic.experts
    shape = (traffic.layers, experts, topology.devices)
    given = (placement.layers, placement.num_experts, placement.devices)
    if shape != given:
        raise ValueError(
            f"placement must have {shape[0]} layers, {shape[1]} experts and {shape[2]} devices "
            f"like the input and topology, got {given[0]}, {given[1]} and {given[2]}"
        )


def _with_homes(
    counts: Counts,
    by_group: dict[str, Counts],
    placement: Placement,
    trace: RoutingTrace,
    home: ArrayLike | Literal["blocks"],
) -> tuple[Counts, dict[str, Counts]]:
    """Replace the dispatch traffic, of all tokens and of every group, by rows from given homes."""
    homes = homes_of(home, trace.tokens, placement.devices)
    groups = {}
    for name, group in by_group.items():
        mine = homes[trace.group == trace.group_names.index(name)]
        rows = dispatch_rows(placement, trace.select(groups=name), mine)
        groups[name] = replace(group, dispatch=rows)
    return replace(counts, dispatch=dispatch_rows(placement, trace, homes)), groups


def _evaluation(
    of: Replay, traffic: RoutingTrace | RoutingStatistics, group: str | None
) -> Evaluation:
    """Compute all figures of what was counted in one order of arrival or, by weight, in two."""
    topology, rows = of.setting.topology, of.rows()
    values: dict[str, Any] = {name: figure.compute(of) for name, figure in FIGURES.items()}
    return Evaluation(
        **values,
        imbalance_per_layer=_per_layer(of.imbalances),
        imbalance_per_window=tuple(of.imbalances[0][1].mean(axis=1).tolist()),
        predicted_us_per_layer=_per_layer(of.times) if of.times else None,
        traffic=rows,
        busiest_port={name: busiest_port(table, topology) for name, table in rows.items()},
        replayed=Replayed(traffic, of.setting, of.model, of.regime, group),
    )


def _per_layer(windowed: Weighed) -> tuple[float, ...]:
    """Average figures of windows and layers [W,L] over windows, by weight."""
    means = [weight * each.mean(axis=0) for weight, each in windowed]
    return tuple(np.sum(means, axis=0).tolist())
