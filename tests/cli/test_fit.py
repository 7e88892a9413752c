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


def test_times_become_the_cost_model_that_made_them(as_json, times, tmp_path):
    """Its parameters come back, with the sizes of the model that is named."""
    out = tmp_path / "c.json"
    fitted = as_json("fit", "--times", times, "--model", "Mixtral-8x7B-v0.1", "--out", out)
    assert fitted["cost_model"]["prediction_error"] == pytest.approx(0, abs=1e-9)
    model = mt.CostModel.load(out)
    lines = (model.base_us, model.expert_us, model.start_us, model.token_us)
    assert lines == pytest.approx((20, 5, 10, 0.1))
    assert (model.name, model.token_bytes) == ("fit of times.csv", 2 * 4096)


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
