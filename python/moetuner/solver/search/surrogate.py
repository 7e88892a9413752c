"""What the core's search of layers adds up, in weighted tokens on the slowest device.

A predicted time waits for the busiest port and the slower of two lines, which do not add up. Here a
token costs ``token_us``, and a row what it costs if ports are evenly used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.problem import Problem
from moetuner.problem.objective import Objective

Floats = NDArray[np.float64]

# Tokens of balance that a unit of traffic outweighs: balance only decides between equals.
TRAFFIC_FIRST = 1e3


def tokens_per_unit(problem: Problem, load: Floats, weight: Floats) -> float:
    """Compute the weighted tokens on the slowest device that make one unit of the objective.

    Of windows of load [W,L,E] with these weights [W].
    """
    speed = problem.topology.speed_of_device
    if problem.goal == "time":
        assert problem.cost_model is not None
        token_us = max(problem.cost_model.token_us, 1e-12)
        return float(speed.min() * weight.sum() * problem.layers / token_us)
    if problem.goal == "traffic":
        return TRAFFIC_FIRST * Objective(problem).scale
    return float(speed.min() * (weight * load.sum(axis=(1, 2))).sum() / speed.sum())


def visit_prices(problem: Problem, unit: float) -> dict[str, Any]:
    """Return expert sets and a visit's costs, where visits count: arguments of the core."""
    objective = Objective(problem)
    sets = objective.sets
    if sets is None:
        return {}
    if problem.goal == "time":
        unit *= visit_us(problem)
    each = unit / (problem.layers * max(float(sets[0].counts.sum()), 1))
    device_cost, node_cost = objective.visit_costs
    return {
        "sets": [(of.ids, of.counts) for of in sets],
        "device_cost": device_cost * each,
        "node_cost": node_cost * each,
    }


def pair_prices(problem: Problem, unit: float) -> dict[str, Any]:
    """Return co-activated pairs and what one that is apart costs: arguments of the core's layers.

    Where pairs stand for visits: in regime dispatch, if expert sets are not known.
    """
    objective = Objective(problem)
    pairs = objective.coactivation
    if pairs is None:
        return {}
    tokens = float(problem.load.sum(dtype=np.float64))
    if not tokens:  # whose visits would they be?
        return {}
    if problem.goal == "time":
        # A token whose k experts are all apart makes k - 1 more visits than one whose experts are
        # together, and has k (k - 1) / 2 pairs apart.
        top = float(pairs.sum(dtype=np.float64)) / tokens + 1
        each = _visit_us(problem) * 2 / top / (problem.layers * problem.statistics.windows)
        return {"pairs": pairs, "pair_cost": unit * each}
    return {"pairs": pairs, "pair_cost": unit / objective.scale}


def link_prices(problem: Problem, unit: float) -> Floats:
    """Compute the price of a pair over a link [D,D]."""
    if problem.goal == "traffic":
        return problem.topology.cost.astype(np.float64) * (unit / Objective(problem).scale)
    return Objective(problem).link_us * (unit / (problem.layers * problem.statistics.windows))


def visit_us(problem: Problem) -> float:
    """Compute microseconds of a layer and window if every token visited one more device.

    Of D devices that are visited alike, a token is at home on one.
    """
    assert problem.statistics.sets is not None
    tokens = float(problem.statistics.sets[0].counts.sum()) / problem.statistics.windows
    return _visit_us(problem) * tokens


def _visit_us(problem: Problem) -> float:
    """Compute microseconds of one token's visit of one more device."""
    assert problem.cost_model is not None
    crossing = problem.cost_model.crossing_us(problem.topology, returns=True)
    return float(crossing[min(1, len(crossing) - 1)]) * (1 - 1 / problem.devices)
