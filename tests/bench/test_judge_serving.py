"""What Frontier is given: the shares of slots under a placement."""

import subprocess
import sys
import types

import judge_serving as judge
import numpy as np
import pytest


def test_copies_share_the_load_of_their_expert():
    """Slots of an expert serve equal parts, and all of them everything."""
    load = np.array([[[60.0, 20, 10, 10]], [[0.0, 0, 0, 8]]])
    slots = np.array([[[0, 1, 2], [0, 3, 0]]])
    shares = judge.slot_shares(load, slots)
    assert shares[0, 0] == pytest.approx([0.2, 0.2, 0.1, 0.2, 0.1, 0.2])
    assert shares[1, 0].tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("slots", [4, 5])
def test_every_expert_has_a_slot(slots):
    """By all three methods, and ours is the most even on what it was placed by."""
    load = np.random.default_rng(0).lognormal(0, 1, (3, 2, 16)) * 1e4
    placed = judge.placements(load.astype(np.uint64), 4, slots)
    assert list(placed) == ["contiguous", "eplb", "joint"]
    uneven = {}
    for name, each in placed.items():
        assert each.shape == (2, 4, slots)
        assert all(set(layer.ravel()) - {-1} == set(range(16)) for layer in each)
        ranks = judge.slot_shares(load, each).reshape(3, 2, 4, slots).sum(axis=3)
        assert ranks.sum(axis=2) == pytest.approx(1)
        uneven[name] = ranks.max(axis=2).mean()
    assert min(uneven, key=uneven.get) == "joint"


def test_frontier_sees_a_window_and_the_busiest_rank(monkeypatch):
    """Decode has all slots of the batch's window, a step with prefill the busiest rank's."""

    class Predictor:
        def predict_monolithic_decode_shared_domain_lane_moe_times_ms(self, batch, layer_id):
            return self._global_routing_allocations[layer_id]

        def _get_local_ep_routed_tokens(self, batch):
            return 50

        def _build_proportional_per_expert_tokens(self, *, total_routed_tokens, allocation_ratios):
            return {slot: round(total_routed_tokens * of) for slot, of in allocation_ratios.items()}

    theirs = types.SimpleNamespace(SklearnMoEExecutionTimePredictor=Predictor)
    name = "frontier.execution_time_predictor"
    module = types.ModuleType(name)
    module.sklearn_moe_execution_time_predictor = theirs
    monkeypatch.setitem(sys.modules, "frontier", types.ModuleType("frontier"))
    monkeypatch.setitem(sys.modules, name, module)
    judge.replace_loads(np.array([[[0.1, 0.2, 0.3, 0.4]], [[0.5, 0.2, 0.1, 0.2]]]), ranks=2)
    one = Predictor()
    assert one._init_global_routing_allocations()[0] == {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
    lanes = one.predict_monolithic_decode_shared_domain_lane_moe_times_ms
    assert lanes(types.SimpleNamespace(id=3), 0) == {0: 0.5, 1: 0.2, 2: 0.1, 3: 0.2}
    assert one._get_moe_tokens_input(types.SimpleNamespace(id=4)) == {0: 30, 1: 40}
    assert one._get_moe_tokens_input(types.SimpleNamespace(id=5)) == {0: 50, 1: 20}


def test_without_frontier_it_says_what_is_missing(tmp_path):
    """One line, exit status 2."""
    words = [sys.executable, judge.__file__, str(tmp_path), str(tmp_path / "loads.npz")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Nothing can run: ")
    assert len(done.stderr.splitlines()) == 1
