"""Search layers for balance and time: windows, copies, unequal devices and links.

Every layer is annealed on its part of the objective. Where transitions join the layers, they are
annealed in turns from the answer of a search for traffic: one changes while its neighbours stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.problem.objective import Objective
from moetuner.problem.pins import NO_RULES
from moetuner.solver import effort
from moetuner.solver.arrays import Floats, Slots
from moetuner.solver.bounds.pairs import is_of_pairs
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, Moves, Role, Run, Stage
from moetuner.solver.stages.chain import search_traffic
from moetuner.solver.stages.floor import balance_windows, quick_trials, windows_alone
from moetuner.solver.stages.memo import make_key
from moetuner.solver.stages.visits import is_of_visits, units_of_trial
from moetuner.solver.terms import (
    Links,
    core_layers,
    make_links,
    make_site,
    make_terms,
    tokens_per_unit,
)
from moetuner.solver.unseen import MEAN_WEIGHT, SearchSetting, choose_search_setting


class LayerModel:
    """The layers of a problem as the core's search sees them, with weights of windows.

    ``parts`` is the number of searches that share the work of one. They begin at a ``heat``, or by
    default as suits the layers. Without links, only ``chosen`` layers are searched, if not None.
    If ``of_slowest``, that is by the slowest devices, not by the norm that stands for them.
    """

    def __init__(
        self, run: Run, parts: int = 1, *, heat: str | None = None, of_slowest: bool = False
    ) -> None:
        self.parts, self.heat, self.slots_of_layer = parts, heat, run.slots_of_layer
        self.chosen: list[int] | None = None
        self.is_large = is_large(run)
        self.problem, self.seed, self.objective = run.problem, run.seed, run.objective
        self.windows = run.objective.windows
        self.weight, self.setting = self.windows.weight, SearchSetting()
        self.weights: list[Floats] = [np.ones(len(self.windows))] if of_slowest else []

    @property
    def unit(self) -> float:
        """Weighted tokens in one unit of the objective."""
        return tokens_per_unit(self.problem, self.windows.load, self.weight)

    def core(self, moves: Moves | None = None) -> tuple[_core.Layers, Links | None]:
        """Build the core's layers, and the links that join them."""
        problem = self.problem
        terms = make_terms(
            problem, self.unit, copy_costs=None if moves is None else moves.copy_costs
        )
        site = make_site(problem, caps=problem.caps.in_slowest_time)
        layers = core_layers(
            self.windows.load, self.weight, site, setting=self.setting, terms=terms
        )
        return layers, make_links(problem, self.unit)

    def balances_windows(self, moves: Moves | None) -> bool:
        """Return whether to balance windows alone: many windows are all that counts.

        With few slots or windows the search of all terms finds more, and near an answer.
        """
        problem = self.problem
        if self.heat is not None:
            return False
        even = not problem.serving.rule.by_home or not problem.may_copy
        return bool(windows_alone(problem, moves) and even and self.is_large)

    def reweight(self, slots: Slots) -> None:
        """Weigh windows for the next turn: more, the more they add to a risk or the worst group."""
        windows = self.windows
        if windows.is_mean:
            return
        placement = Placement(slots, num_experts=self.problem.num_experts)
        cost = self.objective.window_cost(placement).sum(axis=1)
        self.weights.append(windows.find_deciding_weights(cost, self.objective.reference))
        self.weight = windows.weight * np.mean(self.weights, axis=0)

    def improve(self, run: Run, slots: Slots, budget: Budget, turns: int) -> tuple[Slots, bool]:
        """Return slots [L,D,S] after one of the ``turns`` of annealing, and if interrupted."""
        if self.balances_windows(run.moves):
            # By the windows and by their mean, which stands for traffic of all kinds at once.
            trials = budget.iterations
            if trials is None:
                batches = effort.count_batches(len(self.windows) + 1)
                trials = budget.work.balancing * self.slots_of_layer // (batches * self.parts)
            return balance_windows(run, budget, self.weight, trials, mean_weight=MEAN_WEIGHT)
        problem = self.problem
        layers, links = self.core(run.moves)
        heat, restarts = self.heat, effort.RESTARTS if has_few_slots(run) else 1
        if heat is not None:
            restarts = 1
        elif self.is_large and links is None and run.moves is None:
            heat = "cool"
        return layers.place(
            np.ascontiguousarray(slots),
            trials=self._trials(run, budget, turns * restarts, layers.has_tokens_alone),
            restarts=self._fewer(restarts, budget),
            empties=not problem.fill_slots,
            rounds=effort.ROUNDS,
            heat=heat,
            chosen=self.chosen,
            links=links,
            seed=self.seed,
            time_limit=budget.seconds_left,
            threads=budget.threads,
            progress=budget.phase("layers"),
        )

    def _fewer(self, restarts: int, budget: Budget) -> int:
        """Return how many of so many searches of a layer are made: fewer where each takes long."""
        is_single = self.objective.sets is not None and not self.problem.may_copy
        if budget.iterations is not None or not self.windows.is_mean:
            return restarts
        work = budget.work
        return min(restarts, work.single_restarts if is_single else work.restarts)

    def _trials(self, run: Run, budget: Budget, searches: int, has_tokens_alone: bool) -> int:
        """Return the trials of a layer in each of so many searches."""
        if budget.iterations is not None:
            return budget.iterations
        linked = self.objective.transitions is not None
        searches *= self.parts * (2 * effort.ROUNDS if linked else 1)
        work = searches * units_of_trial(run, has_tokens_alone=has_tokens_alone)
        trials = effort.most_trials(self.slots_of_layer, len(self.windows))
        if self.heat is not None:
            # One of several searches that go on from each other.
            trials = max(trials // 2, 1)
        return int(min(trials, budget.work.layer_work / work))


def is_of_layers(run: Run) -> bool:
    """Return whether neither the search of the chain nor that of visits covers the problem."""
    return not is_of_pairs(run) and not is_of_visits(run)


def has_few_slots(run: Run) -> bool:
    """Return whether layers are small enough for searches whose work grows faster than slots."""
    return run.slots_of_layer <= effort.FEW_SLOTS


def trials_of_slot(run: Run) -> float:
    """Return the trials that the work of searching all layers leaves each of their slots."""
    return run.budget.work.layer_work / units_of_trial(run) / run.slots_of_layer


def has_few_trials(run: Run) -> bool:
    """Return whether layers are so many that a search of each would end where it begins."""
    return run.budget.iterations is None and trials_of_slot(run) < effort.LEAST_TRIALS


def has_many_trials(run: Run) -> bool:
    """Return whether layers are so small that several long searches of each take little time."""
    is_counted = run.budget.iterations is not None
    return has_few_slots(run) and not is_counted and trials_of_slot(run) >= effort.MANY_TRIALS


def is_large(run: Run) -> bool:
    """Return whether layers have many slots and many windows.

    Searches stay near their starts there: as many trials from a higher temperature end worse.
    """
    slots = run.problem.capacity.sum(axis=1).min()
    return bool(slots > effort.FEW_SLOTS and len(run.objective.windows) >= effort.MANY_WINDOWS)


def charges_copies(run: Run) -> bool:
    """Return whether a copy costs something, whatever it serves.

    Its weights are read, and tokens visit more devices. Where loads are all that is known of
    tokens, large layers are searched by loads alone.
    """
    knows_visits = run.objective.knows_visits
    return run.problem.aim.predicts_time and (knows_visits or has_few_slots(run))


def is_searched_anew(run: Run) -> bool:
    """Return whether layers are searched from any start: no placement runs."""
    return is_of_layers(run) and run.moves is None


def _construct(run: Run, budget: Budget) -> None:
    """Offer starts that take milliseconds: balanced on the sum of windows, and on each window."""
    memo, key = run.problem.statistics.memo, make_key(run.problem, run.seed, budget, "starts")
    known = memo.get(key) if key is not None else None
    starts = []
    for start in _find_starts(run, budget) if known is None else known:
        slots, by, role, interrupted = start
        run.offer(slots, by, role=role, is_start=True, interrupted=interrupted)
        starts.append(start)
    if key is not None:
        memo[key] = starts


def _find_starts(run: Run, budget: Budget) -> Iterator[tuple[Slots, str, Role, bool]]:
    """Yield starts, by whom they are, their role, and if they were interrupted."""
    layers, _ = LayerModel(run).core()
    yield layers.construct(threads=budget.threads), "construct", Role.FOUND, False
    if not run.problem.aim.costs_loads:
        return
    windows = run.objective.windows
    if run.objective.is_of_windows:
        longer = effort.start_trials(run.slots_of_layer, len(windows), effort.BALANCING_START)
        lengths = [quick_trials(run, budget), longer]
    else:
        trials = effort.start_trials(run.slots_of_layer, len(windows), effort.SPREAD_TRIALS)
        lengths = [budget.iterations or trials]
    role = Role.FULL if run.problem.may_copy else Role.FOUND
    for trials in lengths:
        if not budget.is_over():
            slots, interrupted = balance_windows(run, budget, windows.weight, trials)
            yield slots, "windows", role, interrupted


def are_joined(run: Run) -> bool:
    """Return whether layers cannot be mixed one by one.

    Transitions join them, or the goal is traffic, which has no costs by window and layer.
    """
    return run.objective.joins_layers or not run.problem.aim.costs_loads


def adds_up_over_layers(run: Run) -> bool:
    """Return whether layers of several placements can be combined: the objective is their sum."""
    return run.problem.windows.is_mean and not are_joined(run)


def cost_of_layers(objective: Objective, placement: Placement) -> Floats:
    """Compute the part [L] that every layer adds to an objective that is their sum."""
    costs = objective.compute_values(objective.window_cost(placement).T)
    by_layer: Floats = costs * objective.layer_factors(placement)
    return by_layer


def _combine(run: Run, _: Budget) -> None:
    """Offer the combination of the best contents of every layer in all incumbents."""
    pool = [incumbent.slots for incumbent in run.incumbents if incumbent.excess == 0]
    if len(pool) > 1:
        experts, objective = run.problem.num_experts, run.objective
        placements = [Placement(slots, num_experts=experts) for slots in pool]
        costs = [cost_of_layers(objective, placement) for placement in placements]
        layers = np.arange(run.problem.layers)
        slots = np.stack(pool)[np.argmin(costs, axis=0), layers]
        run.offer(slots, "combined", is_start=True)


def _has_transitions(run: Run) -> bool:
    """Return whether no placement runs, and the objective counts transitions."""
    return is_searched_anew(run) and run.objective.transitions is not None


def _chain_under_caps(run: Run, budget: Budget) -> None:
    """Search traffic alone, with single copies on equal devices, under several load caps."""
    problem = run.problem
    caps = sorted({min(cap, problem.max_imbalance or cap) for cap in budget.work.traffic_caps})
    for number, cap in enumerate(caps):
        caps_left = len(caps) - number
        cap_budget = budget.within(1 / caps_left, keep=caps_left * run.judge_seconds).muted()
        if cap_budget.time_limit == 0:
            return
        traffic = _traffic_problem(problem, cap)
        search_traffic(run, traffic, cap_budget, lambda slots: pad_slots(slots, problem.capacity))


def _traffic_problem(problem: Problem, cap: float) -> Problem:
    """Return the problem of traffic under a cap, with single copies on equal devices."""
    return replace(
        problem,
        topology=replace(problem.topology, speed=None, slots_per_device=None),
        slots_per_device=problem.single_slots,
        extra_slots=None,
        max_imbalance=cap,
        objective="traffic",
        **NO_RULES,
        fill_slots=False,
    )


def anneal(
    run: Run, budget: Budget, model: LayerModel | None = None, *, start: Slots | None = None
) -> None:
    """Anneal all layers, in turns that weigh the windows again.

    Every turn begins with the best placement, or with ``start`` [L,D,S]. A model that has weights
    of windows already keeps them.
    """
    model, turns = LayerModel(run) if model is None else model, 1
    if not run.problem.windows.is_mean:
        turns = effort.REWEIGHTINGS
    if not model.weights:
        windows = model.windows
        model.weights = [np.ones(len(windows))]
        large = model.balances_windows(run.moves)
        model.setting = choose_search_setting(windows.load, windows.weight, large=large)
    run.details = replace(run.details, unseen=model.setting.details)
    for turn in range(turns):
        turns_left = turns - turn
        turn_budget = budget.within(1 / turns_left, keep=turns_left * run.judge_seconds)
        if turn_budget.time_limit == 0:
            run.cut = run.cut or not turn
            return
        slots, interrupted = model.improve(
            run, run.best.slots if start is None else start, turn_budget, turns
        )
        model.reweight(slots)
        run.offer(slots, "layers", interrupted=interrupted)


def anneal_where_it_gains(run: Run, budget: Budget, model: LayerModel) -> None:
    """Anneal the layers that cost most, and the others only if any of those gains.

    A layer has its own random numbers and trials, so its answer is the same either way.
    """
    has_many = run.problem.layers >= effort.MANY_LAYERS and adds_up_over_layers(run)
    # Under a limit, layers share what is left of it, so they are searched at once.
    if has_many and budget.time_limit is None and not model.balances_windows(run.moves):
        costs = _cost_of(run, run.best.slots)
        order = np.argsort(-costs, kind="stable").tolist()
        model.chosen = order[: effort.FIRST_LAYERS]
        anneal(run, budget, model)
        if (_cost_of(run, run.incumbents[-1].slots) >= costs * (1 - ROUNDING)).all():
            return
        model.chosen = order[effort.FIRST_LAYERS :]
    anneal(run, budget, model)


def _cost_of(run: Run, slots: Slots) -> Floats:
    """Compute the part [L] that every layer adds to the objective of a search."""
    return cost_of_layers(run.objective, Placement(slots, num_experts=run.problem.num_experts))


CONSTRUCT = Stage(_construct, applies=is_searched_anew)
CHAIN_UNDER_CAPS = Stage(
    _chain_under_caps, applies=_has_transitions, share=lambda _: effort.SEARCH_SHARE
)


def _is_searched_hot(run: Run) -> bool:
    """Return whether a search that leaves its start may improve on it.

    It does not where large layers have to survive a loss and loads are all that counts: it loses
    the spread of partners, and does not find it again in twenty times the trials.
    """
    problem = run.problem
    has_loads_alone = run.objective.is_of_loads and not problem.caps.exist
    is_spread = problem.survive is not None and is_searched_anew(run) and not has_few_slots(run)
    return is_of_layers(run) and not (is_spread and has_loads_alone)


ANNEAL = Stage(anneal, applies=_is_searched_hot)
COMBINE = Stage(_combine, applies=lambda run: is_searched_anew(run) and adds_up_over_layers(run))
