"""Placements that survive: no device, or node, holds all copies of an expert."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import skewed_loads

import moetuner as mt
from moetuner.evaluation.losses import DOMAINS, measure_losses, number_domains
from moetuner.solver.stages.floor import balanced
from moetuner.solver.stages.repair import repair


def survives(placement, topology, domain):
    """Whether every expert has copies in two failure domains, counted one by one."""
    member = number_domains(topology, domain)
    return all(
        len({member[g] for g, held in enumerate(slots) if expert in held}) > 1
        for slots in placement.slots
        for expert in range(placement.num_experts)
    )


def statistics_of(layers=3, experts=16, **drawn):
    """Return skewed loads as statistics."""
    return mt.RoutingStatistics.from_load(skewed_loads(layers, experts, **drawn))


@given(
    st.sampled_from(DOMAINS),
    st.sampled_from(["joint", "heuristic", "quick", "eplb", "lpt"]),
    st.sampled_from(["balance", "time"]),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_every_answer_survives(domain, method, goal, fill, spare, seed):
    """Searches and the packing keep the rule, with slots to spare and without, full or not."""
    topology = mt.Topology(4, 2)
    problem = mt.Problem(
        statistics_of(2, 8, windows=4, seed=seed),
        topology,
        slots_per_device=4 + spare,
        objective=goal,
        survive=domain,
        fill_slots=fill,
    )
    result = mt.solve(problem, method, iterations=50)
    if method in ("joint", "heuristic", "quick"):
        assert result.status != "violates rules"
        assert survives(result.placement, topology, domain)
    broken = [line for line in problem.violations(result.placement) if line.startswith("survive")]
    assert bool(broken) == (not survives(result.placement, topology, domain))


def test_partners_are_spread():
    """After a loss the busiest device has less to do than if copies balance loads alone."""
    statistics, topology = statistics_of(2, 32, spread=1.2), mt.Topology(8)
    kept = {
        name: mt.solve(
            mt.Problem(
                statistics, topology, slots_per_device=10, objective="balance", survive=survive
            )
        ).placement
        for name, survive in (("spread", "device"), ("plain", None))
    }
    spread, plain = (
        measure_losses(kept[name], statistics.total_load, topology) for name in ("spread", "plain")
    )
    assert spread.fatal == 0 < plain.fatal
    quick = mt.solve(
        mt.Problem(
            statistics, topology, slots_per_device=10, objective="balance", survive="device"
        ),
        "quick",
    ).placement
    packed = measure_losses(quick, statistics.total_load, topology)
    assert spread.imbalance_after_worst < packed.imbalance_after_worst
    assert mt.evaluate(kept["spread"], statistics).imbalance < 1.03


@given(st.integers(12, 40), st.integers(6, 10), st.floats(0.1, 1.0), st.integers(0, 999))
def test_copies_follow_what_a_loss_leaves(experts, devices, skew, seed):
    """What one lost copy leaves to another device is as little as copies of any numbers allow."""
    load = 1 + (1e6 * np.random.default_rng(seed).lognormal(0, skew, experts)).astype(np.int64)
    slots = -(-5 * experts // (2 * devices))
    statistics = mt.RoutingStatistics.from_load(load[None, None])
    problem = mt.Problem(
        statistics,
        mt.Topology(devices),
        slots_per_device=slots,
        objective="balance",
        survive="device",
    )
    copies = np.array([(balanced(problem)[0] == e).any(axis=1).sum() for e in range(experts)])
    left = load / (copies * (copies - 1))
    if (load / copies).max() > load.sum() / devices:
        return
    # With fewer than that left everywhere, copies of all experts need more slots than there are.
    fewest = [
        next(c for c in range(2, 10**6) if c * (c - 1) * left.max() * (1 - 1e-9) > each)
        for each in load.tolist()
    ]
    assert sum(fewest) > devices * slots or max(fewest) > devices


@pytest.mark.parametrize("method", ["quick", "heuristic"])
def test_the_worst_loss_is_near_what_one_copy_leaves(method):
    """Partners are spread and level: after the worst loss no device has much more than one copy."""
    load = (1e5 * np.random.default_rng(1).lognormal(0, 0.7, (3, 64))).astype(np.int64)
    statistics, topology = mt.RoutingStatistics.from_load(load[None]), mt.Topology(18)
    problem = mt.Problem(
        statistics, topology, slots_per_device=8, objective="balance", survive="device"
    )
    placement = mt.solve(problem, method).placement
    assert mt.evaluate(placement, statistics).imbalance < 1.01
    for layer in range(3):
        held = placement.held[layer].sum(axis=0)
        part = (load[layer] / (held * (held - 1))).max() / (load[layer].sum() / 18)
        alone = mt.Placement(placement.slots[layer : layer + 1], num_experts=64)
        after = measure_losses(alone, load[layer : layer + 1], topology).imbalance_after_worst
        assert after < (1.02 + part) * 17 / 18


def test_the_objective_weighs_losses():
    """The worst load after a loss, averaged over layers, makes a tenth of the value."""
    statistics, topology = statistics_of(), mt.Topology(4)
    options = {"slots_per_device": 8, "objective": "balance"}
    plain = mt.Problem(statistics, topology, **options)
    problem = mt.Problem(statistics, topology, survive="device", **options)
    placement = mt.solve(problem, "quick").placement
    worst = [
        measure_losses(
            mt.Placement(placement.slots[layer : layer + 1], num_experts=16),
            statistics.total_load[layer : layer + 1],
            topology,
        ).imbalance_after_worst
        for layer in range(3)
    ]
    factor = 1 + 0.1 * (np.mean(worst) - 1)
    assert problem.value(placement) == pytest.approx(plain.value(placement) * factor)


def test_a_running_placement_is_repaired():
    """What runs and dies with a device survives after few moves."""
    statistics, topology = statistics_of(1, 8, windows=4), mt.Topology(4)
    slots = [[[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, -1]]]
    running = mt.Placement(slots, num_experts=8)
    problem = mt.Problem(
        statistics, topology, slots_per_device=4, objective="balance", survive="device"
    )
    result = mt.solve(problem, initial=running, move_budget=1, expert_bytes=1)
    assert survives(result.placement, topology, "device")
    assert running.diff(result.placement).experts_moved == 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_large_layer_is_repaired_by_a_copy_of_each_expert_that_would_die(domain):
    """Where others have copies to spare, nothing else moves, and the load stays even."""
    statistics, topology = statistics_of(2, 128), mt.Topology(18, 3)
    arguments = {"slots_per_device": 16, "objective": "balance"}
    running = mt.solve(mt.Problem(statistics, topology, **arguments), "eplb").placement
    problem = mt.Problem(statistics, topology, survive=domain, **arguments)
    member = number_domains(topology, domain)
    held = np.stack([running.held[:, member == one].any(axis=1) for one in np.unique(member)])
    dying = int((held.sum(axis=0) < 2).sum())
    repaired = mt.Placement(repair(problem, running), num_experts=128)
    assert running.diff(repaired).experts_moved == dying > 20
    assert survives(repaired, topology, domain)
    assert mt.evaluate(repaired, statistics).imbalance < 1.2
