"""What the environment asks of plugins: what they serve, record and say, and what errors become."""

import logging
import os
import pickle
import re
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import numpy as np
import pytest
import stand_in_vllm
from make import trace_of

import moetuner as mt
from moetuner.plugins import rebalance_experts, sglang, vllm, vllm_ascend
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.recorder import MOST_WINDOWS, LoadRecorder
from moetuner.plugins.settings import Settings, find_idle_variables

LOG = logging.getLogger("moetuner.plugins")
# Balancers of the test that runs.
MADE = []


def balancer(**environment):
    """Make the balancer of an environment."""
    given = Settings.from_environment(
        {f"MOETUNER_{name}": str(value) for name, value in environment.items()}
    )
    MADE.append(Balancer(given, Log(LOG)))
    return MADE[-1]


@pytest.fixture(autouse=True)
def _fresh_logs(monkeypatch):
    """Let every test hear its warnings, though an engine's process says each once, and no other's.

    Balancers write lines in threads of their own.
    """
    for module in (vllm, sglang, vllm_ascend):
        monkeypatch.setattr(module, "LOG", Log(LOG))
    yield
    while MADE:
        MADE.pop().flush()


@pytest.fixture
def stored(tmp_path):
    """Write a placement of 3 layers, 2 ranks x 3 slots and 5 experts; its path and itself."""
    placement = mt.Placement([[[0, 1, 2], [3, 4, 0]]] * 2 + [[[4, 3, 2], [1, 0, 2]]])
    path = tmp_path / "placement.json"
    placement.save(path)
    return path, placement


REGISTERS = [vllm.register, sglang.register, vllm_ascend.register]


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", None),
        ("0", None),
        ("perhaps", "MOETUNER_REBALANCE must be 0 or 1"),
        ("1", "keeps its own"),
    ],
)
def test_an_engine_starts_whatever_the_variable(register, value, words, monkeypatch, caplog):
    """Asked nothing its file does nothing; of nonsense, and of no engine, there is a warning."""
    for name in ("PLACEMENT", "RECORD"):
        monkeypatch.delenv(f"MOETUNER_{name}", raising=False)
    monkeypatch.setenv("MOETUNER_REBALANCE", value)
    for engine in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, engine, None)
    register()
    if words is None or register is vllm_ascend.register:
        assert not caplog.records
    else:
        assert words in caplog.text


def test_sglang_knows_the_name_without_variables(caplog):
    """`--eplb-algorithm moetuner` alone is SGLang's own algorithm, not the end of the server."""
    hooks = sglang.Hooks(None)
    own = hooks.compute_algorithm(lambda *given: given, "moetuner", None, 1)
    assert own == ("auto", None, 1)
    assert "neither MOETUNER_PLACEMENT nor MOETUNER_REBALANCE is set" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("PLACEMENT REBALANCE", "MOETUNER_PLACEMENT is served"),
        ("PROFILE", "MOETUNER_PROFILE does nothing without"),
        ("PROFILE RECORD", "MOETUNER_PROFILE does nothing without"),
        ("PROFILE PLACEMENT", "MOETUNER_PROFILE does nothing with MOETUNER_PLACEMENT"),
        ("RELOAD", "MOETUNER_RELOAD does nothing without"),
        ("PLACMENT", "did you mean MOETUNER_PLACEMENT?"),
        ("SPEED", "MOETUNER_SPEED is not a variable of moetuner: known are PLACEMENT, "),
        ("PROFILE REBALANCE", None),
        ("METRICS_PORT", "MOETUNER_METRICS_PORT does nothing without MOETUNER_PLACEMENT"),
        ("METRICS_PORT RECORD", "MOETUNER_METRICS_PORT does nothing without MOETUNER_PLACEMENT"),
        ("METRICS_PORT REBALANCE", None),
        ("METRICS_PORT PLACEMENT", None),
    ],
)
def test_says_which_variable_does_nothing(names, words):
    """In one line."""
    lines = find_idle_variables({f"MOETUNER_{name}": "1" for name in names.split()})
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]


def test_one_line_says_what_is_registered(stored, caplog):
    """With the file, its checksum and sizes; or that an option of the engine is missing."""
    caplog.set_level(logging.INFO, LOG.name)
    serve = balancer(PLACEMENT=stored[0])
    configuration = stand_in_vllm.modules()["vllm.config"]["VllmConfig"]
    vllm.announce(configuration, serve)
    for is_balanced in (True, True, False):
        configuration(is_balanced)
    line, other = caplog.messages
    assert line.startswith(
        f"moetuner: registered, not asked yet; when asked, it serves {stored[0]} ("
    )
    assert stored[1].checksum in line
    assert "3 layers x 3 slots on 2 ranks, 5 experts" in line
    assert line.endswith(f"; moetuner {mt.__version__}")
    assert other == "moetuner: does nothing without --enable-eplb"


