"""verdict(): a gain that is certain, and larger than its price, is worth it; others are not."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

import moetuner as mt
from moetuner.evaluation.intervals import Spread

BAD = mt.Placement.from_assignment([[0, 0, 1, 1]], 2)
GOOD = mt.Placement.from_assignment([[0, 1, 1, 1]], 2)


def table(windows=6, heavy=30):
    """Windows whose first expert is heavy, a bit more or less."""
    load = np.full((windows, 1, 4), 10)
    load[:, 0, 0] = heavy + np.arange(windows) % 2
    return mt.RoutingStatistics.from_load(load)


def judged(before, after, traffic, **options):
    """Give the verdict on a change, by balance alone."""
    sides = (mt.evaluate(each, traffic, cost_model=None) for each in (before, after))
    return mt.verdict(*sides, **options)


def test_balance_decides_without_times():
    """From 4/3 to 1 is a quarter less, in every window."""
    gain = judged(BAD, GOOD, table())
    assert (gain.measure, gain.answer, gain.units) == ("imbalance", "worth it", 6)
    assert gain.gain == pytest.approx(0.24, abs=0.01)
    assert 0.2 < gain.low < gain.gain < gain.high < 0.27
    assert gain.is_worth_it
    assert str(gain) == f"worth it: {gain.sentence}"
    assert gain.sentence.endswith(
        "24.7 % less imbalance than before (95 % interval 24.3 to 25.1 %)."
    )
    back = judged(GOOD, BAD, table())
    assert back.sentence.endswith(
        "32.8 % more imbalance than before (95 % interval 32.1 to 33.4 %)."
    )
    assert (back.answer, back.is_worth_it) == ("worse", False)
    same = judged(BAD, BAD, table())
    assert (same.gain, same.low, same.high, same.answer) == (0, 0, 0, "no evidence")


def test_times_decide_where_they_are_known():
    """Balance that is hidden behind a fixed cost is certain, and not worth moving for."""
    model = mt.CostModel(0, 0, 10000, 1, token_bytes=0)
    before, after = (mt.evaluate(each, table(), cost_model=model) for each in (BAD, GOOD))
    gain = mt.verdict(before, after)
    assert (gain.measure, gain.before, gain.after) == ("predicted_layer_us", 10040.5, 10030.5)
    assert (gain.answer, gain.is_worth_it) == ("certain but small", False)
    # The price alone decides between the two.
    assert mt.verdict(before, after, price=0).is_worth_it
    assert judged(BAD, GOOD, table(), price=0.3).answer == "certain but small"


@pytest.mark.parametrize("windows", [1, 4])
def test_nothing_is_concluded_from_few_windows(windows):
    """A gain of a quarter in each of four windows may yet be chance, and the sentence says so."""
    gain = judged(BAD, GOOD, table(windows))
    assert (gain.answer, gain.is_worth_it) == ("too few", False)
    assert "; too few independent sequences or windows for an interval" in gain.sentence


def test_a_group_is_judged_by_itself():
    """The evaluation of a group knows its traffic too."""
    load = np.concatenate([table(6).window_load, table(6, heavy=10).window_load])
    traffic = mt.RoutingStatistics.from_load(
        load, group=np.arange(12) // 6, group_names=("heavy", "even")
    )
    sides = (mt.evaluate(each, traffic, cost_model=None) for each in (BAD, GOOD))
    before, after = (each.by_group for each in sides)
    gain = {name: mt.verdict(before[name], after[name]) for name in before}
    assert (gain["heavy"].answer, gain["even"].answer) == ("worth it", "worse")
    assert gain["heavy"].units == 6


def test_what_cannot_be_judged_is_refused():
    """Evaluations of other traffic, and a price that is no share; the message has both."""
    before, after = mt.evaluate(BAD, table(6)), mt.evaluate(GOOD, table(7))
    with pytest.raises(ValueError, match="must be of the same traffic, got 6 windows and 7"):
        mt.verdict(before, after)
    there = mt.Topology(GOOD.devices, 1)
    settings = {"topology": there.to_dict()}
    apart = mt.evaluate(GOOD.with_names(settings=settings), table(6))
    assert apart == mt.evaluate(GOOD, table(6), there)
    with pytest.raises(ValueError, match="must be of one machine"):
        mt.verdict(before, apart)
    # As --price does; 5 may be meant as per cent.
    for price in (-1, 5):
        with pytest.raises(ValueError, match=f"price must be a share from 0 to 1, got {price}"):
            mt.verdict(before, before, price=price)


def test_evaluations_travel_without_their_traffic():
    """Copied or pickled they are equal, and too little to judge by; JSON has none of it."""
    before, after = mt.evaluate(BAD, table()), mt.evaluate(GOOD, table())
    for other in (copy.copy(after), pickle.loads(pickle.dumps(after))):
        assert other.imbalance == after.imbalance
        assert other.replayed is None
        gain = mt.verdict(before, other)
        assert (gain.answer, gain.low) == ("too few", None)
    assert "replayed" not in after.to_dict()


def test_splits_that_disagree_are_no_evidence():
    """An interval of one split does not outweigh another split that shows the contrary."""
    change = Spread(-1 / 6, 0.01, 39, 40)
    gain = mt.Comparison("imbalance", 1.5, 1.25, change, splits=(1 / 6, 0.1))
    assert gain.answer == "worth it"
    assert replace(gain, splits=(1 / 6, -0.05)).answer == "no evidence"


def test_python_reads_a_gain_by_its_old_name_and_json_has_one():
    """Programs that read ``mean`` get the gain; JSON has it as ``gain`` alone."""
    gain = mt.verdict(mt.evaluate(BAD, table()), mt.evaluate(GOOD, table()))
    assert gain.mean == gain.gain
    assert "mean" not in gain.to_dict()


@pytest.mark.parametrize("goal", ["balance", "time"])
def test_what_was_solved_for_is_judged(goal):
    """A placement for balance is judged in imbalance, one for time in time; both are known."""
    problem = mt.Problem(table(), mt.Topology(2), objective=goal)
    solved, model = mt.solve(problem, "quick").placement, mt.CostModel(0, 0, 100, 1, token_bytes=0)
    before, after = (mt.evaluate(each, table(), cost_model=model) for each in (BAD, solved))
    figure = {"balance": "imbalance", "time": "predicted_layer_us"}[goal]
    assert mt.verdict(before, after).measure == figure
    assert mt.judge(before, after, figure="imbalance").measure == "imbalance"
    # What a file says that is no figure is as if nothing were said.
    strange = mt.evaluate(BAD.with_names(settings={"figure": [1]}), table(), cost_model=model)
    assert mt.verdict(before, strange).measure == "predicted_layer_us"


@pytest.mark.parametrize(("share", "answer"), [(0.015, "certain but small"), (0.025, "worth it")])
def test_two_per_cent_are_the_price_where_none_is_given(share, answer):
    """Of two heavy experts that share a device, a change that parts them gains what they add."""
    more = share / (1 - share)
    load = 1e6 * (1 + more * np.array([[[1, 1, -1, -1]]]))
    load = load + np.random.default_rng(0).integers(0, 500, (20, 1, 4))
    counts = mt.RoutingStatistics.from_load(load.astype(np.uint64))
    together, apart = (mt.Placement([slots]) for slots in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]))
    gain = judged(together, apart, counts)
    assert (gain.answer, gain.gain) == (answer, pytest.approx(share, abs=1e-3))
