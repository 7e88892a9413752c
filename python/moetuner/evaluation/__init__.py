"""Evaluate placements: replay them on a trace, token by token, and compute figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner.charts.figure import plot
from moetuner.charts.placements import draw_losses, draw_on_one_device
from moetuner.cost import CostModel
from moetuner.evaluation import replay
from moetuner.evaluation.arrival import list_orders
from moetuner.evaluation.figures import FIGURES, CountsByOrder, count_busiest_ports
from moetuner.evaluation.losses import (
    Domain,
    Losses,
    compute_imbalances_after_loss,
    measure_losses,
)
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import split_progress
from moetuner.evaluation.replay import Setting, check_model
from moetuner.evaluation.rows import assign_homes, dispatch_rows
from moetuner.frozen import Frozen, as_json, html_table
from moetuner.placement import Placement
from moetuner.recording import Recording, compute_once
from moetuner.serving import Serving, make_serving
from moetuner.serving.arrival import Arrival
from moetuner.serving.splits import Split
from moetuner.statistics import WINDOW, RoutingStatistics, count_loads
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace, as_trace


class Replayed(NamedTuple):
    """Traffic and setting of an evaluation, from which its intervals are computed.

    ``group`` is the group of the traffic; None for all.
    """

    traffic: Recording
    setting: Setting
    group: str | None = None

    def count_load(self) -> NDArray[Any]:
        """Count the load of every expert [L,E], once for all evaluations of the traffic."""
        traffic, threads = self.traffic, self.setting.options.threads
        return compute_once(
            traffic, "total load", lambda: count_loads(traffic, threads=threads).total_load
        )


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Frozen):
    """Figures of a placement on traffic. Figures that the input cannot give are None.

    Parameters
    ----------
    tokens
        Tokens replayed.
    imbalance
        Largest / mean device load in a layer and window, averaged over layers and windows; 1 is
        perfect. Where devices differ in speed, the slowest device's time over that of loads in
        proportion to speeds. Windows of imbalances and predicted times are those of the order of
        arrival. Tokens behind the last whole window are left out.
    imbalance_mixed
        The same if sequences are served together, as by continuous batching: in windows of the same
        tokens in mixed order, or for counts, in means of 16 windows drawn at random. It depends on
        the traffic's size as well: the more sequences run at once, the more even a window is. Eight
        run at once of up to 32 sequences, and a quarter, at most 256, of more. So compare it only
        on the same traffic, and not between a group and all traffic. ``mixed_seed`` chooses which
        sequences run together: other seeds show how much that matters.
    imbalance_total
        The same on the sum of all windows, averaged over layers.
    imbalance_worst
        The largest of any layer and window.
    imbalance_filled
        The same as ``imbalance`` of the work of routed experts and of the shared one together, if
        the latter's tokens fill devices that wait; None without ``waterfill``.
    imbalance_per_layer
        Averaged over windows [L].
    imbalance_per_window
        Averaged over layers [W]; of the recorded order, where arrival weighs both orders.
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
    predicted_with
        Name of the cost model of predicted times, which says whose experts they are of where the
        traffic names no model; None without a cost model.
    by_group
        The same for every group of the traffic that has tokens or windows.
    replayed
        Traffic and setting of the evaluation; not saved.

    Examples
    --------
    >>> import moetuner as mt
    >>> trace = mt.RoutingTrace.from_arrays([[[0, 1]], [[2, 3]]], num_experts=4)
    >>> evaluation = mt.evaluate(mt.Placement([[[0, 1], [2, 3]]]), trace)
    >>> evaluation.imbalance_total, evaluation.fanout
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
    imbalance_filled: float | None = None
    predicted_layer_us: float | None = None
    predicted_layer_us_p50: float | None = None
    predicted_layer_us_p95: float | None = None
    predicted_layer_us_p99: float | None = None
    predicted_us_per_layer: tuple[float, ...] | None = None
    predicted_with: str | None = None
    imbalance_per_window: tuple[float, ...] = ()
    by_group: dict[str, Evaluation] = field(default_factory=dict)
    replayed: Replayed | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or copy: it has losses, and no traffic."""
        return {**self.__dict__, "replayed": None, "losses": self.losses}

    @cached_property
    def losses(self) -> dict[str, Losses]:
        """Effects of the loss of a device, or a node, by failure domain.

        Empty where every expert has one copy, and for a group. Computed on first use, as it counts
        experts, and few evaluations need it.
        """
        replayed = self.replayed
        if replayed is None or replayed.group is not None:
            return {}
        setting = replayed.setting
        if not setting.placement.has_copies:
            return {}
        load = replayed.count_load()
        domains: list[Domain] = ["device"] if setting.topology.nodes < 2 else ["device", "node"]
        return {
            domain: measure_losses(
                setting.placement,
                load,
                setting.topology,
                domain,
                split=setting.serving.split,
                threads=setting.options.threads,
            )
            for domain in domains
        }

    def plot_losses(self, before: Evaluation | None = None) -> Any:
        """Draw what the loss of each device does, as a figure of plotly.

        Parameters
        ----------
        before
            Evaluation of another placement on the same traffic, which is drawn beside.

        Raises
        ------
        ImportError
            If plotly is not installed: ``pip install 'moetuner[report]'``.
        ValueError
            If an evaluation was pickled, or is of a group.
        """
        losses = {}
        for name, evaluation in self._name_evaluations(before).items():
            losses[name] = evaluation.measure_each_loss()
        return plot(draw_losses(losses))

    def measure_each_loss(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Compute what the loss of each device does, by device and layer [D,L].

        Returns
        -------
        tuple
            Busiest device over the mean of those that are left, and experts without a copy.

        Raises
        ------
        ValueError
            If the evaluation was pickled, or is of a group.
        """
        replayed = self.replayed
        if replayed is None or replayed.group is not None:
            raise ValueError("losses need an evaluation as returned: not pickled, and of no group")
        setting, load = replayed.setting, replayed.count_load()
        return compute_imbalances_after_loss(
            setting.placement, load, setting.topology, "device", split=setting.serving.split
        )

    def plot_visits(self, before: Evaluation | None = None) -> Any:
        """Draw how many tokens stay on one of two devices, as a figure of plotly.

        Parameters
        ----------
        before
            Evaluation of another placement on the same traffic, which is drawn above.

        Raises
        ------
        ImportError
            If plotly is not installed: ``pip install 'moetuner[report]'``.
        ValueError
            If there are more than two devices, or visits are not known.
        """
        shares = {}
        for name, evaluation in self._name_evaluations(before).items():
            share = evaluation.on_one_device
            if share is None:
                raise ValueError("plot_visits needs two devices, and traffic with visits")
            shares[name] = share
        return plot(draw_on_one_device(shares))

    def _name_evaluations(self, before: Evaluation | None) -> dict[str, Evaluation]:
        """Return this evaluation with the one before, by name."""
        if before is None:
            return {"placement": self}
        check.instance("before", before, Evaluation)
        return {"before": before, "after": self}

    @property
    def on_one_device(self) -> float | None:
        """Tokens of 100 that have all their experts of a layer on one of two devices.

        None where that is unknown, as on more than two devices.
        """
        # On two devices a token visits one or both, so the mean fanout gives the share.
        replayed = self.replayed
        if replayed is None or replayed.setting.topology.devices != 2 or self.fanout is None:
            return None
        return 100 * (2 - self.fanout)

    def _repr_html_(self) -> str:
        names = [name for name in FIGURES if getattr(self, name) is not None]
        rows = [("all", self), *self.by_group.items()]
        return html_table(
            ("group", *names),
            [(group, *(getattr(figures, name) for name in names)) for group, figures in rows],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values; traffic is summed over layers."""
        traffic = {name: rows.sum(axis=0) for name, rows in self.traffic.items()}
        fields: dict[str, Any] = as_json(
            {**self.__dict__, "replayed": None, "traffic": traffic, "losses": self.losses}
        )
        del fields["replayed"]
        return fields


def evaluate(
    placement: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | Serving | None = None,
    *,
    window: int | None = WINDOW,
    split: Split = "even",
    cost_model: CostModel | Literal["model"] | None = "model",
    regime: Regime = "dispatch",
    arrival: Arrival = "bursts",
    home: ArrayLike | Literal["blocks"] | None = None,
    mixed: bool = True,
    mixed_seed: int = 0,
    threads: int | None = None,
    waterfill: float | None = None,
) -> Evaluation:
    """Replay a placement, and compute its figures.

    Parameters
    ----------
    placement
        Placement to replay.
    traffic
        A trace, replayed token by token; or statistics, which give imbalance and crossing but not
        fanout.
    topology
        Nodes and speeds of the devices; by default those that the placement was computed for, where
        its settings have them, else one node of equal devices. Or a ``Serving``, which says that
        and all that follows.
    window
        Tokens whose load is balanced together; None for the whole trace at once. Statistics bring
        their own windows.
    split
        Copy of an expert that serves a token: ``"even"`` by a hash of its position (vLLM),
        ``"nearest"`` the one on its home device, else one of its node, else any (SGLang's static
        dispatch), ``"round_robin"`` in turns (TensorRT-LLM). Statistics split loads in the shares
        that follow; of them ``"lp"`` divides every window's tokens so that the slowest device is
        done as soon as can be (LPLB, SGLang's dispatch of that name).
    cost_model
        Gives the predicted times: by default an H100's with the experts of the traffic's model, or
        of DeepSeek-V3 if that is not known, as ``predicted_with`` says. None predicts no times.
        Statistics without expert sets do not know which experts a token met together: each is then
        sent to on its own, which is an upper bound.
    regime
        Traffic in the predicted times: rows from their homes to devices and back in each layer
        (``"dispatch"``), as in today's engines, or on to the next layer's device (``"follow"``).
    arrival
        Tokens of a trace that share a window, in imbalances and predicted times: those that follow
        one another (``"bursts"``), those of sequences that are served together (``"mixed"``), or
        both, by the weight of mixed windows from 0 to 1. Statistics keep their windows.
    home
        Device that each token of a trace comes from [T], or ``"blocks"`` (see ``dispatch_rows``):
        then ``traffic["dispatch"]`` counts its rows exactly. None spreads homes evenly.
    mixed
        If True, replay a trace once more in mixed order; else ``imbalance_mixed`` is None.
    mixed_seed
        Seed of the mixed order: it decides which sequences, or windows of statistics, meet.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    waterfill
        Work of a token's shared expert in that of a routed one, where the dispatcher gives it to
        devices that wait (SGLang's waterfill): 1 where both are of one size, as DeepSeek-V3's. It
        gives ``imbalance_filled``; predicted times are without shared experts. None for none.

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
    check.instance("placement", placement, Placement)
    serving = make_serving(
        traffic,
        topology,
        placement,
        window=window,
        split=split,
        cost_model=cost_model,
        regime=regime,
        arrival=arrival,
        waterfill=waterfill,
    )
    options = ReplayOptions(home=home, mixed=mixed, mixed_seed=mixed_seed, threads=threads)
    [[evaluation]] = evaluate_each([placement], traffic, [serving], options)
    return evaluation


def evaluate_each(
    placements: Sequence[Placement],
    traffic: Recording,
    servings: Sequence[Serving],
    options: ReplayOptions,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[list[Evaluation]]:
    """Evaluate placements of one model and machine; return a list of evaluations for each serving.

    A trace is read once for all servings that differ in windows alone, if each window is a multiple
    of the shortest. Mixed order is replayed for the first serving only. ``progress`` gets the share
    of a trace that has been replayed.
    """
    if not placements:
        return [[] for _ in servings]
    shortest = min(serving.window or 0 for serving in servings)
    is_multiple = shortest > 0 and all(
        (serving.window or 0) % shortest == 0 for serving in servings
    )
    # One replay serves all where they differ in their windows alone.
    is_one_replay = (
        is_multiple and len({replace(serving, window=None) for serving in servings}) == 1
    )
    runs = [servings] if is_one_replay else [[serving] for serving in servings]
    unmixed = replace(options, mixed=False)
    evaluated: list[list[Evaluation]] = []
    for run in runs:
        settings = [
            Setting(placement, serving, options if serving is servings[0] else unmixed)
            for serving in run
            for placement in placements
        ]
        evaluations = _evaluate(settings, traffic, progress)
        count = len(placements)
        evaluated += [
            evaluations[first : first + count] for first in range(0, len(evaluations), count)
        ]
    return evaluated


def _evaluate(
    settings: Sequence[Setting],
    traffic: Recording,
    progress: Callable[[float], None] | None = None,
) -> list[Evaluation]:
    """Evaluate settings that differ in their placements and windows alone."""
    for setting in settings:
        check_model(setting.placement, traffic, setting.topology)
    common, rows_of_group = settings[0], traffic.group_rows()
    serving, homes = common.serving, _assign_homes(traffic, common)
    orders = list_orders(traffic, serving.arrival, seed=common.options.mixed_seed)
    # Where tokens arrive in mixed order anyway, mixed windows are not counted once more; except by
    # group, whose sequences are mixed with each other, and not with those of other groups.
    is_mixed = any(order is not None for _, order in orders)
    counts_mixed = not is_mixed or len(rows_of_group) > 1
    counted_settings = (
        settings if counts_mixed else [setting.with_options(mixed=False) for setting in settings]
    )

    runs = []
    for number, (_, order) in enumerate(orders):
        report = split_progress(progress, number, len(orders))
        runs.append(replay.count_each(traffic, counted_settings, report, order))
    evaluated = []
    for setting, *counted in zip(settings, *runs, strict=True):
        by_group = {}
        for group in counted[0]:
            parts = [counts[group] for counts in counted]
            mixed = parts[0].mixed
            if setting.options.mixed and is_mixed and group is None:
                mixed = parts[-1].load[parts[-1].is_full_window]
            if homes is not None:
                tokens = rows_of_group[group]
                trace = as_trace(traffic if group is None else traffic.take(tokens))
                rows = dispatch_rows(setting.placement, trace, homes[tokens])
                parts = [replace(counts, dispatch=rows) for counts in parts]
            weighed = [(weight, counts) for (weight, _), counts in zip(orders, parts, strict=True)]
            by_group[group] = _compute_figures(
                CountsByOrder(weighed, mixed, setting), traffic, group
            )
        evaluation = by_group.pop(None)
        evaluated.append(replace(evaluation, by_group=by_group))
    return evaluated


def _assign_homes(traffic: Recording, setting: Setting) -> NDArray[np.int64] | None:
    """Return the home of every token [T]; None where homes are spread evenly."""
    home, serving = setting.options.home, setting.serving
    if home is None:
        return None
    if not traffic.ordered:
        raise ValueError("home needs a trace: statistics have no tokens")
    if not (serving.rule.is_hashed and serving.rule.is_even):
        raise ValueError(
            f"home needs split 'even', got {serving.split!r}: other splits assume homes spread "
            "evenly"
        )
    return assign_homes(home, traffic.length, setting.placement.devices)


def _compute_figures(counted: CountsByOrder, traffic: Recording, group: str | None) -> Evaluation:
    """Compute all figures from counts in one order of arrival or, by weight, in two."""
    topology, rows = counted.setting.topology, counted.rows()
    model = counted.setting.serving.cost_model
    values: dict[str, Any] = {name: figure.value(counted) for name, figure in FIGURES.items()}
    per_layer = [
        tuple(np.sum([weight * table.mean(axis=0) for weight, table in tables], axis=0).tolist())
        for tables in (counted.imbalances, counted.times)
        if tables
    ]
    return Evaluation(
        **values,
        imbalance_per_layer=per_layer[0],
        imbalance_per_window=tuple(counted.imbalances[0][1].mean(axis=1).tolist()),
        predicted_us_per_layer=per_layer[1] if counted.times else None,
        predicted_with=None if model is None else f"{model.shown_name}{model.weights}",
        traffic=rows,
        busiest_port={name: count_busiest_ports(table, topology) for name, table in rows.items()},
        replayed=Replayed(traffic, counted.setting, group),
    )