def test_entry_points_name_the_functions():
    """The engines find what they call."""
    for group, functions in (
        ("vllm.general_plugins", [vllm.register, vllm_ascend.register]),
        ("sglang.srt.plugins", [sglang.register]),
    ):
        mine = [of for of in entry_points(group=group) if of.name.startswith("moetuner")]
        assert [of.load() for of in mine] == functions


def test_serves_a_stored_placement(stored):
    """As read at the start, whatever the loads; what runs keeps its slots; then nothing moves."""
    path, placement = stored
    serve = balancer(PLACEMENT=path)
    path.write_text("gone")
    expected = placement.slots.reshape(3, 6)
    assert np.array_equal(serve.decide(np.zeros((3, 5)), 6, 1, 1, 2), expected)
    old = np.array([[2, 1, 0, 4, 3, 1]] * 3)
    actual = serve.decide(np.ones((3, 5)), 6, 1, 1, 2, old)
    assert actual.tolist() == [[2, 1, 0, 4, 3, 0]] * 2 + [[2, 4, 3, 0, 2, 1]]
    assert np.array_equal(serve.decide(np.ones((3, 5)), 6, 1, 1, 2, actual), actual)
    # Engines' own algorithms leave copies on one rank: no expert of the file is lost for them.
    twice = serve.decide(np.ones((3, 5)), 6, 1, 1, 2, np.array([[0, 0, 0, 1, 2, 4]] * 3))
    assert twice.tolist() == [[0, 1, 2, 3, 0, 4]] * 2 + [[4, 3, 2, 1, 2, 0]]


def test_serves_where_hidden_layers_are_counted(stored):
    """Layers that never have load are dense: they keep what they have."""
    path, placement = stored
    load = np.ones((5, 5))
    load[[0, 2]] = 0
    actual = balancer(PLACEMENT=path).decide(load, 6, None, 1, 2)
    assert np.array_equal(actual[[1, 3, 4]], placement.slots.reshape(3, 6))
    assert actual[0].tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("wrong", [((3, 5), 8), ((3, 6), 6), ((4, 5), 6)])
def test_a_placement_of_something_else_is_refused(stored, wrong, caplog):
    """Of other slots, experts or layers: the engine's own map; the message names the file."""
    shape, slots = wrong
    assert balancer(PLACEMENT=stored[0]).decide(np.ones(shape), slots, 1, 1, 2) is None
    assert re.search(r"placement.json: .*but the engine has", caplog.text)


def test_models_of_one_engine_get_a_placement_each(stored, tmp_path, caplog):
    """Chosen by sizes among files, and among placements in a file; then by the model's name."""
    path, placement = stored
    draft = mt.Placement([[[4, 3, 2], [1, 0, 2]]], model="org/draft")
    both = tmp_path / "both.json"
    draft.save(tmp_path / "draft.json")
    both.write_text(path.read_text() + (tmp_path / "draft.json").read_text())
    for files in (both, f"{path}{os.pathsep}{tmp_path / 'draft.json'}"):
        serve = balancer(PLACEMENT=files)
        assert np.array_equal(
            serve.decide(np.ones((3, 5)), 6, 1, 1, 2).ravel(), placement.slots.ravel()
        )
        assert serve.decide(np.ones((1, 5)), 6, 1, 1, 2).tolist() == [[4, 3, 2, 1, 0, 2]]
    other = mt.Placement([[[0, 1, 2], [3, 4, 0]]], model="org/main")
    other.save(tmp_path / "other.json")
    serve = balancer(PLACEMENT=f"{tmp_path / 'other.json'}{os.pathsep}{tmp_path / 'draft.json'}")
    named = serve.decide(np.ones((1, 5)), 6, 1, 1, 2, model="/models/draft")
    assert named.tolist() == [[4, 3, 2, 1, 0, 2]]
    assert serve.decide(np.ones((1, 5)), 6, 1, 1, 2) is None
    assert "more than one placement" in caplog.text


