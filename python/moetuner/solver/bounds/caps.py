"""Load caps that a placement breaks: whether any placement could have kept them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.caps import ROUNDING
from moetuner.serving import phases
from moetuner.solver.bounds.loads import least_slowest
from moetuner.solver.result import CapsDetails

# A proof is about placements of this kind where slots are left over without copies.
SINGLE = " with one copy of each expert"


def cap_report(
    problem: Problem, slots: NDArray[np.int32], *, threads: int | None = None
) -> CapsDetails:
    """Return the caps that slots [L,D,S] exceed, and those that no placement can keep."""
    placement = Placement(slots, num_experts=problem.num_experts)
    layers = np.flatnonzero(problem.caps.excess(placement))
    if not layers.size:
        return CapsDetails()
    load = problem.load[layers]
    alike = problem.topology.has_equal_devices and len(np.unique(problem.capacity)) == 1
    cap: NDArray[Any] = problem.caps.whole[layers]
    peaks: NDArray[Any] = problem.caps.raised_for(slots)[layers]
    reached: Any
    least: Any
    if alike and not placement.has_copies and not problem.rules.exist and not problem.may_copy:
        # In tokens, whatever the speed is that all devices share.
        mean = load.sum(axis=1, dtype=np.float64) / problem.devices
        sizes = (problem.devices, problem.slots)
        enclosed = _core.smallest_peaks(load, *sizes, peaks, threads=threads)
        reached, least = zip(*enclosed, strict=True)
    else:
        mean = load.sum(axis=1, dtype=np.float64) / problem.topology.speed_of_device.sum()
        cap = (problem.max_imbalance or 1.0) * (1 + ROUNDING) * mean
        reached = peaks = problem.caps.peaks(placement)[layers]
        least = least_slowest(problem, problem.load.astype(np.float64)[None])[0, layers]
    rows = list(zip(layers.tolist(), mean.tolist(), cap, peaks, reached, least, strict=True))
    raised, infeasible = {}, {}
    for layer, scale, cap_of_layer, peak, high, low in rows:
        raised[layer] = float(peak / scale)
        if low > cap_of_layer:
            infeasible[layer] = (float(low / scale), float(high / scale))
    return CapsDetails(raised, infeasible)


def are_least(caps: CapsDetails) -> bool:
    """Return whether every raised cap is proven to be as low as any placement allows."""
    return all(
        layer in caps.infeasible and cap <= caps.infeasible[layer][0] * (1 + ROUNDING)
        for layer, cap in caps.raised.items()
    )


def describe_scope(problem: Problem, caps: CapsDetails) -> str:
    """Return in words which placements a bound on a solved problem covers, under such caps."""
    which = "placements" + (" that may have copies" if problem.may_copy else SINGLE)
    if problem.aim.costs_loads and (where := phases.describe(problem.shares)):
        which += f" in {where}"
    if not problem.caps.exist:
        return which
    which += f" under the load cap {problem.max_imbalance:g}"
    if caps.raised:
        first = [f"{cap:.4f} in layer {layer}" for layer, cap in list(caps.raised.items())[:3]]
        which += f", raised to {', '.join(first)}"
        which += f" and in {len(caps.raised) - 3} more" if len(caps.raised) > 3 else ""
    return which
