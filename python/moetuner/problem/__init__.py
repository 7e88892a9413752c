"""Problem: the traffic, the machine, the limits and the objective. Validated once, then frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.cost import CostModel, cost_model_of
from moetuner.evaluation.losses import DOMAINS, Domain, number_domains
from moetuner.files.cells import digits, percent
from moetuner.frozen import Frozen
from moetuner.placement import EMPTY, Placement, fill
from moetuner.problem import capacity
from moetuner.problem.caps import Caps
from moetuner.problem.goals import AIMS, TRAFFIC_CAP, Aim, Goal
from moetuner.problem.objective import Objective, choose_goal, choose_tables
from moetuner.problem.pins import Pin, SlotRules, make_rules
from moetuner.problem.settings import (
    PIN,
    read_cap,
    read_groups,
    read_risk,
    read_slots,
    write_groups,
)
from moetuner.problem.windows import Risk, Windows, join_sizes
from moetuner.problem.windows.choice import choose_counted_window, choose_windows
from moetuner.recording import compute_once
from moetuner.serving import Serving, phases
from moetuner.serving.arrival import Arrival
from moetuner.serving.phases import Phases
from moetuner.serving.settings import (
    ENGINE,
    GOAL,
    MACHINE,
    check_settings,
    read_count,
    reuse_setting,
    setting,
)
from moetuner.serving.splits import RULES, Split
from moetuner.statistics import WINDOW, RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

if TYPE_CHECKING:
    # The attribute always holds counts.
    TraceOrStatistics: TypeAlias = RoutingStatistics | Any
else:
    TraceOrStatistics = RoutingStatistics | RoutingTrace


@dataclass(frozen=True, eq=False, repr=False)
class Problem(Frozen):
    """The traffic, the topology, the limits, and the objective.

    Begin with two arguments: a trace, or its statistics, and the topology. All others have the
    defaults of today's engines.

    Parameters
    ----------
    statistics
        Counts of the traffic to place for. A ``RoutingTrace`` is counted here: the tables that
        ``objective`` and ``regime`` need, in windows that divide those of ``phases``, and in
        shorter ones where it has few tokens. Count it with ``RoutingStatistics.from_trace`` where
        several problems share the same traffic.
    topology
        The devices and links.
    slots_per_device
        Slots per device and layer: one number, or one for every device [D]. Spare slots hold
        copies of experts. By default those of the topology, else just enough for one copy of each
        expert.
    max_imbalance
        Cap on max / mean device load in every layer, on the sum of all windows.
    objective
        Objective to minimise. time: predicted microseconds of a layer, as ``evaluate`` predicts
        them (the search of a large problem minimises an approximation). balance: max / mean device
        load, over windows. traffic: share of the traffic that leaves its device, under the cap. By
        default traffic if there is a cap, else time.
    extra_slots
        Copies beyond one of each expert, over all layers, instead of slots per device. They go to
        the layers where they help most. Every device gets as many over all layers, or one more.
    regime, split, arrival, cost_model
        Settings of serving, as for ``Serving``.
    risk
        Minimise the mean over windows, or over the worst of them: 0.9 for the worst tenth (the
        conditional value at risk).
    groups
        Minimise for the worst group of the traffic (minimax), or weigh groups by name. A group that
        is not named has weight 1 per token.
    phases
        Shares of the serving time, by tokens of a window: ``{512: 0.8, 8192: 0.2}`` for a fifth of
        prefill. Longer windows are sums of the statistics' own, and where these fill none or one,
        sums of fewer, scaled. The objective is a mean over steps that take such shares of the time,
        if experts are placed in blocks. By default, for statistics of a trace in steps of 512,
        0.4 of 512 tokens (decode) and 0.6 of 8192 (prefill), and with copies ``solve`` returns the
        placement that neither phase regrets; else the statistics' windows alone.
    window
        Tokens of a step. By default those of the statistics' windows; for a trace 512, or fewer if
        ``phases`` are no multiples of them.
    pinned
        Put a copy of the expert on the device: (layer, expert, device), with None or * for all
        layers.
    forbidden
        Keep the expert off the device: (layer, expert, device), with None or * for all layers.
    survive
        Keep copies of every expert on two devices, or on two nodes, so that losing one loses no
        expert. A tenth of the objective is the load of the busiest device after a loss.
    fill_slots
        Leave no slot empty, as engines need it: copies of experts with few tokens fill slots in
        which no copy helps.

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

    statistics: TraceOrStatistics
    topology: Topology
    _: KW_ONLY
    slots_per_device: int | Sequence[int] | None = setting(
        None,
        MACHINE,
        read=read_slots,
        metavar="S|S,S,...",
        label="Slots of a device in a layer",
        words=lambda value: str(value).strip("[()]"),
    )
    regime: Regime = reuse_setting(Serving, "regime")
    max_imbalance: float | None = setting(
        None,
        GOAL,
        f"{TRAFFIC_CAP} for traffic, else no cap",
        read=read_cap,
        metavar="X",
        label="Cap of the imbalance",
        words=digits,
        check=lambda name, value: check.at_least(name, value, 1),
        # Infinity is no number of JSON.
        to_json=lambda cap: str(cap) if cap == math.inf else cap,
        from_json=lambda cap: math.inf if cap == "inf" else cap,
    )
    objective: Goal | None = setting(
        None,
        GOAL,
        choices=get_args(Goal),
        label="Minimised",
        words={name: aim.label for name, aim in AIMS.items()},
    )
    cost_model: CostModel | None = reuse_setting(Serving, "cost_model")
    split: Split = reuse_setting(Serving, "split")
    extra_slots: int | None = setting(
        None,
        MACHINE,
        read=read_count,
        metavar="N",
        label="Copies over all layers",
        words=lambda value: f"{value:,}",
    )
    arrival: Arrival = reuse_setting(Serving, "arrival")
    risk: Risk = setting(
        "mean",
        GOAL,
        "mean",
        read=read_risk,
        metavar="mean|LEVEL",
        label="Windows that count",
        words=lambda value: "all" if value == "mean" else f"the worst {percent(1 - float(value))}",
    )
    groups: Mapping[str, float] | Literal["minimax"] | None = setting(
        None,
        GOAL,
        read=read_groups,
        metavar="minimax|NAME=W,...",
        label="Groups",
        words=write_groups,
    )
    phases: Phases | None = reuse_setting(Serving, "phases")
    window: int | None = None
    pinned: Iterable[Pin] = setting(
        (), ENGINE, flag="--pin", label="Experts kept on a device", **PIN
    )
    forbidden: Iterable[Pin] = setting(
        (), ENGINE, flag="--forbid", label="Experts kept off a device", **PIN
    )
    survive: Domain | None = setting(
        None,
        GOAL,
        choices=DOMAINS,
        label="A copy is left after the loss of",
        words=lambda value: f"a {value}",
    )
    fill_slots: bool = setting(
        False,
        MACHINE,
        label="Empty slots",
        words={"true": "filled with copies", "false": "allowed"},
    )

    def __post_init__(self) -> None:
        traffic: object = self.statistics
        counted = ", such as RoutingStatistics.from_trace(trace)"
        check.instance("statistics", traffic, RoutingStatistics, RoutingTrace, hint=counted)
        check.instance("topology", self.topology, Topology, hint=", such as Topology(devices=8)")
        check_settings(self)
        if RULES[self.split].needs_windows and not self.aim.costs_loads:
            raise check.ArgumentError(
                f"split {self.split!r} balances load, so objective must be balance or time, got "
                + ("'traffic'" if self.objective else "the default with max_imbalance, 'traffic'"),
                "objective",
            )
        check.flag("fill_slots", self.fill_slots)
        for name in ("pinned", "forbidden"):
            rules = check.listed(name, getattr(self, name), "(layer, expert, device)")
            vars(self)[name] = tuple(rules)
        if not isinstance(self.groups, str | None):
            check.instance("groups", self.groups, Mapping, hint=" of weights by name, or 'minimax'")
            for group, weight in self.groups.items():
                check.not_negative(f"groups: weight of {check.shown(group)}", weight, "number")
            vars(self)["groups"] = dict(self.groups)
        if self.phases is not None:
            vars(self)["phases"] = phases.check_phases(self.phases)
        vars(self)["window"] = self._choose_step()
        if isinstance(traffic, RoutingTrace):
            vars(self)["statistics"] = self._count(traffic)
        if self.cost_model is None:
            vars(self)["cost_model"] = cost_model_of(self.statistics)
        # Slots, rules and windows are checked by being made.
        if isinstance(self.slots_per_device, Sequence | np.ndarray):
            slots = check.per_device("slots_per_device", self.slots_per_device, self.devices)
            vars(self)["slots_per_device"] = tuple(slots)
        _ = self.capacity, self.rules, self.windows
        if self.fill_slots:
            capacity.check_filling(self.capacity, self.rules.forbidden, self.num_experts)

    def _choose_step(self) -> int | None:
        """Return the tokens of a step, checked: as given, or those of windows.

        A trace has windows that divide all phases. They are those of decode where these divide the
        others: mixed windows of prefill are made of shorter ones, of which a recording has more.
        """
        counted, is_trace = self.statistics.window, self.statistics.ordered
        if self.window is not None:
            step = check.whole_number("window", self.window)
            if not is_trace and (counted is None or step % counted):
                length = "of unknown length" if counted is None else f"of {counted:,} tokens"
                raise check.ArgumentError(
                    f"window must be of whole windows of the statistics, which are {length}, "
                    f"got {step:,} tokens",
                    "window",
                )
            return step
        if not is_trace:
            return counted
        lengths = [tokens for tokens, share in (self.phases or {}).items() if share]
        step = math.gcd(*lengths) or WINDOW
        return step if step % WINDOW else WINDOW

    def _count(self, trace: RoutingTrace) -> RoutingStatistics:
        """Count a trace: the tables that the objective needs."""
        if self.groups is not None and trace.group is None:
            raise check.ArgumentError(
                "groups needs a trace with groups; this one has none", "groups"
            )
        return RoutingStatistics.from_trace(
            trace,
            window=choose_counted_window(trace.length, self.window or WINDOW),
            sets=choose_tables(self.regime, self.goal)["sets"],
            by_group=self.groups is not None,
        )

    @cached_property
    def capacity(self) -> NDArray[np.int64]:
        """Slots of every device [L,D]."""
        return capacity.compute_capacity(
            self.load, self.topology, self.slots_per_device, self.extra_slots
        )

    @cached_property
    def rules(self) -> SlotRules:
        """Where experts must and must not be."""
        domain = None if self.survive is None else number_domains(self.topology, self.survive)
        return make_rules(self.pinned, self.forbidden, self.num_experts, self.capacity, domain)

    @cached_property
    def caps(self) -> Caps:
        """The load cap in every layer."""
        return Caps(self.load, self.max_imbalance, self.topology, self.split)

    def core_rules(self, caps: NDArray[np.float64] | None = None) -> _core.Rules:
        """Return the rules of the core's searches: pins, bans, copies, and caps.

        Caps are the largest load of a device in every layer [L], in time of the slowest device.
        """
        # No device holds an expert twice, so two copies are on two devices without a rule.
        domain = self.rules.domain if self.survive == "node" else None
        return _core.Rules(
            copies=self.may_copy,
            min_copies=1 if self.survive is None else 2,
            domain=[] if domain is None else domain.tolist(),
            forbidden=self.rules.forbidden,
            pinned=self.rules.pinned,
            caps=None if caps is None else caps.tolist(),
            load=None if caps is None else self.load.astype(np.float64),
        )

    @classmethod
    def served(cls, statistics: TraceOrStatistics, serving: Serving, **rules: Any) -> Problem:
        """Return the problem of some traffic under a serving; ``rules`` are its other arguments.

        The windows are those of the statistics, or those of ``phases`` or ``window``.
        """
        check.instance("serving", serving, Serving, hint=", such as Serving(Topology(8))")
        names = ("regime", "split", "arrival", "cost_model", "phases")
        served = {name: getattr(serving, name) for name in names}
        problem = cls(statistics, serving.topology, **{**served, **rules})
        # The serving keeps the origins of its settings, and the settings that no search uses.
        served = {name: getattr(problem, name) for name in (*names, "window")}
        vars(problem)["serving"] = replace(serving, **served)
        return problem

    @cached_property
    def serving(self) -> Serving:
        """How the traffic is served."""
        return Serving(
            self.topology,
            regime=self.regime,
            split=self.split,
            arrival=self.arrival,
            cost_model=self.cost_model,
            window=self.window,
            phases=self.phases,
            is_ordered=False,
        )

    @cached_property
    def shares(self) -> dict[int | None, float]:
        """Share of the serving time of each size of windows that counts, by its tokens."""
        return phases.compute_phase_shares(self.statistics, self.phases, self.window)

    @cached_property
    def windows(self) -> Windows:
        """Windows of load that count, and their weights."""
        by_size: dict[int | None, Windows] = {}
        for tokens in self.shares:
            windows = choose_windows(self.statistics, self.arrival, self.risk, self.groups, tokens)
            if windows.weight.any():
                by_size[tokens] = windows
        if len(by_size) == 1:
            return next(iter(by_size.values()))
        costs = [self._cost_in_blocks(windows) for windows in by_size.values()]
        return join_sizes([*by_size.values()], [self.shares[size] for size in by_size], costs)

    def _cost_in_blocks(self, windows: Windows) -> float:
        """Return the mean cost of windows in blocks, computed once for all problems."""
        key = ("cost in blocks", id(windows), self.goal, replace(self.serving, arrival="bursts"))
        return compute_once(
            self.statistics, key, lambda: self._make_objective(windows).cost_in_blocks
        )

    @property
    def goal(self) -> Goal:
        """The objective that was given, or the default."""
        return choose_goal(self.objective, self.max_imbalance)

    @property
    def aim(self) -> Aim:
        """What counts for the goal."""
        return AIMS[self.goal]

    @property
    def is_plain(self) -> bool:
        """True if only traffic counts, with single copies, on equal devices, without rules."""
        return (
            not self.aim.costs_loads
            and not (self.fill_slots and self.may_copy)
            and not self.rules.exist
            and self.capacity.min() == self.capacity.max()
            and self.topology.has_equal_devices
        )

    @property
    def may_copy(self) -> bool:
        """True if slots beyond one for each expert hold copies.

        They do where the number of slots was given. Slots that are spare only because devices do
        not divide the experts stay empty, unless ``fill_slots`` or a rule asks for copies.
        """
        return self._has_spare_slots and (
            self.fill_slots
            or self.slots_per_device is not None
            or self.extra_slots is not None
            or self.topology.slots_per_device is not None
            or self.rules.need_copies
        )

    @property
    def _has_spare_slots(self) -> bool:
        """True if a layer has more slots than experts."""
        return bool((self.capacity.sum(axis=1) > self.num_experts).any())

    @property
    def stays_single(self) -> bool:
        """True if there are spare slots that hold no copies: see ``may_copy``.

        Bounds of such a problem hold for placements with one copy of each expert.
        """
        return not self.may_copy and self._has_spare_slots

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return self.statistics.layers

    @property
    def num_experts(self) -> int:
        """Experts per layer, E."""
        return self.statistics.num_experts

    @property
    def single_slots(self) -> int:
        """Slots of a device that hold each expert once."""
        return -(-self.num_experts // self.devices)

    @property
    def devices(self) -> int:
        """Number of devices, D."""
        return self.topology.devices

    @property
    def slots(self) -> int:
        """Slots of a device in a layer, S; the largest number where devices differ."""
        return int(self.capacity.max())

    @cached_property
    def objective_function(self) -> Objective:
        """The objective as a function of a placement, over all windows."""
        return self._make_objective(self.windows)

    @cached_property
    def objective_searched(self) -> Objective:
        """The objective over the windows that searches use, one object for all searches."""
        return self.objective_in(self.windows.searched)

    @cached_property
    def objective_sampled(self) -> Objective:
        """The objective over a sample of very many windows, one object for all searches."""
        return self.objective_in(self.windows.sampled)

    def objective_in(self, windows: Windows) -> Objective:
        """Return the objective as a function of a placement, over other windows of load."""
        if windows is self.windows:
            return self.objective_function
        objective = self._make_objective(windows)
        objective._count_visits_with(self.objective_function)
        return objective

    def _make_objective(self, windows: Windows) -> Objective:
        return Objective(
            self.statistics,
            self.serving,
            goal=self.goal,
            windows=windows,
            shares=self.shares,
            by_groups=self.groups is not None,
            survive=self.survive,
        )

    @property
    def load(self) -> NDArray[np.uint64]:
        """Tokens per layer and expert, over all windows [L,E]."""
        return self.statistics.total_load

    def value(self, placement: Placement) -> float:
        """Return the objective of a placement, as ``objective_function.value`` does."""
        return self.objective_function.value(placement)

    def violations(self, placement: Placement) -> tuple[str, ...]:
        """Return the rules that a placement breaks: slots, pins, bans, the load cap.

        Each kind of rule has one sentence, with the first case and the number of cases.

        Raises
        ------
        ValueError
            If the placement is of another model or machine.
        """
        self.check_shape(placement)
        return (
            *capacity.violations(placement, self.capacity, fill_slots=self.fill_slots),
            *self.rules.violations(placement),
            *self.caps.violations(placement),
        )

    def layers_that_keep_rules(self, placement: Placement) -> NDArray[np.bool_]:
        """Return whether a placement keeps the rules of slots, pins and bans in every layer [L]."""
        count = (placement.slots != EMPTY).sum(axis=2)
        keeps: NDArray[np.bool_] = (count <= self.capacity).all(axis=1)
        if self.fill_slots:
            keeps &= (count == self.capacity).all(axis=1)
        if not self.may_copy:
            keeps &= count.sum(axis=1) == self.num_experts
        broken = [self.rules.are_broken(layer, held) for layer, held in enumerate(placement.held)]
        keeps &= ~np.array(broken)
        return keeps

    def check_shape(self, placement: Placement, name: str = "placement") -> None:
        """Raise ValueError if a placement, of this name, is of another model or machine."""
        check.instance(name, placement, Placement)
        sizes = (placement.layers, placement.num_experts, placement.devices)
        if sizes != (self.layers, self.num_experts, self.devices):
            raise check.ArgumentError(
                f"{name} must have {self.layers} layers, {self.num_experts} experts and "
                f"{self.devices} devices like the problem, "
                f"got {sizes[0]}, {sizes[1]} and {sizes[2]}",
                name,
            )

    def check_running(self, initial: Placement) -> None:
        """Raise ValueError if ``initial`` is of another model or machine, or beyond the slots."""
        self.check_shape(initial, "initial")
        count = (initial.slots != EMPTY).sum(axis=2)
        for layer, device in np.argwhere(count > self.capacity):
            raise check.ArgumentError(
                f"initial has {count[layer, device]} experts of layer {layer} on device {device}, "
                f"which has {self.capacity[layer, device]} slots",
                "initial",
            )

    def has_slots_for(self, placement: Placement) -> bool:
        """Return whether every device has enough slots for a placement."""
        self.check_shape(placement)
        return bool(((placement.slots != EMPTY).sum(axis=2) <= self.capacity).all())

    def filled(
        self, slots: NDArray[np.int32], running: Placement | None = None
    ) -> NDArray[np.int32]:
        """Return slots [L,D,S], filled if ``fill_slots`` is set.

        Copies go first to devices that hold their expert in the running placement.
        """
        if not self.fill_slots:
            return slots
        return fill(
            slots,
            self.num_experts,
            capacity=self.capacity,
            load=self.load,
            forbidden=self.rules.forbidden,
            holders=None if running is None else running.held,
        )

    def without_copies(self, *, even: bool = False) -> Problem | None:
        """Return the problem of placements with one copy of each expert.

        Its placements are placements of this problem. With ``even``, all devices get equally many
        experts, as far as slots allow. Return None if this problem is such a one, or if rules ask
        for copies.
        """
        if not self.may_copy or self.rules.need_copies:
            return None
        return self._reduced(_EvenCopies if even else _SingleCopies)

    def with_fewer_slots(self) -> Problem | None:
        """Return the problem with one slot less on every device that has spare ones.

        Its placements are placements of this problem. Return None where one slot less leaves no
        room for copies.
        """
        spare = int((self.capacity - capacity.even_slots(self.capacity, self.num_experts)).max())
        return self._reduced(_FewerSlots, spare=spare - 1) if spare > 1 else None

    def _reduced(self, kind: type[Problem], **more: Any) -> Problem:
        """Return this problem with fewer slots or copies; their spare slots stay empty."""
        arguments = {field.name: getattr(self, field.name) for field in fields(Problem)}
        return kind(**{**arguments, "fill_slots": False, **more})


class _SingleCopies(Problem):
    """A problem whose spare slots stay empty."""

    may_copy = False


class _EvenCopies(_SingleCopies):
    """A problem whose spare slots stay empty, and whose devices hold equally many experts."""

    @cached_property
    def capacity(self) -> NDArray[np.int64]:
        """Slots of every device [L,D]: no more than experts need."""
        return capacity.even_slots(super().capacity, self.num_experts)


@dataclass(frozen=True, eq=False, repr=False)
class _FewerSlots(Problem):
    """A problem whose devices have at most ``spare`` slots beyond what single copies take."""

    spare: int = 0

    @cached_property
    def capacity(self) -> NDArray[np.int64]:
        """Slots of every device [L,D]: no more than single copies need and the spare ones."""
        own = super().capacity
        limited: NDArray[np.int64] = np.minimum(
            own, capacity.even_slots(own, self.num_experts) + self.spare
        )
        return limited