NAMES = {
    ("org/Model-A", "models/Model-A"): False,
    ("org/Model-A", "MODEL-A (draft)"): False,
    ("org/Model-A", "/cache/models--org--Model-A/snapshots/0123abcd"): False,
    ("org/Model-A", "org/Model-B"): True,
    ("org/Model-A", None): False,
    (None, "org/Model-A"): False,
}


@pytest.mark.parametrize("names", NAMES)
def test_one_warning_of_a_placement_for_another_model(names, tmp_path, caplog):
    """With both names, where both are known; it is served all the same."""
    made_for, model = names
    path = tmp_path / "placement.json"
    mt.Placement([[[0, 1, 2], [3, 4, 0]]], model=made_for).save(path)
    serve = balancer(PLACEMENT=path)
    for _ in range(2):
        assert serve.decide(np.ones((1, 5)), 6, 1, 1, 2, model=model) is not None
    expected = f"moetuner: {path} was made for {made_for}, and the engine serves {model}"
    assert caplog.messages.count(expected) == NAMES[names]


# What the engine says of its layers, and of five which have load; the layers that are served.
SPARSE = {
    "MoE layers alone": (None, [1, 3, 4], None),
    "its configuration": ([0, 2, 4], [], [0, 2, 4]),
    "its configuration, more than have load": ([0, 2, 4], [0, 2], [0, 2, 4]),
    "its configuration, another number": ([0, 2, 3, 4], [], None),
    "its load": ((), [1, 3, 4], [1, 3, 4]),
    "its load, another number": ((), [4], None),
    "nothing": ((), [], None),
}


@pytest.mark.parametrize("name", SPARSE)
def test_fewer_layers_than_the_engines(name, stored, caplog):
    """A placement of three layers goes to the three with experts of five, if the engine tells."""
    sparse, loaded, expected = SPARSE[name]
    load = np.zeros((5, 5))
    load[loaded] = 1
    serve = balancer(PLACEMENT=stored[0])
    actual = serve.decide(load, 6, None, 1, 2, sparse=sparse)
    if expected is None:
        assert actual is None
        assert f"{stored[0]}: the placement has 3 layers, but the engine has 5" in caplog.text
    else:
        assert np.array_equal(actual[expected], stored[1].slots.reshape(3, 6))
        others = [layer for layer in range(5) if layer not in expected]
        assert actual[others].tolist() == [[0, 1, 2, 3, 4, 0]] * 2


@pytest.mark.parametrize("loaded", [0, 3])
def test_one_layer_is_not_put_on_the_last_of_a_larger_model(loaded, tmp_path):
    """Of a draft model, with load and without; the draft model itself gets it."""
    path = tmp_path / "draft.json"
    mt.Placement([[[0, 1, 2], [3, 4, 0]]]).save(path)
    for sparse in (None, [1, 2, 3], ()):
        serve = balancer(PLACEMENT=path)
        load = np.zeros((4, 5))
        load[4 - loaded :] = 1
        assert serve.decide(load, 6, 1, 1, 2, sparse=sparse) is None
        assert serve.decide(np.zeros((1, 5)), 6, 1, 1, 2, sparse=sparse) is not None


CONFIGURATIONS = {
    "dense first": ({"first_k_dense_replace": 2, "moe_layer_freq": 1}, [2, 3, 4, 5]),
    "by a list": ({"first_k_dense_replace": 1, "moe_layer_freq": [0, 1, 0, 1, 0, 1]}, [1, 3, 5]),
    "by kinds": ({"mlp_layer_types": ["dense", "sparse"] * 3}, [1, 3, 5]),
    "by a step": ({"mlp_only_layers": [3], "decoder_sparse_step": 2}, [1, 5]),
    "all": ({"mlp_only_layers": [], "decoder_sparse_step": 1}, list(range(6))),
    "unknown step": ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, []),
    "unknown": ({}, []),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("where", ["hf_text_config", "hf_config"])
def test_sglang_layers_with_experts_come_from_the_configuration(name, where):
    """Where it tells; else the first loads do."""
    values, expected = CONFIGURATIONS[name]
    config = SimpleNamespace(**{where: SimpleNamespace(**values)})
    assert sglang.list_sparse_layers(config, 6) == expected


