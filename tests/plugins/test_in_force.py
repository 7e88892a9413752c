"""What the log says of a map: registered, in force, or not in force, and nothing more."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import stand_in_vllm

import moetuner as mt
from moetuner.plugins import sglang, vllm
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.settings import Settings

torch = pytest.importorskip("torch")

LOGGER = logging.getLogger("moetuner.tests.in_force")
OWN = np.array([[0, 1, 2, 3, 4, 0]] * 3)
SIZES = 6, 1, 1, 2


@pytest.fixture
def placement(tmp_path):
    """Store a placement of three layers, two ranks x 3 slots and 5 experts; return its path."""
    path = tmp_path / "placement.json"
    mt.Placement([[[4, 1, 2], [3, 0, 1]]] * 3).save(path)
    return path


@pytest.fixture
def lines(monkeypatch, caplog):
    """Return a function that returns the lines on what is in force, and forgets all lines."""
    caplog.set_level(logging.INFO, LOGGER.name)
    for module in (vllm, sglang):
        monkeypatch.setattr(module, "LOG", Log(LOGGER))

    def read():
        said = [line for line in caplog.messages if "in force" in line]
        caplog.clear()
        return said

    return read


def make(**settings):
    """Make a balancer of settings."""
    return Balancer(Settings(**settings), Log(LOGGER))


def ask(balancer, running, **named):
    """Decide on equal loads, while a map runs."""
    return balancer.decide(np.ones((len(running), 5)), *SIZES, running, **named)


def test_each_change_is_said_once(placement, lines):
    """In force once the engine runs the map, in any order of slots; else how it differs."""
    balancer = make(placements=(placement,))
    ours = ask(balancer, OWN)
    checksum = mt.Placement.load(placement).checksum
    assert lines() == []
    for _ in range(2):
        ask(balancer, ours.reshape(3, 2, 3)[..., ::-1].reshape(3, 6))
    expected = f"the engine runs map {checksum} of 3 layers x 6 slots on 2 ranks"
    assert lines() == [f"moetuner: in force: {expected}"]
    part = ours.copy()
    part[1] = OWN[1]
    for _ in range(2):
        ask(balancer, part)
    [line] = lines()
    assert line.startswith("moetuner: not in force: the engine runs map ")
    assert line.endswith(f"and not {checksum}: 1 of 3 layers differ")
    ask(balancer, ours)
    assert len(lines()) == 1


def test_an_engine_that_moves_nothing_is_named(placement, lines):
    """It still runs what it ran before."""
    balancer = make(placements=(placement,))
    ask(balancer, OWN)
    ask(balancer, OWN)
    [line] = lines()
    assert line.endswith("3 of 3 layers differ, as it moved no experts")


def test_after_a_fall_back_it_is_said_again(placement, lines):
    """The map of moetuner comes into force anew; other ranks say it at DEBUG."""
    balancer = make(placements=(placement,))
    ours = ask(balancer, OWN)
    ask(balancer, ours)
    assert len(lines()) == 1
    assert balancer.decide(np.full((3, 5), np.nan), *SIZES, ours) is None
    ask(balancer, ours)
    assert lines() == []
    ask(balancer, ours)
    assert len(lines()) == 1
    other = make(placements=(placement,))
    ask(other, ask(other, OWN, rank=1), rank=1)
    assert lines() == []


@pytest.mark.parametrize("says_what_runs", [True, False])
def test_a_fall_back_is_of_one_model(placement, lines, says_what_runs):
    """What another model was to run is compared all the same; of the one, nothing is expected."""
    text = placement.read_text()
    mt.Placement([[[4, 1, 2], [3, 0, 1]]] * 2).save(placement)
    placement.write_text(text + placement.read_text())
    balancer = make(placements=(placement,))
    one, other = (ask(balancer, OWN[:layers], model=str(layers)) for layers in (3, 2))
    wrong, running = np.full((3, 5), np.nan), OWN if says_what_runs else None
    assert balancer.decide(wrong, *SIZES, running, model="3") is None
    lines()
    balancer.confirm(one, 2, "3")
    assert lines() == []
    balancer.confirm(other, 2, "2")
    assert len(lines()) == 1


@pytest.fixture
def engine(placement, monkeypatch, lines):
    """Return a function that makes a vLLM with the plugin, whose configuration has a policy."""
    monkeypatch.setenv("MOETUNER_PLACEMENT", str(placement))

    def start(policy="default"):
        modules = stand_in_vllm.modules()
        for name, content in modules.items():
            parts = name.split(".")
            for length in range(1, len(parts)):
                parent = ModuleType(".".join(parts[:length]))
                parent.__path__ = []
                monkeypatch.setitem(sys.modules, parent.__name__, parent)
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        vllm.register()
        modules["vllm.config"]["VllmConfig"](policy=policy)
        states = modules["vllm.distributed.eplb.eplb_state"]["EplbState"]
        policies = modules["vllm.distributed.eplb.policy"]["EPLB_POLICIES"]
        return states, policies

    return start


def test_vllm_says_it_at_the_load_and_after_rearrangements(engine, lines, caplog):
    """At first that it is registered; in force after the load, and not where nothing moves."""
    states, policies = engine()
    assert any("registered, not asked yet; when asked, it serves" in one for one in caplog.messages)
    assert lines() == []
    state = states()
    state.policy = policies["default"]
    state.add_model(stand_in_vllm.model(layers=[None] * 3), None)
    [line] = lines()
    assert line.startswith("moetuner: in force: ")
    # vLLM moves experts by itself, and then moves none as we ask.
    [model] = state.model_states.values()
    model.physical_to_logical_map.copy_(torch.from_numpy(OWN))
    state.moves = False
    state.rearrange()
    [line] = lines()
    assert "not in force" in line
    assert line.endswith("as it moved no experts")
    # In a profile nothing is meant to move.
    state.moves = True
    state.rearrange()
    assert ["not in" in line for line in lines()] == [False]
    model.physical_to_logical_map.copy_(torch.from_numpy(OWN))
    for _ in range(2):
        state.rearrange(is_profile=True)
    assert lines() == []


def test_a_map_that_vllm_begins_with_is_in_force(engine, lines, placement):
    """Though nothing moves at the load."""
    mt.Placement([[[0, 1, 2], [3, 4, 0]]] * 3).save(placement)
    states, policies = engine()
    state = states()
    state.policy = policies["default"]
    state.add_model(stand_in_vllm.model(layers=[None] * 3), None)
    assert state.rearranged == []
    [line] = lines()
    assert line.startswith("moetuner: in force: ")


class Stair:
    """A policy of vllm-ascend's second model runner, which is an object, not a class."""

    def rebalance_experts(self, load, replicas, groups, nodes, ranks, old=None):
        """Answer with experts in turn."""
        return torch.from_numpy(OWN)


