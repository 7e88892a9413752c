"""What generalises: a norm, room for what experts do on their own, and the mean of all windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moetuner as mt
from moetuner import _core


@pytest.mark.parametrize("used", [1, 2, 4])
def test_one_window_stays_as_it_is(used: int) -> None:
    """Windows without tokens are none."""
    load = np.random.default_rng(0).integers(0, 9999, (6, 3, 12)).astype(np.uint64)
    load[used:] = 0
    problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(4), objective="balance")
    unseen = mt.solve(problem, "heuristic", iterations=0).details.unseen
    assert unseen is not None
    assert unseen.chosen == ("norm 8, noise" if used > 1 else "maximum")
    assert unseen.reason == (f"for {used} windows" if used > 1 else "too few windows")


def placed(load: np.ndarray, **options: Any) -> list[set[int]]:
    """Experts of both devices, two slots each."""
    capacity, arguments = np.full((1, 2), 2), {"nearest": False, "norm": 8, **options}
    layers = _core.Layers(load, np.ones(len(load)), capacity, [0, 0], [1.0, 1.0], **arguments)
    slots = layers.place(np.array([[[0, 2], [1, 3]]], np.int32), trials=2000)[0]
    return [set(row) for row in slots[0].tolist()]


def test_noise_spreads_experts_that_change() -> None:
    """Two experts that made up for each other belong together, unless it is noise that they do."""
    rng = np.random.default_rng(0)
    load = np.full((40, 1, 4), 1000.0)
    swing = rng.choice([-300.0, 300.0], 40)
    load[:, 0, 0] += swing
    load[:, 0, 1] -= swing
    assert {0, 1} in placed(load)
    assert {0, 1} not in placed(load, noise=10.0)


def test_mixed_levels_the_mean_of_windows() -> None:
    """One pairing of experts levels two kinds of windows, and another one their mean."""
    load = np.tile(np.array([[[10.0, 6, 0, 4]], [[2.0, 2, 12, 4]]]), (10, 1, 1))
    assert {0, 2} in placed(load), "largest loads 10 and 14, of the mean 12"
    assert {0, 3} in placed(load, mixed=100.0), "largest loads 14 and 14, of the mean 10"
