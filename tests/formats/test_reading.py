"""Reading an input: what a file is, is told by its content."""

import numpy as np
import pytest
from damage import refused

import moetuner as mt
from moetuner.formats import open_input


def refuses(path, text, **arguments):
    refused(text, path, lambda: open_input(path, **arguments))


def test_statistics(make_trace, tmp_path):
    """Saved statistics and load tables, with the windows that they have."""
    counted = mt.RoutingStatistics.from_trace(make_trace(), window=20)
    counted.save(tmp_path / "s")
    with (tmp_path / "table").open("wb") as file:
        np.savez(file, load=counted.window_load)
    for name in ("s", "table"):
        actual = open_input(tmp_path / name, num_experts=8)
        assert isinstance(actual, mt.RoutingStatistics)
        assert np.array_equal(actual.window_load, counted.window_load)
    assert open_input(tmp_path / "s", window=20).window == 20
    assert open_input(tmp_path / "table").transitions is None
    refuses(tmp_path / "s", "in windows already (20 tokens), got 50", window=50)
    refuses(tmp_path / "table", "in windows already (those of its table), got 20", window=20)
    refuses(tmp_path / "s", "num_experts must be 8, got 9", num_experts=9)


def test_other_files(make_trace, tmp_path):
    """What is neither is said to be no trace."""
    path = tmp_path / "p.json"
    mt.Placement(np.zeros((1, 1, 1), dtype=np.int32)).save(path)
    refuses(path, "line 1: must be a trace, got a file of schema 'moetuner.placement/1'")
    np.savez(tmp_path / "a.npz", weights=[1])
    refuses(tmp_path / "a.npz", "must hold an array 'expert_ids' (or 'load', a load table)")
    path.write_bytes(b"PK\x03\x04 and no more")
    refuses(path, "damaged .npz: ")
    with pytest.raises(FileNotFoundError):
        open_input(tmp_path / "absent")


def test_real_files(data):
    """The recorded files, each as what it is."""
    kinds = {path.stem: type(open_input(path)) for path in data.glob("*.npz")}
    assert kinds["gpt-oss-20b-mini"] is mt.RoutingTrace
    assert kinds["mixtral-8x7b-mmlu"] is mt.RoutingStatistics
