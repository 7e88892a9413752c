"""The cheapest useful step: as few moves in large models as in small ones."""

import numpy as np
import pytest

import moetuner as mt
from moetuner.solver import effort


def table(layers):
    """Load tables of 64 experts in layers of one law, which are all alike."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 1, (layers, 64))
    load = rng.poisson(8192 * share / share.sum(axis=1, keepdims=True), (20, layers, 64))
    return mt.RoutingStatistics.from_load(load)


@pytest.mark.parametrize("most", [0, 10**6])
def test_a_step_of_a_large_model_takes_few_moves(monkeypatch, most):
    """Whichever search finds it: a seventh of all moves gains three quarters."""
    monkeypatch.setattr(effort, "FEW_SLOTS", most)
    advice = mt.advise(table(4), mt.Topology(8), copies=(0,), splits=1, iterations=200)
    assert advice.step.experts <= 0.16 * advice.moving.experts
    assert advice.step.gain.gain >= 0.6 * advice.main.gain.gain
