"""Prices of links, for searches that add: what a row costs if ports are evenly used.

A predicted time waits for the busiest port and the slower of two lines, which do not add up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner.problem import Problem

Floats = NDArray[np.float64]


def link_us(problem: Problem) -> Floats:
    """Microseconds of a pair of experts that meet over a link [D,D].

    A token's state goes to the next layer's experts once each, but is counted with each of its own
    experts: in pairs, it is a top-k-th of a row.
    """
    assert problem.cost_model is not None
    weights = problem.cost_model.weights(problem.topology, returns=problem.regime == "dispatch")
    price: Floats = weights.crossing_us[problem.topology.tier] / top_k(problem)
    return price


def top_k(problem: Problem) -> float:
    """Experts that a token visits in a layer, from the counts; 1 where they do not tell."""
    pairs = problem.statistics.transitions
    load = float(problem.load[:-1].sum())
    return max(float(pairs.sum()) / load, 1.0) if pairs is not None and load else 1.0


def visit_us(problem: Problem) -> float:
    """Microseconds of a layer and window if every token visited one more device.

    Of D devices that are visited alike, a token is at home on one.
    """
    assert problem.cost_model is not None
    assert problem.statistics.sets is not None
    crossing = problem.cost_model.weights(problem.topology, returns=True).crossing_us
    tokens = float(problem.statistics.sets[0].counts.sum()) / problem.statistics.windows
    return float(crossing[min(1, len(crossing) - 1)]) * tokens * (1 - 1 / problem.devices)
