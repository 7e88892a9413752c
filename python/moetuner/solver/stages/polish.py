"""Polish small problems by the objective itself, where what a search adds up only stands for it.

A time waits for the busiest port, a risk for the worst windows, and caps for the sum of all: the
search of layers knows prices of these. Few slots can be tried one by one on the objective itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement, holders_of
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.run import Incumbent, Run, Stage
from moetuner.solver.stages.layers import is_of_layers

Slots = NDArray[np.int32]


def _polish(run: Run, budget: Budget) -> None:
    """Take the first change that ranks before the best until there is none, from a few starts."""
    starts = sorted(run.incumbents, key=lambda of: of.rank)[: effort.POLISHED]
    more = (run.judge(slots) for slots in _on_few_devices(run.problem))
    for start in (*starts, *(of for of in more if run.can_afford(of))):
        now, better = start, _better(run, start, budget)
        while better is not None and not budget.is_over():
            now, better = better, _better(run, better, budget)
        if now.rank < run.best.rank:
            run.offer(now.slots, "polish")


def _on_few_devices(problem: Problem) -> Iterator[Slots]:
    """Iterate over placements [L,D,S] on few devices, from each device on.

    Links can cost more than what devices gain by sharing the work.
    """
    for first in range(problem.devices):
        slots = np.full((problem.layers, problem.devices, problem.slots), EMPTY, dtype=np.int32)
        for layer, capacity in enumerate(problem.capacity):
            order = np.roll(np.arange(problem.devices), -first)
            at = [(d, s) for d in order for s in range(capacity[d])][: problem.experts]
            slots[layer][tuple(np.array(at).T)] = np.arange(problem.experts)
        if not problem.rules.violations(Placement(slots, num_experts=problem.experts)):
            yield slots


def _better(run: Run, incumbent: Incumbent, budget: Budget) -> Incumbent | None:
    """Return the first neighbour within the budget of moves that ranks before an incumbent."""
    problem = run.problem
    for slots in _neighbours(problem, incumbent.slots):
        if budget.is_over():
            break
        holders = holders_of(slots, problem.experts)
        # Of two copies on a device one is no holder.
        if holders.sum() < (slots != EMPTY).sum() or not holders.any(axis=1).all():
            continue
        if not problem.rules.violations(Placement(slots, num_experts=problem.experts)):
            judged = run.judge(slots, "polish")
            if judged.rank < incumbent.rank and run.can_afford(judged):
                return judged
    return None


def _neighbours(problem: Problem, slots: Slots) -> Iterator[Slots]:
    """Iterate over slots [L,D,S] with one changed or two exchanged, whatever becomes of them."""
    layers, devices, _ = slots.shape
    for layer in range(layers):
        free = [(d, s) for d in range(devices) for s in range(problem.capacity[layer, d])]
        for number, at in enumerate(free):
            for other in free[number + 1 :]:
                if at[0] != other[0] and slots[layer][at] != slots[layer][other]:
                    near = slots.copy()
                    near[layer][at], near[layer][other] = slots[layer][other], slots[layer][at]
                    yield near
            for expert in range(problem.experts if problem.may_copy else 0):
                near = slots.copy()
                near[layer][at] = expert
                yield near


def _is_small(run: Run) -> bool:
    """Return whether slots are few, and the search so far only stands for the objective.

    So do steps under a budget of moves: the one that gains most for a move need not be the best.
    """
    problem = run.problem
    stands_for = problem.goal == "time" or not problem.windows.is_mean or problem.max_imbalance
    # Where moves are free, what was solved from nothing is polished.
    of_search = run.moves is None and bool(stands_for) and is_of_layers(run)
    return problem.capacity.sum() <= effort.POLISHED_SLOTS and (run.is_priced or of_search)


POLISH = Stage(_polish, applies=_is_small)
