"""The floor: load balanced under the rules. No answer of a search is worse than it."""

from __future__ import annotations

import numpy as np

from moetuner import _core
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.arrays import Floats, Slots
from moetuner.solver.budget import Budget
from moetuner.solver.run import Moves, Role, Run, Stage
from moetuner.solver.terms import Terms, core_layers, loss_costs, make_site
from moetuner.solver.unseen import NOISE, NORM, SearchSetting, choose_search_setting


def balanced(problem: Problem, *, trials: int = effort.PATIENT) -> Slots:
    """Return slots [L,D,S] that keep all rules, with the load balanced as ``balance`` does."""
    return _core.replicate_experts(
        problem.load.astype(np.float64),
        problem.capacity,
        problem.topology.time_of_device,
        trials=trials,
        rules=problem.core_rules(),
    )


def balance_windows(
    run: Run, budget: Budget, weight: Floats, trials: int, *, mean_weight: float = 0.0
) -> tuple[Slots, bool]:
    """Return slots [L,D,S] that balance windows of weights [W], and if interrupted."""
    problem, load = run.problem, run.objective.windows.load
    setting = SearchSetting(NORM, NOISE, mean_weight)
    if problem.survive is not None:
        # The norm over losses suffices: in one window the slowest device itself is minimised.
        setting = choose_search_setting(load, weight, large=mean_weight > 0)
    terms, site = Terms(losses=loss_costs(problem)), make_site(problem, nearest=False)
    layers = core_layers(load, weight, site, setting=setting, terms=terms)
    start = layers.construct(windows=True, threads=budget.threads)
    return search_quickly(run, budget, layers, start, trials)


def search_quickly(
    run: Run, budget: Budget, layers: _core.Layers, start: Slots, trials: int
) -> tuple[Slots, bool]:
    """Return slots [L,D,S] after a quick search from a start, and if interrupted."""
    return layers.place(
        start,
        trials=trials,
        empties=False,
        quick=True,
        seed=run.seed,
        time_limit=budget.seconds_left,
        threads=budget.threads,
        progress=budget.phase("layers"),
    )


def _balance_windows(run: Run, budget: Budget) -> None:
    """Offer windows balanced within milliseconds, as the plugins do, by loads alone."""
    weight = run.objective.windows.weight
    slots, interrupted = balance_windows(run, budget, weight, quick_trials(run, budget))
    run.offer(slots, "layers", interrupted=interrupted)


def quick_trials(run: Run, budget: Budget) -> int:
    """Return the trials of a layer in the quick search, which takes milliseconds."""
    if budget.iterations is not None:
        return budget.iterations
    return effort.quick_trials(run.slots_of_layer, len(run.objective.windows))


def _may_be_behind(run: Run) -> bool:
    """Return whether balanced windows may be worse than the floor by the problem's objective.

    Where the windows are all that counts, the core has compared them with a packing already.
    """
    problem = run.problem
    alike = problem.serving.rule.is_even and problem.topology.has_equal_devices
    return not (alike and problem.windows.is_mean and windows_alone(problem, None))


def _floor(run: Run, _: Budget) -> None:
    run.offer(balanced(run.problem), "balance", role=Role.FLOOR, is_start=True)


def windows_alone(problem: Problem, moves: Moves | None) -> bool:
    """Return whether windows alone count: the goal is balance, without caps or prices of moves."""
    return not (problem.aim.costs_traffic or problem.caps.exist or moves is not None)


FLOOR = Stage(_floor)
BALANCE_WINDOWS = Stage(_balance_windows)
FLOOR_OF_WINDOWS = Stage(FLOOR.run, applies=_may_be_behind, least=lambda _: -1.0)
