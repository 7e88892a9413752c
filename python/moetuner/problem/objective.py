"""Objective: the value of a placement to a problem, for every goal and regime."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, wraps
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.cost import CostModel
from moetuner.evaluation import copies, figures, losses, replay
from moetuner.evaluation.losses import Domain
from moetuner.evaluation.options import ReplayOptions
from moetuner.placement import Placement, blocks
from moetuner.problem.caps import compute_slowest_load
from moetuner.problem.goals import AIMS, TRAFFIC_WORDS, Goal, Words
from moetuner.problem.windows import Windows
from moetuner.serving import Serving, phases
from moetuner.serving.regimes import WAYS
from moetuner.statistics import RoutingStatistics
from moetuner.statistics.sets import ExpertSets
from moetuner.topology import Regime

Floats = NDArray[np.float64]
Value = TypeVar("Value")


# Weight of the busiest device after a loss in the objective: the intact machine comes first.
LOSS_SHARE = 0.1
# Placements whose figures are cached, the most recent ones.
RECENT = 16


Method = Callable[[Any, Placement], Value]


class _Recent(Generic[Value]):
    """The most recent values of a search, by key.

    Results for a recording are kept as long as it is (``compute_once``). Those for placements are
    not: a search judges thousands, and comes back to the last few. Threads may share the values:
    the dictionary is replaced as a whole.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._values: dict[Hashable, Value] = {}

    def find(self, keys: Iterable[Hashable]) -> dict[Hashable, Value]:
        """Return the values of those keys that have one."""
        values = self._values
        return {key: values[key] for key in keys if key in values}

    def add(self, values: Mapping[Hashable, Value]) -> None:
        """Add values, and drop the oldest ones beyond the number that is kept."""
        both = (*self._values.items(), *values.items())
        self._values = dict(both[-self._number :])


class _LayerVisits:
    """Tokens that visit devices and nodes, cached by layer.

    Placements that a search judges one after the other differ in a few layers, and mixtures of
    layers in none.
    """

    def __init__(self, serving: Serving, sets: Sequence[ExpertSets] | None) -> None:
        self._serving, self._sets = serving, sets
        self._recent: _Recent[tuple[Floats, Floats]] = _Recent(RECENT * len(sets or ()))

    def count(self, placement: Placement) -> tuple[Floats, Floats]:
        """Count the tokens that visit every device [L,D], and every node [L,N]."""
        assert self._sets is not None
        keys = [(layer, slots.tobytes()) for layer, slots in enumerate(placement.slots)]
        counted = self._recent.find(keys)
        new = [layer for layer, key in enumerate(keys) if key not in counted]
        if new:
            by_device, by_node = copies.count_visits(
                Placement(placement.slots[new], num_experts=placement.num_experts),
                self._serving.topology,
                self._serving.split,
                [self._sets[layer] for layer in new],
            )
            by_device.setflags(write=False)
            by_node.setflags(write=False)
            visits = zip(by_device, by_node, strict=True)
            counted.update(zip((keys[layer] for layer in new), visits, strict=True))
            self._recent.add(counted)
        devices, nodes = zip(*(counted[key] for key in keys), strict=True)
        return np.stack(devices), np.stack(nodes)


def _recall(compute: Method[Value]) -> Method[Value]:
    """Return a method of an objective that keeps its most recent values, read-only.

    A solve needs the figures of some placements again and again.
    """

    @wraps(compute)
    def recall(self: Objective, placement: Placement) -> Value:
        check.instance("placement", placement, Placement)
        key = (compute.__name__, placement.slots.tobytes())
        found = self._recent.find([key])
        if key in found:
            return cast("Value", found[key])
        value = compute(self, placement)
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
        self._recent.add({key: value})
        return value

    return recall


def choose_goal(objective: Goal | None, max_imbalance: float | None) -> Goal:
    """Return the given objective; by default traffic under a load cap, else time."""
    if objective is not None:
        return objective
    return "time" if max_imbalance is None else "traffic"


def choose_tables(regime: Regime, goal: Goal) -> dict[str, bool]:
    """Return the tables that an objective needs, as arguments of ``RoutingStatistics.from_trace``.

    A time in regime dispatch is computed from expert sets, so it needs no pairs, which take most of
    the time of counting. A search for the fewest visits begins with pairs.
    """
    # Balance does not depend on visits, and sets take memory.
    sets = WAYS[regime].visits_devices and AIMS[goal].costs_traffic
    pairs = not (sets and AIMS[goal].costs_loads)
    return {"sets": sets, "transitions": pairs, "coactivation": pairs}


