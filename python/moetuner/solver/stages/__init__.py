"""The stages of methods, and the order of the searches among them.

A stage that does not apply to a problem is skipped, so one list serves all problems: the chain for
pairs of single copies, visits for expert sets, and layers for all else. With spare slots, the best
placement with one copy of each expert is a start, and copies must improve on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.serving.splits import EVEN
from moetuner.solver import effort
from moetuner.solver.arrays import Floats, Slots
from moetuner.solver.bounds.loads import least_balance
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, Role, Run, Stage
from moetuner.solver.stages.chain import CHAIN, PARTITIONS
from moetuner.solver.stages.descent import SETTLE
from moetuner.solver.stages.floor import FLOOR
from moetuner.solver.stages.layers import (
    ANNEAL,
    CHAIN_UNDER_CAPS,
    COMBINE,
    CONSTRUCT,
    LayerModel,
    adds_up_over_layers,
    anneal,
    charges_copies,
    cost_of_layers,
    has_few_slots,
    has_many_trials,
    is_large,
    is_searched_anew,
    trials_of_slot,
)
from moetuner.solver.stages.lp_split import LP_SPLIT, has_lp_split
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


def _single(problem: Problem) -> Problem | None:
    """Return the problem with one copy of each expert; None where it has no spare slots.

    The slowest device decides the time, and reading one more expert's weights takes longer than
    loads differ. So all devices get equally many experts unless a rule forbids it; copies may
    change that later.
    """
    alike = problem.topology.has_equal_devices and not problem.rules.exist
    return problem.without_copies(even=problem.aim.predicts_time and alike)


def _smaller(run: Run) -> Problem | None:
    """Return a problem whose answer is a start of this one; None where it has no spare slots.

    Where copies cost, that is the problem with one slot less on every device, so that no number of
    slots is worse than a smaller one; if all slots must be full, the one in which they need not be.
    Else it is the one with one copy of each expert.
    """
    problem = run.problem
    if _has_costly_fillers(run):
        return replace(problem, fill_slots=False)
    rules = problem.rules
    may_be_empty = not (problem.fill_slots or rules.exist or rules.need_copies)
    if may_be_empty and charges_copies(run):
        return problem.with_fewer_slots() or _single(problem)
    return _single(problem)


def _fewer_slots(run: Run, budget: Budget) -> None:
    """Search the problem with fewer slots, and offer its answer and its starts as starts."""
    answers, interrupted = _search_fewer(run, budget)
    for slots in answers:
        _offer_smaller(run, slots, interrupted=interrupted and slots is answers[-1])


def _search_fewer(run: Run, budget: Budget) -> tuple[tuple[Slots, ...], bool]:
    """Return the answers to the problem with fewer slots, and if interrupted; they are cached."""
    problem = _smaller(run)
    assert problem is not None
    # What may stay empty is searched whole, with the regret of phases.
    is_whole = _has_costly_fillers(run)
    # Not by ``compute_once``: an answer that was interrupted, or may depend on time, is no result.
    cache, key = problem.statistics.memo, _cache_key(problem, run, budget, is_whole=is_whole)
    answers, interrupted = cache.get(key), False
    if answers is None:
        searches = (SEARCH,) if is_whole else SEARCHES
        inner = run.run_inner((FLOOR, PARTITIONS, *searches), _muted(run, budget), problem=problem)
        answers, interrupted = _answers(inner), inner.interrupted
        if key is not None and not interrupted:
            cache[key] = answers
    return answers, interrupted


def _answers(run: Run) -> tuple[Slots, ...]:
    """Return the answers for fewer slots that a run began with, the fewest first, and its own."""
    return tuple(start.slots for start in (*run.with_role(Role.SINGLE), run.answer()))


def _single_of_loads(run: Run, budget: Budget) -> None:
    """Search single copies if their start is not far behind the best; else offer that start."""
    single = _single(run.problem)
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


def _is_of_loads(run: Run) -> bool:
    """Return whether large layers are searched by loads alone: a start predicts the answer."""
    return run.objective.is_of_loads and is_searched_anew(run) and not has_few_slots(run)


def _cache_key(
    problem: Problem, run: Run, budget: Budget, *, is_whole: bool = False
) -> tuple[object, ...] | None:
    """Return all that the answer to a smaller problem depends on; None if time is in it.

    Callers try several numbers of slots for copies with the same counts. Without copies, and with
    one slot less, these are the same problem, so it is searched once. ``is_whole`` says whether the
    answer is that of least regret.
    """
    if budget.time_limit is not None or budget.gap is not None:
        return None
    # Slots are what their capacity says, whoever left some out.
    left_out = ("statistics", "slots_per_device", "extra_slots", "fill_slots")
    names = (setting.name for setting in fields(Problem))
    values = [getattr(problem, name) for name in names if name not in left_out]
    slots = (problem.may_copy, problem.capacity.tobytes())
    limits = (run.seed, budget.iterations, budget.effort)
    return ("smaller", is_whole, _frozen(values), *slots, *limits)


def _frozen(value: object) -> object:
    """Return a setting as a value with a hash: rules may come as lists of lists."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _search_layers(run: Run, budget: Budget) -> None:
    """Search layers, but not full slots that start far behind those of which some may be empty."""
    # The search of other layers leaves its start; under a limit there is no time to look ahead.
    is_near = _has_costly_fillers(run) and is_large(run) and not SETTLE.applies(run)
    if not is_near or budget.time_limit is not None:
        run.run_stages((*LAYER_STARTS, *LAYER_SEARCHES), budget)
        return
    run.run_stages(LAYER_STARTS, budget)
    if not (run.interrupted or _is_far_behind(run, budget)):
        run.run_stages(LAYER_SEARCHES, budget)


