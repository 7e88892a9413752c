"""The joint method: device and cluster chosen at once, and how far from the optimum that can be.

Exact, else search, then bound, then programme: where a layer has few partitions, dynamic
programming over all of them is the optimum. Elsewhere placements are searched, and all are tried
where they are few; then a bound says what no placement can be below; and while the gap is wider
than asked for and time is left, HiGHS works on the whole co-location programme, where that fits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.bounds import visits
from moetuner.solver.bounds.loads import bounded, proves_pairs
from moetuner.solver.bounds.pairs import bound, certified, least_seconds
from moetuner.solver.exact.enumeration import eased, enumerated, fewest_visits
from moetuner.solver.exact.partitions import chain
from moetuner.solver.milp.colocation import colocation, fits
from moetuner.solver.result import BoundDetails, Candidate, Clock, Limits, MoveCost
from moetuner.solver.search.balanced import balanced, no_worse, rank
from moetuner.solver.search.fanout import dispatch
from moetuner.solver.search.layerwise import LayerSearch
from moetuner.solver.search.traffic import search_traffic

Slots = NDArray[np.int32]


def joint(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Solve the joint problem within limits.

    Without ``time_limit`` no integer programme is run, so that the answer depends on the problem
    and the seed alone and comes in seconds.
    """
    best: list[Candidate] = []
    try:
        return _joint(problem, seed, Clock(limits), best)
    except KeyboardInterrupt:  # outside of the core, which ends with the best it has
        found = best[0] if best else Candidate(balanced(problem))
        return replace(found, status="interrupted")


def _joint(problem: Problem, seed: int, clock: Clock, best: list[Candidate]) -> Candidate:
    """Solve the joint problem; ``best`` gets what the search finds as soon as it is known."""
    limits = clock.limits
    if not _is_of_pairs(problem):
        share = 1.0
        if proves_pairs(problem):
            share = _search_share(limits, effort.SEARCH_SHARE, least_seconds(problem))
        elif problem.goal == "traffic" and not problem.may_copy:
            least, share = visits.least_seconds(problem), effort.VISIT_SEARCH_SHARE
            if limits.time_limit and problem.experts <= effort.PRICE_EXPERTS:
                # Prices are soon as good as they get.
                share = max(share, 1 - effort.PRICE_TIMES * least / limits.time_limit)
            share = _search_share(limits, share, least)
        found = heuristic(problem, seed=seed, limits=clock.within(share))
        best.append(found)
        return bounded(problem, found, clock.within())
    exact = None if limits.time_limit == 0 else _optimum(problem, clock.within())
    if exact is not None:
        return exact
    share = _search_share(clock.within(), effort.SEARCH_SHARE, least_seconds(problem))
    found = heuristic(problem, seed=seed, limits=clock.within(share))
    best.append(found)
    if found.status == "interrupted":
        return found
    left = clock.left
    if left is not None and left <= least_seconds(problem):
        return replace(found, status="time_limit")
    programme = left is not None and problem.regime == "follow" and fits(problem)
    share = effort.BOUND_SHARE / (1 - effort.SEARCH_SHARE) if programme else 1.0
    if left is not None and (1 - share) * left < effort.PROGRAMME_LEAST:
        share = 1.0
    found = _with_bound(problem, found, clock.within(share))
    if found.status != "feasible" or left is None:
        return found
    left = clock.within().time_limit or 0.0
    if programme and found.bound is not None and left >= effort.PROGRAMME_LEAST:
        found = colocation(problem, seed=seed, limits=clock.within(), start=found)
    return replace(found, status="time_limit") if found.status == "feasible" else found


def _search_share(limits: Limits, share: float, least: float) -> float:
    """Return the share of a time limit that a search gets: all where no bound could end in time."""
    limit = limits.time_limit
    return share if limit is None or (1 - share) * limit >= least else 1.0


