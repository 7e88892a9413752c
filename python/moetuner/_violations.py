"""Rules of a problem that a placement breaks, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner import objective
from moetuner.placement import EMPTY, Placement

if TYPE_CHECKING:
    from moetuner.problem import Problem

# What sums of shares may be off.
ROUNDING = 1e-9


def broken_rules(problem: Problem, placement: Placement) -> list[str]:
    """List slots, pins and bans that a placement breaks: a machine could not, or must not, run it.

    Raises
    ------
    ValueError
        If the placement is of another model or machine.
    """
    found = (placement.layers, placement.num_experts, placement.devices)
    wanted = (problem.layers, problem.experts, problem.devices)
    if found != wanted:
        raise ValueError(
            f"placement must have {wanted[0]} layers, {wanted[1]} experts and {wanted[2]} devices "
            f"like the problem, got {found[0]}, {found[1]} and {found[2]}"
        )
    lines = []
    count = (placement.slots != EMPTY).sum(axis=2)
    cells = np.argwhere(count > problem.rooms)
    if len(cells):
        layer, device = cells[0]
        lines.append(
            f"slots: layer {layer} has {count[layer, device]} experts on device {device}, which "
            f"has {problem.rooms[layer, device]} slots{_more(len(cells))}"
        )
    if problem.fill_slots:
        cells = np.argwhere(count < problem.rooms)
        if len(cells):
            layer, device = cells[0]
            empty = problem.rooms[layer, device] - count[layer, device]
            lines.append(
                f"fill_slots: layer {layer} has {empty} empty slots on device {device}"
                f"{_more(len(cells))}"
            )
    held = placement.held.transpose(0, 2, 1)
    for name, rule, verb, there in (
        ("pinned", problem.rules.pinned, "is not", True),
        ("forbidden", problem.rules.forbidden, "is", False),
    ):
        wrong = np.argwhere(rule & (held != there)) if rule is not None else np.empty((0, 3))
        if len(wrong):
            layer, expert, device = wrong[0]
            lines.append(
                f"{name}: expert {expert} of layer {layer} {verb} on device {device}"
                f"{_more(len(wrong))}"
            )
    return lines


def broken_caps(problem: Problem, placement: Placement) -> list[str]:
    """Say by how much a placement exceeds the load cap; nothing where it keeps it."""
    cap = problem.max_imbalance
    if cap is None or np.isinf(cap):
        return []
    total = problem.load.astype(np.float64)
    peaks = objective.slowest_times(problem, placement, total[None])[0]
    mean = total.sum(axis=1) / problem.topology.speed_of_device.sum()
    imbalance = np.divide(peaks, mean, out=np.ones_like(mean), where=mean > 0)
    over = np.flatnonzero(imbalance > cap * (1 + ROUNDING))
    if not len(over):
        return []
    worst = over[imbalance[over].argmax()]
    return [
        f"max_imbalance: {cap:g} is exceeded in {len(over)} of {problem.layers} layers: "
        f"{imbalance[worst]:.4g} in layer {worst}"
    ]


def _more(count: int) -> str:
    """Say of how many the first one is named."""
    return f", and {count - 1} more" if count > 1 else ""