# A new file, and words of why it is not taken; none where it is.
RELOADED = {
    "half written": (lambda text: text[:40], "not a placement"),
    "empty": (lambda text: "", "not a placement"),
    "deleted": (lambda text: None, "No such file or directory"),
    "other ranks": ([[[0, 1], [2, 3], [4, 0]]] * 3, "3 devices x 2 slots for 5 experts"),
    "other experts": ([[[0, 1, 2], [3, 4, 5]]] * 3, "2 devices x 3 slots for 6 experts"),
    "other layers": ([[[0, 1, 2], [3, 4, 0]]] * 2, "has 2 layers, but the engine has 3"),
    "served": ([[[4, 3, 2], [1, 0, 2]]] * 3, None),
}


@pytest.mark.parametrize("name", RELOADED)
def test_what_cannot_be_served_here_is_not_taken(name, stored, tmp_path, caplog):
    """What runs stays; one warning names the file and the whole cause, however long they are."""
    new, words = RELOADED[name]
    folder = tmp_path / "a-folder-with-a-long-name-as-there-are-on-clusters" / ("x" * 100)
    folder.mkdir(parents=True)
    path, flag = folder / "placement.json", tmp_path / "reload"
    content = stored[0].read_text()
    path.write_text(content)
    serve = balancer(PLACEMENT=path, RELOAD=flag)
    ask = (np.ones((3, 5)), 6, 1, 1, 2)
    before = serve.decide(*ask, sparse=None)
    if isinstance(new, list):
        mt.Placement(new).save(path)
    elif (text := new(content)) is None:
        path.unlink()
    else:
        path.write_text(text)
    for time in range(2):
        flag.write_text(str(time) * (time + 1))
        serve.look_again()
        after = serve.decide(*ask, before, sparse=None)
        assert np.array_equal(after, before) == (words is not None)
    lines = [line for line in caplog.messages if "not taken" in line]
    assert len(lines) == (words is not None)
    assert words is None or (words in lines[0] and str(path) in lines[0])


def test_a_file_is_taken_if_all_models_that_run_get_theirs(stored, tmp_path, caplog):
    """Not where it has one for the draft model alone, which then would be all that is served."""
    path, flag = tmp_path / "served.json", tmp_path / "reload"
    draft = mt.Placement([[[4, 3, 2], [1, 0, 2]]])
    draft.save(tmp_path / "draft.json")
    path.write_text(stored[0].read_text() + (tmp_path / "draft.json").read_text())
    serve = balancer(PLACEMENT=path, RELOAD=flag)

    def decide():
        return [serve.decide(np.ones((of, 5)), 6, 1, 1, 2, sparse=None) for of in (1, 3)]

    before = decide()
    path.write_text((tmp_path / "draft.json").read_text())
    flag.write_text("1")
    serve.look_again()
    assert all(map(np.array_equal, decide(), before))
    assert f"not taken: {path}: the placement has 1 layers, but the engine has 3" in caplog.text


def on_ranks(slots):
    """Return the experts of every rank of two, of slots in any order [L,2,3]."""
    return np.sort(np.asarray(slots).reshape(-1, 2, 3))


def load_both(serve, *, marked=True):
    """Load vLLM's model of three layers with its draft model of one, which it adds first.

    ``marked`` says whether vLLM marks a draft model by its name. Returns the state of all models,
    and vLLM's policy with ours in its place.
    """
    states = stand_in_vllm.engine().EplbState
    vllm.place_at_load(states, serve)
    engine, name = states(), "/models/Main (draft)" if marked else "/models/Main"
    theirs = stand_in_vllm.policy()
    ours = vllm.make_policy_class(theirs, serve)
    moves = engine.rearrange
    engine.moved = []

    def rearrange():
        moves()
        for state in engine.model_states.values():
            running = state.physical_to_logical_map
            load = running[:, :5] * 0
            state.physical_to_logical_map = ours.rebalance_experts(load, 6, 1, 1, 2, running)
            engine.moved.append(len(running))

    engine.rearrange = rearrange
    engine.add_model(
        stand_in_vllm.model(layers=[None]), SimpleNamespace(runner_type="draft"), model_name=name
    )
    engine.add_model(stand_in_vllm.model(), SimpleNamespace(), model_name="/models/Main")
    return engine, theirs, ours


