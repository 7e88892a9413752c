"""ExpertParallelMoE on real processes: the single-process layer, whatever the placement."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ranks import answers, values


@pytest.mark.parametrize(("ranks", "seeds"), [(2, 15), (4, 200), (8, 10)])
def test_bit_equal_in_exact_arithmetic(ranks, seeds):
    """Random placements, batches, nodes and rules: every index is right, and every byte counted."""
    for found in values(ranks, "rank_work.configurations", range(seeds), True):
        assert [case for case in found if case[1:] != (0.0, True, True)] == []


def test_ordinary_arithmetic_differs_by_rounding():
    """Within 1e-6 of one process in float32; the same bits in two runs."""
    for found in values(4, "rank_work.configurations", range(1000, 1030), False):
        assert [case for case in found if not (case[1] < 1e-6 and case[2:] == (True, True))] == []


def test_half_precision_sums_in_single():
    """Results in bfloat16 are as near to single precision as its 8 bits allow."""
    assert max(values(4, "rank_work.half")) < 0.02


def test_grouped_products_are_those_of_the_slots():
    """What CUDA runs, as far as the CPU has it as well."""
    assert values(1, "rank_work.grouped")[0] < 0.02


@pytest.mark.parametrize("node", [None, 2])
def test_gradients_reach_every_rank(node):
    """Gradients of tokens, router weights and experts equal those of one process."""
    for differences in values(4, "rank_work.gradients", node):
        assert max(differences) < 1e-5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "rank 1: top_k_weights must be finite"),
        ("expert", "rank 1: top_k_index must be experts of the placement, from 0 to"),
        ("negative", "rank 1: top_k_index must be experts of the placement, from 0 to"),
        ("shape", r"rank 1: its tensors do not fit|must be [T,H], [T,K] and [T,K], got"),
        ("flat", "rank 1: its tensors do not fit|must be [T,H], [T,K] and [T,K], got"),
        ("dtype", "do not fit|hidden_states must be torch.float32 like the experts"),
        ("swapped", "do not fit|top_k_index must be integers and top_k_weights floats"),
        ("top_k", "have rows of another size or type than rank"),
        ("position", "do not fit|first_token must be an integer or integers [3] on cpu, got"),
        ("device", "do not fit|hidden_states must be on cpu like the experts, got cpu, meta"),
    ],
)
def test_a_fault_on_one_rank_is_an_error_on_all(fault, message):
    """Nobody waits for a rank that has refused its input, and the next step works."""
    for error, next_step_works in values(2, "rank_work.bad_input", fault):
        assert any(part in error for part in message.split("|")), error
        assert next_step_works


def test_ranks_with_other_placements_do_not_exchange():
    """The fingerprints differ, so nothing is sent."""
    found = answers(4, "rank_work.other_placement")
    assert "ranks [1] have other placements than rank 0" in found[0].error
    assert "ranks [0, 2, 3] have other placements than rank 1" in found[1].error


def test_what_does_not_fit_is_refused_at_once():
    """Devices, layers, slots, nodes and rules that cannot be."""
    assert values(2, "rank_work.no_fit")[0] == [
        "placement must have 2 devices, the ranks of the group, got 3",
        "layer must be from 0 to 1, the placement's, got 5",
        "experts: up must have the placement's 9 slots, got [99, 2, 2]",
        "devices_per_node must divide the devices (2), got 3",
        "split must be one of even, nearest, got 'best'",
    ]


@pytest.mark.parametrize(("batch", "steps"), [(1, 60), (3, 20)])
def test_small_steps_use_all_copies_as_predicted(batch, steps):
    """Positions run on: every copy gets its share, and the prediction has each row."""
    found = values(4, "rank_work.decoding", batch, steps)
    assert all(predicted for predicted, _ in found)
    rows = np.array(found[0][1])
    arrived = rows.sum(axis=0)
    mean = arrived.mean()
    assert np.abs(arrived - mean).max() < 4 * mean**0.5


def test_recomputation_finds_the_same_copies():
    """Activation checkpointing runs a layer again in the backward pass: no position has moved."""
    assert values(3, "rank_work.recomputed") == [True] * 3


def test_bytes_under_autocast_are_those_of_the_wire():
    """Results go back in the type of the tokens, on every rank, and are counted so."""
    assert values(3, "rank_work.autocast") == [(True, True, True)] * 3


@pytest.mark.parametrize(("node", "hops"), [(None, 1), (2, 2)])
def test_the_host_waits_once_for_an_exchange(node, hops):
    """Only the numbers of rows are read from the device, once per hop."""
    assert values(4, "rank_work.waits", node) == [["tolist"] * hops] * 4


def test_tables_are_changed_in_place():
    """A CUDA graph that was captured before a move routes by the placement after it."""
    assert values(2, "rank_work.switched") == [(3, True, True)] * 2
