"""Answers that several solves share: they are kept with the counts that they were computed from.

Callers try several numbers of slots, efforts and methods with the same counts, and parts of these
solves are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from moetuner.problem import Problem
from moetuner.solver.budget import Budget

# Slots are what their capacity says, whoever left some out.
LEFT_OUT = ("statistics", "slots_per_device", "extra_slots", "fill_slots")


def make_key(
    problem: Problem, seed: int, budget: Budget, *which: object
) -> tuple[object, ...] | None:
    """Return all that an answer depends on, but whether slots must be full; None if time is in it.

    ``which`` says what the answer is, and what else it depends on.
    """
    if budget.time_limit is not None or budget.gap is not None:
        return None
    names = (setting.name for setting in fields(Problem))
    values = [getattr(problem, name) for name in names if name not in LEFT_OUT]
    slots = (problem.may_copy, problem.capacity.tobytes())
    return (*which, _frozen(values), *slots, seed, budget.iterations)


def _frozen(value: object) -> object:
    """Return a setting as a value with a hash: rules may come as lists of lists."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
