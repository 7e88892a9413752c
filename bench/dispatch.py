"""What the exact search for the least fanout reaches on unseen sequences, against pairs alone.

    python bench/dispatch.py TRACE [--seeds 3] [--cap 1.05]

Half of the sequences are seen. Each row: fanout and node fanout on the other half, and seconds.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import moetuner as mt


def judged(placement, unseen, topology, regime="dispatch"):
    """Fanout and node fanout of a placement on a trace."""
    found = mt.evaluate(placement, unseen, topology, regime=regime)
    return found.fanout, found.node_fanout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cap", type=float, default=1.05)
    arguments = parser.parse_args()
    trace = mt.RoutingTrace.load(arguments.trace)
    print("devices  split  method      fanout   node    seconds")
    for split in range(arguments.seeds):
        seen, unseen = trace.split(0.5, seed=split)
        statistics = mt.RoutingStatistics.from_trace(seen, transitions=False, sets=True)
        for devices, per_node in ((4, None), (8, None), (8, 4)):
            topology = mt.Topology(devices, devices_per_node=per_node)
            flat = mt.Topology(devices)
            for name, counted, solved_on in (
                ("pairs", replace(statistics, sets=None), flat),
                ("exact", statistics, flat),
                ("exact tiers", statistics, topology),
            ):
                if name == "exact tiers" and per_node is None:
                    continue
                problem = mt.Problem(counted, solved_on, max_imbalance=arguments.cap)
                begin = time.perf_counter()
                placement = mt.solve(problem, "heuristic").placement
                seconds = time.perf_counter() - begin
                fanout, node = judged(placement, unseen, topology)
                of = f"{devices}" if per_node is None else f"{devices // per_node} x {per_node}"
                print(f"{of:7}  {split:5}  {name:11} {fanout:.4f}  {node:.4f}  {seconds:7.2f}")


if __name__ == "__main__":
    main()
