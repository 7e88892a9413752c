"""What the exact search for the least fanout reaches on unseen sequences, against pairs alone.

    python bench/dispatch.py TRACE [--seeds 3] [--cap 1.05]

Half of the sequences are seen. Each row: fanout and node fanout on the other half, and seconds.
"""

from pathlib import Path

from harness import Table, arguments, timed

import moetuner as mt
from moetuner.solver.search.fanout import dispatch
from moetuner.solver.search.traffic import search_traffic


def main() -> None:
    """Print the table."""
    given = arguments(__doc__, {"trace": Path}, seeds=3, cap=1.05)
    trace = mt.RoutingTrace.load(given.trace)
    row = Table("devices <7", "split 5d", "method <11", "fanout 7.4f", "node 7.4f", "seconds 8.2f")
    for split in range(given.seeds):
        seen, unseen = trace.split(0.5, seed=split)
        statistics = mt.RoutingStatistics.from_trace(seen, transitions=False, sets=True)
        for devices, per_node in ((4, None), (8, None), (8, 4)):
            topology, flat = mt.Topology(devices, devices_per_node=per_node), mt.Topology(devices)
            ways = [("pairs", search_traffic, flat), ("exact", dispatch, flat)]
            if per_node is not None:
                ways.append(("exact tiers", dispatch, topology))
            for name, method, on in ways:
                problem = mt.Problem(statistics, on, regime="dispatch", max_imbalance=given.cap)
                answer, seconds, _ = timed(lambda of=problem, by=method: by(of, seed=0))
                placement = mt.Placement(answer.slots, num_experts=unseen.num_experts)
                judged = mt.evaluate(placement, unseen, topology, regime="dispatch")
                of = f"{devices}" if per_node is None else f"{devices // per_node} x {per_node}"
                row(of, split, name, judged.fanout, judged.node_fanout, seconds)


if __name__ == "__main__":
    main()
