"""The one builder of the core's ``Layers``: what its search adds up, in weighted tokens.

All costs are in weighted tokens on the slowest device, where a token costs ``token_us``. Weights
that are read and the busiest port count as they do in a predicted time; a link costs what it does
if ports are evenly used, and so does a pair that stands for visits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.problem import Problem
from moetuner.solver.unseen import SearchSetting

Floats = NDArray[np.float64]

# Tokens of balance that a unit of traffic outweighs: balance only decides between equals.
TRAFFIC_FIRST = 1e3
# A token that takes no time takes this: all else is counted in tokens.
LEAST_TOKEN_US = 1e-9


def core_layers(
    problem: Problem,
    load: Floats,
    weight: Floats,
    *,
    setting: SearchSetting = SearchSetting(),  # noqa: B008 - frozen
    nearest: bool | None = None,
    times: Mapping[str, Any] | None = None,
    caps: list[float] | None = None,
    prices: Floats | None = None,
    visits: Mapping[str, Any] | None = None,
    pairs: Mapping[str, Any] | None = None,
) -> _core.Layers:
    """Build the core's layers of a problem for windows of load [W,L,E] with weights [W].

    By default the nearest copy serves as the problem says. Caps [L] are of load over time per token
    of a device, and prices [L,E,D] of a copy on it; times, visits and pairs are arguments of
    ``Layers.price_time``, ``Layers.price_visits`` and ``Layers.price_pairs``.
    """
    layers = _core.Layers(
        np.ascontiguousarray(load),
        weight,
        problem.capacity,
        problem.topology.node_of_device.tolist(),
        problem.topology.time_of_device.tolist(),
        nearest=problem.split == "nearest" if nearest is None else nearest,
        norm=setting.norm,
        noise=setting.noise,
        mixed=setting.mixed,
        copies=problem.may_copy,
        forbidden=problem.rules.forbidden,
        pinned=problem.rules.pinned,
    )
    if times:
        layers.price_time(**times)
    if caps is not None:
        layers.limit(caps, problem.load.astype(np.float64))
    if prices is not None:
        layers.hold(np.ascontiguousarray(prices))
    if visits:
        layers.price_visits(**visits)
    if pairs:
        layers.price_pairs(**pairs)
    return layers


def terms_of(problem: Problem, unit: float, *, prices: Floats | None = None) -> dict[str, Any]:
    """Return the terms of a problem's objective, as arguments of ``core_layers``.

    The unit is ``tokens_per_unit``; copies have prices [L,D,E] in units of the objective.
    """
    caps = problem.caps.over_speed
    slowest = problem.topology.speed_of_device.min()
    return {
        "times": _time_prices(problem),
        "caps": None if caps is None else (caps * slowest).tolist(),
        "prices": None if prices is None else prices.transpose(0, 2, 1) * unit,
        "visits": _visit_prices(problem, unit),
        "pairs": _pair_prices(problem, unit),
    }


def tokens_per_unit(problem: Problem, load: Floats, weight: Floats) -> float:
    """Compute the weighted tokens on the slowest device that make one unit of the objective."""
    speed = problem.topology.speed_of_device
    if problem.goal == "time":
        assert problem.cost_model is not None
        token_us = max(problem.cost_model.token_us, LEAST_TOKEN_US)
        return float(speed.min() * weight.sum() * problem.layers / token_us)
    if problem.goal == "traffic":
        return TRAFFIC_FIRST * problem.objective_function.scale
    return float(speed.min() * (weight * load.sum(axis=(1, 2))).sum() / speed.sum())


def windows_in_all(problem: Problem) -> float:
    """Compute how many windows all tokens make, if each has as many as the mean by weight.

    No tokens are one window, in which nothing has a price.
    """
    tokens = float(problem.load.sum(dtype=np.float64))
    return tokens / problem.windows.mean_tokens if tokens else 1.0


def visit_costs(problem: Problem, unit: float = 1.0) -> dict[str, Any]:
    """Return expert sets and the costs of a visit, of a device and of a node on top."""
    objective = problem.objective_function
    device_cost, node_cost = objective.visit_costs
    assert objective.sets is not None
    return {
        "sets": [(layer_sets.ids, layer_sets.counts) for layer_sets in objective.sets],
        "device_cost": device_cost * unit,
        "node_cost": node_cost * unit,
    }


def _time_prices(problem: Problem) -> dict[str, Any]:
    """Return what weights and rows take, in tokens; nothing where time is not the goal."""
    model = problem.objective_function.cost_model
    if model is None:
        return {}
    token_us = max(model.token_us, LEAST_TOKEN_US)
    speed, dispatched = problem.topology.speed_of_device, problem.regime == "dispatch"
    return {
        "base": (model.base_us - model.start_us) / token_us,
        "expert": model.expert_us / token_us,
        "exposed": model.exposed,
        "start": model.start_us / token_us,
        "row": row_us(problem) * float(speed.min()) / token_us if dispatched else 0.0,
        "counted": problem.objective_function.sets is not None,
    }


def _visit_prices(problem: Problem, unit: float) -> dict[str, Any]:
    """Return the visits of expert sets at their price; nothing where visits do not count."""
    sets = problem.objective_function.sets
    if sets is None:
        return {}
    if problem.goal == "time":
        # The busiest port has a price of its own.
        return visit_costs(problem, unit=0.0)
    tokens = float(sets[0].counts.sum())
    return visit_costs(problem, unit / (problem.layers * max(tokens, 1)))


def _pair_prices(problem: Problem, unit: float) -> dict[str, Any]:
    """Return co-activated pairs, for visits without expert sets, and the price of one apart."""
    objective = problem.objective_function
    pairs, tokens = objective.coactivation, float(problem.load.sum(dtype=np.float64))
    if pairs is None or not tokens:
        return {}
    if problem.goal != "time":
        return {"pairs": pairs, "pair_cost": unit / objective.scale}
    # A token whose k experts are all apart makes k - 1 more visits than one whose experts are
    # together, and has k (k - 1) / 2 pairs apart.
    top = float(pairs.sum(dtype=np.float64)) / tokens + 1
    price = visit_us(problem) * 2 / top / (problem.layers * windows_in_all(problem))
    return {"pairs": pairs, "pair_cost": unit * price}


def links_of(problem: Problem, unit: float) -> dict[str, Any]:
    """Return transitions and the price of one over a link [D,D], as ``Layers.place`` takes them."""
    transitions = problem.objective_function.transitions
    if transitions is None:
        return {}
    return {"transitions": transitions, "link_cost": link_prices(problem, unit)}


def link_prices(problem: Problem, unit: float) -> Floats:
    """Compute the price of a pair over a link [D,D]."""
    objective = problem.objective_function
    if problem.goal == "traffic":
        return problem.topology.cost.astype(np.float64) * (unit / objective.scale)
    return objective.link_us * (unit / (problem.layers * windows_in_all(problem)))


def row_us(problem: Problem) -> float:
    """Compute microseconds of one more visit of the device that most tokens visit.

    Tokens come from all devices alike, and those at home there cross no link.
    """
    model, topology = problem.cost_model, problem.topology
    assert model is not None
    crossing = model.crossing_us(topology, returns=True)
    return float(crossing[topology.tier].sum(axis=0).max())


def visit_us(problem: Problem) -> float:
    """Compute microseconds of one token's visit of one more device.

    Of D devices that are visited alike, a token is at home on one.
    """
    assert problem.cost_model is not None
    crossing = problem.cost_model.crossing_us(problem.topology, returns=True)
    return float(crossing[min(1, len(crossing) - 1)]) * (1 - 1 / problem.devices)
