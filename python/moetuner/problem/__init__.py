"""Problem: what is to be placed where, under which limits. Validated once, then frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import not_negative
from moetuner.cost import CostModel, cost_model_of
from moetuner.evaluation import copies
from moetuner.evaluation.copies import Split
from moetuner.frozen import Frozen
from moetuner.placement import EMPTY, Placement, filled
from moetuner.problem import objective
from moetuner.problem.capacity import rooms_of
from moetuner.problem.pins import Rules, rules_of
from moetuner.problem.windows import Risk, Windows, windows_of
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

Regime = Literal["follow", "dispatch"]
Objective = Literal["time", "balance", "traffic"]


@dataclass(frozen=True, eq=False, repr=False)
class Problem(Frozen):
    """Statistics, a topology, limits, and what is to be made small.

    Begin with three arguments: ``statistics``, ``topology`` and ``objective``. All others have
    defaults that engines of today would choose.

    Parameters
    ----------
    statistics
        Counts of the traffic to place for.
    topology
        The devices and links.
    slots_per_device
        Slots of a device in a layer, S, or of every device [D], for experts and further copies of
        them; by default those of the topology, else just enough for one copy of each expert.
    regime
        ``"dispatch"``: a token is sent from its home device to every distinct device of its experts
        and comes back, as in today's engines, so co-activation saves. ``"follow"``: its state moves
        on from expert to expert, as in the paper, so transitions cost.
    max_imbalance
        Cap on max / mean device load in every layer, on the sum of all windows; None for no cap.
    objective
        ``"time"``: predicted microseconds of a layer, as ``evaluate`` predicts them; a large
        problem is searched for what comes near it and adds up. ``"balance"``: max / mean device
        load, over windows. ``"traffic"``: share of the traffic that leaves its device, under the
        cap. By default traffic where ``max_imbalance`` is given, else time.
    cost_model
        What time is made of; by default H100 with the experts of the statistics' model, or of
        DeepSeek-V3 where that is not known.
    split
        Which copy of an expert serves a token: ``"even"`` (vLLM), ``"nearest"`` (SGLang),
        ``"round_robin"`` (TensorRT-LLM).
    extra_slots
        Instead of ``slots_per_device``: copies beyond one of each expert, over all layers, which go
        to the layers where they help most. Every device gets as many over all layers, or one more.
    arrival
        How traffic arrives: ``"bursts"``, window after window as recorded; ``"mixed"``, many
        sequences at once; or the weight of mixed windows, from 0 to 1.
    risk
        ``"mean"`` over windows, or the level of the conditional value at risk: 0.9 is the mean of
        the worst tenth.
    groups
        Weight of every group of windows, by name (those not named count as 1 times their tokens);
        or ``"minimax"`` for the worst group's outcome.
    pinned, forbidden
        (layer, expert, device): the expert has a copy there, or has none; layer None for all.
    fill_slots
        Whether every slot is to be full, as engines have it: where a copy is of no use, one of an
        expert with few tokens fills it.

    Raises
    ------
    ValueError
        If the slots do not suffice or a limit makes no sense.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> problem = mt.Problem(statistics, mt.Topology(2), objective="balance")
    >>> problem.slots
    2
    >>> problem.violations(mt.Placement([[[0, 3], [1, 2]]]))  # none
    ()
    """

    statistics: RoutingStatistics
    topology: Topology
    slots_per_device: int | Sequence[int] | None = None
    regime: Regime = "dispatch"
    max_imbalance: float | None = None
    objective: Objective | None = None
    cost_model: CostModel | None = None
    split: Split = "even"
    extra_slots: int | None = None
    arrival: Literal["bursts", "mixed"] | float = "bursts"
    risk: Risk = "mean"
    groups: Mapping[str, float] | Literal["minimax"] | None = None
    pinned: Iterable[tuple[int | None, int, int]] = ()
    forbidden: Iterable[tuple[int | None, int, int]] = ()
    fill_slots: bool = False

    def __post_init__(self) -> None:
        if self.regime not in ("follow", "dispatch"):
            raise ValueError(f"regime must be 'follow' or 'dispatch', got {self.regime!r}")
        if self.max_imbalance is not None and not self.max_imbalance >= 1:
            raise ValueError(f"max_imbalance must be at least 1, got {self.max_imbalance}")
        if self.objective is not None and self.objective not in get_args(Objective):
            raise ValueError(
                f"objective must be one of {', '.join(get_args(Objective))}, "
                f"got {self.objective!r:.40}"
            )
        copies.check(self.split)
        if self.cost_model is None:
            object.__setattr__(self, "cost_model", cost_model_of(self.statistics))
        for name in ("pinned", "forbidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.groups, str | None):
            for group, weight in self.groups.items():
                not_negative(f"weight of group {group!r}", weight, "number")
            object.__setattr__(self, "groups", dict(self.groups))
        # Slots, rules and windows are checked by being made.
        if self.slots_per_device is not None and not isinstance(self.slots_per_device, int):
            object.__setattr__(self, "slots_per_device", tuple(self.slots_per_device))
        _ = self.rooms, self.rules, self.windows
        if self.fill_slots:
            self._check_filling()

    @cached_property
    def rooms(self) -> NDArray[np.int64]:
        """Slots of every device [L,D]."""
        return rooms_of(self.load, self.topology, self.slots_per_device, self.extra_slots)

    @cached_property
    def rules(self) -> Rules:
        """Where experts must and must not be."""
        return rules_of(self)

    @cached_property
    def windows(self) -> Windows:
        """Windows of load that count, and how much each does."""
        return windows_of(self.statistics, self.arrival, self.risk, self.groups)

    @property
    def goal(self) -> Objective:
        """The objective: what was asked for, or the default."""
        if self.objective is not None:
            return self.objective
        return "time" if self.max_imbalance is None else "traffic"

    @property
    def is_plain(self) -> bool:
        """Whether it is about traffic alone, of one copy each, on devices that are all alike."""
        return (
            self.goal == "traffic"
            and not (self.fill_slots and self.may_copy)
            and not self.rules.some
            and len(np.unique(self.rooms)) == 1
            and self.topology.has_equal_devices
        )

    @property
    def has_pairs(self) -> bool:
        """Whether the pairs that the regime's traffic is made of were counted."""
        statistics = self.statistics
        follow = self.regime == "follow"
        return (statistics.transitions if follow else statistics.coactivation) is not None

    @property
    def counts_visits(self) -> bool:
        """Whether traffic is counted in devices that tokens visit: where expert sets are known."""
        return self.regime == "dispatch" and self.statistics.sets is not None

    @property
    def may_copy(self) -> bool:
        """Whether slots beyond one for each expert hold copies: where somebody has asked for slots.

        Those that are left over only because experts do not divide by devices stay empty, unless
        all are to be full.
        """
        given = (self.slots_per_device, self.extra_slots, self.topology.slots_per_device)
        spare = (self.rooms.sum(axis=1) > self.experts).any()
        return bool(spare) and (self.fill_slots or any(slots is not None for slots in given))

    @property
    def stays_single(self) -> bool:
        """Whether some slots are left over, but hold no copies: see ``may_copy``.

        What is proven of such a problem is proven of placements with one copy of each expert.
        """
        return not self.may_copy and bool((self.rooms.sum(axis=1) > self.experts).any())

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return self.statistics.layers

    @property
    def experts(self) -> int:
        """Experts per layer, E."""
        return self.statistics.experts

    @property
    def num_experts(self) -> int:
        """Experts per layer, E, by the name that it has as an argument."""
        return self.experts

    @property
    def devices(self) -> int:
        """Number of devices, D."""
        return self.topology.devices

    @property
    def slots(self) -> int:
        """Slots of a device in a layer, S: the most of any."""
        return int(self.rooms.max())

    @cached_property
    def load(self) -> NDArray[np.uint64]:
        """Tokens per layer and expert, over all windows [L,E]."""
        return self.statistics.total_load

    @cached_property
    def caps(self) -> NDArray[np.uint64]:
        """Largest load a device may carry [L]: floor(max_imbalance * mean device load)."""
        total: NDArray[np.uint64] = self.load.sum(axis=1, dtype=np.uint64)
        if self.max_imbalance is None or math.isinf(self.max_imbalance):
            return total
        # In whole numbers, however large, and a hair wider than the number that was asked for, so
        # that whoever divides floats and compares finds all placements allowed that keep the cap.
        ratio = Fraction(self.max_imbalance) * (1 + Fraction(1, 2**50))
        caps = [min(math.floor(int(t) * ratio / self.devices), int(t)) for t in total]
        return np.array(caps, dtype=np.uint64)

    def device_load(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Load of every device [L,D] with these slots [L,D,S], one copy of each expert."""
        layer = np.arange(self.layers)[:, None, None]
        each = np.where(slots == EMPTY, np.uint64(0), self.load[layer, slots])
        load: NDArray[np.uint64] = each.sum(axis=2, dtype=np.uint64)
        return load

    def kept_caps(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Caps [L], raised where a placement [L,D,S] breaks them."""
        kept: NDArray[np.uint64] = np.maximum(self.caps, self.device_load(slots).max(axis=1))
        return kept

    def cost(self, placement: Placement) -> int:
        """Exact integer objective of a placement with one copy of each expert.

        ``follow``: sum over neighbouring layers of transitions [E,E] times ``topology.cost``
        between the experts' devices. ``dispatch``: co-activated pairs on different devices.
        """
        follow = self.regime == "follow"
        statistics = self.statistics
        tables = statistics.transitions_or_empty if follow else statistics.coactivation_or_empty
        if not len(tables):
            return 0
        device_of = placement.device_of
        costs, inverse = np.unique(self.topology.cost, return_inverse=True)
        kind = inverse.astype(np.int32).reshape(self.devices, self.devices)
        total = 0
        for layer, table in enumerate(tables):
            if follow:
                moved = kind[np.ix_(device_of[layer], device_of[layer + 1])]
                total += sum(
                    int(c) * _exact_sum(table[moved == k]) for k, c in enumerate(costs) if c
                )
            else:
                apart = np.not_equal.outer(device_of[layer], device_of[layer])
                total += _exact_sum(table[apart]) // 2
        return total

    @cached_property
    def cost_scale(self) -> int:
        """Cost if every counted pair moved over the cheapest link; shares are of it."""
        if self.regime == "follow":
            cost = self.topology.cost
            cheapest = int(cost[cost > 0].min()) if self.devices > 1 else 1
            pairs = sum(_exact_sum(table) for table in self.statistics.transitions_or_empty)
            return max(pairs * cheapest, 1)
        pairs = sum(_exact_sum(table) for table in self.statistics.coactivation_or_empty)
        return max(pairs // 2, 1)

    def value(self, placement: Placement) -> float:
        """Objective of a placement: microseconds, max / mean load, or share of the traffic.

        Microseconds are what ``evaluate`` predicts for the problem's own statistics, cost model,
        split and regime; where windows or groups have weights, or a risk, under these.

        Without copies, traffic is ``cost`` over ``cost_scale``; with copies, it is expected. In
        regime dispatch, where expert sets are known, it is what tokens visit: devices and, at what
        their links cost more, nodes.
        """
        if self.goal != "traffic":
            return objective.outcome(self, placement)
        return self.traffic(placement)

    def traffic(self, placement: Placement) -> float:
        """Return what ``value`` is with the objective traffic, whatever the objective is."""
        if self.counts_visits:
            return objective.visits(self, placement)
        if not placement.has_copies:
            return self.cost(placement) / self.cost_scale
        return objective.traffic(self, placement)

    def violations(self, placement: Placement) -> tuple[str, ...]:
        """List what a placement breaks of the problem's rules: slots, pins, bans, the load cap.

        A sentence for each kind, with the first case and how many there are; none if it keeps all.

        Raises
        ------
        ValueError
            If the placement is of another model or machine.
        """
        rules = broken_rules(self, placement)
        return (*rules, *broken_caps(self, placement))

    def filled(
        self, slots: NDArray[np.int32], running: Placement | None = None
    ) -> NDArray[np.int32]:
        """Fill all slots [L,D,S] if ``fill_slots`` says so, first with what is there already."""
        if not self.fill_slots:
            return slots
        return filled(
            slots,
            self.experts,
            rooms=self.rooms,
            load=self.load,
            forbidden=self.rules.forbidden,
            held=None if running is None else running.held,
        )

    def empty_slots(self) -> NDArray[np.int32]:
        """Slots [L,D,S] with nothing in them."""
        return np.full((self.layers, self.devices, self.slots), EMPTY, dtype=np.int32)

    def _check_filling(self) -> None:
        """Raise if a device has more slots than experts that may be there."""
        forbidden = self.rules.forbidden
        barred = 0 if forbidden is None else forbidden.sum(axis=1)
        over = np.argwhere(self.rooms > self.experts - barred)
        if len(over):
            layer, device = over[0]
            raise ValueError(
                f"fill_slots cannot fill the {self.rooms[layer, device]} slots of device {device} "
                f"in layer {layer}: of {self.experts} experts "
                f"{self.experts - np.broadcast_to(barred, self.rooms.shape)[layer, device]} may be "
                "there, each once"
            )


def _exact_sum(table: NDArray[np.uint64]) -> int:
    """Sum without overflow: 64-bit counts, in two halves where they are large."""
    if int(table.max(initial=0)) * table.size < 1 << 64:
        return int(table.sum(dtype=np.uint64))
    low, high = table & np.uint64(0xFFFFFFFF), table >> np.uint64(32)
    return int(low.sum(dtype=np.uint64)) + (int(high.sum(dtype=np.uint64)) << 32)


# What sums of shares may be off.
ROUNDING = 1e-9


def broken_rules(problem: Problem, placement: Placement) -> list[str]:
    """List slots, pins and bans that a placement breaks: a machine could not, or must not, run it.

    Raises
    ------
    ValueError
        If the placement is of another model or machine.
    """
    found = (placement.layers, placement.num_experts, placement.devices)
    wanted = (problem.layers, problem.experts, problem.devices)
    if found != wanted:
        raise ValueError(
            f"placement must have {wanted[0]} layers, {wanted[1]} experts and {wanted[2]} devices "
            f"like the problem, got {found[0]}, {found[1]} and {found[2]}"
        )
    lines = []
    count = (placement.slots != EMPTY).sum(axis=2)
    cells = np.argwhere(count > problem.rooms)
    if len(cells):
        layer, device = cells[0]
        lines.append(
            f"slots: layer {layer} has {count[layer, device]} experts on device {device}, which "
            f"has {problem.rooms[layer, device]} slots{_more(len(cells))}"
        )
    if problem.fill_slots:
        cells = np.argwhere(count < problem.rooms)
        if len(cells):
            layer, device = cells[0]
            empty = problem.rooms[layer, device] - count[layer, device]
            lines.append(
                f"fill_slots: layer {layer} has {empty} empty slots on device {device}"
                f"{_more(len(cells))}"
            )
    held = placement.held.transpose(0, 2, 1)
    for name, rule, verb, there in (
        ("pinned", problem.rules.pinned, "is not", True),
        ("forbidden", problem.rules.forbidden, "is", False),
    ):
        wrong = np.argwhere(rule & (held != there)) if rule is not None else np.empty((0, 3))
        if len(wrong):
            layer, expert, device = wrong[0]
            lines.append(
                f"{name}: expert {expert} of layer {layer} {verb} on device {device}"
                f"{_more(len(wrong))}"
            )
    return lines


def broken_caps(problem: Problem, placement: Placement) -> list[str]:
    """Say by how much a placement exceeds the load cap; nothing where it keeps it."""
    cap = problem.max_imbalance
    if cap is None or np.isinf(cap):
        return []
    total = problem.load.astype(np.float64)
    peaks = objective.slowest_times(problem, placement, total[None])[0]
    mean = total.sum(axis=1) / problem.topology.speed_of_device.sum()
    imbalance = np.divide(peaks, mean, out=np.ones_like(mean), where=mean > 0)
    over = np.flatnonzero(imbalance > cap * (1 + ROUNDING))
    if not len(over):
        return []
    worst = over[imbalance[over].argmax()]
    return [
        f"max_imbalance: {cap:g} is exceeded in {len(over)} of {problem.layers} layers: "
        f"{imbalance[worst]:.4g} in layer {worst}"
    ]


def _more(count: int) -> str:
    """Say of how many the first one is named."""
    return f", and {count - 1} more" if count > 1 else ""
