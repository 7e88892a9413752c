"""What a placement's file says of how it was made, and how its recording was read."""

import json
from pathlib import Path

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.problem.made import Made
from moetuner.problem.reading import Reading

COUNTS = mt.RoutingStatistics.from_load(np.arange(1, 65).reshape(4, 2, 8), model="deepseek-v3")
TOPOLOGY = mt.Topology(4, devices_per_node=2)
PROBLEM = mt.Problem(
    COUNTS, TOPOLOGY, split="nearest", objective="balance", max_imbalance=float("inf")
)
PLACEMENT = mt.solve(PROBLEM, iterations=5).placement


def test_a_file_gives_back_what_a_problem_was(tmp_path, monkeypatch):
    """All of its settings, through JSON: machine, cost model and caps as values."""
    monkeypatch.chdir(tmp_path)
    made = Made.read(mt.Placement.load(saved(PLACEMENT)))
    assert made.machine == TOPOLOGY
    assert made.serving["cost_model"] == PROBLEM.cost_model
    assert (made.serving["split"], made.wanted["objective"]) == ("nearest", "balance")
    assert made.wanted["max_imbalance"] == float("inf")
    assert (made.method, made.seed, made.figure) == ("joint", 0, "imbalance")
    again = PLACEMENT.with_names(settings=made.to_settings())
    assert Made.read(again) == made


def saved(placement):
    """Return the file of a placement."""
    path = Path("placement.json")
    placement.save(path)
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "odd"}, "settings: split must be one of even, nearest, round_robin, lp"),
        ({"arrival": "never"}, "settings: arrival must be 'bursts', 'mixed', or a weight"),
        ({"phases": {"x": 1}}, "settings: phases must be shares by tokens"),
        ({"topology": {"devices": 0}}, "settings: devices must be from 1 to"),
        ({"holdout": 1}, "settings: holdout must be a share from 0 to below 1"),
        ({"window": "long"}, "settings: window must be an integer"),
        ({"input": {"tokens": -1}}, "settings: input.tokens must be at least 0"),
        ({"input": {"files": "a.npz"}}, "settings: input.files must be a list of texts"),
        ({"input": 3}, "settings: input must be a Mapping"),
        ({"spelled": {"topology": 3}}, "settings: spelled.topology must be a text"),
    ],
)
def test_a_wrong_setting_of_a_file_is_named(settings, words):
    """In one line, with the rule of a call and of an option."""
    with pytest.raises(ValueError, match=f"^{words}"):
        Made.read(PLACEMENT.with_names(settings=settings))


def test_other_machines_have_no_method_and_no_holdout():
    """What is planned serves as before; its file says nothing that a search would have to."""
    made = Made.read(PLACEMENT)
    planned = made.on(mt.Topology(3))
    assert planned.machine == mt.Topology(3)
    assert planned.serving["split"] == "nearest"
    assert (planned.method, planned.holdout, planned.counted) == (None, None, None)


def test_a_file_that_was_named_is_found_beside_the_placement(tmp_path, monkeypatch):
    """Machine and cost model are passed on as they were given, where they still are."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("home/mine.json").touch()
    made = Made(serving={"topology": TOPOLOGY}, spelled={"topology": "mine.json"})
    beside = Path("home/placement.json")
    assert made.find_spelling("topology", beside=beside, value=TOPOLOGY) == "home/mine.json"
    assert (
        made.find_spelling("topology", beside=Path("placement.json"), value=TOPOLOGY) == "mine.json"
    )
    assert made.find_spelling("topology", beside=beside, value=mt.Topology(8)) is None
    Path("mine.json").touch()
    assert made.find_spelling("topology", beside=beside, value=TOPOLOGY) == "mine.json"
    assert made.find_spelling("cost_model", beside=beside, value=None) is None


def test_a_reading_stands_in_for_options_that_fit_the_recording():
    """Tokens of a step are of counts of unknown windows; a model is of any recording."""

    class Options:
        model, weight_bits, tokens_per_step, top_k, num_experts = None, 8.0, None, None, None

    reading = Reading(model="deepseek-v3", weight_bits=4.0, tokens_per_step=512, num_experts=8)
    trace = trace_of([[[0, 1]]] * 4)
    assert reading.substitute(Options, trace) == {"model": "deepseek-v3"}
    of_table = reading.substitute(Options, COUNTS)
    assert of_table == {"model": "deepseek-v3", "tokens_per_step": 512, "top_k": None}
    in_steps = mt.RoutingStatistics.from_load(COUNTS.window_load, window=512)
    assert reading.substitute(Options, in_steps) == {"model": "deepseek-v3"}
    assert dict(reading.hints()) == {"num_experts": 8, "top_k": None}
    kept = reading.without_files()
    assert (kept.model, kept.tokens_per_step, kept.files) == ("deepseek-v3", 512, None)
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading


@pytest.mark.parametrize(("windows", "is_of", "is_other"), [(4, True, False), (5, False, True)])
def test_a_recording_is_known_by_its_size(windows, is_of, is_other):
    """What is not known is neither the same nor another."""
    assert Reading(windows=windows).fits(COUNTS) == is_of
    assert Reading(windows=windows).contradicts(COUNTS) == is_other
    assert not Reading().fits(COUNTS)
    assert not Reading().contradicts(COUNTS)
