"""DeepSpeed counts on two ranks: counts are read, and a permuted checkpoint permutes them."""

from __future__ import annotations

import numpy as np
import pytest
from serving import folder_of, free_port, model, moetuner, order_of, program

import moetuner as mt
from moetuner.torch import permute_state_dict

MODEL, EXPERTS, LAYERS, RANKS = "mixtral", 8, 4, 2


@pytest.fixture(scope="module")
def counted():
    """Count the loads of a model, and of the same with its experts in another order."""
    folder = folder_of("deepspeed")
    rng = np.random.default_rng(0)
    slots = np.stack([rng.permutation(EXPERTS).reshape(RANKS, -1) for _ in range(LAYERS)])
    placement = mt.Placement(slots.astype(np.int32), num_experts=EXPERTS)
    placed = folder / "placed"
    permute_state_dict(model(MODEL), placement, placed)
    # The first run of all builds an extension of DeepSpeed.
    program("deepspeed_count.py", [folder, free_port(), model(MODEL), placed], {}, folder)
    return folder, placement


def buffers(folder, name) -> list[np.ndarray]:
    """Return the buffers [L,E] of every rank."""
    key = "model.layers.{}.mlp.tokens_per_expert"
    actual = []
    for rank in range(RANKS):
        with np.load(folder / f"counts-{name}-rank{rank}.npz") as of:
            actual.append(np.stack([of[key.format(layer)] for layer in range(LAYERS)]))
    return actual


def test_counts_of_all_ranks_are_read(counted):
    """The reader adds up what ranks count, each its own tokens."""
    folder, _ = counted
    files = [folder / f"counts-{MODEL}-rank{rank}.npz" for rank in range(RANKS)]
    moetuner("convert", *files, "--out", folder / "loads.safetensors")
    actual = mt.RoutingStatistics.load(folder / "loads.safetensors")
    first, second = buffers(folder, MODEL)
    assert first.sum() == second.sum() == LAYERS * 24 * 2
    assert (actual.window_load.sum(axis=0) == first + second).all()


def test_permuted_checkpoint_gives_permuted_counts(counted):
    """Experts renumbered: slot s of the placed model counts what its expert counted before."""
    folder, placement = counted
    order = order_of(placement)
    for before, after in zip(buffers(folder, MODEL), buffers(folder, "placed"), strict=True):
        assert (after == np.take_along_axis(before, order, axis=1)).all()
    for rank in range(RANKS):
        before, after = (
            np.load(folder / f"logits-{of}-rank{rank}.npy") for of in (MODEL, "placed")
        )
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
