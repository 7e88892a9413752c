"""Split "lp": a linear programme divides every window's tokens over copies."""

import itertools

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import in_turns

import moetuner as mt
from moetuner import _core


def least_time(slots, load, rate):
    """Solve the linear programme as it is written: tokens of every copy, and the slowest time."""
    copies = [(int(e), d) for d, held in enumerate(slots) for e in held if e >= 0]
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    tokens = [model.addVariable(lb=0) for _ in copies]
    time = model.addVariable(lb=0)
    for expert, total in enumerate(load):
        model.addConstr(sum(t for t, (e, _) in zip(tokens, copies, strict=True) if e == expert)
                        == float(total))  # fmt: skip
    for device, speed in enumerate(rate):
        served = [t for t, (_, d) in zip(tokens, copies, strict=True) if d == device]
        if served:
            model.addConstr(sum(served) <= float(speed) * time)
    model.minimize(time)
    return model.getObjectiveValue()


@st.composite
def layers(draw):
    """Draw slots [1,D,S] with copies and gaps, windows of loads [W,1,E], and rates [D]."""
    devices, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, devices * width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = np.full(devices * width, -1)
    places = rng.permutation(devices * width)
    slots[places[:experts]] = np.arange(experts)
    slots = slots.reshape(devices, width)
    for device, slot in np.argwhere(slots < 0):
        expert = rng.integers(experts)
        if rng.random() < 0.8 and expert not in slots[device]:
            slots[device, slot] = expert
    load = rng.integers(0, draw(st.sampled_from([2, 100, 10**9])), (3, 1, experts))
    rate = rng.choice([0.5, 1.0, 3.0], devices) if draw(st.booleans()) else np.ones(devices)
    return slots[None].astype(np.int32), load.astype(float), rate


@given(layers())
def test_the_slowest_device_is_done_as_soon_as_can_be(case):
    """As the linear programme says, with all tokens served by devices that hold their experts."""
    slots, load, rate = case
    served = _core.balanced_load(slots, load, rate)
    assert served.sum(axis=2) == pytest.approx(load.sum(axis=2))
    for window, tokens in zip(load[:, 0], served[:, 0], strict=True):
        assert (tokens / rate).max() == pytest.approx(
            least_time(slots[0], window, rate), rel=1e-7, abs=1e-9
        )
    # No device serves more than all of what it holds, or less than what it holds alone.
    holds = np.array([[(device == e).any() for e in range(load.shape[2])] for device in slots[0]])
    alone = holds & (holds.sum(axis=0) == 1)
    assert (served <= load @ holds.T * (1 + 1e-9) + 1e-9).all()
    assert (served >= load @ alone.T * (1 - 1e-9) - 1e-9).all()


def even_loads(slots, load, rate):
    """Give devices their tokens, set by set: that which needs longest of those that are left."""
    devices, sets = len(rate), [np.array(s) for s in itertools.product([0, 1], repeat=len(rate))]
    holds = np.array([[(device == e).any() for e in range(len(load))] for device in slots])
    # Load of the experts whose copies are all in a set.
    inside = {tuple(s): load[~holds[s == 0].any(axis=0)].sum() for s in sets}
    done, tokens = np.zeros(devices, dtype=int), np.zeros(devices)
    while not done.all():
        more = [s for s in sets if (s >= done).all() and s.sum() > done.sum()]
        needs = {
            tuple(s): (inside[tuple(s)] - inside[tuple(done)]) / rate[s > done].sum() for s in more
        }
        slowest = max(needs, key=lambda s: (needs[s], sum(s)))
        new = np.array(slowest) > done
        tokens[new], done = needs[slowest] * rate[new], np.array(slowest)
    return tokens


@given(layers())
def test_other_devices_are_level_too(case):
    """Tokens of all devices are one answer: that of the sets that need longest, one by one."""
    slots, load, rate = case
    served = _core.balanced_load(slots, load, rate)
    for window, tokens in zip(load[:, 0], served[:, 0], strict=True):
        expected = even_loads(slots[0], window, rate)
        assert tokens == pytest.approx(expected, rel=1e-7, abs=1e-7 * window.sum())


@given(layers(), st.sampled_from([1, 2, 3]))
def test_threads_change_nothing(case, threads):
    """Not the last bit."""
    slots, load, rate = case
    served = _core.balanced_load(slots, load, rate)
    assert np.array_equal(served, _core.balanced_load(slots, load, rate, threads=threads))


PLACEMENT = mt.Placement([[[0, 1], [0, 2]]])
COUNTS = mt.RoutingStatistics([[[6, 6, 0]], [[4, 0, 2]]])


def test_a_placement_is_judged_by_it():
    """Of six tokens of expert 0 the device that has nothing else takes all."""
    even, lp = (mt.evaluate(PLACEMENT, COUNTS, split=split) for split in ("even", "lp"))
    assert even.imbalance == pytest.approx(((3 + 6) / 6 + (2 + 2) / 3) / 2)
    assert lp.imbalance == pytest.approx(1.0)


