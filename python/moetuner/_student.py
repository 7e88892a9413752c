"""Student's t: how wide an interval must be if its width was learned from few units itself."""

from __future__ import annotations

import math

# Terms of a continued fraction, and where it stops.
TERMS, SMALLEST, ENOUGH = 300, 1e-300, 1e-14


def tail(t: float, freedom: float) -> float:
    """Probability that a variate of Student's t with these degrees of freedom is above ``t``."""
    if math.isnan(t):
        return 1.0
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = 0.5 * _beta(freedom / (freedom + t * t), freedom / 2, 0.5)
    return half if t > 0 else 1 - half


def quantile(above: float, freedom: float) -> float:
    """Value that a variate exceeds with a probability of at most a half, by bisection."""
    low, high = 0.0, 1.0
    while tail(high, freedom) > above:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > above else (low, middle)
    return high


def _beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function, by its continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front += a * math.log(x) + b * math.log1p(-x)
    # Lentz's way from the front; no denominator may be 0.
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _not_zero(1 + term * d)
            c = _not_zero(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < ENOUGH:
            break
    return math.exp(front) * value / a


def _not_zero(value: float) -> float:
    return value if abs(value) > SMALLEST else SMALLEST
