"""Few moves from a running placement: ours beside a plain greedy, at the same budgets.

    python bench/moves.py [--layers 58] [--experts 256] [--devices 32] [--quick]

The greedy is the oracle: in numpy, it looks at every exchange of two experts of a layer, makes the
one that lowers the objective most for a copy that has to be brought, and goes on until the budget
is used up or nothing gains. Ours gets a tenth of the seconds that it took. Loads are generated, in
windows; the placement that runs is the contiguous one. Of time, the objective is what the greedy's
end is predicted to take.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a small model, small budgets")
    arguments = parser.parse_args()
    layers, experts, devices = arguments.layers, arguments.experts, arguments.devices
    budgets = [100, 500, 2000]
    if arguments.quick:
        layers, experts, devices, budgets = 6, 64, 8, [10, 40, 120]
    load = generated(layers, arguments.windows, 0, experts)
    statistics = mt.RoutingStatistics.from_load(np.round(load).astype(np.uint64))
    initial = mt.Placement.from_assignment(
        np.tile(np.arange(experts) * devices // experts, (layers, 1)), devices
    )
    home = initial.device_of.astype(np.int64)
    print(f"{layers} x {experts} on {devices} devices, {arguments.windows} windows\n")
    print(
        f"{'objective':>9} {'budget':>6}   {'greedy gain':>11} {'moves':>5} {'seconds':>7}", end=""
    )
    print(f"   {'our gain':>11} {'moves':>5} {'seconds':>7}")
    problems = {
        goal: mt.Problem(statistics, mt.Topology(devices), objective=goal, regime="dispatch")
        for goal in ("balance", "time")
    }
    for budget in budgets:
        begin = time.perf_counter()
        plain = mt.Placement.from_assignment(greedy(load, home, budget), devices)
        seconds = time.perf_counter() - begin
        for goal, problem in problems.items():
            before = mt.Objective(problem).value(initial)
            begin = time.perf_counter()
            result = mt.solve(
                problem, "heuristic", initial=initial, move_budget=budget, time_limit=seconds / 10
            )
            ours = time.perf_counter() - begin
            gain, moves = (
                before - mt.Objective(problem).value(plain),
                initial.diff(plain).experts_moved,
            )
            print(f"{goal:>9} {budget:6}   {gain:11.5f} {moves:5} {seconds:7.2f}", end="")
            moves = initial.diff(result.placement).experts_moved
            print(f"   {before - result.objective:11.5f} {moves:5} {ours:7.2f}", flush=True)
    begin = time.perf_counter()
    front = mt.pareto(problems["balance"], initial, time_limit=1.0 if arguments.quick else 8.0)
    print(f"\nA front of {len(front)} in {time.perf_counter() - begin:.1f} s (moves: gain)")
    print(", ".join(f"{each.experts_moved}: {each.gain:.4f}" for each in front))


if __name__ == "__main__":
    main()
