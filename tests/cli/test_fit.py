"""fit: a cost model from times that were measured, and who says so afterwards."""

import re

import numpy as np
import pytest

import moetuner as mt


@pytest.fixture
def times(tmp_path):
    """File of the times of a device that reads an expert in 5 us and computes a token in 0.1 us."""
    made = mt.CostModel(20, 5, 10, 0.1, 1)
    rows = [(tokens, active) for tokens in (1, 8, 64, 512, 4096) for active in (1, 4, 16, 32)]
    lines = ["tokens,experts,us"]
    lines += [f"{t},{a},{float(made.compute_us(t, a))}" for t, a in rows if a <= t]
    path = tmp_path / "times.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_times_become_a_cost_model_that_everybody_calls_measured(ok, trace, times, tmp_path, brief):
    """What made the times comes back; pages and lines no longer say that they are predicted."""
    out = ok("fit", "--times", times, "--model", "Mixtral-8x7B-v0.1", "--out", tmp_path / "c.json")
    assert "Error on batches that the fit has not seen: 0.0 %" in out
    model = mt.CostModel.load(tmp_path / "c.json")
    lines = (model.base_us, model.expert_us, model.start_us, model.token_us)
    assert lines == pytest.approx((20, 5, 10, 0.1))
    assert (model.name, model.token_bytes) == ("fit of times.csv", 2 * 4096)
    ok("solve", trace, "--devices", 4, "--out", tmp_path / "p.json")
    page = tmp_path / "page.html"
    said = "Times of experts are measured (fit of times.csv), with an error of 0.0 %"
    for command in (
        ("advise", trace, "--devices", 4, "--copies", 0, "--splits", 1),
        ("evaluate", tmp_path / "p.json", trace),
        ("evaluate", tmp_path / "p.json", trace, "--report", page),
    ):
        text = ok(*command, "--cost-model", tmp_path / "c.json")
        text = page.read_text() if "--report" in command else text
        assert said in text
        assert "not measured" not in text


def test_a_layer_is_timed_on_this_machine(run, tmp_path, monkeypatch):
    """Batches grow until a call takes long; on a CPU that is said, and its times may not fit."""
    timing = pytest.importorskip("moetuner.torch.timing", reason="torch is not installed")
    monkeypatch.setattr(timing, "SWEEP", {"cpu": 1})
    monkeypatch.setattr(timing, "BATCHES", [1, 4, 16, 64])
    shares = []
    times, _ = timing.time_experts(16, 8, 8, 2, device="cpu", progress=shares.append)
    tokens, active, us = np.array(times).T
    assert [*zip(tokens, active, strict=True)] == [
        (count, some) for count in (2, 8, 32, 128) for some in (1, 4, 8) if some <= count
    ]
    assert us.min() > 0
    assert shares == [0, 0.25, 0.5, 0.75]
    sizes = ("--hidden", 16, "--intermediate", 8, "--experts", 8, "--top-k", 2)
    status, out, err = run("fit", *sizes, "--device", "cpu", "--out", tmp_path / "c.json")
    assert "times of one core of a CPU" in err
    assert "wrote" in out if status == 0 else re.search("error: .*regimes", err)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nan", "experts must be from 0 to 1e+30, got nan at 19"),
        ("1e-320", "microseconds must be from 1e-30 to 1e+30, got 1e-320 at 19"),
        (None, "must be a regular file"),
    ],
)
def test_errors_name_the_file_of_times(run, times, tmp_path, change, words):
    """One line: neither an option that has a column's name, nor a device read without end."""
    path = times if change is not None else "/dev/zero"
    if change is not None:
        row = "9,nan,9" if change == "nan" else f"9,9,{change}"
        rows = times.read_text().splitlines()[:20]
        times.write_text("\n".join([*rows, row]) + "\n")
        words = words.replace("at 19", f"at {len(rows) - 1}")
    status, out, err = run("fit", "--times", path, "--hidden", 64, "--out", tmp_path / "c.json")
    assert (status, out) == (2, "")
    assert err == f"moetuner: error: {path}: {words}\n"