def _is_far_behind(run: Run, budget: Budget) -> bool:
    """Return whether every start is far behind the answer for fewer slots, in every layer."""
    answers, interrupted = _search_fewer(run, budget)
    if interrupted:
        _offer_smaller(run, answers[-1], interrupted=True)
    fewer = run.judge(pad_slots(answers[-1], run.problem.capacity))

    def costs(slots: Slots) -> Floats:
        return cost_of_layers(run.objective, Placement(slots, num_experts=run.problem.num_experts))

    starts = np.min([costs(start.slots) for start in run.incumbents], axis=0)
    return not fewer.excess and bool((starts > costs(fewer.slots) * (1 + SINGLE_BEHIND)).all())


def _has_spare_slots(run: Run) -> bool:
    return run.moves is None and run.problem.without_copies() is not None


def _single_share(run: Run) -> float:
    """Return the share of time for single copies: little for balance, which copies seldom harm."""
    return effort.SEARCH_SHARE if run.problem.aim.costs_traffic else effort.BRIEF_SHARE


FEWER_SLOTS = Stage(
    _fewer_slots,
    applies=lambda run: _has_spare_slots(run) and not _is_of_loads(run),
    least=lambda run: effort.SINGLE_LEAST * _single_share(run) * run.judge_seconds,
    share=_single_share,
)
# This comes after the start with copies, which decides whether the search is worth its time.
SINGLE_OF_LOADS = replace(
    FEWER_SLOTS,
    run=_single_of_loads,
    applies=lambda run: _has_spare_slots(run) and _is_of_loads(run),
)


def _balance(run: Run, budget: Budget) -> None:
    """Search for balance alone, and offer that as a start: a search for time seldom finds it."""
    # The whole search for balance takes no longer than a short one for time, in large layers.
    is_short = has_few_slots(run)
    whole = effort.SETS_BALANCE_PART if run.objective.has_expert_sets else 1
    parts = effort.BALANCE_PART if is_short else whole
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
    if _has_costly_copies(run):
        return False
    return has_few_slots(run) or (is_large(run) and run.best.role is not Role.SINGLE)


def _anneal(run: Run, budget: Budget) -> None:
    """Anneal all layers by the whole objective; half as long if large layers were balanced."""
    parts = effort.BALANCE_PART if run.with_role(Role.BALANCED) else 1
    if _has_costly_fillers(run):
        parts *= effort.FULL_PART
    anneal(run, budget, LayerModel(run, parts * _count_parts_beside_slowest(run)))


def _is_annealed(run: Run) -> bool:
    """Return whether annealing layers is worth its time.

    Large layers of single copies, searched by loads alone, are balanced before. A search of so many
    layers that each gets few trials would end where it begins. With copies it does not: where
    reading weights is what takes time, balance is not what counts.
    """
    is_balanced = _is_of_loads(run) and not run.problem.may_copy
    is_long = run.budget.iterations is not None or trials_of_slot(run) >= effort.LEAST_TRIALS
    return ANNEAL.applies(run) and (is_long or not is_balanced)


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


def _has_costly_copies(run: Run) -> bool:
    """Return whether copies cost, and may be left out, in layers that can be mixed."""
    return not run.problem.fill_slots and _charges_copies_by_layer(run)


