"""What experts do on their own, told from what windows have in common."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetuner.solver.search.noise import Noise, _not_negative, noise_of

WINDOWS, EXPERTS = 20, 400


def mixtures(seed: int = 0, layers: int = 4) -> np.ndarray:
    """Windows [W,L,E] that are mixtures of three: each is one of the others' mixtures."""
    rng = np.random.default_rng(seed)
    pattern = rng.lognormal(0, 0.7, (3, layers, EXPERTS))
    pattern /= pattern.mean(axis=2, keepdims=True)
    return np.einsum("wk,kle->wle", rng.dirichlet(np.ones(3), WINDOWS), pattern)


def noisy(load: np.ndarray, deviation: np.ndarray | float, seed: int = 1) -> np.ndarray:
    """Windows with normal noise on top."""
    rng = np.random.default_rng(seed)
    return np.maximum(load + deviation * rng.normal(size=load.shape), 0)


@pytest.mark.parametrize("repeats", [False, True])
def test_mixtures_of_others_are_no_noise(repeats: bool) -> None:
    found = noise_of(mixtures(), repeats=repeats)
    assert found is not None
    assert found.mean < 1e-3


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_noise_is_found(deviation: float, repeats: bool) -> None:
    """The variance that was added, whatever else windows differ by; three in four of its parts."""
    found = noise_of(noisy(mixtures(), deviation), repeats=repeats)
    assert found is not None
    assert found.mean == pytest.approx(deviation**2, rel=0.25)


def test_noise_of_busy_experts_is_a_share() -> None:
    load = mixtures()
    found = noise_of(noisy(load, 0.2 * load), repeats=True)
    assert found is not None
    assert found.share == pytest.approx(0.04, rel=0.35)
    assert found.even < 0.01


def test_without_repetition_nothing_is_made_of_a_window_itself() -> None:
    load = mixtures()
    found = noise_of(noisy(load, 0.2 * load), repeats=False)
    assert found is not None
    assert found.share == 0
    assert found.variance > 0


def test_tokens_of_windows_and_order_of_experts_do_not_matter() -> None:
    load = noisy(mixtures(), 0.1)
    found = noise_of(load, repeats=True)
    scaled = load * np.random.default_rng(2).uniform(0.5, 20, (WINDOWS, 1, 1))
    assert found is not None
    for other in (scaled, load[:, :, ::-1]):
        same = noise_of(np.ascontiguousarray(other), repeats=True)
        assert same is not None
        assert same.counted(8) == pytest.approx(found.counted(8), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("windows", "experts"), [(3, 400), (20, 20), (8, 8)])
def test_too_few_windows_or_experts_say_nothing(windows: int, experts: int) -> None:
    rng = np.random.default_rng(0)
    assert noise_of(rng.uniform(0, 9, (windows, 2, experts)), repeats=False) is None


def test_windows_and_layers_without_tokens_are_passed_over() -> None:
    load = noisy(mixtures(), 0.1)
    load[3] = 0
    load[:, 1] = 0
    found = noise_of(load, repeats=False)
    assert found is not None
    assert found.mean == pytest.approx(0.01, rel=0.25)
    assert noise_of(np.zeros((8, 2, 16)), repeats=False) is None


def test_many_windows_are_thinned() -> None:
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 0.5, (300, 1, 400))
    found = noise_of(load, repeats=False)
    assert found is not None
    assert found.mean == pytest.approx(load.var() / load.mean() ** 2, rel=0.2)


@pytest.mark.parametrize("devices", [2, 8, 32, 320])
def test_what_counts_is_the_largest_of_as_many_as_there_are_devices(devices: int) -> None:
    largest = np.random.default_rng(0).normal(size=(20_000, devices)).max(axis=1).mean()
    even, share, variance = Noise(1.0, 2.0, 3.0, mean=1.0).counted(devices)
    assert np.sqrt(even) == pytest.approx(largest, rel=0.05)
    assert (share, variance) == pytest.approx((2 * even, 3 * even))


def test_more_noise_means_a_lower_order() -> None:
    orders = [Noise(v, 0.0, 0.0, mean=v).order(8, 128) for v in (1e-6, 0.03, 0.3, 1.0, 100.0)]
    assert orders == sorted(orders, reverse=True)
    assert orders[0] == 16
    assert orders[-1] == 2


@given(
    st.lists(st.lists(st.floats(0, 4), min_size=3, max_size=3), min_size=3, max_size=8),
    st.data(),
)
def test_not_negative_is_the_least(rows: list[list[float]], data: st.DataObject) -> None:
    """No other coefficients of at least nothing fit better."""
    feature = np.array(rows)
    cells = st.lists(st.floats(-4, 4), min_size=len(rows), max_size=len(rows))
    value = np.array(data.draw(cells))
    other = np.array(data.draw(st.lists(st.floats(0, 3), min_size=3, max_size=3)))
    found = _not_negative(feature, value)
    assert (found >= 0).all()

    def error(parts: np.ndarray) -> float:
        return float(((feature @ parts - value) ** 2).sum())

    assert error(found) <= error(other) + 1e-6
    assert error(found) <= error(np.zeros(3)) + 1e-9
