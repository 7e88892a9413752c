"""Large neighbourhoods: a few devices, a stretch of layers, everything else as it is.

What two or three alike devices hold can be dealt anew without changing any cost to the others, so
a neighbourhood is a joint problem of its own, only smaller: for the complete chain over all layers
at once where partitions are few, and for the co-location programme through HiGHS over as many
layers as it can take. Layers next to the
stretch keep their partition; whatever lies behind follows by exchanging names of devices, free of
charge.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver.bounds.caps import raised
from moetuner.solver.exact.partitions import STEPS_PER_SECOND
from moetuner.solver.milp.colocation import Joint, Model, Relation, entries_of
from moetuner.solver.result import Candidate, Limits, Progress, Status
from moetuner.solver.search.traffic import heuristic

# Triangle rows of a neighbourhood for HiGHS: seconds at the most.
ROWS = 12_000
# Entries at the most that the chain is tried with, on 2 and on 3 devices: 6435 and 5775 partitions.
CHAIN_ENTRIES = {2: 16, 3: 12}
# Entries of a neighbourhood at the most: a single layer of more is too much for HiGHS.
ENTRIES = 40
# Nodes of HiGHS's search tree, and steps of the chain (see `bound.STEPS`), per neighbourhood.
NODES = 3
ROUNDS = 4  # of triangles, where they are added on demand
STEPS = 2_000_000_000
SECONDS = 2.0  # for HiGHS on one neighbourhood, where time is limited at all
# Passes over all neighbourhoods, at the most, and the search's share of the time between them.
PASSES = 4
SEARCH_SHARE = 0.2

Devices = NDArray[np.int64]


def neighbourhood(problem: Problem, *, seed: int, limits: Limits, start: Candidate) -> Candidate:
    """Improve a placement by neighbourhoods and the search in turn, while that pays.

    Parameters
    ----------
    problem
        Of any size; links of one tier, or of two (then neighbourhoods lie within nodes).
    seed
        For the order of the neighbourhoods, HiGHS and the search.
    limits
        Of them, ``time_limit``, ``threads`` and ``progress`` apply.
    start
        To begin from. Where it breaks a cap, that layer's cap becomes its largest device load.

    Returns
    -------
    Candidate
        Never worse than the start. ``details`` counts what was tried and what it gained.
    """
    search = _Search(problem, start, limits)
    random = np.random.default_rng(seed)
    status: Status = "feasible"
    try:
        for turn in range(PASSES):
            before = search.cost
            every = search.neighbourhoods()
            # All layers first: the chain makes short work of them.
            order = random.permutation(len(every))
            for at in sorted(order, key=lambda at: every[at].rank):
                if search.left() == 0:
                    break
                if search.improve(every[at], seed):
                    return search.candidate("interrupted")
            if search.cost == before or turn == PASSES - 1 or search.left() == 0:
                break
            if search.anneal(seed + turn + 1):
                return search.candidate("interrupted")
    except KeyboardInterrupt:
        return search.candidate("interrupted")
    if search.left() == 0:
        status = "time_limit"
    return search.candidate(status)


@dataclass(frozen=True)
class _Stretch:
    """A neighbourhood: devices, and layers from ``first`` to before ``end``."""

    devices: tuple[int, ...]
    first: int
    end: int

    @property
    def rank(self) -> tuple[int, int]:
        """Long stretches first, then few devices."""
        return self.first - self.end, len(self.devices)


@dataclass
class _Gain:
    """Neighbourhoods tried in one way, how many were better, and what they saved."""

    tried: int = 0
    better: int = 0
    saved: int = 0


class _Search:
    """The best placement so far, and the ways to better it."""

    def __init__(self, problem: Problem, start: Candidate, limits: Limits) -> None:
        self.problem, self.start, self.limits = problem, start, limits
        self.begin = time.monotonic()
        self.slots = start.slots
        self.objective = Objective(problem)
        self.cost = self.objective.cost(Placement(start.slots, num_experts=problem.experts))
        self.caps = problem.caps.kept(start.slots)
        self.gains = {"chain": _Gain(), "highs": _Gain(), "search": _Gain()}
        self.joint = Joint.of(problem, self.caps)
        P, E = problem.devices * problem.slots, problem.experts

        def padded(table: NDArray[np.uint64] | None) -> NDArray[np.uint64] | None:
            return None if table is None else np.pad(table, ((0, 0), (0, P - E), (0, P - E)))

        if self.joint is not None:
            load = np.pad(self.joint.load, ((0, 0), (0, P - E)))
            pairs = padded(self.joint.transitions), padded(self.joint.coactivation)
            self.joint = replace(self.joint, load=load, transitions=pairs[0], coactivation=pairs[1])

    def left(self) -> float | None:
        """Seconds left; None without a limit."""
        limit = self.limits.time_limit
        return None if limit is None else max(limit - (time.monotonic() - self.begin), 0.0)

    def neighbourhoods(self) -> list[_Stretch]:
        """All layers where the chain can take them, and stretches of layers for HiGHS."""
        problem, joint = self.problem, self.joint
        if joint is None:
            return []
        size = joint.relations[0].devices if len(joint.relations) == 2 else problem.devices
        found = []
        for count in (2, 3):
            entries = count * problem.slots
            # Each layer more brings some 7/2 P^3 triangle rows; stretches overlap by half.
            length = min(max(ROWS // max(7 * entries**3 // 2, 1), 1), problem.layers)
            begins = range(0, problem.layers - length + 1, max(length // 2, 1))
            for devices in itertools.combinations(range(problem.devices), count):
                if len({device // size for device in devices}) > 1:
                    continue
                if entries <= CHAIN_ENTRIES[count]:
                    found.append(_Stretch(devices, 0, problem.layers))
                if entries <= ENTRIES and length < problem.layers:
                    found += [_Stretch(devices, at, at + length) for at in begins]
        return found

    def improve(self, stretch: _Stretch, seed: int) -> bool:
        """Deal what some devices hold in a stretch of layers anew; true if interrupted."""
        devices, first, end = stretch.devices, stretch.first, stretch.end
        problem, joint = self.problem, self.joint
        assert joint is not None
        device_of = entries_of(self.slots, problem.experts)
        # Layers beside the stretch take part, with their partition fixed.
        begin, stop = max(first - 1, 0), min(end + 1, problem.layers)
        if joint.boundaries == 0:
            begin, stop = first, end
        held = np.isin(device_of[begin:stop], devices)
        entry = np.nonzero(held)[1].reshape(stop - begin, -1)
        here = np.searchsorted(devices, device_of[np.arange(begin, stop)[:, None], entry])
        part = _part(joint, begin, entry, len(devices))
        if begin == 0 and stop == problem.layers:
            left = self.left()
            steps = STEPS if left is None else min(STEPS, int(left * STEPS_PER_SECOND))
            solved = _by_chain(part, steps, self.limits.threads)
            if solved is not None:
                self._take("chain", device_of, devices, begin, entry, here, solved)
            if solved is not None or part.triangle_rows > 4 * ROWS:
                return False
        layer = np.arange(begin, stop)
        model = Model(part, fixed=(layer < first) | (layer >= end), device_of=here)
        read, interrupted = None, False
        _, status = model.tighten(self.cost, self.left)
        for _ in range(ROUNDS if status == "feasible" else 0):
            left = self.left()
            solution = model.ilp.solve(
                start=model.values(here),
                seed=seed,
                absolute_gap=model.absolute_gap,
                nodes=NODES,
                time_limit=None if left is None else min(left, SECONDS),
            )
            assert solution.values is not None
            read, interrupted = model.device_of(solution.values), solution.status == "interrupted"
            if read is not None or interrupted or not model.separate(solution.values):
                break
        self._take("highs", device_of, devices, begin, entry, here, here if read is None else read)
        return interrupted or status == "interrupted"

    def anneal(self, seed: int) -> bool:
        """Search from the best so far; true if interrupted."""
        left = self.left()
        limits = Limits(None if left is None else left * SEARCH_SHARE, threads=self.limits.threads)
        found = heuristic(self.problem, seed=seed, limits=limits, initial=(self.slots,))
        self._keep("search", found.slots)
        return found.status == "interrupted"

    def _take(
        self,
        way: str,
        device_of: Devices,
        devices: tuple[int, ...],
        begin: int,
        entry: Devices,
        here: Devices,
        solved: Devices,
    ) -> None:
        """Put a part's solution [layers, entries of the part] back into the whole."""
        named = solved
        if self.joint is not None and self.joint.boundaries:
            # A first layer that keeps its partition keeps its names; elsewhere any will do.
            names = np.arange(len(devices))
            if begin > 0:
                names[solved[0]] = here[0]
            named = names[solved]
        whole = device_of.copy()
        chosen = np.asarray(devices)
        for at, layer in enumerate(range(begin, begin + len(entry))):
            whole[layer, entry[at]] = chosen[named[at]]
        stop = begin + len(entry)
        if stop < len(whole) and self.joint is not None and self.joint.boundaries:
            # The last layer has kept its partition: later layers follow its change of names.
            follow = np.arange(self.problem.devices)
            follow[chosen[here[-1]]] = chosen[named[-1]]
            whole[stop:] = follow[whole[stop:]]
        placement = Placement.from_assignment(
            whole[:, : self.problem.experts],
            self.problem.devices,
            slots_per_device=self.problem.slots,
        )
        self._keep(way, placement.slots)

    def _keep(self, way: str, slots: NDArray[np.int32]) -> None:
        """Keep a placement if it costs less under the same caps."""
        gain = self.gains[way]
        gain.tried += 1
        cost = self.objective.cost(Placement(slots, num_experts=self.problem.experts))
        if cost < self.cost and (self.problem.caps.kept(slots) <= self.caps).all():
            gain.better += 1
            gain.saved += self.cost - cost
            self.slots, self.cost = slots, cost
        if self.limits.progress is not None:
            share = self.cost / self.objective.scale
            bound, scale = self.start.bound, self.objective.scale
            seconds, known = time.monotonic() - self.begin, None if bound is None else bound / scale
            self.limits.progress(Progress(seconds, "neighbourhood", share, known))

    def candidate(self, status: Status) -> Candidate:
        """Return the best so far, with the bound that the start came with."""
        told = raised(self.problem, self.caps, threads=self.limits.threads)
        details = {**self.start.details, **told}
        details["neighbourhood"] = {way: vars(gain) for way, gain in self.gains.items()}
        bound = self.start.bound
        if bound is not None and bound >= self.cost:
            status = "optimal"
        return replace(self.start, slots=self.slots, status=status, details=details)


