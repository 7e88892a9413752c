"""drift: whether traffic has left the profile of a placement, and whether that matters."""

import shlex

import numpy as np
import pytest
from make import trace_of

import moetuner as mt

# Load of eight experts, two heavy ones: one among the first four, which share a device.
PROFILE = [900, 100, 100, 100, 900, 100, 100, 100]
TRAFFIC = {
    "not left": PROFILE,
    # Heavy experts change with others of their device.
    "served": [100, 900, 100, 100, 100, 100, 900, 100],
    "worse": [900, 900, 100, 100, 100, 100, 100, 100],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with a placement, the load table that it suits, and one of each answer."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, load in {"profile": PROFILE, **TRAFFIC}.items():
        np.savez(f"{name}.npz".replace(" ", "-"), load=rng.poisson(load, (40, 2, 8)))
    mt.Placement.from_assignment([[0, 0, 0, 0, 1, 1, 1, 1]] * 2, 2).save("p.json")
    return tmp_path


@pytest.mark.parametrize("answer", TRAFFIC)
def test_the_answer_is_of_the_traffic_and_of_the_placement(run, as_json, ok, folder, answer):
    """Either status can be asked for; the printed command computes a placement that serves it."""
    table = f"{answer}.npz".replace(" ", "-")
    drift = ("drift", "p.json", table, "--profile", "profile.npz")
    actual = as_json(*drift)
    assert actual["answer"] == answer
    assert run(*drift, "--fail-if-drift")[0] == (0 if answer == "not left" else 3)
    assert run(*drift, "--fail-if-worse", 5)[0] == (3 if answer == "worse" else 0)
    if answer == "worse":
        ok(*shlex.split(actual["command"])[1:])
        again = as_json("drift", "placement.json", table, "--profile", table)
        assert again["answer"] == "not left"


def test_the_same_shares_in_less_even_windows_fail_the_gate_on_what_is_worse(run, folder):
    """Experts have the profile's tokens, most of a window's on one device: no drift, but worse."""
    rng = np.random.default_rng(1)
    of_first = 1 + rng.permutation(np.linspace(-0.7, 0.7, 80))
    apart = np.repeat(np.stack([of_first, 2 - of_first], axis=1), 4, axis=1)[:, None]
    np.savez("apart.npz", load=rng.poisson(PROFILE * apart, (80, 2, 8)))
    drift = ("drift", "p.json", "--profile", "profile.npz")
    gates = ("--fail-if-drift", "--fail-if-worse=5", "--fail-if-worse=900")
    assert [run(*drift, "apart.npz", gate)[0] for gate in gates] == [0, 3, 0]


@pytest.mark.parametrize("machine", [("--topology", "pcie5-island2"), ("--devices", 2)])
@pytest.mark.parametrize("slots", [4, 6])
def test_the_next_placement_is_for_the_same_machine(as_json, ok, brief, folder, machine, slots):
    """The printed command keeps what serves, starts from it, and names its machine."""
    solving = ("solve", "profile.npz", *machine, "--slots-per-device", slots)
    ok(*solving, "--objective", "balance")
    served = (folder / "placement.json").read_bytes()
    drift = ("drift", "placement.json", "worse.npz", "--profile", "profile.npz")
    command = shlex.split(as_json(*drift)["command"])
    assert command[command.index("--initial") + 1] == "placement.json"
    ok(*command[1:])
    assert (folder / "placement.json").read_bytes() == served
    old, new = (
        mt.Placement.load(folder / command[-1]) for command in (["placement.json"], command)
    )
    assert new.settings["topology"] == old.settings["topology"]
    assert new.slots.shape == old.slots.shape


@pytest.mark.parametrize("options", [(), ("--window", "2000")])
def test_the_same_tokens_once_and_more_often_are_told_alike(as_json, folder, options):
    """Windows are of as many tokens on both sides, and what is left over is none of them."""
    rng = np.random.default_rng(1)
    mt.Placement.from_assignment([[0, 0, 0, 0, 1, 1, 1, 1]] * 2, 2).save("p2.json")

    def save(name, tokens, times=1):
        liking = np.log([9, 1, 1, 1, 9, 1, 1, 1])
        ids = np.argpartition(-(liking + rng.gumbel(size=(tokens, 2, 8))), 2, axis=2)[..., :2]
        ids = np.concatenate([ids] * times)
        sequence = np.arange(len(ids)) // 50
        trace_of(ids, sequence=sequence).save(name)

    save("old.safetensors", 40_300)
    changes = []
    for times in (1, 2, 4):
        rng = np.random.default_rng(2)
        save("new.safetensors", 1330, times)
        rows = as_json(
            "drift", "p2.json", "new.safetensors", "--profile", "old.safetensors", *options
        )
        changes.append(max((row["change"] for row in rows["figures"]), key=abs))
    assert np.abs(changes).max() < 0.04
