"""The quick search in windows: what plugins, the method ``quick`` and large layers get."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner import _core
from moetuner.plugins import rebalance_experts
from moetuner.solver.rebalancing import rebalance


def domains(windows, layers, experts, seed=0):
    """Windows [W,L,E] of four domains that take turns, each with experts of its own."""
    random = np.random.default_rng(seed)
    popular = random.lognormal(0, 1, (4, layers, experts))
    turn = np.arange(windows) % 4
    return np.floor(1000 * popular[turn] * random.lognormal(0, 0.2, (windows, layers, experts)))


def imbalance(load, slots):
    """Largest over mean device load: the mean over layers of that over windows, by tokens."""
    holds = (slots[..., None] == np.arange(load.shape[2])).any(axis=2)
    part = holds / holds.sum(axis=1, keepdims=True)
    device = np.einsum("lde,wle->wld", part, load)
    return float((device.max(axis=2).sum(axis=0) / device.mean(axis=2).sum(axis=0)).mean())


def of_balance(problem_load, devices, width):
    return mt.balance(problem_load, devices=devices, slots_per_device=width).slots


def problem_of(load, devices=8, **options):
    statistics = mt.RoutingStatistics.from_load(load.astype(np.uint64))
    return mt.Problem(statistics, mt.Topology(devices), objective="balance", **options)


OPTIONS = [{}, {"split": "nearest"}, {"max_imbalance": 1.3}]


@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(2, 16),
    st.integers(1, 5),
    st.integers(0, 2),
    st.sampled_from(OPTIONS),
    st.integers(0, 99),
)
def test_never_behind_the_packing(windows, layers, experts, devices, more, options, seed):
    """By the objective and the caps of the problem, no answer is behind that of ``balance``."""
    load = domains(windows, layers, experts, seed)
    width = min(-(-experts // devices) + more, experts)
    given = problem_of(load, devices, slots_per_device=width, **options)
    answer = mt.solve(given, "quick")
    packed = mt.Placement(of_balance(load, devices, width), num_experts=experts)
    behind, ahead = (float(given.caps.excess(one).sum()) for one in (answer.placement, packed))
    least = given.objective_function.value(packed) * (1 + 1e-5)
    assert (behind, answer.objective) <= (ahead * (1 + 1e-9), least)


def test_windows_are_seen_one_by_one():
    """Where domains have experts of their own, windows are far better than their sum."""
    load = domains(48, 4, 64)
    slots = mt.solve(problem_of(load[:24], slots_per_device=9), "quick").placement.slots
    packed = of_balance(load[:24], 8, 9)
    gained = (imbalance(load[24:], slots) - 1) / (imbalance(load[24:], packed) - 1)
    assert gained < 0.5


@given(st.integers(1, 16), st.integers(1, 5), st.integers(0, 2), st.integers(0, 999))
def test_experts_are_placed_wherever_rules_allow_it(experts, devices, more, seed):
    """The core's augmenting paths find a placement where the problem's own matching has one."""
    random, width = np.random.default_rng(seed), -(-experts // devices) + more
    width = min(width, experts)
    forbidden = random.random((1, experts, devices)) < random.choice([0, 0.3, 0.6])
    pinned = random.random((1, experts, devices)) < random.choice([0, 0.1])
    rules = {"forbidden": np.argwhere(forbidden).tolist(), "pinned": np.argwhere(pinned).tolist()}
    load = random.integers(0, 99, (1, experts))
    try:
        problem_of(load[None], devices, slots_per_device=width, **rules)
        feasible = True
    except ValueError:
        feasible = False
    capacity = np.full((1, devices), width)
    core_rules = _core.Rules(forbidden=forbidden, pinned=pinned)
    try:
        slots = _core.replicate_experts(
            load.astype(float), capacity, np.ones(devices), rules=core_rules
        )
    except ValueError:
        assert not feasible
        return
    assert feasible
    holds = (slots[..., None] == np.arange(experts)).any(axis=2).transpose(0, 2, 1)
    assert holds.any(axis=2).all()
    assert not (holds & forbidden).any()
    assert (holds | ~pinned).all()


def test_windows_that_do_not_count_are_not_counted():
    """A window of weight zero, or without tokens, changes nothing."""
    load = domains(16, 2, 16)
    more = np.concatenate([load, 1000 * load[:1], np.zeros((1, 2, 16))])
    places = (np.full((2, 4), 5), [0] * 4, [1.0] * 4)
    weights = ((load, np.ones(16)), (more, np.append(np.ones(16), [0.0, 1.0])))
    layers = [_core.Layers(*of, *places, nearest=False, norm=8, noise=0.25) for of in weights]
    one, two = (of.construct(windows=True) for of in layers)
    assert np.array_equal(one, two)


def test_plugins_and_rebalancer_use_it():
    """The first call in windows of as many tokens is the quick search, slot for slot."""
    shares = domains(24, 3, 16)
    shares /= shares.sum(axis=2, keepdims=True)
    load = np.random.default_rng(0).multinomial(10_000, shares).astype(np.float64)
    nothing = np.full((3, 4, 5), -1, dtype=np.int32)
    expected = mt.solve(problem_of(load, 4, slots_per_device=5), "quick").placement.slots
    assert np.array_equal(rebalance_experts(load, 20, None, 1, 4).reshape(3, 4, 5), expected)
    answer = rebalance(load, nothing, time=np.ones(4), budget=60)
    assert np.array_equal(answer.slots, expected)
    assert np.array_equal(answer.moves, [20, 20, 20])


def test_large_layers_get_it():
    """More than a few slots and windows: the same search, for longer, so no worse."""
    load = domains(24, 2, 96)
    given = problem_of(load, slots_per_device=14)
    quick, full = (mt.solve(given, method, threads=2) for method in ("quick", "heuristic"))
    assert imbalance(load, full.placement.slots) < imbalance(load, quick.placement.slots) * 1.01
    assert mt.solve(given, "heuristic", threads=1).placement == full.placement


def test_real_traffic(data):
    """What nobody has seen of a real model is better balanced than by the sum of windows."""
    load = np.load(data / "qwen3-30b-a3b-languages.npz")["load"].astype(np.float64)
    seen, unseen = load[1:], load[:1]
    slots = mt.solve(problem_of(seen, 16, slots_per_device=9), "quick").placement.slots
    packed = of_balance(seen, 16, 9)
    assert (imbalance(unseen, slots) - 1) / (imbalance(unseen, packed) - 1) < 0.85
