"""Real transformers models, loaded with their experts placed by moetuner."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from ranks import answers, values


@pytest.mark.parametrize(
    ("family", "layers", "ranks"),
    [("mixtral", 3, 2), ("mixtral", 3, 4), ("qwen3_moe", 2, 4), ("gpt_oss", 3, 2)],
)
def test_logits_and_traffic(tmp_path, family, layers, ranks):
    """Logits of one process, and every row that the evaluation predicts from the router's ids."""
    (expected,) = values(1, "rank_transformers.save_model", family, str(tmp_path))
    results = values(ranks, "rank_transformers.shared_batch", str(tmp_path), layers, 1)
    for logits, as_predicted, rows in results:
        assert np.abs(logits - expected).max() < 1e-5
        assert as_predicted
        assert rows


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_batches_of_their_own(tmp_path, ranks):
    """Data-parallel ranks with batches of different lengths, through nodes, nearest copies."""
    (expected,) = values(1, "rank_transformers.save_model", "mixtral", str(tmp_path))
    results = values(ranks, "rank_transformers.own_batches", str(tmp_path), 3, 2)
    for rank, logits in enumerate(results):
        assert np.abs(logits - expected[:, : 5 + rank]).max() < 1e-5


def test_a_model_is_rebalanced(tmp_path):
    """Its experts move while it serves, and its logits stay."""
    (expected,) = values(1, "rank_transformers.save_model", "gpt_oss", str(tmp_path))
    for before, after, moved in values(4, "rank_transformers.rebalanced", str(tmp_path), 3, 1):
        assert moved
        assert np.abs(before - expected).max() < 1e-5
        assert np.abs(after - expected).max() < 1e-5


def test_a_placement_of_another_model_is_refused(tmp_path):
    """On every rank, before its first step."""
    values(1, "rank_transformers.save_model", "mixtral", str(tmp_path))
    for answer in answers(2, "rank_transformers.shared_batch", str(tmp_path), 2, 1):
        assert "placement must have 3 layers like the model, got 2" in answer.error


def test_a_placed_model_is_not_saved(tmp_path):
    """Saving and loading are refused on every rank, and no weights are written."""
    folder = str(tmp_path / "model")
    values(1, "rank_transformers.save_model", "mixtral", folder)
    for said, files in values(2, "rank_transformers.saved", folder, 3, 1):
        assert len(said) == 3
        assert all("whose experts are placed cannot be saved" in one for one in said)
        assert files == []


def test_a_placed_model_changes_its_type(tmp_path):
    """Placed experts go where their model goes."""
    (expected,) = values(1, "rank_transformers.save_model", "mixtral", str(tmp_path))
    for logits in values(2, "rank_transformers.in_half", str(tmp_path), 3, 1):
        assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
