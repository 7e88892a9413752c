"""Objective: what a placement is worth to a problem. Here alone goal and regime are told apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.cost import CostModel
from moetuner.evaluation import copies, figures, losses, replay
from moetuner.evaluation.losses import Domain
from moetuner.evaluation.options import ReplayOptions
from moetuner.placement import Placement, blocks
from moetuner.problem.caps import slowest
from moetuner.problem.windows import Windows
from moetuner.serving import Serving, phases
from moetuner.statistics import ExpertSets, RoutingStatistics
from moetuner.topology import Regime

Floats = NDArray[np.float64]
Goal = Literal["time", "balance", "traffic"]
Value = TypeVar("Value")


# Part of the objective that the busiest device after a loss is: intact load comes first.
LOSS_SHARE = 0.1
# Placements whose figures are cached.
CACHED = 16


Method = Callable[[Any, Placement], Value]


def _cached(store: str) -> Callable[[Method[Value]], Method[Value]]:
    """Return a decorator of methods that keep their last values, read-only, in an attribute.

    A solve needs some again and again.
    """

    def decorate(compute: Method[Value]) -> Method[Value]:
        @wraps(compute)
        def recall(self: Any, placement: Placement) -> Value:
            check.instance("placement", placement, Placement)
            key, last = (compute, placement.slots.tobytes()), getattr(self, store)
            for other, value in tuple(last):
                if other == key:
                    return cast("Value", value)
            value = compute(self, placement)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            last.append((key, value))
            return value

        return recall

    return decorate


def goal_for(objective: Goal | None, max_imbalance: float | None) -> Goal:
    """Return what is made small: what was asked for; by default traffic under a load cap alone."""
    if objective is not None:
        return objective
    return "time" if max_imbalance is None else "traffic"


def tables_for(regime: Regime, goal: Goal) -> dict[str, bool]:
    """Return which tables of a trace an objective is made of, as ``from_trace`` takes them.

    Where expert sets say all that a time is made of, nothing asks for pairs besides them, which
    take most of the time of counting. A search for the fewest visits begins with pairs, and its
    certificates are of all that is counted.
    """
    # Visits are no part of balance, and sets take memory.
    sets = regime == "dispatch" and goal != "balance"
    pairs = not sets or goal == "traffic"
    return {"sets": sets, "transitions": pairs, "coactivation": pairs}


# Unit, text of a value, and nearest figure of an evaluation, by what is counted.
WORDS = {
    "time": ("us per layer", "{:,.1f} us per layer", "predicted_layer_us"),
    "balance": ("max / mean load", "imbalance {:.4f}", "imbalance"),
    "visits": ("fanout", "fanout {:.4f}", "fanout"),
    "follow": ("share of the traffic", "crossing {:.4f}", "crossing"),
    "dispatch": ("share of the traffic", "{:.4f} of the co-activations apart", "fanout"),
}


def decimals_of(goal: Goal | None) -> int:
    """Return the decimals of an objective's value that say something."""
    return 1 if goal == "time" else 4


