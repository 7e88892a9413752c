"""The simple methods of bench/balance.py place every expert, and find what was planted."""

from collections.abc import Callable

import balance
import numpy as np
import pytest
from instances import Instance, domains
from versus import solved

import moetuner as mt

METHODS = {
    "annealing": (balance.annealing, "numba"),
    "CP-SAT": (balance.cp_sat, "ortools"),
}


def made(name: str) -> balance.Balancer:
    """Return a method; skip where what it needs is not installed."""
    method, package = METHODS[name]
    pytest.importorskip(package, reason=f"{package} is not installed: make bench-peers")
    place = method()
    assert not isinstance(place, str)
    return place


@pytest.mark.parametrize("name", METHODS)
def test_perfect_balance_is_found(name: str) -> None:
    """Where three windows can be balanced perfectly: pairs of experts that are each other's rest.

    Devices have two slots, and only the pairs that were planted are level in every window.
    """
    random = np.random.default_rng(0)
    half = random.integers(1, 99, (3, 2, 4)).astype(float)
    load = np.concatenate([half, 100 - half], axis=2)
    initial = np.tile(np.arange(8), (2, 1)).reshape(2, 4, 2)
    slots = made(name)(load, initial, 2.0, 0)
    assert (np.sort(slots.reshape(2, -1)) == np.arange(8)).all()
    assert balance.device_loads(load, slots).max() == 100


def test_annealing_finds_copies_and_keeps_devices_valid() -> None:
    """A hot expert gets slots to spare; no device has an expert twice, none is lost."""
    load = np.ones((2, 1, 6))
    load[:, :, 5] = 7
    initial = np.arange(8).reshape(1, 4, 2) % 6
    (slots,) = made("annealing")(load, initial, 0.05, 0)
    assert all(len(set(row)) == 2 for row in slots.tolist())
    copies = np.bincount(slots.ravel(), minlength=6)
    assert copies.min() == 1
    assert copies[5] > 1


@pytest.mark.parametrize(("name", "package"), list(METHODS.values()))
def test_what_is_not_installed_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, name: Callable[[], object], package: str
) -> None:
    """The method is words then."""

    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    balance._compiled.cache_clear()
    monkeypatch.setattr(balance.importlib, "import_module", missing)
    assert f"No module named '{package}" in str(name())


def test_ours_is_compared_with_annealing_that_took_as_long() -> None:
    """Each of ours with its own: 2 % behind on what is seen in one of two, unseen in none."""
    counts = mt.RoutingStatistics.from_load(domains(1, 4, 0, 8))
    run = balance.Run(Instance("made", counts, mt.Topology(2), 4), 1)
    run.rows = {
        ("ours, short", ""): [(1.02, 1.1, 1.0)],
        ("annealing", "ours, short"): [(1.0, 1.2, 1.0)],
        ("ours, long", ""): [(1.0, 1.1, 9.0)],
        ("annealing", "ours, long"): [(1.0, 1.1, 9.0)],
    }
    seen, unseen = balance.behind([run])
    assert "seen in 1 of 2 cases (wanted: 0), worst +2.00 % (made on 2, ours, short)" in seen
    assert "unseen in 0 of 2 cases (wanted: 0), worst +0.00 % (made on 2, ours, long)" in unseen


def test_simple_methods_get_the_time_of_ours() -> None:
    """Once for each of ours, with its seconds, or all of its limit; policies have no such row."""
    counts = mt.RoutingStatistics.from_load(domains(1, 4, 0, 8))
    run = balance.Run(Instance("made", counts, mt.Topology(2), 4), 2)
    budgets = []

    def stays(load: object, initial: np.ndarray, seconds: float, seed: int) -> np.ndarray:
        budgets.append(seconds)
        return initial

    methods = {"ours": solved("contiguous", "balance"), "policy": solved("random", "balance")}
    run.play(methods, {"stays": stays}, {})
    assert list(run.means) == [("ours", ""), ("stays", "ours"), ("policy", "")]
    assert budgets == [row[2] for row in run.rows["ours", ""]]
    assert run.means["stays", "ours"][:2] == run.means["ours", ""][:2]
    budgets.clear()
    run.play(methods, {"stays": stays}, {"ours": 100.0})
    assert budgets == [100.0] * 2
