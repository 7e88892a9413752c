"""Balance and time: windows, copies, devices that differ, links. All layers by one search.

Every layer's contents are annealed on all that the problem says of it; where transitions join the
layers, in turns, each given its neighbours, from a start that the search for traffic found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem, objective
from moetuner.solver.balancing import times
from moetuner.solver.bounds.caps import caps_of, exceeded, excess_of
from moetuner.solver.exact.enumeration import enumerated
from moetuner.solver.result import Candidate, Clock, Limits, Progress, Status
from moetuner.solver.search.balanced import balanced
from moetuner.solver.search.cross_validation import Choice, choose
from moetuner.solver.search.fanout import most_trials
from moetuner.solver.search.move_cost import Moving, Path, widened
from moetuner.solver.search.surrogate import link_prices, pair_prices, tokens_per_unit, visit_prices
from moetuner.solver.search.ties import Known, settled
from moetuner.solver.search.traffic import heuristic

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Caps on the imbalance of the sum under which traffic alone is searched: where time weighs both,
# the cap is what tells how much of one buys how much of the other.
CAPS = (1.02, 1.08, 1.2, 1.5, float("inf"))
# Turns of all layers, each given its neighbours.
ROUNDS = 3
# Trials for a slot: of few windows more search brings more, and is cheap; one or two are soon
# level. Of many, the work is bounded: trials times windows, which are looked at LANES at a time.
FEW, WORK, LANES = {range(1, 4): 1000, range(4, 17): 10_000}, 60_000, 16
# Trials of a layer: the least, also as work, and the most.
LEAST, LEAST_WORK, MOST = 20_000, 1_600_000, 1_500_000
# Where neighbouring layers count: trials for a slot, and the least of a layer.
LINKED, LEAST_LINKED = 600, 60_000
# Share of a time limit for choosing how to search, and the seconds below which nothing is tried.
LEARN_SHARE, LEARN_LEAST = 0.25, 0.1
# Share of what is left for the searches for traffic.
SEARCH_SHARE = 0.6
# Layers of few slots are searched several times: they have valleys that one descent does not leave.
SMALL, RESTARTS = 64, 8
# Times that risk and groups are weighed anew, and when something is known of the weights.
REWEIGHTINGS, AGAIN = 4, 2
# Among times that are as good traffic decides. To have some to choose from, layers are annealed
# once more with traffic this many times as dear.
DEAR = 4.0
# Seconds that trying every placement of a small problem may take.
ENOUGH = 2.0


def layers(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Solve for balance or time, or for traffic where devices or slots are not all alike."""
    return Search(problem, seed).run(limits)


