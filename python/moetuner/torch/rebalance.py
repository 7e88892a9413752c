"""Rebalancer: follows the traffic, and moves experts where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.solver import solve
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.torch.agreement import Agreement, fingerprint
from moetuner.torch.expert_parallel import ExpertParallelMoE
from moetuner.torch.migration import migrate
from moetuner.torch.transfer import moves

# Search steps of each start: the model waits meanwhile.
ITERATIONS = 20_000


class ComputeCost(Protocol):
    """What the rebalancer asks of a cost model; ``moetuner.CostModel`` answers it."""

    def compute_us(self, tokens: ArrayLike, active: ArrayLike | None = None) -> NDArray[np.float64]:
        """Microseconds of devices for tokens [...], each counted per expert, of active experts."""
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
    """

    moved: bool
    reason: str
    gain_us: float = 0.0
    cost_us: float = 0.0
    experts_moved: int = 0
    bytes_moved: int = 0


class Rebalancer:
    """Moves experts of running layers when the traffic has changed enough.

    A move pays if it is predicted to make every step faster by more than the dead zone, and all the
    steps ahead together by more than ``hysteresis`` times what the move takes. All ranks must
    observe the same counts (sum them over ranks first), and each computes the same answer.

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
        Copies of experts that one move may bring to other devices; None for no limit. The spare
        buffers hold what one move brings to a device. With a limit a step of the rebalancer takes
        several times as long.
    seed
        Of the solver.
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
        self.topology = topology or Topology(placement.devices)
        if self.topology.devices != placement.devices:
            raise ValueError(
                f"topology must have {placement.devices} devices like the placement, "
                f"got {self.topology.devices}"
            )
        for name, value, lowest in (
            ("steps_ahead", steps_ahead, 1),
            ("dead_zone", dead_zone, 0.0),
            ("hysteresis", hysteresis, 0.0),
            ("timeout", timeout, 0.0),
            ("move_budget", move_budget or 0, 0),
        ):
            if not value >= lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, got {decay}")
        self.cost_model, self.steps_ahead = cost_model, steps_ahead
        self.decay, self.dead_zone, self.hysteresis = decay, dead_zone, hysteresis
        self.move_budget, self.seed = move_budget, seed
        self._load = np.zeros((placement.layers, placement.num_experts))
        self._steps = 0.0
        self._agreement = Agreement(self.layers[0].group, timeout)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.layers[0].placement

    @property
    def load(self) -> NDArray[np.float64]:
        """Decayed tokens per step, layer and expert [L,E]."""
        per_step: NDArray[np.float64] = self._load / max(self._steps, 1e-9)
        return per_step

    def observe(self, counts: RoutingStatistics | ArrayLike, *, steps: int = 1) -> None:
        """Add what all ranks together have counted since the last time.

        Parameters
        ----------
        counts
            Statistics, or tokens per layer and expert [L,E].
        steps
            Steps of the model that they were counted in.
        """
        load = counts.total_load if isinstance(counts, RoutingStatistics) else np.asarray(counts)
        if load.shape != self._load.shape:
            raise ValueError(
                f"counts must be [layers, experts] {list(self._load.shape)}, got {list(load.shape)}"
            )
        self._load = self.decay * self._load + load
        self._steps = self.decay * self._steps + steps

    def step(self) -> Decision:
        """Move experts if it pays. Every rank calls it between the same two steps of the model.

        Raises
        ------
        MoveError
            On every rank, if one fails, is lost, or has observed something else. The old placement
            is in force on all of them.
        """
        target, decision, failure = self.placement, Decision(False, "failed"), None
        try:
            target, decision = self._decide()
        except Exception as error:
            failure = error
        said = fingerprint(self._load.tobytes(), target.slots.tobytes())
        self._agreement.reach("the next placement", said, failure)
        if decision.moved:
            group = self.layers[0].group
            migrate(self.layers, target, agreement=self._agreement, group=group)
        return decision

    def _decide(self) -> tuple[Placement, Decision]:
        """Give the placement to be, and whether and why it is another one."""
        current = self.placement
        now = self._step_us(current)
        ideal = self._step_us(current, spread=True)
        if now - ideal <= self.dead_zone * now:
            return current, Decision(False, "balanced: no placement gains more than the dead zone")
        # Counts are whole; a factor keeps what decay has left behind the point.
        counts = np.rint(self._load * 64).astype(np.uint64)
        problem = Problem(
            RoutingStatistics.from_load(counts),
            self.topology,
            slots_per_device=current.slots_per_device,
            objective="balance",
        )
        target = solve(
            problem,
            "heuristic",
            seed=self.seed,
            iterations=ITERATIONS,
            initial=current,
            move_budget=self.move_budget,
            move_cost=self._price(ideal),
        ).placement
        gain = now - self._step_us(target)
        copies, size, cost = self._move(current, target)
        figures = (gain, cost, copies, size)
        if gain <= self.dead_zone * now:
            return current, Decision(False, "the gain is within the dead zone", *figures)
        if gain * self.steps_ahead <= self.hysteresis * cost:
            return current, Decision(False, "the move takes longer than it brings in", *figures)
        return target, Decision(True, "the move pays", *figures)

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

    def _step_us(self, placement: Placement, *, spread: bool = False) -> float:
        """Predict the time of the experts in one step: each layer waits for its busiest device.

        With ``spread``, as if the work could be spread evenly.
        """
        layer, device, slot = np.nonzero(placement.slots != EMPTY)
        expert = placement.slots[layer, device, slot]
        part = self.load[layer, expert] / placement.replicas[layer, expert]
        tokens, active = np.zeros((2, placement.layers, placement.devices))
        np.add.at(tokens, (layer, device), part)
        # Chance that a step brings an expert any token, if they come independently.
        np.add.at(active, (layer, device), -np.expm1(-part))
        if spread:
            tokens, active = (of.mean(axis=1, keepdims=True) for of in (tokens, active))
        return float(self.cost_model.compute_us(tokens, active).max(axis=1).sum())

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
