"""The nearest placement that keeps the rules: as many running copies as possible stay."""

from __future__ import annotations

import numpy as np

from moetuner._checks import ArgumentError
from moetuner.placement import EMPTY, Placement, find_holders, moves_from
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.solver.arrays import Bools, Slots
from moetuner.solver.budget import Budget
from moetuner.solver.run import Incumbent, Role, Run, Stage
from moetuner.solver.terms import core_layers, make_site


def repair(problem: Problem, initial: Placement) -> Slots:
    """Return slots [L,D,S] that keep the rules, to which the fewest copies have to move.

    They are full where all slots are to be full. Copies go where they balance loads, if no more of
    them have to move then; what else runs stays where there are slots.

    Raises
    ------
    ValueError
        If the rules leave an expert no slot.
    """
    running, rules = initial.held, problem.rules
    slots = pad_slots(initial.slots, problem.capacity)
    broken = [layer for layer, holders in enumerate(running) if rules.are_broken(layer, holders)]
    if not broken:
        return problem.filled(slots, initial)
    windows = problem.windows.searched
    layers = core_layers(windows.load, windows.weight, make_site(problem))
    # ``nearest`` is the core's answer with the fewest moves. ``start`` has of it only what runs or
    # is pinned, and the core completes it so that loads are balanced.
    nearest, start = slots.copy(), slots
    fewest = layers.nearest(np.ascontiguousarray(running), broken, full=problem.fill_slots)
    for layer, holds in zip(broken, fewest, strict=True):
        pinned, forbidden = _rules_of(problem, layer)
        for table, holders in ((nearest, holds), (start, holds & (running[layer] | pinned))):
            experts = holders.copy()
            if problem.may_copy:
                _keep_copies(problem, layer, experts, running[layer] & ~forbidden)
            table[layer] = EMPTY
            for device, ids in enumerate(map(np.flatnonzero, experts)):
                table[layer, device, : len(ids)] = ids
    balanced = layers.complete(np.ascontiguousarray(start))
    nearest, balanced = (problem.filled(slots, initial) for slots in (nearest, balanced))
    is_as_near = moves_from(running, balanced) <= moves_from(running, nearest)
    # Balancing finds a slot for every expert, but not always for the copy that survives a loss.
    for layer, holders in enumerate(find_holders(balanced, problem.num_experts)):
        is_as_near[layer] &= not rules.are_broken(layer, holders)
    # A layer is the balanced one where that moves no more copies.
    return np.where(is_as_near[:, None, None], balanced, nearest)


def _rules_of(problem: Problem, layer: int) -> tuple[Bools, Bools]:
    """Return where experts of a layer are pinned, and where they are forbidden [D,E]."""
    shape = (problem.devices, problem.num_experts)
    rules = (problem.rules.pinned, problem.rules.forbidden)
    pinned, forbidden = (np.zeros(shape, bool) if rule is None else rule[layer].T for rule in rules)
    return pinned, forbidden


def _keep_copies(problem: Problem, layer: int, holds: Bools, stays: Bools) -> None:
    """Let running copies [D,E] stay beside the experts that devices hold, if there are slots.

    Where slots are too few, copies go whose load adds least to each of the expert's other copies.
    """
    copies, load = (holds | stays).sum(axis=0), problem.load[layer].astype(np.float64)
    for device, slots in enumerate(problem.capacity[layer].tolist()):
        others = stays[device] & ~holds[device]
        for _ in range(int(others.sum() + holds[device].sum()) - slots):
            rise = load / np.maximum(copies * (copies - 1), 1)
            expert = int(np.where(others, rise, np.inf).argmin())
            others[expert] = False
            copies[expert] -= 1
        holds[device] |= others


def offer_running(run: Run) -> Incumbent:
    """Offer the running placement, or the nearest one that keeps the rules, and return it."""
    slots = repair(run.problem, run.require_moves().initial)
    return run.offer(slots, "running", role=Role.RUNNING, is_start=True)


def _repair(run: Run, _: Budget) -> None:
    """Offer the same as a stage; raise if the budget of moves does not suffice for it."""
    problem, moves, start = run.problem, run.require_moves(), offer_running(run)
    if start.moves > moves.most:
        raise ArgumentError(
            f"move_budget {moves.budget:g} is too small: "
            f"initial breaks a rule ({problem.violations(moves.initial)[0]}), and to keep "
            f"all rules takes {start.moves} moves",
            "move_budget",
        )


REPAIR = Stage(_repair)
