"""The robust fit of a device's times: two lines, the larger of which counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check

Floats = NDArray[np.float64]

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


def fit_times(tokens: ArrayLike, experts: ArrayLike, microseconds: ArrayLike) -> dict[str, Any]:
    """Fit the times of a device; return fields of a cost model, as ``CostModel.fit`` has them."""
    columns = measurements(tokens, experts, microseconds)
    lines = _fit(*columns, exposes=False)
    _check_both_lines(lines, *columns)
    off, spread = cross_validate(*columns, exposes=False)
    other, other_spread = cross_validate(*columns, exposes=True)
    gain = np.array([np.mean(np.abs(a) - np.abs(b)) for a, b in zip(off, other, strict=True)])
    # The simpler model, unless the other is better by more than a standard error.
    if gain.mean() > gain.std(ddof=1) / np.sqrt(FOLDS):
        lines, off, spread = _fit(*columns, exposes=True), other, other_spread
    by_experts, by_tokens = _times(lines, *columns[:2])
    computing = int((by_tokens >= by_experts).sum())
    names = ("base_us", "expert_us", "start_us", "token_us", "exposed")
    return {
        **dict(zip(names, lines.tolist(), strict=True)),
        "residual": _root_mean_square(_errors(lines, *columns)),
        "prediction_error": _root_mean_square(np.concatenate(off)),
        "parameter_errors": tuple(spread.tolist()),
        "measured": (len(by_tokens) - computing, computing),
    }


def measurements(*values: ArrayLike) -> list[Floats]:
    """Check tokens, experts and microseconds, [n] each."""
    names = ("tokens", "experts", "microseconds")
    columns = [check.numbers_in(name, column) for name, column in zip(names, values, strict=True)]
    shapes = [list(column.shape) for column in columns]
    if columns[0].ndim != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"tokens, experts and microseconds must be [n] each, got {shapes}")
    for name, column in zip(names, columns, strict=True):
        lowest = check.SMALLEST if name == "microseconds" else 0
        for at in np.flatnonzero(~((column >= lowest) & (column <= check.LARGEST))):
            rule = f"from {lowest:g} to {check.LARGEST:g}"
            raise ValueError(f"{name} must be {rule}, got {column[at]} at {at}")
    different = len(set(zip(*columns[:2], strict=True)))
    if different < FEWEST:
        raise ValueError(
            f"fit needs at least {FEWEST} different pairs of tokens and experts, got {different}"
        )
    return columns


def _times(lines: Floats, tokens: Floats, experts: Floats) -> tuple[Floats, Floats]:
    """Compute the times [n] that a + b experts + e d tokens and c + d tokens predict."""
    a, b, c, d, e = lines
    return a + b * experts + e * d * tokens, c + d * tokens


def _errors(lines: Floats, tokens: Floats, experts: Floats, times: Floats) -> Floats:
    """Compute relative errors [n] of the larger line: timings scatter by shares."""
    return np.maximum(*_times(lines, tokens, experts)) / times - 1


def _fit(tokens: Floats, experts: Floats, times: Floats, *, exposes: bool) -> Floats:
    """Fit two lines, a to e, by deciding which one a measurement is on and fitting anew.

    Unless it ``exposes`` computing, e is 0.
    """
    best, least = np.zeros(5), np.inf
    columns = (np.stack([experts, tokens][: 1 + exposes]), tokens[None])
    # Tokens per expert decide which line is above.
    density = tokens / np.maximum(experts, 1)
    for cut in np.quantile(density, np.linspace(0, 1, FIRST_GUESSES)):
        on_tokens, weight = density >= cut, 1 / times
        for _ in range(ROUNDS):
            fitted = (
                _line(x[:, on], times[on], weight[on])
                for x, on in zip(columns, (~on_tokens, on_tokens), strict=True)
            )
            (a, b, *per_token), (c, d) = fitted
            exposed = min(sum(per_token) / d, 1.0) if d else 0.0
            lines = np.array([a, b, c, d, exposed])
            error = np.abs(_errors(lines, tokens, experts, times))
            typical = 1.4826 * float(np.median(error)) + 1e-12
            tiny = 1e-300 * typical
            softer = np.sqrt(np.minimum(1, OUTLIER * typical / np.maximum(error, tiny))) / times
            by_experts, by_tokens = _times(lines, tokens, experts)
            same = np.array_equal(by_tokens >= by_experts, on_tokens)
            if same and np.abs(softer - weight).max() <= 1e-4 * weight.max():
                break
            on_tokens, weight = by_tokens >= by_experts, softer
        loss = _loss(error)
        if loss < least:
            best, least = lines, loss
    return best


def _line(x: Floats, y: Floats, weight: Floats) -> Floats:
    """Compute the weighted least squares of y [n] on 1 and x [k,n], no coefficient negative."""
    columns, used = np.stack([weight, *(weight * x)], axis=1), np.arange(len(x) + 1)
    line = np.zeros(len(used))
    while used.size:
        found = np.linalg.lstsq(columns[:, used], weight * y, rcond=None)[0]
        if (found >= 0).all():
            line[used] = found
            break
        # The only one that is negative is 0 in the answer, too.
        size = np.sqrt(np.sum(columns[:, used] ** 2, axis=0))
        used = np.delete(used, np.argmin(found * size))
    return line


def _loss(error: Floats) -> float:
    """Compute Huber's loss at a scale of one part in a hundred: guesses compare on one scale."""
    size = np.abs(error)
    return float(np.where(size < 0.01, size**2 / 2, 0.01 * (size - 0.005)).sum())


