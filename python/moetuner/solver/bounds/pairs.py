"""Proven lower bounds on the cost of pairs, with certificates that anybody can check.

The Rust core bounds the number of transitions between interchangeable devices (a doubly
non-negative relaxation with load cuts, or the transportation bound per layer pair). This module
turns costs of links and nodes into such counts, and keeps the proofs. Co-activation becomes
transitions from a layer to a copy of itself, see `pad_layers`. The bounds cover placements with one
copy of each expert only: with more copies a placement may cost less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.bounds.certificate import ARRAYS, Certificate, Method, Proof, Visits
from moetuner.solver.budget import Budget, Progress
from moetuner.solver.result import LevelBound
from moetuner.solver.run import Bound, Run, Stage

# Function that the core calls with seconds and the negative of its bound so far.
Report = Callable[[float, int | None], None] | None

COMPLETE: Literal["complete dynamic programme"] = "complete dynamic programme"


def bound(
    problem: Problem,
    caps: NDArray[np.uint64],
    *,
    budget: Budget,
    target: int | None = None,
    iterations: int | None = None,
) -> Bound | None:
    """Return a lower bound on ``Objective.cost``, for single copies under caps [L] on device loads.

    None without pairs of the problem's regime, or on one device. ``target`` is the cost of the best
    known placement, for the gap. ``iterations`` are those of the semidefinite method, by default as
    many as are affordable; the budget's iterations are of searches, and do not count here.
    """
    levels = _levels(problem)
    if levels is None:
        return None
    proofs: list[Proof] = []
    cost, interrupted = 0, False
    if iterations is None:
        # This may round to none: sums of rows and columns prove more than a single iteration.
        iterations = int(min(count_affordable(problem), effort.BOUND_ITERATIONS))
        if budget.time_limit is not None:
            iterations = effort.BOUND_ITERATIONS_TIMED
    sources: list[str] = []
    proven: dict[str, LevelBound] = {}
    goal = None if target is None else problem.serving.way.times_counted * target
    for name, price, parts in levels:
        level_budget = budget.within(1 / (len(levels) - len(proofs)))
        crossing, source, done, ended, stopped, arrays = _core.bound(
            (*pad_layers(problem, caps, parts), parts),
            iterations=iterations,
            target=goal if len(levels) == 1 and price == 1 else None,
            gap=budget.gap or 0.0,
            time_limit=level_budget.time_limit,
            threads=budget.threads,
            progress=make_reporter(budget, _share, problem, price),
        )
        cost += price * crossing
        interrupted |= stopped
        sources.append(source if len(levels) == 1 else f"{source} ({name})")
        proven[name] = LevelBound(crossing, done, ended)
        proofs.append(Proof(parts, price, *arrays))
    cost = _to_problem_cost(problem, cost)
    certificate = make_certificate(problem, caps, "dual point", cost, tuple(proofs))
    return Bound(cost, " + ".join(sources), certificate, proven, interrupted)


def is_of_pairs(run: Run) -> bool:
    """Return whether only pairs of single copies count, so that a placement is a partition."""
    single = run.problem.is_plain and not run.problem.may_copy
    return single and not run.objective.has_expert_sets


def _prove(run: Run, budget: Budget) -> None:
    """Prove a bound on the cost of pairs, under the caps that the best placement keeps."""
    problem, slots = run.problem, run.best.slots
    cost = problem.objective_function.cost(Placement(slots, num_experts=problem.num_experts))
    proven = bound(problem, problem.caps.raised_for(slots), budget=budget, target=cost)
    if proven is not None:
        # More time would have closed the gap further.
        run.cut = budget.time_limit is not None
        run.prove(proven)


def reserve(problem: Problem, seconds_left: float) -> float:
    """Return the share of the seconds left that a bound of pairs needs; 0 if it cannot end."""
    share = 1 - effort.SEARCH_SHARE
    return share if share * seconds_left >= least_seconds(problem) else 0.0


def least_seconds(problem: Problem) -> float:
    """Compute the least seconds with which a bound is worth beginning."""
    return effort.BOUND_SECONDS * problem.layers * (problem.devices * problem.slots) ** 2


def make_certificate(
    problem: Problem,
    caps: NDArray[np.uint64],
    method: Method,
    cost: int,
    proofs: tuple[Proof, ...] = (),
    visits: tuple[Visits, ...] = (),
) -> Certificate:
    """Build the certificate of a bound on a problem under caps [L]."""
    subject = (problem.statistics.fingerprint, problem.regime, problem.slots)
    return Certificate(*subject, caps, method, cost, proofs, visits)


def make_chain(
    problem: Problem, caps: NDArray[np.uint64], cost: NDArray[np.int64] | None = None
) -> tuple[Any, ...]:
    """Return the core's chain for single copies under caps [L], with costs of links [D,D]."""
    objective = problem.objective_function
    pairs = objective.pairs if objective.pairs is not None and objective.pairs.any() else None
    tables = (pairs, None) if objective.way.joins_layers else (None, pairs)
    cost = objective.link_cost if cost is None else cost
    return (problem.load, caps, cost, problem.slots, *tables)


def solve_completely(
    problem: Problem,
    caps: NDArray[np.uint64],
    *,
    steps: int = effort.PARTITION_STEPS,
    time_limit: float | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.int32], int, NDArray[np.uint64]] | None:
    """Compute the optimum by dynamic programming over all partitions, of one copy of each expert.

    Every objective of pairs is a chain, a cost of each layer alone plus a cost of neighbouring
    layers, so the best sequence of partitions is a shortest path. Returns slots [L,D,S], their
    cost, and the caps [L], raised to the least that can be kept. None where it would take more
    steps or seconds, or links are not of one or two tiers. 105 partitions for 8 experts on 4
    devices are few.
    """
    return _core.exact_chain(
        make_chain(problem, caps), work=steps, time_limit=time_limit, threads=threads
    )


