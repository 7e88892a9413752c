"""What people do without moetuner: the placements that every method is compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.balance import PATIENT, times
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver.heuristic import heuristic
from moetuner.solver.result import Candidate, Limits


def contiguous(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Experts in blocks, as engines load them; the first devices take what is left over."""
    blocks = np.array_split(np.arange(problem.experts), problem.devices)
    device_of = np.repeat(np.arange(problem.devices), [len(block) for block in blocks])
    return _everywhere(problem, device_of)


def round_robin(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Expert e on device e mod D."""
    return _everywhere(problem, np.arange(problem.experts) % problem.devices)


def random(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Equal counts, experts drawn at random in every layer."""
    generator = np.random.default_rng(seed)
    even = np.arange(problem.experts) % problem.devices
    return _candidate(
        problem, np.stack([generator.permutation(even) for _ in range(problem.layers)])
    )


def lpt(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Longest processing time first (Graham, 1969), then exchanges: balance, whatever the traffic.

    With more slots than experts, copies of the heaviest experts as well.
    """
    return _packed(problem, limits, improve=True)


def eplb(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """DeepSeek's expert-parallel load balancer, global policy: github.com/deepseek-ai/EPLB.

    Copies by the largest load per copy, then the heaviest copy first to the lightest device. Loads
    are summed over all windows. No device gets a second copy of an expert, which would serve
    nobody.
    """
    return _packed(problem, limits, improve=False)


def exflow(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Transitions alone, loads ignored: the objective of ExFlow (Yao et al., 2024)."""
    return heuristic(
        replace(problem, regime="follow", max_imbalance=None, objective="traffic"),
        seed=seed,
        limits=limits,
    )


def _packed(problem: Problem, limits: Limits, *, improve: bool) -> Candidate:
    if problem.rooms.sum(axis=1).min() >= problem.experts + problem.devices:
        slots = _core.replicate_experts(
            problem.load.astype(np.float64),
            problem.rooms,
            times(problem.topology.speed_of_device),
            trials=PATIENT if improve else 0,
        )
        return Candidate(slots)
    return _candidate(
        problem,
        _core.lpt(
            problem.load, problem.devices, problem.slots, improve=improve, threads=limits.threads
        ),
    )


def _everywhere(problem: Problem, device_of: NDArray[np.int64]) -> Candidate:
    """Use one layer's devices [E] in all layers."""
    return _candidate(problem, np.tile(device_of, (problem.layers, 1)))


def _candidate(problem: Problem, device_of: NDArray[np.integer]) -> Candidate:
    placement = Placement.from_assignment(
        device_of, problem.devices, slots_per_device=problem.slots
    )
    return Candidate(placement.slots)
