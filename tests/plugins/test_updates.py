"""Weights that change in vLLM follow the experts: a stand-in for its loader, states and workers."""

import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in_vllm import WIDTH, engine, model

from moetuner.plugins.log import Log
from moetuner.plugins.updates import bring_maps, find_models, follow_updates, keep_maps

torch = pytest.importorskip("torch")

LOG = logging.getLogger("moetuner.plugins")


class Served:
    """Models of an engine on all of its ranks, with the updates followed."""

    def __init__(
        self, experts, slots, ranks=2, layers=2, *, is_fused=False, kinds=None, log=None, **more
    ):
        self.classes = kinds or engine()
        layers_of = more.pop("loader", self.classes.RoutedExperts)
        self.missing = follow_updates(
            self.classes.EplbState, layers_of, self.classes.Worker, log or Log(LOG), **more
        )
        self.experts, self.slots, self.width = experts, slots, slots // ranks
        self.layers = [
            [
                self.classes.RoutedExperts(self.width, rank * self.width, experts, slots)
                for _ in range(layers)
            ]
            for rank in range(ranks)
        ]
        self.states = [self.classes.EplbState(rank, ranks) for rank in range(ranks)]
        self.load(range(experts), 0, is_fused)
        for moe_layers, states in zip(self.layers, self.states, strict=True):
            states.add_model(model(moe_layers, experts=experts, slots=slots, ranks=ranks), None)
        self.workers = [
            self.classes.Worker(states, rank) for rank, states in enumerate(self.states)
        ]

    def place(self, running):
        """Put experts into slots [L,P], with their weights."""
        for rank, states in enumerate(self.states):
            (state,) = states.model_states.values()
            state.physical_to_logical_map.copy_(torch.from_numpy(running))
            for layer, experts in enumerate(self.layers[rank]):
                row = running[layer, rank * self.width : (rank + 1) * self.width]
                experts.weight.copy_(torch.from_numpy(row)[:, None].float().expand(-1, WIDTH))

    def load(self, experts, step, is_fused=False):
        """Load experts as vLLM's models do: through the slots of the first map.

        The first time through all of them, later up to the first success, as some models do; from
        a tensor with all experts of a layer (fused) every expert once, and no copy. The weights of
        an expert are its number, and a hundred more for each step.
        """
        for layer in (layer for moe_layers in self.layers for layer in moe_layers):
            for expert in experts:
                tensor = torch.full((WIDTH,), expert + 100.0 * step), "w1_weight", "w1"
                for slot in range(expert, self.slots, self.slots if is_fused else self.experts):
                    if layer.weight_loader(layer.weight, *tensor, slot, True) and step:
                        break

    def held(self):
        """Return the weights of every slot [L,P]."""
        rows = [[layer.weight[:, 0].tolist() for layer in of] for of in self.layers]
        return np.concatenate(rows, axis=1)


@st.composite
def maps(draw):
    """Draw experts, slots, and a map [L,P] with copies and empty slots, all experts somewhere."""
    experts, spare = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    slots = (experts + spare + 1) // 2 * 2
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(2):
        others = random.integers(-1, experts, slots - experts)
        rows.append(random.permutation([*range(experts), *others]))
    return experts, slots, np.array(rows), random


@given(maps())
def test_an_update_goes_to_the_slots_that_hold_the_expert(case):
    """Every copy of every expert, of all or of some, however often the map changes; no other."""
    experts, slots, running, random = case
    served = Served(experts, slots)
    for step in (1, 2):
        served.place(running)
        some = random.permutation(experts)[: random.integers(0, experts + 1)]
        served.load(some, step)
        expected = np.where(np.isin(running, some), running + 100 * step, running)
        assert np.array_equal(served.held(), expected)
        running = random.permuted(running, axis=1)


def test_an_empty_slot_is_no_move():
    """Experts have moved where one is in another slot, not where a slot of a copy is empty."""
    served = Served(3, 4)
    for running, moved in (([0, 1, 2, -1], False), ([0, 1, -1, 2], True), ([0, 1, 2, 0], False)):
        served.place(np.array([running] * 2))
        models = [placed for states in served.states for placed in find_models(states)]
        assert [placed.moved for placed in models] == [moved] * 2


def test_without_moves_all_is_loaded_as_ever():
    """Before the engine has taken the model, and after; copies of the first map too."""
    served = Served(3, 4)
    assert served.missing == ""
    assert served.held().tolist() == [[0, 1, 2, 0]] * 2
    served.load(range(3), 1)
    assert served.held().tolist() == [[100, 101, 102, 100]] * 2


