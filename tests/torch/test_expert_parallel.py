"""ExpertParallelMoE on real processes: the single-process layer, whatever the placement."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ranks import values


@pytest.fixture(scope="module")
def four():
    """Run a layer on four ranks in all kinds of cases; gives what they computed, by case."""
    ranks = values(4, "rank_work.four_ranks", timeout=110)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def two():
    """Give two ranks input that is wrong, and placements that do not fit."""
    return values(2, "rank_work.two_ranks", timeout=110)


def test_bit_equal_in_exact_arithmetic(four):
    """Random placements, batches, nodes and rules: every index is right, and every byte counted."""
    assert four["exact"] == [[]] * 4
    for ranks in (2, 8):
        assert values(ranks, "rank_work.configurations", range(10), True) == [[]] * ranks


def test_ordinary_arithmetic_differs_by_rounding(four):
    """Within 1e-6 of one process in float32, the same bits in two runs; bfloat16 as it allows."""
    assert four["rounded"] == [[]] * 4
    assert max(four["half"]) < 0.02


def test_grouped_products_are_those_of_the_slots():
    """What CUDA runs, as far as the CPU has it as well."""
    assert values(1, "rank_work.grouped")[0] < 0.02


def test_gradients_reach_every_rank(four):
    """Gradients of tokens, router weights and experts equal those of one process."""
    assert np.max(four["gradients"]) < 1e-5


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
def test_a_fault_on_one_rank_is_an_error_on_all(two, fault, message):
    """Nobody waits for a rank that has refused its input, and the next step works."""
    for said, *_ in two:
        error, next_step_works = said[fault]
        assert any(part in error for part in message.split("|")), error
        assert next_step_works


def test_ranks_with_other_placements_do_not_exchange(four):
    """The fingerprints differ, so nothing is sent."""
    for rank, said in enumerate(four["other placement"]):
        others = "[0, 2, 3]" if rank == 1 else "[1]"
        assert f"ranks {others} have other placements than rank {rank}: nothing was sent" in said


def test_what_does_not_fit_is_refused_at_once(two):
    """Devices, layers, slots, nodes and rules that cannot be."""
    assert two[0][1] == [
        "placement must have 2 devices, the ranks of the group, got 3",
        "layer must be from 0 to 1, the placement's, got 5",
        "experts: up must have the placement's 9 slots, got [99, 2, 2]",
        "devices_per_node must divide the devices (2), got 3",
        "split must be one of even, nearest, got 'best'",
    ]


def test_small_steps_use_all_copies_as_predicted(four):
    """Positions run on: every copy gets its share, and the prediction has each row."""
    for decoded in four["decoding"]:
        for predicted, rows in decoded:
            assert predicted
            arrived = np.sum(rows, axis=0)
            assert np.abs(arrived - arrived.mean()).max() < 4 * arrived.mean() ** 0.5


def test_recomputation_finds_the_same_copies(four):
    """Activation checkpointing runs a layer again in the backward pass: no position has moved."""
    assert four["recomputed"] == [True] * 4


def test_bytes_under_autocast_are_those_of_the_wire(four):
    """Results go back in the type of the tokens, on every rank, and are counted so."""
    assert four["autocast"] == [(True, True, True)] * 4


def test_the_host_waits_once_for_an_exchange(four):
    """Only the numbers of rows are read from the device, once per hop."""
    assert four["waits"] == [[["tolist"], ["tolist"] * 2]] * 4


def test_tables_are_changed_in_place(two):
    """A CUDA graph that was captured before a move routes by the placement after it."""
    assert [rank[2] for rank in two] == [(3, True, True)] * 2
