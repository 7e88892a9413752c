"""A trial: placements computed from one part of some traffic, and evaluated on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from moetuner.evaluation import Evaluation
from moetuner.evaluation.options import ReplayOptions
from moetuner.placement import Placement, blocks
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.report import outcome
from moetuner.report.advice.request import Part, Request, Window, build_problem, search
from moetuner.solver import Method
from moetuner.solver.result import Result

# Placements that are judged: what runs, EPLB's in as many slots as the proposed one, and that one;
# or by slots for copies of a device in a layer; or by the phase they are for.
RUNNING, EPLB, PROPOSED = "running", "eplb", "proposed"
Key = int | str


@dataclass(frozen=True)
class Trial:
    """The placements of a part, and their evaluations by window."""

    result: Result
    problem: Problem
    placements: dict[Key, Placement]
    evaluations: dict[Window, dict[Key, Evaluation]]


def try_out(
    request: Request, part: Part, copies: int, *, by_group: bool = False, effort: str = "brief"
) -> Trial:
    """Place with some slots for copies, and evaluate that beside EPLB's and what runs.

    The placement that is proposed is searched with default effort. Others of the kind show whether
    its gain is no chance: for that a brief search is enough.
    """
    problem, running = (
        build_problem(request, part.statistics, copies),
        running_placement(request, part),
    )
    # What runs stays wherever it is as good, if it fits into the slots.
    result = search(
        request,
        problem,
        "joint",
        part.seed,
        iterations=request.iterations,
        initial=running if problem.has_slots_for(running) else None,
        effort=effort,
    )
    placements: dict[Key, Placement] = {
        RUNNING: running,
        EPLB: search(request, problem, "eplb", part.seed).placement,
        PROPOSED: result.placement,
    }
    evaluations = evaluate_all(request, placements, part.unseen, request.windows, by_group=by_group)
    return Trial(result, problem, placements, evaluations)


def running_placement(request: Request, part: Part) -> Placement:
    """Return what runs; EPLB's placement is that of what was seen."""
    if request.initial == "contiguous":
        traffic = request.traffic
        return blocks(traffic.layers, traffic.num_experts, request.topology.devices)
    problem = build_problem(request, part.statistics, request.running_copies)
    if isinstance(request.initial, Placement):
        problem.check_running(request.initial)
        return request.initial
    method = request.initial.partition(":")[0]
    return search(request, problem, cast(Method, method), part.seed).placement


def evaluate_all(
    request: Request,
    placements: dict[Key, Placement],
    unseen: Recording,
    windows: Sequence[Window],
    *,
    by_group: bool = False,
) -> dict[Window, dict[Key, Evaluation]]:
    """Evaluate placements on other traffic, by window."""
    evaluations = outcome.replay(
        list(placements.values()),
        request.serving,
        unseen,
        windows,
        ReplayOptions(mixed=False, threads=request.threads),
        by_group=by_group,
    )
    return {
        window: dict(zip(placements, evaluated, strict=True))
        for window, evaluated in evaluations.items()
    }
