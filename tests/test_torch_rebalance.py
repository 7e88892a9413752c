"""Rebalancer on real processes: outputs stay, and a move happens everywhere or nowhere."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ranks import answers, values


def test_rebalancing_does_not_change_outputs():
    """200 steps under changing traffic, rebalanced every 10: bit-equal to one process."""
    found = values(4, "rank_rebalance.changing_traffic", True, 200)
    assert {worst for worst, _ in found} == {0.0}
    assert all(decisions == found[0][1] for _, decisions in found)
    assert 4 <= sum(found[0][1]) <= 16


def test_rebalancing_in_ordinary_arithmetic():
    """The same within rounding, where weights are not whole numbers."""
    assert max(worst for worst, _ in values(4, "rank_rebalance.changing_traffic", False, 80)) < 1e-5


def test_a_rank_killed_in_the_middle_of_a_move():
    """The others stop with an error within the timeout, under the old placement."""
    found = answers(4, "rank_rebalance.lost_rank", "killed")
    assert found[2].exit == 3
    for message, seconds, unchanged in (found[rank].value for rank in (0, 1, 3)):
        assert "the old placement stays in force" in message
        assert seconds < 4
        assert unchanged


def test_a_rank_that_hangs_in_the_middle_of_a_move():
    """The others give up after the timeout, the late one when it comes back."""
    found = answers(4, "rank_rebalance.lost_rank", "hangs")
    for rank in (0, 1, 2, 3):
        message, seconds, unchanged = found[rank].value
        assert "the old placement stays in force" in message
        assert seconds < (10 if rank != 2 else 16)
        assert unchanged


@pytest.mark.parametrize(
    ("how", "first", "others"),
    [
        ("memory", "ranks [1] failed at room for a move", "no room"),
        ("counts", "ranks [1] do not agree with rank 0 on the next placement", "ranks [0, 2, 3]"),
        ("solver", "ranks [1] failed at the next placement", "no answer"),
    ],
)
def test_a_rank_that_fails_or_differs(how, first, others):
    """Nobody moves, all raise; then the old placement works, and so does the next move."""
    found = values(4, "rank_rebalance.failing_rank", how)
    assert first in found[0][0]
    assert others in found[1][0]
    for message, unchanged, right, moved in found:
        assert "the old placement stays in force" in message
        assert (unchanged, right, moved) == (True, True, True)


def test_a_switch_on_some_ranks_only():
    """Should a rank fail after the last agreement, no step is taken with two placements."""
    found = values(4, "rank_rebalance.torn_switch")
    assert found[0] == "ranks [2] have other placements than rank 0: nothing was sent"
    assert found[2] == "ranks [0, 1, 3] have other placements than rank 2: nothing was sent"


def test_moves_that_pay():
    """Gain against cost, the dead zone and the budget; the same on every rank."""
    first, second = values(2, "rank_rebalance.decisions")
    assert first == second
    decision, copies, again = first["pays"]
    assert decision.moved
    assert not again
    assert decision.gain_us * 10**9 > 1.5 * (decision.cost_us + decision.decision_us)
    assert min(decision.cost_us, decision.decision_us) > 0
    assert decision.experts_moved == copies
    assert decision.bytes_moved == copies * 2 * 30 * 4
    assert "longer than it brings in" in first["dear"][0].reason
    assert first["priced"][0].cost_us == 0
    assert "dead zone" in first["small"][0].reason
    assert first["budget"][1] <= 2
    assert "balanced" in first["idle"][0].reason
    for name in ("dear", "priced", "small", "none"):
        assert first[name][1] == 0


def test_arguments_that_cannot_be():
    """One line each: argument, rule, value."""
    assert values(2, "rank_rebalance.misuse")[0] == [
        "layers must be all layers of a placement, got none",
        "layers must be 0 to 2 of one placement, got [1, 2]",
        "decay must be from 0 to 1, got 2",
        "steps_ahead must be at least 1, got 0",
        "topology must have 2 devices like the placement, got 3",
        "counts must be [layers, experts] [3, 8], got [1, 2]",
    ]


def test_the_example():
    """It counts what it predicts, and moves experts when the traffic changes."""
    path = Path(__file__).parents[1] / "examples" / "expert_parallel.py"
    found = values(4, "rank_work.example", str(path))
    for rank, lines in enumerate(found):
        sent, predicted = lines[0].removeprefix(f"rank {rank}: ").split(" rows sent, ")
        assert predicted == f"{sent} predicted"
    moved = ["the move pays" in line for line in found[0][1:]]
    assert len(moved) == 4
    assert any(moved[2:])
    assert not all(moved)
