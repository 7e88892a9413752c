"""Annealing of layers: for balance first, by the whole objective, and by the slowest devices."""

from __future__ import annotations

from dataclasses import replace

from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.run import Role, Run, Stage
from moetuner.solver.stages.copies import has_costly_copies, has_costly_fillers, is_of_loads
from moetuner.solver.stages.descent import SETTLE
from moetuner.solver.stages.floor import FLOOR
from moetuner.solver.stages.layers import (
    ANNEAL,
    COMBINE,
    CONSTRUCT,
    LayerModel,
    adds_up_over_layers,
    anneal,
    anneal_where_it_gains,
    has_few_slots,
    has_few_trials,
    has_many_trials,
    is_large,
    is_searched_anew,
    trials_of_slot,
)


def _balance(run: Run, budget: Budget) -> None:
    """Search for balance alone, and offer that as a start: a search for time seldom finds it."""
    # In large layers the whole search for balance takes no longer than a short one for time.
    is_short = has_few_slots(run)
    # Visits are what a search for time gains by; a short one gains more of it than of balance.
    is_of_visits = run.objective.has_expert_sets
    is_of_visits &= trials_of_slot(run) * effort.SETS_BALANCE_PART < budget.work.balancing
    parts = effort.BALANCE_PART if is_short else effort.SETS_BALANCE_PART if is_of_visits else 1
    starts = (FLOOR, CONSTRUCT, COMBINE) if is_short else ()

    def search(inner: Run, share: Budget) -> None:
        anneal(inner, share, LayerModel(inner, parts * _count_parts_beside_slowest(inner)))

    slowest = () if is_short else (SLOWEST,)
    settle = (SETTLE,) if budget.work.settles_balance else ()
    stages = (*starts, Stage(search), *slowest, COMBINE, *settle)
    problem = replace(run.problem, objective="balance")
    start = None if is_short else run.best.slots
    inner = run.run_inner(stages, budget.muted(), problem=problem, start=start)
    role = Role.FOUND if is_short else Role.BALANCED
    slots, interrupted = inner.answer().slots, inner.interrupted
    run.offer(slots, "balance", role=role, is_start=True, interrupted=interrupted)


def _may_be_balanced(run: Run) -> bool:
    """Return whether a search for balance first is worth its time.

    It is in layers of few slots, and in large layers of many windows; in the latter not if single
    copies are the best so far. Then balance by copies does not pay, as the slowest device's load is
    not what takes time.
    """
    if (
        not run.problem.aim.predicts_time
        or not is_searched_anew(run)
        or not adds_up_over_layers(run)
    ):
        return False
    if has_costly_copies(run):
        return False
    return has_few_slots(run) or (is_large(run) and run.best.role is not Role.SINGLE)


def _anneal(run: Run, budget: Budget) -> None:
    """Anneal all layers by the whole objective; half as long if large layers were balanced."""
    parts = effort.BALANCE_PART if run.with_role(Role.BALANCED) else 1
    if has_costly_fillers(run):
        parts *= effort.FULL_PART
    model = LayerModel(run, parts * _count_parts_beside_slowest(run))
    anneal_where_it_gains(run, budget, model)


def _is_annealed(run: Run) -> bool:
    """Return whether annealing layers by all that costs is worth its time.

    Where copies cost, another search anneals them. Large layers of single copies, searched by loads
    alone, are balanced before. A search of so many layers that each gets few trials would end where
    it begins. With copies it does not: where reading weights is what takes time, balance is not
    what counts.
    """
    is_balanced = is_of_loads(run) and not run.problem.may_copy
    is_idle = is_balanced and has_few_trials(run)
    return ANNEAL.applies(run) and not is_idle and not has_costly_copies(run)


def _is_of_slowest(run: Run) -> bool:
    """Return whether the slowest devices themselves are searched, after the norm for them.

    For time that is so in small layers with copies. For balance, in few windows that fits what is
    seen, and not what is unseen, where devices are more than their slots; not where a layer has few
    placements to choose from. In many windows of large layers it does unless slots are many more.
    Where experts survive a loss, it takes a thousandth off the slowest device, and adds a hundredth
    after one.
    """
    problem = run.problem
    is_summed = is_searched_anew(run) and adds_up_over_layers(run)
    if problem.rules.need_copies or not is_summed:
        return False
    if problem.aim.costs_traffic:
        return problem.may_copy and has_many_trials(run)
    if is_large(run):
        return not problem.may_copy and problem.slots >= effort.SLOWEST_SLOTS * problem.devices
    carries_over = problem.may_copy or len(run.objective.windows) >= effort.SLOWEST_WINDOWS
    is_tiny = problem.num_experts <= effort.SLOWEST_EXPERTS
    return carries_over or is_tiny or problem.slots >= problem.devices


def _count_parts_beside_slowest(run: Run) -> int:
    """Return how many searches share the work of one that is followed by one of the slowest."""
    # A search of few slots takes milliseconds, and finds less in half the trials.
    return effort.SLOWEST_PARTS if _is_of_slowest(run) and not has_few_slots(run) else 1


def _anneal_slowest(run: Run, budget: Budget) -> None:
    """Anneal all layers by the slowest device of every window as it is, from the best placement.

    Small layers are searched several times: only a search that is hot exchanges the copies that a
    start has for others, and there it takes milliseconds.
    """
    is_cool = run.problem.may_copy and len(run.objective.windows) < effort.SLOWEST_WINDOWS
    one = "cool" if is_cool or is_large(run) else "warm"
    heat, details = None if has_many_trials(run) else one, run.details
    anneal(run, budget, LayerModel(run, effort.SLOWEST_PARTS, heat=heat, of_slowest=True))
    # What the search before did about unseen windows is what it is reported by.
    run.details = replace(run.details, unseen=details.unseen)


BALANCE = Stage(_balance, applies=_may_be_balanced, share=lambda _: effort.BRIEF_SHARE)
ANNEAL_ALL = replace(ANNEAL, run=_anneal, applies=_is_annealed)
SLOWEST = Stage(_anneal_slowest, applies=lambda run: ANNEAL.applies(run) and _is_of_slowest(run))
