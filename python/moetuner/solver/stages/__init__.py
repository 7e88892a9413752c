"""The steps that methods are made of, and how the searches among them follow each other.

A stage that does not apply to a problem is left out, so one list serves all problems: the chain of
single copies' pairs, visits of expert sets, and layers for all else. With slots to spare the best
with one copy of each expert is a start: copies must better it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.serving.splits import EVEN
from moetuner.solver import effort
from moetuner.solver.bounds.loads import least_balance
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, Role, Run, Stage
from moetuner.solver.stages.chain import CHAIN, PARTITIONS
from moetuner.solver.stages.descent import SETTLE
from moetuner.solver.stages.divided import DIVIDE, divides
from moetuner.solver.stages.floor import FLOOR
from moetuner.solver.stages.layers import (
    ANNEAL,
    CHAIN_UNDER_CAPS,
    COMBINE,
    CONSTRUCT,
    LayerModel,
    Slots,
    anneal,
    has_few_slots,
    is_large,
    is_searched_anew,
    mixes,
)
from moetuner.solver.stages.polish import POLISH
from moetuner.solver.stages.visits import PAIRS, VISITS

__all__ = ["PARTITIONS", "SEARCH", "SEARCHES"]


# One copy of each expert is not searched where its start is so far behind one with copies, and
# loads alone count: a search gains about as much from either. On tables of ten groups (75 x 256 on
# 32 devices x 9 slots) the start is 27 % behind, and its search took half of the time.
SINGLE_BEHIND = 0.02


def _single(problem: Problem) -> Problem | None:
    """Return the problem with one copy of each expert; None where it has no slots to spare.

    A time is that of the slowest device, and the weights of an expert more take longer than what
    loads differ by. So devices have equally many experts where nothing says otherwise: copies may
    change that.
    """
    alike = problem.topology.has_equal_devices and not problem.rules.exist
    return problem.without_copies(even=problem.goal == "time" and alike)


def _single_copies(run: Run, budget: Budget) -> None:
    """Search the problem with one copy of each expert, and offer that as a start."""
    single = _single(run.problem)
    assert single is not None
    known, asked = single.statistics.known, _asked(single, run, budget)
    slots, interrupted = known.get(asked), False
    if slots is None:
        inner = run.inner((FLOOR, PARTITIONS, *SEARCHES), _muted(run, budget), problem=single)
        slots, interrupted = inner.answer().slots, inner.interrupted
        if asked is not None and not interrupted:
            known[asked] = slots
    _offer_single(run, slots, interrupted=interrupted)


def _single_of_loads(run: Run, budget: Budget) -> None:
    """Search the same where its start is not far behind one with copies; else offer that start."""
    single = _single(run.problem)
    assert single is not None
    slots = run.inner((FLOOR, CONSTRUCT), _muted(run, budget), problem=single).best.slots
    start = run.judge(pad_slots(slots, run.problem.capacity))
    if start.excess or start.value <= run.best.value * (1 + SINGLE_BEHIND):
        _single_copies(run, budget)
    else:
        _offer_single(run, slots)


def _muted(run: Run, budget: Budget) -> Budget:
    """Return a budget that reports no values where those are not of answers: with slots to fill."""
    return budget.muted() if run.problem.fill_slots else budget


def _offer_single(run: Run, slots: Slots, *, interrupted: bool = False) -> None:
    """Offer slots that hold one copy of each expert."""
    padded = pad_slots(slots, run.problem.capacity)
    run.offer(padded, "single", role=Role.SINGLE, is_start=True, interrupted=interrupted)


def _is_of_loads(run: Run) -> bool:
    """Return whether large layers are searched for their loads alone, of which starts tell most."""
    objective = run.objective
    tables = (objective.sets, objective.coactivation, objective.transitions)
    of_loads = run.problem.goal != "traffic" and all(table is None for table in tables)
    return of_loads and is_searched_anew(run) and not has_few_slots(run)


def _asked(single: Problem, run: Run, budget: Budget) -> tuple[object, ...] | None:
    """Return what the answer to a problem of single copies depends on; None on more, as on time.

    Several numbers of slots for copies are tried of the same counts: with one copy of each expert
    they are one problem, which is searched once, and not again if it was one of them.
    """
    if budget.time_limit is not None or budget.gap is not None:
        return None
    left_out = ("statistics", "slots_per_device", "extra_slots", "fill_slots")
    values = [getattr(single, each.name) for each in fields(single) if each.name not in left_out]
    limits = (run.seed, budget.iterations, budget.effort)
    return ("single", _frozen(values), single.capacity.tobytes(), *limits)


def _frozen(value: object) -> object:
    """Return a setting as a value that has a hash: rules may come as lists of lists."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _has_spare_slots(run: Run) -> bool:
    return run.moves is None and run.problem.without_copies() is not None


def _single_share(run: Run) -> float:
    """Return the share of single copies: for balance little, which copies seldom make worse."""
    of_balance = run.problem.goal == "balance"
    return effort.BRIEF_SHARE if of_balance else effort.START_SHARE


