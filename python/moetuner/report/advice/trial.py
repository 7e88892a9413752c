"""A trial: placements that are computed from seen traffic, and evaluated on unseen traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from moetuner.evaluation import Evaluation, evaluate_each
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.replay import drop_groups
from moetuner.placement import Placement, blocks
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.report.advice.request import Holdout, Request, Window, build_problem
from moetuner.serving.running import Running
from moetuner.solver import Method, solve
from moetuner.solver.result import Result

# Placements of a trial: the running one, EPLB's in as many slots as the proposed one, and the
# proposed one. Other keys are slots for copies of a device in a layer, and names of phases.
RUNNING, EPLB, PROPOSED = "running", "eplb", "proposed"
Key = int | str


@dataclass(frozen=True)
class Trial:
    """Placements that were computed from seen traffic, and their evaluations by window."""

    result: Result
    problem: Problem
    placements: dict[Key, Placement]
    evaluations: dict[Window, dict[Key, Evaluation]]


def search(
    request: Request,
    problem: Problem,
    method: Method,
    seed: int,
    **options: Any,
) -> Result:
    """Return the result of ``solve`` with further options of it; raise if interrupted."""
    limits: dict[str, Any] = {"threads": request.threads, "time_limit": request.time_limit}
    return solve(problem, method, seed=seed, **limits, **options).uninterrupted()


def search_shortly(request: Request, problem: Problem, *, cutoff: float | None = None) -> Placement:
    """Return the placement of a brief search, of the request's steps if it says how many."""
    options = {"iterations": request.iterations, "effort": "brief", "cutoff": cutoff}
    return search(request, problem, "heuristic", request.seed, **options).placement


def try_out(
    request: Request,
    holdout: Holdout,
    copies: int,
    *,
    by_group: bool = False,
    effort: str = "brief",
) -> Trial:
    """Search a placement with a number of copies; evaluate it, EPLB's and the running one.

    A brief search is enough to see whether the gain of a proposed placement may be chance.
    """
    problem = build_problem(request, holdout.statistics, copies)
    running = find_running_placement(request, holdout)
    # A search that starts at the running placement moves only what gains.
    result = search(
        request,
        problem,
        "joint",
        holdout.seed,
        iterations=request.iterations,
        initial=running if problem.has_slots_for(running) else None,
        effort=effort,
    )
    placements: dict[Key, Placement] = {
        RUNNING: running,
        EPLB: search(request, problem, "eplb", holdout.seed).placement,
        PROPOSED: result.placement,
    }
    evaluations = evaluate_all(
        request, placements, holdout.unseen, request.windows, by_group=by_group
    )
    return Trial(result, problem, placements, evaluations)


def find_running_placement(request: Request, holdout: Holdout) -> Placement:
    """Return the running placement; EPLB's is computed from the seen traffic."""
    if request.initial == "contiguous":
        traffic = request.traffic
        return blocks(traffic.layers, traffic.num_experts, request.topology.devices)
    problem = build_problem(request, holdout.statistics, request.running_copies)
    if isinstance(request.initial, Placement):
        problem.check_running(request.initial)
        return request.initial
    method = Running.parse(request.initial).method
    return search(request, problem, cast(Method, method), holdout.seed).placement


def evaluate_all(
    request: Request,
    placements: dict[Key, Placement],
    unseen: Recording,
    windows: Sequence[Window],
    *,
    by_group: bool = False,
) -> dict[Window, dict[Key, Evaluation]]:
    """Return the evaluations of placements on unseen traffic, by size of windows."""
    evaluations = evaluate_each(
        list(placements.values()),
        unseen if by_group else drop_groups(unseen),
        [replace(request.serving, window=window) for window in windows],
        ReplayOptions(mixed=False, threads=request.threads),
    )
    return {
        window: dict(zip(placements, evaluated, strict=True))
        for window, evaluated in zip(windows, evaluations, strict=True)
    }
