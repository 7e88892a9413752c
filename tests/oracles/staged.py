"""Stages of the solver by themselves: runs through a few, for what `solve` does not show."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import moetuner as mt
from moetuner.solver.run import Run, Stage


def staged(problem: mt.Problem, *stages: Stage, start: NDArray[np.int32]) -> Run:
    """Return a run through stages, from slots [L,D,S] that are offered first."""
    run = Run(problem)
    run.offer(start, "start", is_start=True)
    run.run_stages(stages)
    return run
