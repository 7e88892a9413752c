"""How many slots for copies: placements with each number by searches of one length, compared."""

from __future__ import annotations

from moetuner.cost import size_of_expert
from moetuner.formats.engines import tokens_per_rank
from moetuner.placement import Placement
from moetuner.report.advice.request import Part, Request, Window, problem_of, search_shortly
from moetuner.report.advice.trial import (
    RUNNING,
    Key,
    evaluate_all,
    running_placement,
    without_groups,
)
from moetuner.report.advice.values import Copies


def sweep(request: Request, part: Part) -> tuple[Copies, ...]:
    """Return what each number of copies gains on the unseen traffic of a part.

    All are searched as shortly: what differs is the merit of the copies. A single number is not
    searched: the gain of the proposed placement takes the place of its own.
    """
    placements: dict[Key, Placement] = {RUNNING: running_placement(request, part)}
    # Engines have as many slots in every layer.
    may_share = request.traffic.layers > 1 and request.engine is None
    counts = request.tried_copies
    if len(counts) == 1 and not (may_share and counts[0]):
        placements[counts[0], False] = placements[RUNNING]
        return _gains(request, part, placements)
    for copies in counts:
        for are_shared in (False, True) if may_share and copies else (False,):
            average = " on average" if are_shared else ""
            request.progress(f"searching with {copies} slots for copies{average}")
            problem = problem_of(request, part.statistics, copies, are_shared=are_shared)
            placements[copies, are_shared] = search_shortly(request, problem)
    return _gains(request, part, placements)


def _gains(request: Request, part: Part, placements: dict[Key, Placement]) -> tuple[Copies, ...]:
    """Compute what placements with copies gain over what runs, and the memory they take."""
    request.progress("replaying them on what is unseen")
    problem = problem_of(request, part.statistics, 0)
    unseen = without_groups(part.unseen)
    evaluations = evaluate_all(request, placements, problem, unseen, request.windows)
    swept = []
    for key in placements:
        if isinstance(key, str):
            continue
        copies, are_shared = key
        gains: dict[Window, tuple[float, ...]] = {}
        for window, evaluated in evaluations.items():
            before = evaluated[RUNNING].predicted_layer_us or 1.0
            gains[window] = (1 - (evaluated[key].predicted_layer_us or 0.0) / before,)
        memory = None
        if request.expert_bytes is not None:
            memory = copies * request.traffic.layers * request.expert_bytes
        swept.append(Copies(copies, are_shared, gains, memory, tokens_at_once(request, copies)))
    return tuple(swept)


def tokens_at_once(request: Request, copies: int) -> int | None:
    """Compute the limit of low-latency kernels with so many slots for copies, if known."""
    size = size_of_expert(request.traffic)
    if request.engine is None or not request.engine.has_low_latency or size is None:
        return None
    return tokens_per_rank(size[0], request.topology.devices * (request.single_slots + copies))