def _anneal_copies(run: Run, budget: Budget) -> None:
    """Anneal layers whose copies cost, from near the best placement and from full slots.

    Copies pay together or not at all: one more is read at once, and pays when the slowest device of
    many windows has lost load. So a search that begins without them seldom finds where many pay,
    and one that begins with full slots seldom finds where few do. Each layer goes on with the best.
    """
    full = run.with_role(Role.FULL)[-1].slots
    smaller, value = _smaller(run), run.best.value
    fewer = smaller is not None and smaller.may_copy
    searches = effort.COPY_SEARCHES[: budget.work.copy_searches]
    for number, way in enumerate(searches):
        left = len(searches) - number
        part = budget.within(1 / left, keep=left * run.judge_seconds)
        # The answer for fewer slots has been searched in all ways.
        is_done = fewer and number == 2 and run.best.value >= value * (1 - effort.COPY_GAIN)
        if part.time_limit == 0 or is_done:
            return
        # The norm over devices that stands for the slowest one counts all others, too: by it a copy
        # on each of them costs, though none of them is slower than the slowest.
        model = LayerModel(run, len(effort.COPY_SEARCHES), heat=way.heat, of_slowest=way.of_slowest)
        model.chosen = _find_open_layers(run)
        anneal(run, part, model, start=full if way.from_full else None)
        COMBINE.run(run, part)


def _has_costly_fillers(run: Run) -> bool:
    """Return whether slots must be full though copies cost, in layers that can be mixed."""
    problem = run.problem
    has_rules = problem.rules.exist or problem.rules.need_copies
    return problem.fill_slots and not has_rules and _charges_copies_by_layer(run)


def _charges_copies_by_layer(run: Run) -> bool:
    """Return whether experts may have copies, which cost, in layers that can be mixed."""
    may_copy = run.problem.may_copy
    return may_copy and charges_copies(run) and is_searched_anew(run) and adds_up_over_layers(run)


def _anneal_filled(run: Run, budget: Budget) -> None:
    """Anneal full slots for a while, near the best, which may be what was filled.

    Copies of the expert with the fewest tokens fill what may stay empty, often one on every device,
    which is nearly as good as none. A search of full slots seldom finds that, and a trial that
    changes so many copies takes long.
    """
    anneal(run, budget, LayerModel(run, effort.FILLED_PART, heat="cool"))


def _find_open_layers(run: Run) -> list[int]:
    """Return the layers in which one more slot on every device may help.

    Where the answer for fewer slots leaves all devices of a layer a slot, one more is not needed.
    """
    smaller = _smaller(run)
    starts = run.with_role(Role.SINGLE)
    if smaller is None or not smaller.may_copy or not starts:
        return list(range(run.problem.layers))
    used = (starts[-1].slots != EMPTY).sum(axis=2)
    open_layers: list[int] = np.flatnonzero((used >= smaller.capacity).any(axis=1)).tolist()
    return open_layers


BALANCE = Stage(_balance, applies=_may_be_balanced, share=lambda _: effort.BRIEF_SHARE)
SLOWEST = Stage(_anneal_slowest, applies=lambda run: ANNEAL.applies(run) and _is_of_slowest(run))
ANNEAL_COPIES = Stage(_anneal_copies, applies=_has_costly_copies)
LAYER_STARTS = (CHAIN, PAIRS, VISITS, CONSTRUCT)
LAYER_SEARCHES = (
    SINGLE_OF_LOADS,
    CHAIN_UNDER_CAPS,
    BALANCE,
    COMBINE,
    replace(
        ANNEAL, run=_anneal, applies=lambda run: _is_annealed(run) and not _has_costly_copies(run)
    ),
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
        applies=lambda run: FEWER_SLOTS.applies(run) and not _has_costly_fillers(run),
    ),
    Stage(
        _search_layers,
        applies=lambda run: bool(_find_open_layers(run)),
    ),
    # After full slots, as steps from so many copies of one expert take long.
    replace(FEWER_SLOTS, applies=_has_costly_fillers),
    Stage(_anneal_filled, applies=_has_costly_fillers),
    replace(COMBINE, applies=_has_costly_fillers),
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
    key = _cache_key(problem, run, budget) if is_smaller and not run.interrupted else None
    if key is not None:
        problem.statistics.memo[key] = _answers(run)
    if _may_regret(run):
        balance_regret(run, budget, (CONSTRUCT, ANNEAL_COPIES, COMBINE))


def _may_regret(run: Run) -> bool:
    """Return whether copies let one phase gain by what the other loses, and no share was given."""
    has_default_phases = run.problem.phases is None and len(run.problem.shares) > 1
    is_whole = run.budget.effort != "brief" and run.budget.iterations is None
    if run.interrupted or not (has_default_phases and is_whole and _has_costly_copies(run)):
        return False
    # One slot more must not be worse by the default share, so with little gain there is no choice.
    fewer = [start.value for start in run.with_role(Role.SINGLE)]
    return not fewer or run.best.value < min(fewer) * (1 - effort.WALK_GAIN)


SEARCH = Stage(_search)
