"""Load caps that a placement breaks: whether any placement could have kept them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.caps import ROUNDING
from moetuner.solver.bounds.loads import least_slowest
from moetuner.solver.exact.enumeration import contents_of, peaks_of
from moetuner.solver.result import Candidate

Floats = NDArray[np.float64]

# What placements are called that a proof is about, where slots are left over without copies.
SINGLE = " with one copy of each expert"


def raised(
    problem: Problem,
    kept: NDArray[np.uint64],
    *,
    threads: int | None = None,
) -> dict[str, Any]:
    """Return the caps that had to be raised, as entries of ``details``; none where all are kept.

    Parameters
    ----------
    problem
        What was placed.
    kept
        Caps [L] that its placement keeps.

    Returns
    -------
    dict
        Imbalances by layer. ``caps_raised`` has what was settled for; ``caps_infeasible``, for
        layers where it is proven that no placement keeps the cap, from where to where the smallest
        one lies that can be kept: twice the same number where that is known. Where there is room
        for copies nothing is proven: they may keep what single experts cannot, see `exceeded`.
    """
    asked = problem.caps.whole
    layers = np.flatnonzero(kept > asked)
    if not layers.size:
        return {}
    mean = problem.load[layers].sum(axis=1, dtype=np.float64) / problem.devices
    details: dict[str, Any] = {
        "caps_raised": {
            int(layer): float(kept[layer] / scale)
            for layer, scale in zip(layers, mean, strict=True)
        }
    }
    if problem.may_copy:
        return details
    peaks = _core.smallest_peaks(
        problem.load[layers], problem.devices, problem.slots, kept[layers], threads=threads
    )
    for layer, scale, (found, bound) in zip(layers, mean, peaks, strict=True):
        if bound > int(asked[layer]):
            infeasible = details.setdefault("caps_infeasible", {})
            infeasible[int(layer)] = [float(bound / scale), float(found / scale)]
    return details


def told(problem: Problem, found: Candidate, *, threads: int | None = None) -> dict[str, Any]:
    """Return what `raised` tells of an answer: of the caps that it kept, or of what it exceeds."""
    if found.caps is not None:
        return raised(problem, found.caps, threads=threads)
    return exceeded(problem, found.slots)


def exceeded(problem: Problem, slots: NDArray[np.int32]) -> dict[str, Any]:
    """Return what `raised` does, of slots [L,D,S] with any copies on any devices."""
    placement = Placement(slots, num_experts=problem.experts)
    layers = np.flatnonzero(problem.caps.excess(placement))
    if not layers.size:
        return {}
    alike = problem.topology.has_equal_devices and len(np.unique(problem.capacity)) == 1
    if alike and not placement.has_copies and not problem.rules.some and not problem.may_copy:
        return raised(problem, problem.caps.kept(slots))
    total = problem.load.astype(np.float64)
    mean = total.sum(axis=1) / problem.topology.speed_of_device.sum()
    least, peaks = least_slowest(problem, total[None])[0], problem.caps.peaks(placement)
    details: dict[str, Any] = {"caps_raised": {}}
    for layer in layers.tolist():
        details["caps_raised"][layer] = float(peaks[layer] / mean[layer])
        lowest, known = least[layer], peaks[layer]
        contents = contents_of(problem, layer)
        if contents is not None:
            lowest = known = peaks_of(problem, layer, contents).min()
        if lowest / mean[layer] > (problem.max_imbalance or 1.0) * (1 + ROUNDING):
            infeasible = details.setdefault("caps_infeasible", {})
            infeasible[layer] = [float(lowest / mean[layer]), float(known / mean[layer])]
    return details


def settled(details: dict[str, Any]) -> bool:
    """Return whether the caps that were raised, if any, are proven to be the least there are."""
    infeasible = details.get("caps_infeasible", {})
    return all(
        layer in infeasible and cap <= infeasible[layer][0] * (1 + ROUNDING)
        for layer, cap in details.get("caps_raised", {}).items()
    )


def scope(problem: Problem, details: dict[str, Any]) -> str:
    """Return of which placements a bound on a solved problem, with these details, is one."""
    which = "placements" + (", copies included" if problem.may_copy else SINGLE)
    if not problem.caps.some:
        return which
    which += f" under the load cap {problem.max_imbalance:g}"
    caps = details.get("caps_raised", {})
    if caps:
        first = [f"{cap:.4f} in layer {layer}" for layer, cap in list(caps.items())[:3]]
        which += f", raised to {', '.join(first)}"
        which += f" and in {len(caps) - 3} more" if len(caps) > 3 else ""
    return which


def remarks(problem: Problem, details: dict[str, Any]) -> list[str]:
    """Return in words what `raised` has found, a line per fact."""
    lines, single = [], SINGLE if problem.stays_single else ""
    infeasible = details.get("caps_infeasible", {})
    if infeasible:
        needs = [
            f"layer {layer} needs {low:.4f}" + (f" to {high:.4f}" if high > low else "")
            for layer, (low, high) in infeasible.items()
        ]
        more = f", and {len(needs) - 3} more" if len(needs) > 3 else ""
        lines.append(
            f"no placement{single} keeps the load cap {problem.max_imbalance:g} in {len(needs)} of "
            f"{problem.layers} layers: {', '.join(needs[:3])}{more}."
        )
    open_ = {at: cap for at, cap in details.get("caps_raised", {}).items() if at not in infeasible}
    if open_:
        lines.append(
            f"found no placement{single} under the load cap {problem.max_imbalance:g} in "
            f"{len(open_)} of {problem.layers} layers and allowed up to "
            f"{max(open_.values()):.3f} there."
        )
    return lines
