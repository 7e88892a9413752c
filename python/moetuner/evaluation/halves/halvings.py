"""Choose the halvings of folds: which folds are on the first side of each, and which on the second.

Halvings are balanced: any two folds are on one side as often as not (McCarthy 1969), by the
quadratic residues of a prime (Paley 1933). So about as many halvings as folds give the error that
all halvings would give.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Primes that are 3 modulo 4. Each can halve up to one fold more.
PRIMES = (3, 7, 11, 19)


def choose_halvings(folds: int) -> NDArray[np.bool_]:
    """Return which folds are on the first side of every halving [H,F]; one fold has no halving."""
    prime = next(prime for prime in PRIMES if prime + 1 >= folds)
    squares = np.arange(1, prime) ** 2 % prime
    first = np.ones((prime, prime + 1), dtype=bool)
    first[:, :prime] = np.isin((np.arange(prime)[:, None] - np.arange(prime)) % prime, squares)
    first = first[:, :folds]
    return first[first.any(axis=1) & ~first.all(axis=1)]


def list_sides(folds: int) -> list[int]:
    """Return the folds of all first sides, then those of all second ones [2*H], a bit for each."""
    is_first = choose_halvings(folds)
    sides: list[int] = (np.concatenate([is_first, ~is_first]) @ (1 << np.arange(folds))).tolist()
    return sides
