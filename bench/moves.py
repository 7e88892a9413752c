"""Few moves from a running placement: ours beside a plain greedy, at the same budgets.

    python bench/moves.py [--layers 58] [--experts 256] [--devices 32] [--slots 8 9] [--quick]

The greedy is the oracle: in numpy, it looks at every exchange of two experts of a layer, makes the
one that lowers the objective most for a copy that has to be brought, and goes on until the budget
is used up or nothing gains. Ours, ``solve`` from end to end on one thread like the greedy, gets a
twelfth of the seconds that it took as its limit; beside them are those of the processor, which
other work does not lengthen. Loads are generated, in windows; the placement that runs is the
contiguous one, with slots to spare empty. Of time, the objective is what the greedy's end is
predicted to take.
"""

from __future__ import annotations

import numpy as np
from harness import Table, arguments, timed
from numpy.typing import NDArray
from unseen import generated

import moetuner as mt

Floats = NDArray[np.float64]


def best_exchange(load: Floats, device_of: NDArray[np.int64], home: NDArray[np.int64]) -> tuple:
    """Find the exchange in load [W,E] that gains most for a move: gain, moves, experts."""
    windows, experts = load.shape
    devices = int(device_of.max()) + 1
    on = np.zeros((windows, devices))
    for device in range(devices):
        on[:, device] = load[:, device_of == device].sum(axis=1)
    order = np.sort(on, axis=1)[:, ::-1]
    rank = np.argsort(np.argsort(-on, axis=1), axis=1)
    before = order[:, 0]
    best = (0.0, 0, -1, -1)
    for e in range(experts):
        g = device_of[e]
        others = np.flatnonzero((device_of != g) & (np.arange(experts) > e))
        if not others.size:
            continue
        h = device_of[others]
        more = load[:, others] - load[:, [e]]
        here, there = on[:, [g]] + more, on[:, h] - more
        # The largest load of all other devices: one of the first three.
        rest = np.where(
            (rank[:, [g]] != 0) & (rank[:, h] != 0),
            order[:, [0]],
            np.where(
                (rank[:, [g]] != 1) & (rank[:, h] != 1),
                order[:, [1]],
                order[:, [min(2, devices - 1)]],
            ),
        )
        gain = (before[:, None] - np.maximum(np.maximum(here, there), rest)).sum(axis=0)
        moves = (
            (home[e] != h).astype(int) - (home[e] != g) + (home[others] != g) - (home[others] != h)
        )
        worth = gain / np.where(moves > 0, moves, 1e-3)
        at = int(worth.argmax())
        if gain[at] > 1e-9 * before.sum() and worth[at] > best[0]:
            best = (float(worth[at]), int(moves[at]), e, int(others[at]))
    return best


def greedy(load: Floats, device_of: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Exchange experts until the budget is used up; the device of every expert [L,E]."""
    now, moved = device_of.copy(), 0
    best = [
        best_exchange(load[:, layer], now[layer], device_of[layer]) for layer in range(len(now))
    ]
    while True:
        layer = max(range(len(now)), key=lambda at: best[at][0])
        worth, moves, e, f = best[layer]
        if worth <= 0 or moved + moves > budget:
            return now
        now[layer, [e, f]] = now[layer, [f, e]]
        moved += moves
        best[layer] = best_exchange(load[:, layer], now[layer], device_of[layer])


def main() -> None:
    """Print both, budget by budget, and what a front has."""
    given = arguments(
        __doc__, layers=58, experts=256, devices=32, windows=16, slots=[8, 9], quick=False
    )
    layers, experts, devices = given.layers, given.experts, given.devices
    budgets = [100, 500, 2000]
    if given.quick:
        layers, experts, devices, budgets = 6, 64, 8, [10, 40, 120]
    load = generated(layers, given.windows, 0, experts)
    statistics = mt.RoutingStatistics.from_load(np.round(load).astype(np.uint64))
    initial = mt.Placement.from_assignment(
        np.tile(np.arange(experts) * devices // experts, (layers, 1)), devices
    )
    home = initial.device_of.astype(np.int64)
    print(f"{layers} x {experts} on {devices} devices, {given.windows} windows\n")
    row = Table(
        *("objective 9s", "slots 5d", "budget 6d", "greedy gain 13.5f", "moves 5d", "seconds 7.2f"),
        *("CPU 6.2f", "our gain 13.5f", "moves 5d", "seconds 7.2f", "CPU 6.2f"),
    )
    problems = {
        (goal, slots): mt.Problem(
            statistics,
            mt.Topology(devices),
            slots_per_device=slots,
            objective=goal,
            regime="dispatch",
        )
        for slots in given.slots
        for goal in ("balance", "time")
    }
    for budget in budgets:
        assigned, seconds, processor = timed(lambda: greedy(load, home, budget))
        plain = mt.Placement.from_assignment(assigned, devices)
        for (goal, slots), problem in problems.items():
            before = mt.Objective(problem).value(initial)
            how = {"initial": initial, "move_budget": budget, "threads": 1}
            how["time_limit"] = seconds / 12
            result, *ours = timed(lambda: mt.solve(problem, "heuristic", **how))
            gain = before - mt.Objective(problem).value(plain)
            theirs = gain, initial.diff(plain).experts_moved, seconds, processor
            moves = initial.diff(result.placement).experts_moved
            row(goal, slots * devices, budget, *theirs, before - result.objective, moves, *ours)
    problem = problems["balance", given.slots[0]]
    limit = 1.0 if given.quick else 8.0
    front, seconds, _ = timed(lambda: mt.pareto(problem, initial, time_limit=limit))
    print(f"\nA front of {len(front)} in {seconds:.1f} s (moves: gain)")
    print(", ".join(f"{each.experts_moved}: {each.gain:.4f}" for each in front))


if __name__ == "__main__":
    main()
