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


def test_the_gate_never_compares_with_traffic_that_the_placement_was_computed_from(
    run, ok, as_json, brief, folder
):
    """It refuses such a profile; with a part held out it compares with that part."""
    solving = ("solve", "profile.npz", "--devices", 2, "--objective", "balance")
    ok(*solving, "--out", "all.json")
    ok(*solving, "--holdout", 0.5, "--out", "half.json")
    gated = ("not-left.npz", "--profile", "profile.npz", "--fail-if-worse", 2)
    status, out, err = run("drift", "all.json", *gated)
    assert (status, out) == (2, "")
    assert "--fail-if-worse" in err
    assert "--holdout" in err
    assert run("drift", "all.json", *gated[:3], "--fail-if-drift")[0] == 0
    assert run("drift", "half.json", *gated)[0] == 0
    # Traffic that it was not computed from is a fair profile, too.
    assert run("drift", "all.json", "not-left.npz", "--profile", "served.npz", *gated[3:])[0] == 0
    assert as_json("drift", "all.json", *gated[:3])["answer"] == "not left"


@pytest.mark.parametrize("limit", [2, 5, 900])
def test_the_answer_and_the_status_are_one_decision(run, as_json, folder, limit):
    """The limit decides, with drift and without: a status of 3 never comes with "keep"."""
    rng = np.random.default_rng(1)
    of_first = 1 + rng.permutation(np.linspace(-0.7, 0.7, 80))
    apart = np.repeat(np.stack([of_first, 2 - of_first], axis=1), 4, axis=1)[:, None]
    np.savez("apart.npz", load=rng.poisson(PROFILE * apart, (80, 2, 8)))
    for name in ("apart", "worse", "not-left", "served"):
        drift = ("drift", "p.json", f"{name}.npz", "--profile", "profile.npz")
        gated = (*drift, "--fail-if-worse", limit)
        status, text, _ = run(*gated)
        change = max(row["change"] for row in as_json(*drift)["figures"])
        failed = 100 * change > limit
        assert (status, "keep the placement" in text and failed) == (3 if failed else 0, False)
        assert ("Solve again" in text) == failed
