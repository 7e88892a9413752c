"""verdict(): gains beyond noise are worth it, others are not."""

import numpy as np
import pytest

import moetuner as mt

TABLE = mt.RoutingStatistics.from_load(np.array([[30, 10, 10, 10]]))
BAD = mt.Placement.from_assignment([[0, 0, 1, 1]], 2)
GOOD = mt.Placement.from_assignment([[0, 1, 1, 1]], 2)


def test_balance_decides_without_times():
    """From 4/3 to 1 is a quarter less."""
    found = mt.verdict(mt.evaluate(BAD, TABLE), mt.evaluate(GOOD, TABLE))
    assert (found.measure, found.gain) == ("imbalance", pytest.approx(0.25))
    assert found.is_worth_it
    assert str(found) == "worth it: imbalance 1.333 -> 1, gain 25.0 % (2 % is noise)"
    back = mt.verdict(mt.evaluate(GOOD, TABLE), mt.evaluate(BAD, TABLE))
    assert not back.is_worth_it


def test_times_decide_where_they_are_known():
    """Balance that is hidden behind a fixed cost is not worth moving for."""
    model = mt.CostModel(0, 0, 10000, 1, token_bytes=0)
    before, after = (mt.evaluate(each, TABLE, cost_model=model) for each in (BAD, GOOD))
    found = mt.verdict(before, after)
    assert (found.measure, found.before, found.after) == ("predicted_layer_us", 10040, 10030)
    assert str(found).startswith("not worth it: predicted_layer_us 1.004e+04 us")
    assert mt.verdict(before, after, dead_zone=0).is_worth_it


def test_negative_noise_is_refused():
    """The message names it."""
    found = mt.evaluate(BAD, TABLE)
    with pytest.raises(ValueError, match="dead_zone must be a share of at least 0, got -1"):
        mt.verdict(found, found, dead_zone=-1)
