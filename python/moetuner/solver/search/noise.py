"""What experts do on their own: how far windows are from what others say of them.

Most of a window is a mixture of others: languages share experts, domains drift together. What is
left of it is noise as far as a placement is concerned, and says how far to trust the windows seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from moetuner.solver import effort

Floats = NDArray[np.float64]

# The fewest windows that say anything.
FEWEST_WINDOWS = 4
# Ridge penalties that are tried, as shares of a window's mean square.
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3)
# Added to what squares are weighed by, so that idle experts do not decide.
FLOOR = 0.3
# Norms that the core knows, and how sharp they may be (bench/RESULTS.md).
ORDERS, SHARPNESS = (2, 4, 8, 16), 0.6


@dataclass(frozen=True)
class Noise:
    """The variance of an expert's own load in a window, in squares of the mean expert's load.

    Parameters
    ----------
    even, share, variance
        Parts of the square of the mean expert's load, of the expert's own load, and of the variance
        of that among windows (``rust/layer/noise.rs``).
    mean
        What the variance is on average.
    """

    even: float
    share: float
    variance: float
    mean: float

    def counted(self, devices: int) -> tuple[float, float, float]:
        """Return the same times the square of how many standard deviations count.

        The slowest of D devices that are equally loaded but for noise is above them by the
        expectation of the largest of D normal variates, which Blom's formula approximates (1958).
        """
        largest = NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
        return self.even * largest**2, self.share * largest**2, self.variance * largest**2

    def order(self, devices: int, experts: int) -> int:
        """Return the order of a norm over devices that is no sharper than noise lets one see.

        A standard deviation of a device's load changes its power by no more than exp(SHARPNESS).
        """
        deviation = np.sqrt(self.mean * devices / experts)
        return max((p for p in ORDERS if p * deviation <= SHARPNESS), default=ORDERS[0])


def noise_of(load: Floats, *, repeats: bool) -> Noise | None:
    """Estimate noise from windows of load [W,L,E].

    Every window is explained by a mixture of the others, by ridge regression over experts; what
    is left, squared, is explained by the variance of the expert's load in the other windows and,
    if the next window ``repeats`` one of these, by the load that was explained. None where windows
    are too few, or as many as experts: then they say all.
    """
    windows, _, experts = load.shape
    if windows > effort.NOISE_WINDOWS:
        load = load[np.linspace(0, windows - 1, effort.NOISE_WINDOWS).round().astype(np.int64)]
    if not FEWEST_WINDOWS <= windows < experts:
        return None
    squares, features = [], []
    for layer in range(load.shape[1]):
        used = load[:, layer][load[:, layer].any(axis=1)]
        if len(used) < FEWEST_WINDOWS:
            continue
        share = used * (experts / used.sum(axis=1, keepdims=True))
        rest = _unexplained(share - 1)
        n = len(share)
        spread = (share - share.mean(axis=0)) ** 2
        # Variance among the other windows: without one, a sum of squares is so much less.
        others = np.maximum(spread.sum(axis=0) - spread * n / (n - 1), 0) / (n - 2)
        explained = np.maximum(share - rest, 0)
        squares.append((rest**2).ravel())
        each = (np.ones_like(rest), others, explained**2)
        features.append(np.stack([part.ravel() for part in each], axis=1))
    if not squares:
        return None
    feature = np.concatenate(features)
    weight = 1 / np.sqrt(FLOOR + feature[:, 1] + feature[:, 2])
    feature = feature if repeats else feature[:, :2]
    parts = _not_negative(feature * weight[:, None], np.concatenate(squares) * weight)
    # Ranks on different processors round differently, and must find the same.
    even, variance, own, mean = (
        float(f"{value:.3g}")
        for value in (*parts, *([] if repeats else [0.0]), (feature @ parts).mean())
    )
    return Noise(even, own, variance, mean)


def _unexplained(share: Floats) -> Floats:
    """Leave of windows [W,E] what ridge regression on the others does not explain.

    With K the windows' products plus the penalty, that is K^-1 x over the diagonal of K^-1. The
    penalty is the one of the least generalised cross-validation error (Golub, Heath & Wahba, 1979).
    """
    experts = share.shape[1]
    values, vectors = np.linalg.eigh(share @ share.T)
    values = np.maximum(values, 0)
    along = vectors.T @ share
    best, found = np.inf, share
    for ridge in RIDGES:
        penalty = max(ridge * float(values.mean()), 1e-12)
        scaled = vectors / (values + penalty)
        rest = (scaled @ along) / (scaled * vectors).sum(axis=1, keepdims=True)
        free = 1 - float((values / (values + penalty)).sum()) / experts
        error = float((rest**2).mean()) / max(free, 1e-3) ** 2
        if error < best:
            # Coefficients take as much of the noise as there are of them.
            best, found = error, rest / np.sqrt(max(free, 0.02))
    return found


def _not_negative(feature: Floats, value: Floats) -> Floats:
    """Solve least squares in few unknowns [n], none of them negative, by trying every support."""
    count = feature.shape[1]
    product, target = feature.T @ feature, feature.T @ value
    best, found = 0.0, np.zeros(count)
    for size in range(1, count + 1):
        for support in combinations(range(count), size):
            at = list(support)
            part = np.linalg.lstsq(product[np.ix_(at, at)], target[at], rcond=None)[0]
            # The squares that are left, less those without any support.
            change = part @ product[np.ix_(at, at)] @ part - 2 * part @ target[at]
            if (part >= 0).all() and change < best:
                best, found = float(change), np.zeros(count)
                found[at] = part
    return found