class Objective:
    """What a problem makes small, as numbers: the lower, the better. The problem makes it.

    ``time`` is microseconds of a layer, as ``evaluate`` predicts them for the problem's own
    statistics, cost model, split and regime. ``balance`` is max / mean load of devices, each over
    its speed. Both are costs of windows and layers, over a reference, under the weights and the
    risk of the problem's windows.

    ``traffic`` is a share of the traffic: of transitions (``follow``) or of co-activated pairs
    (``dispatch``), at the cost of their link. In regime dispatch, where expert sets are known, it
    is what tokens visit: devices and, at what their links cost more, nodes.

    Parameters
    ----------
    statistics, serving
        Counts of the traffic, and how it is served.
    goal
        What is made small.
    windows
        Windows of load that are judged.
    shares
        Share of the serving time of each size of windows that counts, by its tokens.
    by_groups
        Whether groups of the traffic are weighed.
    survive
        What may be lost; None for nothing.

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
        self.topology, self.regime = serving.topology, serving.regime
        self.goal, self.windows, self.shares = goal, windows, shares
        self._by_groups, self.survive = by_groups, survive
        self._last: deque[tuple[Any, Any]] = deque(maxlen=CACHED)
        self._visited: deque[tuple[Any, Any]] = deque(maxlen=CACHED)

    def __getstate__(self) -> dict[str, Any]:
        """Drop what is cached when a problem is pickled or copied."""
        empty = {name: deque[Any](maxlen=CACHED) for name in ("_last", "_visited")}
        return {**self.__dict__, **empty}

    def _count_visits_with(self, other: Objective) -> None:
        """Count what tokens visit once for both: windows of load do not alter it."""
        self._visited = other._visited

    def __repr__(self) -> str:
        """Return what is made small, and in which regime."""
        return f"Objective({self.goal!r}, regime={self.regime!r})"

    # Of any goal.

    def value(self, placement: Placement) -> float:
        """Return the objective of a placement, in ``unit``."""
        check.instance("placement", placement, Placement)
        if self.goal == "traffic":
            value = self.traffic(placement)
        else:
            value = float(self.worth(self.window_cost(placement).sum(axis=1)))
        return value * float(self.weigh_losses(placement).mean())

    def weigh_losses(self, placement: Placement) -> Floats:
        """Compute what the busiest device after a loss makes of the cost of every layer [L].

        That is the worst of all losses, as a factor: 1 where loads are even, or nothing has to
        survive.
        """
        if self.survive is None:
            return np.ones(placement.layers)
        load, topology = self.statistics.total_load, self.topology
        imbalance, _ = losses.compute_imbalances_after_loss(
            placement, load, topology, self.survive, split=self.serving.split
        )
        factor: Floats = 1 + LOSS_SHARE * (imbalance.max(axis=0) - 1)
        return factor

    def worth(self, costs: Floats) -> Floats:
        """Compute the value of each of several costs of windows [...,W], in ``unit``."""
        return self.windows.values(costs, self.reference) * self._mean_reference

    @property
    def is_known(self) -> bool:
        """Whether the statistics suffice to say what the objective is."""
        return self.goal != "traffic" or self.has_traffic

    @property
    def is_sum_of_layers(self) -> bool:
        """Whether it is a sum over layers, of which each may be placed by itself."""
        joins = self.goal != "balance" and self.regime == "follow" and self.statistics.layers > 1
        return self.is_known and not joins and self.survive is None

    def layer_costs(self, placement: Placement) -> Floats:
        """Compute what layers cost [L,N]: of windows that do not simply add up, in each."""
        if self.goal == "traffic":
            return self.layers_traffic(placement)[:, None]
        costs = self.window_cost(placement).T
        return self.worth(costs)[:, None] if self.windows.is_mean else costs

    @property
    def _words(self) -> tuple[str, str, str]:
        """Unit, text of a value, and nearest figure, by what is counted."""
        if self.goal == "traffic" and self.counts_visits:
            return WORDS["visits"]
        return WORDS[self.regime if self.goal == "traffic" else self.goal]

    @property
    def unit(self) -> str:
        """Unit of the value, for JSON."""
        node = self.visit_costs[1] if self._words is WORDS["visits"] else 0.0
        return f"fanout + {node:.3g} node fanout" if node else self._words[0]

    def text(self, value: float) -> str:
        """Return a value with its unit, as it stands in a sentence."""
        if not check.is_number(value):
            raise TypeError(f"value must be a finite number, got {check.shown(value)}")
        if self.survive is not None:
            part = f"{100 * LOSS_SHARE:g} % of the busiest device's load"
            return f"{self._text(value)}, with {part} after the loss of a {self.survive}"
        return self._text(value)

    def _text(self, value: float) -> str:
        """Return a value with its unit, whatever is lost."""
        node = self.visit_costs[1] if self._words is WORDS["visits"] else 0.0
        if node:
            return f"fanout + {node:.3g} x node fanout = {value:.4f}"
        if self._words is WORDS["follow"] and np.unique(self.link_cost).size > 2:
            return f"cost of links {value:.4f} per transition"
        where = phases.words(self.shares) if self.goal != "traffic" else ""
        return self._words[1].format(value) + (f", in {where}" if where else "")

    @property
    def decimals(self) -> int:
        """Decimals of the value that say something, in a table."""
        return decimals_of(self.goal)

    @property
    def is_predicted_time(self) -> bool:
        """Whether it is the predicted time that ``evaluate`` replays, as far as counts tell it."""
        plain = self.windows.risk == "mean" and not self._by_groups and self.survive is None
        return self.goal == "time" and plain and len(self.shares) == 1

    @property
    def figure(self) -> str:
        """Figure of an evaluation that comes nearest to the objective on other traffic."""
        return self._words[2]

    @property
    def figures(self) -> tuple[str, ...]:
        """Figures of an evaluation that say most of it, besides imbalance in bursts and mixed.

        Nodes are what dispatch visits, if there are any.
        """
        of_nodes = self.regime == "dispatch" and self.topology.nodes > 1
        if self.goal == "time":
            visited = "node_fanout" if of_nodes else "fanout"
            return ("crossing" if self.regime == "follow" else visited, "predicted_layer_us")
        return ("imbalance_total", "node_fanout" if of_nodes else "crossing", "fanout")

    @property
    def lacks(self) -> str | None:
        """What the statistics lack of what the objective counts, and what follows, in words."""
        if self.goal == "balance":
            return None
        if not self.has_traffic:
            pairs = "transitions" if self.regime == "follow" else "co-activation"
            return f"no {pairs}: methods could only balance the load"
        # Without any pair every token has one expert, and visits one device.
        if self.coactivation is None:
            return None
        if self.goal == "traffic":
            return "no expert sets: co-activated pairs stand for the devices that tokens visit"
        return "no expert sets: the devices that tokens visit are estimated from pairs"

    # What it depends on besides load: searches make a term of each.

    @property
    def cost_model(self) -> CostModel | None:
        """What time is made of; None where time is not the goal."""
        return self.serving.cost_model if self.goal == "time" else None

    @property
    def transitions(self) -> NDArray[np.uint64] | None:
        """Counts [L-1,E,E] that join the layers; None where layers are independent."""
        return self._some_pairs if self.regime == "follow" else None

    @property
    def sets(self) -> tuple[ExpertSets, ...] | None:
        """Expert sets whose visits are counted; None where none are."""
        counted = self.counts_visits and self.goal != "balance"
        return self.statistics.sets if counted else None

    @property
    def coactivation(self) -> NDArray[np.uint64] | None:
        """Counts [L,E,E] of pairs that stand for visits of unknown sets; None elsewhere."""
        stand_in = self.regime == "dispatch" and not self.counts_visits
        return self._some_pairs if stand_in else None

    @property
    def _some_pairs(self) -> NDArray[np.uint64] | None:
        pairs = None if self.goal == "balance" else self.pairs
        return pairs if pairs is not None and pairs.any() else None

    # Of time and balance: costs of windows and layers, over a reference.

    @_cached("_last")
    def window_cost(self, placement: Placement) -> Floats:
        """Compute what every window and layer [W,L] adds to time or balance."""
        compute = self._layer_times if self.goal == "time" else self._slowest
        return self.windows.map(compute(placement))

    @cached_property
    def reference(self) -> Floats:
        """What a window's costs are measured by [W].

        For time what a step of its size takes, or 1 where all are of one; else load over speed if
        even.
        """
        if self.goal != "time":
            return self._even
        reference = self.windows.reference
        return np.ones(len(self.windows)) if reference is None else reference

    @cached_property
    def _mean_reference(self) -> float:
        """What a value is times its reference: of time the mean over windows, else nothing."""
        if self.goal != "time" or self.windows.reference is None:
            return 1.0
        weight = self.windows.weight
        return float((weight * self.windows.reference).sum() / weight.sum())

    @property
    def cost_in_blocks(self) -> float:
        """What a window costs on average if experts are placed in blocks, or evenly.

        By this the time of several sizes of windows is shared.
        """
        cost, weight = self._even, self.windows.weight
        if self.goal == "time":
            sizes = self.statistics.layers, self.statistics.experts, self.topology.devices
            cost = self.window_cost(blocks(*sizes)).sum(axis=1)
        return float((weight * cost).sum() / weight.sum())

    def imbalances(self, placement: Placement) -> Floats:
        """Compute what every layer [L] adds to max / mean load, whatever the goal is."""
        served = self.windows.map(self._slowest(placement))
        return np.array([self.windows.value(costs, self._even) for costs in served.T])

    @cached_property
    def _even(self) -> Floats:
        """Load over speed of every window's layers [W], if every device had its part."""
        speed = self.topology.speed_of_device
        mean: Floats = self.windows.tokens / speed.sum()
        return mean

    def _slowest(self, placement: Placement) -> Callable[[Floats], Floats]:
        """Return what computes the load over speed of the slowest devices [W,L] of windows."""
        return lambda load: slowest(placement, load, self.topology, self.serving.split)

    def _layer_times(self, placement: Placement) -> Callable[[Floats], Floats]:
        """Return what predicts microseconds over L of every layer of windows [W,L]."""
        setting = replay.Setting(placement, self.serving, ReplayOptions(mixed=False))
        visits = None if self.statistics.sets is None else self._count_visits(placement)
        follows = self.regime == "follow"
        expected = replay.Expected(self.statistics, setting, follows=follows, visits=visits)
        # Homes are of all windows together, which may come in several blocks.
        total = None if self.windows.load.dtype == np.float64 else self.windows.total[None]

        def times(load: Floats) -> Floats:
            counts = expected.counts(load, total)
            return figures.compute_layer_us(counts, setting) / self.statistics.layers

        return times

    # Of traffic, whatever the goal is.

    @property
    def counts_visits(self) -> bool:
        """Whether traffic is counted in devices that tokens visit: where expert sets are known."""
        return self.regime == "dispatch" and self.statistics.sets is not None

    @property
    def knows_visits(self) -> bool:
        """Whether times count devices that tokens visit, from expert sets or estimated from pairs.

        Else a token visits one device for each of its experts.
        """
        return self.sets is not None or self.coactivation is not None

    @property
    def counts_pairs(self) -> bool:
        """Whether traffic of pairs is the goal: bounds then are costs, in whole numbers."""
        return self.goal == "traffic" and not self.counts_visits

    @property
    def pairs(self) -> NDArray[np.uint64] | None:
        """Counts [L-1,E,E] or [L,E,E] of what the regime pays for; None where not counted."""
        statistics = self.statistics
        return statistics.transitions if self.regime == "follow" else statistics.coactivation

    @property
    def has_traffic(self) -> bool:
        """Whether what the regime's traffic is made of was counted: expert sets or pairs."""
        return self.counts_visits or self.pairs is not None

    @_cached("_last")
    def traffic(self, placement: Placement) -> float:
        """Return what ``value`` is with the objective traffic; 0 where nothing was counted.

        With one copy of each expert it is ``cost`` over ``scale``; with copies it is expected.
        """
        if self.counts_visits:
            return float(self._visits(placement).sum())
        if not placement.has_copies:
            return self.cost(placement) / self.scale
        if self.pairs is None:
            return 0.0
        if self.regime == "dispatch":
            return float(self._apart(placement).sum())
        topology = self.topology
        moved = copies.count_pairs(placement, topology, self.serving.split, self.pairs)
        return float((moved * topology.cost).sum()) / self.scale

    def layers_traffic(self, placement: Placement) -> Floats:
        """Compute what every layer [L] adds to the traffic of dispatch; else, or if unknown, 0."""
        if self.counts_visits:
            return self._visits(placement)
        has_pairs = self.regime == "dispatch" and self.has_traffic
        return self._apart(placement) if has_pairs else np.zeros(self.statistics.layers)

    def cost(self, placement: Placement) -> int:
        """Compute the exact cost of the pairs of a placement with one copy of each expert.

        ``follow``: transitions [E,E] of neighbouring layers times ``link_cost`` between the
        experts' devices. ``dispatch``: co-activated pairs likewise, each once.
        """
        check.instance("placement", placement, Placement)
        if self.pairs is None:
            return 0
        device_of = placement.device_of
        there = device_of[1:] if self.regime == "follow" else device_of
        total = _core.pair_cost(
            device_of[: len(there)].astype(np.uint16),
            there.astype(np.uint16),
            self.pairs,
            self.link_cost.astype(np.uint64),
        )
        return total if self.regime == "follow" else total // 2

    @cached_property
    def link_cost(self) -> NDArray[np.int64]:
        """Cost of a pair over a link [D,D]; co-activated ones cost the same between any devices."""
        if self.regime == "follow":
            return self.topology.cost
        return 1 - np.eye(self.topology.devices, dtype=np.int64)

    @cached_property
    def scale(self) -> int:
        """Cost if every counted pair moved over the cheapest link; shares are of it."""
        pairs = self.pairs
        counted = 0 if pairs is None else int(pairs.sum(dtype=np.uint64))  # below 2**63
        if self.regime == "dispatch":
            counted //= 2
        cost = self.link_cost
        cheapest = int(cost[cost > 0].min()) if self.topology.devices > 1 else 1
        return max(counted * cheapest, 1)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all layers, whose visits are counted; 0 where expert sets are not known."""
        sets = self.statistics.sets or ()
        return sum(int(layer_sets.counts.sum(dtype=np.uint64)) for layer_sets in sets)

    @cached_property
    def visit_costs(self) -> tuple[float, float]:
        """Cost of a token's visit of a device and, on top of it, of a node.

        A token crosses to a node once and is handed on inside it, so a node costs a link between
        nodes where a device costs one inside.
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
        """Microseconds of a pair of experts that meet over a link [D,D].

        A token's state goes to the next layer's experts once each, but is counted with each of its
        own experts: in pairs, it is a top-k-th of a row.
        """
        model, topology = self.serving.cost_model, self.topology
        assert model is not None
        crossing = model.crossing_us(topology, returns=self.regime == "dispatch")
        price: Floats = crossing[topology.tier] / self.top_k
        return price

    @property
    def top_k(self) -> float:
        """Experts that a token visits in a layer, from the counts; 1 where they do not tell."""
        if self.statistics.sets is not None:
            return float(self.statistics.sets[0].top_k)
        pairs, load = self.statistics.transitions, float(self.statistics.total_load[:-1].sum())
        return max(float(pairs.sum()) / load, 1.0) if pairs is not None and load else 1.0

    def _apart(self, placement: Placement) -> Floats:
        """Compute the share of all co-activated pairs that are apart, by layer [L]."""
        share = copies.compute_slot_shares(placement, self.topology, self.serving.split)
        pairs = self.statistics.coactivation_or_empty
        return _core.expected_apart((placement.slots, share), pairs) / self.scale

    def _visits(self, placement: Placement) -> Floats:
        """Compute what every layer [L] adds to a token's visits, by ``copies.count_visits``."""
        device_cost, node_cost = self.visit_costs
        devices, nodes = self._count_visits(placement)
        total: Floats = device_cost * devices.sum(axis=1) + node_cost * nodes.sum(axis=1)
        return total / max(self.tokens, 1)

    @_cached("_visited")
    def _count_visits(self, placement: Placement) -> tuple[Floats, Floats]:
        """Count the tokens that visit every device [L,D], and every node [L,N]."""
        assert self.statistics.sets is not None
        return copies.count_visits(
            placement, self.topology, self.serving.split, self.statistics.sets
        )