def make_ascend_state(states, policies, name):
    """Make the state of vllm-ascend's second model runner (0.30.0rc2), beside its vLLM.

    It looks its policy up by the configured name, puts STAIR there while it does, and rearranges
    nothing before it has recorded load.
    """

    class AscendEplbState(states):
        has_load = False

        def add_model(self, model, model_config):
            self.policy = policies[name] if name in policies else Stair()
            super().add_model(model, model_config)

        def rearrange(self, is_profile=False):
            if self.has_load or is_profile:
                super().rearrange(is_profile=is_profile)

    state = AscendEplbState()
    state.is_async = True
    return state


def test_on_ascend_where_stair_decides_nothing_is_said_to_be_served(engine, lines, caplog):
    """The second model runner never asks: one warning says so, and what to pass."""
    states, policies = engine("stair")
    state = make_ascend_state(states, policies, "stair")
    state.add_model(stand_in_vllm.model(layers=[None] * 3), None)
    state.has_load = True
    for _ in range(3):
        state.rearrange()
    said = [line for line in caplog.messages if "pass --eplb-config.policy default" in line]
    assert said[0].startswith("moetuner: never asked: policy stair of the engine decides")
    assert not any("serves" in line.replace("to serve", "") for line in caplog.messages)
    assert not [line for line in caplog.messages if "registered" in line]
    assert lines() == []
    assert (state.model_states.popitem()[1].physical_to_logical_map.numpy() == OWN).all()


def test_on_ascend_the_default_policy_is_ours_from_the_first_rearrangement(engine, lines):
    """Not at the load, where it rearranges nothing, and the log says both."""
    states, policies = engine("default")
    state = make_ascend_state(states, policies, "default")
    state.add_model(stand_in_vllm.model(layers=[None] * 3), None)
    [line] = lines()
    assert line.startswith("moetuner: not in force: ")
    assert line.endswith("as it moved no experts")
    state.has_load = True
    state.rearrange()
    assert lines() == []
    state.rearrange()
    [line] = lines()
    assert line.startswith("moetuner: in force: ")


def test_sglang_says_it_at_the_load(placement, lines, monkeypatch):
    """By the map that it loads weights by; not where another algorithm was chosen."""

    class Metadata:
        ep_size, num_logical_experts = 2, 5

        def __init__(self, experts):
            self.physical_to_logical_map_cpu = torch.as_tensor(experts)

        @classmethod
        def init_by_mapping(cls, model_config, experts):
            return cls(experts if Metadata.takes else torch.from_numpy(OWN))

    config = SimpleNamespace(model_path="tiny")
    for takes, algorithm, words in (
        (True, "moetuner", "moetuner: in force: "),
        (False, "moetuner", "moetuner: not in force: "),
        (True, "deepseek", None),
    ):
        Metadata.takes = takes
        monkeypatch.setattr(sglang, "chosen_algorithm", lambda chosen=algorithm: chosen)
        hooks = sglang.Hooks(make(placements=(placement,)))
        hooks.init_trivial(lambda *_: Metadata(OWN), config)
        said = lines()
        assert len(said) == (words is not None)
        assert words is None or said[0].startswith(words)
