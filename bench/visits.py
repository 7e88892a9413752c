"""How near bounds of visits come to the best placement found, and what they and their check take.

    python bench/visits.py TRACE [--devices 4 8] [--cap 1.05] [--search 10]

Each row: visits found in so many seconds, and bound without a time limit, by prices of experts
where all contents of a device can be tried, and by tangents; the gap, and CPU seconds of the bound
and of `verify`.
"""

import argparse
import time
from pathlib import Path

import moetuner as mt
from moetuner.solver.bounds import visits
from moetuner.solver.budget import Budget


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--cap", type=float)
    parser.add_argument("--search", type=float, default=10.0)
    arguments = parser.parse_args()
    trace = mt.RoutingTrace.load(arguments.trace)
    statistics = mt.RoutingStatistics.from_trace(trace, transitions=False, sets=True)
    print("devices  proof     found    bound    gap      bound s  verify s")
    by_prices = visits._by_prices
    for devices in arguments.devices:
        problem = mt.Problem(
            statistics,
            mt.Topology(devices),
            regime="dispatch",
            objective="traffic",
            max_imbalance=arguments.cap,
        )
        result = mt.solve(problem, "heuristic", time_limit=arguments.search)
        slots, found = result.placement.slots, result.objective
        caps, tokens = problem.caps.kept(slots), mt.Objective(problem).tokens
        for proof, way in (("prices", by_prices), ("tangents", lambda *_: None)):
            visits._by_prices = way
            begin = time.process_time()
            proven = visits.bound(problem, slots, caps, budget=Budget())
            seconds, begin = time.process_time() - begin, time.process_time()
            assert mt.verify(proven.certificate, problem) == proven.value
            checked, bound = time.process_time() - begin, proven.value / tokens
            print(
                f"{devices:7}  {proof:8}  {found:.4f}   {bound:.4f}   {1 - bound / found:6.2%}   "
                f"{seconds:7.1f}  {checked:8.1f}"
            )
        visits._by_prices = by_prices


if __name__ == "__main__":
    main()
