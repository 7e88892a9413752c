"""The joint problem through HiGHS: the co-location programme, warm-started and bounded.

A placement enters; the same or a better one leaves, with a proven lower bound of the cost.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.solver.caps import raised
from moetuner.solver.colocation_model import Joint, Model
from moetuner.solver.ilp import Solution
from moetuner.solver.result import Candidate, Limits, Progress, Status

BOUND_SOURCE = "co-location integer programme"

# Triangle rows of a problem beyond which HiGHS does not get through its first node in minutes.
LARGEST = 400_000
# Nodes of the search tree of one solve, so that the answer does not depend on the machine.
NODES = 1000
# Rounds of separation on the integer programme; on the relaxation see `Model.tighten`.
ROUNDS = 20


def fits(problem: Problem) -> bool:
    """Whether the whole programme is of a size that HiGHS makes headway with."""
    joint = Joint.of(problem, problem.caps)
    return joint is not None and joint.triangle_rows <= LARGEST


def colocation(problem: Problem, *, seed: int, limits: Limits, start: Candidate) -> Candidate:
    """Improve a placement and prove how far from the optimum it can be.

    Parameters
    ----------
    problem
        With links of one tier or two; `fits` says whether it is small enough.
    seed
        For HiGHS.
    limits
        Of them, ``time_limit``, ``gap`` and ``progress`` apply; without ``time_limit`` the number
        of nodes is limited.
    start
        To begin from. Where it breaks a cap, that layer's cap becomes its largest device load: the
        bound is then that of these caps, and ``details`` says so.

    Returns
    -------
    Candidate
        Never worse than the start; ``"optimal"`` only where cost and bound are equal.

    Raises
    ------
    ValueError
        If devices differ other than by node.
    """
    if limits.time_limit is not None and limits.time_limit <= 0:
        return replace(start, status="time_limit")
    begin = time.monotonic()
    caps = problem.kept_caps(start.slots)
    joint = Joint.of(problem, caps)
    if joint is None:
        raise ValueError("co-location needs links of one kind, or dearer ones between nodes")
    model = Model(joint)

    def left() -> float | None:
        gone = time.monotonic() - begin
        return None if limits.time_limit is None else max(limits.time_limit - gone, 0.0)

    slots, cost = start.slots, problem.cost(Placement(start.slots, num_experts=problem.experts))
    bound = start.bound or 0

    def report(objective: float | None, dual: float) -> None:
        if limits.progress is not None:
            # While triangles are still to come, HiGHS's incumbent need be no placement.
            known = max(bound, model.ilp.proven(dual, model.unit)) / problem.cost_scale
            seconds = time.monotonic() - begin
            limits.progress(Progress(seconds, "co-location", cost / problem.cost_scale, known))

    device_of = entries_of(slots, problem.experts)
    rounds, first = 0, None
    relaxed, ended = model.tighten(cost, left, report)
    status: Status = ended
    bound = max(bound, model.ilp.proven(relaxed, model.unit))
    while ended == "feasible" and bound < cost and rounds < ROUNDS:
        solution = model.ilp.solve(
            start=model.values(device_of),
            start_objective=cost / model.unit,
            seed=seed,
            gap=limits.gap or 0.0,
            absolute_gap=model.absolute_gap,
            nodes=NODES,
            time_limit=left(),
            progress=report,
        )
        rounds += 1
        first = solution.first if first is None else first
        status = solution.status
        bound = max(bound, model.ilp.proven(solution.bound, model.unit))
        found = _read(problem, model, caps, solution)
        if found is not None and found[1] < cost:
            slots, cost = found
            device_of = entries_of(slots, problem.experts)
        done = bound >= cost or status in ("interrupted", "time_limit")
        if done or solution.values is None or not model.separate(solution.values):
            break
    if bound >= cost:
        status = "optimal"
    elif limits.gap is not None and cost - bound <= limits.gap * cost:
        status = "gap_reached"
    elif status not in ("interrupted", "time_limit"):
        status = "feasible"
    details = {**start.details, **raised(problem, caps, threads=limits.threads)}
    details["colocation"] = {
        "columns": model.columns,
        **model.rows,
        "rounds": rounds,
        "first_incumbent": None if first is None else round(first * model.unit),
    }
    source = BOUND_SOURCE if bound > (start.bound or 0) else start.bound_source
    return replace(
        start, slots=slots, status=status, bound=bound, bound_source=source, details=details
    )


def entries_of(slots: NDArray[np.int32], experts: int) -> NDArray[np.int64]:
    """Device of every entry [L,P]: of the experts, then of the empty slots."""
    layers, _, per_device = slots.shape
    flat = slots.reshape(layers, -1)
    # Empty slots sort behind all experts, in order.
    order = np.argsort(np.where(flat == EMPTY, experts, flat), axis=1, kind="stable")
    device_of: NDArray[np.int64] = order // per_device
    return device_of


def _read(
    problem: Problem, model: Model, caps: NDArray[np.uint64], solution: Solution
) -> tuple[NDArray[np.int32], int] | None:
    """Slots [L,D,S] and cost of a solution; None if it is no placement under the caps."""
    device_of = None if solution.values is None else model.device_of(solution.values)
    if device_of is None:
        return None
    device_of = device_of[:, : problem.experts]
    placement = Placement.from_assignment(
        device_of, problem.devices, slots_per_device=problem.slots
    )
    if (problem.device_load(placement.slots).max(axis=1) > caps).any():
        return None  # HiGHS allows a row to be broken by a millionth of it
    return placement.slots, problem.cost(placement)
