"""Balance and time: windows, copies, devices that differ, links. All layers by one search.

Every layer's contents are annealed on all that the problem says of it; where transitions join the
layers, in turns, each given its neighbours, from a start that the search for traffic found.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import EMPTY, Placement, moves_from
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.problem.windows import Windows
from moetuner.solver import effort
from moetuner.solver.result import (
    Candidate,
    Clock,
    Details,
    Limits,
    MoveCost,
    Progress,
    Status,
    UnseenDetails,
)
from moetuner.solver.search.balanced import balanced, levelled_on
from moetuner.solver.search.fanout import most_trials
from moetuner.solver.search.level import full_trials
from moetuner.solver.search.move_cost import Path, widened
from moetuner.solver.search.surrogate import link_prices, pair_prices, tokens_per_unit, visit_prices
from moetuner.solver.search.ties import TIE, Known, settled
from moetuner.solver.search.traffic import search_traffic
from moetuner.solver.search.unseen import MIXED, SearchSetting, setting_for

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Among times that are as good traffic decides. To have some to choose from, layers are annealed
# once more with traffic this many times as dear.
DEAR = 4.0


def _rank(known: Known) -> tuple[float, float]:
    return known.rank


def layers(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Solve for balance or time, or for traffic where devices or slots are not all alike."""
    return LayerSearch(problem, seed).run(limits)


