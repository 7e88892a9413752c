"""The bench of the cost model against real GPUs runs on a part of their times."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "gpu"
BENCH = ROOT / "bench" / "gpu" / "times.py"
NAMES = ("rtx-pro-6000-qwen3-30b-a3b.csv", "a800-qwen3-30b-a3b.csv")

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="../shared/data/gpu is not there")


def printed(folder, *options):
    """Run the bench; return its status and what it printed."""
    command = [sys.executable, str(BENCH), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_exposed_computing_is_nearer_than_two_lines(tmp_path):
    """On batches left out, of both cards; presets are what is fitted to the first one."""
    for name in NAMES:
        head, *rows = (DATA / name).read_text().splitlines()
        if name.startswith("a800"):
            # Two groups, and every 40th batch of them.
            part = dict(zip(head.split(","), range(99), strict=False))
            held, parallel = part["num_experts_per_device"], part["num_tensor_parallel_workers"]
            groups = {("128", "1"), ("128", "2")}
            rows = [
                row
                for row in rows[::40]
                if (row.split(",")[held], row.split(",")[parallel]) in groups
            ]
        (tmp_path / name).write_text("\n".join([head, *rows]) + "\n")
    status, out, err = printed(tmp_path, "--folds", "2", "--seeds", "1")
    assert status == 0, err
    for name in NAMES:
        lines, exposed = map(float, re.search(rf"{name} +([\d.]+) +([\d.]+)", out).groups())
        assert exposed < 0.9 * lines
    assert "Preset rtx-pro-6000-measured: max(4.92 + 6.704 x active experts" in out
    assert out.count("max(4.92 + 6.704 x active experts + 0.0165") == 2


def test_a_missing_table_is_named(tmp_path):
    """One line each; status 2 where none is there."""
    status, out, err = printed(tmp_path)
    assert (status, out) == (2, "")
    assert [line.rsplit("/", 1)[1] for line in err.splitlines()] == [
        f"{n} is missing" for n in NAMES
    ]
