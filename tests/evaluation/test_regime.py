"""One regime by default, whose times are predicted, and traffic where expert sets are not known."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
from recorded import write_lines

import moetuner as mt
from moetuner import cost
from moetuner.solver.run import TIE


def test_dispatch_is_the_default_everywhere():
    """Problems, evaluations and audits are of the regime that today's engines run."""
    for call in (mt.Problem, mt.evaluate, mt.audit):
        assert inspect.signature(call).parameters["regime"].default == "dispatch"


COMMANDS = {
    "solve": ["trace", "--devices", 2, "--method", "lpt", "--out", "new"],
    "compare": ["trace", "--devices", 2, "--methods", "lpt"],
    "evaluate": ["placement", "trace"],
    "audit": ["placement", "trace", "--resamples", 10],
}


@pytest.fixture
def command(ok, make_trace, tmp_path):
    """Run a command on a small trace of a model and a placement, with further arguments."""

    def command(name, *more, model=None):
        files = {of: tmp_path / of for of in ("trace", "placement", "new")}
        ids = make_trace(60).expert_ids
        traffic = mt.RoutingTrace.from_arrays(ids, num_experts=8, model=model)
        traffic.save(files["trace"])
        mt.Placement([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 3).save(files["placement"])
        return ok(name, *(files.get(given, given) for given in COMMANDS[name]), *more)

    return command


@pytest.mark.parametrize("known", ["transitions", "coactivation"])
def test_traffic_of_transitions_alone_follows(ok, make_trace, tmp_path, known):
    """Where counts know transitions alone, traffic is theirs; else the default is dispatch."""
    counted = mt.RoutingStatistics.from_trace(make_trace(60))
    both = known == "coactivation"
    saved = tmp_path / "statistics.safetensors"
    mt.RoutingStatistics(
        counted.window_load, counted.transitions, counted.coactivation if both else None
    ).save(saved)
    for objective in ([], ["--objective", "traffic"]):
        out = ["--method", "lpt", "--out", tmp_path / "p.json", "--json", "-"]
        found = json.loads(ok("solve", saved, "--devices", 2, *objective, *out))
        expected = "follow" if objective and not both else "dispatch"
        assert found["settings"]["regime"] == expected


@pytest.mark.parametrize(
    ("sets", "more"),
    [(True, []), (False, ["--regime", "follow"]), (True, ["--cost-model", "a100"])],
)
def test_the_time_of_solve_is_that_of_evaluate(ok, make_trace, tmp_path, sets, more):
    """Of the same saved statistics, in any regime and with any cost model: one number."""
    saved, placement = tmp_path / "statistics.safetensors", tmp_path / "p.json"
    mt.RoutingStatistics.from_trace(make_trace(300), window=64, sets=sets).save(saved)
    solving = ["solve", saved, "--devices", 4, "--slots-per-device", 3, "--method", "lpt"]
    solved = json.loads(ok(*solving, *more, "--out", placement, "--json", "-"))
    shown = json.loads(ok("evaluate", placement, saved, *more, "--json", "-"))
    assert solved["unit"] == "us per layer"
    assert solved["objective"] == pytest.approx(shown["predicted_layer_us"], rel=1e-12)


def test_the_time_of_a_trace_is_that_of_evaluate(ok, make_trace, tmp_path):
    """A replay knows more than counts: what it says is said by both commands."""
    trace, placement, report = (tmp_path / name for name in ("t.safetensors", "p.json", "r.json"))
    make_trace(300).save(trace)
    solving = ["solve", trace, "--devices", 4, "--window", 64, "--method", "lpt"]
    text = ok(*solving, "--out", placement, "--json", report)
    shown = json.loads(ok("evaluate", placement, trace, "--window", 64, "--json", "-"))
    assert json.loads(report.read_text())["predicted_layer_us"] == shown["predicted_layer_us"]
    assert f"Predicted time: {shown['predicted_layer_us']:.1f} us per layer." in text


@pytest.mark.parametrize(
    ("name", "model", "given", "whose"),
    [
        ("solve", "gpt-oss-20b", [], "h100:2880x2880 (gpt-oss-20b)"),
        ("compare", "mixtral-8x7B-v0.1", ["--cost-model", "a100"], "a100:4096x14336 (mixtral-8x7b"),
        ("evaluate", "mine", ["--cost-model", "h100"], "h100:7168x2048 (deepseek-v3, as INPUT's"),
        ("audit", "gpt-oss-20b", ["--cost-model", "h200:64x32"], "h200:64x32;"),
    ],
)
def test_times_say_whose_they_are(command, name, model, given, whose):
    """GPU and model stand beside times, and how to get others; dispatch is the default."""
    text = command(name, *given, "--json", "-", model=model)
    assert json.loads(text)["settings"]["regime"] == "dispatch"
    text = command(name, *given, model=model)
    assert f"Predicted times are of {whose}" in text
    assert "--cost-model FILE or GPU:HIDDENxINTERMEDIATE" in text


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("DeepSeek-V3.1", "deepseek-v3"),
        ("GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("gpt_oss 20b", "gpt-oss-20b"),
        ("gpt-oss-200b", None),
        ("small", None),
        (None, None),
    ],
)
def test_models_are_known_by_their_names(name, known):
    """With or without owner and what comes after; the longest name that fits; nothing by guess."""
    assert cost.public_name(name) == known