@pytest.mark.parametrize("is_fused", [False, True])
@given(st.integers(1, 9), st.integers(0, 20))
def test_the_first_load_leaves_no_slot_without_weights(is_fused, experts, spare):
    """Copies neither, however many there are, also where all experts come in one tensor."""
    slots = (experts + spare + 1) // 2 * 2
    served = Served(experts, slots, is_fused=is_fused)
    assert served.held().tolist() == [[slot % experts for slot in range(slots)]] * 2


def test_the_first_load_says_where_a_slot_is_local():
    """Of any copy, once for each expert; layers that do not say what they have are left alone."""
    kinds = engine()
    Served(3, 4, kinds=kinds)
    tensor = torch.ones(WIDTH), "w1_weight", "w1"
    for config, expected in (
        ((3, 4), [True, False, True, False]),
        ((0, 0), [False] * 2 + [True] * 2),
    ):
        layer = kinds.RoutedExperts(2, 2, *config)
        load = partial(layer.weight_loader, layer.weight, *tensor)
        assert [load(expert, True) for expert in range(4)] == expected
        assert load(0) is None


def test_success_is_said_where_a_slot_is_local():
    """Of the first slot of an expert; where nobody asks there is no answer, as in vLLM."""
    served = Served(3, 4)
    served.place(np.array([[2, 1, 0, 2]] * 2))
    tensor = torch.ones(WIDTH), "w1_weight", "w1"
    for rank, expected in enumerate([[False, True, True], [True, False, True]]):
        layer = served.layers[rank][0]
        load = partial(layer.weight_loader, layer.weight, *tensor)
        assert [load(expert, True) for expert in range(3)] == expected
        assert load(3, True) is False
        assert load(0) is None


@pytest.mark.parametrize("rebalanced", [False, True])
def test_what_was_staged_before_an_update_is_dropped_before_the_next_step(rebalanced):
    """Once, on every rank, if a rearrangement was under way when weights were loaded."""
    served = Served(3, 4)
    for states in served.states:
        (state,) = states.model_states.values()
        state.rebalanced = rebalanced
        states.step()
    served.load([1], 1)
    for states in served.states:
        states.step()
        states.step(is_dummy=True)
        assert states.done == ["step", *["drain"] * rebalanced, "step", "step"]


MOVED = np.array([[2, 1, 0, 2]] * 2)


def a_loader_of_its_own():
    """Return classes whose layers load by code of their own."""
    kinds = engine()

    class Other(kinds.RoutedExperts):
        """Loads as it likes."""

        def weight_loader(self, *arguments, **named):
            """Do nothing."""

    return SimpleNamespace(**{**vars(kinds), "RoutedExperts": Other})


def fused_shared_experts():
    """Return classes whose layers have shared experts among the others."""
    kinds = engine()
    kinds.RoutedExperts.expert_map_manager = SimpleNamespace(num_fused_shared_experts=1)
    return kinds


def no_drain():
    """Return classes that move weights in the background and cannot drop them."""
    kinds = engine()
    del kinds.EplbState.drain_async
    add_model = kinds.EplbState.add_model

    def asynchronous(self, model, model_config):
        add_model(self, model, model_config)
        self.is_async = True

    kinds.EplbState.add_model = asynchronous
    return kinds


def other_arguments():
    """Return classes whose loader takes something else."""
    kinds = engine()
    kinds.RoutedExperts.weight_loader = lambda self, param, weight, expert_id: None
    return kinds


