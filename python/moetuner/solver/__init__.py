"""solve(): one entry, one result, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from moetuner._checks import instance, one_of, seed_in
from moetuner.placement import Placement, keep_slots
from moetuner.problem import Problem
from moetuner.problem.caps import ROUNDING
from moetuner.problem.objective import Objective
from moetuner.solver import baselines, two_stage
from moetuner.solver.balancing import balance
from moetuner.solver.bounds.caps import are_least, scope, told
from moetuner.solver.bounds.certificate import Certificate
from moetuner.solver.bounds.verification import verify
from moetuner.solver.joint import SEARCHES
from moetuner.solver.migration import Migration, Trade, migrate, pareto
from moetuner.solver.result import (
    Candidate,
    Clock,
    Details,
    History,
    Limits,
    Progress,
    Result,
    Status,
)
from moetuner.solver.search.balanced import balanced, no_worse, quick
from moetuner.solver.search.move_cost import lawful

__all__ = [
    "ALIASES",
    "METHODS",
    "Certificate",
    "Details",
    "Method",
    "Progress",
    "Result",
    "Trade",
    "balance",
    "pareto",
    "solve",
    "verify",
]


class Method(Protocol):
    """How every method is called."""

    def __call__(self, problem: Problem, *, seed: int, limits: Limits) -> Candidate:
        """Return what was found for a problem within limits."""
        ...


METHODS: dict[str, Method] = {
    "joint": SEARCHES["joint"],
    "paper": two_stage.two_stage,
    "heuristic": SEARCHES["heuristic"],
    "quick": quick,
    "contiguous": baselines.contiguous,
    "round_robin": baselines.round_robin,
    "random": baselines.random,
    "lpt": baselines.lpt,
    "eplb": baselines.eplb,
    "exflow": baselines.exflow,
}
# The paper calls its method MoETuner, and so did this package.
ALIASES = {"moetuner": "paper"}


def solve(
    problem: Problem,
    method: str = "joint",
    *,
    seed: int = 0,
    time_limit: float | None = None,
    iterations: int | None = None,
    gap: float | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    initial: Placement | None = None,
    move_budget: float | None = None,
    move_cost: float = 0.0,
    expert_bytes: float = 1.0,
) -> Result:
    """Place the experts.

    Parameters
    ----------
    problem
        What to place.
    method
        ``joint`` (the default), ``paper`` (MoETuner's two stages; ``moetuner`` means it too),
        ``heuristic`` (no integer programme), ``quick`` (balance of windows within milliseconds, as
        the plugins decide), or a baseline: ``contiguous``, ``round_robin``,
        ``random``, ``lpt``, ``eplb``, ``exflow``.
    seed
        Of all random choices.
    time_limit
        Seconds; the best placement so far is returned. Without it, or beyond 30 years, the answer
        is a function of (problem, method, seed) alone, the same on every machine and for any number
        of threads.
    iterations
        Search steps of each start; by default chosen by the problem's size.
    gap
        Stop when (objective - bound) / objective is at most this.
    threads
        Threads to use, all cores by default.
    progress
        Called now and then with a ``Progress``, from the calling thread: the phase, and the best
        objective and bound so far. ``Result.history`` keeps what changed, listened to or not.
    initial
        The placement that runs, to be improved by few moves; experts that stay keep their slots.
        With ``joint`` and ``heuristic``.
    move_budget
        Bytes that may move, from device to device; None, or infinity, for any number.
    move_cost
        What a moved byte costs, in units of the objective.
    expert_bytes
        Bytes of one expert of one layer; with 1, budget and cost are of experts.

    Returns
    -------
    Result
        An interrupt (Ctrl-C) or an exhausted limit gives the best placement so far, with its
        status.

    Raises
    ------
    ValueError
        If the method is unknown or an argument is out of range.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> result = mt.solve(mt.Problem(statistics, mt.Topology(2), objective="balance"))
    >>> result.objective, result.placement.device_of.tolist()
    (1.25, [[0, 1, 1, 0]])
    """
    instance("problem", problem, Problem, hint=", such as Problem(statistics, topology)")
    method = ALIASES.get(method, method) if isinstance(method, str) else method
    one_of("method", method, METHODS)
    seed = seed_in(seed)
    limits = Limits(time_limit, iterations, gap, threads, progress)
    migration = Migration(move_budget, move_cost, expert_bytes)
    if initial is None and (migration.budget is not None or migration.cost):
        raise ValueError("move_budget and move_cost need initial, the placement to move from")
    searches = METHODS[method] in SEARCHES.values()
    if initial is not None and not searches:
        raise ValueError(f"initial needs method joint or heuristic, got {method!r}")

    history = History(progress)
    limits = replace(limits, progress=history.tell)
    clock, limits = Clock(limits), limits.counting()
    try:
        # Of large tables this takes a while: not after the search, when the time is over.
        fingerprint = problem.statistics.fingerprint
        limits = replace(limits, time_limit=clock.within().time_limit)
        if initial is None:
            candidate = METHODS[method](problem, seed=seed, limits=limits)
        else:
            candidate = migrate(
                problem, initial, migration, METHODS[method], seed=seed, limits=limits
            )
    except KeyboardInterrupt:
        # Before a method had anything, or one that keeps nothing on its way.
        begin = balanced(problem) if initial is None else lawful(problem, initial)
        candidate, fingerprint = Candidate(begin, "interrupted"), problem.statistics.fingerprint

    def result(candidate: Candidate) -> Result:
        if initial is None and problem.is_plain and searches:
            candidate = no_worse(problem, candidate)
        if problem.fill_slots:
            candidate = _filled(problem, candidate, initial)
        if searches:
            caps = told(problem, candidate, threads=threads)
            details = replace(candidate.details, caps=caps).searched(**_stood_for(problem))
            candidate = replace(candidate, details=details)
        found = _result(problem, candidate, method, fingerprint)
        if initial is not None and migration.budget is not None:
            more = _beyond_budget(initial, found.placement, migration.budget, expert_bytes)
            found = replace(found, violations=found.violations + more)
        status = _status(problem, found)
        seconds = clock.gone
        end = Progress(seconds, "answer", found.objective, found.bound, is_step=True)
        return replace(found, status=status, seconds=seconds, history=history.end(end))

    try:
        return result(candidate)
    except KeyboardInterrupt:
        # What is found is not lost: this takes no longer than what was interrupted.
        return result(replace(candidate, status="interrupted"))


def _result(problem: Problem, candidate: Candidate, method: str, fingerprint: str) -> Result:
    """Say of an answer what it is worth, and take back what is not true of it."""
    # Bounds of pairs are costs; those of visits are of what they are a bound of.
    worth = Objective(problem)
    scale = worth.scale if worth.counts_pairs else 1
    placement = Placement(candidate.slots, num_experts=problem.experts)
    objective = worth.value(placement)
    candidate = _held(worth, candidate, placement, objective)
    bound = None if candidate.bound is None else candidate.bound / scale
    about = None if bound is None else scope(problem, candidate.details.caps)
    return Result(
        placement=placement.with_names(
            model=problem.statistics.model,
            topology=problem.topology.name,
            fingerprint=fingerprint,
            objective=objective,
            bound=bound,
            bound_scope=about,
        ),
        method=method,
        status=candidate.status,
        objective=objective,
        bound=bound,
        bound_source=candidate.bound_source,
        seconds=0.0,
        details=candidate.details,
        certificate=candidate.certificate,
        bound_scope=about,
        violations=problem.violations(placement),
    )


def _stood_for(problem: Problem) -> dict[str, int]:
    """Return how many windows and tokens stand for all, where a search has seen no more."""
    found, windows, worth = {}, problem.windows, Objective(problem)
    if windows.searched is not windows and problem.goal != "traffic":
        found = {"windows": len(windows), "windows_searched": len(windows.searched)}
    if worth.counts_visits and problem.statistics.set_tokens is not None:
        found["set_tokens"] = problem.statistics.set_tokens
    return found


def _filled(problem: Problem, candidate: Candidate, initial: Placement | None) -> Candidate:
    """Fill the slots that a method left empty."""
    slots = problem.filled(candidate.slots, initial)
    if initial is not None:
        slots = keep_slots(initial.slots, slots, problem.capacity)
    if (slots == candidate.slots).all():
        return candidate
    # A proof is of the slots as they were found.
    proven = candidate.status in ("optimal", "gap_reached")
    return replace(
        candidate,
        slots=slots,
        status="feasible" if proven else candidate.status,
        bound=None,
        bound_source=None,
        certificate=None,
        caps=None,
    )


def _status(problem: Problem, found: Result) -> Status:
    """Return how a method ended, or that its answer breaks rules without saying so."""
    known: list[str] = []
    if found.details.caps.raised:
        known = problem.caps.violations(found.placement)
    silent = len(found.violations) > len(known) and found.status != "interrupted"
    return "violates rules" if silent else found.status


def _beyond_budget(
    initial: Placement, placement: Placement, budget: float, expert_bytes: float
) -> tuple[str, ...]:
    moved = initial.diff(placement).experts_moved
    if moved * expert_bytes <= budget:
        return ()
    return (
        f"move_budget: {moved} experts of {expert_bytes:g} bytes move, the budget is {budget:g}",
    )


def _held(
    worth: Objective, candidate: Candidate, placement: Placement, objective: float
) -> Candidate:
    """Take back what an answer claims of all placements and is not true of itself.

    A bound above the answer's own objective is false, whatever has gone wrong. And an answer that
    breaks a cap is optimal only where the cap was raised as little as can be.
    """
    if candidate.bound is not None:
        exact = worth.counts_pairs and not placement.has_copies
        value = worth.cost(placement) if exact else objective * (1 + ROUNDING)
        if candidate.bound > value:
            refuted = replace(candidate.details.bound, refuted=candidate.bound_source)
            details = replace(candidate.details, bound=refuted)
            candidate = replace(
                candidate, bound=None, bound_source=None, certificate=None, details=details
            )
    proven = candidate.bound is not None and are_least(candidate.details.caps)
    if candidate.status == "optimal" and not proven:
        return replace(candidate, status="feasible")
    return candidate
