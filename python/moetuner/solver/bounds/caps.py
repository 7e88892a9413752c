"""Load caps that a placement breaks: whether any placement could have kept them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.caps import ROUNDING
from moetuner.solver.bounds.loads import least_slowest
from moetuner.solver.result import CapsDetails

Floats = NDArray[np.float64]

# A proof is about placements of this kind where slots are left over without copies.
SINGLE = " with one copy of each expert"


def cap_report(
    problem: Problem, slots: NDArray[np.int32], *, threads: int | None = None
) -> CapsDetails:
    """Return the caps that slots [L,D,S], with any copies on any devices, exceed."""
    placement = Placement(slots, num_experts=problem.experts)
    layers = np.flatnonzero(problem.caps.excess(placement))
    if not layers.size:
        return CapsDetails()
    alike = problem.topology.has_equal_devices and len(np.unique(problem.capacity)) == 1
    if alike and not placement.has_copies and not problem.rules.some and not problem.may_copy:
        return _of_singles(problem, problem.caps.raised_for(slots), threads)
    total = problem.load.astype(np.float64)
    mean = total.sum(axis=1) / problem.topology.speed_of_device.sum()
    least, peaks = least_slowest(problem, total[None])[0], problem.caps.peaks(placement)
    cap = (problem.max_imbalance or 1.0) * (1 + ROUNDING)
    return CapsDetails(
        {layer: float(peaks[layer] / mean[layer]) for layer in layers.tolist()},
        {
            layer: (float(least[layer] / mean[layer]), float(peaks[layer] / mean[layer]))
            for layer in layers.tolist()
            if least[layer] / mean[layer] > cap
        },
    )


def _of_singles(problem: Problem, caps: NDArray[np.uint64], threads: int | None) -> CapsDetails:
    """Return which caps [L] are above the problem's, and which of these had to be."""
    cap = problem.caps.whole
    layers = np.flatnonzero(caps > cap)
    mean = problem.load[layers].sum(axis=1, dtype=np.float64) / problem.devices
    peaks = _core.smallest_peaks(
        problem.load[layers], problem.devices, problem.slots, caps[layers], threads=threads
    )
    return CapsDetails(
        dict(zip(layers.tolist(), (caps[layers] / mean).tolist(), strict=True)),
        {
            int(layer): (float(bound / scale), float(peak / scale))
            for layer, scale, (peak, bound) in zip(layers, mean, peaks, strict=True)
            if bound > int(cap[layer])
        },
    )


def are_least(caps: CapsDetails) -> bool:
    """Return whether the caps that were raised, if any, are proven to be the least there are."""
    return all(
        layer in caps.infeasible and cap <= caps.infeasible[layer][0] * (1 + ROUNDING)
        for layer, cap in caps.raised.items()
    )


def scope(problem: Problem, caps: CapsDetails) -> str:
    """Return of which placements a bound on a solved problem, with such caps, is one."""
    which = "placements" + (", copies included" if problem.may_copy else SINGLE)
    if not problem.caps.some:
        return which
    which += f" under the load cap {problem.max_imbalance:g}"
    if caps.raised:
        first = [f"{cap:.4f} in layer {layer}" for layer, cap in list(caps.raised.items())[:3]]
        which += f", raised to {', '.join(first)}"
        which += f" and in {len(caps.raised) - 3} more" if len(caps.raised) > 3 else ""
    return which


def remarks(problem: Problem, caps: CapsDetails) -> list[str]:
    """Return a cap report in words, a line per fact."""
    lines, single = [], SINGLE if problem.stays_single else ""
    if caps.infeasible:
        needs = [
            f"layer {layer} needs {low:.4f}" + (f" to {high:.4f}" if high > low else "")
            for layer, (low, high) in caps.infeasible.items()
        ]
        more = f", and {len(needs) - 3} more" if len(needs) > 3 else ""
        lines.append(
            f"no placement{single} keeps the load cap {problem.max_imbalance:g} in {len(needs)} of "
            f"{problem.layers} layers: {', '.join(needs[:3])}{more}."
        )
    open_ = {at: cap for at, cap in caps.raised.items() if at not in caps.infeasible}
    if open_:
        lines.append(
            f"found no placement{single} under the load cap {problem.max_imbalance:g} in "
            f"{len(open_)} of {problem.layers} layers and allowed up to "
            f"{max(open_.values()):.3f} there."
        )
    return lines