# Classes, the loader's class that is found, what cannot be followed, and how it is reloaded.
UNFOLLOWED = {
    "own loader": (a_loader_of_its_own, "own", "code of its own", {}),
    "shared": (fused_shared_experts, "same", "shared experts that are fused", {}),
    "no drain": (no_drain, "same", "beside an asynchronous rearrangement", {}),
    "no loader": (engine, None, "has no RoutedExperts.weight_loader", {}),
    "kernel": (engine, "same", "the kernel's format", {"is_checkpoint_format": False}),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_cannot_be_followed_is_refused_once_experts_have_moved(name, caplog):
    """On the last worker alone, as vLLM reads no answer behind an error; before, it is done."""
    make, found, words, named = UNFOLLOWED[name]
    kinds = make()
    base = {"own": kinds.RoutedExperts.__mro__[1], "same": kinds.RoutedExperts, None: None}[found]
    served = Served(3, 4, kinds=kinds, loader=base)
    for worker in served.workers:
        assert worker.reload_weights(**named) == "reloaded"
    served.place(MOVED)
    first, last = served.workers
    assert first.reload_weights(**named) is None
    with pytest.raises(RuntimeError, match=f"reload_weights is refused: experts of tiny.*{words}"):
        last.reload_weights(**named)
    if name != "kernel":
        assert first.start_weight_update() is None
        with pytest.raises(RuntimeError, match="start_weight_update is refused"):
            last.start_weight_update()
        assert caplog.text.count("weights that change do not follow experts that move") == 1
    assert [worker.did for worker in served.workers] == [["reload"]] * 2


def test_followed_updates_are_not_refused():
    """In the checkpoint's format, by position or by name; and a session starts."""
    served = Served(3, 4)
    served.place(MOVED)
    for worker in served.workers:
        assert worker.reload_weights(None, "path", True) == "reloaded"
        worker.start_weight_update()
        assert worker.did == ["reload", "start"]
    with pytest.raises(RuntimeError, match="kernel's format"):
        served.workers[1].reload_weights(None, None, False)


@pytest.mark.parametrize("kinds", [engine, fused_shared_experts])
def test_a_load_that_cannot_be_followed_is_refused(kinds, monkeypatch):
    """Of all experts in one tensor, in the order of the first map, and of fused shared experts."""
    served = Served(3, 4, kinds=kinds())
    whole = torch.ones(2, WIDTH) if kinds is engine else torch.ones(WIDTH)
    for moved in (False, True):
        for rank in (0, 1):
            layer = served.layers[rank][0]
            monkeypatch.setattr(
                "moetuner.plugins.updates.find_process_rank", lambda rank=rank: rank
            )
            load = partial(layer.weight_loader, layer.weight, whole, "w1_weight", "w1", 2 * rank)
            before = layer.weight.clone()
            if moved and rank:
                with pytest.raises(RuntimeError, match="load_weights is refused"):
                    load(return_success=True)
            else:
                assert load(return_success=True) is not moved
            assert torch.equal(layer.weight, before) == moved
        served.place(MOVED)


def test_where_the_loader_takes_other_arguments_nothing_is_wrapped():
    """Updates are refused instead."""
    kinds = other_arguments()
    before = kinds.RoutedExperts.weight_loader
    reason = follow_updates(kinds.EplbState, kinds.RoutedExperts, kinds.Worker, Log(LOG))
    assert "takes other arguments" in reason
    assert kinds.RoutedExperts.weight_loader is before


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_keeps_where_experts_are(level):
    """Also the one that discards all that was allocated when the model was loaded."""
    served = Served(3, 4)
    served.place(MOVED)
    for worker in served.workers:
        worker.sleep(level)
        worker.wake_up(["kv_cache"])
        worker.wake_up(["weights"])
    served.load(range(3), 1)
    assert np.array_equal(served.held(), MOVED + 100)


def test_maps_that_are_brought_back_are_brought_once():
    """What was kept before a second sleep is not taken for the map of the third."""
    served = Served(3, 4)
    worker, log = served.workers[0], Log(LOG)
    (state,) = served.states[0].model_states.values()
    for expected in (MOVED, MOVED[:, ::-1].copy()):
        served.place(expected)
        keep_maps(worker, log)
        state.physical_to_logical_map.zero_()
        keep_maps(worker, log)
        bring_maps(worker)
        bring_maps(worker)
        assert state.physical_to_logical_map.tolist() == expected.tolist()


def test_tensors_that_were_made_while_serving_are_brought_back():
    """Torch's inference mode made them, and nothing may change them in place outside it."""
    served = Served(3, 4)
    worker = served.workers[0]
    (state,) = served.states[0].model_states.values()
    with torch.inference_mode():
        state.last_expert_load = torch.full((2, 3), 7)
        state.physical_to_logical_map = torch.from_numpy(MOVED.copy())
    worker.sleep(level=1)
    keep_maps(worker, Log(LOG))
    with torch.inference_mode():
        state.last_expert_load.zero_()
        state.physical_to_logical_map.zero_()
    worker.wake_up()
    assert state.last_expert_load.tolist() == [[7] * 3] * 2
    assert state.physical_to_logical_map.tolist() == MOVED.tolist()


class OnlineMoEMethodBase:
    """vLLM's name for what computes scales when weights are loaded."""


@pytest.mark.parametrize("rearranges", [True, False])
def test_scales_that_are_computed_at_a_load_are_warned_of(rearranges, caplog):
    """Once, where experts move later, by whoever moves them."""
    kinds = engine()
    kinds.RoutedExperts.quant_method = OnlineMoEMethodBase()
    served = Served(3, 4, kinds=kinds, rearranges=rearranges)
    served.load(range(3), 1)
    assert caplog.text.count("scales that are computed") == rearranges


def test_following_twice_is_following_once():
    """Plugins are registered in every process, in some of them several times."""
    kinds = engine()
    served = Served(3, 4, kinds=kinds)
    before = {name: vars(kinds.Worker)[name] for name in ("sleep", "reload_weights")}
    follow_updates(kinds.EplbState, kinds.RoutedExperts, kinds.Worker, Log(LOG))
    assert {name: vars(kinds.Worker)[name] for name in before} == before
    served.place(MOVED)
    served.load(range(3), 1)
    assert np.array_equal(served.held(), MOVED + 100)