def _part(joint: Joint, begin: int, entry: Devices, devices: int) -> Joint:
    """Cut the entries [layers, P'] of some devices out of a problem, from layer ``begin`` on."""
    layers = np.arange(begin, begin + len(entry))
    transitions = coactivation = None
    if joint.transitions is not None:
        left, right = entry[:-1, :, None], entry[1:, None, :]
        transitions = np.ascontiguousarray(joint.transitions[layers[:-1, None, None], left, right])
    if joint.coactivation is not None:
        pairs = layers[:, None, None], entry[:, :, None], entry[:, None, :]
        coactivation = np.ascontiguousarray(joint.coactivation[pairs])
    return Joint(
        np.ascontiguousarray(joint.load[layers[:, None], entry]),
        joint.caps[layers],
        transitions,
        coactivation,
        devices,
        joint.slots,
        (Relation(1, joint.relations[-1].saves),),
    )


def _by_chain(part: Joint, steps: int, threads: int | None) -> Devices | None:
    """Device of every entry at the optimum of a part; None where partitions are too many."""
    found = _core.exact_chain(
        part.load,
        np.repeat(part.caps[:, None], part.devices, axis=1),
        1 - np.eye(part.devices, dtype=np.int64),
        part.slots,
        transitions=part.transitions,
        coactivation=part.coactivation,
        work=steps,
        threads=threads,
    )
    return None if found is None else entries_of(found[0], part.load.shape[1])
