"""Layers whose copies cost: which copies pay, and which fill slots that must be full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moetuner.placement import EMPTY
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.run import Role, Run, Stage
from moetuner.solver.stages.layers import (
    COMBINE,
    LayerModel,
    adds_up_over_layers,
    anneal,
    charges_copies,
    has_few_slots,
    is_searched_anew,
)


def single_copies(problem: Problem) -> Problem | None:
    """Return the problem with one copy of each expert; None where it has no spare slots.

    The slowest device decides the time, and reading one more expert's weights takes longer than
    loads differ. So all devices get equally many experts unless a rule forbids it; copies may
    change that later.
    """
    alike = problem.topology.has_equal_devices and not problem.rules.exist
    return problem.without_copies(even=problem.aim.predicts_time and alike)


def smaller_problem(run: Run) -> Problem | None:
    """Return a problem whose answer is a start of this one; None where it has no spare slots.

    Where copies cost, that is the problem with one slot less on every device, so that no number of
    slots is worse than a smaller one; if all slots must be full, the one in which they need not be.
    Else it is the one with one copy of each expert.
    """
    problem = run.problem
    if has_costly_fillers(run):
        return replace(problem, fill_slots=False)
    rules = problem.rules
    may_be_empty = not (problem.fill_slots or rules.exist or rules.need_copies)
    if may_be_empty and charges_copies(run):
        return problem.with_fewer_slots() or single_copies(problem)
    return single_copies(problem)


def is_of_loads(run: Run) -> bool:
    """Return whether large layers are searched by loads alone: a start predicts the answer."""
    return run.objective.is_of_loads and is_searched_anew(run) and not has_few_slots(run)


def _charges_copies_by_layer(run: Run) -> bool:
    """Return whether experts may have copies, which cost, in layers that can be mixed."""
    may_copy = run.problem.may_copy
    return may_copy and charges_copies(run) and is_searched_anew(run) and adds_up_over_layers(run)


def has_costly_copies(run: Run) -> bool:
    """Return whether copies cost, and may be left out, in layers that can be mixed."""
    return not run.problem.fill_slots and _charges_copies_by_layer(run)


def has_costly_fillers(run: Run) -> bool:
    """Return whether slots must be full though copies cost, in layers that can be mixed."""
    problem = run.problem
    has_rules = problem.rules.exist or problem.rules.need_copies
    return problem.fill_slots and not has_rules and _charges_copies_by_layer(run)


def find_open_layers(run: Run) -> list[int]:
    """Return the layers in which one more slot on every device may help.

    Where the answer for fewer slots leaves all devices of a layer a slot, one more is not needed.
    """
    smaller = smaller_problem(run)
    starts = run.with_role(Role.SINGLE)
    if smaller is None or not smaller.may_copy or not starts:
        return list(range(run.problem.layers))
    used = (starts[-1].slots != EMPTY).sum(axis=2)
    open_layers: list[int] = np.flatnonzero((used >= smaller.capacity).any(axis=1)).tolist()
    return open_layers


def _anneal_copies(run: Run, budget: Budget) -> None:
    """Anneal layers whose copies cost, from near the best placement and from full slots.

    Copies pay together or not at all: one more is read at once, and pays when the slowest device of
    many windows has lost load. So a search that begins without them seldom finds where many pay,
    and one that begins with full slots seldom finds where few do. Each layer goes on with the best.
    """
    full = run.with_role(Role.FULL)[-1].slots
    smaller, value = smaller_problem(run), run.best.value
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
        model.chosen = find_open_layers(run)
        anneal(run, part, model, start=full if way.from_full else None)
        COMBINE.run(run, part)


def _anneal_filled(run: Run, budget: Budget) -> None:
    """Anneal full slots for a while, near the best, which may be what was filled.

    Copies of the expert with the fewest tokens fill what may stay empty, often one on every device,
    which is nearly as good as none. A search of full slots seldom finds that, and a trial that
    changes so many copies takes long.
    """
    anneal(run, budget, LayerModel(run, effort.FILLED_PART, heat="cool"))


ANNEAL_COPIES = Stage(_anneal_copies, applies=has_costly_copies)
ANNEAL_FILLED = Stage(_anneal_filled, applies=has_costly_fillers)