def drawn(seed):
    """Draw slots [2,6,5] of 18 experts, most with copies, and counts in windows and two groups."""
    rng = np.random.default_rng([109, seed])
    slots = np.arange(18).reshape(6, 3)[None].repeat(2, axis=0)
    more = [[rng.choice(np.delete(np.arange(18), own), 2, False) for own in each] for each in slots]
    load = rng.integers(0, 1000, (5, 2, 18)).astype(np.uint64)
    load[:, :, rng.integers(18)] *= 4
    counts = mt.RoutingStatistics(load, group=np.array([0, 0, 1, 1, 1]), group_names=("a", "b"))
    return np.concatenate([slots, more], axis=2), counts


# Reading takes longer the more is computed, so that the time of every device counts.
MODEL = mt.CostModel(10.0, 3.0, 0.0, 0.02, exposed=0.6, token_bytes=1e4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speeds", [None, (1.0, 2.0, 1.0, 3.0, 1.0, 2.0)])
def test_no_figure_depends_on_numbers_of_devices(seed, speeds):
    """Devices in another order, with their speeds, are the same machine: in groups, too."""
    slots, counts = drawn(seed)
    order = np.random.default_rng(seed).permutation(6)
    values = []
    for numbers in (np.arange(6), order):
        speed = None if speeds is None else tuple(speeds[d] for d in numbers)
        placement = mt.Placement(slots[:, numbers], num_experts=18)
        evaluation = mt.evaluate(
            placement, counts, mt.Topology(6, speed=speed), split="lp", cost_model=MODEL
        )
        values.append(evaluation.to_dict())
    assert_same(*values)


def assert_same(one, other):
    """Hold figures against each other, but for tables from device to device."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"traffic"}:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple | float | int):
        assert one == pytest.approx(other, rel=1e-9)
    else:
        assert one == other


@pytest.mark.parametrize("seed", range(4))
def test_the_total_is_what_a_cap_is_held_against(seed):
    """A cap that is a hair below the total of a layer is exceeded, and one above it is kept."""
    slots, counts = drawn(seed)
    placement, topology = mt.Placement(slots, num_experts=18), mt.Topology(6)
    alone = [
        mt.evaluate(
            mt.Placement(slots[layer : layer + 1], num_experts=18),
            mt.RoutingStatistics(counts.window_load[:, layer : layer + 1]),
            topology,
            split="lp",
        ).imbalance_total
        for layer in range(2)
    ]
    total = mt.evaluate(placement, counts, topology, split="lp").imbalance_total
    assert total == pytest.approx(np.mean(alone))
    for by, is_kept in ((1 - 1e-6, False), (1 + 1e-6, True)):
        problem = mt.Problem(
            counts,
            topology,
            slots_per_device=5,
            split="lp",
            objective="balance",
            max_imbalance=max(max(alone) * by, 1.0),
        )
        assert (problem.violations(placement) == ()) is (is_kept or max(alone) <= 1 + 1e-6)


@pytest.mark.parametrize("sets", [False, True])
def test_rows_and_visits_are_of_even_shares(make_trace, sets):
    """The programme divides loads; what moves is that of an even split, and so is its time."""
    trace = make_trace(400, experts=8)
    counts = mt.RoutingStatistics.from_trace(trace, window=100, sets=sets)
    placement = mt.Placement([[[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]] * trace.layers)
    model = mt.CostModel(0.0, 0.0, 0.0, 1e-9, token_bytes=1e6)  # nothing but rows takes time
    even, lp = (
        mt.evaluate(placement, counts, split=split, cost_model=model) for split in ("even", "lp")
    )
    assert lp.imbalance < even.imbalance
    assert lp.predicted_us_per_layer == pytest.approx(even.predicted_us_per_layer)
    assert lp.busiest_port == even.busiest_port
    assert "dispatch" in lp.busiest_port or not sets


@pytest.mark.parametrize("seed", range(4))
def test_a_search_judges_what_an_evaluation_predicts(seed):
    """Time and balance of a problem are those of its evaluation, window by window."""
    slots, counts = drawn(seed)
    placement, topology = mt.Placement(slots, num_experts=18), mt.Topology(6)
    evaluation = mt.evaluate(placement, counts, topology, split="lp", cost_model=MODEL)
    for goal, figure in (("time", "predicted_layer_us"), ("balance", "imbalance")):
        problem = mt.Problem(
            counts, topology, slots_per_device=5, split="lp", objective=goal, cost_model=MODEL
        )
        # Balance weighs windows by their tokens, time counts steps.
        if goal == "time":
            assert problem.value(placement) == pytest.approx(getattr(evaluation, figure))
        result = mt.solve(problem, iterations=50)
        assert result.objective == pytest.approx(problem.value(result.placement))
        assert result.objective <= problem.value(placement) * (1 + 1e-9)


def test_lost_devices_leave_loads_that_are_divided_anew():
    """After a loss the linear programme is solved for what is left."""
    placement = mt.Placement([[[0, 1], [0, 2], [1, 2]]])
    counts = mt.RoutingStatistics([[[8, 4, 0]]])
    losses = mt.evaluate(placement, counts, split="lp").losses["device"]
    # Without 0 expert 0 is on device 1 and 1 on device 2; without 1 alike; without 2 both share 1.
    assert losses.imbalance_after == pytest.approx((8 / 6 + 8 / 6 + 1) / 3)


def test_a_trace_is_counted_first(make_trace):
    """Tokens are not divided one by one; with one copy of each expert nothing differs."""
    trace = make_trace(40, experts=8)
    single = in_turns(trace.layers, 8, 2)
    assert mt.evaluate(single, trace, split="lp") == mt.evaluate(single, trace)
