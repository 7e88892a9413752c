"""DeepSpeed's counts: every rank its own, in each container."""

import numpy as np
import pytest
from engines_files import GOLDEN, deepspeed_counts, save_arrays

import moetuner as mt
from moetuner.formats import find_reader

COUNTS = 10 * np.arange(24).reshape(2, 3, 4)  # ranks, layers, experts


@pytest.mark.parametrize(("suffix", "kind"), [("npz", "u1"), ("safetensors", "f4"), ("pt", "f4")])
def test_ranks_are_added(tmp_path, suffix, kind):
    """A folder of all ranks, or their files; a gap among them, and another model are refused.

    Sums are in 64 bits, however narrow the counts.
    """
    files = [tmp_path / f"tokens_per_expert_rank{rank}.{suffix}" for rank in range(2)]
    for file, counts in zip(files, COUNTS.astype(kind), strict=True):
        save_arrays(file, dict(reversed(deepspeed_counts(counts).items())))
    assert {find_reader(path) for path in (tmp_path, *files)} == {"deepspeed"}
    for source in (tmp_path, files):
        assert np.array_equal(mt.open_input(source).window_load, COUNTS.sum(axis=0)[None])
    with pytest.raises(ValueError, match="num_experts must be 4, got 5"):
        mt.open_input(files[0], num_experts=5)
    files[0].rename(tmp_path / f"tokens_per_expert_rank2.{suffix}")
    with pytest.raises(ValueError, match="files of ranks 0 to 2, one of each, got none of rank 0"):
        mt.open_input(tmp_path)


def test_windows(tmp_path):
    """Counts of several forward passes are windows."""
    path = tmp_path / "counts.npz"
    np.savez(path, **{"layers.0.exp_counts": COUNTS[0], "layers.1.exp_counts": COUNTS[1]})
    assert np.array_equal(mt.open_input(path).window_load, COUNTS.transpose(1, 0, 2))


def test_what_deepspeed_wrote():
    """Two ranks of 24 tokens each, top-2."""
    folder = GOLDEN / "deepspeed"
    assert find_reader(folder) == "deepspeed"
    actual = mt.open_input(folder)
    assert actual.window_load.sum(axis=2).tolist() == [[96] * 4]
    one = [mt.open_input(folder / f"counts-{rank}.npz").window_load for rank in range(2)]
    assert np.array_equal(actual.window_load, one[0] + one[1])
    assert not np.array_equal(*one)
