"""The co-location programme on the paper's size: gap over time, against the proven optimum.

    python bench/colocation.py [--seconds 120] [--cap 1.2] [SIZE ...]

The chain is complete at this size, so the optimum is known; HiGHS starts from the search and does
not know it. Sizes are those of ``instances.py``: "paper" has 32 layers of 8 experts on 4 devices,
"paper/8" its first 8 layers. Gaps are (objective - bound) / objective.
"""

from __future__ import annotations

import argparse
import time

from instances import SIZES, problem

import moetuner as mt
from moetuner.solver.bounds.partitions import complete
from moetuner.solver.milp.colocation import colocation
from moetuner.solver.result import Candidate, Limits, Progress


def main() -> None:
    """Print the chain's optimum, then a row per eighth of the time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=["paper/8", "paper"])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--cap", type=float, default=1.2)
    options = parser.parse_args()
    for name in options.sizes:
        layers, experts, top_k, devices = SIZES[name]
        joint = problem(name, max_imbalance=options.cap)
        print(f"{layers} x {experts} on {devices}, top-{top_k}, cap {options.cap}")
        begin = time.perf_counter()
        optimum = complete(joint, joint.caps.whole)
        if optimum is not None:
            seconds, found = time.perf_counter() - begin, optimum[1] / mt.Objective(joint).scale
            print(f"  {seconds:8.3f} s  chain      {found:.6f}, optimal")
        begin = time.perf_counter()
        start = Candidate(mt.solve(joint, "heuristic").placement.slots)
        objective = mt.Objective(joint).cost(mt.Placement(start.slots)) / mt.Objective(joint).scale
        print(f"  {time.perf_counter() - begin:8.3f} s  search     {objective:.6f}")

        due = [0.0]

        def report(line: Progress, due: list[float] = due) -> None:
            if line.seconds >= due[0] and line.objective and line.bound:
                due[0] = line.seconds + options.seconds / 8
                row(line.seconds, line.objective, line.bound, "")

        limits = Limits(options.seconds, progress=report)
        begin = time.perf_counter()
        found = colocation(joint, seed=0, limits=limits, start=start)
        objective = mt.Objective(joint).cost(mt.Placement(found.slots)) / mt.Objective(joint).scale
        bound = (found.bound or 0) / mt.Objective(joint).scale
        row(time.perf_counter() - begin, objective, bound, found.status)


def row(seconds: float, objective: float, bound: float, status: str) -> None:
    """Print where HiGHS stands."""
    gap = 100 * (objective - bound) / objective
    figures = f"{objective:.6f}, at least {bound:.6f}, {gap:.3f} %"
    print(f"  {seconds:8.3f} s  HiGHS      {figures} {status}")


if __name__ == "__main__":
    main()
