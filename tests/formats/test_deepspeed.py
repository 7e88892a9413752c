"""DeepSpeed's counts: every rank its own, in each container."""

from pathlib import Path

import numpy as np
import pytest
from damage import refused
from safetensors.numpy import save_file

import moetuner as mt
from moetuner.formats import reader_of

COUNTS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # ranks, layers, experts


def named(counts):
    """Return counts [L,E] by the names of buffers; layer 10 comes after layer 2."""
    layers = (1, 2, 10)
    return {
        f"model.layers.{n}.mlp.tokens_per_expert": c for n, c in zip(layers, counts, strict=True)
    }


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(a) for name, a in arrays.items()}, path)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_ranks_are_added(tmp_path, suffix):
    """A folder of all ranks, or their files."""
    files = [tmp_path / f"tokens_per_expert_rank{rank}.{suffix}" for rank in range(2)]
    for file, counts in zip(files, COUNTS, strict=True):
        write(file, dict(reversed(named(counts).items())))
    assert {reader_of(path) for path in (tmp_path, *files)} == {"deepspeed"}
    for source in (tmp_path, files):
        assert np.array_equal(mt.open_input(source).window_load, COUNTS.sum(axis=0)[None])


def test_windows(tmp_path):
    """Counts of several forward passes are windows."""
    path = tmp_path / "counts.npz"
    np.savez(path, **{"layers.0.exp_counts": COUNTS[0], "layers.1.exp_counts": COUNTS[1]})
    assert np.array_equal(mt.open_input(path).window_load, COUNTS.transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: {k: v[:3] for k, v in a.items()}, "counts must be [1, 3, 4] like those before"),
        (lambda a: dict(list(a.items())[1:]), "counts must be [1, 3, 4] like those before"),
        (lambda a: {k: v + 0.5 for k, v in a.items()}, "counts must be whole numbers"),
        (lambda a: {k: v * np.nan for k, v in a.items()}, "counts must be whole numbers"),
        (
            lambda a: {**a, "model.layers.3.mlp.tokens_per_expert": np.ones(2)},
            "must be counts [exp",
        ),
        (lambda a: {**a, "layer2.tokens_per_expert": np.ones(4)}, "layer 2 must be there once"),
        (lambda a: {"tokens_per_expert": np.ones(4)}, "arrays must be named as model.layers.0.mlp"),
    ],
)
def test_bad_counts(tmp_path, change, text):
    """Ranks that do not fit together, and what are no counts."""
    for rank, counts in enumerate(COUNTS):
        arrays = named(counts)
        write(tmp_path / f"c_rank{rank}.npz", change(arrays) if rank else arrays)
    refused(text, tmp_path / "c_rank1.npz", lambda: mt.open_input(tmp_path))


def test_missing_rank(tmp_path):
    """A gap among ranks, and another model."""
    for rank in (0, 2):
        write(tmp_path / f"c_rank{rank}.npz", named(COUNTS[0]))
    with pytest.raises(ValueError, match="files of ranks 0 to 2, got none of rank 1"):
        mt.open_input(tmp_path)
    with pytest.raises(ValueError, match="num_experts must be 4, got 5"):
        mt.open_input(tmp_path / "c_rank0.npz", num_experts=5)


def test_what_deepspeed_wrote():
    """Two ranks of 24 tokens each, top-2."""
    folder = Path(__file__).parent / "golden" / "deepspeed"
    assert reader_of(folder) == "deepspeed"
    actual = mt.open_input(folder)
    assert actual.window_load.sum(axis=2).tolist() == [[96] * 4]
    one = [mt.open_input(folder / f"counts-{rank}.npz").window_load for rank in range(2)]
    assert np.array_equal(actual.window_load, one[0] + one[1])
    assert not np.array_equal(*one)
