"""successor(): the next placement, as near to the one in force as can be.

The one place to change when ``solve`` takes an initial placement and a move budget itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner._moves import kept
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.solver import solve
from moetuner.torch.transfer import moves


def successor(
    problem: Problem,
    current: Placement,
    *,
    method: str,
    seed: int,
    move_budget: int | None,
) -> Placement:
    """Solve, name the devices so that they keep what they hold, and take what the budget allows.

    Parameters
    ----------
    problem
        The traffic to place for.
    current
        The placement in force.
    method, seed
        As in ``solve``.
    move_budget
        Copies of experts that may come to another device; layers with the largest gain per copy
        come first, and a layer moves as a whole. None for no limit.
    """
    solved = solve(problem, method, seed=seed).placement
    slots = current.slots.copy()
    changes = []
    for layer in range(current.layers):
        named = _renamed(current.slots[layer], solved.slots[layer])
        near = kept(current.slots[layer][None], np.sort(named)[None])[0]
        arriving = sum(m.source != m.target for m in moves(current.slots[layer], near))
        load = problem.load[layer].astype(np.float64)
        gain = _busiest(current.slots[layer], load) - _busiest(near, load)
        if gain > 0:
            changes.append((-gain / max(arriving, 1), layer, arriving, near))
    left = move_budget
    for _, layer, arriving, near in sorted(changes, key=lambda change: change[:2]):
        if left is None or arriving <= left:
            slots[layer] = near
            left = None if left is None else left - arriving
    return Placement(slots, num_experts=current.num_experts)


def _renamed(old: NDArray[np.int32], new: NDArray[np.int32]) -> NDArray[np.int32]:
    """Permute the devices of new slots [D,S], greedily, so that they share most with the old."""
    experts = int(max(old.max(), new.max())) + 1
    held = np.zeros((2, len(old), experts + 1), dtype=np.int64)
    for side, slots in enumerate((old, new)):
        held[side, np.arange(len(slots))[:, None], slots] = 1  # an empty slot is the last column
    shared = held[0, :, :-1] @ held[1, :, :-1].T
    out = np.empty_like(new)
    for _ in range(len(old)):
        device, which = np.unravel_index(int(shared.argmax()), shared.shape)
        out[device] = new[which]
        shared[device], shared[:, which] = -1, -1
    return out


def _busiest(slots: NDArray[np.int32], load: NDArray[np.float64]) -> float:
    """Load of the busiest device; copies share."""
    copies = np.bincount(slots[slots != EMPTY], minlength=len(load))
    each = np.where(slots == EMPTY, 0.0, (load / copies)[slots])
    return float(each.sum(axis=1).max())
