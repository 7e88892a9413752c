"""vLLM serves a tiny Qwen3-MoE, whose first layer is dense, with moetuner inside.

Every run of the engine serves the same prompts greedily. A placement moves weights and nothing
else, so the tokens must stay what they are on one rank; the negative control shows that they do
not if weights are not moved.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from serving import (
    BELOW,
    COPIES,
    EXPERTS,
    SLOTS,
    TOKENS,
    Served,
    any_placement,
    ask_vllm_server,
    by_rank,
    experts_on_ranks,
    kill_a_rank,
    model,
    moetuner,
    on_two_ranks,
    permuted,
    same_routing,
    serve,
    solved,
    type_page,
)

import moetuner as mt
from moetuner.plugins import rebalance_experts

MODEL = "qwen3_moe_dense"


@cache
def one_rank() -> Served:
    """Serve on one rank: what all others are compared with."""
    return serve("vllm", "vllm-one-rank-dense", model(MODEL), {})


@cache
def placement() -> Path:
    """Read what vLLM recorded, and solve."""
    return solved("vllm", sorted(one_rank().folder.glob("routed-*.npy")))


def trace() -> mt.RoutingTrace:
    """Return what vLLM recorded."""
    return mt.RoutingTrace.load(placement().with_name("trace.safetensors"))


def balancer(asynchronous: bool) -> dict:
    """Return the arguments of vLLM's load balancer with two copies."""
    config = {
        "window_size": 4,
        "step_interval": 8,  # the first rearrangement comes after a quarter of it
        "num_redundant_experts": COPIES,
        "use_async": asynchronous,
        "log_balancedness": True,
        "communicator": "torch_gloo",
    }
    return {"enable_eplb": True, "eplb_config": config}


def balanced(name: str, asynchronous: bool, checkpoint: str = MODEL, **variables: object) -> Served:
    """Serve on two ranks with vLLM's load balancer on: the third command."""
    values = {key: str(value) for key, value in variables.items()}
    return on_two_ranks("vllm", name, model(checkpoint), balancer(asynchronous), values)


def test_routed_experts_are_what_transformers_routes():
    """Our reader gives, in MoE layers alone, the sets of experts of transformers' routers."""
    served = one_rank()
    actual = trace()
    expected = np.concatenate(tiny_models.truth(model(MODEL), served.sequences))
    assert served.routed[0].shape[1] == tiny_models.LAYERS
    assert actual.layers == tiny_models.LAYERS - 1
    assert same_routing(np.asarray(actual.expert_ids), expected)


def test_http_responses_say_what_offline_arrays_say():
    """Answers over HTTP, joined, are the trace of the arrays; a later start drops rows."""
    body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    prompts = tiny_models.prompts()
    text = [{"role": "user", "content": "Where do the experts live?"}]
    part = {**body, "prompt": prompts[0], "routed_experts_prompt_start": 3}
    chat = {**body, "messages": text, "return_token_ids": True}
    requests = {
        "completions": ("/v1/completions", {**body, "prompt": prompts}),
        "completion-from-3": ("/v1/completions", part),
        "chat": ("/v1/chat/completions", chat),
    }
    folder = ask_vllm_server("vllm-http", model(MODEL), requests)
    actual = {}
    for file in folder.glob("*.json"):
        out = folder / f"{file.stem}.safetensors"
        moetuner("convert", file, "--num-experts", EXPERTS, "--out", out)
        actual[file.stem] = np.asarray(mt.RoutingTrace.load(out).expert_ids)
    offline = np.asarray(trace().expert_ids)
    assert same_routing(actual["completions"], offline)
    first = len(one_rank().sequences[0])
    assert same_routing(actual["completion-from-3"], offline[3:first])
    chat = json.loads((folder / "chat.json").read_text())
    sequence = chat["prompt_token_ids"] + chat["choices"][0]["token_ids"][:-1]
    (expected,) = tiny_models.truth(model(MODEL), [sequence])
    assert same_routing(actual["chat"], expected)


def test_commands_of_the_page_work_as_printed():
    """docs/engines/vllm.md, typed from its first line to its last."""
    sizes = {"RANKS": 2, "EXPERTS": EXPERTS, "LAYERS": tiny_models.LAYERS, "SLOTS": SLOTS}
    values = {"MODEL": model("qwen3_moe"), "DENSE": "none", "COPIES": COPIES}
    folder, typed = type_page("vllm", {**sizes, **values})
    servers = [of.output for of in typed if "vllm serve" in of.command]
    assert len(servers) == 2
    assert (folder / "routed.jsonl").read_bytes().count(b"\n") == 2
    log = Path(servers[1]).read_text()
    assert "moetuner: in force: " in log
    assert "4 layers change" in log  # at the load


def test_permuted_checkpoint_serves_the_same_tokens():
    """Experts renumbered in the checkpoint: same tokens on two ranks, and ids map back."""
    served, order = permuted("vllm", model(MODEL), trace())
    assert served.tokens == one_rank().tokens
    for new, old in zip(served.routed, one_rank().routed, strict=True):
        back = order[np.arange(len(order))[:, None], new[:, 1:]]
        assert same_routing(back, old[:, 1:])


