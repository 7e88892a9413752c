"""State, movement and gradients of ExpertParallelMoE: right on every rank, or refused on all."""

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ranks import values


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Give what two ranks do with states."""
    folder = str(tmp_path_factory.mktemp("states"))
    return values(2, "rank_state.states_and_gradients", folder, timeout=110)


def test_a_distributed_checkpoint_has_every_expert(ranks):
    """All ranks load their own experts, copies too, in the placement that was saved and another."""
    for level in (0, 1):
        same, other = zip(*(rank["saved"][level] for rank in ranks), strict=True)
        assert same == ([0, 1, -1], [2, 3, 0])
        assert other == ([3, -1, 0], [1, 3, 2])


def test_a_state_is_of_experts(ranks):
    """Names are of experts; a state of all of them loads; what is missing or strange is said."""
    for rank, said in enumerate(ranks):
        names, here, (whole, strange, missing, shape, slots), empty = said["states"]
        experts = ([0, 1], [0, 2, 3])[rank]
        assert names == sorted(f"expert.{e}.{n}" for e in range(4) for n in ("up", "down"))
        assert here == sorted(f"expert.{e}.{n}" for e in experts for n in ("up", "down"))
        assert whole == ""
        assert 'Unexpected key(s) in state_dict: "expert.4.up"' in strange
        assert f'Missing key(s) in state_dict: "expert.{2 * rank}.up"' in missing
        assert f"expert.{2 * rank}.up must be [8, 4], got [3, 4]" in shape
        assert "experts.up is of slots, and must be of experts one by one" in slots
        assert empty == ([0, 1, -1], [2, 3, 0])[rank]


def test_a_full_state_has_every_expert(ranks):
    """It is gathered from all ranks, copies once, and loads into any placement."""
    for rank, said in enumerate(ranks):
        experts, whole, other = said["gathered"]
        assert experts == {f"moe.expert.{e}.{n}": e for e in range(4) for n in ("up", "down")}
        assert whole
        assert other == ([3, -1, 0], [1, 3, 2])[rank]


def test_an_optimizer_is_not_loaded_into_other_slots(ranks):
    """A checkpoint keeps the state of every rank's experts; where they moved it has none."""
    for rank in ranks:
        same, said = rank["optimised"]
        assert same
        assert "experts_" in said


@pytest.mark.parametrize("how", ["DistributedDataParallel", "fully_shard"])
def test_wrappers_must_leave_out_the_experts(ranks, how):
    """A model that is wrapped whole is refused on all ranks; with experts left out it is right."""
    for rank in ranks:
        said, difference = rank["wrapped"][how]
        assert said.startswith(how)
        assert "build the model again" in said
        assert difference < 1e-5


def test_a_layer_moves_as_a_whole(ranks):
    """In other types, made on meta and filled, and moved by meta it computes what it did."""
    for rank in ranks:
        half, *others = rank["moved"]
        assert half < 0.05
        assert max(others) < 1e-6


def test_gradients_where_not_all_ranks_need_them():
    """The backward pass of all ranks takes part, whoever learns and whoever gets no rows."""
    assert max(values(4, "rank_state.all_gradients")) < 1e-4


def test_gradients_enabled_on_some_ranks_only(ranks):
    """That is an error on every rank at once, and the next step works."""
    expected = "ranks [0] need gradients and ranks [1] have them disabled: nothing was sent"
    assert [rank["modes"] for rank in ranks] == [expected] * 2
