"""What generalises: chosen by cross-validation, and windows as likely as those seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moetuner.solver import unseen
from moetuner.solver.unseen import Choice, choose, extended


def table(windows: int, layers: int = 3, experts: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.floor(rng.lognormal(0, 1, (windows, layers, experts)) * 1000)


def choice(load: np.ndarray, group: np.ndarray | None = None, **options: Any) -> Choice:
    devices, layers = 4, load.shape[1]
    arguments = {
        "weight": np.ones(len(load)),
        "room": np.full((layers, devices), load.shape[2] // devices + 1),
        "node": np.arange(devices) // 2,
        "time": np.ones(devices),
        "nearest": False,
        "seed": 0,
        "threads": None,
        **options,
    }
    return choose(load, group=group, **arguments)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_few_windows_stay_as_they_are(windows: int) -> None:
    load = table(windows)
    found = choice(load)
    assert found.load is load
    assert found.norm == 0
    assert found.details["reason"] == "too few windows"


def test_windows_that_do_not_count_are_not_counted() -> None:
    load = table(6)
    load[0] = 0
    weight = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert choice(load, weight=weight).details["chosen"] == "maximum"
    assert "folds" in choice(load, weight=np.ones(6)).details


@pytest.mark.parametrize("group", [None, np.arange(9), np.arange(9) % 2])
def test_one_seed_gives_one_choice_on_any_number_of_threads(group: np.ndarray | None) -> None:
    load = table(9)
    one, two = (choice(load, group, threads=threads) for threads in (1, 2))
    assert one.details == two.details
    assert np.array_equal(one.load, two.load)
    assert np.array_equal(one.weight, two.weight)
    assert one.norm == two.norm


def test_says_what_was_chosen_and_every_score() -> None:
    details = choice(table(8)).details
    assert details["chosen"] in details["scores"]
    assert "maximum" in details["scores"]
    assert all(score >= 1 for score in details["scores"].values())


def test_groups_of_a_window_each_are_held_out_whole() -> None:
    details = choice(table(7), np.array([3, 1, 4, 5, 9, 2, 6])).details
    assert details["held_out"] == "groups"
    assert details["folds"] == 7


def test_groups_of_many_windows_are_not() -> None:
    details = choice(table(24), np.arange(24) % 6).details
    assert details["held_out"] == "windows"
    assert details["folds"] == 4


def test_unequal_devices_and_nearest_copies() -> None:
    details = choice(table(8), time=np.array([1.0, 1.0, 0.5, 0.5]), nearest=True).details
    # Imbalance is relative to what a perfect split over devices of such speeds would take.
    assert all(1 <= score < 4 for score in details["scores"].values())


def test_a_layer_without_tokens() -> None:
    load = table(8)
    load[:, 1] = 0
    found = choice(load)
    assert np.isfinite(found.load).all()
    assert all(np.isfinite(score) for score in found.details["scores"].values())


def test_invented_windows_vary_as_those_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unseen, "INVENTED", 20_000)
    rng = np.random.default_rng(0)
    # Loads that vary little, so that none has to be cut at zero.
    load = 1000 + rng.normal(0, 20, (6, 2, 5))
    load *= 1000 / load.sum(axis=2, keepdims=True)
    weight = np.ones(6)
    wide, weights = extended(load, weight, 0.5)
    assert np.array_equal(wide[:6], load)
    assert np.array_equal(weights[:6], weight)
    invented = wide[6:] * weights[6:, None, None]
    assert invented.sum(axis=0) == pytest.approx(0.5 * load.sum(axis=0))
    invented *= 1000 / invented.sum(axis=2, keepdims=True)
    for layer in range(2):
        seen = unseen.REACH**2 * np.cov(load[:, layer].T)
        assert np.cov(invented[:, layer].T) == pytest.approx(seen, abs=0.05 * seen.max())


def test_invented_windows_are_possible_ones() -> None:
    load = table(5)
    load[:, :, 3] = 0
    wide, weights = extended(load, np.array([1.0, 2.0, 0.0, 1.0, 1.0]), 1.0)
    assert (wide >= 0).all()
    assert not wide[:, :, 3].any()
    assert len(wide) == len(weights) == 5 + unseen.INVENTED


def test_one_seed_invents_the_same_windows() -> None:
    one, two, other = (extended(table(5), np.ones(5), 1.0, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
