"""pareto(): trades of gain against moves; and migration that a rule forces."""

import numpy as np
import pytest

import moetuner as mt


@pytest.fixture
def problem():
    """Sixteen experts in two layers on four devices, as loaded in blocks."""
    load = np.random.default_rng(1).integers(1, 100, (2, 2, 16))
    return mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(4), objective="balance")


@pytest.fixture
def blocks():
    """Give the placement that engines start with."""
    return mt.Placement.from_assignment(np.tile(np.arange(16) // 4, (2, 1)), 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"move_budget": -1}, "move_budget must be at least 0 bytes, got -1"),
        ({"move_cost": float("nan")}, "move_cost must be a price of a byte of at least 0, got nan"),
        ({"expert_bytes": -1}, "expert_bytes must be a number of bytes of at least 0, got -1"),
        ({"method": "lpt"}, "initial needs method joint or heuristic, got 'lpt'"),
    ],
)
def test_wrong_moves_are_named(problem, blocks, arguments, words):
    """A message names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=words):
        mt.solve(problem, **{"initial": blocks, **arguments})


def test_initial_must_be_of_the_problem(problem, blocks):
    """Another model, or more experts on a device than it has slots, is told."""
    other = mt.Placement.from_assignment(np.tile(np.arange(8) // 2, (2, 1)), 4)
    words = "initial must have 2 layers, 16 experts and 4 devices like the problem, got 2, 8 and 4"
    for call in (
        lambda: mt.solve(problem, initial=other),
        lambda: mt.pareto(problem, other),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    uneven = mt.Placement.from_assignment(np.minimum(np.tile(np.arange(16) // 3, (2, 1)), 3), 4)
    words = "initial has 7 experts of layer 0 on device 3, which has 4 slots"
    with pytest.raises(ValueError, match=words):
        mt.solve(problem, initial=uneven)
    with pytest.raises(ValueError, match="move_budget and move_cost need initial"):
        mt.solve(problem, move_budget=1)
    with pytest.raises(ValueError, match="expert_bytes must be a positive number of bytes, got 0"):
        mt.pareto(problem, blocks, expert_bytes=0)