@pytest.mark.parametrize("marked", [True, False])
def test_a_draft_model_without_a_placement_is_the_engines(stored, marked, caplog):
    """One line says so, however often vLLM asks; the main model's placement stays in force."""
    torch = pytest.importorskip("torch")
    caplog.set_level(logging.INFO, LOG.name)
    serve = balancer(PLACEMENT=stored[0])
    engine, theirs, ours = load_both(serve, marked=marked)
    # Without load, vLLM's own policy would make all copies those of the first expert.
    assert engine.moved == [3]
    draft, main = engine.model_states.values()
    for turn in range(3):
        assert np.array_equal(on_ranks(main.physical_to_logical_map), on_ranks(stored[1].slots))
        for state in (draft, main):
            running = state.physical_to_logical_map
            load = torch.ones((len(running), 5), dtype=torch.int64)
            state.physical_to_logical_map = ours.rebalance_experts(load, 6, 1, 1, 2, running)
        assert theirs.calls == turn + 1
    assert [line for line in caplog.messages if "own map" in line] == [
        "moetuner: /models/Main (draft): the engine's own map for its layers, as no file is of "
        "the draft model's layers"
    ]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_file_of_both_models_serves_the_draft_model_too(stored, tmp_path, caplog):
    """Each at its load, once, from one file with a placement after the other."""
    draft, both = mt.Placement([[[4, 3, 2], [1, 0, 2]]]), tmp_path / "both.json"
    draft.save(tmp_path / "draft.json")
    both.write_text(stored[0].read_text() + (tmp_path / "draft.json").read_text())
    engine, theirs, _ = load_both(balancer(PLACEMENT=both))
    maps = [state.physical_to_logical_map for state in engine.model_states.values()]
    for placement, actual in zip((draft, stored[1]), maps, strict=True):
        assert np.array_equal(on_ranks(actual), on_ranks(placement.slots))
    assert (engine.moved, theirs.calls, caplog.messages) == ([1, 3], 0, [])


def test_a_draft_model_does_not_follow_a_placement_of_other_sizes(stored, tmp_path, caplog):
    """As many layers on other ranks are a mistake, and a warning."""
    mt.Placement([[[0, 1], [2, 3], [4, 0]]]).save(tmp_path / "draft.json")
    serve = balancer(PLACEMENT=f"{stored[0]}{os.pathsep}{tmp_path / 'draft.json'}")
    assert serve.decide(np.ones((1, 5)), 6, 1, 1, 2, model="Main (draft)") is None
    assert "own map: " in caplog.text
    assert "draft.json: 3 devices x 2 slots" in caplog.text


def test_pairs_of_the_main_model_are_not_of_the_draft_model(tmp_path, caplog):
    """A profile has as many layers; without one, the draft model follows its live loads."""
    path = tmp_path / "profile.npz"
    ids = np.arange(300).reshape(50, 3, 2) % 5
    mt.RoutingStatistics.from_trace(trace_of(ids, 5)).save(path)
    ask = {"weight": [[9, 1, 1, 1, 1]], "num_replicas": 6, "num_groups": 1, "num_nodes": 1}
    ask |= {"num_ranks": 2, "model": "Main (draft)", "sparse": None}
    assert balancer(REBALANCE=1, PROFILE=path).decide(**ask) is None
    assert not caplog.messages
    assert balancer(REBALANCE=1).decide(**ask) is not None


def test_files_are_read_again_whatever_the_draft_model_lacks(stored, tmp_path, caplog):
    """It had nothing, and needs nothing."""
    path, flag = tmp_path / "served.json", tmp_path / "reload"
    path.write_text(stored[0].read_text())
    serve = balancer(PLACEMENT=path, RELOAD=flag)

    def decide():
        names = {1: "Main (draft)", 3: "Main"}
        ask = {layers: (np.ones((layers, 5)), 6, 1, 1, 2) for layers in names}
        return [serve.decide(*ask[of], model=names[of], sparse=None) for of in names]

    decide()
    other = mt.Placement([[[4, 3, 2], [1, 0, 2]]] * 3)
    other.save(path)
    flag.write_text("1")
    serve.look_again()
    draft, main = decide()
    assert draft is None
    assert np.array_equal(main, other.slots.reshape(3, 6))
    assert not caplog.messages


def test_says_one_line_when_something_changes(caplog):
    """At INFO on rank 0 and at DEBUG elsewhere, and where nothing moves."""
    caplog.set_level(logging.DEBUG, LOG.name)
    load = np.random.default_rng(0).lognormal(5, 1, (4, 16))
    decide = balancer(REBALANCE=1)
    first = decide.decide(load, 20, 1, 1, 4)
    decide.decide(load, 20, 1, 1, 4, rank=1)
    decide.decide(load, 20, 1, 1, 4, first)
    decide.flush()
    records = [record for record in caplog.records if "layers change" in record.message]
    levels = [record.levelno for record in records]
    assert levels == [logging.INFO, logging.DEBUG, logging.DEBUG]
    assert "4 layers change, 80 copies move" in records[0].message
    assert "0 layers change, 0 copies move" in records[-1].message
    assert np.array_equal(first, rebalance_experts(load, 20, 1, 1, 4))


