"""What makes a recording worthless, or next to it, in sentences that say what to record instead."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.cost import top_k_of
from moetuner.evaluation.replay import Traffic
from moetuner.trace import RoutingTrace

# Of a trace the first tokens tell.
SAMPLE_BYTES = 1 << 24
# Choices per expert and layer below which counts say little: chance alone moves them by a third.
FEWEST_CHOICES = 10
# Shares of the choices of the median layer, beyond which prompts must have been alike: of one
# expert in sixteen, and of as many as a token chooses.
FEW_TAKE, SAME_TAKE = 0.45, 0.9


def doubts(traffic: Traffic) -> list[str]:
    """Return warnings about a recording from which nothing good can be computed."""
    experts = traffic.num_experts
    layers: list[NDArray[Any]]
    if isinstance(traffic, RoutingTrace):
        ids = next(traffic.shards(SAMPLE_BYTES), np.empty((0, traffic.layers, traffic.top_k), int))
        layers = [ids[:, layer].ravel() for layer in range(traffic.layers)]
        load = np.stack([np.bincount(of, minlength=experts) for of in layers])
        choices = traffic.tokens * traffic.top_k
    else:
        load = traffic.total_load.astype(np.int64)
        choices = int(load.sum(axis=1).max())
        layers = [*traffic.window_load.swapaxes(0, 1)]
    if not choices:
        return ["Warning: every count is zero, so nothing was recorded: record again under load."]
    if choices < FEWEST_CHOICES * experts:
        return [
            f"Warning: {choices / experts:.1f} choices per expert and layer are too few to tell "
            f"busy experts from chance: record at least {FEWEST_CHOICES}, better hundreds."
        ]
    lines: list[str] = []
    busiest = -np.sort(-load, axis=1) / np.maximum(load.sum(axis=1, keepdims=True), 1)
    for few, limit in ((max(1, experts // 16), FEW_TAKE), (top_k_of(traffic) or 2, SAME_TAKE)):
        share = float(np.median(busiest[:, :few].sum(axis=1)))
        if share > limit and few < experts and not lines:
            lines = [
                f"Warning: {few} of {experts} experts take {share:.0%} of the choices of the "
                "median layer, as prompts do that are alike: record the prompts of real users."
            ]
    texts = [of.tobytes() for of in layers]
    copied = [layer for layer, text in enumerate(texts) if texts.index(text) < layer]
    for layer in copied[:1]:
        more = f", and {len(copied) - 1} more repeat others" if len(copied) > 1 else ""
        lines.append(
            f"Warning: layer {layer} has exactly what layer {texts.index(texts[layer])} has{more}: "
            "record every layer by itself."
        )
    return lines
