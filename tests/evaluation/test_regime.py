"""One regime by default, whose times are predicted, and traffic where expert sets are not known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from make import trace_of
from recorded import write_lines

import moetuner as mt
from moetuner import cost
from moetuner.evaluation.figures import FIGURES

COMMANDS = {
    "solve": ["trace", "--devices", 2, "--method", "lpt", "--out", "new"],
    "compare": ["trace", "--devices", 2, "--methods", "lpt"],
    "evaluate": ["placement", "trace"],
}


@pytest.mark.parametrize(
    ("name", "model", "given", "whose"),
    [
        ("solve", "gpt-oss-20b", [], "(gpt-oss-20b), weights in 4.25 bits; for others:"),
        ("compare", "mixtral-8x7B-v0.1", ["--cost-model", "a100"], "a100:4096x14336 (mixtral-8x7b"),
        (
            "solve",
            "mine",
            ["--weight-bits", 16],
            "Times are of DeepSeek-V3's experts in 16 bits, as",
        ),
        ("compare", None, ["--model", "mistralai/Mixtral-8x7B-FP8"], "weights in 8 bits;"),
        (
            "evaluate",
            "gpt-oss-20b",
            ["--cost-model", "h200:64x32", "--weight-bits", 4],
            "with h200:64x32, weights in 4 bits;",
        ),
    ],
)
def test_times_say_whose_they_are(ok, make_trace, tmp_path, name, model, given, whose):
    """GPU, model and bits of weights stand beside times, and how to get others."""
    files = {of: tmp_path / of for of in ("trace", "placement", "new")}
    replace(make_trace(60), model=model).save(files["trace"])
    mt.Placement([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 3).save(files["placement"])
    words = [name, *(files.get(word, word) for word in COMMANDS[name]), *given]
    assert whose in ok(*words)


def test_bits_of_weights_go_with_a_placement(ok, make_trace, tmp_path):
    """They make its times and bytes, which whoever judges it takes unless told others."""
    trace, placement = tmp_path / "t.safetensors", tmp_path / "p.json"
    replace(make_trace(60), model="mixtral-8x7b").save(trace)
    bits, size = ["--weight-bits", 4], 3 * 4096 * 14336
    mt.Placement([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 3).save(tmp_path / "running.json")
    moving = ["--initial", tmp_path / "running.json"]
    out = ["--out", placement, "--method", "heuristic", "--json", "-"]
    solved = json.loads(ok("solve", trace, "--devices", 2, *moving, *bits, *out))
    assert solved["settings"]["expert_bytes"] == size / 2
    assert solved["settings"]["cost_model"]["weight_bits"] == 4
    files = (placement, tmp_path / "running.json")
    assert json.loads(ok("inspect", *files, "--json", "-"))["expert_bytes"] == size / 2
    for given, wanted in (([], 4), (["--weight-bits", 8], 8)):
        shown = json.loads(ok("evaluate", placement, trace, *given, "--json", "-"))
        assert shown["settings"]["cost_model"]["weight_bits"] == wanted
    assert shown["predicted_layer_us"] != solved["predicted_layer_us"]


@pytest.mark.parametrize("counted", ["transitions", "coactivation"])
def test_traffic_of_transitions_alone_follows(ok, make_trace, tmp_path, counted):
    """Where counts know transitions alone, traffic is theirs; else the default is dispatch."""
    both, saved = counted == "coactivation", tmp_path / "statistics.safetensors"
    mt.RoutingStatistics.from_trace(make_trace(60), coactivation=both, sets=False).save(saved)
    for objective in ([], ["--objective", "traffic"]):
        out = ["--method", "lpt", "--out", tmp_path / "p.json", "--json", "-"]
        solved = json.loads(ok("solve", saved, "--devices", 2, *objective, *out))
        expected = "follow" if objective and not both else "dispatch"
        assert solved["settings"]["regime"] == expected


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("DeepSeek-V3.1", "deepseek-v3"),
        ("GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("gpt_oss 20b", "gpt-oss-20b"),
        ("gpt-oss-200b", None),
        ("/models/DeepSeek-R1-0528/", "deepseek-r1"),
        ("Qwen3-30B-A3B-Thinking-2507", "qwen3-30b-a3b"),
        ("moonshotai/Kimi-K2.6", "kimi-k2.6"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", None),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", None),
        ("deepseek-r1-distill", None),
        ("lmsys/gpt-oss-120b-Eagle3", None),
        ("cerebras/GLM-4.5-Air-REAP-82B-A12B", None),
        ("small", None),
        (None, None),
    ],
)
def test_models_have_public_names(name, public):
    """With or without owner and what comes after; the longest name that fits; nothing by guess."""
    assert cost.public_name(name) == public


def test_sizes_are_recorded_or_those_of_the_model(make_trace):
    """Whoever records a model knows its sizes, whatever it is called; a name tells them, too."""
    trace = replace(make_trace(20), model="gpt-oss-20b")
    for size, wanted in (((64, 32), "h100:64x32"), (None, "h100:2880x2880")):
        counted = mt.RoutingStatistics.from_trace(replace(trace, expert_size=size))
        hidden, intermediate = size or (2880, 2880)
        how = {"hidden": hidden, "intermediate": intermediate, "weight_bits": 4.25}
        model = mt.CostModel.preset("h100", **how)
        expected = replace(model, name=f"{wanted} (gpt-oss-20b)")
        assert cost.cost_model_of(counted) == expected
        assert mt.Problem(counted, mt.Topology(2)).cost_model == expected


def test_sizes_go_with_traces_and_statistics(make_trace, tmp_path):
    """Through files, selections and sums of the same ones; sums of others drop them."""
    trace = replace(make_trace(40), expert_size=(64, 32))
    trace.save(tmp_path / "t.safetensors")
    write_lines(trace, tmp_path / "t.jsonl")
    counted = mt.RoutingStatistics.from_trace(trace, by_group=True)
    counted.save(tmp_path / "s.safetensors")
    traces = [mt.RoutingTrace.load(tmp_path / f"t.{kind}") for kind in ("safetensors", "jsonl")]
    traces += [trace.select(layers=[0]), trace.concat(trace)]
    for of in (*traces, mt.RoutingStatistics.load(tmp_path / "s.safetensors"), counted + counted):
        assert of.expert_size == (64, 32)
    other = replace(trace, expert_size=None)
    assert trace.concat(other).expert_size is None
    assert (counted + mt.RoutingStatistics.from_trace(other, by_group=True)).expert_size is None


def structured(tokens=600):
    """Count tokens whose experts come in pairs, without expert sets."""
    rng, layers, experts = np.random.default_rng(0), 3, 16
    first = rng.integers(0, experts, (tokens, layers))
    order = np.argsort(rng.random((layers, experts)), axis=1)
    partner = np.take_along_axis(order, np.argsort(order, axis=1) ^ 1, axis=1)
    other = np.take_along_axis(partner, first.T, axis=1).T
    stray = rng.random((tokens, layers)) < 0.2
    other[stray] = (first[stray] + rng.integers(1, experts, stray.sum())) % experts
    trace = trace_of(np.stack([first, other], axis=2), experts)
    return mt.RoutingStatistics.from_trace(trace, window=100, sets=False)


RULES = {
    "ban": {"forbidden": [(None, 1, 3)]},
    "faster device": {"topology": mt.Topology(4, speed=[1.02, 1, 1, 1])},
    "spare slots": {"slots_per_device": 5},
    "running": {},
}


@pytest.mark.parametrize("rule", RULES)
def test_traffic_counts_whatever_the_rules_are(rule):
    """Without expert sets, pairs apart are as few with a rule as they are without."""
    how = {"topology": mt.Topology(4), "objective": "traffic", "max_imbalance": 1.3}
    statistics = structured()
    free = mt.Problem(statistics, **how)
    plain = mt.solve(free, "heuristic", iterations=5_000)
    problem, contiguous = mt.Problem(statistics, **how | RULES[rule]), mt.solve(free, "contiguous")
    given = {"initial": contiguous.placement, "move_budget": 24} if rule == "running" else {}
    result = mt.solve(problem, "heuristic", iterations=5_000, **given)
    assert plain.objective < 0.5 * contiguous.objective
    assert result.objective <= plain.objective + (0.3 if given else 0.03)
    assert not problem.rules.violations(result.placement)


def test_a_figure_matters_in_its_own_regime_or_in_all():
    """Crossing is of tokens that follow their experts, fanout of those that are dispatched."""
    matters = {
        regime: {name for name in ("imbalance", "crossing", "fanout") if matters_in(name, regime)}
        for regime in ("follow", "dispatch")
    }
    assert matters["follow"] == {"imbalance", "crossing"}
    assert matters["dispatch"] == {"imbalance", "fanout"}


def matters_in(name, regime):
    """Return whether a figure matters in a regime."""
    return FIGURES[name].matters_in(regime)
