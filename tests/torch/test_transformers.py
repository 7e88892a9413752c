"""Real transformers models, loaded with their experts placed by moetuner."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from ranks import values

CALLS = {
    2: [
        ("shared_batch", "mixtral", 3, 1),
        ("shared_batch", "gpt_oss", 3, 1),
        ("own_batches", "mixtral", 3, 2),
        ("shared_batch", "mixtral", 2, 1),
        ("saved", "mixtral", 3, 1),
        ("in_half", "mixtral", 3, 1),
    ],
    4: [
        ("shared_batch", "mixtral", 3, 1),
        ("shared_batch", "qwen3_moe", 2, 1),
        ("own_batches", "mixtral", 3, 2),
        ("rebalanced", "gpt_oss", 3, 1),
    ],
    8: [("own_batches", "mixtral", 3, 2)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write models; gives their folder, and the logits of one process by family."""
    folder = str(tmp_path_factory.mktemp("models"))
    return folder, values(1, "rank_transformers.save_models", folder, timeout=110)[0]


@pytest.fixture(scope="module")
def placed(models):
    """Run models on some ranks: what each rank gives, by number of ranks and call."""
    results = {}
    for ranks, calls in CALLS.items():
        given = values(ranks, "rank_transformers.many", models[0], calls, timeout=110)
        results |= {
            (ranks, *call[:3]): said
            for call, said in zip(calls, zip(*given, strict=True), strict=True)
        }
    return results


@pytest.mark.parametrize(
    ("ranks", "family", "layers"),
    [(2, "mixtral", 3), (4, "mixtral", 3), (4, "qwen3_moe", 2), (2, "gpt_oss", 3)],
)
def test_logits_and_traffic(models, placed, ranks, family, layers):
    """Logits of one process, and every row that the evaluation predicts from the router's ids."""
    for logits, as_predicted, rows in placed[ranks, "shared_batch", family, layers]:
        assert np.abs(logits - models[1][family]).max() < 1e-5
        assert as_predicted
        assert rows


@pytest.mark.parametrize("ranks", CALLS)
def test_batches_of_their_own(models, placed, ranks):
    """Data-parallel ranks with batches of different lengths, through nodes, nearest copies."""
    for rank, logits in enumerate(placed[ranks, "own_batches", "mixtral", 3]):
        assert np.abs(logits - models[1]["mixtral"][:, : 5 + rank]).max() < 1e-5


def test_a_model_is_rebalanced(models, placed):
    """Its experts move while it serves, and its logits stay."""
    for before, after, moved in placed[4, "rebalanced", "gpt_oss", 3]:
        assert moved
        assert np.abs(before - models[1]["gpt_oss"]).max() < 1e-5
        assert np.abs(after - models[1]["gpt_oss"]).max() < 1e-5


def test_a_placement_of_another_model_is_refused(placed):
    """On every rank, before its first step."""
    for said in placed[2, "shared_batch", "mixtral", 2]:
        assert "placement must have 3 layers like the model, got 2" in said


def test_a_placed_model_is_not_saved(placed):
    """Saving and loading are refused on every rank, and no weights are written."""
    for said, files in placed[2, "saved", "mixtral", 3]:
        assert len(said) == 3
        assert all("whose experts are placed cannot be saved" in one for one in said)
        assert files == []


def test_a_placed_model_changes_its_type(models, placed):
    """Placed experts go where their model goes."""
    expected = models[1]["mixtral"]
    for logits in placed[2, "in_half", "mixtral", 3]:
        assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
