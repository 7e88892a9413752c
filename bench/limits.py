"""Whether a solve ends within its limit, at the sizes of the largest models.

    python bench/limits.py [NAME ...] [--limits 0.05 0.5 5 20] [--cache FOLDER]

Each solve is a process of its own, on routing that is generated once and kept in ``--cache``.
Columns: seconds of the whole call by the clock; what it is beyond the limit, and how much of the
processor the process used after the limit (on a busy machine the clock runs on without it);
the objective, and that of the start that every search has: what ``balance`` places.
``*`` marks a solve that took longer than limit + 10 % + 0.2 s. ``--limits inf`` solves without one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import arguments
from instances import routing

import moetuner as mt
from moetuner.solver.stages.floor import balanced

# name: layers, experts, top-k, tokens, tokens of a window, what is counted.
Traffic = tuple[int, int, int, int, int | None, dict[str, bool]]
SETS = {"transitions": False, "coactivation": True, "sets": True}
PAIRS = {"transitions": True, "coactivation": True, "sets": False}
LOADS = {"transitions": False, "coactivation": False, "sets": False}
TRAFFIC: dict[str, Traffic] = {
    "58x256 sets": (58, 256, 8, 50_000, None, SETS),
    "61x384 sets": (61, 384, 8, 50_000, None, SETS),
    "61x384 pairs": (61, 384, 8, 31_488, 256, PAIRS),
    "61x384 loads": (61, 384, 8, 16_384, 256, LOADS),
    "94x512 loads": (94, 512, 10, 16_384, 256, LOADS),
    "75x256 loads": (75, 256, 8, 10_240, 256, LOADS),
    "24x32 all": (24, 32, 4, 20_000, 1024, {"sets": True}),
    "8x16 all": (8, 16, 2, 4_000, 500, {"sets": True}),
}
# name: traffic, nodes, devices of a node, method, arguments of the problem.
Instance = tuple[str, int, int, str, dict[str, Any]]
CAPPED = {"objective": "traffic", "max_imbalance": 1.05}
INSTANCES: dict[str, Instance] = {
    "58x256 on 4x8, visits": ("58x256 sets", 4, 8, "joint", CAPPED),
    "58x256 on 4x8, time": ("58x256 sets", 4, 8, "joint", {"objective": "time"}),
    "61x384 on 9x8, visits": ("61x384 sets", 9, 8, "joint", CAPPED),
    "61x384 on 9x8, time": ("61x384 sets", 9, 8, "joint", {"objective": "time"}),
    "61x384 on 9x8, visits, copies": (
        *("61x384 sets", 9, 8, "joint"),
        {**CAPPED, "slots_per_device": 6},
    ),
    "61x384 on 9x8, time, copies": (
        *("61x384 sets", 9, 8, "joint"),
        {"objective": "time", "slots_per_device": 6},
    ),
    "61x384 on 72, time, 123 windows": ("61x384 pairs", 1, 72, "joint", {"objective": "time"}),
    "61x384 on 72, time, follow": (
        *("61x384 pairs", 1, 72, "joint"),
        {"objective": "time", "regime": "follow"},
    ),
    "61x384 on 72, crossing": ("61x384 pairs", 1, 72, "joint", {**CAPPED, "regime": "follow"}),
    "61x384 on 72, minimax": (
        *("61x384 pairs", 1, 72, "joint"),
        {"objective": "balance", "risk": 0.9, "slots_per_device": 6},
    ),
    "61x384 on 72x6, balance": (
        *("61x384 loads", 1, 72, "joint"),
        {"objective": "balance", "slots_per_device": 6},
    ),
    "94x512 on 320x2, balance": (
        *("94x512 loads", 1, 320, "joint"),
        {"objective": "balance", "slots_per_device": 2},
    ),
    "75x256 on 32x9, balance": (
        *("75x256 loads", 1, 32, "joint"),
        {"objective": "balance", "slots_per_device": 9},
    ),
    "61x384 on 72, paper": ("61x384 pairs", 1, 72, "paper", {**CAPPED, "regime": "follow"}),
    "58x256 on 4x8, paper": ("58x256 sets", 4, 8, "paper", CAPPED),
    "24x32 on 8, visits": ("24x32 all", 1, 8, "joint", CAPPED),
    "24x32 on 8, time": ("24x32 all", 1, 8, "joint", {"objective": "time"}),
    "24x32 on 8, crossing": ("24x32 all", 1, 8, "joint", {**CAPPED, "regime": "follow"}),
    "24x32 on 2x4x5, time": (
        *("24x32 all", 2, 4, "joint"),
        {"objective": "time", "slots_per_device": 5},
    ),
    "8x16 on 4, visits": ("8x16 all", 1, 4, "joint", CAPPED),
    "8x16 on 4, time": ("8x16 all", 1, 4, "joint", {"objective": "time"}),
    "8x16 on 4, follow": ("8x16 all", 1, 4, "joint", {"objective": "time", "regime": "follow"}),
}
HANG = 600  # seconds beyond the limit


def statistics(name: str, cache: Path) -> Path:
    """Return the file of generated statistics, made where it is not there yet."""
    path = cache / f"{name.replace(' ', '-')}.npz"
    if not path.exists():
        layers, experts, top_k, tokens, window, counted = TRAFFIC[name]
        trace = routing(layers, experts, top_k, tokens=tokens)
        mt.RoutingStatistics.from_trace(trace, window=window, **counted).save(path)
    return path


def solved(name: str, path: Path, limit: float) -> dict[str, Any]:
    """Solve an instance under a limit in this process, and return what is printed."""
    _, nodes, per_node, method, arguments = INSTANCES[name]
    counted = mt.RoutingStatistics.load(path)
    topology = mt.Topology(nodes * per_node, devices_per_node=per_node)
    begin = time.perf_counter()
    problem = mt.Problem(counted, topology, **arguments)
    built = time.perf_counter() - begin

    late: list[float] = []
    watch = threading.Timer(limit, lambda: late.append(time.process_time()))
    watch.daemon = True
    if np.isfinite(limit):
        watch.start()
    begin, used = time.perf_counter(), time.process_time()
    result = mt.solve(problem, method, time_limit=limit)
    seconds, at_end = time.perf_counter() - begin, time.process_time()
    watch.cancel()
    objective = mt.Objective(problem)
    start = mt.Placement(balanced(problem), num_experts=problem.experts)
    return {
        "built": built,
        "seconds": seconds,
        "reported": result.seconds,
        "cpu": at_end - used,
        "late": at_end - late[0] if late else 0.0,
        "status": result.status,
        "objective": result.objective,
        "excess": float(problem.caps.excess(result.placement).sum()),
        "start": objective.value(start),
        "start_excess": float(problem.caps.excess(start).sum()),
    }


def row(name: str, limit: float, of: dict[str, Any]) -> str:
    """Return the line of a solve."""
    over = of["seconds"] - limit
    mark = "*" if over > 0.1 * limit + 0.2 else " "
    behind = (of["excess"], of["objective"]) > (of["start_excess"], of["start"])
    worse = behind and INSTANCES[name][3] == "joint"
    return (
        f"{name:32} {limit:6.2f} {of['seconds']:7.2f} {of['reported']:7.2f} "
        f"{max(over, 0):+7.2f}{mark} {of['late']:6.2f} {of['cpu']:7.2f} {of['built']:6.2f}"
        f"  {of['objective']:10.4f} {of['start']:10.4f}{' worse' if worse else ''}"
        f"  {of['status']}"
    )


def main() -> None:
    """Print the table."""
    given = arguments(
        __doc__, {"names": []}, limits=[0.05, 0.5, 5.0, 20.0], cache=Path, child=False
    )
    if given.child:
        name, path = given.names
        print(json.dumps(solved(name, Path(path), given.limits[0])))
        return
    with tempfile.TemporaryDirectory() as made:
        cache = given.cache or Path(made)
        cache.mkdir(parents=True, exist_ok=True)
        print(
            f"{'instance':32} {'limit':>6} {'seconds':>7} {'said':>7} {'beyond':>7}  {'late':>6} "
            f"{'cpu':>7} {'built':>6}  {'objective':>10} {'balance':>10}"
        )
        for name in INSTANCES:
            if given.names and not any(part in name for part in given.names):
                continue
            path = statistics(INSTANCES[name][0], cache)
            for limit in given.limits:
                command = [sys.executable, __file__, "--child", name, str(path)]
                command += ["--limits", str(limit)]
                done = subprocess.run(
                    command,
                    check=False,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=HANG + (limit if np.isfinite(limit) else HANG),
                )
                if done.returncode:
                    print(f"{name:32} {limit:6.2f} failed with status {done.returncode}")
                    continue
                print(row(name, limit, json.loads(done.stdout)), flush=True)


if __name__ == "__main__":
    main()
