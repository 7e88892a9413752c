"""Examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

import moetuner as mt

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_merged_shards_are_the_serial_sum(make_trace, tmp_path):
    """Dask's workers count and add up to what one process counts file by file."""
    pytest.importorskip("dask.bag", reason="needs dask")
    paths = [tmp_path / f"shard-{number}.safetensors" for number in range(6)]
    for number, path in enumerate(paths):
        make_trace(tokens=100 + number, seed=number).save(path)
    out = tmp_path / "statistics.safetensors"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "merge_shards.py", *paths, "--out", out, "--window", "30"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = mt.RoutingStatistics.sum(
        mt.RoutingStatistics.from_trace(mt.RoutingTrace.load(path), window=30) for path in paths
    )
    assert mt.RoutingStatistics.load(out).fingerprint == expected.fingerprint
    assert done.stdout == f"wrote {out}: {expected}\n"