def _check_both_lines(lines: Floats, tokens: Floats, experts: Floats, times: Floats) -> None:
    """Raise where measurements show one line only, or too few batches of one.

    Nothing is known of the other then, and predictions would be wrong wherever that one is above.
    """
    by_experts, by_tokens = _times(lines, tokens, experts)
    above = (by_tokens - by_experts) / times
    # Where lines meet, a measurement is of both, and tells them apart as little as noise does.
    off = _errors(lines, tokens, experts, times)
    clear = max(_root_mean_square(off), 1e-6)
    names = ("reading weights", "computing")
    missing = ("few tokens on many experts", "many tokens on few experts")
    alone = []
    for x in (experts, tokens):
        start, slope = _line(x[None], times, 1 / times)
        alone.append(_loss((start + slope * x) / times - 1))
    both = _loss(off)
    # Two lines have two coefficients more, and must earn them.
    odds = len(times) / 2 * np.log(max(min(alone), 1e-12) / max(both, 1e-12))
    if odds - np.log(len(times)) < SURE:
        seen = int(np.argmin(alone))
        raise ValueError(
            f"measurements must show both regimes, got {names[seen]} only: add {missing[1 - seen]}"
        )
    for name, needed, sizes in zip(
        names, missing, (experts[above < -clear], tokens[above > clear]), strict=True
    ):
        if len(sizes) < FEWEST_OF_LINE or len(np.unique(sizes)) < 2:
            raise ValueError(
                f"measurements must have at least {FEWEST_OF_LINE} batches of {name}, of two "
                f"sizes or more, got {len(sizes)}: add {needed}"
            )


def _root_mean_square(error: Floats) -> float:
    return float(np.sqrt(np.mean(error**2)))


def cross_validate(
    tokens: Floats,
    experts: Floats,
    times: Floats,
    *,
    exposes: bool,
    folds: int = FOLDS,
    seed: int = 0,
) -> tuple[list[Floats], Floats]:
    """Compute the errors on batches left out, by fold, and standard errors of the lines [5]."""
    batches = np.unique(np.stack([tokens, experts]), axis=1, return_inverse=True)[1].ravel()
    # Folds are random, since batches are measured along a grid; the answer is always the same.
    fold = np.random.default_rng(seed).permutation(int(batches.max()) + 1)[batches] % folds
    errors, lines = [], []
    for number in range(folds):
        out = fold == number
        lines.append(_fit(tokens[~out], experts[~out], times[~out], exposes=exposes))
        errors.append(_errors(lines[-1], tokens[out], experts[out], times[out]))
    # The jackknife's: the fits of all folds share most of their batches.
    return errors, np.sqrt(folds - 1) * np.std(lines, axis=0)
