"""ExpertParallelMoE, its states and the Rebalancer, on real processes joined by gloo."""

import itertools
from importlib.util import find_spec

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import numpy as np
import rank_layer
import rank_rebalance
import rank_state
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from placements import murmur
from ranks import answers, values

from moetuner.torch.parallel.copies import hash_positions

MODULES = [rank_layer, rank_state, rank_rebalance]
if find_spec("transformers"):
    import rank_transformers

    MODULES.append(rank_transformers)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_on_every_rank(ranks, tmp_path):
    """The docstrings of all checks hold on every rank, for each number of ranks.

    The same processes run all checks of so many ranks, one after the other.
    """
    modules = [module.__name__ for module in MODULES if ranks in module.CHECKS]
    if "rank_transformers" in modules:
        values(1, "rank_transformers.write_models", str(tmp_path))
    values(ranks, "rank_layer.run_checks", modules, str(tmp_path))


@pytest.mark.parametrize("how", ["killed", "hangs", "raises"])
def test_a_rank_lost_in_the_middle_of_a_move(how):
    """The others give up under the old placement, and so does a late one when it is back.

    The error says that what they wait for is still in the process group.
    """
    for rank, (answer, error) in enumerate(answers(4, "rank_rebalance.lost_rank", how)):
        if how == "killed" and rank == 2:
            assert error == "killed"
            continue
        message, unchanged = answer
        assert "the old placement stays in force" in message
        assert message.count("the process group may be unusable") == 1 or (how, rank) == (
            "hangs",
            2,
        )
        assert unchanged


NAMES = [
    *("unobserved", "miscounted", "not a number", "late", "skipped", "memory", "solver", "judge"),
    *("half a fill", "late fill", "put", "half a put"),
]


@settings(max_examples=1, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2)), min_size=5, max_size=5))
@example([("late fill", 0), ("skipped", 1), ("late fill", 2)])
def test_any_faults_are_lived_through(faults):
    """Ranks always end and agree, steps work again within four, and traffic is followed."""
    ranks = values(3, "rank_rebalance.faulty", faults)
    for at, step in enumerate(zip(*(steps for steps, _ in ranks), strict=True)):
        outcomes, placements, right = zip(*step, strict=True)
        assert len(set(placements)) == 1
        assert all(right)
        assert len({outcome for outcome in outcomes if outcome != "skipped"}) == 1
        if at % 5 == 4:
            assert "MoveError" not in outcomes, faults
    assert [moved for _, moved in ranks] == [True] * 3


def test_positions_are_mixed_in_all_bits():
    """Equal to plain integers, and even for any number of copies and any stride of positions."""
    places = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    assert hash_positions(places).tolist() == [murmur(place % 2**32) for place in places.tolist()]
    for stride, copies in itertools.product((1, 2, 4, 12, 64, 1 << 20), (2, 3, 4, 5, 8)):
        served = hash_positions(torch.arange(4800) * stride).numpy() % copies
        assert np.bincount(served, minlength=copies).min() > 0.85 * 4800 / copies
        pairs = np.bincount(served[:-1] * copies + served[1:])
        assert pairs.min() > 0.4 * 4800 / copies**2
