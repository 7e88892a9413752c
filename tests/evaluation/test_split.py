"""Split "lp": a linear programme divides every window's tokens over copies."""

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    single = mt.Placement.from_assignment(np.tile(np.arange(8) % 2, (trace.layers, 1)), 2)
    assert mt.evaluate(single, trace, split="lp") == mt.evaluate(single, trace)
    copies = mt.Placement([[[*range(8)], [*range(8)]]] * trace.layers)
    with pytest.raises(ValueError, match="traffic must be counts for split 'lp'"):
        mt.evaluate(copies, trace, split="lp")


def test_the_command_line_counts_a_trace(make_trace, as_json, tmp_path, monkeypatch):
    """``evaluate --split lp`` of a trace is that of its counts."""
    monkeypatch.chdir(tmp_path)
    trace = make_trace(600, experts=8)
    trace.save("trace.safetensors")
    placement = mt.Placement([[[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]] * trace.layers)
    placement.save("placement.json")
    how = ("--split", "lp", "--window", 100)
    answer = as_json("evaluate", "placement.json", "trace.safetensors", *how)
    counts = mt.RoutingStatistics.from_trace(trace, window=100)
    expected = mt.evaluate(placement, counts, split="lp")
    assert answer["imbalance"] == pytest.approx(expected.imbalance)
    assert answer["settings"]["split"] == "lp"
    even = as_json("evaluate", "placement.json", "trace.safetensors", "--window", 100)
    assert answer["imbalance"] < even["imbalance"]
