"""Polish small problems by the objective itself, where searches minimise a stand-in for it.

A search minimises a norm over devices, prices links as if ports were evenly used, and weighs
windows for a risk. If slots are few, changes of single slots are tried on the objective itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from moetuner.placement import EMPTY, Placement, find_holders
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.arrays import Integers, Slots
from moetuner.solver.budget import Budget
from moetuner.solver.run import Incumbent, Run, Stage

# Contents [D,S] that a layer may have, for every layer; None where they are many.
Contents = list[list[Slots] | None]


def _polish(run: Run, budget: Budget) -> None:
    """Improve the best placements, and those on few devices, by first-improvement descent.

    If there are few placements in all, they are all tried instead.
    """
    contents = [_contents(run.problem, layer) for layer in range(run.problem.layers)]
    if _try_all(run, contents, budget):
        return
    starts = sorted(run.incumbents, key=lambda incumbent: incumbent.rank)[: effort.POLISHED]
    on_few = (run.judge(slots) for slots in _on_few_devices(run.problem))
    starts += [judged for judged in on_few if run.can_afford(judged)]
    for start in starts:
        _descend(run, start, contents, budget)


def _try_all(run: Run, contents: Contents, budget: Budget) -> bool:
    """Try all placements that keep the rules, if they are few; return whether they were."""
    choices = [content for content in contents if content is not None]
    are_many = len(choices) < len(contents) or math.prod(map(len, choices)) > effort.FEW_CHOICES
    if are_many or budget.iterations is not None:
        return False
    best, placements = run.best, map(np.stack, itertools.product(*choices))
    while (better := _find_better(run, best, placements, budget)) is not None:
        best = better
    if best is not run.best:
        run.offer(best.slots, "polish")
    return True


def _descend(run: Run, start: Incumbent, contents: Contents, budget: Budget) -> None:
    """Take improving changes until there is none, and offer the end if it is better than all."""
    better: Incumbent | None = start
    current = start
    while better is not None:
        current, neighbours = better, _neighbours(run.problem, better.slots, contents)
        better = _find_better(run, current, neighbours, budget)
    if current.rank < run.best.rank:
        run.offer(current.slots, "polish")


def _on_few_devices(problem: Problem) -> Iterator[Slots]:
    """Iterate over placements [L,D,S] that fill few devices, beginning with each device.

    Links can cost more than devices gain by sharing the work.
    """
    for first in range(problem.devices):
        slots = np.full((problem.layers, problem.devices, problem.slots), EMPTY, dtype=np.int32)
        for layer, capacity in enumerate(problem.capacity):
            order = np.roll(np.arange(problem.devices), -first)
            at = [(d, s) for d in order for s in range(capacity[d])][: problem.num_experts]
            slots[layer][tuple(np.array(at).T)] = np.arange(problem.num_experts)
        if not problem.rules.violations(Placement(slots, num_experts=problem.num_experts)):
            yield slots


def _find_better(
    run: Run, incumbent: Incumbent, placements: Iterator[Slots], budget: Budget
) -> Incumbent | None:
    """Return the next placement within the budget of moves that ranks before an incumbent."""
    for slots in placements:
        if budget.is_over():
            break
        judged = run.judge(slots, "polish")
        if judged.rank < incumbent.rank and run.can_afford(judged):
            return judged
    return None


def _neighbours(problem: Problem, slots: Slots, contents: Contents) -> Iterator[Slots]:
    """Iterate over slots [L,D,S] with one layer changed, which keep all rules but the caps.

    A layer changes to all contents that it may have if they are few, else in one slot or by one
    exchange.
    """
    for layer, choices in enumerate(contents):
        changes = _steps(problem, layer, slots[layer]) if choices is None else choices
        for content in changes:
            changed = slots.copy()
            changed[layer] = content
            yield changed


def _contents(problem: Problem, layer: int) -> list[Slots] | None:
    """Return all contents [D,S] of a layer that keep the rules; None if they may be many."""
    choices = [_subsets(problem.num_experts, int(slots)) for slots in problem.capacity[layer]]
    if math.prod(map(len, choices)) > effort.FEW_CHOICES:
        return None
    contents = []
    for subsets in itertools.product(*choices):
        content = np.full((problem.devices, problem.slots), EMPTY, np.int32)
        for device, subset in enumerate(subsets):
            content[device, : len(subset)] = subset
        if _keeps_rules(problem, layer, content):
            contents.append(content)
    return contents


def _subsets(experts: int, largest: int) -> list[tuple[int, ...]]:
    """Return all sets of at most so many experts."""
    sizes = (itertools.combinations(range(experts), size) for size in range(largest + 1))
    return list(itertools.chain.from_iterable(sizes))


def _keeps_rules(problem: Problem, layer: int, slots: Slots) -> bool:
    """Return whether slots [D,S] of a layer have every expert, keep rules, and repeat none."""
    holders = find_holders(slots[None], problem.num_experts)[0]
    # Two copies on one device count as one holder.
    if holders.sum() < (slots != EMPTY).sum() or not holders.any(axis=0).all():
        return False
    if not problem.may_copy and holders.sum() > problem.num_experts:
        return False
    return not problem.rules.are_broken(layer, holders)


def _steps(problem: Problem, layer: int, slots: Slots) -> Iterator[Slots]:
    """Iterate over slots [D,S] of a layer with one changed or two exchanged, within the rules."""
    for changed in _changed(problem, problem.capacity[layer], slots):
        if _keeps_rules(problem, layer, changed):
            yield changed


def _changed(problem: Problem, capacity: Integers, slots: Slots) -> Iterator[Slots]:
    """Iterate over slots [D,S] with one changed or two exchanged, within the rules or not."""
    free = [(d, s) for d, count in enumerate(capacity) for s in range(count)]
    for number, at in enumerate(free):
        for other in free[number + 1 :]:
            if at[0] != other[0] and slots[at] != slots[other]:
                changed = slots.copy()
                changed[at], changed[other] = slots[other], slots[at]
                yield changed
        # EMPTY is tried, too: reading a copy that saves nothing takes time.
        experts = range(EMPTY, problem.num_experts) if problem.may_copy else ()
        for expert in experts:
            changed = slots.copy()
            changed[at] = expert
            yield changed


def _may_polish(run: Run) -> bool:
    """Return whether slots are few enough to try changes on the objective itself.

    Answers under a budget of moves are polished, too: greedy steps need not be the best. Where
    moves are free, the answer was polished when it was solved from scratch.
    """
    return run.is_tiny and (run.is_priced or run.moves is None)


POLISH = Stage(_polish, applies=_may_polish)