def recompute(
    problem: Problem,
    caps: NDArray[np.uint64],
    proofs: tuple[Proof, ...],
    *,
    threads: int | None = None,
) -> int:
    """Recompute what dual points, with true cuts, prove of a problem's cost under caps [L]."""
    levels = _levels(problem)
    wanted = None if levels is None else [(parts, price) for _, price, parts in levels]
    proven = [(proof.parts, proof.price) for proof in proofs]
    if wanted != proven:
        raise ValueError(f"certificate must be for parts and prices {wanted}, got {proven}")
    total = 0
    for proof in proofs:
        total += proof.price * _core.verify_bound(
            (*pad_layers(problem, caps, proof.parts), proof.parts),
            tuple(getattr(proof, name) for name in ARRAYS),
            threads=threads,
        )
    return _to_problem_cost(problem, total)


def pad_layers(
    problem: Problem, caps: NDArray[np.uint64], parts: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Return load [L,P], transitions [L-1,P,P] and caps [L] for placements on equal ``parts``.

    Empty slots become experts without load and traffic, so that every part is full. A part of
    several devices has the sum of their caps.

    With ``dispatch`` every layer comes twice, and co-activation is the transitions from one to the
    other. A placement of the layers, used for both, has twice its cost in transitions that cross:
    no placement costs less than half of what the doubled layers must. An expert has as many
    transitions to its own copy as to any other expert, which draws the two together.
    """
    experts, slots = problem.num_experts, problem.devices * problem.slots
    copies, joins_layers = problem.serving.way.times_counted, problem.serving.way.joins_layers
    caps = join_caps(problem, caps, problem.devices // parts)
    if joins_layers and slots == experts:
        return problem.load, problem.statistics.transitions_or_empty, caps
    load = np.zeros((copies * problem.layers, slots), dtype=np.uint64)
    load[:, :experts] = np.repeat(problem.load, copies, axis=0)
    tables = np.zeros((len(load) - 1, slots, slots), dtype=np.uint64)
    if joins_layers:
        tables[:, :experts, :experts] = problem.statistics.transitions_or_empty
    else:
        together = problem.statistics.coactivation_or_empty
        tables[::2, :experts, :experts] = together
        diagonal = np.arange(experts)
        tables[::2, diagonal, diagonal] = together.max(axis=(1, 2))[:, None]
    return load, tables, np.repeat(caps, copies)


def join_caps(problem: Problem, caps: NDArray[np.uint64], devices: int) -> NDArray[np.uint64]:
    """Return caps [L] of so many devices together; at most the total load, so that none wraps."""
    total = problem.load.sum(axis=1, dtype=np.uint64).tolist()
    joined = [min(int(cap) * devices, load) for cap, load in zip(caps, total, strict=True)]
    return np.array(joined, dtype=np.uint64)


def _to_problem_cost(problem: Problem, cost: int) -> int:
    """Return the problem's cost from that of `pad_layers`, which counts dispatch's pairs twice."""
    return -(-cost // problem.serving.way.times_counted)


def _share(problem: Problem, price: int, crossing: int) -> float:
    """Return a count of pairs at a price as the problem's traffic."""
    return _to_problem_cost(problem, crossing * price) / problem.objective_function.scale


def _levels(problem: Problem) -> list[tuple[str, int, int]] | None:
    """Split the cost of a pair by level: name, price, and the parts between which it is paid."""
    statistics = problem.statistics
    if not problem.serving.way.joins_layers:
        apart = statistics.coactivation is not None and problem.devices > 1
        return [("devices", 1, problem.devices)] if apart else None
    if statistics.transitions is None or problem.layers < 2 or problem.devices < 2:
        return None
    cost, topology = problem.topology.cost, problem.topology
    cheapest = int(cost[~np.eye(topology.devices, dtype=bool)].min())
    if cheapest == 0:  # a given link cost may be, and then any pair may move for nothing
        return None
    levels = [("devices", cheapest, topology.devices)]
    between_nodes = topology.node_of_device[:, None] != topology.node_of_device[None, :]
    # The parts of a level have equally many slots.
    if topology.has_equal_nodes and 1 < topology.nodes < topology.devices:
        extra = int(cost[between_nodes].min()) - cheapest
        if extra > 0:
            levels.append(("nodes", extra, topology.nodes))
    return levels


def count_affordable(problem: Problem) -> float:
    """Compute the iterations of a solve without a time limit: one takes L-1 eigenproblems."""
    layers = problem.serving.way.times_counted * problem.layers
    return effort.BOUND_WORK / (float(layers - 1) * (2 * problem.devices * problem.slots) ** 3)


def make_reporter(budget: Budget, value: Callable[..., float], *extra: Any) -> Report:
    """Return a function that reports the core's bounds by their ``value``, if anybody listens."""
    progress = budget.progress
    if progress is None:
        return None

    def report(seconds: float, negated: int | None) -> None:
        proven = None if negated is None else value(*extra, -negated)
        progress(Progress(seconds, "bound", None, proven))

    return report


PAIR_BOUND = Stage(
    _prove,
    applies=is_of_pairs,
    least=lambda run: least_seconds(run.problem),
    reserve=lambda run, seconds_left: reserve(run.problem, seconds_left),
)