class Objective:
    """The objective of a problem as a function of placements, to be minimised.

    Get it from ``Problem.objective_function``.

    ``time`` is microseconds of a layer, as ``evaluate`` predicts them for the problem's own
    statistics, cost model, split and regime. ``balance`` is max / mean load of devices, each over
    its speed. Both are costs of windows and layers, over a reference, under the weights and the
    risk of the problem's windows.

    ``traffic`` is a share of the traffic: of transitions (``follow``) or of co-activated pairs
    (``dispatch``), at the cost of their link. In regime dispatch, if expert sets were counted, it
    is the mean number of devices that a token visits, plus the nodes at their extra cost.

    Parameters
    ----------
    statistics, serving
        Counts of the traffic, and how it is served.
    goal
        Kind of the objective.
    windows
        Windows of load, with their weights.
    shares
        Shares of the serving time, by tokens of a window.
    by_groups
        True if groups of the traffic have weights.
    survive
        Failure domain whose loss counts; None for none.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[[6, 2, 2, 2]]])
    >>> problem = mt.Problem(statistics, mt.Topology(devices=2), objective="balance")
    >>> objective = problem.objective_function
    >>> objective.text(objective.value(mt.solve(problem).placement))
    'imbalance 1.3333'
    """

    def __init__(
        self,
        statistics: RoutingStatistics,
        serving: Serving,
        *,
        goal: Goal,
        windows: Windows,
        shares: Mapping[int | None, float],
        by_groups: bool,
        survive: Domain | None = None,
    ) -> None:
        self.statistics, self.serving = statistics, serving
        self.topology, self.way = serving.topology, serving.way
        self.goal, self.aim, self.windows, self.shares = goal, AIMS[goal], windows, shares
        self._by_groups, self.survive = by_groups, survive
        self._recent: _Recent[Any] = _Recent(RECENT)
        self._visits_of_layers = _LayerVisits(serving, statistics.sets)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the cached values, which no pickle or copy takes along."""
        visits = _LayerVisits(self.serving, self.statistics.sets)
        empty = {"_recent": _Recent(RECENT), "_visits_of_layers": visits}
        return {**self.__dict__, **empty}

    def _count_visits_with(self, other: Objective) -> None:
        """Share the cached visits with another objective: they do not depend on windows of load."""
        self._visits_of_layers = other._visits_of_layers

    def __repr__(self) -> str:
        """Return goal and regime."""
        return f"Objective({self.goal!r}, regime={self.serving.regime!r})"

    # For every goal.

    def value(self, placement: Placement) -> float:
        """Return the objective of a placement, in ``unit``."""
        check.instance("placement", placement, Placement)
        if self.aim.costs_loads:
            value = float(self.compute_values(self.window_cost(placement).sum(axis=1)))
        else:
            value = self.traffic(placement)
        return value * float(self.layer_factors(placement).mean())

    @property
    def is_of_windows(self) -> bool:
        """True if costs of windows are all that counts: ``layer_factors`` are 1."""
        return self.survive is None

    def layer_factors(self, placement: Placement) -> Floats:
        """Compute the factor [L] by which the cost of every layer rises besides its windows.

        The load of the busiest device after the worst loss raises it: 1 where loads stay even, or
        where nothing has to survive.
        """
        if self.is_of_windows:
            return np.ones(placement.layers)
        return self._loss_factors(placement)

    def _loss_factors(self, placement: Placement) -> Floats:
        """Compute the factor [L] that the busiest device after the worst loss gives a layer."""
        assert self.survive is not None
        load, topology = self.statistics.total_load, self.topology
        imbalance, _ = losses.compute_imbalances_after_loss(
            placement, load, topology, self.survive, split=self.serving.split
        )
        factor: Floats = 1 + LOSS_SHARE * (imbalance.max(axis=0) - 1)
        return factor

    def compute_values(self, costs: Floats) -> Floats:
        """Compute values [...], in ``unit``, from costs of windows [...,W]."""
        return self.windows.values(costs, self.reference) * self._mean_reference

    @property
    def has_needed_tables(self) -> bool:
        """True if the statistics have the tables that the objective needs."""
        return self.aim.costs_loads or self.has_traffic

    @property
    def joins_layers(self) -> bool:
        """True if transitions from layer to layer cost something."""
        return self.aim.costs_traffic and self.way.joins_layers and self.statistics.layers > 1

    @property
    def is_sum_of_layers(self) -> bool:
        """True if the objective is a sum over layers, so that each may be placed by itself."""
        return self.has_needed_tables and not self.joins_layers and self.is_of_windows

    def layer_costs(self, placement: Placement) -> Floats:
        """Compute the cost of layers [L,1], or of layers and windows [L,W] under a risk."""
        if not self.aim.costs_loads:
            return self.layers_traffic(placement)[:, None]
        costs = self.window_cost(placement).T
        return self.compute_values(costs)[:, None] if self.windows.is_mean else costs

    @property
    def _words(self) -> Words:
        """Words of the value, with the costs of nodes and links that differ."""
        words = self.aim.words
        if words is not None:
            return words
        words = TRAFFIC_WORDS["sets" if self.has_expert_sets else self.way.pairs]
        if self.has_expert_sets and (node := self.visit_costs[1]):
            both = (
                f"fanout + {node:.3g} node fanout",
                f"fanout + {node:.3g} x node fanout = {{:.4f}}",
            )
            return Words(*both, words.figure)
        if self.way.joins_layers and np.unique(self.link_cost).size > 2:
            return words._replace(text="cost of links {:.4f} per transition")
        return words

    @property
    def unit(self) -> str:
        """Unit of the value, for JSON."""
        return self._words.unit

    def text(self, value: float) -> str:
        """Return a value with its unit, for a sentence."""
        if not check.is_number(value):
            raise TypeError(f"value must be a finite number, got {check.shown(value)}")
        if self.survive is not None:
            load_after_loss = f"{100 * LOSS_SHARE:g} % of the busiest device's load"
            return f"{self._text(value)}, with {load_after_loss} after the loss of a {self.survive}"
        return self._text(value)

    def _text(self, value: float) -> str:
        """Return a value with its unit, without the words on losses."""
        where = phases.describe(self.shares) if self.aim.costs_loads else ""
        return self._words.text.format(value) + (f", in {where}" if where else "")

    @property
    def is_predicted_time(self) -> bool:
        """True if the value is the predicted time of ``evaluate``, as far as counts give it."""
        is_mean = self.windows.risk == "mean" and not self._by_groups and self.is_of_windows
        return self.aim.predicts_time and is_mean and len(self.shares) == 1

    @property
    def figure(self) -> str:
        """Figure of an evaluation that is nearest to the objective."""
        return self._words.figure

    @property
    def figures(self) -> tuple[str, ...]:
        """Figures of an evaluation to show beside imbalance in bursts and mixed."""
        visits_nodes = self.way.visits_devices and self.topology.nodes > 1
        if self.aim.predicts_time:
            visited = "node_fanout" if visits_nodes else "fanout"
            return ("crossing" if self.way.joins_layers else visited, "predicted_layer_us")
        return ("imbalance_total", "node_fanout" if visits_nodes else "crossing", "fanout")

    @property
    def lacks(self) -> str | None:
        """Sentence on a table that the statistics lack, and what follows; None if they have all."""
        if not self.aim.costs_traffic:
            return None
        if not self.has_traffic:
            return f"no {self.way.pairs_name}: methods could only balance the load"
        # Without pairs every token has one expert, and visits one device.
        if self.coactivation is None:
            return None
        if self.aim.predicts_time:
            return "no expert sets: the devices that tokens visit are estimated from pairs"
        return "no expert sets: co-activated pairs stand for the devices that tokens visit"

    # The tables that the objective depends on besides load: searches make a term of each.

    @property
    def cost_model(self) -> CostModel | None:
        """Cost model of the predicted time; None if time is not the goal."""
        return self.serving.cost_model if self.aim.predicts_time else None

    @property
    def transitions(self) -> NDArray[np.uint64] | None:
        """Transitions [L-1,E,E] that the objective counts; None if layers are independent."""
        return self._counted_pairs if self.way.joins_layers else None

    @property
    def sets(self) -> tuple[ExpertSets, ...] | None:
        """Expert sets whose visits the objective counts; None if it counts none."""
        is_counted = self.has_expert_sets and self.aim.costs_traffic
        return self.statistics.sets if is_counted else None

    @property
    def coactivation(self) -> NDArray[np.uint64] | None:
        """Co-activation [L,E,E] in place of expert sets that were not counted; None otherwise."""
        lacks_sets = self.way.visits_devices and not self.has_expert_sets
        return self._counted_pairs if lacks_sets else None

    @property
    def _counted_pairs(self) -> NDArray[np.uint64] | None:
        pairs = self.pairs if self.aim.costs_traffic else None
        return pairs if pairs is not None and pairs.any() else None

    # For time and balance: costs of windows and layers, over a reference.

    @_recall
    def window_cost(self, placement: Placement) -> Floats:
        """Compute the contribution of every window and layer [W,L] to time or balance."""
        compute = self._layer_times if self.aim.predicts_time else self._slowest
        return self.windows.map(compute(placement))

    @cached_property
    def reference(self) -> Floats:
        """Reference cost of every window [W], over which its costs are taken.

        For time, the mean time of a step of its size, or 1 if all windows have one size. For
        balance, the load over speed of evenly loaded devices.
        """
        if not self.aim.predicts_time:
            return self._even_load
        reference = self.windows.reference
        return np.ones(len(self.windows)) if reference is None else reference

    @cached_property
    def _mean_reference(self) -> float:
        """Factor that turns a ratio to the reference into ``unit``: 1 for balance."""
        if not self.aim.predicts_time or self.windows.reference is None:
            return 1.0
        weight = self.windows.weight
        return float((weight * self.windows.reference).sum() / weight.sum())

    @property
    def cost_in_blocks(self) -> float:
        """Mean cost of a window if experts are in blocks, or for balance, spread evenly.

        It turns shares of the time into weights of windows of several sizes.
        """
        cost, weight = self._even_load, self.windows.weight
        if self.aim.predicts_time:
            sizes = self.statistics.layers, self.statistics.num_experts, self.topology.devices
            cost = self.window_cost(blocks(*sizes)).sum(axis=1)
        return float((weight * cost).sum() / weight.sum())

    def imbalances(self, placement: Placement) -> Floats:
        """Compute the contribution of every layer [L] to max / mean load, for every goal."""
        served = self.windows.map(self._slowest(placement))
        return np.array([self.windows.value(costs, self._even_load) for costs in served.T])

    @cached_property
    def _even_load(self) -> Floats:
        """Load over speed [W], summed over layers, of evenly loaded devices in every window."""
        speed = self.topology.speed_of_device
        mean: Floats = self.windows.tokens / speed.sum()
        return mean

    def _slowest(self, placement: Placement) -> Callable[[Floats], Floats]:
        """Return a function from loads [W,L,E] to the slowest device's load over speed [W,L]."""
        return lambda load: compute_slowest_load(placement, load, self.topology, self.serving.split)

    def _layer_times(self, placement: Placement) -> Callable[[Floats], Floats]:
        """Return a function from loads [W,L,E] to predicted microseconds over L [W,L]."""
        setting = replay.Setting(placement, self.serving, ReplayOptions(mixed=False))
        visits = None if self.statistics.sets is None else self._count_visits(placement)
        follows = self.way.joins_layers
        expected = replay.Expected(self.statistics, setting, follows=follows, visits=visits)
        # Home devices follow from the load of all windows, which may come in several chunks.
        total = None if self.windows.are_few else self.windows.total[None]

        def times(load: Floats) -> Floats:
            counts = expected.counts(load, total)
            return figures.compute_layer_us(counts, setting) / self.statistics.layers

        return times

    # Traffic, for every goal.

    @property
    def has_expert_sets(self) -> bool:
        """True if expert sets were counted, so that traffic is the devices that tokens visit."""
        return self.way.visits_devices and self.statistics.sets is not None

    @property
    def is_of_loads(self) -> bool:
        """True if no table of traffic was counted that costs something: loads alone do."""
        return self.aim.costs_loads and not self.knows_visits and self.transitions is None

    @property
    def knows_visits(self) -> bool:
        """True if expert sets or pairs tell which devices tokens visit.

        If not, times count one device for each expert of a token.
        """
        return self.sets is not None or self.coactivation is not None

    @property
    def counts_pairs(self) -> bool:
        """True if the goal is traffic of pairs: its bounds are integer costs."""
        return not (self.aim.costs_loads or self.has_expert_sets)

    @property
    def pairs(self) -> NDArray[np.uint64] | None:
        """Pairs that cost traffic in the regime, [L-1,E,E] or [L,E,E]; None if not counted."""
        pairs: NDArray[np.uint64] | None = getattr(self.statistics, self.way.pairs)
        return pairs

    @property
    def has_traffic(self) -> bool:
        """True if the tables of the regime's traffic were counted: expert sets or pairs."""
        return self.has_expert_sets or self.pairs is not None

    @_recall
    def traffic(self, placement: Placement) -> float:
        """Compute the traffic of a placement, as ``value`` is for that goal; 0 without counts.

        With one copy of each expert it is ``cost`` over ``scale``; with copies, its expectation.
        """
        if self.has_expert_sets:
            return float(self._visits(placement).sum())
        if not placement.has_copies:
            return self.cost(placement) / self.scale
        if self.pairs is None:
            return 0.0
        if not self.way.joins_layers:
            return float(self._compute_apart(placement).sum())
        topology = self.topology
        moved = copies.count_pairs(placement, topology, self.serving.split, self.pairs)
        return float((moved * topology.cost).sum()) / self.scale

    def layers_traffic(self, placement: Placement) -> Floats:
        """Compute the contribution of every layer [L] to the traffic of dispatch; 0 for follow."""
        if self.has_expert_sets:
            return self._visits(placement)
        has_pairs = not self.way.joins_layers and self.has_traffic
        return self._compute_apart(placement) if has_pairs else np.zeros(self.statistics.layers)

    def cost(self, placement: Placement) -> int:
        """Compute the exact cost of the pairs of a placement with one copy of each expert.

        ``follow``: transitions [E,E] of neighbouring layers times ``link_cost`` between the
        experts' devices. ``dispatch``: co-activated pairs likewise, each once.
        """
        check.instance("placement", placement, Placement)
        if self.pairs is None:
            return 0
        device_of = placement.device_of
        there = device_of[1:] if self.way.joins_layers else device_of
        total = _core.pair_cost(
            device_of[: len(there)].astype(np.uint16),
            there.astype(np.uint16),
            self.pairs,
            self.link_cost.astype(np.uint64),
        )
        return total // self.way.times_counted

    @cached_property
    def link_cost(self) -> NDArray[np.int64]:
        """Cost of a pair by its devices [D,D]; a co-activated pair costs 1 on any two devices."""
        if self.way.joins_layers:
            return self.topology.cost
        return 1 - np.eye(self.topology.devices, dtype=np.int64)

    @cached_property
    def scale(self) -> int:
        """Cost if every counted pair moved over the cheapest link: the whole of a share."""
        pairs = self.pairs
        counted = 0 if pairs is None else int(pairs.sum(dtype=np.uint64))  # below 2**63
        cost = self.link_cost
        cheapest = int(cost[cost > 0].min()) if self.topology.devices > 1 else 1
        return max(counted // self.way.times_counted * cheapest, 1)

    @cached_property
    def tokens(self) -> int:
        """Tokens whose expert sets were counted, summed over layers; 0 without sets."""
        sets = self.statistics.sets or ()
        return sum(int(layer_sets.counts.sum(dtype=np.uint64)) for layer_sets in sets)

    @cached_property
    def visit_costs(self) -> tuple[float, float]:
        """Cost of a token's visit of a device, and its additional cost of a node.

        A token crosses to a node once and is passed on inside it. So a visited node costs a link
        between nodes, in units of a link inside.
        """
        topology = self.topology
        if topology.nodes < 2 or topology.node_size < 2:
            return 1.0, 0.0
        node, cost = topology.node_of_device, topology.cost
        beyond = np.not_equal.outer(node, node)
        inside = cost[~beyond & (cost > 0)].mean() if (cost[~beyond] > 0).any() else 1.0
        return 1.0, float(cost[beyond].mean() / inside)

    @property
    def link_us(self) -> Floats:
        """Microseconds of a transition by its devices [D,D].

        A token's state moves once to each of its experts in the next layer, but is counted once for
        each of its top-k experts before. So a pair takes 1 / top-k of the time of a row.
        """
        model, topology = self.serving.cost_model, self.topology
        assert model is not None
        crossing = model.crossing_us(topology, returns=self.way.visits_devices)
        price: Floats = crossing[topology.tier] / self.top_k
        return price

    @property
    def top_k(self) -> float:
        """Experts of a token in a layer, from the counts; 1 if they do not say it."""
        if self.statistics.sets is not None:
            return float(self.statistics.sets[0].top_k)
        pairs, load = self.statistics.transitions, float(self.statistics.total_load[:-1].sum())
        return max(float(pairs.sum()) / load, 1.0) if pairs is not None and load else 1.0

    def _compute_apart(self, placement: Placement) -> Floats:
        """Compute the expected share of all co-activated pairs on two devices, by layer [L]."""
        share = copies.compute_slot_shares(placement, self.topology, self.serving.split)
        pairs = self.statistics.coactivation_or_empty
        return _core.expected_apart((placement.slots, share), pairs) / self.scale

    def _visits(self, placement: Placement) -> Floats:
        """Compute the contribution of every layer [L] to the cost of a token's visits."""
        device_cost, node_cost = self.visit_costs
        devices, nodes = self._count_visits(placement)
        total: Floats = device_cost * devices.sum(axis=1) + node_cost * nodes.sum(axis=1)
        return total / max(self.tokens, 1)

    def _count_visits(self, placement: Placement) -> tuple[Floats, Floats]:
        """Count the tokens that visit every device [L,D], and every node [L,N]."""
        check.instance("placement", placement, Placement)
        return self._visits_of_layers.count(placement)
