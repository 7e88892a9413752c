"""Rebalancer: follows the traffic, and moves experts where that pays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moetuner._checks import (
    at_least,
    instance,
    is_number,
    not_negative,
    numbers_in,
    seed_in,
    shown,
    whole_number,
)
from moetuner.placement import EMPTY, Placement
from moetuner.solver.rebalancing import largest_move, rebalance
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.torch.parallel.layer import ExpertParallelMoE
from moetuner.torch.parallel.migrate import (
    Agreement,
    DisagreementError,
    MoveError,
    NoRoomError,
    attempt,
    fingerprint,
    migrate,
    moves,
)

# With fewer windows, a half would be of one kind of traffic: tokens are dealt instead.
FEWEST_WINDOWS = 4

Floats = NDArray[np.float64]


class Observed:
    """Tokens per layer and expert [L,E], each worth less with every observation after it.

    Parameters
    ----------
    layers, experts
        Sizes L and E.
    decay
        What a count is worth one observation later.
    seed
        Of how tokens are dealt; with equal counts every rank deals alike.

    Attributes
    ----------
    total, held
        All that was counted, and what of it is held out [L,E].
    steps
        Steps of the model that it was counted in.
    """

    def __init__(self, layers: int, experts: int, decay: float, seed: int) -> None:
        self.decay = decay
        self.total: Floats = np.zeros((layers, experts))
        self.held: Floats = np.zeros((layers, experts))
        self.steps = 0.0
        self._seed, self._number = seed, 0

    def add(self, windows: NDArray[np.generic], steps: float) -> None:
        """Take windows of counts [W,L,E] of so many steps."""
        counts = windows.astype(np.float64)
        load: Floats = counts.sum(axis=0)
        if len(counts) >= FEWEST_WINDOWS:
            held = counts[1::2].sum(axis=0)
        else:
            random = np.random.default_rng([self._seed, self._number])
            held = random.binomial(np.floor(load).astype(np.int64), 0.5).astype(np.float64)
        self._number += 1
        self.total = self.decay * self.total + load
        self.held = self.decay * self.held + held
        self.steps = self.decay * self.steps + steps

    @property
    def per_step(self) -> Floats:
        """All tokens per step [L,E]."""
        every: Floats = self.total / max(self.steps, 1e-9)
        return every

    @property
    def learned(self) -> Floats:
        """Counts to place by [L,E]: those that are not held out."""
        rest: Floats = self.total - self.held
        return rest

    def like_all(self, part: Floats) -> Floats:
        """Return tokens per step of a part of the counts [L,E], as many in a layer as there are."""
        whole = self.per_step.sum(axis=1, keepdims=True)
        own = part.sum(axis=1, keepdims=True)
        scaled: Floats = part * np.divide(whole, own, out=np.zeros_like(own), where=own > 0)
        return scaled


# The rest is for what the model itself will ask for.
SHARE = 0.5
ENOUGH = 1 << 60  # where nobody can say


def spare_bytes(device: torch.device, sharing: int = 1) -> int:
    """Compute the bytes that buffers may take on a device, half of what is free; never fails.

    Parameters
    ----------
    device
        Where the buffers would be.
    sharing
        Processes that share a host's memory; of a GPU each is taken to have its own.
    """
    try:
        free = _free_bytes(device, sharing)
    except (OSError, RuntimeError, ValueError):
        free = None
    return ENOUGH if free is None else int(free * SHARE)


def _free_bytes(device: torch.device, sharing: int) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has set aside and nobody uses.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "cpu":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharing
    return None


PATIENCE = 0.9  # what the time of a search is worth, one step without a search later


class ComputeCost(Protocol):
    """What the rebalancer asks of a cost model; ``moetuner.CostModel`` answers it."""

    def compute_us(self, tokens: ArrayLike, active: ArrayLike | None = None) -> NDArray[np.float64]:
        """Compute microseconds of devices for tokens [...], by expert, of so many experts."""
        ...


@dataclass(frozen=True)
class Decision:
    """What a step of the rebalancer did, and why.

    Parameters
    ----------
    moved
        Whether another placement is in force now.
    reason
        In words.
    gain_us
        Predicted gain per step of the model, in microseconds.
    cost_us
        Predicted time of the move, in microseconds.
    experts_moved
        Copies of experts that come to a device from another one.
    bytes_moved
        Their weights.
    decision_us
        Time that it took to find the placement, on the slowest rank: it must be brought in as well.
    """

    moved: bool
    reason: str
    gain_us: float = 0.0
    cost_us: float = 0.0
    experts_moved: int = 0
    bytes_moved: int = 0
    decision_us: float = 0.0


@dataclass(frozen=True)
class _Plan:
    """A placement to be, or why there is ``nothing`` to do, and the layers that it changes.

    Those that gain most by a copy come first.
    """

    target: Placement
    nothing: str | None = None
    layers: list[int] = field(default_factory=list)


class Rebalancer:
    """Moves experts of running layers when the traffic has changed enough.

    A move pays if it is predicted to make every step faster by more than the dead zone, and all the
    steps ahead together by more than ``hysteresis`` times what the move takes and the search for it
    took. The prediction is for a half of the counts that the search has not seen. All ranks must
    observe the same counts (sum them over ranks first), and each computes the same answer. What
    one move leaves undone, the next one goes on with.

    Parameters
    ----------
    layers
        The layers of this rank, by number: all layers of one placement.
    cost_model
        Time of a device for tokens and active experts, as measured on it.
    topology
        Links between the devices; one node by default.
    steps_ahead
        Steps over which a move must pay.
    decay
        What a count is worth one observation later, from 0 to 1.
    dead_zone
        Smallest share of the time of a step that is worth a move.
    hysteresis
        How many times its cost a move must bring in.
    move_budget
        Copies of experts that one move may bring to other devices. None takes what half of the free
        memory of the device with the least holds, times the devices, and at most 0.19 of what
        packing anew would bring or eight to a device. The layers that gain most by a copy move
        first; where a rank turns out to have no room, half of the layers move, and so on.
    seed
        Of how tokens are dealt to those held out.
    timeout
        Seconds to wait for a rank before a move is given up.

    Raises
    ------
    ValueError
        If the layers are not those of one placement, or a number is out of range.
    """

    def __init__(
        self,
        layers: Sequence[ExpertParallelMoE],
        cost_model: ComputeCost,
        topology: Topology | None = None,
        *,
        steps_ahead: int,
        decay: float = 0.9,
        dead_zone: float = 0.02,
        hysteresis: float = 1.5,
        move_budget: int | None = None,
        seed: int = 0,
        timeout: float = 30.0,
    ) -> None:
        if not layers:
            raise ValueError("layers must be all layers of a placement, got none")
        self.layers = list(layers)
        placement = self.placement
        numbers = [layer.routes.layer for layer in layers]
        if numbers != list(range(placement.layers)) or any(
            layer.placement != placement for layer in layers
        ):
            raise ValueError(
                f"layers must be 0 to {placement.layers - 1} of one placement, got {numbers}"
            )
        if topology is not None:
            instance("topology", topology, Topology)
        self.topology = Topology(placement.devices) if topology is None else topology
        if self.topology.devices != placement.devices:
            raise ValueError(
                f"topology must have {placement.devices} devices like the placement, "
                f"got {self.topology.devices}"
            )
        whole_number("steps_ahead", steps_ahead)
        for name, value in (
            ("dead_zone", dead_zone),
            ("hysteresis", hysteresis),
            ("timeout", timeout),
        ):
            not_negative(name, value, "number")
        if move_budget is not None:
            at_least("move_budget", move_budget, 0)
        if not (is_number(decay) and 0 <= decay <= 1):
            raise ValueError(f"decay must be from 0 to 1, got {shown(decay)}")
        seed_in(seed)
        if not hasattr(cost_model, "compute_us"):
            raise TypeError(f"cost_model must be a CostModel, got {shown(cost_model)}")
        self.cost_model, self.steps_ahead = cost_model, steps_ahead
        self.decay, self.dead_zone, self.hysteresis = decay, dead_zone, hysteresis
        self.move_budget, self.seed = move_budget, seed
        self._observed = Observed(placement.layers, placement.num_experts, decay, seed)
        self._decision_us = 0.0
        self._agreement = Agreement(self.layers[0].group, timeout)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.layers[0].placement

    @property
    def load(self) -> NDArray[np.float64]:
        """Decayed tokens per step, layer and expert [L,E]."""
        return self._observed.per_step

    def observe(self, counts: RoutingStatistics | ArrayLike, *, steps: int = 1) -> None:
        """Add what all ranks together have counted since the last time.

        Parameters
        ----------
        counts
            Statistics, or tokens per layer and expert [L,E]. Every other window is held out, or
            of few windows half of the tokens.
        steps
            Steps of the model that they were counted in.
        """
        windows = (
            counts.window_load
            if isinstance(counts, RoutingStatistics)
            else numbers_in("counts", counts)[None]
        )
        whole_number("steps", steps, lowest=0)
        sizes = self._observed.total.shape
        if windows.shape[1:] != sizes:
            raise ValueError(
                f"counts must be [layers, experts] {list(sizes)}, got {list(windows.shape[1:])}"
            )
        if not (np.isfinite(windows).all() and (windows >= 0).all()):
            raise ValueError(
                f"counts must be finite and at least 0, got {windows.min():g} to {windows.max():g}"
            )
        self._observed.add(windows, steps)

    def step(self) -> Decision:
        """Move experts if it pays. Every rank calls it between the same two steps of the model.

        Raises
        ------
        MoveError
            On every rank, if one fails, is lost or late, or has observed something else. The old
            placement is in force on all of them. Counts that differ are forgotten on all ranks, so
            the next steps work again.
        """
        begin, agreement = time.perf_counter(), self._agreement
        agreement.begin()
        observed = self._observed
        counts = (observed.total, observed.held, np.array([observed.steps]), self.placement.slots)
        try:
            agreement.reach("what was observed", fingerprint(*(of.tobytes() for of in counts)))
        except DisagreementError as error:
            # Their counts would differ for ever, as old ones only fade.
            self.reset()
            raise MoveError(f"{error}, and all ranks forget what they observed") from None
        room, failure = attempt(self._room)
        room = -max(agreement.exchange("room for experts", -(room or 0), failure))
        plan, failure = attempt(self._plan, room)
        said = plan and fingerprint(plan.target.slots.tobytes(), str(plan.nothing).encode())
        agreement.reach("the next placement", said or 0, failure)
        assert plan is not None
        if plan.nothing is not None:
            # One slow search must not be the last one.
            self._decision_us *= PATIENCE
            return Decision(False, plan.nothing)
        # The slowest rank is what the others waited for; all judge by the same time.
        took = 1e6 * (time.perf_counter() - begin)
        self._decision_us = max(agreement.exchange("the time it took", round(took)))
        return self._carry_out(plan)

    def reset(self) -> None:
        """Forget what was observed. Every rank calls it between the same two steps of the model."""
        layers, experts = self._observed.total.shape
        self._observed = Observed(layers, experts, self.decay, self.seed)
        self._decision_us = 0.0

    def _carry_out(self, plan: _Plan) -> Decision:
        """Move to a planned placement if it pays; where it does not fit, half of its layers."""
        while True:
            decision, failure = attempt(self._judge, plan)
            # Ranks with other prices would wait for one another in vain.
            moved = decision is not None and decision.moved
            self._agreement.reach("whether to move", int(moved), failure)
            assert decision is not None
            if not decision.moved:
                return decision
            try:
                group = self.layers[0].group
                migrate(self.layers, plan.target, agreement=self._agreement, group=group)
                return decision
            except NoRoomError:
                if len(plan.layers) < 2:
                    raise
            plan = self._part(plan, plan.layers[: len(plan.layers) // 2])

    def _judge(self, plan: _Plan) -> Decision:
        """Judge whether a move pays, by the counts that were held out."""
        held = self._observed.like_all(self._observed.held)
        now = self._step_us(self.placement, held)
        gain = now - self._step_us(plan.target, held)
        copies, size, cost = self._move(self.placement, plan.target)
        figures = (gain, cost, copies, size, self._decision_us)
        # What is no number, of a cost model without an answer, is no gain.
        if not gain > self.dead_zone * now:
            return Decision(False, "the gain is within the dead zone", *figures)
        if not gain * self.steps_ahead > self.hysteresis * (cost + self._decision_us):
            return Decision(False, "the move takes longer than it brings in", *figures)
        return Decision(True, "the move pays", *figures)

    def _plan(self, room: int) -> _Plan:
        """Find the placement to be, of at most ``room`` copies that come to a device."""
        current, observed = self.placement, self._observed
        now = self._step_us(current, self.load)
        ideal = self._step_us(current, self.load, spread=True)
        most = now - ideal
        if most <= self.dead_zone * now:
            return _Plan(current, "balanced: no placement gains more than the dead zone")
        if most * self.steps_ahead <= self.hysteresis * self._decision_us:
            return _Plan(current, "balanced: no placement gains more than it takes to find one")
        if room == 0:
            return _Plan(current, "a device has no memory for an expert that arrives")
        budget = self.move_budget
        if budget is None:
            most_moved = largest_move(current.layers, current.slots[0].size, current.devices)
            budget = min(room * current.devices, most_moved)
        budget = min(budget, current.slots.size)
        learned = observed.learned
        # A step in balance 1 is a device's mean load in every layer.
        price = self._price(ideal) * float(learned.sum()) / current.devices
        while True:
            found = rebalance(
                learned,
                current.slots,
                time=self.topology.time_of_device,
                budget=budget,
                dead_zone=self.dead_zone,
                deviations=0.0,  # the gain is judged by counts that were held out
                full=False,
                price=price,
            )
            target = Placement(found.slots, num_experts=current.num_experts)
            plan, too_large = self._fitting(target, room)
            if plan.layers or not too_large or budget < 2:
                return plan
            budget //= 2  # all of it comes to a few devices

    def _fitting(self, target: Placement, room: int) -> tuple[_Plan, bool]:
        """Take the layers that gain most by a copy, as long as they fit; say if others do not."""
        current = self.placement
        learned = self._observed.like_all(self._observed.learned)
        gain = self._layers_us(current, learned) - self._layers_us(target, learned)
        arrive = self._arrivals(current, target)
        copies = arrive.sum(axis=1)
        changed = np.flatnonzero((current.slots != target.slots).any(axis=(1, 2)))
        worth = gain / np.maximum(copies, 1)
        chosen: list[int] = []
        held = np.zeros(current.devices, dtype=np.int64)
        for number in changed[np.argsort(-worth[changed], kind="stable")].tolist():
            if gain[number] > 0 and (held + arrive[number]).max() <= room:
                held += arrive[number]
                chosen.append(number)
        too_large = bool((gain[changed] > 0).sum() > len(chosen))
        return self._part(_Plan(target, None, chosen), chosen), too_large

    def _part(self, plan: _Plan, layers: list[int]) -> _Plan:
        """Return the plan for some of its layers alone; the others stay as they are."""
        slots = self.placement.slots.copy()
        slots[layers] = plan.target.slots[layers]
        return _Plan(Placement(slots, num_experts=self.placement.num_experts), None, layers)

    def _room(self) -> int:
        """Return how many copies have room on this device."""
        devices = self.placement.devices
        spare = spare_bytes(self.layers[0].device, devices)
        each = max(self._expert_bytes(layer) for layer in self.layers)
        return spare // max(each, 1)

    def _arrivals(self, current: Placement, target: Placement) -> NDArray[np.int64]:
        """Count the copies that come to a device, with those that change slots [L,D]."""
        found = np.zeros((current.layers, current.devices), dtype=np.int64)
        for number, layer in enumerate(self.layers):
            for move in moves(current.slots[number], target.slots[number], layer.devices_per_node):
                found[number, move.target] += 1
        return found

    def _price(self, ideal: float) -> float:
        """Balance that a moved copy must bring in: hysteresis times what it takes, over the steps.

        As if moves were spread evenly over the devices' ports; ``ideal`` is a step in balance 1.
        """
        link = self.topology.bandwidth[np.isfinite(self.topology.bandwidth)]
        if not (ideal and link.size):
            return 0.0
        each = 1e6 * self._expert_bytes(self.layers[0]) / link.max() / self.topology.devices
        return float(self.hysteresis * each / (self.steps_ahead * ideal))

    def _expert_bytes(self, layer: ExpertParallelMoE) -> int:
        weights = layer.experts.weights().values()
        return sum(weight[0].numel() * weight.element_size() for weight in weights)

    def _step_us(self, placement: Placement, load: Floats, *, spread: bool = False) -> float:
        """Predict the time of the experts in one step of loads [L,E], all layers together."""
        return float(self._layers_us(placement, load, spread=spread).sum())

    def _layers_us(self, placement: Placement, load: Floats, *, spread: bool = False) -> Floats:
        """Predict the time of every layer [L], which waits for its busiest device.

        With ``spread``, as if the work could be spread evenly.
        """
        layer, device, slot = np.nonzero(placement.slots != EMPTY)
        expert = placement.slots[layer, device, slot]
        part = load[layer, expert] / placement.replicas[layer, expert]
        tokens, active = np.zeros((2, placement.layers, placement.devices))
        np.add.at(tokens, (layer, device), part)
        # Chance that a step brings an expert any token, if they come independently.
        np.add.at(active, (layer, device), -np.expm1(-part))
        if spread:
            tokens, active = (of.mean(axis=1, keepdims=True) for of in (tokens, active))
        times: Floats = np.asarray(self.cost_model.compute_us(tokens, active)).max(axis=1)
        return times

    def _move(self, current: Placement, target: Placement) -> tuple[int, int, float]:
        """Count copies and bytes between devices, and the microseconds of the busiest port."""
        port = np.zeros((2, current.devices))
        copies = size = 0
        for number, layer in enumerate(self.layers):
            each = self._expert_bytes(layer)
            for move in moves(current.slots[number], target.slots[number], layer.devices_per_node):
                if move.source != move.target:
                    time = 1e6 * each / self.topology.bandwidth[move.source, move.target]
                    port[0, move.source] += time
                    port[1, move.target] += time
                    copies, size = copies + 1, size + each
        return copies, size, float(port.max())
