"""What the searches for traffic and for visits reach, and the seconds of the processor they take.

    python bench/effort.py traffic|visits [--trace gpt-oss-20b.npz] [--time-limit 2] [INSTANCE ...]

Traffic: crossing of generated instances (`instances.py`), and of a trace on 4 and 8 devices, cap
1.05. Visits: fanout of the trace on 4 and 8 devices without a cap, and of a generated layer set of
8 x 16 on 4 devices. One thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from instances import problem, routing

import moetuner as mt


def row(name: str, instance: mt.Problem, limit: float | None) -> None:
    """Solve by search alone, and print what it took."""
    begin = time.process_time()
    result = mt.solve(instance, "heuristic", time_limit=limit, threads=1)
    seconds = time.process_time() - begin
    print(f"{name:>24} {result.objective:10.6f} {seconds:8.2f} s", flush=True)


def main() -> None:
    """Print a row for every instance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("traffic", "visits"))
    parser.add_argument("instances", nargs="*")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--time-limit", type=float)
    options = parser.parse_args()
    trace = None if options.trace is None else mt.RoutingTrace.load(options.trace)
    if options.what == "traffic":
        for name in options.instances or ("24x32/8", "26x64", "48x128", "58x256", "61x384"):
            row(name, problem(name), options.time_limit)
        if trace is not None:
            statistics = mt.RoutingStatistics.from_trace(trace, coactivation=False)
            for devices in (4, 8):
                on = mt.Problem(
                    statistics, mt.Topology(devices), regime="follow", max_imbalance=1.05
                )
                row(f"{options.trace.stem} on {devices}", on, options.time_limit)
        return
    traces = [("8 x 16", routing(8, 16, 4), (4,))]
    if trace is not None:
        traces.append((options.trace.stem, trace, (4, 8)))
    for name, of, all_devices in traces:
        statistics = mt.RoutingStatistics.from_trace(of, transitions=False, sets=True)
        for devices in all_devices:
            on = mt.Problem(
                statistics, mt.Topology(devices), regime="dispatch", objective="traffic"
            )
            row(f"{name} on {devices}", on, options.time_limit)


if __name__ == "__main__":
    main()