SINGLE_COPIES = Stage(
    _single_copies,
    applies=lambda run: _has_spare_slots(run) and not _is_of_loads(run),
    least=lambda run: effort.SINGLE_LEAST * _single_share(run) * run.judging,
    share=_single_share,
)
# Behind the start with copies, which says whether the search is worth its time.
SINGLE_OF_LOADS = replace(
    SINGLE_COPIES,
    run=_single_of_loads,
    applies=lambda run: _has_spare_slots(run) and _is_of_loads(run),
)


def _balance(run: Run, budget: Budget) -> None:
    """Search for balance alone, and offer that as a start: a search by time seldom finds it."""
    # The whole search for balance takes no longer than a short one for time, in large layers.
    is_short = has_few_slots(run)
    part = effort.BALANCE_PART if is_short else 1
    starts = (FLOOR, CONSTRUCT, COMBINE) if is_short else ()

    def search(inner: Run, left: Budget) -> None:
        anneal(inner, left, LayerModel(inner, part))

    settle = (SETTLE,) if budget.work.settles_balance else ()
    stages = (*starts, Stage(search), COMBINE, *settle)
    problem = replace(run.problem, objective="balance")
    start = None if is_short else run.best.slots
    inner = run.inner(stages, budget.muted(), problem=problem, start=start)
    role = Role.FOUND if is_short else Role.BALANCED
    slots, interrupted = inner.answer().slots, inner.interrupted
    run.offer(slots, "balance", role=role, is_start=True, interrupted=interrupted)


def _may_be_balanced(run: Run) -> bool:
    """Return whether a search for balance first is worth its time.

    In layers of few slots, and in large ones of many windows. There it is not if copies do not pay
    even where they balance loads: then the slowest device is not what takes time.
    """
    if run.problem.goal != "time" or not is_searched_anew(run) or not mixes(run):
        return False
    return has_few_slots(run) or (is_large(run) and run.best.role is not Role.SINGLE)


def _anneal(run: Run, budget: Budget) -> None:
    """Anneal all layers by all that counts; large ones that were balanced half as long."""
    is_balanced = any(start.role is Role.BALANCED for start in run.incumbents)
    anneal(run, budget, LayerModel(run, effort.BALANCE_PART if is_balanced else 1))


BALANCE = Stage(_balance, applies=_may_be_balanced, share=lambda _: effort.BRIEF_SHARE)
SEARCHES = (
    *(SINGLE_COPIES, CHAIN, PAIRS, VISITS, CONSTRUCT, SINGLE_OF_LOADS, CHAIN_UNDER_CAPS),
    *(BALANCE, COMBINE, replace(ANNEAL, run=_anneal), COMBINE, SETTLE, POLISH),
)


def _equal(run: Run, budget: Budget) -> None:
    """Offer what is best for devices that are equally fast: no answer is behind it."""
    problem = replace(run.problem, topology=replace(run.problem.topology, speed=None))
    inner = run.inner((FLOOR, PARTITIONS, *SEARCHES), budget.muted(), problem=problem)
    run.offer(inner.answer().slots, "equal", is_start=True, interrupted=inner.interrupted)


def _has_unequal_speeds(run: Run) -> bool:
    """Return whether predicted times depend on speeds: the search of equal ones is simpler.

    There the best with one copy of each expert has equally many experts on all devices.
    """
    speeds = run.problem.topology.speed_of_device
    is_time = run.problem.goal == "time" and is_searched_anew(run)
    return is_time and bool(speeds.min() < speeds.max())


EQUAL = Stage(_equal, applies=_has_unequal_speeds, share=lambda _: effort.START_SHARE)


def _even(run: Run, budget: Budget) -> None:
    """Offer what is best where copies take even parts: no answer is behind it."""
    inner = run.inner((FLOOR, PARTITIONS, *SEARCHES), budget, problem=_of_even_parts(run.problem))
    run.offer(inner.answer().slots, "even", is_start=True, interrupted=inner.interrupted)


def _of_even_parts(problem: Problem) -> Problem:
    return replace(problem, split=EVEN)


def _may_be_behind(run: Run) -> bool:
    """Return whether another placement may be better: balance is not what it is at best."""
    best = run.best
    is_best = run.problem.goal == "balance" and run.problem.survive is None and not best.excess
    return not (is_best and best.value <= least_balance(run.problem) * (1 + ROUNDING))


# Of equals the first is the answer: devices that copies join are safer on other traffic.
DIVIDING = (DIVIDE, Stage(_even, applies=_may_be_behind), POLISH)


def _search(run: Run, budget: Budget) -> None:
    """Search, and remember what is best with one copy of each expert."""
    problem, is_divided = run.problem, divides(run)
    run.through(DIVIDING if is_divided else (EQUAL, *SEARCHES), budget)
    is_single = is_searched_anew(run) and not problem.may_copy and not is_divided
    asked = _asked(problem, run, budget) if is_single and not run.interrupted else None
    if asked is not None:
        problem.statistics.known[asked] = run.answer().slots


SEARCH = Stage(_search)
