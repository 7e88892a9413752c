"""Rebalancer: follows the traffic, and moves experts where that pays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner.placement import Placement
from moetuner.solver.rebalancing import compute_move_limit, rebalance
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.torch.parallel.agreement import (
    Agreement,
    DisagreementError,
    MoveError,
    NoMemoryError,
    attempt,
    fingerprint,
)
from moetuner.torch.parallel.layer import ExpertParallelMoE
from moetuner.torch.parallel.migrate import expert_bytes, migrate

# With fewer windows, a half could have one kind of traffic, so tokens are divided at random.
FEWEST_WINDOWS = 4

Floats = NDArray[np.float64]


class ComputeCost(Protocol):
    """The method of a cost model that the rebalancer calls; ``moetuner.CostModel`` has it."""

    def compute_us(self, tokens: ArrayLike, active: ArrayLike | None = None) -> NDArray[np.float64]:
        """Compute microseconds of devices for tokens [...], by expert, of so many experts."""
        ...


@dataclass(frozen=True)
class Decision:
    """The result of a step of the rebalancer, and its reason.

    Parameters
    ----------
    moved
        Whether another placement is in force now.
    reason
        Reason as a sentence.
    gain_us
        Predicted gain per step of the model, in microseconds.
    cost_us
        Predicted time of the move, in microseconds.
    experts_moved
        Copies of experts that come to a device from another one.
    bytes_moved
        Bytes of these copies.
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
        Copies of experts that one move may bring to other devices, where they gain most. None takes
        0.19 of what packing anew would bring, or eight to a device. Where that is more than half of
        the free memory of a device, half as many move, and so on.
    seed
        Of how tokens are dealt to those held out.
    timeout
        Seconds to wait for a rank before a move is given up. A store of ``torch.distributed`` that
        does not answer within 5 seconds ends it, too.

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
        self.layers, placement = list(layers), layers[0].placement
        numbers = [layer.layer for layer in layers]
        is_one = all(layer.placement == placement for layer in layers)
        if numbers != list(range(placement.layers)) or not is_one:
            last = placement.layers - 1
            raise ValueError(f"layers must be 0 to {last} of one placement, got {numbers}")
        self.topology = Topology(placement.devices) if topology is None else topology
        check.instance("topology", self.topology, Topology)
        if self.topology.devices != placement.devices:
            rule = f"{placement.devices} devices like the placement"
            raise ValueError(f"topology must have {rule}, got {self.topology.devices}")
        self.steps_ahead = check.whole_number("steps_ahead", steps_ahead)
        self.dead_zone = check.not_negative("dead_zone", dead_zone, "number")
        self.hysteresis = check.not_negative("hysteresis", hysteresis, "number")
        if move_budget is None:
            move_budget = compute_move_limit(
                placement.layers, placement.slots[0].size, placement.devices
            )
        check.at_least("move_budget", move_budget, 0)
        self.move_budget = min(move_budget, placement.slots.size)
        if not (check.is_number(decay) and 0 <= decay <= 1):
            raise ValueError(f"decay must be from 0 to 1, got {check.shown(decay)}")
        if not hasattr(cost_model, "compute_us"):
            raise TypeError(f"cost_model must be a CostModel, got {check.shown(cost_model)}")
        self.cost_model, self.decay, self.seed = cost_model, decay, check.seed_in(seed)
        timeout = check.not_negative("timeout", timeout, "number")
        self._agreement = Agreement(self.layers[0].group, timeout)
        self.reset()

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.layers[0].placement

    @property
    def load(self) -> NDArray[np.float64]:
        """Decayed tokens per step, layer and expert [L,E]."""
        tokens: Floats = self._halves.sum(axis=0) / max(self._steps, 1e-9)
        return tokens

    def reset(self) -> None:
        """Forget what was observed. Every rank calls it between the same two steps of the model."""
        # Counts to place by, and counts to judge by, each worth less with every later observation.
        self._halves: Floats = np.zeros((2, self.placement.layers, self.placement.num_experts))
        self._steps, self._observations = 0.0, 0

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
        if isinstance(counts, RoutingStatistics):
            windows = counts.window_load.astype(np.float64)
        else:
            windows = check.amounts_in("counts", counts)[None]
        sizes = self._halves.shape[1:]
        check.whole_number("steps", steps, lowest=0)
        if windows.shape[1:] != sizes:
            shape = list(windows.shape[1:])
            raise ValueError(f"counts must be [layers, experts] {list(sizes)}, got {shape}")
        load, unseen = windows.sum(axis=0), windows[1::2].sum(axis=0)
        if len(windows) < FEWEST_WINDOWS:
            # With equal counts every rank deals alike.
            random = np.random.default_rng([self.seed, self._observations])
            unseen = random.binomial(load.astype(np.int64), 0.5).astype(np.float64)
        self._halves = self.decay * self._halves + np.stack([load - unseen, unseen])
        self._steps = self.decay * self._steps + steps
        self._observations += 1

    def step(self) -> Decision:
        """Move experts if it pays. Every rank calls it between the same two steps of the model.

        Raises
        ------
        MoveError
            On every rank, if one fails, is lost or late, or has observed something else, or if the
            store of ``torch.distributed`` stands still. The old placement is in force on all of
            them. Counts that differ are forgotten on all ranks, so the next steps work again.
        """
        agreement, current = self._agreement, self.placement
        agreement.begin()
        observed = (self._halves, np.array([self._steps]), current.slots)
        try:
            agreement.reach(
                "what was observed", fingerprint(*(part.tobytes() for part in observed))
            )
        except DisagreementError as error:
            # Their counts would differ forever, as old ones only fade.
            self.reset()
            raise MoveError(f"{error}, and all ranks forget what they observed") from None
        budget = self.move_budget
        while True:
            begin = time.perf_counter()
            target, failure = attempt(self._find_target, budget)
            chosen = "" if target is None else fingerprint(target.slots.tobytes())
            agreement.reach("the next placement", chosen, failure)
            if target is None or target == current:
                return Decision(False, "balanced: no placement gains more than the dead zone")
            decision = self._judge(target, begin)
            if not decision.moved:
                return decision
            try:
                migrate(self.layers, target, agreement)
                return decision
            except NoMemoryError:
                budget = min(budget, decision.experts_moved) // 2
            if not budget:
                return Decision(False, "a device has no memory for an expert that arrives")

    def _find_target(self, budget: int) -> Placement:
        """Compute the next placement: the current one, with the copies that gain most."""
        current, load = self.placement, self._half_load(0)
        tokens, times = self._busiest(current, load)
        if not times.sum() > 0:
            return current
        # Tokens that a copy must gain in a step: hysteresis times what it takes, over the steps
        # ahead, as if moves were spread evenly over the devices' ports.
        link = self.topology.bandwidth[np.isfinite(self.topology.bandwidth)]
        link_us = 1e6 * expert_bytes(self.layers[0]) / link.max() if link.size else 0.0
        tokens_per_us = float(tokens.sum() / times.sum())
        price = self.hysteresis * link_us / current.devices * tokens_per_us / self.steps_ahead
        # The gain is judged by counts that the search has not seen: no deviations.
        limits: dict[str, Any] = {"budget": budget, "min_gain": price, "dead_zone": self.dead_zone}
        limits |= {"deviations": 0.0, "full": False, "time": self.topology.time_of_device}
        better = rebalance(load, current.slots, **limits).slots
        return Placement(better, num_experts=current.num_experts)

    def _judge(self, target: Placement, begin: float) -> Decision:
        """Decide on all ranks whether a move pays, by counts that the search has not seen."""
        current, load = self.placement, self._half_load(1)

        def figures() -> list[float]:
            now, then = (
                float(self._busiest(placement, load)[1].sum()) for placement in (current, target)
            )
            return [then - now, now, self._move_us(target), 1e6 * (time.perf_counter() - begin)]

        posts = self._agreement.exchange("what a move brings", *attempt(figures))
        # Of ranks with other prices the most careful one decides, and all wait for the slowest.
        loss, now, cost, took = np.max(posts, axis=0).tolist()
        copies = current.diff(target).experts_moved_per_layer
        size = int(copies @ [expert_bytes(layer) for layer in self.layers])
        predicted = (-loss, cost, int(copies.sum()), size, took)
        # What is no number, of a cost model without an answer, is no gain.
        if not -loss > self.dead_zone * now:
            return Decision(False, "the gain is within the dead zone", *predicted)
        pays = -loss * self.steps_ahead > self.hysteresis * (cost + took)
        reason = "the move pays" if pays else "the move takes longer than it brings in"
        return Decision(pays, reason, *predicted)

    def _half_load(self, half: int) -> Floats:
        """Return tokens per step of a half of the counts [L,E], scaled to the sum of both."""
        counts = self._halves[half]
        sizes = counts.sum(axis=1, keepdims=True)
        both = self.load.sum(axis=1, keepdims=True)
        scaled: Floats = counts * np.divide(both, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        return scaled

    def _busiest(self, placement: Placement, load: Floats) -> tuple[Floats, Floats]:
        """Predict tokens and microseconds of the busiest device of every layer [L], [L]."""
        share = load / placement.replicas
        # The second is the chance that a step brings an expert any token, if they come
        # independently.
        means = share, -np.expm1(-share)
        tokens, active = (np.einsum("lde,le->ld", placement.held, mean) for mean in means)
        times = np.asarray(self.cost_model.compute_us(tokens, active), dtype=np.float64)
        return tokens.max(axis=1), times.max(axis=1)

    def _move_us(self, target: Placement) -> float:
        """Predict the microseconds of the busiest port in a move."""
        copies = self.placement.diff(target, topology=self.topology).pairs
        size = max(expert_bytes(layer) for layer in self.layers)
        times = 1e6 * size * copies / self.topology.bandwidth
        return float(max(times.sum(axis=0).max(), times.sum(axis=1).max()))
