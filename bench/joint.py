"""The joint method: what it reaches, and how far from the optimum that is proven to be.

    python bench/joint.py [--trace gpt-oss-20b.npz] [--quick]

On a recorded trace (where one is given): half of its sequences seen, the other half judged, after
1 and 20 seconds; then the whole trace, search and bound apart. On generated routing: the paper's
size, 48 x 128, and the sizes of very large models, beside the transitions alone (`exflow`, no cap)
and the paper's two stages.
"""

from __future__ import annotations

import resource
from pathlib import Path

from harness import Table, arguments, timed
from instances import problem

import moetuner as mt
from moetuner.solver.bounds.pairs import bound
from moetuner.solver.budget import Budget


def recorded(path: Path, *, quick: bool) -> None:
    """Print what is reached on a trace."""
    trace = mt.RoutingTrace.load(path)
    print(f"{path.name}, cap 1.05\n")
    row = Table(
        "devices 7d", "seconds 7.2f", "seen 8.4f", "unseen 8.4f", "gap 7.2%", "half seen, joint 1s"
    )
    for devices in (4, 8):
        seen, unseen = trace.split(0.5, seed=0)
        statistics = mt.RoutingStatistics.from_trace(seen, window=None, coactivation=False)
        half = mt.Problem(statistics, mt.Topology(devices), regime="follow", max_imbalance=1.05)
        for limit in (1.0,) if quick else (1.0, 20.0):
            result = mt.solve(half, time_limit=limit)
            crossing = mt.evaluate(result.placement, unseen, window=None).crossing
            row(devices, result.seconds, result.objective, crossing, result.gap or 0.0)

    row = Table(
        *("\ndevices 7d", "search, s 9.1f", "crossing 9.5f", "bound, s 9.1f"),
        *("at least 9.5f", "gap 7.2%"),
    )
    statistics = mt.RoutingStatistics.from_trace(trace, window=None, coactivation=False)
    for devices in (4, 8):
        whole = mt.Problem(statistics, mt.Topology(devices), regime="follow", max_imbalance=1.05)
        for limit, share in ((5.0, 3.0),) if quick else ((5.0, 3.0), (20.0, 10.0)):
            result = mt.solve(whole, "heuristic", time_limit=limit)
            caps = whole.caps.raised_for(result.placement.slots)
            proven, seconds, _ = timed(
                lambda of=whole, caps=caps, share=share: bound(of, caps, budget=Budget(share))
            )
            assert proven is not None
            least = proven.value / mt.Objective(whole).scale
            gap = (result.objective - least) / result.objective
            row(devices, result.seconds, result.objective, seconds, least, gap)


def generated(name: str, limit: float | None) -> None:
    """Print a row per method on generated routing."""
    instance = problem(name)
    print(f"\n{name} on {instance.devices} devices, cap 1.05")
    row = Table(
        *(
            "method 22s",
            "seconds 8.2f",
            "objective 9.4f",
            "imbalance 9.3f",
            "gap 7.2%",
            "status 10s",
        )
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
        gap = "-" if result.gap is None else result.gap
        row(method, result.seconds, result.objective, balance, gap, result.status)


def main() -> None:
    """Print all tables."""
    given = arguments(__doc__, trace=Path, quick=False)
    if given.trace is not None:
        recorded(given.trace, quick=given.quick)
    generated("paper", None)
    if not given.quick:
        generated("48x128", 60.0)
        for name in ("94x128", "58x256", "61x384"):
            generated(name, 9.0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory {memory:.0f} MiB")


if __name__ == "__main__":
    main()
