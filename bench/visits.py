"""How near bounds of visits come to the best placement found, and what they and their check take.

    python bench/visits.py TRACE [--devices 4 8] [--cap 1.05] [--search 10]

Each row: visits found in so many seconds, and bound without a time limit, by prices of experts
where all contents of a device can be tried, and by tangents; the gap, and CPU seconds of the bound
and of `verify`.
"""

from pathlib import Path

from harness import Table, arguments, timed

import moetuner as mt
from moetuner.solver.bounds import visits
from moetuner.solver.budget import Budget


def main() -> None:
    """Print the table."""
    given = arguments(__doc__, {"trace": Path}, devices=[4, 8], cap=float, search=10.0)
    trace = mt.RoutingTrace.load(given.trace)
    statistics = mt.RoutingStatistics.from_trace(trace, window=None, transitions=False, sets=True)
    row = Table(
        *("devices 7d", "proof <8", "found 8.4f", "bound 8.4f", "gap 7.2%"),
        *("bound, CPU-s 12.1f", "verify, CPU-s 13.1f"),
    )
    by_prices = visits._by_prices
    for devices in given.devices:
        problem = mt.Problem(
            statistics,
            mt.Topology(devices),
            regime="dispatch",
            objective="traffic",
            max_imbalance=given.cap,
        )
        answer = mt.solve(problem, "heuristic", time_limit=given.search)
        slots, visited = answer.placement.slots, answer.objective
        caps, tokens = problem.caps.raised_for(slots), mt.Objective(problem).tokens
        for proof, way in (("prices", by_prices), ("tangents", lambda *_: None)):
            visits._by_prices = way
            proven, _, bounding = timed(
                lambda of=problem, on=slots, caps=caps: visits.bound(of, on, caps, budget=Budget())
            )
            cost, _, checking = timed(lambda of=problem, by=proven.certificate: mt.verify(by, of))
            assert cost == proven.value
            bound = proven.value / tokens
            row(devices, proof, visited, bound, 1 - bound / visited, bounding, checking)
        visits._by_prices = by_prices


if __name__ == "__main__":
    main()
