"""The builder of the core's ``Layers``: the terms that its search sums, in weighted tokens.

All costs are in weighted tokens of the slowest device, where a token takes ``token_us``. Reading
weights and the busiest port cost what they do in a predicted time. A link costs what it does if
ports are evenly used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.losses import number_domains
from moetuner.problem import Problem
from moetuner.solver.arrays import Floats, Integers
from moetuner.solver.unseen import FEWEST_WINDOWS, SearchSetting

# Transitions [L-1,E,E], and what one costs between devices [D,D].
Links = tuple[NDArray[np.uint64], Floats]

# Tokens of balance that cost as much as a unit of traffic: balance only breaks ties.
TRAFFIC_FIRST = 1e3
# Cost of the norm over losses, in mean loads of a device: the norm stands for the worst loss, and
# rises less than that. On DeepSeek-V3's loads, 72 devices x 8 slots and 36 x 16, the worst of all
# layers is 1.18 and 1.07 of the mean with this, and 1.19 and 1.08 with a tenth of it, which the
# objective has. Twice as much makes the intact machine less balanced.
LOSS = 1.0
# The same where a norm stands for windows as well. Four profiles at once are then at 1.070 and
# 1.040 intact, instead of 1.113 and 1.070 with LOSS; worst losses are 1.158 and 1.063 instead of
# 1.148 and 1.064.
LOSS_IN_WINDOWS = 0.1
# Least time of a token: it is the unit of all other costs, so it must not be 0.
LEAST_TOKEN_US = 1e-9


@dataclass(frozen=True)
class Site:
    """The devices of all layers, as the core's searches see them.

    Parameters
    ----------
    capacity
        Slots [L,D].
    node, time
        Node of every device [D], and its time per token as a share of the slowest one's [D].
    nearest
        True if the nearest copy serves.
    rules
        Rules of every placement; None where every expert must be somewhere, and no more.
    """

    capacity: Integers
    node: list[int]
    time: list[float]
    nearest: bool = False
    rules: _core.Rules | None = None


def make_site(problem: Problem, *, caps: Floats | None = None, nearest: bool | None = None) -> Site:
    """Return the devices of a problem with its rules, and caps [L] in time of the slowest device.

    ``nearest`` is by default as the problem's split has it.
    """
    return Site(
        problem.capacity,
        problem.topology.node_of_device.tolist(),
        problem.topology.time_of_device.tolist(),
        problem.serving.rule.by_home if nearest is None else nearest,
        problem.core_rules(caps),
    )


@dataclass(frozen=True)
class TimeCosts:
    """Times of weights and rows, in tokens: arguments of ``Layers.price_time``.

    A device takes the longer of ``base + expert * active experts + exposed * tokens`` and its
    tokens, and ``start`` to begin. A row at the busiest port costs ``row``. ``counted`` is True if
    rows are the visits of expert sets or pairs, else they are tokens.
    """

    base: float
    expert: float
    exposed: float
    start: float
    row: float
    counted: bool


@dataclass(frozen=True)
class VisitCosts:
    """Expert sets of every layer, and the costs of visiting a device and, on top, a node."""

    sets: list[tuple[NDArray[np.uint16], NDArray[np.uint64]]]
    device_cost: float
    node_cost: float


@dataclass(frozen=True)
class PairCosts:
    """Co-activated pairs [L,E,E], and the cost of a pair without a common device.

    With the experts per token of every layer [L], pairs estimate how many tokens visit a device.
    """

    pairs: NDArray[np.uint64]
    top_k: list[int]
    pair_cost: float = 0.0


@dataclass(frozen=True)
class LossCosts:
    """Failure domain of every device [D], and the cost of one mean load more after a loss."""

    domain: list[int]
    loss_cost: float


@dataclass(frozen=True)
class Terms:
    """Terms of a search besides windows; None for a term that costs nothing.

    Copies have costs [L,E,D]. Costs are in weighted tokens, but those of time in tokens. With
    ``lp_split`` a dispatcher divides the tokens of windows over copies optimally, and windows cost
    the slowest device's load then, instead of that of an even split.
    """

    times: TimeCosts | None = None
    copies: Floats | None = None
    visits: VisitCosts | None = None
    pairs: PairCosts | None = None
    losses: LossCosts | None = None
    lp_split: bool = False


def core_layers(
    load: Floats,
    weight: Floats,
    site: Site,
    *,
    setting: SearchSetting = SearchSetting(),  # noqa: B008 - frozen
    terms: Terms = Terms(),
) -> _core.Layers:
    """Build the core's layers for windows of load [W,L,E] with weights [W]."""
    layers = _core.Layers(
        np.ascontiguousarray(load),
        np.zeros_like(weight) if terms.lp_split else weight,
        site.capacity,
        site.node,
        site.time,
        nearest=site.nearest,
        norm=setting.norm,
        noise=setting.noise,
        mixed=setting.mean_weight,
        rules=site.rules,
    )
    # Time comes first: it may change the cost of a token.
    times, visits, pairs = terms.times, terms.visits, terms.pairs
    if times is not None:
        layers.price_time(
            base=times.base,
            expert=times.expert,
            exposed=times.exposed,
            start=times.start,
            row=times.row,
            counted=times.counted,
        )
    if terms.copies is not None:
        layers.price_copies(np.ascontiguousarray(terms.copies))
    if visits is not None:
        layers.price_visits(visits.sets, device_cost=visits.device_cost, node_cost=visits.node_cost)
    if pairs is not None:
        layers.price_pairs(pairs.pairs, pairs.pair_cost, top_k=pairs.top_k)
    if terms.losses is not None:
        layers.price_losses(terms.losses.domain, terms.losses.loss_cost)
    if terms.lp_split:
        layers.price_lp_split(np.ascontiguousarray(load), weight)
    return layers