def heuristic(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Search, without a bound and without a programme; try all placements where they are few.

    With slots to spare the best with one copy of each expert is a start: copies must better it.
    """
    clock, judging = Clock(limits), 0.0
    if limits.time_limit is not None:
        # Whatever is found is compared with this, and has to be judged itself: no time is left for
        # that when the search ends.
        floor = Placement(problem.filled(balanced(problem)), num_experts=problem.experts)
        begin = clock.gone
        if clock.is_over():
            return Candidate(floor.slots, "time_limit")
        Objective(problem).value(floor)
        judging = clock.gone - begin
        clock = Clock(clock.within(keep=judging if problem.is_plain else 0.0))
        if clock.is_over():
            return Candidate(floor.slots, "time_limit")
    if problem.is_plain and Objective(problem).counts_visits:
        least = fewest_visits(problem, problem.caps.over_speed, clock)
        if least is not None:
            visits = Objective(problem).traffic(Placement(least, num_experts=problem.experts))
            return Candidate(least, "optimal", visits, "every placement")
    single = problem.without_copies()
    if single is None or (clock.left or judging) < effort.SINGLE_LEAST * judging:
        return _searched(problem, seed, clock.within())
    of_balance = problem.goal == "balance"
    within = clock.within(effort.SINGLE_BALANCE_SHARE if of_balance else effort.SINGLE_SHARE)
    within = within.muted() if problem.fill_slots else within
    exact = chain(single, limits=within) if _is_of_pairs(single) else None
    first = heuristic(single, seed=seed, limits=within) if exact is None else exact
    start = problem.filled(first.slots)
    interrupted = Candidate(start, "interrupted", details=first.details)
    if first.status == "interrupted":
        return no_worse(problem, interrupted)
    try:
        found = _searched(problem, seed, clock.within(), start)
    except KeyboardInterrupt:  # outside of the core
        found = interrupted
    if found.status == "interrupted":
        found = no_worse(problem, found)
    return min(found, replace(found, slots=start), key=lambda each: rank(problem, each.slots))


def _searched(problem: Problem, seed: int, limits: Limits, start: Slots | None = None) -> Candidate:
    """Search all placements, from slots [L,D,S] to improve on if there are some."""
    clock = Clock(limits)
    if problem.is_plain and Objective(problem).counts_visits:
        return dispatch(problem, seed=seed, limits=limits, start=start)
    if problem.is_plain and not problem.may_copy:
        return search_traffic(problem, seed=seed, limits=limits)
    found = LayerSearch(problem, seed).run(limits, start=start)
    try:
        found = _eased(problem, found, seed, clock.within())
        return best_of_all(problem, found, clock.within())
    except KeyboardInterrupt:
        return replace(found, status="interrupted")


# Methods that can begin from a placement that runs.
SEARCHES = {"joint": joint, "heuristic": heuristic}


def best_of_all(
    problem: Problem, found: Candidate, limits: Limits, *, moving: MoveCost | None = None
) -> Candidate:
    """Return what was found, or the best there is if placements are few and windows do not add up.

    Nothing is tried in less time than it may take. Where moving has a price, the best is not
    proven: without, others may be better.
    """
    clock = Clock(limits)
    short = limits.time_limit is not None and limits.time_limit < effort.ENUMERATION_SECONDS
    if found.status != "feasible" or problem.goal == "traffic" or short:
        return found
    placement = Placement(found.slots, num_experts=problem.experts)
    exceeds = bool(problem.caps.excess(placement).any())
    if problem.goal == "balance" and problem.windows.is_mean and not exceeds:
        return found
    objective, caps = Objective(problem), problem.caps.over_speed
    price = 0.0 if moving is None else moving.price * moving.moved(found.slots)
    known = np.inf if exceeds else objective.value(placement) + price
    best = enumerated(problem, known, caps=caps, moving=moving, clock=clock)
    if best is not None:
        slots = best if len(best) else found.slots
        if moving is not None:
            return replace(found, slots=slots)
        value = objective.value(Placement(slots, num_experts=problem.experts))
        return replace(
            found, slots=slots, status="optimal", bound=value, bound_source="every placement"
        )
    return found


def _eased(problem: Problem, found: Candidate, seed: int, limits: Limits) -> Candidate:
    """Search again from contents that exceed caps less, where those of a layer can all be tried."""
    clock = Clock(limits)
    searched = found.status == "feasible" and not clock.is_over()
    start = eased(problem, found.slots) if searched else None
    if start is None or clock.is_over():
        return found
    again = LayerSearch(problem, seed).run(clock.within(), start=start)
    return min(found, again, key=lambda each: rank(problem, each.slots))


def _is_of_pairs(problem: Problem) -> bool:
    """Whether it is about pairs alone, of one copy each: what partitions and programme know."""
    single = problem.is_plain and not problem.may_copy
    return single and not Objective(problem).counts_visits


def _optimum(problem: Problem, limits: Limits) -> Candidate | None:
    """Return the optimum over all partitions with its certificate, where it is in reach."""
    found = chain(problem, limits=limits)
    if found is None or found.caps is None or found.bound is None:
        return None
    certificate = certified(problem, found.caps, "complete dynamic programme", int(found.bound))
    return replace(found, certificate=certificate)


def _with_bound(problem: Problem, found: Candidate, limits: Limits) -> Candidate:
    """Add what pairs cost at least, and whether that is near enough."""
    cost = Objective(problem).cost(Placement(found.slots, num_experts=problem.experts))
    limits.tell("bound", cost / Objective(problem).scale)
    proven = bound(problem, problem.caps.kept(found.slots), limits=limits, target=cost)
    if proven is None:
        return found
    found = replace(
        found,
        bound=proven.cost,
        bound_source=proven.source,
        certificate=proven.certificate,
        status="interrupted" if proven.interrupted else found.status,
        details=replace(found.details, bound=BoundDetails(proven.levels)),
    )
    if proven.cost >= cost:
        return replace(found, status="optimal")
    if limits.gap is not None and cost - proven.cost <= limits.gap * cost:
        return replace(found, status="gap_reached")
    return found
