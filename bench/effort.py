"""What the searches for traffic and for visits reach, and the seconds of the processor they take.

    python bench/effort.py traffic|visits [--trace gpt-oss-20b.npz] [--time-limit 2] [INSTANCE ...]

Traffic: crossing of generated instances (`instances.py`), and of a trace on 4 and 8 devices, cap
1.05. Visits: fanout of the trace on 4 and 8 devices without a cap, and of a generated layer set of
8 x 16 on 4 devices. One thread.
"""

from __future__ import annotations

from pathlib import Path

from harness import Table, arguments, timed
from instances import problem, routing

import moetuner as mt

GENERATED = ["24x32/8", "26x64", "48x128", "58x256", "61x384"]


def main() -> None:
    """Print a row for every instance."""
    places = {"what": ("traffic", "visits"), "instances": GENERATED}
    given = arguments(__doc__, places, trace=Path, time_limit=float)
    traces = {} if given.trace is None else {given.trace.stem: mt.RoutingTrace.load(given.trace)}
    problems = {}
    if given.what == "traffic":
        problems = {name: problem(name) for name in given.instances}
        wanted = {"regime": "follow", "max_imbalance": 1.05}
        counted = {"coactivation": False}
    else:
        traces = {"8 x 16": routing(8, 16, 4), **traces}
        wanted = {"regime": "dispatch", "objective": "traffic"}
        counted = {"transitions": False, "sets": True}
    for name, trace in traces.items():
        statistics = mt.RoutingStatistics.from_trace(trace, **counted)
        for devices in (4,) if name == "8 x 16" else (4, 8):
            on = mt.Problem(statistics, mt.Topology(devices), **wanted)
            problems[f"{name} on {devices}"] = on
    row = Table("instance 24s", "objective 10.6f", "CPU-s 8.2f")
    for name, instance in problems.items():
        how = {"time_limit": given.time_limit, "threads": 1}
        result, _, seconds = timed(lambda of=instance: mt.solve(of, "heuristic", **how))
        row(name, result.objective, seconds)


if __name__ == "__main__":
    main()
