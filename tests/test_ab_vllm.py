"""The trial of `examples/ab_vllm.py`: order of its arms and its statistics, without an engine."""

import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.plugins.files import Files
from moetuner.plugins.settings import Settings

EXAMPLES = Path(__file__).parents[1] / "examples"
# Quantile of Student's t with 5 degrees of freedom, two-sided, 95 %.
QUANTILE = 2.5706
OWN = [100.0, 104.0, 98.0, 101.0, 97.0, 103.0]
OURS = [103.0, 105.0, 102.0, 104.0, 99.0, 108.0]


@pytest.fixture
def ab(monkeypatch):
    """Import the example."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import ab_vllm

    return ab_vllm


def runs_of(ab, own, ours, tpot=(5.0, 5.0)):
    """Return runs in the order of the trial with these throughputs, and a TPOT for each arm."""
    values = {ab.OWN: own, ab.OURS: ours}
    times = dict(zip((ab.OWN, ab.OURS), tpot, strict=True))
    return [
        {"arm": arm, "seed": seed, "throughput": values[arm][seed], "tpot": times[arm]}
        for seed, pair in enumerate(ab.order_arms(len(own)))
        for arm in pair
    ]


def test_arms_alternate(ab):
    """The order is ABBA, ABBA, ...; each arm is first in a pair equally often."""
    pairs = ab.order_arms(4)
    assert [arm for pair in pairs for arm in pair] == [
        *("own", "ours", "ours", "own"),
        *("own", "ours", "ours", "own"),
    ]


def test_the_log_is_searched_for_what_the_plugin_writes(ab, tmp_path):
    """The plugin reads what the trial has written, and says of it what the trial awaits."""
    placement, path = mt.Placement([[[0, 1], [2, -1]]], num_experts=3), tmp_path / "live.json"
    placement.save(path)
    [read] = Files.read(Settings.from_environment({"MOETUNER_PLACEMENT": str(path)})).placements
    awaited = ab.describe_stored(path, placement)
    assert str(awaited) == str(read)
    assert awaited.checksum == placement.checksum == read.checksum


def test_change_is_that_of_pairs(ab):
    """Value and interval are Student's of the logarithms of the ratios, in a plain loop."""
    logs = [math.log(after / before) for before, after in zip(OWN, OURS, strict=True)]
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    change = ab.judge(runs_of(ab, OWN, OURS))["throughput"]
    expected = [math.expm1(mean + sign * QUANTILE * error) for sign in (0, -1, 1)]
    assert np.allclose([change["value"], change["low"], change["high"]], expected, rtol=1e-12)
    assert (change["pairs"], change["verdict"]) == (6, "gain")


def test_exchanged_arms_change_the_sign(ab):
    """With the arms exchanged, the ratio is the inverse, and a gain is a loss."""
    there, back = (
        ab.judge(runs_of(ab, *arms))["throughput"] for arms in ((OWN, OURS), (OURS, OWN))
    )
    assert math.isclose((1 + there["value"]) * (1 + back["value"]), 1)
    assert math.isclose((1 + there["low"]) * (1 + back["high"]), 1)
    assert (there["verdict"], back["verdict"]) == ("gain", "loss")


def test_a_machine_that_becomes_slower_counts_for_neither_arm(ab):
    """Equal maps on a machine that loses 1 % with every run: no change."""
    runs = runs_of(ab, [1.0] * 10, [1.0] * 10)
    for number, run in enumerate(runs):
        run["throughput"] = 0.99**number
    change = ab.judge(runs)["throughput"]
    assert abs(change["value"]) < 1e-12
    assert change["verdict"] == "uncertain"


def test_equal_maps_rarely_give_a_certain_change(ab):
    """Of 2,000 trials of equal maps whose runs scatter, one in twenty is certain."""
    random, certain = np.random.default_rng(0), 0
    for _ in range(2000):
        own, ours = np.exp(random.normal(0, 0.05, (2, 10)))
        certain += ab.judge(runs_of(ab, own, ours))["throughput"]["verdict"] != "uncertain"
    assert 70 <= certain <= 130


def test_less_time_per_token_is_a_gain(ab):
    """The mean time per output token is better where it is lower."""
    runs = runs_of(ab, OWN, OURS)
    for run in runs:
        run["tpot"] = 1000 / run["throughput"]
    judged = ab.judge(runs)
    assert judged["tpot"]["value"] < 0
    assert [judged[measure]["verdict"] for measure in ("throughput", "tpot")] == ["gain"] * 2


def test_few_pairs_show_nothing(ab):
    """Four pairs have an interval, and no verdict."""
    judged = ab.judge(runs_of(ab, [100.0, 101.0, 100.0, 101.0], [200.0, 201.0, 201.0, 202.0]))
    assert judged["throughput"]["low"] > 0
    assert judged["throughput"]["verdict"] == "uncertain"
    assert "no certain change (5 pairs or more" in ab.write_sentence("throughput", judged)


def test_sentences(ab):
    """One sentence has the change, its interval, the pairs and the verdict."""
    judged = ab.judge(runs_of(ab, OWN, OURS, tpot=(0.0, 0.0)))
    assert ab.write_sentence("throughput", judged) == (
        "Tokens per second: +3.0 % (95 % interval +1.5 to +4.4 %, 6 pairs): a certain gain."
    )
    assert "not measured, as the answers are too short" in ab.write_sentence("tpot", judged)
    judged = ab.judge(runs_of(ab, OWN, OWN[::-1]))
    assert ab.write_sentence("throughput", judged).endswith(
        "no certain change (the interval contains 0)."
    )


def test_first_map_of_an_engine(ab):
    """Experts in order, and the first ones again; the copies are those that the engine is told."""
    slots = np.array([[[5, 4, 3, 2], [1, 0, 5, 4]]] * 3)
    placement = mt.Placement(slots, num_experts=6)
    first = ab.make_first_map(placement)
    assert first.slots.tolist() == [[[0, 1, 2, 3], [4, 5, 0, 1]]] * 3
    assert ab.count_copies(placement) == 2
    assert "--eplb-config.num_redundant_experts=2" in ab.command_of_vllm("m", placement, 8)
    command = ab.command_of_sglang("m", placement, 8)
    assert command[command.index("--ep-num-redundant-experts") + 1] == "2"
    turned = mt.Placement(slots[:, :, ::-1], num_experts=6)
    assert ab.has_same_experts(placement, turned)
    assert not ab.has_same_experts(placement, first)


@pytest.mark.parametrize("rounds", ["0", "3"])
def test_uneven_rounds_are_refused(ab, monkeypatch, capsys, rounds):
    """An order that begins with one arm more often is refused in one line, with status 2."""
    monkeypatch.setattr(sys, "argv", ["ab_vllm.py", "model", "placed.json", "--rounds", rounds])
    with pytest.raises(SystemExit) as error:
        ab.main()
    assert error.value.code == 2
    assert f"--rounds must be even and at least 2 (ABBA), got {rounds}" in capsys.readouterr().err


def test_a_missing_engine_is_named(ab, tmp_path, monkeypatch):
    """Without the engine's command there is one line and no traceback."""
    mt.Placement([[[0, 1], [2, 3]]], num_experts=4).save(tmp_path / "placed.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["ab_vllm.py", "model", "placed.json"])
    with pytest.raises(SystemExit, match=r"^ab_vllm.py: vllm is not on the path"):
        ab.main()
