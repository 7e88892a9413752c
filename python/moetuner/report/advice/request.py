"""The request of advise(): settings that all splits share, and the problems built from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moetuner.cost.memory import Memory
from moetuner.evaluation.samples import Samples, find_samples
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.goals import AIMS, Goal
from moetuner.problem.objective import choose_goal, choose_tables
from moetuner.problem.windows.choice import choose_counted_window
from moetuner.recording import Recording
from moetuner.serving import Serving
from moetuner.serving.engines import ENGINES, Engine, engine_settings
from moetuner.serving.phases import Phases
from moetuner.serving.running import Running
from moetuner.solver import Method, solve
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics, as_counts
from moetuner.topology import Topology

Window = int | None


def count_running_slots(initial: Placement | str, experts: int, devices: int) -> int:
    """Return the slots of a device in a layer under the running placement."""
    if isinstance(initial, Placement):
        return initial.slots_per_device
    return Running.parse(initial).count_slots(experts, devices)


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of ``advise``, checked, with their defaults resolved.

    ``windows`` are the sizes of windows to judge; ``progress`` is called with a few words on each
    step of the computation.
    """

    traffic: Recording
    unseen: Recording | None
    serving: Serving
    initial: Placement | str
    copies: tuple[int, ...]
    windows: tuple[Window, ...]
    objective: Goal | None
    expert_bytes: float | None
    memory: Memory | None
    step_ms: Mapping[Window, float]
    price: float
    prefill_share: float | None
    recorded_by: str | None
    by_group: bool
    in_order: bool
    iterations: int | None
    time_limit: float | None
    seed: int
    threads: int | None
    progress: Callable[[str], None]

    @property
    def engine(self) -> Engine | None:
        """The engine's settings; None where none is named."""
        name = self.serving.engine
        return None if name is None else ENGINES[name]

    @property
    def topology(self) -> Topology:
        """The machine."""
        return self.serving.topology

    @property
    def goal(self) -> Goal:
        """The goal of placements: the objective, by default time."""
        return choose_goal(self.objective, None)

    @property
    def single_slots(self) -> int:
        """Slots of a device that hold each expert once."""
        return -(-self.traffic.num_experts // self.topology.devices)

    @property
    def running_copies(self) -> int:
        """Slots for copies of a device in a layer that run already: their memory costs nothing."""
        experts, devices = self.traffic.num_experts, self.topology.devices
        return max(count_running_slots(self.initial, experts, devices) - self.single_slots, 0)

    @property
    def tried_copies(self) -> tuple[int, ...]:
        """Slots for copies to try: the requested and running ones that engine and model allow."""
        may_copy = self.engine is None or self.engine.may_copy
        highest = self.traffic.num_experts - self.single_slots if may_copy else 0
        candidates = sorted({*self.copies, self.running_copies})
        return tuple(slots for slots in candidates if slots <= highest) or (0,)

    @property
    def is_held_out(self) -> bool:
        """True if placements are judged on traffic that they were not computed from.

        A recording of one window cannot be halved.
        """
        return self.traffic.length > 1 or self.unseen is not None

    @property
    def judged_recording(self) -> Recording:
        """The recording that has the unseen traffic: given apart, or half of ``traffic``."""
        return self.traffic if self.unseen is None else self.unseen

    @cached_property
    def units(self) -> dict[Window, Samples]:
        """The independent samples of ``judged_on``, by size of windows."""
        return {window: self.find_samples(self.judged_recording, window) for window in self.windows}

    def find_samples(self, traffic: Recording, window: Window) -> Samples:
        """Return the independent samples of traffic in windows of a size."""
        return find_samples(traffic, window=window, threads=self.threads)


@dataclass(frozen=True)
class Holdout:
    """The counts that placements are computed from, and the traffic that they are judged on."""

    seed: int
    statistics: RoutingStatistics
    unseen: Recording


def make_holdout(request: Request, seed: int) -> Holdout:
    """Return the counts of the seen part and the unseen part, chosen with a seed."""
    seen, unseen = split_seen_unseen(request, seed)
    return Holdout(seed, count_traffic(request, seen), unseen)


def split_seen_unseen(request: Request, seed: int) -> tuple[Recording, Recording]:
    """Return the seen and the unseen part of the traffic, as given apart or chosen with a seed."""
    if request.unseen is not None:
        return request.traffic, request.unseen
    if not request.is_held_out:
        return request.traffic, request.traffic
    return hold_out(request.traffic, seed=seed)


def count_traffic(request: Request, seen: Recording) -> RoutingStatistics:
    """Count seen traffic as ``moetuner solve`` does."""
    step = request.windows[0]
    window = None if step is None else choose_counted_window(seen.length, step)
    options: dict[str, Any] = {"window": window, "threads": request.threads}
    options |= choose_tables(request.serving.regime, request.goal)
    return as_counts(seen, **options)


def build_problem(
    request: Request, statistics: RoutingStatistics, copies: int, *, phases: Phases | None = None
) -> Problem:
    """Build the problem of ``moetuner solve`` with a number of slots for copies on a device.

    ``phases`` replace those of the request.
    """
    # The map that is written for no engine in particular has no empty slots either.
    slots, fill_slots = request.single_slots + copies, copies > 0
    if request.serving.engine is not None:
        settings = engine_settings(
            request.serving.engine, statistics, request.topology, slots_per_device=slots
        )
        fill_slots = settings["fill_slots"]
    serving = request.serving
    return Problem.served(
        statistics,
        serving,
        slots_per_device=slots,
        fill_slots=fill_slots,
        phases=serving.phases if phases is None else phases,
        window=request.windows[0],
        objective=request.objective,
        max_imbalance=AIMS[request.goal].cap,
    )


def search(
    request: Request,
    problem: Problem,
    method: Method,
    seed: int,
    *,
    iterations: int | None = None,
    initial: Placement | None = None,
    effort: str = "default",
) -> Result:
    """Return the result of solving a problem, from ``initial`` if given; raise if interrupted."""
    return solve(
        problem,
        method,
        seed=seed,
        iterations=iterations,
        initial=initial,
        effort=effort,
        threads=request.threads,
        time_limit=request.time_limit,
    ).uninterrupted()


def search_shortly(request: Request, problem: Problem) -> Placement:
    """Return the placement of a brief search, of the request's steps if it says how many."""
    steps = request.iterations
    return search(
        request, problem, "heuristic", request.seed, iterations=steps, effort="brief"
    ).placement
