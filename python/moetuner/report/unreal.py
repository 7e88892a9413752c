"""Recognise routing that no router made, such as the random routing of benchmarks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moetuner.recording import Recording
from moetuner.report.findings import Finding
from moetuner.report.loads import count_part_loads
from moetuner.report.structure import Structure
from moetuner.trace import RoutingTrace, as_trace

# Standard deviations of chance beyond which a figure is not chance.
DEVIATIONS = 4.0
# Spread of the experts' loads, a share of their mean, that has to be visible beyond chance twice
# over: with fewer tokens nothing is said. Loads of real traffic differ by several times as much.
LEAST_SPREAD = 0.1
# Least mean count of an expert without single tokens: recorded counts may be of other units.
LEAST_COUNT = 200
# Neighbouring tokens that are compared, and layers.
MOST_PAIRS, MOST_LAYERS = 20_000, 4


def find_unreal(traffic: Recording, structure: Structure) -> Finding | None:
    """Return the finding that routing looks random, or dealt out in turns; None where it does not.

    Loads that are more even than chance are dealt out. Random are those that are even within
    chance if, too, neighbouring tokens and neighbouring layers share nothing beyond chance; of
    counts alone the loads are all that is known.
    """
    load = count_part_loads(traffic)[1].sum(axis=0, dtype=np.float64)
    load = load[load.any(axis=1)]
    if not traffic.ordered:
        if not load.size or load.mean(axis=1).min() < LEAST_COUNT:
            return None
        spread = score_spread(load, 1)
        return Finding("even loads", role="warning") if within(spread) else None
    trace = as_trace(traffic)
    spread = score_spread(load, trace.top_k)
    if spread is not None and spread < -DEVIATIONS:
        return Finding("routing in turns", role="warning")
    if not within(spread) or score_neighbours(trace) > DEVIATIONS:
        return None
    bits, chance = structure.information, structure.information_chance
    if bits and chance and np.mean(bits) > np.mean(chance) / 2:
        return None
    return Finding("random routing", role="warning")


def within(score: float | None) -> bool:
    """Return whether a score is known, and no larger than chance."""
    return score is not None and score <= DEVIATIONS


def score_spread(load: NDArray[np.float64], top_k: int) -> float | None:
    """Return in deviations how far loads [L,E] of ``top_k`` experts a token are from even ones.

    That is the statistic of chi-squared, made normal by its cube root (Wilson and Hilferty). None
    where too few tokens show nothing, or every token uses all experts.
    """
    layers, experts = load.shape
    if layers == 0 or top_k >= experts:
        return None
    mean = load.mean(axis=1, keepdims=True)
    freedom = layers * (experts - 1)
    # A token's experts differ, so that loads differ less by chance.
    unit = (experts - top_k) / (experts - 1)
    statistic = float(((load - mean) ** 2 / mean).sum()) / unit
    visible = LEAST_SPREAD**2 * experts * float(mean.sum()) / unit

    def score(value: float) -> float:
        variance = 2 / (9 * freedom)
        root: float = (value / freedom) ** (1 / 3)
        return float((root - (1 - variance)) / math.sqrt(variance))

    return None if score(freedom + visible) < 2 * DEVIATIONS else score(statistic)


def score_neighbours(trace: RoutingTrace) -> float:
    """Return in deviations how many more experts neighbouring tokens share than even chance."""
    experts, top_k = trace.num_experts, trace.top_k
    tokens = min(trace.tokens, MOST_PAIRS + 1)
    layers = np.unique(np.linspace(0, trace.layers - 1, MOST_LAYERS).astype(int))
    ids = np.asarray(trace.expert_ids[:tokens])[:, layers]
    together = np.ones(tokens - 1, dtype=bool)
    if trace.sequence is not None:
        labels = np.asarray(trace.sequence[:tokens])
        together = labels[1:] == labels[:-1]
    one, other = ids[:-1][together], ids[1:][together]
    pairs = len(one) * len(layers)
    shared = sum(int((one == np.roll(other, turn, axis=2)).sum()) for turn in range(top_k))
    share = top_k / experts
    variance = top_k * share * (1 - share) * (experts - top_k) / max(experts - 1, 1)
    return float((shared - pairs * top_k * share) / math.sqrt(max(pairs * variance, 1e-12)))
