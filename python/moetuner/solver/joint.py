"""The joint method: device and cluster chosen at once, and how far from the optimum that can be.

Exact, else search, then bound, then programme: where a layer has few partitions, dynamic
programming over all of them is the optimum. Elsewhere placements are searched, and all are tried
where they are few; then a bound says what no placement can be below; and while the gap is wider
than asked for and time is left, HiGHS works on the whole co-location programme, where that fits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

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
from moetuner.solver.search.balanced import balanced
from moetuner.solver.search.fanout import dispatch
from moetuner.solver.search.layerwise import LayerSearch, layers, without_spare
from moetuner.solver.search.move_cost import widened
from moetuner.solver.search.traffic import search_traffic


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
    """Search, without a bound and without a programme; try all placements where they are few."""
    if not problem.is_plain:
        clock = Clock(limits)
        found = layers(problem, seed=seed, limits=limits)
        try:
            found = _eased(problem, found, seed, clock.within())
            return best_of_all(problem, found, clock.within())
        except KeyboardInterrupt:
            return replace(found, status="interrupted")
    clock = Clock(limits)
    if limits.time_limit is not None:
        # Whatever is found is compared with this, and has to be judged itself: no time is left for
        # that when the search ends.
        floor = Placement(balanced(problem), num_experts=problem.experts)
        begin = clock.gone
        if clock.is_over():
            return Candidate(floor.slots, "time_limit")
        Objective(problem).value(floor)
        clock = Clock(clock.within(keep=clock.gone - begin))
        if clock.is_over():
            return Candidate(floor.slots, "time_limit")
    if Objective(problem).counts_visits:
        least = fewest_visits(problem, problem.caps.over_speed, clock)
        if least is not None:
            visits = Objective(problem).traffic(Placement(least, num_experts=problem.experts))
            return Candidate(least, "optimal", visits, "every placement")
        return dispatch(problem, seed=seed, limits=clock.within(), copies=problem.may_copy)
    if not problem.may_copy:
        return search_traffic(problem, seed=seed, limits=clock.within())
    # The best with one copy of each expert is a start; copies must better it.
    single = search_traffic(problem, seed=seed, limits=clock.within(effort.SINGLE_SHARE))
    if single.status == "interrupted":
        return single
    rest = clock.within()
    if rest.time_limit == 0:
        return replace(single, status="time_limit")
    found = LayerSearch(problem, seed).run(rest, start=single.slots)
    return _eased(problem, found, seed, clock.within())


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
    single = without_spare(problem) if moving is None else None
    best = None if single is None else enumerated(single, known, caps=caps, clock=clock)
    if best is None or not len(best):
        return found
    return replace(found, slots=widened(problem, best))


def _eased(problem: Problem, found: Candidate, seed: int, limits: Limits) -> Candidate:
    """Search again from contents that exceed caps less, where those of a layer can all be tried."""
    clock = Clock(limits)
    searched = found.status == "feasible" and not clock.is_over()
    start = eased(problem, found.slots) if searched else None
    if start is None or clock.is_over():
        return found
    limits = clock.within()
    search = LayerSearch(problem, seed)
    again = search.run(limits, start=start)
    return min(found, again, key=lambda each: search.rank_of_all(each.slots))


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