def make_terms(problem: Problem, unit: float, *, copy_costs: Floats | None = None) -> Terms:
    """Return the terms of a problem's objective.

    The unit is ``tokens_per_unit``; copies have costs [L,D,E] in units of the objective.
    """
    copies = None if copy_costs is None else copy_costs.transpose(0, 2, 1) * unit
    return Terms(
        times=_time_costs(problem),
        copies=copies,
        visits=_visit_costs(problem, unit),
        pairs=_pair_costs(problem, unit),
        losses=loss_costs(problem),
    )


def tokens_per_unit(problem: Problem, load: Floats, weight: Floats) -> float:
    """Compute the weighted tokens on the slowest device that make one unit of the objective."""
    speed = problem.topology.speed_of_device
    if (model := problem.objective_function.cost_model) is not None:
        token_us = max(model.token_us, LEAST_TOKEN_US)
        return float(speed.min() * weight.sum() * problem.layers / token_us)
    if not problem.aim.costs_loads:
        return TRAFFIC_FIRST * problem.objective_function.scale
    return float(speed.min() * (weight * load.sum(axis=(1, 2))).sum() / speed.sum())


def windows_in_all(problem: Problem) -> float:
    """Compute how many windows of mean size, by weight, all tokens fill; 1 without tokens."""
    tokens = float(problem.load.sum(dtype=np.float64))
    return tokens / problem.windows.mean_tokens if tokens else 1.0


def visit_costs(problem: Problem, unit: float = 1.0) -> VisitCosts:
    """Return expert sets, and the costs of visiting a device and, on top, a node."""
    objective = problem.objective_function
    device_cost, node_cost = objective.visit_costs
    assert objective.sets is not None
    sets = [(layer_sets.ids, layer_sets.counts) for layer_sets in objective.sets]
    return VisitCosts(sets, device_cost * unit, node_cost * unit)


def _time_costs(problem: Problem) -> TimeCosts | None:
    """Return times of weights and rows, in tokens; None where time is not the goal."""
    model = problem.objective_function.cost_model
    if model is None:
        return None
    token_us = max(model.token_us, LEAST_TOKEN_US)
    speed, way = problem.topology.speed_of_device, problem.serving.way
    return TimeCosts(
        base=(model.base_us - model.start_us) / token_us,
        expert=model.expert_us / token_us,
        exposed=model.exposed,
        start=model.start_us / token_us,
        row=row_us(problem) * float(speed.min()) / token_us if way.visits_devices else 0.0,
        counted=problem.objective_function.knows_visits,
    )


def _visit_costs(problem: Problem, unit: float) -> VisitCosts | None:
    """Return the costs of visits of expert sets; None where visits do not count."""
    sets = problem.objective_function.sets
    if sets is None:
        return None
    tokens = float(sets[0].counts.sum())
    return visit_costs(problem, _visit_unit(problem, unit) / (problem.layers * max(tokens, 1)))


def _pair_costs(problem: Problem, unit: float) -> PairCosts | None:
    """Return co-activated pairs, for visits without expert sets, and the cost of one apart."""
    objective = problem.objective_function
    pairs, top_k = objective.coactivation, problem.statistics.top_k_of_layer
    if pairs is None or top_k is None:
        return None
    return PairCosts(pairs, top_k, _visit_unit(problem, unit) / objective.scale)


def _visit_unit(problem: Problem, unit: float) -> float:
    """Return the price of visits; none in a time, where the busiest port has a price of its own."""
    return 0.0 if problem.aim.predicts_time else unit


def loss_costs(problem: Problem) -> LossCosts | None:
    """Return the cost of lost devices; None where no loss has to be survived.

    A norm over losses and devices stands for the busiest device after the worst of them.
    """
    if problem.survive is None:
        return None
    windows = problem.windows
    tokens = float((windows.weight * windows.load.sum(axis=(1, 2))).sum())
    mean = tokens / (problem.layers * problem.devices)
    domain = number_domains(problem.topology, problem.survive)
    is_one = np.count_nonzero(windows.weight) < FEWEST_WINDOWS
    return LossCosts(domain.tolist(), (LOSS if is_one else LOSS_IN_WINDOWS) * mean)


def make_links(problem: Problem, unit: float) -> Links | None:
    """Return transitions and the cost of one over a link [D,D]; None where nothing joins layers."""
    transitions = problem.objective_function.transitions
    return None if transitions is None else (transitions, link_costs(problem, unit))


def link_costs(problem: Problem, unit: float) -> Floats:
    """Compute the cost of a pair over a link [D,D]."""
    objective = problem.objective_function
    if problem.aim.predicts_time:
        return objective.link_us * (unit / (problem.layers * windows_in_all(problem)))
    return problem.topology.cost.astype(np.float64) * (unit / objective.scale)


def row_us(problem: Problem) -> float:
    """Compute the microseconds of one more visit of the most visited device.

    Tokens come from all devices equally, and those from that device cross no link.
    """
    model, topology = problem.cost_model, problem.topology
    assert model is not None
    crossing = model.crossing_us(topology, returns=True)
    return float(crossing[topology.tier].sum(axis=0).max())
