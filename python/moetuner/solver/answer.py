"""From a run to its result: placement, objective, status, bound, and how it was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moetuner._core import __version__
from moetuner.placement import Placement, keep_slots
from moetuner.problem import Problem
from moetuner.problem.caps import ROUNDING
from moetuner.problem.made import Made
from moetuner.solver.bounds.caps import are_least, cap_report, describe_scope
from moetuner.solver.result import Details, Result, Status
from moetuner.solver.run import Incumbent, Role, Run, judge_bound
from moetuner.solver.stages.floor import balanced


def build_result(run: Run, method: str, *, searched: bool) -> Result:
    """Build the result of a run; drop a bound that the placement itself refutes.

    If a search found it, details say which windows the search saw and which caps are exceeded. For
    other methods they say the latter where caps are exceeded no further than balance exceeds them.
    """
    problem, incumbent = run.problem, run.answer()
    placement = make_placement(run, incumbent)
    details = _make_details(run, incumbent, placement, searched=searched)
    objective, bound = problem.objective_function.value(placement), run.bound
    verdict = None if bound is None else judge_bound(run, placement.slots, bound)
    if verdict == "refuted":
        assert bound is not None
        refuted = replace(details.bound, refuted=bound.source)
        details, bound, verdict = replace(details, bound=refuted), None, None
    value = None if bound is None else bound.value / run.scale
    subject = None if bound is None else describe_scope(problem, details.caps)
    violations = problem.violations(placement)
    return Result(
        placement=with_origin(
            run, placement, method, objective=objective, bound=value, bound_scope=subject
        ),
        method=method,
        status=_choose_status(run, placement, details, violations, verdict),
        objective=objective,
        bound=value,
        bound_source=None if bound is None else bound.source,
        seconds=run.budget.elapsed,
        details=details,
        certificate=None if bound is None else bound.certificate,
        bound_scope=subject,
        violations=violations,
        lacks=problem.objective_function.lacks,
    )


def make_placement(run: Run, incumbent: Incumbent) -> Placement:
    """Return the placement of an incumbent; copies that stay keep the slots that they have."""
    slots = incumbent.slots
    if run.moves is not None:
        slots = keep_slots(run.moves.initial.slots, slots, run.problem.capacity)
    return Placement(slots, num_experts=run.problem.num_experts)


def with_origin(run: Run, placement: Placement, method: str, **figures: Any) -> Placement:
    """Return a placement with its origin (input, topology, settings) and its figures."""
    statistics, topology, budget = run.problem.statistics, run.problem.topology, run.budget
    made = Made.for_problem(
        run.problem, version=__version__, method=method, seed=run.seed, effort=budget.effort
    )
    names = ("time_limit", "iterations", "gap", "cutoff")
    limits = {name: getattr(budget, name) for name in names}
    named = placement.with_names(
        model=statistics.model,
        topology=topology.name,
        fingerprint=statistics.fingerprint,
        settings={
            **made.to_settings(),
            **{name: limit for name, limit in limits.items() if limit is not None},
        },
        **figures,
    )
    # By it the map of an engine, which has no empty slots, is filled with copies that change least,
    # and its plugin tells whether traffic is still that of the placement.
    return named.with_load(run.problem.load)


def _make_details(
    run: Run, incumbent: Incumbent, placement: Placement, *, searched: bool
) -> Details:
    details = run.details
    if run.moves is not None:
        details = details.with_search_facts(experts_moved=incumbent.moves)
    elif searched and run.problem.is_plain and incumbent.role is Role.FLOOR:
        details = details.with_search_facts(found_by="balance")
    if not searched and not _raises_as_balance(run.problem, placement):
        return details
    caps = cap_report(run.problem, placement.slots, threads=run.budget.threads)
    details = replace(details, caps=caps)
    return details.with_search_facts(**list_sampling_facts(run.problem)) if searched else details


def _raises_as_balance(problem: Problem, placement: Placement) -> bool:
    """Return whether a placement exceeds load caps no further than balance alone does.

    Searches begin with balance, so such caps had to be raised for every method.
    """
    caps = problem.caps
    if caps.over_speed is None or not caps.excess(placement).any():
        return False
    balance = Placement(balanced(problem), num_experts=problem.num_experts)
    limits = np.maximum(caps.over_speed, caps.peaks(balance))
    return bool((caps.peaks(placement) <= limits * (1 + ROUNDING)).all())


def list_sampling_facts(problem: Problem) -> dict[str, int]:
    """Return how many windows and tokens a search has seen, where it has not seen all."""
    facts, windows = {}, problem.windows
    if windows.searched is not windows and problem.aim.costs_loads:
        facts = {"windows": len(windows), "windows_searched": len(windows.searched)}
    if problem.objective_function.has_expert_sets and problem.statistics.set_tokens is not None:
        facts["set_tokens"] = problem.statistics.set_tokens
    return facts


def _choose_status(
    run: Run,
    placement: Placement,
    details: Details,
    violations: tuple[str, ...],
    proven: Status | None,
) -> Status:
    """Return how a run ended, or that its answer breaks rules that were not raised."""
    if run.interrupted:
        return "interrupted"
    raised = run.problem.caps.violations(placement) if details.caps.raised else []
    if len(violations) > len(raised):
        return "violates rules"
    # An answer that breaks a cap is optimal only where the cap was raised as little as can be.
    if proven is not None and (proven != "optimal" or are_least(details.caps)):
        return proven
    return "time_limit" if run.cut else "feasible"