def test_sizes_are_recorded_or_those_of_the_model(make_trace):
    """Whoever records a model knows its sizes, whatever it is called; a name tells them, too."""
    trace = replace(make_trace(20), model="gpt-oss-20b")
    for size, wanted in (((64, 32), "h100:64x32"), (None, "h100:2880x2880")):
        counted = mt.RoutingStatistics.from_trace(replace(trace, expert_size=size))
        hidden, intermediate = size or (2880, 2880)
        model = mt.CostModel.preset("h100", hidden=hidden, intermediate=intermediate)
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
    other = replace(trace, expert_size=None)
    for each in (
        mt.RoutingTrace.load(tmp_path / "t.safetensors"),
        mt.RoutingTrace.load(tmp_path / "t.jsonl"),
        trace.select(layers=[0]),
        trace.concat(trace),
        mt.RoutingStatistics.load(tmp_path / "s.safetensors"),
        counted + counted,
    ):
        assert each.expert_size == (64, 32)
    assert trace.concat(other).expert_size is None
    assert (counted + mt.RoutingStatistics.from_trace(other, by_group=True)).expert_size is None


@pytest.mark.parametrize("size", [(64,), (0, 32), "64x32", (64.5, 32)])
def test_sizes_are_checked(make_trace, size):
    """Two whole numbers from 1, or none."""
    ids = make_trace(20).expert_ids
    with pytest.raises((ValueError, TypeError), match="expert_size must be"):
        mt.RoutingTrace.from_arrays(ids, num_experts=8, expert_size=size)


def structured(seed=0, tokens=600, layers=3, experts=16, **counted):
    """Count tokens whose experts come in pairs; by default without expert sets."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, experts, (tokens, layers))
    partner = np.argsort(rng.random((layers, experts)), axis=1).argsort(axis=1)
    other = np.empty_like(first)
    for layer in range(layers):
        order = np.argsort(partner[layer])
        other[:, layer] = order[partner[layer][first[:, layer]] ^ 1]
    stray = rng.random((tokens, layers)) < 0.2
    other[stray] = (first[stray] + rng.integers(1, experts, stray.sum())) % experts
    ids = np.stack([first, other], axis=2)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
    return mt.RoutingStatistics.from_trace(trace, window=100, **counted)


RULES = {
    "ban": {"forbidden": [(None, 1, 3)]},
    "faster device": {"topology": mt.Topology(4, speed=[1.02, 1, 1, 1])},
    "spare slots": {"slots_per_device": 5},
    "running": {},
}


@pytest.mark.parametrize("rule", RULES)
def test_traffic_counts_whatever_else_is_asked(rule):
    """Without expert sets, pairs apart are as few with a rule as they are without."""
    asked = {"topology": mt.Topology(4), "objective": "traffic", "max_imbalance": 1.3}
    statistics = structured()
    plain = mt.solve(mt.Problem(statistics, **asked), "heuristic", iterations=20_000)
    problem = mt.Problem(statistics, **{**asked, **RULES[rule]})
    contiguous = mt.solve(mt.Problem(statistics, **asked), "contiguous")
    given = {"initial": contiguous.placement, "move_budget": 24} if rule == "running" else {}
    found = mt.solve(problem, "heuristic", iterations=20_000, **given)
    assert plain.objective < 0.5 * contiguous.objective
    assert found.objective <= plain.objective + (0.3 if given else 0.03)
    assert not problem.rules.violations(found.placement)


@pytest.mark.parametrize("sets", [False, True])
def test_equal_times_prefer_less_traffic(sets):
    """Where time hardly depends on the traffic, the answer still keeps what meets together."""
    counted = structured(tokens=4000, sets=sets)
    # Reading weights takes all the time but a hair, and all experts are active.
    model = mt.CostModel(10.0, 100.0, 0.0, 0.0, token_bytes=1e-3)
    problem = mt.Problem(counted, mt.Topology(4), cost_model=model)
    found = mt.solve(problem, "heuristic", iterations=5000)
    contiguous = mt.solve(problem, "contiguous")
    assert found.objective <= (1 + TIE) * contiguous.objective
    assert mt.Objective(problem).traffic(found.placement) < 0.8 * mt.Objective(problem).traffic(
        contiguous.placement
    )
