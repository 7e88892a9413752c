"""Baselines: placements of other people's policies, with which every method is compared.

A baseline is a function that takes a run and a budget, and offers one placement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.arrays import Floats, Integers, Slots
from moetuner.solver.budget import Budget
from moetuner.solver.rebalancing import slowest
from moetuner.solver.run import Run
from moetuner.solver.stages import SEARCH
from moetuner.solver.stages.floor import FLOOR, balanced
from moetuner.solver.terms import core_layers, make_site
from moetuner.statistics import RoutingStatistics


def contiguous(run: Run, _: Budget) -> None:
    """Place experts in blocks, as engines load them; the first devices get one more if need be.

    Like every baseline that ignores loads, it keeps slots, but neither pins, bans nor caps.
    """
    _deal(run, lambda device, turn: np.argsort(device, kind="stable"))


def round_robin(run: Run, _: Budget) -> None:
    """Place expert e on device e mod D, skipping full devices."""
    _deal(run, lambda device, turn: np.lexsort((device, turn)))


def random(run: Run, _: Budget) -> None:
    """Place experts at random in every layer, equally many on each device as far as slots allow."""
    generator = np.random.default_rng(run.seed)
    _deal(run, lambda device, turn: generator.permutation(np.lexsort((device, turn))))


def lpt(run: Run, budget: Budget) -> None:
    """Place by longest processing time first (Graham, 1969), then exchange: balance alone.

    With spare slots it also adds copies of the heaviest experts. It keeps slots, pins and bans.
    """
    problem = run.problem
    if problem.may_copy or not _is_even(problem):
        run.offer(balanced(problem), "lpt")
        return
    device_of, _, interrupted = _core.pack(
        problem.load,
        problem.devices,
        (0, problem.slots),
        time_limit=budget.seconds_left,
        threads=budget.threads,
    )
    if interrupted:
        raise KeyboardInterrupt
    slots = Placement.from_assignment(
        device_of, problem.devices, slots_per_device=problem.slots
    ).slots
    run.offer(slots, "lpt")


def eplb(run: Run, budget: Budget) -> None:
    """Place as DeepSeek's load balancer does, by its global policy: github.com/deepseek-ai/EPLB.

    It adds copies where the load per copy is largest, then puts the heaviest copy first, on the
    lightest device. Loads are summed over all windows. No device gets a second copy of an expert,
    which would be useless. If DeepSeek's own code balances a layer better with such copies, the
    layer is searched for a placement as good. It keeps slots, pins and bans.
    """
    problem = run.problem
    slots = balanced(problem, trials=0)
    if problem.may_copy and _is_even(problem):
        load = problem.load[None].astype(np.float64)
        peaks = slowest(load, slots)
        wanted = deepseek_peaks(problem.load, problem.devices, problem.slots)
        behind = np.flatnonzero(peaks > wanted * (1 + 1e-9))
        if behind.size:
            better = slots.copy()
            better[behind] = _annealed(problem, behind, run.seed, budget.threads)
            behind = behind[(slowest(load, better) < peaks)[behind]]
            slots[behind] = better[behind]
    run.offer(slots, "eplb")


def _annealed(problem: Problem, layers: Integers, seed: int, threads: int | None) -> Slots:
    """Return layers searched for the least load of the heaviest device, from ``balance``."""
    statistics = RoutingStatistics.from_load(problem.load[layers])
    subproblem = Problem(statistics, problem.topology, slots_per_device=problem.slots)
    load = subproblem.load[None].astype(np.float64)
    search = core_layers(load, np.ones(1), make_site(subproblem, nearest=False))
    start = balanced(problem)[layers]
    return search.place(start, trials=effort.CATCH_UP, restarts=2, seed=seed, threads=threads)[0]


def exflow(run: Run, budget: Budget) -> None:
    """Search for the least crossing of single copies, as ExFlow does (Yao et al., 2024)."""
    problem = replace(run.problem, regime="follow", max_imbalance=None, objective="traffic")
    inner = run.run_inner(
        (FLOOR, SEARCH), budget.muted(), problem=problem.without_copies() or problem
    )
    run.details = inner.details
    run.offer(inner.best.slots, "exflow", interrupted=inner.interrupted)


def deepseek_peaks(load: NDArray[np.uint64], devices: int, slots: int) -> Floats:
    """Compute the largest device load [L] that DeepSeek's own code reaches, of loads [L,E].

    Every device has as many slots, and may get two copies of one expert: the lightest device with
    a free slot gets the heaviest copy that is left.
    """
    weight = load.astype(np.float64)
    layer = np.arange(len(weight))
    copies = np.ones_like(weight)
    expert = np.tile(np.arange(weight.shape[1]), (len(weight), 1))
    for _ in range(devices * slots - weight.shape[1]):
        heaviest = (weight / copies).argmax(axis=1)
        copies[layer, heaviest] += 1
        expert = np.column_stack([expert, heaviest])
    per_copy = np.take_along_axis(weight / copies, expert, axis=1)
    per_copy = -np.sort(-per_copy, axis=1)
    sums, free = np.zeros((len(weight), devices)), np.full((len(weight), devices), slots)
    for item in per_copy.T:
        at = np.where(free > 0, sums, np.inf).argmin(axis=1)
        sums[layer, at] += item
        free[layer, at] -= 1
    peaks: Floats = sums.max(axis=1)
    return peaks


def _is_even(problem: Problem) -> bool:
    """Return whether all devices are alike, and no rule sets them apart."""
    alike = problem.topology.has_equal_devices and len(np.unique(problem.capacity)) == 1
    return alike and not problem.rules.exist


def _deal(run: Run, order: Callable[[Integers, Integers], Integers]) -> None:
    """Offer experts 0, 1, ... dealt to the places of every layer, evenly as far as slots allow.

    ``order`` sorts the places, given the device and the turn of each [E].
    """
    problem = run.problem
    device_of = np.empty((problem.layers, problem.num_experts), dtype=np.int64)
    for layer, capacity in enumerate(problem.capacity):
        # Turn after turn, every device that has a slot left gets an expert.
        turn, device = np.nonzero(np.arange(problem.slots)[:, None] < capacity)
        turn, device = turn[: problem.num_experts], device[: problem.num_experts]
        device_of[layer] = device[order(device, turn)]
    placement = Placement.from_assignment(
        device_of, problem.devices, slots_per_device=problem.slots
    )
    run.offer(placement.slots, "dealt")
