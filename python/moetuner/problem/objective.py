"""Objective: what a placement is worth to a problem. Here alone goal and regime are told apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import instance, is_number, shown
from moetuner.cost import CostModel
from moetuner.evaluation import copies, expected, figures, replay
from moetuner.evaluation.copies import Split
from moetuner.placement import Placement
from moetuner.problem.caps import slowest
from moetuner.problem.windows import Windows
from moetuner.statistics import ExpertSets, RoutingStatistics
from moetuner.topology import Regime, Topology

Floats = NDArray[np.float64]
Goal = Literal["time", "balance", "traffic"]
Value = TypeVar("Value")


# Placements of which it is remembered what they are worth.
REMEMBERED = 16


class Remembered:
    """What the last placements came to: a solve asks for some of them again and again."""

    def __init__(self) -> None:
        self._known: deque[tuple[tuple[str, bytes], Any]] = deque(maxlen=REMEMBERED)
        self._always: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        """Forget all when a problem is pickled or copied."""
        return Remembered, ()

    def of(self, what: str, placement: Placement, compute: Callable[[], Value]) -> Value:
        """Return what was computed of a placement before, or compute it; nobody may change it."""
        key = what, placement.slots.tobytes()
        for known, value in tuple(self._known):
            if known == key:
                return cast("Value", value)
        value = compute()
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
        self._known.append((key, value))
        return value

    def once(self, what: str, compute: Callable[[], Value]) -> Value:
        """Return what does not depend on the placement, computed when it is first asked for."""
        if what not in self._always:
            self._always[what] = compute()
        return cast("Value", self._always[what])


class Wanted(Protocol):
    """What an objective asks of a problem, which asks it in turn what a placement is worth."""

    @property
    def statistics(self) -> RoutingStatistics: ...  # noqa: D102
    @property
    def topology(self) -> Topology: ...  # noqa: D102
    @property
    def goal(self) -> Goal: ...  # noqa: D102
    @property
    def regime(self) -> Regime: ...  # noqa: D102
    @property
    def split(self) -> Split: ...  # noqa: D102
    @property
    def groups(self) -> object: ...  # noqa: D102
    @property
    def cost_model(self) -> CostModel | None: ...  # noqa: D102
    @property
    def windows(self) -> Windows: ...  # noqa: D102
    @property
    def load(self) -> NDArray[np.uint64]: ...  # noqa: D102
    @property
    def remembered(self) -> Remembered: ...  # noqa: D102
    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def devices(self) -> int: ...  # noqa: D102


class Objective:
    """What a problem makes small, as numbers: the lower, the better.

    ``time`` is microseconds of a layer, as ``evaluate`` predicts them for the problem's own
    statistics, cost model, split and regime. ``balance`` is max / mean load of devices, each over
    its speed. Both are costs of windows and layers, over a reference, under the weights and the
    risk of the problem's windows.

    ``traffic`` is a share of the traffic: of transitions (``follow``) or of co-activated pairs
    (``dispatch``), at the cost of their link. In regime dispatch, where expert sets are known, it
    is what tokens visit: devices and, at what their links cost more, nodes.

    Parameters
    ----------
    problem
        What is to be placed.
    windows
        Windows of load that are judged; all of the problem's by default.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[[6, 2, 2, 2]]])
    >>> problem = mt.Problem(statistics, mt.Topology(devices=2), objective="balance")
    >>> objective = mt.Objective(problem)
    >>> objective.text(objective.value(mt.solve(problem).placement))
    'imbalance 1.3333'
    """

    def __init__(self, problem: Wanted, windows: Windows | None = None) -> None:
        if not isinstance(getattr(problem, "windows", None), Windows):
            raise TypeError(f"problem must be a Problem, got {shown(problem)}")
        if windows is not None:
            instance("windows", windows, Windows)
        self.problem = problem
        self.windows = problem.windows if windows is None else windows

    def __repr__(self) -> str:
        """Return what is made small, and in which regime."""
        return f"Objective({self.problem.goal!r}, regime={self.problem.regime!r})"

    # Of any goal.

    def value(self, placement: Placement) -> float:
        """Return the objective of a placement, in ``unit``."""
        instance("placement", placement, Placement)
        if self.problem.goal == "traffic":
            return self.traffic(placement)
        cost = self.window_cost(placement).sum(axis=1)
        return self.windows.value(cost, self.reference)

    @property
    def is_known(self) -> bool:
        """Whether the statistics suffice to say what the objective is."""
        return self.problem.goal != "traffic" or self.has_traffic

    @property
    def unit(self) -> str:
        """Unit of the value, for JSON."""
        if self.problem.goal == "time":
            return "us per layer"
        if self.problem.goal == "balance":
            return "max / mean load"
        if self.counts_visits:
            _, node = self.visit_costs
            return f"fanout + {node:.3g} node fanout" if node else "fanout"
        return "share of the traffic"

    def text(self, value: float) -> str:
        """Return a value with its unit, as it stands in a sentence."""
        if not is_number(value):
            raise TypeError(f"value must be a finite number, got {shown(value)}")
        if self.problem.goal == "time":
            return f"{value:.1f} us per layer"
        if self.problem.goal == "balance":
            return f"imbalance {value:.4f}"
        if self.counts_visits:
            _, node = self.visit_costs
            name = f"fanout + {node:.3g} x node fanout =" if node else "fanout"
            return f"{name} {value:.4f}"
        if self.problem.regime == "follow":
            return f"crossing {value:.4f}"
        return f"{value:.4f} of the co-activations apart"

    @property
    def decimals(self) -> int:
        """Decimals of the value that say something, in a table."""
        return 1 if self.problem.goal == "time" else 4

    @property
    def is_predicted_time(self) -> bool:
        """Whether it is the predicted time that ``evaluate`` replays, as far as counts tell it."""
        return (
            self.problem.goal == "time"
            and self.windows.risk == "mean"
            and (self.problem.groups is None)
        )

    @property
    def figure(self) -> str:
        """Figure of an evaluation that comes nearest to the objective on other traffic."""
        if self.problem.goal == "time":
            return "predicted_layer_us"
        if self.problem.goal == "traffic":
            return "crossing" if self.problem.regime == "follow" else "fanout"
        return "imbalance"

    @property
    def figures(self) -> tuple[str, ...]:
        """Figures of an evaluation that say most of it, besides imbalance in bursts and mixed.

        Nodes are what dispatch visits, if there are any.
        """
        of_nodes = self.problem.regime == "dispatch" and self.problem.topology.nodes > 1
        if self.problem.goal == "time":
            visited = "node_fanout" if of_nodes else "fanout"
            moved = "crossing" if self.problem.regime == "follow" else visited
            return (moved, "predicted_layer_us")
        return ("imbalance_total", "node_fanout" if of_nodes else "crossing", "fanout")

    @property
    def lacks(self) -> str | None:
        """What the statistics lack of what the objective counts, and what follows, in words."""
        if self.problem.goal == "balance":
            return None
        if not self.has_traffic:
            pairs = "transitions" if self.problem.regime == "follow" else "co-activation"
            return f"no {pairs}: methods could only balance the load"
        by_itself = self.problem.regime == "dispatch" and not self.counts_visits
        if self.problem.goal == "time" and by_itself:
            return "no expert sets: tokens are sent to each of their experts by itself"
        return None

    # What it depends on besides load: searches make a term of each.

    @property
    def cost_model(self) -> CostModel | None:
        """What time is made of; None where time is not the goal."""
        return self.problem.cost_model if self.problem.goal == "time" else None

    @property
    def transitions(self) -> NDArray[np.uint64] | None:
        """Counts [L-1,E,E] that join the layers; None where layers are independent."""
        return self._some_pairs if self.problem.regime == "follow" else None

    @property
    def sets(self) -> tuple[ExpertSets, ...] | None:
        """Expert sets whose visits are counted; None where none are."""
        counted = self.counts_visits and self.problem.goal != "balance"
        return self.problem.statistics.sets if counted else None

    @property
    def coactivation(self) -> NDArray[np.uint64] | None:
        """Counts [L,E,E] of pairs that stand for visits of unknown sets; None elsewhere."""
        stand_in = self.problem.regime == "dispatch" and not self.counts_visits
        return self._some_pairs if stand_in else None

    @property
    def _some_pairs(self) -> NDArray[np.uint64] | None:
        some = self.problem.goal != "balance" and self.pairs is not None and self.pairs.any()
        return self.pairs if some else None

    # Of time and balance: costs of windows and layers, over a reference.

    def window_cost(
        self,
        placement: Placement,
        statistics: replay.Counted | None = None,
        load: Floats | None = None,
    ) -> Floats:
        """Compute what every window and layer [W,L] adds to time or balance.

        Parameters
        ----------
        placement
            Of the problem's layers, or of others as parts of them.
        statistics
            Pairs and sets of these layers, the problem's by default.
        load
            Their windows of load [W,L,E], all that are judged by default.
        """
        if statistics is None and load is None:
            whole, windows = self.problem.statistics, self.problem.windows
            # Of other windows nothing is remembered.
            means = vars(windows).get("searched")
            if self.windows is windows or self.windows is means:
                what = "window cost" + " of means" * (self.windows is not windows)
                return self.problem.remembered.of(
                    what, placement, lambda: self._window_cost(placement, whole, None)
                )
        statistics = self.problem.statistics if statistics is None else statistics
        return self._window_cost(placement, statistics, load)

    def _window_cost(
        self, placement: Placement, statistics: replay.Counted, load: Floats | None
    ) -> Floats:
        if self.problem.goal == "time":
            # Homes are of all windows together; those that are given are all there are.
            total = self.windows.total[None] if load is None and self._is_many else None
            times = self._layer_times(placement, statistics, total)
        else:
            times = self._slowest(placement)
        return self.windows.each(times) if load is None else times(load)

    @cached_property
    def reference(self) -> Floats:
        """What a window's costs are measured by [W]: 1 for time, else load over speed if even."""
        if self.problem.goal == "time":
            return np.ones(len(self.windows))
        return self._even

    def imbalances(self, placement: Placement) -> Floats:
        """Compute what every layer [L] adds to max / mean load, whatever the goal is."""
        each = self.windows.each(self._slowest(placement))
        return np.array([self.windows.value(of, self._even) for of in each.T])

    @cached_property
    def _even(self) -> Floats:
        """Load over speed of every window's layers [W], if every device had its part."""
        speed = self.problem.topology.speed_of_device
        mean: Floats = self.windows.each(lambda load: load.sum(axis=(1, 2))) / speed.sum()
        return mean

    def _slowest(self, placement: Placement) -> Callable[[Floats], Floats]:
        """Return what computes the load over speed of the slowest devices [W,L] of windows."""
        topology, split = self.problem.topology, self.problem.split
        return lambda load: slowest(placement, load, topology, split)

    def _layer_times(
        self, placement: Placement, statistics: replay.Counted, total: Floats | None
    ) -> Callable[[Floats], Floats]:
        """Return what predicts microseconds over L of every layer of windows [W,L].

        Where it is given these by and by, ``total`` is the load of all [1,L,E].
        """
        model, topology = self.cost_model, self.problem.topology
        assert model is not None
        setting = replay.Setting(
            placement,
            topology,
            window=None,
            split=self.problem.split,
            with_active=model.expert_us > 0,
            threads=None,
            with_mixed=False,
        )
        layers, regime = self.problem.layers, self.problem.regime
        visits = None
        if statistics is self.problem.statistics and statistics.sets is not None:
            visits = self._count_visits(placement)
        expected = replay.Expected(statistics, setting, follows=regime == "follow", visits=visits)

        def times(load: Floats) -> Floats:
            counts = expected.counts(load, total)
            return figures.layer_us(counts, topology, model, regime) / layers

        return times

    @property
    def _is_many(self) -> bool:
        """Whether windows come in several blocks."""
        return self.windows.load.dtype != np.float64

    # Of traffic, whatever the goal is.

    @property
    def counts_visits(self) -> bool:
        """Whether traffic is counted in devices that tokens visit: where expert sets are known."""
        return self.problem.regime == "dispatch" and self.problem.statistics.sets is not None

    @property
    def counts_pairs(self) -> bool:
        """Whether traffic of pairs is the goal: bounds then are costs, in whole numbers."""
        return self.problem.goal == "traffic" and not self.counts_visits

    @property
    def pairs(self) -> NDArray[np.uint64] | None:
        """Counts [L-1,E,E] or [L,E,E] of what the regime pays for; None where not counted."""
        statistics = self.problem.statistics
        follow = self.problem.regime == "follow"
        return statistics.transitions if follow else statistics.coactivation

    @property
    def has_traffic(self) -> bool:
        """Whether what the regime's traffic is made of was counted: expert sets or pairs."""
        return self.counts_visits or self.pairs is not None

    def traffic(self, placement: Placement) -> float:
        """Return what ``value`` is with the objective traffic; 0 where nothing was counted.

        With one copy of each expert it is ``cost`` over ``scale``; with copies it is expected.
        """
        instance("placement", placement, Placement)
        return self.problem.remembered.of("traffic", placement, lambda: self._traffic(placement))

    def _traffic(self, placement: Placement) -> float:
        if self.counts_visits:
            return float(self._visits(placement).sum())
        if not placement.has_copies:
            return self.cost(placement) / self.scale
        if self.pairs is None:
            return 0.0
        if self.problem.regime == "dispatch":
            return float(self._apart(placement).sum())
        topology = self.problem.topology
        moved = expected.followed(placement, topology, self.problem.split, self.pairs)
        return float((moved * topology.cost).sum()) / self.scale

    def layers_traffic(self, placement: Placement) -> Floats:
        """Compute what every layer [L] adds to the traffic, if that is of dispatch; else 0.

        0 too where neither expert sets nor pairs were counted.
        """
        if self.counts_visits:
            return self._visits(placement)
        known = self.problem.regime == "dispatch" and self.has_traffic
        return self._apart(placement) if known else np.zeros(self.problem.layers)

    def cost(self, placement: Placement) -> int:
        """Compute the exact cost of the pairs of a placement with one copy of each expert.

        ``follow``: transitions [E,E] of neighbouring layers times ``link_cost`` between the
        experts' devices. ``dispatch``: co-activated pairs likewise, each once.
        """
        instance("placement", placement, Placement)
        if self.pairs is None:
            return 0
        device_of = placement.device_of
        there = device_of[1:] if self.problem.regime == "follow" else device_of
        total = _core.pair_cost(
            device_of[: len(there)].astype(np.uint16),
            there.astype(np.uint16),
            self.pairs,
            self.link_cost.astype(np.uint64),
        )
        return total if self.problem.regime == "follow" else total // 2

    @cached_property
    def link_cost(self) -> NDArray[np.int64]:
        """Cost of a pair over a link [D,D]; co-activated ones cost the same between any devices."""
        if self.problem.regime == "follow":
            return self.problem.topology.cost
        return 1 - np.eye(self.problem.devices, dtype=np.int64)

    @property
    def scale(self) -> int:
        """Cost if every counted pair moved over the cheapest link; shares are of it."""
        return self.problem.remembered.once("scale", self._scale)

    def _scale(self) -> int:
        pairs = self.pairs
        counted = 0 if pairs is None else sum(_exact_sum(table) for table in pairs)
        if self.problem.regime == "dispatch":
            counted //= 2
        cost = self.link_cost
        cheapest = int(cost[cost > 0].min()) if self.problem.devices > 1 else 1
        return max(counted * cheapest, 1)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all layers, whose visits are counted; 0 where expert sets are not known."""
        sets = self.problem.statistics.sets or ()
        return sum(int(of.counts.sum(dtype=np.uint64)) for of in sets)

    @cached_property
    def visit_costs(self) -> tuple[float, float]:
        """Cost of a token's visit of a device and, on top of it, of a node.

        A token crosses to a node once and is handed on inside it, so a node costs a link between
        nodes where a device costs one inside.
        """
        topology = self.problem.topology
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
        model, topology = self.problem.cost_model, self.problem.topology
        assert model is not None
        crossing = model.crossing_us(topology, returns=self.problem.regime == "dispatch")
        price: Floats = crossing[topology.tier] / self.top_k
        return price

    @property
    def top_k(self) -> float:
        """Experts that a token visits in a layer, from the counts; 1 where they do not tell."""
        pairs, load = self.problem.statistics.transitions, float(self.problem.load[:-1].sum())
        return max(float(pairs.sum()) / load, 1.0) if pairs is not None and load else 1.0

    def _apart(self, placement: Placement) -> Floats:
        """Compute the share of all co-activated pairs that are apart, by layer [L]."""
        share = copies.slot_shares(placement, self.problem.topology, self.problem.split)
        pairs = self.problem.statistics.coactivation_or_empty
        return _core.expected_apart((placement.slots, share), pairs) / self.scale

    def _visits(self, placement: Placement) -> Floats:
        """Compute what every layer [L] adds to a token's visits, as ``expected.visits`` does."""
        sets = self.problem.statistics.sets
        assert sets is not None
        device_cost, node_cost = self.visit_costs
        devices, nodes = self._count_visits(placement)
        total: Floats = device_cost * devices.sum(axis=1) + node_cost * nodes.sum(axis=1)
        return total / max(self.tokens, 1)

    def _count_visits(self, placement: Placement) -> tuple[Floats, Floats]:
        """Count the tokens that visit every device [L,D], and every node [L,N]."""
        problem, sets = self.problem, self.problem.statistics.sets
        assert sets is not None

        def count() -> tuple[Floats, Floats]:
            return expected.visits(placement, problem.topology, problem.split, sets)

        return problem.remembered.of("visits", placement, count)


def _exact_sum(table: NDArray[np.uint64]) -> int:
    """Sum without overflow: 64-bit counts, in two halves where they are large."""
    if int(table.max(initial=0)) * table.size < 1 << 64:
        return int(table.sum(dtype=np.uint64))
    low, high = table & np.uint64(0xFFFFFFFF), table >> np.uint64(32)
    return int(low.sum(dtype=np.uint64)) + (int(high.sum(dtype=np.uint64)) << 32)
