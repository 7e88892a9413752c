"""The bench of recorded expert loads, on small made-up ones: figures that must hold."""

import json
import sys

import deepseek
import numpy as np
import pytest

LAYERS, EXPERTS, DEVICES = 2, 16, 4
NAMES = ("prefill_in100", "prefill_in200", "prefill_in400", "decode_in100out9", "decode_in200out9")


def write(folder, names=NAMES):
    """Write profiles as SGLang dumps them: a dense layer first, experts that phases like, noise."""
    rng = np.random.default_rng(0)
    liked = {phase: rng.lognormal(0, 1, (LAYERS, EXPERTS)) for phase in ("prefill", "decode")}
    for number, name in enumerate(names):
        of = liked["prefill" if number < 3 else "decode"] * rng.lognormal(0, 0.2, (LAYERS, EXPERTS))
        count = np.concatenate(
            [np.zeros((1, EXPERTS)), np.floor(1e6 * of / of.sum(axis=1, keepdims=True))]
        ).tolist()
        (folder / f"{name}.json").write_text(json.dumps({"logical_count": count}))
    return folder


def test_names_tell_what_is_judged(tmp_path):
    """Lengths of a phase, and the other phase; without such words all others."""
    profiles = deepseek.read(write(tmp_path))
    assert profiles.load.shape == (5, LAYERS, EXPERTS)
    assert (profiles.load.sum(axis=2).max(axis=1) == deepseek.CHOICES).all()
    at = {name: number for number, name in enumerate(profiles.names)}
    seen, long, longest, decode, other = (at[name] for name in NAMES)
    cases = profiles.cases()
    assert dict(cases["length"])[seen,] == tuple(sorted((long, longest)))
    assert dict(cases["phase"])[seen,] == tuple(sorted((decode, other)))
    assert {of for of, _ in cases["all of a phase"]} == {(0, 1), (2, 3, 4)}
    for half, rest in profiles.mixes(3, seed=0):
        assert sorted((*half, *rest)) == [*range(5)]
        assert len({*half} & {decode, other}) == 1
    unnamed = deepseek.Profiles(("a", "b", "c"), profiles.load[:3])
    cases = unnamed.cases()
    assert dict(cases["phase"]) == {(0,): (1, 2), (1,): (0, 2), (2,): (0, 1)}
    assert not cases["length"]
    assert not cases["all of a phase"]
    assert len({half for half, _ in unnamed.mixes(8, seed=0)}) > 2


def test_figures_are_in_order(tmp_path):
    """Seen is better than unseen, a bound is below all, and windows are no worse than their sum."""
    profiles = deepseek.read(write(tmp_path))
    placer, cases = deepseek.Placer(profiles.load, DEVICES, 5, iterations=5000), profiles.cases()

    def mean(method, column):
        return deepseek.summary(placer.judged(method, case) for case in cases[column])[0]

    for method in ("EPLB", *deepseek.OURS):
        assert 1 <= mean(method, "own") < mean(method, "phase")
    mixes = profiles.mixes(3, seed=0)
    for half, rest in mixes:
        oracle = placer.oracle(rest).mean()
        assert 1 <= placer.bound(rest) <= oracle + 1e-9
        for method in deepseek.OURS:
            assert oracle <= placer.judged(method, (half, rest)).mean() + 1e-9
            own, summed = (
                placer.judged(of, (half, half)).mean() for of in (method, f"{method}, sum")
            )
            assert own <= summed + 1e-9


@pytest.mark.parametrize("slots", [4, 6])
def test_lost_experts_are_counted(slots):
    """As by looking at what the other devices still have."""
    rng = np.random.default_rng(slots)
    placed = np.stack([rng.permutation(DEVICES * slots) % EXPERTS for _ in range(LAYERS)])
    placed = placed.reshape(LAYERS, DEVICES, slots)
    placed[0, 0, 0] = placed[0, 0, 1]
    placed[1, 1, 0] = -1
    expected = [
        [
            len({*layer[device].tolist()} - {*np.delete(layer, device, 0).ravel().tolist()} - {-1})
            for device in range(DEVICES)
        ]
        for layer in placed
    ]
    assert deepseek.lost(placed, EXPERTS).tolist() == expected


def test_it_prints_its_tables(tmp_path, monkeypatch, capsys):
    """Of a folder, of which what is no table is left out; less than two profiles are refused."""
    write(tmp_path)
    (tmp_path / "README.txt").write_text("What this is.")
    argv = ["deepseek.py", str(tmp_path), "--devices", "4", "--splits", "1", "--iterations", "500"]
    monkeypatch.setattr(sys, "argv", argv)
    deepseek.main()
    printed = capsys.readouterr().out
    assert "README.txt is left out: " in printed
    for slots in (4, 5):
        assert f"4 ranks of {slots} slots: fitted to one recording, judged on" in printed
    assert "4/16         contiguous                   0    100.0%    100.0%" in printed
    monkeypatch.setattr(sys, "argv", [*argv[:1], str(tmp_path / f"{NAMES[0]}.json"), *argv[2:]])
    with pytest.raises(SystemExit) as stopped:
        deepseek.main()
    assert stopped.value.code == 2
    assert "must have 2 to 64 profiles, got 1" in capsys.readouterr().err
