"""Fits the larger of two lines to measured times: one in active experts, one in tokens.

Time is flat in tokens as long as reading the experts' weights takes longer than computing. Which
measurement is of which kind is not known, so the fit alternates: lines given the kinds, kinds given
the lines. That finds a local optimum; several first guesses, and the best of them, find a good one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._validation import numbers_in

# Different batches, twice as many as there are coefficients, and those that each line needs: with
# fewer the residual says nothing of the error.
FEWEST, FEWEST_OF_LINE = 8, 3
FOLDS = 8
# Logarithm of the odds, by Bayes' criterion, below which a second line only follows noise.
SURE = 6.0
FIRST_GUESSES = 12
ROUNDS = 50
# Huber's: residuals beyond this many typical ones count linearly, so that a few hiccups of the
# machine do not bend the lines.
OUTLIER = 1.345

Floats = NDArray[np.float64]


class TwoPlanes(NamedTuple):
    """Coefficients of ``max(a + b * experts, c + d * tokens)`` and the relative error."""

    a: float
    b: float
    c: float
    d: float
    residual: float

    def predict(self, tokens: Floats, experts: Floats) -> Floats:
        """Time of every measurement [n]."""
        return np.maximum(self.a + self.b * experts, self.c + self.d * tokens)


def measurements(*values: ArrayLike) -> list[Floats]:
    """Check tokens, experts and microseconds, [n] each.

    Raises
    ------
    ValueError
        If there are too few, or one is out of range.
    """
    names = ("tokens", "experts", "microseconds")
    columns = [numbers_in(name, column) for name, column in zip(names, values, strict=True)]
    shapes = [list(column.shape) for column in columns]
    if columns[0].ndim != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"tokens, experts and microseconds must be [n] each, got {shapes}")
    for name, column in zip(names, columns, strict=True):
        timed = name == "microseconds"
        wrong = ~(np.isfinite(column) & (column > 0 if timed else column >= 0))
        if wrong.any():
            at = int(np.argmax(wrong))
            rule = "positive" if timed else "at least 0"
            raise ValueError(f"{name} must be finite and {rule}, got {column[at]} at {at}")
    different = len(np.unique(np.stack(columns[:2]), axis=1).T)
    if different < FEWEST:
        raise ValueError(
            f"fit needs at least {FEWEST} different pairs of tokens and experts, got {different}"
        )
    return columns


class Evidence(NamedTuple):
    """What measurements know of the lines that were fitted to them.

    Parameters
    ----------
    by_experts, by_tokens
        Measurements on each line.
    coefficients
        Standard errors of a, b, c and d, by leaving out parts of the measurements.
    prediction
        Relative root mean square error on measurements left out.
    """

    by_experts: int
    by_tokens: int
    coefficients: tuple[float, float, float, float]
    prediction: float


def identified(tokens: Floats, experts: Floats, times: Floats) -> tuple[TwoPlanes, Evidence]:
    """Fit measurements, and say how well they determine each line.

    Raises
    ------
    ValueError
        If they show one line only, or too few batches of one: nothing is known of the other, and
        predictions would be wrong wherever that one is above.
    """
    found = fit(tokens, experts, times)
    above = (found.c + found.d * tokens - found.a - found.b * experts) / times
    # Where lines meet, a measurement is of both, and tells them apart as little as noise does.
    clear = max(found.residual, 1e-6)
    lines = (
        ("reading weights", "few tokens on many experts", experts, above < -clear),
        ("computing", "many tokens on few experts", tokens, above > clear),
    )
    single = []
    for x in (experts, tokens):
        start, slope = _line(x, times, 1 / times)
        single.append(_loss((start + slope * x) / times - 1))
    both = _loss(found.predict(tokens, experts) / times - 1)
    # Two lines have two coefficients more, and must earn them.
    odds = len(times) / 2 * np.log(max(min(single), 1e-12) / max(both, 1e-12))
    one_only = bool(odds - np.log(len(times)) < SURE)
    for number, (regime, missing, x, mine) in enumerate(lines):
        other = lines[1 - number][0]
        if one_only and single[number] > single[1 - number]:
            raise ValueError(
                f"measurements must show both regimes, got {other} only: add {missing}"
            )
        if not one_only and (mine.sum() < FEWEST_OF_LINE or len(np.unique(x[mine])) < 2):
            raise ValueError(
                f"measurements must have at least {FEWEST_OF_LINE} batches of {regime}, of two "
                f"sizes or more, got {int(mine.sum())}: add {missing}"
            )
    return found, _evidence(tokens, experts, times, above >= 0)


def _evidence(
    tokens: Floats, experts: Floats, times: Floats, on_tokens: NDArray[np.bool_]
) -> Evidence:
    """Leave out parts of the measurements, all repeats of a batch at once."""
    batches = np.unique(np.stack([tokens, experts]), axis=1, return_inverse=True)[1].ravel()
    # At random, since batches are measured along a grid; the answer is always the same.
    fold = np.random.default_rng(0).permutation(int(batches.max()) + 1)[batches] % FOLDS
    error, found = np.zeros(len(times)), []
    for number in range(FOLDS):
        out = fold == number
        part = fit(tokens[~out], experts[~out], times[~out])
        error[out] = part.predict(tokens[out], experts[out]) / times[out] - 1
        found.append(part[:4])
    # The jackknife's: parts share most of what they were fitted to.
    spread = np.sqrt(FOLDS - 1) * np.std(found, axis=0)
    a, b, c, d = (float(value) for value in spread)
    root = float(np.sqrt(np.mean(error**2)))
    return Evidence(int((~on_tokens).sum()), int(on_tokens.sum()), (a, b, c, d), root)


def fit(tokens: Floats, experts: Floats, times: Floats) -> TwoPlanes:
    """Fit measurements [n] of positive times, in relative terms: timings scatter by shares.

    The residual is the root mean square of the relative errors, outliers included.
    """
    best, least = None, np.inf
    # Tokens per expert decide which line is above.
    density = tokens / np.maximum(experts, 1)
    for share in np.linspace(0, 1, FIRST_GUESSES):
        by_tokens = density >= np.quantile(density, share)
        found = _alternate(tokens, experts, times, by_tokens)
        loss = _loss(found.predict(tokens, experts) / times - 1)
        if loss < least:
            best, least = found, loss
    assert best is not None
    error = best.predict(tokens, experts) / times - 1
    return best._replace(residual=float(np.sqrt(np.mean(error**2))))


def _alternate(
    tokens: Floats, experts: Floats, times: Floats, by_tokens: NDArray[np.bool_]
) -> TwoPlanes:
    weight = 1 / times
    found = TwoPlanes(0, 0, 0, 0, 0)
    for _ in range(ROUNDS):
        a, b = _line(experts[~by_tokens], times[~by_tokens], weight[~by_tokens])
        c, d = _line(tokens[by_tokens], times[by_tokens], weight[by_tokens])
        found = TwoPlanes(a, b, c, d, 0)
        error = found.predict(tokens, experts) / times - 1
        typical = 1.4826 * float(np.median(np.abs(error))) + 1e-12
        size = np.maximum(np.abs(error), 1e-300)
        softer = np.sqrt(np.minimum(1, OUTLIER * typical / size)) / times
        now = c + d * tokens >= a + b * experts
        if np.array_equal(now, by_tokens) and np.allclose(softer, weight, rtol=1e-6):
            break
        by_tokens, weight = now, softer
    return found


def _line(x: Floats, y: Floats, weight: Floats) -> tuple[float, float]:
    """Weighted least squares of y on 1 and x, neither coefficient negative."""
    if not x.size:
        return 0.0, 0.0
    columns = np.stack([weight, weight * x], axis=1)
    target = weight * y
    both = np.linalg.lstsq(columns, target, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    # One of them is zero: the better of the two lines.
    lines = []
    for column in (0, 1):
        along = columns[:, column]
        value = max(float(along @ target) / max(float(along @ along), 1e-300), 0.0)
        lines.append((float(np.sum((value * along - target) ** 2)), column, value))
    _, column, value = min(lines)
    return (value, 0.0) if column == 0 else (0.0, value)


def _loss(error: Floats) -> float:
    """Huber's loss, with the scale of one part in a hundred: guesses compare on one scale."""
    size = np.abs(error)
    return float(np.where(size < 0.01, size**2 / 2, 0.01 * (size - 0.005)).sum())
