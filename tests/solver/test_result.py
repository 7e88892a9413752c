"""Details of a result: typed parts, and the same keys in JSON as ever."""

import json

import numpy as np
import pytest

import moetuner as mt
from moetuner.solver.result import (
    BoundDetails,
    CapsDetails,
    Details,
    LevelBound,
    PlaceStage,
    SearchDetails,
    UnseenDetails,
)

FULL = Details(
    SearchDetails(trials=0, stage_2=PlaceStage("skipped", (2, 3), gap=0.0)),
    CapsDetails({0: 1.5}, {0: (1.4, 1.5)}),
    UnseenDetails("maximum", scores={"maximum": 1.1}),
    BoundDetails({"devices": LevelBound(7, 3, "iterations")}, refuted="load"),
)


def test_json_has_one_flat_object_of_what_is_known():
    """Zeros are known, None and empty parts are not; nothing else needs a name of its own."""
    assert json.loads(json.dumps(FULL.to_dict())) == {
        "trials": 0,
        "stage_2": {"way": "skipped", "experts_per_device": [2, 3], "gap": 0.0},
        "caps_raised": {"0": 1.5},
        "caps_infeasible": {"0": [1.4, 1.5]},
        "unseen": {"chosen": "maximum", "scores": {"maximum": 1.1}},
        "bound": {"devices": {"crossing_pairs": 7, "iterations": 3, "ended": "iterations"}},
        "bound_refuted": "load",
    }
    assert Details().to_dict() == {}


def test_what_is_not_known_comes_from_others():
    """Facts stay where they are known; a zero is a fact."""
    other = Details(SearchDetails(trials=9, way="other"), unseen=UnseenDetails("norm 8"))
    both = FULL.or_else(other)
    assert (both.search.trials, both.search.way) == (0, "other")
    assert both.unseen is FULL.unseen
    assert Details().or_else(other) == other
    assert FULL.or_else(Details()) == FULL


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("joint", {"way"}),
        ("heuristic", {"trials"}),
        ("paper", {"stage_1", "stage_2"}),
        ("contiguous", set()),
    ],
)
def test_methods_say_what_they_did(method, keys):
    """Every method fills the parts that it knows, under the keys that scripts read."""
    pairs = np.ones((1, 4, 4), dtype=int)
    statistics = mt.RoutingStatistics(np.full((1, 2, 4), 4), pairs)
    problem = mt.Problem(statistics, mt.Topology(2), regime="follow", max_imbalance=1.0)
    details = mt.solve(problem, method, iterations=10).details
    assert set(details.to_dict()) == keys
    assert len(repr(details)) < 500
