"""Load caps that a placement breaks: whether any placement could have kept them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.problem import Problem


def raised(
    problem: Problem,
    kept: NDArray[np.uint64],
    *,
    asked: NDArray[np.uint64] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Tell of the caps that had to be raised, as entries of ``details``; none where all are kept.

    Parameters
    ----------
    problem
        What was placed.
    kept
        Caps that its placement keeps, per layer [L] or per layer and device [L,D].
    asked
        Caps that were asked for, likewise; the problem's by default.

    Returns
    -------
    dict
        Imbalances by layer. ``caps_raised`` has what was settled for; ``caps_infeasible``, for
        layers where it is proven that no placement keeps the cap, from where to where the smallest
        one lies that can be kept: twice the same number where that is known.
    """
    asked = problem.caps if asked is None else asked
    kept, asked = (caps.reshape(problem.layers, -1) for caps in (kept, asked))
    layers = np.flatnonzero((kept > asked).any(axis=1))
    if not layers.size:
        return {}
    kept, asked = kept.max(axis=1), asked.max(axis=1)
    mean = problem.load[layers].sum(axis=1, dtype=np.float64) / problem.devices
    peaks = _core.smallest_peaks(
        problem.load[layers], problem.devices, problem.slots, kept[layers], threads=threads
    )
    details: dict[str, Any] = {"caps_raised": {}}
    for layer, scale, (found, bound) in zip(layers, mean, peaks, strict=True):
        details["caps_raised"][int(layer)] = float(kept[layer] / scale)
        if bound > int(asked[layer]):
            infeasible = details.setdefault("caps_infeasible", {})
            infeasible[int(layer)] = [float(bound / scale), float(found / scale)]
    return details


def remarks(problem: Problem, details: dict[str, Any]) -> list[str]:
    """Say in words what `raised` has found, a line per fact."""
    lines = []
    infeasible = details.get("caps_infeasible", {})
    if infeasible:
        needs = [
            f"layer {layer} needs {low:.4f}" + (f" to {high:.4f}" if high > low else "")
            for layer, (low, high) in infeasible.items()
        ]
        more = f", and {len(needs) - 3} more" if len(needs) > 3 else ""
        lines.append(
            f"no placement keeps the load cap {problem.max_imbalance:g} in {len(needs)} of "
            f"{problem.layers} layers: {', '.join(needs[:3])}{more}."
        )
    open_ = {at: cap for at, cap in details.get("caps_raised", {}).items() if at not in infeasible}
    if open_:
        lines.append(
            f"found no placement under the load cap {problem.max_imbalance:g} in {len(open_)} of "
            f"{problem.layers} layers and allowed up to {max(open_.values()):.3f} there."
        )
    return lines
