"""Balance and time: windows, copies, devices that differ, links. All layers by one search.

Every layer's contents are annealed on all that the problem says of it; where transitions join the
layers, in turns, each given its neighbours, from a start that the search for traffic found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core, objective
from moetuner.balance import times
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.solver.clock import Clock
from moetuner.solver.enumeration import enumerated
from moetuner.solver.heuristic import heuristic
from moetuner.solver.prices import link_us, visit_us
from moetuner.solver.result import Candidate, Limits, Progress, Status
from moetuner.solver.unseen import SMALL, Choice, choose

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Caps on the imbalance of the sum under which traffic alone is searched: where time weighs both,
# the cap is what tells how much of one buys how much of the other.
CAPS = (1.02, 1.08, 1.2, 1.5, float("inf"))
# Turns of all layers, each given its neighbours.
ROUNDS = 3
# Trials of a layer for each of its slots; small layers get the least.
PER_SLOT = 600
LEAST, MOST = 20_000, 600_000
# Share of a time limit for the searches for traffic.
SEARCH_SHARE = 0.6
# Layers of few slots are searched several times, from so hot that no valley holds them.
RESTARTS = 8
SMALL_HOT, SMALL_COLD = 0.3, 1e-3
# Tokens of balance that a unit of traffic outweighs: balance only decides between equals.
TRAFFIC_FIRST = 1e3
# Times that risk and groups are weighed anew.
REWEIGHTINGS = 4
# Seconds that trying every placement of a small problem may take.
ENOUGH = 2.0


@dataclass(frozen=True)
class Moving:
    """What it costs to leave a running placement.

    Parameters
    ----------
    initial
        The placement that runs.
    price
        Of a copy that has to be brought, in units of the objective.
    """

    initial: Placement
    price: float

    @property
    def prices(self) -> Floats:
        """Price of a copy on a device [L,D,E]."""
        return np.where(self.initial.held, 0.0, self.price)

    def moved(self, placement: Placement) -> int:
        """Count copies that have to be brought."""
        return self.initial.diff(placement).experts_moved


def layers(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Solve for balance or time, or for traffic where devices or slots are not all alike."""
    return Search(problem, seed).run(limits)


