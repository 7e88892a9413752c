"""Whether this machine gives the answers that every other one gives: ``moetuner --self-test``.

``answers.json`` has a hash of each answer. ``python -m moetuner.selftest.stored`` writes it anew,
after a change of the code that is meant to change an answer.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources

import numpy as np

from moetuner.selftest.cases import CASES, Arrays, Traffic

STORED = "answers.json"
DIGITS = 16


def hash_of(arrays: Arrays) -> str:
    """Compute a hash of the values and shapes of whole numbers, whatever their width is."""
    content = hashlib.sha256()
    for array in arrays:
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"only whole numbers are hashed, not {array.dtype}")
        content.update(repr(array.shape).encode())
        content.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return content.hexdigest()[:DIGITS]


def compute_hashes(threads: int | None = None) -> dict[str, str]:
    """Compute the hash of every case's answer on this machine."""
    traffic = Traffic(threads)
    return {name: hash_of(case(traffic)) for name, case in CASES.items()}


def read_hashes() -> dict[str, str]:
    """Read the hashes that every machine is to give."""
    text = (resources.files(__package__) / STORED).read_text(encoding="utf-8")
    hashes: dict[str, str] = json.loads(text)
    return hashes


def find_differences(threads: int | None = None) -> list[str]:
    """Return the names of the cases whose answers on this machine are others than those stored."""
    expected, actual = read_hashes(), compute_hashes(threads)
    return [name for name in expected | actual if expected.get(name) != actual.get(name)]