def test_rules_come_from_the_environment():
    """Their names are those of the arguments."""
    names = {"REBALANCE": "1", "MOVE_BUDGET": "7", "DEAD_ZONE": "0.5"}
    given = Settings.from_environment({f"MOETUNER_{name}": value for name, value in names.items()})
    assert (given.rebalance, given.rules.budget, given.rules.dead_zone) == (True, 7, 0.5)
    with pytest.raises(ValueError, match="MOETUNER_DEAD_ZONE must be a number"):
        Settings.from_environment({"MOETUNER_REBALANCE": "1", "MOETUNER_DEAD_ZONE": "much"})


def test_a_profile_is_a_trace_or_statistics(tmp_path):
    """Both give the same map; with a file that is not there the engine decides."""
    random = np.random.default_rng(0)
    ids = random.permuted(np.tile(np.arange(8), (200, 2, 1)), axis=2)[:, :, :2]
    trace = trace_of(ids)
    trace.save(tmp_path / "trace.safetensors")
    statistics = mt.RoutingStatistics.from_trace(trace)
    statistics.save(tmp_path / "statistics.safetensors")
    load = statistics.total_load
    maps = [
        balancer(REBALANCE=1, PROFILE=tmp_path / f"{name}.safetensors").decide(load, 8, 1, 1, 4)
        for name in ("trace", "statistics")
    ]
    assert np.array_equal(*maps)
    assert np.array_equal(maps[0], rebalance_experts(load, 8, 1, 1, 4, profile=statistics))
    missing = balancer(REBALANCE=1, PROFILE=tmp_path / "none")
    assert missing.decide(load, 8, 1, 1, 4) is None


def test_records_what_solve_reads(tmp_path):
    """Windows [L,E] and [W,L,E], empty ones left out, on rank 0 alone."""
    record = balancer(RECORD=tmp_path / "loads")
    load = np.random.default_rng(0).integers(0, 1000, (6, 4, 8))
    record.record(load[0] * 0)
    record.flush()
    assert not (tmp_path / "loads").exists()
    record.record(load[0], rank=1)
    record.record(load[0])
    record.record(load[1:].astype(np.int32))
    record.flush()
    (path,) = (tmp_path / "loads").iterdir()
    statistics = mt.open_input(path)
    assert np.array_equal(statistics.window_load, load)
    assert not record.settings.decides


def test_a_recording_is_bounded_and_keeps_those_of_others(tmp_path):
    """Windows are joined by twos, none is lost; a process may have the number of an earlier one."""
    random = np.random.default_rng(1)
    recorders = [(LoadRecorder(tmp_path), np.zeros((2, 3))) for _ in range(2)]
    for _ in range(9):
        for recorder, total in recorders:
            load = random.integers(1, 9, (101, 2, 3))
            total += load.sum(axis=0)
            actual = mt.RoutingStatistics.load(recorder.add(load))
            assert actual.windows <= MOST_WINDOWS
            assert np.array_equal(actual.total_load, total)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_recording_that_was_moved_away_is_followed_by_a_new_one(tmp_path):
    """The file that was moved and the new one have every window once."""
    recorder = LoadRecorder(tmp_path)
    load = np.random.default_rng(2).integers(1, 9, (5, 2, 3))
    for night in (load[:2], load[2:3], load[3:]):
        for window in night:
            path = recorder.add(window)
        moved = path.rename(tmp_path / "moved.npz")
        assert np.array_equal(mt.RoutingStatistics.load(moved).window_load, night)


def test_what_a_killed_recorder_left_is_deleted(tmp_path):
    """By the next one, whose file has another name: that of its own process."""
    left = tmp_path / f".load-{os.getpid() + 1}-2x3.npz.0123abcd.moetuner"
    left.write_bytes(b"half")
    path = LoadRecorder(tmp_path).add(np.ones((2, 3)))
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1, 2.0**62, "x", None])
def test_what_cannot_be_recorded_is_one_warning(wrong, tmp_path, caplog):
    """Loads that make no sense, or (None) a folder that cannot be written: serving goes on."""
    folder = tmp_path / "file"
    if wrong is None:
        folder.write_text("")
    record = balancer(RECORD=folder)
    for _ in range(3):
        record.record(np.array([[1, 2 if wrong is None else wrong]]))
    record.flush()
    assert caplog.text.count("loads are not recorded") == 1
    assert wrong is None or not folder.exists()


