"""What generalises: chosen by cross-validation, with room for what experts do on their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moetuner import _core
from moetuner.solver.search.cross_validation import Choice, SearchSetting, _folds, choose


def table(windows: int, layers: int = 3, experts: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.floor(rng.lognormal(0, 1, (windows, layers, experts)) * 1000)


def choice(load: np.ndarray, group: np.ndarray | None = None, **options: Any) -> Choice:
    devices, layers = 4, load.shape[1]
    arguments = {
        "weight": np.ones(len(load)),
        "capacity": np.full((layers, devices), load.shape[2] // devices + 1),
        "node": np.arange(devices) // 2,
        "time": np.ones(devices),
        "nearest": False,
        "seed": 0,
        "threads": None,
        **options,
    }
    return choose(load, group=group, **arguments)


def score(load: np.ndarray) -> float:
    """Score of the maximum on windows held out."""
    found: float = choice(load).details.scores["maximum"]
    return found


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_few_windows_stay_as_they_are(windows: int) -> None:
    load = table(windows)
    found = choice(load)
    assert found.setting == SearchSetting(0)
    assert found.details.reason == "too few windows"


def test_windows_that_do_not_count_are_not_counted() -> None:
    load = table(6)
    load[0] = 0
    weight = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert choice(load, weight=weight).details.chosen == "maximum"
    assert choice(load, weight=np.ones(6)).details.folds


@pytest.mark.parametrize("group", [None, np.arange(9), np.arange(9) % 2])
def test_one_seed_gives_one_choice_on_any_number_of_threads(group: np.ndarray | None) -> None:
    load = table(9)
    one, two = (choice(load, group, threads=threads) for threads in (1, 2))
    assert one == two


def test_says_what_was_chosen_and_every_score() -> None:
    details = choice(table(8)).details
    assert details.chosen in details.scores
    assert "maximum" in details.scores
    assert all(score >= 1 for score in details.scores.values())


def test_groups_of_a_window_each_are_held_out_whole() -> None:
    details = choice(table(7), np.array([3, 1, 4, 5, 9, 2, 6])).details
    assert details.held_out == "groups"
    assert details.folds == 7


def test_groups_of_many_windows_are_not() -> None:
    details = choice(table(24), np.arange(24) % 6).details
    assert details.held_out == "windows"
    assert details.folds == 4


def test_parts_are_runs_of_neighbours() -> None:
    """Of a group's windows each part holds out a run, and parts are of one size."""
    group = np.array([0] * 12 + [1] * 8)
    fold, whole = _folds(np.arange(20), 20, group)
    assert not whole
    for number in (0, 1):
        assert np.count_nonzero(np.diff(fold[group == number])) == 3
    assert np.bincount(fold).tolist() == [5, 5, 5, 5]


def test_small_groups_share_the_parts() -> None:
    """Where no group has a window for every part, parts still have as many windows each."""
    fold, whole = _folds(np.arange(16), 16, np.arange(16) // 2)
    assert not whole
    assert np.bincount(fold).tolist() == [4, 4, 4, 4]


def test_what_recurs_is_seen() -> None:
    """Four phases in turn are in every part: what is held out was seen, exactly."""
    assert score(np.tile(table(4, experts=40), (6, 1, 1))) < 1.1


def test_neighbours_that_are_alike_do_not_vouch_for_each_other() -> None:
    """Runs of six equal windows are four windows: what is held out was never seen."""
    assert score(np.repeat(table(4, experts=40), 6, axis=0)) > 1.2


def test_unequal_devices_and_nearest_copies() -> None:
    details = choice(table(8), time=np.array([1.0, 1.0, 0.5, 0.5]), nearest=True).details
    # Imbalance is relative to what a perfect split over devices of such speeds would take.
    assert all(1 <= score < 4 for score in details.scores.values())


def test_a_layer_without_tokens() -> None:
    load = table(8)
    load[:, 1] = 0
    assert all(np.isfinite(score) for score in choice(load).details.scores.values())


def test_few_windows_without_groups_are_held_out_whole() -> None:
    assert choice(table(16, experts=40)).details.held_out == "groups"
    assert choice(table(17, experts=40)).details.held_out == "windows"


def placed(load: np.ndarray, **options: Any) -> list[set[int]]:
    """Experts of both devices, two slots each."""
    room, arguments = np.full((1, 2), 2), {"nearest": False, "norm": 2, **options}
    layers = _core.Layers(load, np.ones(len(load)), room, [0, 0], [1.0, 1.0], **arguments)
    slots = layers.place(np.array([[[0, 2], [1, 3]]], np.int32), trials=2000)[0]
    return [set(row) for row in slots[0].tolist()]


def test_noise_spreads_experts_that_change() -> None:
    """Two experts that made up for each other belong together, unless it is noise that they do."""
    rng = np.random.default_rng(0)
    load = np.full((40, 1, 4), 1000.0)
    swing = rng.choice([-300.0, 300.0], 40)
    load[:, 0, 0] += swing
    load[:, 0, 1] -= swing
    assert {0, 1} in placed(load, norm=16)
    assert {0, 1} not in placed(load, norm=16, noise=(0.0, 0.0, 10.0))


def test_noise_is_not_negative() -> None:
    with pytest.raises(ValueError, match="noise and mixed of at least 0"):
        placed(table(4, 1, 4), noise=(0.1, -0.1, 0.0))


def test_mixed_levels_the_mean_of_windows() -> None:
    """One pairing of experts levels two kinds of windows, and another one their mean."""
    load = np.tile(np.array([[[10.0, 6, 0, 4]], [[2.0, 2, 12, 4]]]), (10, 1, 1))
    assert {0, 2} in placed(load), "largest loads 10 and 14, of the mean 12"
    assert {0, 3} in placed(load, mixed=100.0), "largest loads 14 and 14, of the mean 10"


def test_what_mixes_well_is_chosen_where_it_costs_nothing() -> None:
    """Windows of ten domains on many devices of few slots, where hot experts decide."""
    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(0, 0.4, (3, 128)) + rng.normal(0, 0.7, (10, 3, 128)))
    load = np.concatenate([share * rng.lognormal(0, 0.25, share.shape) for _ in range(4)])
    found = choice(
        np.round(load * 1000),
        np.arange(40) % 10,
        capacity=np.full((3, 32), 4),
        node=np.zeros(32, np.int64),
        time=np.ones(32),
    )
    assert found.setting.mixed
    assert found.details.chosen.endswith("mixed")
