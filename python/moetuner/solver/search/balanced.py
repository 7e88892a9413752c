"""Balance alone under a problem's rules: ``balance``, a floor of searches, and the quick method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.result import Candidate, Limits, Progress
from moetuner.solver.search.level import NOISE, NORM, quick_trials


def balanced(problem: Problem, *, trials: int = effort.PATIENT) -> NDArray[np.int32]:
    """Balance the load over all windows as ``balance`` does: slots [L,D,S] that keep all rules."""
    return _core.replicate_experts(
        problem.load.astype(np.float64),
        problem.capacity,
        problem.topology.time_of_device,
        trials=trials,
        copies=problem.may_copy,
        forbidden=problem.rules.forbidden,
        pinned=problem.rules.pinned,
    )


def quick(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Balance every window within milliseconds, as the plugins do, and look at nothing else.

    Never behind ``balance``. Keeps slots, pins and bans.
    """
    trials, windows = limits.iterations, problem.windows.searched
    if trials is None:
        trials = quick_trials(int(problem.capacity.sum(axis=1).max()), len(windows))
    levelled, interrupted = levelled_on(
        problem, windows.load, windows.weight, trials, seed=seed, limits=limits
    )
    # Where these windows are all that counts, the core has held it against a packing already.
    alike = problem.split != "nearest" and problem.topology.has_equal_devices
    alone = problem.goal == "balance" and windows.is_mean and problem.caps.over_speed is None
    if not (alike and alone):
        levelled = min((levelled, balanced(problem)), key=lambda slots: rank(problem, slots))
    return Candidate(levelled, "interrupted" if interrupted else "feasible")


def levelled_on(
    problem: Problem,
    load: NDArray[np.float64],
    weight: NDArray[np.float64],
    trials: int,
    *,
    mixed: float = 0.0,
    seed: int,
    limits: Limits,
) -> tuple[NDArray[np.int32], bool]:
    """Level windows [W,L,E] of so much weight [W] by trials of a layer, and say if interrupted."""

    def report(seconds: float, _: int | None) -> None:
        if limits.progress is not None:
            limits.progress(Progress(seconds, "layers"))

    layers = _core.Layers(
        np.ascontiguousarray(load),
        np.ascontiguousarray(weight, dtype=np.float64),
        problem.capacity,
        [0] * problem.devices,
        problem.topology.time_of_device.tolist(),
        nearest=False,
        norm=NORM,
        noise=NOISE,
        mixed=mixed,
    )
    layers.rule(forbidden=problem.rules.forbidden, pinned=problem.rules.pinned)
    begin = layers.construct(copies=problem.may_copy, windows=True, threads=limits.threads)
    return layers.place(
        begin,
        trials=trials,
        copies=problem.may_copy,
        empties=False,
        quick=True,
        seed=seed,
        time_limit=limits.time_limit,
        threads=limits.threads,
        progress=report if limits.progress is not None else None,
    )


def no_worse(problem: Problem, found: Candidate) -> Candidate:
    """Return what ``balance`` would place where a search for traffic ended behind it.

    Such searches know single copies only, and may have had no time at all.
    """
    slots = balanced(problem)
    if np.array_equal(slots, found.slots) or rank(problem, slots) >= rank(problem, found.slots):
        return found
    status = found.status if found.status in ("time_limit", "interrupted") else "feasible"
    return replace(
        found,
        slots=slots,
        status=status,
        bound=None,
        bound_source=None,
        details=found.details.searched(found_by="balance"),
        certificate=None,
        caps=None,
    )


def rank(problem: Problem, slots: NDArray[np.int32]) -> tuple[float, float]:
    """Return by how much slots exceed caps, and their value; lower is better."""
    placement = Placement(slots, num_experts=problem.experts)
    return float(problem.caps.excess(placement).sum()), Objective(problem).value(placement)