def test_vllm_gets_one_tensor_or_three():
    """On the CPU, int64; as the class in force says."""
    torch = pytest.importorskip("torch")
    load = torch.tensor([[90, 132, 40, 61], [20, 107, 104, 64]])
    decide = balancer(REBALANCE=1)
    theirs = stand_in_vllm.policy()

    class OfThree(theirs):
        @classmethod
        def rebalance_experts(cls, *arguments) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
            """Never be asked."""
            raise AssertionError

    one = vllm.make_policy_class(theirs, decide)
    assert issubclass(one, theirs)
    assert one.preserve_intragpu_slots is not None
    actual = one.rebalance_experts(load, 6, 1, 1, 2)
    assert (actual.dtype, actual.device.type, tuple(actual.shape)) == (torch.int64, "cpu", (2, 6))
    slots, places, copies = vllm.make_policy_class(OfThree, decide).rebalance_experts(
        load, 6, 1, 1, 2, actual
    )
    assert torch.equal(slots, actual)
    for layer in range(2):
        for expert in range(4):
            here = [slot for slot in range(6) if slots[layer, slot] == expert]
            row = places[layer, expert].tolist()
            assert row == here + [-1] * (len(row) - len(here))
            assert copies[layer, expert] == len(here)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "int32"])
def test_loads_of_any_type(kind):
    """Engines' loads may be of types that NumPy does not have: all give the map of the numbers."""
    torch = pytest.importorskip("torch")
    load = torch.tensor([[90, 132, 40, 61], [20, 107, 104, 64]])
    given = load.to(getattr(torch, kind))
    ours = vllm.make_policy_class(stand_in_vllm.policy(), balancer(REBALANCE=1))
    expected = rebalance_experts(load.numpy(), 6, 1, 1, 2)
    assert ours.rebalance_experts(given, 6, 1, 1, 2).tolist() == expected.tolist()
    hooks = sglang.Hooks(balancer(REBALANCE=1))
    sizes = {"num_physical_experts": 6, "num_local_physical_experts": 3}
    sizes |= {"num_groups": None, "num_nodes": 1, "algorithm": sglang.ALGORITHM}
    slots, *_ = hooks.rebalance_experts(lambda **_: [None], tokens_per_expert=given[None], **sizes)
    assert slots.tolist() == expected.tolist()
    table = np.array([[[0, 1, 2], [3, 0, 1]]] * 2)
    policy = vllm_ascend.AscendPolicy(None, balancer(REBALANCE=1))
    of_slots = given[:, table[0].ravel()].reshape(2, 2, 3)
    answers = [policy.rebalance_experts(table, of) for of in (of_slots, of_slots.double().numpy())]
    assert answers[0][2] == answers[1][2]


def test_vllm_falls_back_with_one_warning(tmp_path, caplog):
    """A placement that is not there, or sizes that do not divide: vLLM's policy decides."""
    torch = pytest.importorskip("torch")
    theirs = stand_in_vllm.policy()
    ours = vllm.make_policy_class(theirs, balancer(PLACEMENT=tmp_path / "none.json"))
    load = torch.ones((2, 4), dtype=torch.int64)
    for _ in range(3):
        assert ours.rebalance_experts(load, 6, 1, 1, 2).tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert theirs.calls == 3
    assert caplog.text.count("the engine's own map") == 1
    with pytest.raises(AssertionError):
        ours.rebalance_experts(load, 7, 1, 1, 2)


def test_sglang_by_its_name_alone():
    """Other algorithms pass through; ours takes steps, no groups, and int32."""
    torch = pytest.importorskip("torch")
    hooks = sglang.Hooks(balancer(REBALANCE=1))

    def compute(raw_algorithm, num_groups, num_nodes):
        return {"auto": "deepseek"}[raw_algorithm]

    def own(**given):
        return given["algorithm"]

    named = {"num_groups": None, "num_nodes": 1}
    assert hooks.compute_algorithm(compute, raw_algorithm="auto", **named) == "deepseek"
    given = {
        "tokens_per_expert": torch.randint(0, 99, (5, 3, 4), dtype=torch.int32),
        "num_physical_experts": 6,
        "num_local_physical_experts": 3,
        "num_groups": None,
        "num_nodes": 1,
    }
    assert hooks.rebalance_experts(own, **given, algorithm="deepseek") == "deepseek"
    name = hooks.compute_algorithm(compute, raw_algorithm="moetuner", **named)
    slots, places, copies = hooks.rebalance_experts(own, **given, algorithm=name)
    assert tuple(slots.shape) == (3, 6)
    assert (places >= 0).sum() == slots.numel() == copies.sum()
    # More slots on a rank than experts: two copies there, which SGLang would fill only once.
    given |= {"num_physical_experts": 10, "num_local_physical_experts": 5}
    assert hooks.rebalance_experts(own, **given, algorithm=name) == "deepseek"


