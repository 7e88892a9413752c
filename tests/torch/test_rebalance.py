"""Rebalancer on real processes: outputs stay, and a move happens everywhere or nowhere."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed")

from ranks import answers, values

from moetuner.torch.parallel.rebalance import Observed


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
    ("how", "message"),
    [
        ("memory", "ranks [1] failed at room for a move; the old placement stays in force: no"),
        ("solver", "ranks [1] failed at the next placement"),
        ("judge", "ranks [1] failed at whether to move"),
        ("room", "ranks [1] failed at room for experts"),
        ("fill", "ranks [1] failed at the weights of layer 0"),
        ("half a fill", "ranks [1] failed at the weights of layer 0"),
        ("put", "ranks [1] failed at the new weights in their slots"),
        ("half a put", "ranks [1] failed at the new weights in their slots"),
        ("counts", "do not agree with rank"),
    ],
)
def test_a_rank_that_fails_or_differs(how, message):
    """Nobody moves, all raise; then the old placement works, and so does the next move."""
    for said, unchanged, right, moved in values(3, "rank_rebalance.failing_rank", how):
        assert message in said
        assert "the old placement stays in force" in said
        assert (unchanged, right, moved) == (True, True, True)


NAMES = [
    *("unobserved", "miscounted", "not a number", "late", "skipped", "memory", "solver", "judge"),
    *("room", "fill", "half a fill", "late fill", "put", "half a put"),
]


@settings(max_examples=3, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2)), min_size=5, max_size=5))
def test_any_faults_are_lived_through(faults):
    """Ranks always end and agree, steps work again within four, and traffic is followed."""
    found = values(3, "rank_rebalance.faulty", faults, timeout=120)
    for at, step in enumerate(zip(*(said for said, _ in found), strict=True)):
        outcomes, placements, right = zip(*step, strict=True)
        assert len(set(placements)) == 1
        assert all(right)
        assert len({outcome for outcome in outcomes if outcome != "skipped"}) == 1
        if at % 5 == 4:
            assert "MoveError" not in outcomes, faults
    assert [moved for _, moved in found] == [True] * 3


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


def test_the_default_budget_is_what_fits_the_least_memory():
    """One copy to a device at most where one rank has room for one; the next step goes on."""
    found = values(2, "rank_rebalance.little_memory")
    assert found[0] == found[1]
    assert [any(come) for _, come, _ in found[0]] == [True, True]
    for decided, come, right in found[0]:
        assert max(come) <= 1
        assert decided == any(come)
        assert right


def test_half_of_a_move_that_has_no_room():
    """Layers that gain less stay where they are, on all ranks, and the step counts the rest."""
    found = values(4, "rank_rebalance.no_room_for_two")
    assert found == [(True, 1, True, True)] * 4


def test_ranks_that_would_pay_other_prices():
    """Nobody moves, all raise, and nobody waits for a move that others do not make."""
    found = values(2, "rank_rebalance.other_prices")
    for message, unchanged, right in found:
        assert "do not agree" in message
        assert (unchanged, right) == (True, True)


def test_gains_are_judged_on_counts_that_were_held_out():
    """Of what placing by even traffic's noise seems to gain, nothing is believed."""
    seen, unseen = values(2, "rank_rebalance.noise")[0]
    assert seen > 0
    assert unseen < 0.3 * seen


def test_the_time_of_the_decision_is_part_of_its_price():
    """All ranks take the slowest one's; the next time nobody searches."""
    found = values(2, "rank_rebalance.slow_decisions")
    assert (
        found
        == [
            (
                "the move takes longer than it brings in",
                "balanced: no placement gains more than it takes to find one",
                10**18,
                True,
            )
        ]
        * 2
    )


def test_observations_are_dealt_in_halves():
    """Windows in turn, or of few windows tokens at random; nothing is lost, and all ranks agree."""
    random = np.random.default_rng(0)
    windows = random.integers(0, 100, (6, 2, 5))
    counts = Observed(2, 5, 0.5, 7), Observed(2, 5, 0.5, 7)
    for each in counts:
        each.add(windows, 3)
        assert each.held.tolist() == windows[1::2].sum(axis=0).tolist()
        each.add(windows[:1], 1)
        assert each.total.tolist() == (0.5 * windows.sum(axis=0) + windows[0]).tolist()
        assert each.per_step.tolist() == (each.total / 2.5).tolist()
        dealt = each.held - 0.5 * windows[1::2].sum(axis=0)
        assert ((dealt >= 0) & (dealt <= windows[0])).all()
        assert 0.3 < dealt.sum() / windows[0].sum() < 0.7
        assert each.like_all(each.held).sum(axis=1) == pytest.approx(each.per_step.sum(axis=1))
    assert counts[0].held.tolist() == counts[1].held.tolist()


def test_arguments_that_cannot_be():
    """One line each: argument, rule, value."""
    assert values(2, "rank_rebalance.misuse")[0] == [
        "layers must be all layers of a placement, got none",
        "layers must be 0 to 2 of one placement, got [1, 2]",
        "decay must be from 0 to 1, got 2",
        "steps_ahead must be from 1 to 9223372036854775807, got 0",
        "topology must have 2 devices like the placement, got 3",
        "counts must be [layers, experts] [3, 8], got [1, 2]",
        "counts must be finite and at least 0, got -1 to -1",
    ]


def test_the_example():
    """It counts what it predicts, and moves experts when the traffic changes."""
    path = Path(__file__).parents[2] / "examples" / "expert_parallel.py"
    found = values(4, "rank_work.example", str(path))
    for rank, lines in enumerate(found):
        sent, predicted = lines[0].removeprefix(f"rank {rank}: ").split(" rows sent, ")
        assert predicted == f"{sent} predicted"
    moved = ["the move pays" in line for line in found[0][1:]]
    assert len(moved) == 4
    assert any(moved[2:])
    assert not all(moved)
