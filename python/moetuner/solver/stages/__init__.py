"""The stages of methods, and the order of the searches among them.

A stage that does not apply to a problem is skipped, so one list serves all problems: the chain for
pairs of single copies, visits for expert sets, and layers for all else. With spare slots, the best
placement with one copy of each expert is a start, and copies must improve on it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.serving.splits import EVEN
from moetuner.solver import effort
from moetuner.solver.arrays import Slots
from moetuner.solver.bounds.loads import least_balance
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, Role, Run, Stage
from moetuner.solver.stages.annealing import ANNEAL_ALL, BALANCE, SLOWEST
from moetuner.solver.stages.chain import CHAIN, PARTITIONS
from moetuner.solver.stages.copies import (
    ANNEAL_COPIES,
    ANNEAL_FILLED,
    find_open_layers,
    has_costly_copies,
    has_costly_fillers,
    is_of_loads,
    single_copies,
    smaller_problem,
)
from moetuner.solver.stages.descent import SETTLE
from moetuner.solver.stages.floor import FLOOR
from moetuner.solver.stages.layers import (
    CHAIN_UNDER_CAPS,
    COMBINE,
    CONSTRUCT,
    cost_of_layers,
    has_few_trials,
    is_searched_anew,
)
from moetuner.solver.stages.lp_split import LP_SPLIT, has_lp_split
from moetuner.solver.stages.memo import make_key
from moetuner.solver.stages.phases import balance_regret
from moetuner.solver.stages.polish import POLISH
from moetuner.solver.stages.visits import PAIRS, VISITS

__all__ = ["PARTITIONS", "SEARCH", "SEARCHES"]


# Single copies are not searched where their start is behind the one with copies by this part, and
# loads alone count: a search gains about as much from either start. On tables of ten groups (75 x
# 256 on 32 devices x 9 slots) the start is 27 % behind, and its search took half of the time. Full
# slots of large layers are not searched where they start so far behind slots that may be empty: on
# 75 x 256, 5 to 7 % behind with 9 slots and 17 to 24 % with 12, the search gained 0.02 and 0.03 %.
SINGLE_BEHIND = 0.02


def _fewer_slots(run: Run, budget: Budget) -> None:
    """Search the problem with fewer slots, and offer its answer and its starts as starts."""
    answers, interrupted = _search_fewer(run, budget)
    for slots in answers:
        _offer_smaller(run, slots, interrupted=interrupted and slots is answers[-1])


def _search_fewer(run: Run, budget: Budget) -> tuple[tuple[Slots, ...], bool]:
    """Return the answers to the problem with fewer slots, and if interrupted; they are cached."""
    problem = smaller_problem(run)
    assert problem is not None
    # What may stay empty is searched whole, with the regret of phases.
    is_whole = has_costly_fillers(run)
    # Not by ``compute_once``: an answer that was interrupted, or may depend on time, is no result.
    cache, key = problem.statistics.memo, _key_of_smaller(problem, run, budget, is_whole=is_whole)
    answers, interrupted = cache.get(key), False
    if answers is None:
        searches = (SEARCH,) if is_whole else SEARCHES
        inner = run.run_inner((FLOOR, PARTITIONS, *searches), _muted(run, budget), problem=problem)
        answers, interrupted = _answers(inner), inner.interrupted
        if key is not None and not interrupted:
            cache[key] = answers
    return answers, interrupted


def _key_of_smaller(
    problem: Problem, run: Run, budget: Budget, *, is_whole: bool = False
) -> tuple[object, ...] | None:
    """Return all that the answer to a smaller problem depends on; None if time is in it.

    Without copies, and with one slot less, several numbers of slots have the same smaller problem.
    ``is_whole`` says whether the answer is that of least regret.
    """
    return make_key(problem, run.seed, budget, "smaller", is_whole, budget.effort)


def _answers(run: Run) -> tuple[Slots, ...]:
    """Return the answers for fewer slots that a run began with, the fewest first, and its own."""
    return tuple(start.slots for start in (*run.with_role(Role.SINGLE), run.answer()))


def _single_of_loads(run: Run, budget: Budget) -> None:
    """Search single copies if their start is not far behind the best; else offer that start."""
    single = single_copies(run.problem)
    assert single is not None
    slots = run.run_inner((FLOOR, CONSTRUCT), _muted(run, budget), problem=single).best.slots
    start = run.judge(pad_slots(slots, run.problem.capacity))
    if start.excess or start.value <= run.best.value * (1 + SINGLE_BEHIND):
        _fewer_slots(run, budget)
    else:
        _offer_smaller(run, slots)


def _muted(run: Run, budget: Budget) -> Budget:
    """Return the budget; without reported values if slots are filled, as those are of no answer."""
    return budget.muted() if run.problem.fill_slots else budget


def _offer_smaller(run: Run, slots: Slots, *, interrupted: bool = False) -> None:
    """Offer slots that leave some empty."""
    padded = pad_slots(slots, run.problem.capacity)
    run.offer(padded, "single", role=Role.SINGLE, is_start=True, interrupted=interrupted)


def _search_layers(run: Run, budget: Budget) -> None:
    """Search layers, but not full slots that start far behind those of which some may be empty."""
    # Under a limit there is no time to look ahead.
    looks_ahead = has_costly_fillers(run) and budget.time_limit is None
    if looks_ahead and budget.cutoff is not None and _is_not_below(run, budget, budget.cutoff):
        return
    run.run_stages(LAYER_STARTS, budget)
    # Longer searches leave their start.
    is_short = has_few_trials(run) and not SETTLE.applies(run)
    if run.interrupted or (looks_ahead and is_short and _are_starts_behind(run, budget)):
        return
    run.run_stages(LAYER_SEARCHES, budget)


def _is_not_below(run: Run, budget: Budget, cutoff: float) -> bool:
    """Return whether slots of which some may stay empty have no answer below the cutoff."""
    padded = _padded_fewer(run, budget)
    value = run.objective.value(Placement(padded, num_experts=run.problem.num_experts))
    return value >= cutoff and not run.judge(padded).excess


def _are_starts_behind(run: Run, budget: Budget) -> bool:
    """Return whether all starts are far behind filled slots that may be empty, in every layer."""
    filled = run.judge(_padded_fewer(run, budget))
    if filled.excess:
        return False
    costs, *starts = (
        cost_of_layers(run.objective, Placement(slots, num_experts=run.problem.num_experts))
        for slots in (filled.slots, *(start.slots for start in run.incumbents))
    )
    return bool((np.min(starts, axis=0) > costs * (1 + SINGLE_BEHIND)).all())


def _padded_fewer(run: Run, budget: Budget) -> Slots:
    """Return the answer to the problem with fewer slots, with empty ones."""
    answers, interrupted = _search_fewer(run, budget)
    if interrupted:
        _offer_smaller(run, answers[-1], interrupted=True)
    return pad_slots(answers[-1], run.problem.capacity)


def _has_spare_slots(run: Run) -> bool:
    return run.moves is None and run.problem.without_copies() is not None


def _single_share(run: Run) -> float:
    """Return the share of time for single copies: little for balance, which copies seldom harm."""
    return effort.SEARCH_SHARE if run.problem.aim.costs_traffic else effort.BRIEF_SHARE


FEWER_SLOTS = Stage(
    _fewer_slots,
    applies=lambda run: _has_spare_slots(run) and not is_of_loads(run),
    least=lambda run: effort.SINGLE_LEAST * _single_share(run) * run.judge_seconds,
    share=_single_share,
)
# This comes after the start with copies, which decides whether the search is worth its time.
SINGLE_OF_LOADS = replace(
    FEWER_SLOTS,
    run=_single_of_loads,
    applies=lambda run: _has_spare_slots(run) and is_of_loads(run),
)


LAYER_STARTS = (CHAIN, PAIRS, VISITS, CONSTRUCT)
LAYER_SEARCHES = (
    SINGLE_OF_LOADS,
    CHAIN_UNDER_CAPS,
    BALANCE,
    COMBINE,
    ANNEAL_ALL,
    ANNEAL_COPIES,
    SLOWEST,
    COMBINE,
    SETTLE,
    POLISH,
)
# Where one more slot on every device does not help, the answer for fewer slots is the answer.
SEARCHES = (
    replace(
        FEWER_SLOTS,
        applies=lambda run: FEWER_SLOTS.applies(run) and not has_costly_fillers(run),
    ),
    Stage(_search_layers, applies=lambda run: bool(find_open_layers(run))),
    # After full slots, as steps from so many copies of one expert take long.
    replace(FEWER_SLOTS, applies=has_costly_fillers),
    ANNEAL_FILLED,
    replace(COMBINE, applies=has_costly_fillers),
)


def _offer_answer_to(problem: Problem, run: Run, budget: Budget, by: str) -> None:
    """Offer the answer to a simpler problem as a start, so that no answer is worse."""
    inner = run.run_inner((FLOOR, PARTITIONS, *SEARCHES), budget, problem=problem)
    run.offer(inner.answer().slots, by, is_start=True, interrupted=inner.interrupted)


def _equal(run: Run, budget: Budget) -> None:
    """Offer the answer for equally fast devices."""
    problem = replace(run.problem, topology=replace(run.problem.topology, speed=None))
    _offer_answer_to(problem, run, budget.muted(), "equal")


def _has_unequal_speeds(run: Run) -> bool:
    """Return whether predicted times depend on speeds, so that a search at equal speeds is simpler.

    At equal speeds the best single copies put equally many experts on all devices.
    """
    speeds = run.problem.topology.speed_of_device
    is_time = run.problem.aim.predicts_time and is_searched_anew(run)
    return is_time and bool(speeds.min() < speeds.max())


EQUAL = Stage(_equal, applies=_has_unequal_speeds, share=lambda _: effort.SEARCH_SHARE)


def _even(run: Run, budget: Budget) -> None:
    """Offer the answer for an even split."""
    _offer_answer_to(replace(run.problem, split=EVEN), run, budget, "even")


def _may_improve(run: Run) -> bool:
    """Return whether another placement may be better: balance is not what it is at best."""
    best, objective = run.best, run.objective
    is_best = not objective.aim.costs_traffic and objective.is_of_windows and not best.excess
    return not (is_best and best.value <= least_balance(run.problem) * (1 + ROUNDING))


# Among equals the first is the answer: devices that copies join are safer on other traffic.
LP_SPLIT_SEARCHES = (LP_SPLIT, Stage(_even, applies=_may_improve), POLISH)


def _search(run: Run, budget: Budget) -> None:
    """Search, and cache the answer if it has one copy of each expert."""
    problem, is_lp_split = run.problem, has_lp_split(run)
    run.run_stages(LP_SPLIT_SEARCHES if is_lp_split else (EQUAL, *SEARCHES), budget)
    is_smaller = is_searched_anew(run) and not is_lp_split and not _has_unequal_speeds(run)
    is_smaller = is_smaller and not problem.fill_slots
    key = _key_of_smaller(problem, run, budget) if is_smaller and not run.interrupted else None
    if key is not None:
        problem.statistics.memo[key] = _answers(run)
    if _may_regret(run):
        balance_regret(run, budget, (CONSTRUCT, ANNEAL_COPIES, COMBINE))


def _may_regret(run: Run) -> bool:
    """Return whether copies let one phase gain by what the other loses, and no share was given."""
    has_default_phases = run.problem.phases is None and len(run.problem.shares) > 1
    is_whole = run.budget.effort != "brief" and run.budget.iterations is None
    if run.interrupted or not (has_default_phases and is_whole and has_costly_copies(run)):
        return False
    # One slot more must not be worse by the default share, so with little gain there is no choice.
    fewer = [start.value for start in run.with_role(Role.SINGLE)]
    return not fewer or run.best.value < min(fewer) * (1 - effort.WALK_GAIN)


SEARCH = Stage(_search)