def trials_of(slots: int, windows: int | None) -> int:
    """Say how many trials a layer of slots gets in windows, or (None) where neighbours count."""
    if windows is None:
        return min(max(LINKED * slots, LEAST_LINKED), MOST)
    lanes = -(-windows // LANES) * LANES
    per_slot = next((trials for some, trials in FEW.items() if windows in some), WORK // lanes)
    return min(max(per_slot * slots, LEAST, LEAST_WORK // lanes), MOST)


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
        fill_slots=False,
    )
    return heuristic(alike, seed=seed, limits=limits)


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
        self.weight, self.choice = windows.weight, Choice()
        self.emphasis: list[Floats] = []
        self.details: dict[str, Any] = {}
        self.caps = caps_of(problem)
        # What traffic costs, as a multiple of what it takes.
        self.dear = 1.0

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
        # Whatever becomes of the search, it is not behind what engines get from ``balance``.
        made = self._layers().construct(copies=problem.may_copy, threads=limits.threads)
        starts = [self.full(slots) for slots in (made, balanced(problem))]
        slots = min(starts, key=self.rank)
        start = None if start is None else self.full(start)
        if limits.time_limit == 0:
            return self.candidate(slots, "time_limit")
        again = AGAIN if self.emphasis else REWEIGHTINGS
        turns = 1 if problem.windows.is_mean else again
        try:
            if not self.emphasis:
                self.learn(clock.within(LEARN_SHARE))
        except KeyboardInterrupt:
            return self.candidate(slots if start is None else start, "interrupted")
        starts = starts if start is None else [start, *starts]
        traffic: list[Slots] = []
        interrupted = False
        if self.links is not None and moving is None:
            caps = sorted({min(cap, problem.max_imbalance or cap) for cap in CAPS})
            for number, cap in enumerate(caps):
                share = SEARCH_SHARE / (len(caps) - number)
                found = _for_traffic(problem, cap, self.seed, clock.within(share))
                wider = self.allowed(found.slots)
                traffic.extend([] if wider is None else [wider])
                interrupted = found.status == "interrupted"
                if interrupted:
                    break
        # What peers could have found: no answer is behind these, be it by a hair.
        known = [self.known(slots) for slots in starts]
        limit = min(each.rank for each in known)
        known += [self.known(slots) for slots in traffic]
        best = min(known, key=lambda each: each.rank).slots
        narrow = self.narrow() if moving is None else None
        prices = [1.0] * turns + [DEAR] * (moving is None and self.prices_visits)
        parts = len(prices) if narrow is None else 2 * len(prices)
        for turn, self.dear in enumerate(prices):
            if interrupted:
                break
            improved, interrupted = self.improve(best, clock.within(1 / (parts - turn)))
            self.look_at(improved)
            known.append(self.known(improved))
            best = min(known, key=lambda each: each.rank).slots
        self.dear = 1.0
        if narrow is not None and not interrupted:
            found = narrow.run(clock.within())
            interrupted = found.status == "interrupted"
            wider = self.allowed(found.slots)
            known.extend([] if wider is None else [self.known(wider)])
            best = min(known, key=lambda each: each.rank).slots
        if problem.goal == "time" and moving is None:
            best = settled(problem, known, limit)
        if interrupted:
            return self.candidate(best, "interrupted")
        return self.completed(best, clock.within())

    @property
    def prices_visits(self) -> bool:
        """Whether a time is searched for in which visits have a price, or pairs for them."""
        problem = self.problem
        dispatched = problem.goal == "time" and problem.regime == "dispatch"
        return dispatched and problem.devices > 1 and (problem.counts_visits or problem.has_pairs)

    def narrow(self) -> Search | None:
        """Search without slots to spare: reading a copy's weights may cost more than it saves."""
        problem, model = self.problem, self.problem.cost_model
        fewest = -(-problem.experts // problem.devices)
        wide = problem.may_copy and not problem.fill_slots and (problem.rooms > fewest).any()
        assert model is not None
        if problem.goal != "time" or model.expert_us == 0 or self.links is not None or not wide:
            return None
        try:
            alike = replace(problem, slots_per_device=fewest, extra_slots=None)
        except ValueError:  # pins that need more
            return None
        search = Search(alike, self.seed)
        search.choice, search.emphasis = self.choice, list(self.emphasis)
        search.weight = self.weight
        return search

    def completed(self, slots: Slots, limits: Limits) -> Candidate:
        """Answer with slots, or the best there are if there are few and windows do not add up."""
        problem = self.problem
        excess, value = self.rank(slots)
        adds_up = problem.goal == "balance" and problem.windows.is_mean and not excess
        short = limits.time_limit is not None and limits.time_limit < ENOUGH
        if problem.goal == "traffic" or adds_up or short:
            return self.candidate(slots, "feasible")
        known = np.inf if excess else value
        found = enumerated(problem, known, caps=self.caps, moving=self.moving)
        if found is None:
            return self.candidate(slots, "feasible")
        answer = self.candidate(found if len(found) else slots, "optimal")
        if self.moving is not None:
            # The best with its price: without, others may be better.
            return replace(answer, status="feasible")
        return replace(answer, bound=self.value(answer.slots), bound_source="every placement")

    def learn(self, limits: Limits) -> None:
        """Choose what generalises to traffic that nobody has seen, by cross-validation."""
        windows = self.problem.windows
        self.emphasis = [np.ones(len(windows.weight))]
        if limits.time_limit is not None and limits.time_limit < LEARN_LEAST:
            reason = {"chosen": "maximum", "reason": "too little time to try others"}
            self.choice = replace(self.choice, details=reason)
            self.details["unseen"] = reason
            return
        self.choice = choose(
            windows.load,
            windows.weight,
            windows.group,
            self.problem.rooms,
            self.problem.topology.node_of_device,
            self.time,
            nearest=self.problem.split == "nearest",
            seed=self.seed,
            threads=limits.threads,
            time_limit=limits.time_limit,
        )
        self.details["unseen"] = self.choice.details

    def rank(self, slots: Slots) -> tuple[float, float]:
        """By how much caps are exceeded, in all layers, and the value; lower is better."""
        excess = excess_of(self.problem, slots)
        return float(excess.sum()), self.value(slots)

    def known(self, slots: Slots) -> Known:
        """Return slots with their rank."""
        return Known(*self.rank(slots), slots)

    def value(self, slots: Slots) -> float:
        """Objective of slots, and what moving there costs."""
        placement = self._placement(slots)
        value, moving = self.problem.value(placement), self.moving
        return value if moving is None else value + moving.price * moving.moved(placement)

    def improve(self, slots: Slots, limits: Limits) -> tuple[Slots, bool]:
        """Anneal every layer, and say whether it was interrupted."""
        trials, slots_of_layer = limits.iterations, int(self.problem.rooms.sum(axis=1).max())
        if trials is None:
            windows = None if self.links is not None else len(self.problem.windows.load)
            trials = trials_of(slots_of_layer, windows)
            sets = self.problem.statistics.sets
            if self.problem.counts_visits and self.problem.goal != "balance" and sets is not None:
                trials = min(trials, most_trials(sets))

        def report(seconds: float, _: int | None) -> None:
            if limits.progress is not None:
                limits.progress(Progress(seconds, "layers"))

        links = None if self.links is None else link_prices(self.problem, self._tokens_per_unit())
        return self._layers().place(
            np.ascontiguousarray(slots),
            trials=trials,
            restarts=RESTARTS if slots_of_layer <= SMALL else 1,
            copies=self.problem.may_copy,
            empties=not self.problem.fill_slots,
            rounds=ROUNDS,
            transitions=self.links,
            link_cost=links,
            seed=self.seed,
            time_limit=limits.time_limit,
            threads=limits.threads,
            progress=report if limits.progress is not None else None,
        )

    def descend(
        self, start: Slots, initial: Placement, most: float, limits: Limits
    ) -> tuple[Path, bool]:
        """Go down from slots by the steps that gain most for a move, and say if interrupted."""
        problem, unit = self.problem, self._tokens_per_unit()
        places, experts, figures, interrupted = self._layers().descend(
            np.ascontiguousarray(start),
            np.ascontiguousarray(initial.held.transpose(0, 2, 1)),
            most=int(most) if most < problem.rooms.sum() else None,
            copies=problem.may_copy,
            transitions=self.links,
            link_cost=None if self.links is None else link_prices(problem, unit),
            time_limit=limits.time_limit,
            threads=limits.threads,
        )
        moved = initial.diff(self._placement(start)).experts_moved
        begin = [[moved, excess_of(problem, start).sum(), 0.0]]
        brought, excess, change = np.concatenate([begin, figures]).T
        path = Path(start, places, experts, brought.astype(np.int64), excess, change / unit)
        return path, interrupted

    def look_at(self, slots: Slots) -> None:
        """Give the windows that a risk or the worst group is made of more weight, next time."""
        problem, windows = self.problem, self.problem.windows
        if windows.is_mean:
            return
        shares = objective.shares(problem, self._placement(slots)).sum(axis=1)
        self.emphasis.append(windows.emphasis(shares, objective.measure(problem)))
        self.weight = windows.weight * np.mean(self.emphasis, axis=0)

    def allowed(self, slots: Slots) -> Slots | None:
        """Slots [L,D,S] of one copy each, in the problem's rooms; None where they break a rule."""
        problem = self.problem
        if ((slots != EMPTY).sum(axis=2) > problem.rooms).any():
            return None
        wide = self.full(widened(problem, slots))
        return None if problem.rules.broken(self._placement(wide)) else wide

    def full(self, slots: Slots) -> Slots:
        """Fill slots that must not be empty."""
        return self.problem.filled(slots, None if self.moving is None else self.moving.initial)

    def candidate(self, slots: Slots, status: Status) -> Candidate:
        """Answer with slots."""
        details = {**self.details, **exceeded(self.problem, slots)}
        return Candidate(slots, status=status, details=details)

    def _placement(self, slots: Slots) -> Placement:
        return Placement(slots, num_experts=self.problem.experts)

    def _tokens_per_unit(self) -> float:
        return tokens_per_unit(self.problem, self.problem.windows.load, self.weight)

    def _layers(self) -> _core.Layers:
        problem, choice = self.problem, self.choice
        unit, moving, rules = self._tokens_per_unit(), self.moving, problem.rules
        layers = _core.Layers(
            np.ascontiguousarray(problem.windows.load),
            self.weight,
            problem.rooms,
            problem.topology.node_of_device.tolist(),
            self.time.tolist(),
            nearest=problem.split == "nearest",
            norm=choice.setting.norm,
            noise=choice.setting.noise,
            mixed=choice.setting.mixed,
        )
        layers.rule(forbidden=rules.forbidden, pinned=rules.pinned)
        if self.caps is not None:
            layers.limit((self.caps * self.slowest).tolist(), problem.load.astype(np.float64))
        if moving is not None:
            layers.hold(np.ascontiguousarray(moving.prices.transpose(0, 2, 1) * unit))
        if visits := visit_prices(problem, unit * self.dear):
            layers.price_visits(**visits)
        if pairs := pair_prices(problem, unit * self.dear):
            layers.price_pairs(**pairs)
        return layers
