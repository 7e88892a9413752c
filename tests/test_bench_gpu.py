"""The GPU bench runs, with tiny sizes on the CPU; what it measures there means nothing."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

BENCH = Path(__file__).parents[1] / "bench" / "gpu" / "experts.py"


def test_it_writes_its_table(tmp_path, monkeypatch, capsys):
    """A grid of times and a row per batch."""
    out = tmp_path / "table.md"
    command = [str(BENCH), "--device", "cpu", "--quick", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(BENCH), run_name="__main__")
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert "| tokens \\ active | 1 | 2 | 4 | 8 |" in text
    assert "| 64 |" in text
    # A busy machine's times may be of one regime, which is said instead of fitted.
    assert "`max(" in text or "Nothing fitted: " in text
    assert "nan" not in text


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    """One line, exit status 2."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(BENCH)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH), run_name="__main__")
    assert ended.value.code == 2
    assert "--device cuda needs a GPU that torch sees" in capsys.readouterr().err
