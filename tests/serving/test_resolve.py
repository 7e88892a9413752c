"""How a model is served: what says a setting, and that one value is as good as keywords."""

from dataclasses import replace

import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner.serving import ENGINE_SETTINGS, Serving, find_choices
from moetuner.serving.engines import ENGINES
from moetuner.serving.splits import RULES, SPLITS

TOPOLOGY = mt.Topology(4, devices_per_node=2)
MODEL = mt.CostModel(1.0, 0.5, 0.01, 2.0, 64.0)
TRACE = trace_of(random_ids(240, 2, 2, 8), length=12)
COUNTS = mt.RoutingStatistics.from_trace(TRACE, window=40)
RECORDED = {"engine": "tensorrt-llm", "split": "round_robin", "arrival": "bursts"}


@pytest.mark.parametrize(
    ("given", "split", "arrival"),
    [
        ({}, ("even", None), ("bursts", None)),
        ({"engine": "sglang"}, ("nearest", "engine"), ("mixed", "engine")),
        ({"engine": "sglang", "options": {"split": "even"}}, ("even", "option"), None),
        ({"recorded": {"arrival": 0.5}}, ("even", None), (0.5, "placement")),
        # The engine of an option comes before what a placement chose, its own engine after.
        ({"engine": "vllm", "recorded": {"split": "nearest"}}, ("even", "engine"), None),
        (
            {"recorded": {"engine": "sglang", "arrival": "bursts"}},
            ("nearest", "engine"),
            ("bursts", "placement"),
        ),
    ],
)
def test_the_first_that_says_a_setting_decides(given, split, arrival):
    """An option, the engine of an option, the placement, its engine, or the default."""
    serving = Serving.resolve(TOPOLOGY, TRACE, **given)
    assert (serving.split, serving.origin.get("split")) == split
    if arrival is not None:
        assert (serving.arrival, serving.origin.get("arrival")) == arrival


def test_counts_have_no_order_that_an_engine_could_decide():
    """Their windows come as they were recorded, unless an option says otherwise."""
    assert Serving.resolve(TOPOLOGY, COUNTS, engine="vllm").arrival == "bursts"
    mixed = Serving.resolve(TOPOLOGY, COUNTS, engine="vllm", options={"arrival": "mixed"})
    assert mixed.arrival == "mixed"


def test_a_placement_chose_what_its_engine_would_not_have():
    """What an engine decides is no choice: another engine decides anew."""
    assert find_choices(RECORDED) == {"engine": "tensorrt-llm", "arrival": "bursts"}
    assert find_choices({**RECORDED, "arrival": "mixed"}) == {"engine": "tensorrt-llm"}
    # Nobody chose that windows of a table come as they were recorded.
    assert find_choices(RECORDED, is_counted=True) == {"engine": "tensorrt-llm"}


@pytest.mark.parametrize("split", [split for split in SPLITS if not RULES[split].needs_windows])
def test_a_serving_is_as_good_as_keywords(split):
    """Evaluate, audit, advise and problems are the same by one value and by all settings."""
    how = {"split": split, "regime": "follow", "arrival": 0.5, "cost_model": MODEL}
    serving = Serving(TOPOLOGY, window=40, **how)
    placement = mt.Placement([[[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 0]]] * 2)
    keywords = (placement, TRACE, TOPOLOGY)
    one, other = mt.evaluate(placement, TRACE, serving), mt.evaluate(*keywords, window=40, **how)
    assert one.to_dict() == other.to_dict()
    judged = mt.audit(placement, TRACE, serving), mt.audit(*keywords, window=40, **how)
    assert judged[0].to_dict() == judged[1].to_dict()
    served = mt.Problem.served(COUNTS, serving, objective="balance")
    assert served == mt.Problem(COUNTS, TOPOLOGY, objective="balance", **how)
    names = ("topology", *ENGINE_SETTINGS, "cost_model")
    assert [getattr(served.serving, name) for name in names] == [
        getattr(serving, name) for name in names
    ]


def test_what_a_placement_was_computed_for_otherwise_is_told():
    """Machine, engine, settings and cost model, each with then and now."""
    serving = Serving(TOPOLOGY, engine="vllm", split="even", cost_model=MODEL)
    was = {
        "topology": mt.Topology(8),
        "engine": "sglang",
        "split": "nearest",
        "cost_model": replace(MODEL, name="mine"),
    }
    assert [*serving.differences(was)] == [
        ("machine", "1 node of 8 devices", "2 nodes of 2 devices"),
        ("engine", "SGLang", "vLLM"),
        ("split", "nearest", "even"),
        ("cost model", "mine", "unnamed"),
    ]
    assert [*serving.differences({"topology": TOPOLOGY, "engine": "vllm"})] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_line_says_what_an_engine_decides(engine):
    """In the words of the engine, with what options say behind it."""
    (line,) = Serving.resolve(TOPOLOGY, TRACE, engine=engine).explain()
    assert line.startswith(f"For {ENGINES[engine].title}: regime dispatch")
    (line,) = Serving.resolve(
        TOPOLOGY, TRACE, engine=engine, options={"regime": "follow"}
    ).explain()
    assert line.endswith("; from your options: regime follow.")


def test_every_split_has_a_rule():
    """A split is even, or says on what it depends."""
    assert [*RULES] == [*SPLITS]
    assert {name for name, rule in RULES.items() if rule.is_even} == {"even", "round_robin"}
