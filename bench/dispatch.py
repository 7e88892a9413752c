"""What the exact search for the least fanout reaches on unseen sequences, against pairs alone.

    python bench/dispatch.py TRACE [--seeds 3] [--cap 1.05]

Half of the sequences are seen. Each row: fanout and node fanout on the other half, and seconds.
"""

from dataclasses import replace
from pathlib import Path

from harness import Table, arguments, timed

import moetuner as mt


def main() -> None:
    """Print the table."""
    given = arguments(__doc__, {"trace": Path}, seeds=3, cap=1.05)
    trace = mt.RoutingTrace.load(given.trace)
    row = Table("devices <7", "split 5d", "method <11", "fanout 7.4f", "node 7.4f", "seconds 8.2f")
    for split in range(given.seeds):
        seen, unseen = trace.split(0.5, seed=split)
        statistics = mt.RoutingStatistics.from_trace(
            seen, window=None, transitions=False, sets=True
        )
        for devices, per_node in ((4, None), (8, None), (8, 4)):
            topology, flat = mt.Topology(devices, devices_per_node=per_node), mt.Topology(devices)
            pairs = replace(statistics, sets=None)
            ways = [("pairs", pairs, flat), ("exact", statistics, flat)]
            if per_node is not None:
                ways.append(("exact tiers", statistics, topology))
            for name, counted, on in ways:
                problem = mt.Problem(counted, on, max_imbalance=given.cap)
                answer, seconds, _ = timed(lambda of=problem: mt.solve(of, "heuristic"))
                judged = mt.evaluate(answer.placement, unseen, topology, regime="dispatch")
                of = f"{devices}" if per_node is None else f"{devices // per_node} x {per_node}"
                row(of, split, name, judged.fanout, judged.node_fanout, seconds)


if __name__ == "__main__":
    main()
