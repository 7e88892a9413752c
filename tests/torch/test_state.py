"""State, movement and gradients of ExpertParallelMoE: right on every rank, or refused on all."""

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ranks import values


@pytest.mark.parametrize("high_level", [False, True])
def test_a_distributed_checkpoint_has_every_expert(tmp_path, high_level):
    """All ranks load their own experts, copies too, in the placement that was saved and another."""
    found = values(2, "rank_state.saved_and_loaded", str(tmp_path / "saved"), high_level)
    same, other = zip(*found, strict=True)
    assert same == ([0, 1, -1], [2, 3, 0])
    assert other == ([3, -1, 0], [1, 3, 2])


def test_a_state_is_of_experts():
    """Names are of experts; a state of all of them loads; what is missing or strange is said."""
    for rank, (names, held, said, empty) in enumerate(values(2, "rank_state.states")):
        experts = ([0, 1], [0, 2, 3])[rank]
        assert names == sorted(f"expert.{e}.{n}" for e in range(4) for n in ("up", "down"))
        assert held == sorted(f"expert.{e}.{n}" for e in experts for n in ("up", "down"))
        whole, strange, missing, shape, slots = said
        assert whole == ""
        assert 'Unexpected key(s) in state_dict: "expert.4.up"' in strange
        assert f'Missing key(s) in state_dict: "expert.{2 * rank}.up"' in missing
        assert f"expert.{2 * rank}.up must be [8, 4], got [3, 4]" in shape
        assert "experts.up is of slots, and must be of experts one by one" in slots
        assert empty == ([0, 1, -1], [2, 3, 0])[rank]


def test_a_full_state_has_every_expert():
    """It is gathered from all ranks, copies once, and loads into any placement."""
    for rank, (found, whole, other) in enumerate(values(2, "rank_state.gathered")):
        assert found == {f"moe.expert.{e}.{n}": e for e in range(4) for n in ("up", "down")}
        assert whole
        assert other == ([3, -1, 0], [1, 3, 2])[rank]


def test_an_optimizer_is_not_loaded_into_other_slots(tmp_path):
    """A checkpoint keeps the state of every rank's experts; where they moved it has none."""
    for same, said in values(2, "rank_state.optimised", str(tmp_path / "saved")):
        assert same
        assert "experts_" in said


@pytest.mark.parametrize("how", ["DistributedDataParallel", "fully_shard"])
def test_wrappers_must_leave_out_the_experts(how):
    """A model that is wrapped whole is refused on all ranks; with experts left out it is right."""
    for said, difference in values(2, "rank_state.wrapped", how):
        assert said.startswith(how)
        assert "build the model again" in said
        assert difference < 1e-5


def test_a_layer_moves_as_a_whole():
    """In other types, made on meta and filled, and moved by meta it computes what it did."""
    for half, *others in values(2, "rank_state.moved"):
        assert half < 0.05
        assert max(others) < 1e-6


@pytest.mark.parametrize("node", [None, 2])
@pytest.mark.parametrize("learns", ["experts", "last", "tokens"])
def test_gradients_where_not_all_ranks_need_them(node, learns):
    """The backward pass of all ranks takes part, whoever learns and whoever gets no rows."""
    assert max(values(4, "rank_state.trained", node, learns)) < 1e-4


def test_gradients_enabled_on_some_ranks_only():
    """That is an error on every rank at once, and the next step works."""
    first, second = values(2, "rank_state.modes_differ")
    assert first == second
    assert first == "ranks [0] need gradients and ranks [1] have them disabled: nothing was sent"