@pytest.mark.parametrize("how", ["sync", "async"])
def test_stored_placement_comes_into_force_and_tokens_stay(how):
    """`MOETUNER_PLACEMENT`: both ranks run our placement, the tokens and logical ids stay."""
    served = balanced(f"vllm-static-{how}", how == "async", MOETUNER_PLACEMENT=placement())
    maps = served.common_maps()
    # From the first step on: vLLM's own map was replaced at the load.
    assert [by_rank(of, 2) for of in maps] == [experts_on_ranks(placement())] * len(maps)
    served.check_same(one_rank())
    assert served.log.count("moetuner: registered, not asked yet; when asked, it serves ") == 1
    assert served.log.count("3 layers change") == 1


@pytest.mark.parametrize("how", ["sync", "async"])
def test_live_rebalancing_agrees_on_all_ranks_and_tokens_stay(how):
    """`MOETUNER_REBALANCE`: the map in force is our policy's answer to the loads it saw."""
    name = f"vllm-live-{how}"
    variables = {"MOETUNER_REBALANCE": 1, "MOETUNER_RECORD": BELOW / "runs" / name / "loads"}
    # So few tokens show nothing beyond chance; the thresholds are for loads of real traffic.
    always = {"MOETUNER_DEAD_ZONE": 0, "MOETUNER_DEVIATIONS": 0}
    served = balanced(name, how == "async", **variables, **always)
    maps = [np.array(of) for of in served.common_maps()]
    assert len(maps) > 1
    tables = sorted((served.folder / "loads").glob("*.npz"))
    assert tables, "no loads were recorded"
    load = np.load(tables[0])["load"]
    answer = rebalance_experts(
        load[0], EXPERTS + COPIES, 1, 1, 2, maps[0], dead_zone=0, deviations=0
    )
    assert any((of == answer).all() for of in maps)
    served.check_same(one_rank())


@pytest.mark.parametrize(
    ("how", "asynchronous", "reason"),
    [
        ("missing", False, "from now on: rank 1: /nonexistent/placement.json"),
        ("raise", False, "own map: rank 1: broken on purpose"),
        ("unset", False, "own map: rank 1 did not answer within"),
        ("other", True, "from now on: rank 1 read other files or variables than rank 0"),
    ],
)
def test_one_broken_rank_leaves_all_with_the_engines_own_map(how, asynchronous, reason):
    """No hang: both ranks run vLLM's own maps, tokens stay, and a line names the rank."""
    other = any_placement("vllm-other", tiny_models.LAYERS - 1, EXPERTS, SLOTS)
    broken = {"ENGINES_BREAK": f"1:{how}", "ENGINES_OTHER": other}
    name = f"vllm-broken-{how}"
    served = balanced(name, asynchronous, MOETUNER_PLACEMENT=placement(), **broken)
    ours = experts_on_ranks(placement())
    assert ours not in [by_rank(of, 2) for of in served.common_maps()]
    assert served.tokens == one_rank().tokens
    assert reason in served.log


@pytest.mark.parametrize(
    ("call", "reason"),
    [(1, "WorkerProc initialization failed"), (3, "died unexpectedly")],
    ids=["at-the-load", "in-a-rebalance"],
)
def test_a_killed_rank_ends_the_engine(call, reason):
    """SIGKILL of a rank in a decision: the engine ends as it does by itself, nothing waits."""
    variables = {"MOETUNER_PLACEMENT": str(placement()), "ENGINES_BREAK": f"1:kill-{call}"}
    assert reason in kill_a_rank(
        "vllm", f"vllm-killed-{call}", model(MODEL), balancer(False), variables
    )


def test_without_the_balancer_nothing_changes():
    """Without `enable_eplb` vLLM never asks: same tokens, and the line says what is missing."""
    variables = {"MOETUNER_PLACEMENT": str(placement()), "MOETUNER_PLACMENT": "x"}
    served = on_two_ranks("vllm", "vllm-no-balancer", model(MODEL), {}, variables)
    assert served.tokens == one_rank().tokens
    assert "moetuner: does nothing without --enable-eplb" in served.log
    assert "MOETUNER_PLACMENT is not a variable of moetuner: did you mean" in served.log


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_other_models(name):
    """Mixtral serves our placement. OLMoE has no balancer in vLLM, and serves as ever."""
    experts, width = {"mixtral": (8, 5), "olmoe": (16, 9)}[name]
    path = any_placement(f"vllm-{name}", tiny_models.LAYERS, experts, width)
    served = balanced(f"vllm-{name}", False, name, MOETUNER_PLACEMENT=path)
    served.check_greedy(model(name))
    expected = [experts_on_ranks(path)] * 2 if name == "mixtral" else []
    assert [by_rank(of[0], 2) for of in served.maps()] == expected


def test_tokens_change_if_weights_do_not_move():
    """Negative control: maps in force without their weights give other tokens."""
    variables = {"MOETUNER_PLACEMENT": placement(), "ENGINES_KEEP_WEIGHTS": 1}
    served = balanced("vllm-weights-kept", False, **variables)
    assert by_rank(served.maps()[0][-1], 2) == experts_on_ranks(placement())
    pairs = zip(served.tokens, one_rank().tokens, strict=True)
    assert all(ours != theirs for ours, theirs in pairs)