@pytest.mark.parametrize("windows", [(), (4,)])
def test_vllm_ascend_takes_loads_of_slots(windows):
    """From tables and slots' loads; balance within 1.08, kept slots, no two copies, picklable.

    The engine's own policy, here none at all, is not asked.
    """
    layers, ranks, width = 6, 8, 9
    experts = ranks * width - 8
    random = np.random.default_rng(0)
    base = np.arange(ranks * width) % experts
    table = np.tile(base.reshape(ranks, width), (layers, 1, 1))
    load = random.lognormal(6, 1, (layers, experts)) * np.ones((*windows, 1, 1))
    of_slots = (load / np.bincount(base))[..., base].reshape(*windows, layers, ranks, width)
    ours = vllm_ascend.AscendPolicy(None, balancer(REBALANCE=1))
    change, order, placed = pickle.loads(pickle.dumps(ours)).rebalance_experts(table, of_slots)
    placed = np.array(placed)
    assert change == 1
    assert sorted(order.tolist()) == list(range(layers))
    total = load.reshape(-1, layers, experts)
    ratio = vllm_ascend.slowest(total, placed) / total.sum(axis=(0, 2)) * ranks
    assert ratio.mean() <= 1.08
    for old, new in zip(table.reshape(-1, width), placed.reshape(-1, width), strict=True):
        assert len(set(new.tolist())) == width
        assert all(new[at] == old[at] for at in range(width) if old[at] in new)
    assert ours.rebalance_experts(placed, of_slots * 0)[0] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_vllm_ascend_records_and_logs(rank, tmp_path, caplog, monkeypatch):
    """Its number is that of the process that makes the policy; the one that runs it has none."""
    pytest.importorskip("torch")
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    caplog.set_level(logging.INFO, LOG.name)
    factory = type("PolicyFactory", (), {"generate_policy": staticmethod(lambda _: None)})
    name = "vllm_ascend.eplb.core.policy.policy_factory"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(PolicyFactory=factory))
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        vllm_ascend.replace_policies(Settings(rebalance=True, record=tmp_path / "loads"))
        policy = factory.generate_policy(0)
    finally:
        distributed.destroy_process_group()
    policy = pickle.loads(pickle.dumps(policy))
    of_slots = np.array([[[9000, 8000, 1], [10, 9, 1]]] * 2)
    policy.rebalance_experts(np.array([[[0, 1, 2], [3, 4, 5]]] * 2), of_slots)
    policy.balancer.flush()
    assert len([*tmp_path.rglob("*.npz")]) == len(caplog.messages) == (rank == 0)


def test_vllm_places_experts_at_the_load(stored):
    """By its synchronous way, once; not where ranks may come alone, nor where nothing is stored."""
    for environment, elastic, expected in (
        ({"PLACEMENT": stored[0]}, False, [False]),
        ({"PLACEMENT": stored[0]}, True, []),
        ({"PLACEMENT": stored[0].parent / "none"}, False, []),
        ({"REBALANCE": 1}, False, []),
    ):
        states = stand_in_vllm.engine().EplbState
        vllm.place_at_load(states, balancer(**environment))
        state = states(elastic=elastic)
        state.is_async = True
        state.add_model(stand_in_vllm.model(), None)
        assert state.rearranged == expected
        assert state.is_async


def test_vllm_warns_of_its_traps(stored, caplog):
    """Adapters of experts, and a low-latency buffer that copies take from."""
    states = stand_in_vllm.engine().EplbState
    vllm.place_at_load(states, balancer(PLACEMENT=stored[0]))
    adapter = type("FusedMoEWithLoRA", (), {})()
    config = SimpleNamespace(quantization=None, get_hidden_size=lambda: 5120)
    states(backend="deepep_low_latency").add_model(stand_in_vllm.model(modules=[adapter]), config)
    assert "pull request 40867" in caplog.text
    assert "with 6 slots its buffer of 32 GiB takes" in caplog.text
