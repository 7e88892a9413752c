"""Compare numbers of slots for copies, by placements from searches of the same length."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moetuner.cost import size_of_expert
from moetuner.evaluation import Evaluation
from moetuner.files.cells import counted
from moetuner.placement import Placement
from moetuner.report.advice.request import Holdout, Request, Window, build_problem
from moetuner.report.advice.trial import (
    RUNNING,
    Key,
    evaluate_all,
    find_running_placement,
    search_shortly,
)
from moetuner.report.advice.values import Copies, compute_part
from moetuner.serving.engines import tokens_per_rank

# Share of the gain of copies in all layers that copies in the fewest layers must bring.
LAYERS_SHARE = 0.9
# Smallest gain of a number of copies, on the seen traffic, with which further numbers are tried.
LEAST_GAIN = 0.005
# The placement without slots for copies.
NONE: Key = 0


class Sweep(NamedTuple):
    """What numbers of slots for copies gain and cost, and the placements searched for them.

    ``parts`` is the share of a step that the layers take with the running placement, by window,
    where the time of a step is known.
    """

    rows: tuple[Copies, ...]
    parts: dict[Window, float]
    placements: dict[Key, Placement]


def sweep(request: Request, holdout: Holdout) -> Sweep:
    """Return what each number of copies gains on the unseen traffic, and what it costs.

    All searches are equally short, so that only the copies differ; but full slots that would gain
    nothing if some of them might stay empty are not searched. A single number is not searched: the
    caller fills in the gain of the proposed placement. Numbers that take more memory than the
    running placement are searched upwards as long as each gains on the seen traffic. Where the
    first one does not, the largest is tried, and those between if it gains: copies may pay only
    together.
    """
    running = find_running_placement(request, holdout)
    placements: dict[Key, Placement] = {}
    counts = request.tried_copies
    if len(counts) == 1:
        alone = _compute_gains(request, holdout, running, {counts[0]: running})
        return alone._replace(placements={})
    values: dict[int, float] = {}

    def gains_with(copies: int) -> bool:
        request.progress(f"searching with {counted(copies, 'slot')} for copies")
        problem = build_problem(request, holdout.statistics, copies)
        wanted = min(values.values(), default=math.inf) * (1 - LEAST_GAIN)
        cutoff = wanted if values else None
        placements[copies] = search_shortly(request, problem, cutoff=cutoff)
        values[copies] = problem.value(placements[copies])
        return values[copies] < wanted

    affordable = [copies for copies in counts if copies <= request.running_copies] or [counts[0]]
    for copies in affordable:
        gains_with(copies)
    larger = counts[len(affordable) :]
    if larger:
        following, *others = larger
        if gains_with(following):
            for copies in others:
                if not gains_with(copies):
                    break
        elif others and gains_with(others.pop()):
            for copies in others:
                gains_with(copies)
    ordered: dict[Key, Placement] = {
        copies: placements[copies] for copies in counts if copies in values
    }
    return _compute_gains(request, holdout, running, ordered)


def _compute_gains(
    request: Request, holdout: Holdout, running: Placement, with_copies: dict[Key, Placement]
) -> Sweep:
    """Compute gains of placements with copies over the running one, and the memory of copies."""
    request.progress("replaying them on unseen traffic")
    placements = {RUNNING: running, **with_copies}
    evaluations = evaluate_all(request, placements, holdout.unseen, request.windows)
    # Layers are ordered by what their copies gain on the seen traffic.
    seen = {}
    if len(with_copies) > 1 and NONE in with_copies and not request.serving.way.joins_layers:
        counts = holdout.statistics
        seen = evaluate_all(request, with_copies, counts, (counts.window,))[counts.window]
    rows = []
    for copies in with_copies:
        assert isinstance(copies, int)
        gains: dict[Window, tuple[float, ...]] = {}
        for window, evaluated in evaluations.items():
            before = evaluated[RUNNING].predicted_layer_us or 1.0
            gains[window] = (1 - (evaluated[copies].predicted_layer_us or 0.0) / before,)
        layers = None
        if copies and copies in seen:
            window = max(gains, key=gains.__getitem__)
            unseen = evaluations[window]
            layers = _count_layers((seen[NONE], seen[copies]), (unseen[NONE], unseen[copies]))
        memory = None
        if request.expert_bytes is not None:
            memory = copies * request.traffic.layers * request.expert_bytes
        tokens = compute_token_limit(request, copies)
        cache_tokens = cache_share = None
        if request.memory is not None:
            more = max(copies - request.running_copies, 0)
            cache_tokens = request.memory.cache_tokens(more)
            cache_share = request.memory.cache_share(more)
        rows.append(Copies(copies, gains, memory, tokens, layers, cache_tokens, cache_share))
    parts = {
        window: compute_part(
            evaluations[window][RUNNING].predicted_layer_us or 0.0, request.traffic.layers, step_ms
        )
        for window, step_ms in request.step_ms.items()
    }
    return Sweep(tuple(rows), parts, with_copies)


def _count_layers(
    seen: tuple[Evaluation, Evaluation], unseen: tuple[Evaluation, Evaluation]
) -> int | None:
    """Return the fewest layers whose copies bring ``LAYERS_SHARE`` of all the unseen gain.

    ``seen`` and ``unseen`` are evaluations of the placements without and with copies. Layers count
    in the order of what they gain on the seen traffic. None if copies gain nothing, or there are no
    times.
    """
    gains = []
    for without, copied in (seen, unseen):
        if without.predicted_us_per_layer is None or copied.predicted_us_per_layer is None:
            return None
        gains.append(np.subtract(without.predicted_us_per_layer, copied.predicted_us_per_layer))
    order = np.argsort(-gains[0], kind="stable")
    total = gains[1].sum()
    if not total > 0:
        return None
    return int(np.argmax(np.cumsum(gains[1][order]) >= LAYERS_SHARE * total)) + 1


def compute_token_limit(request: Request, copies: int) -> int | None:
    """Compute the tokens that a rank may send at once by low-latency kernels, if known."""
    size = size_of_expert(request.traffic)
    if request.engine is None or not request.engine.has_low_latency or size is None:
        return None
    return tokens_per_rank(size[0], request.topology.devices * (request.single_slots + copies))