def _for_traffic(problem: Problem, cap: float, seed: int, limits: Limits) -> Candidate:
    """One copy of each expert on devices that are alike, for traffic alone under a cap."""
    fewest = -(-problem.experts // problem.devices)
    alike = replace(
        problem,
        topology=replace(problem.topology, speed=None, slots_per_device=None),
        slots_per_device=fewest,
        extra_slots=None,
        max_imbalance=cap,
        objective="traffic",
        pinned=(),
        forbidden=(),
    )
    return heuristic(alike, seed=seed, limits=limits)


def widened(problem: Problem, slots: Slots) -> Slots:
    """Slots [L,D,S] in the problem's own rooms, which hold them; what is in them moves down."""
    wide = problem.empty_slots()
    width = min(slots.shape[2], problem.slots)
    # Full slots first: rooms may be narrower than these slots.
    order = np.argsort(slots == EMPTY, axis=2, kind="stable")
    wide[:, :, :width] = np.take_along_axis(slots, order, axis=2)[:, :, :width]
    return wide


class Search:
    """A problem as the core's search of layers sees it.

    What is learned of its windows is kept from one run to the next.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.moving: Moving | None = None
        topology = problem.topology
        self.slowest = topology.speed_of_device.min()
        self.time = times(topology.speed_of_device)
        transitions = problem.statistics.transitions
        joined = problem.regime == "follow" and problem.goal != "balance"
        some = joined and transitions is not None and bool(transitions.any())
        self.links = transitions if some else None
        windows = problem.windows
        self.choice = Choice(windows.load, windows.weight)
        self.emphasis: list[Floats] = []
        self.details: dict[str, Any] = {}

    def run(
        self, limits: Limits, *, start: Slots | None = None, moving: Moving | None = None
    ) -> Candidate:
        """Search within limits.

        Parameters
        ----------
        start
            Slots [L,D,S] to improve on, besides the search's own starts.
        moving
            What changes cost.
        """
        clock, problem = Clock(limits), self.problem
        self.moving = moving
        slots = self.construct()
        if limits.time_limit == 0:
            return self.candidate(slots, "time_limit")
        # Windows are weighed anew some times before the first answer, then once each.
        turns = 1 if problem.windows.is_mean or self.emphasis else REWEIGHTINGS
        try:
            if not self.emphasis:
                self.learn(limits.threads)
        except KeyboardInterrupt:
            return self.candidate(slots if start is None else start, "interrupted")
        starts = [slots] if start is None else [start, slots]
        interrupted = False
        if self.links is not None and moving is None:
            for number, cap in enumerate(CAPS):
                share = SEARCH_SHARE / (len(CAPS) - number)
                found = _for_traffic(problem, cap, self.seed, clock.within(share))
                wider = self.allowed(found.slots)
                starts.extend([] if wider is None else [wider])
                interrupted = found.status == "interrupted"
                if interrupted:
                    break
        best = min(starts, key=self.value)
        for turn in range(turns):
            if interrupted:
                break
            improved, interrupted = self.improve(best, clock.within(1 / (turns - turn)))
            self.look_at(improved)
            best = min(best, improved, key=self.value)
        if interrupted:
            return self.candidate(best, "interrupted")
        return self.completed(best, clock.within())

    def completed(self, slots: Slots, limits: Limits) -> Candidate:
        """Answer with slots, or the best there are if there are few and windows do not add up."""
        problem = self.problem
        if problem.goal == "traffic" or (problem.goal == "balance" and problem.windows.is_mean):
            return self.candidate(slots, "feasible")
        if limits.time_limit is not None and limits.time_limit < ENOUGH:
            return self.candidate(slots, "feasible")
        price = None if self.moving is None else self.moving.prices
        found = enumerated(problem, self.value(slots), caps=self.caps, price=price)
        if found is None:
            return self.candidate(slots, "feasible")
        answer = self.candidate(found if len(found) else slots, "optimal")
        if self.moving is not None:
            # The best with its price: without, others may be better.
            return replace(answer, status="feasible")
        return replace(answer, bound=self.value(answer.slots), bound_source="every placement")

    def learn(self, threads: int | None) -> None:
        """Choose what generalises to traffic that nobody has seen, by cross-validation."""
        windows = self.problem.windows
        self.emphasis = [np.ones(len(windows.weight))]
        self.choice = choose(
            windows.load,
            windows.weight,
            windows.group,
            self.problem.rooms,
            self.problem.topology.node_of_device,
            self.time,
            nearest=self.problem.split == "nearest",
            seed=self.seed,
            threads=threads,
        )
        self.details["unseen"] = self.choice.details
        if not windows.is_mean:
            # Windows are weighed anew: they have to be those of the problem.
            self.choice = replace(self.choice, load=windows.load, weight=windows.weight)

    def value(self, slots: Slots) -> float:
        """Objective of slots, and what moving there costs."""
        placement = self._placement(slots)
        value, moving = self.problem.value(placement), self.moving
        return value if moving is None else value + moving.price * moving.moved(placement)

    def construct(self) -> Slots:
        """Slots [L,D,S] by the heaviest copy first."""
        slots = self._layers().construct()
        if not self.problem.may_copy:
            for layer in slots:
                _, first = np.unique(layer, return_index=True)
                again = np.ones(layer.size, dtype=bool)
                again[first] = False
                layer.reshape(-1)[again] = EMPTY
        return slots

    def improve(self, slots: Slots, limits: Limits) -> tuple[Slots, bool]:
        """Anneal every layer, and say whether it was interrupted."""
        choice, problem = self.choice, self.problem
        trials = limits.iterations
        if trials is None:
            trials = int(np.clip(PER_SLOT * problem.rooms.sum(axis=1).max(), LEAST, MOST))

        small = problem.rooms.sum(axis=1).max() <= SMALL

        def report(seconds: float, _: int | None) -> None:
            if limits.progress is not None:
                limits.progress(Progress(seconds, "layers"))

        return self._layers().place(
            np.ascontiguousarray(slots),
            trials=trials,
            hot=SMALL_HOT if small else choice.hot,
            cold=SMALL_COLD if small else choice.cold,
            restarts=RESTARTS if small else 1,
            copies=problem.may_copy,
            rounds=ROUNDS,
            transitions=self.links,
            link_cost=None if self.links is None else self._link_cost(),
            seed=self.seed,
            time_limit=limits.time_limit,
            threads=limits.threads,
            progress=report if limits.progress is not None else None,
        )

    @property
    def caps(self) -> Floats | None:
        """Largest load over speed of a device, in the sum of all windows [L]; None without cap."""
        problem = self.problem
        if problem.max_imbalance is None or np.isinf(problem.max_imbalance):
            return None
        mean = problem.load.sum(axis=1, dtype=np.float64) / problem.topology.speed_of_device.sum()
        caps: Floats = problem.max_imbalance * mean
        return caps

    def look_at(self, slots: Slots) -> None:
        """Give the windows that a risk or the worst group is made of more weight, next time."""
        problem, windows = self.problem, self.problem.windows
        if windows.is_mean:
            return
        shares = objective.shares(problem, self._placement(slots)).sum(axis=1)
        self.emphasis.append(windows.emphasis(shares, objective.measure(problem)))
        weight = windows.weight * np.mean(self.emphasis, axis=0)
        self.choice = replace(self.choice, weight=weight)

    def allowed(self, slots: Slots) -> Slots | None:
        """Slots [L,D,S] of one copy each, in the problem's rooms; None where they break a rule."""
        problem = self.problem
        if ((slots != EMPTY).sum(axis=2) > problem.rooms).any():
            return None
        wide = widened(problem, slots)
        return None if problem.rules.broken(self._placement(wide)) else wide

    def candidate(self, slots: Slots, status: Status) -> Candidate:
        """Answer with slots."""
        return Candidate(slots, status=status, details=self.details)

    def _placement(self, slots: Slots) -> Placement:
        return Placement(slots, num_experts=self.problem.experts)

    def _layers(self) -> _core.Layers:
        problem, choice = self.problem, self.choice
        hold: Floats | None = None
        if self.moving is not None:
            hold = self.moving.prices.transpose(0, 2, 1) * self._tokens_per_unit()
        return _core.Layers(
            np.ascontiguousarray(choice.load),
            choice.weight,
            problem.rooms,
            problem.topology.node_of_device.tolist(),
            self.time.tolist(),
            nearest=problem.split == "nearest",
            norm=choice.norm,
            total=problem.load.astype(np.float64),
            cap=None if self.caps is None else (self.caps * self.slowest).tolist(),
            hold=None if hold is None else np.ascontiguousarray(hold),
            forbidden=problem.rules.forbidden,
            pinned=problem.rules.pinned,
            **self._visits(),
        )

    def _visits(self) -> dict[str, Any]:
        """Expert sets and what a visit costs, in weighted tokens, where visits count."""
        problem, sets = self.problem, self.problem.statistics.sets
        if not problem.counts_visits or sets is None or problem.goal == "balance":
            return {}
        unit, tokens = self._tokens_per_unit(), float(sets[0].counts.sum())
        if problem.goal == "time":
            unit *= visit_us(problem)
        each = unit / (problem.layers * max(tokens, 1))
        device_cost, node_cost = objective.visit_costs(problem.topology)
        return {
            "sets": [(of.ids, of.counts) for of in sets],
            "device_cost": device_cost * each,
            "node_cost": node_cost * each,
        }

    def _tokens_per_unit(self) -> float:
        """Weighted tokens on the slowest device that make one unit of the objective."""
        problem, weight = self.problem, self.choice.weight.sum()
        if problem.goal == "time":
            assert problem.cost_model is not None
            token_us = max(problem.cost_model.token_us, 1e-12)
            return float(self.slowest * weight * problem.layers / token_us)
        if problem.goal == "traffic":
            return TRAFFIC_FIRST * problem.cost_scale
        mean = self.choice.load.sum(axis=(1, 2)) / problem.topology.speed_of_device.sum()
        return float(self.slowest * (self.choice.weight * mean).sum())

    def _link_cost(self) -> Floats:
        """Weighted tokens that a pair over a link counts for [D,D]."""
        problem, unit = self.problem, self._tokens_per_unit()
        if problem.goal == "traffic":
            return problem.topology.cost.astype(np.float64) * (unit / problem.cost_scale)
        share = unit / (problem.layers * problem.statistics.windows)
        return link_us(problem) * share
