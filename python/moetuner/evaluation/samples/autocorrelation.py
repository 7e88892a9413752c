"""Measure how far apart windows are independent: their autocorrelation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.samples.levels import number_groups, subtract_levels
from moetuner.recording.labelling import evenly_spaced

Floats = NDArray[np.float64]

# Largest number of windows that are compared pairwise; of more, neighbours are merged in pairs.
WINDOWS = 4096
# Standard errors above which the autocovariance at a lag is beyond chance, where those of all
# shorter lags are. Its weight rises from 0 there to 3/4 at twice as many, so no single window
# decides how many are independent.
SCORE_IN_SEQUENCE = 2.0
# The same for a lag whose shorter lags are not beyond chance: it is one of many that were tried.
SCORE_ALONE = 4.0
# The autocorrelation time is at least so many times the mean lag, weighted by correlation. Both are
# the same for a first-order autoregression that changes slowly.
TIMES_MEAN_LAG = 4
# Windows that are alike at a lag beyond 1 / 3 of all recur for the whole recording.
RECURRING_PART = 3
# Largest number of shares [W,L,E] that are compared; of more, evenly spaced layers are compared.
CELLS = 1 << 23
# Largest number of products of two shares, in the same way.
PRODUCTS = 1 << 34
# Shares are rounded to multiples of 1/SHARE_SCALE, so that sums of their products are exact in any
# order.
SHARE_SCALE = 1 << 16


@dataclass(frozen=True)
class Autocorrelation:
    """Autocorrelation of windows: how far apart two of them are independent.

    Parameters
    ----------
    correlation_time
        Integrated autocorrelation time in windows: as many are worth one independent window.
    correlation_length
        Windows over which neighbours are alike; 1 where they are no more alike than any two.
    """

    correlation_time: float = 1.0
    correlation_length: int = 1

    def number(self, windows: int) -> int:
        """Compute the effective sample size of a number of windows."""
        return int(windows / self.correlation_time + 1e-9)


INDEPENDENT = Autocorrelation()


def measure_autocorrelation(
    load: NDArray[np.unsignedinteger[Any]], group: NDArray[np.integer[Any]] | None = None
) -> Autocorrelation:
    """Compute the autocorrelation of windows from their loads [W,L,E], each group around its mean.

    The autocovariance of expert shares, summed over experts and layers, is compared with that of
    any two windows. Lags are taken in pairs (Geyer 1992), because windows that alternate are alike
    at every second lag only. Lags count up to the first pair that is not beyond chance; for longer
    periods, up to the last single lag that is clearly beyond it. The integrated autocorrelation
    time is the sum of these autocovariances over the variance without the noise of tokens.
    """
    share, noise = _compute_shares(load, group)
    merged = 1  # windows in one
    label = number_groups(len(share), group)
    while len(share) > WINDOWS:
        half = len(share) // 2
        share = np.round(share[: 2 * half].reshape(half, 2, -1).sum(axis=1) / 2)
        merged, noise = 2 * merged, noise / 2
        label = np.zeros(half, np.int64)  # two windows of different groups are merged
    covariance, weight, variance = _measure_lags(share, label)
    if not len(covariance):
        return INDEPENDENT
    # Two estimates of the variance without noise: the line through the first two lags, at lag 0,
    # and the variance less the noise that so many tokens have. Their geometric mean is steadier.
    second, largest = covariance[1] if len(covariance) > 1 else 0.0, float(covariance.max())
    by_line = max(2 * covariance[0] - second, largest)
    by_tokens = max(variance - noise, largest)
    scale = math.sqrt(by_tokens * min(by_line, by_tokens))
    correlation = weight * np.clip(covariance / scale, -1.0, 1.0)
    # Cut off where the cumulative sum is largest: what follows alternates, or is negative.
    correlation = correlation[: int(np.cumsum(correlation).argmax()) + 1]
    time = 1 + 2 * max(float(correlation.sum()), 0.0)
    # Where two slow processes take turns, correlations alternate and their sum is small, but each
    # process stays alike as long as ever: the mean lag shows it.
    mean_lag = float((np.arange(1, len(correlation) + 1) * correlation).sum()) / time
    time = max(time, TIMES_MEAN_LAG * mean_lag)
    if len(covariance) > len(share) / RECURRING_PART:
        # Windows that recur up to the end are worth no more than those of one period.
        time = max(time, float(weight[-1] * len(covariance)))
    last_lag = int(np.flatnonzero(weight >= 1 / 2).max(initial=-1)) + 1
    return Autocorrelation(merged * time, merged * max(round(time), last_lag, 1))


def _compute_shares(
    load: NDArray[np.unsignedinteger[Any]], group: NDArray[np.integer[Any]] | None
) -> tuple[Floats, float]:
    """Compute shares [W,L*E] less the mean of their group, as whole numbers, in order of time.

    Also compute the mean squared distance of a window from its expectation that the noise of its
    tokens explains.
    """
    windows, layers, experts = load.shape
    compared = min(windows, WINDOWS)
    fits = min(CELLS // max(windows * experts, 1), PRODUCTS // (compared**2 * experts), layers)
    chosen = evenly_spaced(layers, max(fits, 1))
    share: Floats = np.zeros((windows, len(chosen), experts))
    noise = 0.0
    # Window by window: arrays of all of them take longer to allocate than to compute.
    for to, counts in zip(share, load, strict=True):
        tokens = counts[chosen].sum(axis=1, keepdims=True)
        np.divide(counts[chosen], tokens, out=to, where=tokens > 0)
        noise += float(((to * (1 - to)).sum(axis=1) / np.maximum(tokens[:, 0], 1)).sum())
    share = share.reshape(windows, -1)
    is_empty = ~share.any(axis=1)
    subtract_levels(share, group)
    # Windows without tokens must not look alike.
    share[is_empty] = 0
    share *= SHARE_SCALE
    return np.round(share, out=share), noise / windows * SHARE_SCALE**2


def _measure_lags(share: Floats, label: NDArray[np.int64]) -> tuple[Floats, Floats, float]:
    """Compute autocovariances of windows [W,F] by lag, their weights, and the variance with noise.

    Lags end where windows are no more alike than any two; there may be none. The weight of a lag is
    from 0 to 1, by how far its autocovariance is beyond chance. The mean over any two windows of a
    group [W] is subtracted: around the mean of their group they are slightly anticorrelated, and
    windows of different groups are not correlated.
    """
    windows = len(share)
    if windows < 3 or not share.any():
        return np.empty(0), np.empty(0), 0.0
    products = share @ share.T
    squares = np.diagonal(products).copy()
    mean = _centre(products, label)
    error = float(products[~np.eye(windows, dtype=bool)].std())
    furthest = max(windows // 2, 1)
    every_lag = np.arange(1, furthest + 1)
    covariances = np.array([np.diagonal(products, lag).mean() for lag in every_lag])
    errors = max(error, 1e-300) / np.sqrt(windows - every_lag)
    score, weight, lags = covariances / errors, np.zeros(furthest), 0
    for first in range(0, furthest, 2):
        pair, second = slice(first, first + 2), slice(first + 1, first + 2)
        pair_score = float(covariances[pair].sum() / np.sqrt((errors[pair] ** 2).sum()))
        weight[pair] = _weigh_evidence(np.maximum(pair_score, score[pair]), SCORE_IN_SEQUENCE)
        if pair_score <= SCORE_IN_SEQUENCE:
            weight[second] = _weigh_evidence(score[second], SCORE_IN_SEQUENCE)
        if not weight[first]:
            break
        lags = first + 1 + int((weight[second] > 0).sum())
    weight[lags:] = 0
    # Neighbouring pairs of windows are alike, so they are fewer independent pairs than they seem.
    single = _weigh_evidence(score, SCORE_ALONE * math.sqrt(1 + lags))
    # Where windows recur at a lag, all shorter lags count as much.
    weight = np.maximum(weight, np.maximum.accumulate(single[::-1])[::-1])
    lags = int(np.flatnonzero(weight).max(initial=-1)) + 1
    return covariances[:lags], weight[:lags], float(squares.sum() / windows) - mean


def _weigh_evidence(score: Floats, least: float) -> Floats:
    """Compute weights from 0 to 1 of values that are so many standard errors above 0.

    The weight is 0 up to ``least``.
    """
    weight: Floats = 1 - (least / np.maximum(score, least)) ** 2
    return weight


def _centre(products: Floats, label: NDArray[np.int64]) -> float:
    """Subtract from products [W,W] of windows of one group their mean, in place.

    Returns the mean of what was subtracted, over windows. Products of windows of different groups
    have mean 0.
    """
    total = 0.0
    for number in np.unique(label):
        members = np.flatnonzero(label == number)
        pairs = np.ix_(members, members)
        products_of_group = products[pairs]
        distinct_pairs = len(members) * (len(members) - 1)
        off_diagonal = float(products_of_group.sum() - np.trace(products_of_group))
        mean = off_diagonal / max(distinct_pairs, 1)
        products[pairs] -= mean
        total += len(members) * mean
    return total / len(label)
