"""The joint method: what it reaches, and how far from the optimum that is proven to be.

    python bench/joint.py [--trace gpt-oss-20b.npz] [--quick]

On a recorded trace (where one is given): half of its sequences seen, the other half judged, after
1 and 20 seconds; then the whole trace, search and bound apart. On generated routing: the paper's
size, 48 x 128, and the sizes of very large models, beside the transitions alone (`exflow`, no cap)
and the paper's two stages.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from instances import problem

import moetuner as mt
from moetuner.solver.bounds.pairs import bound
from moetuner.solver.budget import Budget


def recorded(path: Path, *, quick: bool) -> None:
    """Print what is reached on a trace."""
    trace = mt.RoutingTrace.load(path)
    print(f"{path.name}, cap 1.05\n")
    print(f"{'devices':>7} {'seconds':>7} {'seen':>8} {'unseen':>8} {'gap':>7}   half seen, joint")
    for devices in (4, 8):
        seen, unseen = trace.split(0.5, seed=0)
        statistics = mt.RoutingStatistics.from_trace(seen, coactivation=False)
        half = mt.Problem(statistics, mt.Topology(devices), regime="follow", max_imbalance=1.05)
        for limit in (1.0,) if quick else (1.0, 20.0):
            result = mt.solve(half, time_limit=limit)
            crossing = mt.evaluate(result.placement, unseen).crossing
            row = f"{devices:7} {result.seconds:7.2f} {result.objective:8.4f} {crossing:8.4f}"
            print(row, f"{100 * (result.gap or 0):6.2f}%")

    print(f"\n{'devices':>7} {'search':>7} {'crossing':>9} {'bound':>6} {'at least':>9} {'gap':>7}")
    statistics = mt.RoutingStatistics.from_trace(trace, coactivation=False)
    for devices in (4, 8):
        whole = mt.Problem(statistics, mt.Topology(devices), regime="follow", max_imbalance=1.05)
        for limit, share in ((5.0, 3.0),) if quick else ((5.0, 3.0), (20.0, 10.0)):
            result = mt.solve(whole, "heuristic", time_limit=limit)
            caps = whole.caps.kept(result.placement.slots)
            begin = time.perf_counter()
            proven = bound(whole, caps, budget=Budget(time_limit=share))
            seconds = time.perf_counter() - begin
            assert proven is not None
            least = proven.value / mt.Objective(whole).scale
            gap = 100 * (result.objective - least) / result.objective
            row = f"{devices:7} {result.seconds:6.1f}s {result.objective:9.5f} {seconds:5.1f}s"
            print(row, f"{least:9.5f} {gap:6.2f}%")


def generated(name: str, limit: float | None) -> None:
    """Print a row per method on generated routing."""
    instance = problem(name)
    print(f"\n{name} on {instance.devices} devices, cap 1.05")
    print(
        f"{'method':>22} {'seconds':>8} {'objective':>9} {'imbalance':>9} {'gap':>7} {'status':>10}"
    )
    for method, options in (
        ("contiguous", {}),
        ("lpt", {}),
        ("paper", {}),
        ("exflow", {"time_limit": limit}),
        ("joint", {"time_limit": limit}),
    ):
        result = mt.solve(instance, method, **options)
        balance = mt.evaluate(result.placement, instance.statistics).imbalance_total
        gap = "-" if result.gap is None else f"{100 * result.gap:.2f}%"
        row = f"{method:>22} {result.seconds:8.2f} {result.objective:9.4f} {balance:9.3f}"
        print(row, f"{gap:>7} {result.status:>10}", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.trace is not None:
        recorded(arguments.trace, quick=arguments.quick)
    generated("paper", None)
    if not arguments.quick:
        generated("48x128", 60.0)
        for name in ("94x128", "58x256", "61x384"):
            generated(name, 9.0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory {memory:.0f} MiB")


if __name__ == "__main__":
    main()
