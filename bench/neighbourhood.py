"""What neighbourhoods add to the search, at equal time.

    python bench/neighbourhood.py [--seconds 10] [--seeds 2] [--cap 1.05] [SIZE ...]
    python bench/neighbourhood.py --trace FILE --devices 8

Both get ``--seconds``: the search alone all of it; the other half of it for the search, half for
neighbourhoods. Objectives are shares of `Objective.scale`; "gain" is how much lower the second
ends, in percent of the first. The last columns count the neighbourhoods tried, and those that were
better, by complete chain (two devices), by HiGHS, and searches in between.
"""

from __future__ import annotations

import argparse

from instances import problem

import moetuner as mt
from moetuner.solver.neighbourhood import neighbourhood
from moetuner.solver.result import Candidate, Limits
from moetuner.solver.search.traffic import heuristic


def main() -> None:
    """Print a row per size and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=["24x32", "24x32/8", "26x64", "48x128"])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cap", type=float, default=1.05)
    parser.add_argument("--trace", help="recorded routing instead of the sizes")
    parser.add_argument("--devices", type=int, default=8)
    options = parser.parse_args()
    ways = "".join(f"{way:>16}" for way in ("chain", "HiGHS", "search"))
    print(
        f"{'layers x experts on devices':28}{'seed':>5}{'search':>11}{'both':>11}{'gain':>9}{ways}"
    )
    for name in options.sizes if options.trace is None else [options.trace]:
        if options.trace is None:
            joint = problem(name, max_imbalance=options.cap)
        else:
            statistics = mt.RoutingStatistics.from_trace(mt.RoutingTrace.load(name))
            topology = mt.Topology(options.devices)
            joint = mt.Problem(statistics, topology, regime="follow", max_imbalance=options.cap)

        def share(found: Candidate, joint: mt.Problem = joint) -> float:
            return mt.Objective(joint).cost(mt.Placement(found.slots)) / mt.Objective(joint).scale

        for seed in range(options.seeds):
            alone = heuristic(joint, seed=seed, limits=Limits(options.seconds))
            half = Limits(options.seconds / 2)
            start = heuristic(joint, seed=seed, limits=half)
            both = neighbourhood(joint, seed=seed, limits=half, start=start)
            first, second = share(alone), share(both)
            gains = both.details["neighbourhood"].values()
            counts = "".join(f"{gain['better']:>8} /{gain['tried']:>6}" for gain in gains)
            label = f"{joint.layers} x {joint.experts} on {joint.devices}"
            change = 100 * (first - second) / first
            print(f"{label:28}{seed:>5}{first:>11.5f}{second:>11.5f}{change:>8.3f}%{counts}")


if __name__ == "__main__":
    main()