def trials_of(slots: int, windows: int | None) -> int:
    """Return the trials of a layer of slots in windows, or (None) where neighbours count."""
    if windows is None:
        return min(max(effort.LINKED_TRIALS * slots, effort.LEAST_LINKED), effort.MOST_TRIALS)
    lanes = -(-windows // effort.LANES) * effort.LANES
    per_slot = next(
        (trials for some, trials in effort.TRIALS_OF_FEW.items() if windows in some),
        effort.SLOT_WORK // lanes,
    )
    return min(
        max(per_slot * slots, effort.LEAST_TRIALS, effort.LEAST_WORK // lanes), effort.MOST_TRIALS
    )


def _for_traffic(problem: Problem, cap: float, seed: int, limits: Limits) -> Candidate:
    """Search with one copy of each expert on devices that are alike, for traffic under a cap."""
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
    return search_traffic(alike, seed=seed, limits=limits.muted())


class LayerSearch:
    """A problem as the core's search of layers sees it.

    What is learned of its windows is kept from one run to the next.
    """

    def __init__(self, problem: Problem, seed: int, windows: Windows | None = None) -> None:
        self.problem, self.seed = problem, seed
        # Windows that the search sees, and what it makes small: of many windows some stand for all.
        self.windows = problem.windows.searched if windows is None else windows
        self.objective = Objective(problem, self.windows)
        self.moving: MoveCost | None = None
        topology = problem.topology
        self.slowest = topology.speed_of_device.min()
        self.time = topology.time_of_device
        self.links = self.objective.transitions
        self.weight, self.setting = self.windows.weight, SearchSetting()
        self.unseen: UnseenDetails | None = None
        self.reweighted: list[Floats] = []
        self.caps = problem.caps.over_speed
        # Traffic costs this multiple of what it takes.
        self.dear = 1.0

    def run(
        self, limits: Limits, *, start: Slots | None = None, moving: MoveCost | None = None
    ) -> Candidate:
        """Search within limits, from slots [L,D,S] to improve on besides the search's own starts.

        Where moving has a price, ``start`` is the only start.
        """
        self.moving = moving
        # What was found so far, in the order in which it was.
        known: list[Known] = []
        try:
            return self._run(Clock(limits), start, known)
        except KeyboardInterrupt:  # outside of the core, which ends with the best it has
            self.dear = 1.0
            if known:
                best = min(known, key=lambda each: each.rank).slots
            else:
                best = self.full(balanced(self.problem) if start is None else start)
            return self.candidate(best, "interrupted")

    def _run(self, clock: Clock, start: Slots | None, known: list[Known]) -> Candidate:
        problem, limits, moving = self.problem, clock.limits, self.moving
        starts = [] if start is None else [self.full(start)]
        if moving is None or start is None:
            # Whatever becomes of the search, it is not behind what engines get from ``balance``.
            floor = balanced(problem)
            if not clock.is_over():
                made = self._layers().construct(copies=problem.may_copy, threads=limits.threads)
                starts.append(self.full(made))
            starts.append(self.full(floor))
        if len(starts) == 1 and clock.is_over():
            return self.candidate(starts[0], "time_limit")
        begin = clock.gone
        # The one that no answer is behind comes first, the search's own only if there is time.
        for slots in reversed(starts):
            given = start is not None and slots is starts[0]
            if given or not known or not clock.is_over():
                known.insert(0, self.known(slots))
        # What peers could have found: no answer is behind these, be it by a hair.
        limit = min(each.rank for each in known)
        # Seconds that judging an answer takes, which are kept back for those to come.
        judging = (clock.gone - begin) / len(known)
        whole = clock
        if self.windows is not problem.windows and not clock.is_over():
            # The start and the best are judged on all windows in the end, others if time is left.
            begin = clock.gone
            self.rank_of_all(min(known, key=lambda each: each.rank).slots)
            clock = Clock(clock.within(keep=2 * (clock.gone - begin)))
        again = effort.REWEIGHTINGS_AGAIN if self.reweighted else effort.REWEIGHTINGS
        turns = 1 if problem.windows.is_mean else again
        if not self.reweighted:
            self.learn()
        if clock.is_over():
            best = min(known, key=lambda each: each.rank).slots
            return self.candidate(best, "time_limit")
        traffic: list[Slots] = []
        interrupted = False
        if self.links is not None and moving is None:
            caps = sorted({min(cap, problem.max_imbalance or cap) for cap in effort.TRAFFIC_CAPS})
            for number, cap in enumerate(caps):
                share = effort.TRAFFIC_SHARE / (len(caps) - number)
                within = clock.within(share, keep=(len(caps) + 1) * judging)
                if within.time_limit == 0:
                    break
                found = _for_traffic(problem, cap, self.seed, within)
                wider = self.allowed(found.slots)
                traffic.extend([] if wider is None else [wider])
                interrupted = found.status == "interrupted"
                if interrupted:
                    break
        for slots in traffic:
            if clock.is_over():
                break
            known.append(self.known(slots))
        best = min(known, key=lambda each: each.rank).slots
        self._tell(known, limits)
        prices = [1.0] * turns + [DEAR] * (moving is None and self.prices_visits)
        for turn, self.dear in enumerate(prices):
            left = len(prices) - turn
            within = clock.within(1 / left, keep=left * judging)
            if interrupted or within.time_limit == 0:
                break
            improved, interrupted = self.improve(best, within)
            self.reweight(improved)
            known.append(self.known(improved))
            self._tell(known, limits)
            best = min(known, key=lambda each: each.rank).slots
        self.dear = 1.0
        if problem.goal == "time" and moving is None and not clock.is_over():
            best = settled(problem, self.objective, known, limit)
        if self.windows is not problem.windows:
            best = self.judged(best, known, starts, whole)
        return self.candidate(best, "interrupted" if interrupted else "feasible")

    def judged(self, best: Slots, known: list[Known], starts: list[Slots], clock: Clock) -> Slots:
        """Return the best slots by all windows, where a search has seen some that stand for them.

        Out of the few that it likes best, and the start that no answer may be behind. What it
        chose stays where it is as good as the best by more than chance can tell.
        """
        floor = min(starts, key=self.rank)
        few = [floor, best, *(each.slots for each in sorted(known, key=_rank)[: effort.JUDGED])]
        ranks: dict[bytes, tuple[float, float]] = {}
        found = {slots.tobytes(): slots for slots in few}
        for key, slots in found.items():
            if not ranks or not clock.is_over():
                ranks[key] = self.rank_of_all(slots)
        first = min(ranks, key=ranks.__getitem__)
        excess, value = ranks[first]
        mine, least = ranks.get(best.tobytes()), ranks[floor.tobytes()]
        if mine is not None and mine <= min((excess, value * (1 + TIE)), least):
            return best
        return found[first]

    def _tell(self, known: list[Known], limits: Limits) -> None:
        """Tell of the best so far, if it keeps the caps; what moves has a price of its own.

        Nothing where it was not judged on all windows.
        """
        best = min(known, key=lambda each: each.rank)
        all_seen = self.windows is self.problem.windows
        if self.moving is None and not best.excess and all_seen:
            limits.tell("layers", best.value)

    @property
    def prices_visits(self) -> bool:
        """Whether a time is searched for in which visits have a price, or pairs for them."""
        problem = self.problem
        dispatched = problem.goal == "time" and problem.regime == "dispatch"
        return dispatched and problem.devices > 1 and self.objective.has_traffic

    def learn(self) -> None:
        """Choose what generalises to traffic that nobody has seen."""
        windows = self.windows
        self.reweighted = [np.ones(len(windows))]
        self.setting = setting_for(windows.load, windows.weight, large=self.levels)
        self.unseen = self.setting.details

    def rank(self, slots: Slots) -> tuple[float, float]:
        """Return by how much caps are exceeded, in all layers, and the value; lower is better."""
        excess = self.problem.caps.excess(self._placement(slots))
        return float(excess.sum()), self.value(slots)

    def rank_of_all(self, slots: Slots) -> tuple[float, float]:
        """Return ``rank`` by all windows, of which there may be more than the search sees."""
        excess = self.problem.caps.excess(self._placement(slots))
        return float(excess.sum()), self._worth(slots, Objective(self.problem))

    def known(self, slots: Slots) -> Known:
        """Return slots with their rank."""
        return Known(*self.rank(slots), slots)

    def value(self, slots: Slots) -> float:
        """Compute the objective of slots, and what moving there costs."""
        return self._worth(slots, self.objective)

    def _worth(self, slots: Slots, objective: Objective) -> float:
        value, moving = objective.value(self._placement(slots)), self.moving
        return value if moving is None else value + moving.price * moving.moved(slots)

    def improve(self, slots: Slots, limits: Limits) -> tuple[Slots, bool]:
        """Anneal every layer, and say whether it was interrupted."""
        if self.levels:
            return self.levelled(limits)
        clock = Clock(limits)
        trials, slots_of_layer = limits.iterations, int(self.problem.capacity.sum(axis=1).max())
        if trials is None:
            windows = None if self.links is not None else len(self.windows)
            trials = trials_of(slots_of_layer, windows)
            sets = self.objective.sets
            if sets is not None:
                trials = min(trials, most_trials(sets))

        def report(seconds: float, _: int | None) -> None:
            if limits.progress is not None:
                limits.progress(Progress(seconds, "layers"))

        links = None if self.links is None else link_prices(self.problem, self._tokens_per_unit())
        layers = self._layers()
        return layers.place(
            np.ascontiguousarray(slots),
            trials=trials,
            restarts=effort.RESTARTS if slots_of_layer <= effort.FEW_SLOTS else 1,
            copies=self.problem.may_copy,
            empties=not self.problem.fill_slots,
            rounds=effort.ROUNDS,
            transitions=self.links,
            link_cost=links,
            seed=self.seed,
            time_limit=clock.left,
            threads=limits.threads,
            progress=report if limits.progress is not None else None,
        )

    @property
    def levels(self) -> bool:
        """Whether windows alone count, of layers and windows so many that the quick search is best.

        Of few slots or windows the search of all terms finds more.
        """
        problem = self.problem
        windows_alone = problem.goal == "balance" and self.caps is None and self.moving is None
        even = problem.split != "nearest" or not problem.may_copy
        many = (
            problem.capacity.sum(axis=1).min() > effort.FEW_SLOTS
            and len(self.windows) >= effort.MANY_WINDOWS
        )
        return windows_alone and even and many

    def levelled(self, limits: Limits) -> tuple[Slots, bool]:
        """Level every layer on the windows and on their mean, for traffic of all kinds at once."""
        load = self.windows.load
        trials = limits.iterations
        if trials is None:
            trials = full_trials(int(self.problem.capacity.sum(axis=1).max()), len(load) + 1)
        slots, interrupted = levelled_on(
            self.problem,
            load,
            self.weight,
            trials,
            mixed=MIXED,
            seed=self.seed,
            limits=limits,
        )
        return self.full(slots), interrupted

    def descend(
        self, start: Slots, initial: Placement, most: float, limits: Limits
    ) -> tuple[Path, bool]:
        """Go down from slots by the steps that gain most for a move, and say if interrupted."""
        clock = Clock(limits)
        problem, unit = self.problem, self._tokens_per_unit()
        layers = self._layers()
        places, experts, figures, interrupted = layers.descend(
            np.ascontiguousarray(start),
            np.ascontiguousarray(initial.slots),
            most=int(most) if most < problem.capacity.sum() else None,
            copies=problem.may_copy,
            transitions=self.links,
            link_cost=None if self.links is None else link_prices(problem, unit),
            time_limit=clock.left,
            threads=limits.threads,
        )
        begin = [[moves_from(initial.held, start).sum(), self._excess(start).sum(), 0.0]]
        moved, excess, change = np.concatenate([begin, figures]).T
        path = Path(start, places, experts, moved.astype(np.int64), excess, change / unit)
        return path, interrupted

    def _excess(self, slots: Slots) -> Floats:
        return self.problem.caps.excess(self._placement(slots))

    def reweight(self, slots: Slots) -> None:
        """Give more weight to the windows that a risk or the worst group is made of, next time."""
        windows = self.windows
        if windows.is_mean:
            return
        cost = self.objective.window_cost(self._placement(slots)).sum(axis=1)
        self.reweighted.append(windows.reweight(cost, self.objective.reference))
        self.weight = windows.weight * np.mean(self.reweighted, axis=0)

    def allowed(self, slots: Slots) -> Slots | None:
        """Return slots [L,D,S] as wide as the problem's; None where they break a rule."""
        problem = self.problem
        if ((slots != EMPTY).sum(axis=2) > problem.capacity).any():
            return None
        wide = self.full(widened(problem, slots))
        return None if problem.rules.violations(self._placement(wide)) else wide

    def full(self, slots: Slots) -> Slots:
        """Fill slots that must not be empty."""
        return self.problem.filled(slots, None if self.moving is None else self.moving.initial)

    def candidate(self, slots: Slots, status: Status) -> Candidate:
        """Return slots as a candidate."""
        return Candidate(slots, status, details=Details(unseen=self.unseen))

    def _placement(self, slots: Slots) -> Placement:
        return Placement(slots, num_experts=self.problem.experts)

    def _tokens_per_unit(self) -> float:
        return tokens_per_unit(self.problem, self.windows.load, self.weight)

    def _layers(self) -> _core.Layers:
        problem, setting = self.problem, self.setting
        unit, moving, rules = self._tokens_per_unit(), self.moving, problem.rules
        layers = _core.Layers(
            np.ascontiguousarray(self.windows.load),
            self.weight,
            problem.capacity,
            problem.topology.node_of_device.tolist(),
            self.time.tolist(),
            nearest=problem.split == "nearest",
            norm=setting.norm,
            noise=setting.noise,
            mixed=setting.mixed,
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
