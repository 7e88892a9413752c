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
    RANKS,
    TOKENS,
    Served,
    ask_vllm_server,
    by_rank,
    folder_of,
    model,
    moetuner,
    order_of,
    same_routing,
    serve,
)

import moetuner as mt
from moetuner.plugins import rebalance_experts
from moetuner.torch import permute_state_dict

MODEL = "qwen3_moe_dense"
EXPERTS, COPIES, SLOTS = 16, 2, 9  # 16 experts and 2 copies on 2 ranks with 9 slots
TWO = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


@cache
def one_rank() -> Served:
    """Serve on one rank: what all others are compared with."""
    return serve("vllm", "vllm-one-rank-dense", model(MODEL), {})


@cache
def trace() -> mt.RoutingTrace:
    """Read what vLLM recorded: the first of the three commands."""
    out = BELOW / "runs" / "vllm-one-rank-dense" / "trace.safetensors"
    recorded = sorted(one_rank().folder.glob("routed-*.npy"))
    moetuner("convert", *recorded, "--num-experts", EXPERTS, "--out", out)
    return mt.RoutingTrace.load(out)


@cache
def placement() -> Path:
    """Solve for two ranks with copies: the second command. The plugin loads the file."""
    trace()
    folder = one_rank().folder
    out = folder / "placement.json"
    arguments = ["--for", "vllm", "--devices", 2, "--slots-per-device", SLOTS, "--out", out]
    moetuner("solve", folder / "trace.safetensors", *arguments)
    return out


@cache
def balanced(name: str, asynchronous: bool, environment: tuple[tuple[str, str], ...]) -> Served:
    """Serve on two ranks with vLLM's load balancer on: the third command."""
    balancer = {
        "window_size": 4,
        "step_interval": 8,  # the first rearrangement comes after a quarter of it
        "num_redundant_experts": COPIES,
        "use_async": asynchronous,
        "log_balancedness": True,
        "communicator": "torch_gloo",
    }
    maps = {"ENGINES_MAPS": str(BELOW / "runs" / name / "maps")}
    return serve(
        "vllm",
        name,
        model(MODEL),
        {**TWO, "enable_eplb": True, "eplb_config": balancer},
        {**RANKS, **maps, **dict(environment)},
    )


def static(asynchronous: bool) -> Served:
    name = f"vllm-static-{'async' if asynchronous else 'sync'}"
    return balanced(name, asynchronous, (("MOETUNER_PLACEMENT", str(placement())),))


def live(asynchronous: bool) -> Served:
    name = f"vllm-live-{'async' if asynchronous else 'sync'}"
    record = BELOW / "runs" / name / "loads"
    # So few tokens show nothing beyond chance; the thresholds are for loads of real traffic.
    always = (("MOETUNER_DEAD_ZONE", "0"), ("MOETUNER_DEVIATIONS", "0"))
    asked = (("MOETUNER_REBALANCE", "1"), ("MOETUNER_RECORD", str(record)), *always)
    return balanced(name, asynchronous, asked)


def test_routed_experts_are_what_transformers_routes():
    """Our reader gives, in MoE layers alone, the sets of experts of transformers' routers."""
    served = one_rank()
    found = trace()
    expected = np.concatenate(tiny_models.truth(model(MODEL), served.sequences))
    assert served.routed[0].shape[1] == tiny_models.LAYERS
    assert found.layers == tiny_models.LAYERS - 1
    assert same_routing(np.asarray(found.expert_ids), expected)


def test_http_responses_say_what_offline_arrays_say():
    """Answers over HTTP, joined, are the trace of the arrays; a later start drops rows."""
    body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    prompts = tiny_models.prompts()
    text = [{"role": "user", "content": "Where do the experts live?"}]
    folder = ask_vllm_server(
        "vllm-http",
        model(MODEL),
        {
            "completions": ("/v1/completions", {**body, "prompt": prompts}),
            "completion-from-3": (
                "/v1/completions",
                {**body, "prompt": prompts[0], "routed_experts_prompt_start": 3},
            ),
            "chat": (
                "/v1/chat/completions",
                {**body, "messages": text, "return_token_ids": True},
            ),
        },
    )
    found = {}
    for file in folder.glob("*.json"):
        out = folder / f"{file.stem}.safetensors"
        moetuner("convert", file, "--num-experts", EXPERTS, "--out", out)
        found[file.stem] = np.asarray(mt.RoutingTrace.load(out).expert_ids)
    offline = np.asarray(trace().expert_ids)
    assert same_routing(found["completions"], offline)
    first = len(one_rank().sequences[0])
    assert same_routing(found["completion-from-3"], offline[3:first])
    chat = json.loads((folder / "chat.json").read_text())
    sequence = chat["prompt_token_ids"] + chat["choices"][0]["token_ids"][:-1]
    (expected,) = tiny_models.truth(model(MODEL), [sequence])
    assert same_routing(found["chat"], expected)


def test_permuted_checkpoint_serves_the_same_tokens():
    """Experts renumbered in the checkpoint: same tokens on two ranks, and ids map back."""
    folder = folder_of("vllm-permuted-checkpoint") / "model"
    statistics = mt.RoutingStatistics.from_trace(trace(), window=32, sets=True)
    placed = mt.solve(mt.Problem(statistics, mt.Topology(devices=2))).placement
    permute_state_dict(model(MODEL), placed, folder)
    maps = {"ENGINES_MAPS": str(BELOW / "runs" / "vllm-permuted" / "maps")}
    served = serve("vllm", "vllm-permuted", folder, TWO, {**RANKS, **maps})
    assert served.tokens == one_rank().tokens
    order = order_of(placed)
    assert (order != np.arange(EXPERTS)).any()
    for new, old in zip(served.routed, one_rank().routed, strict=True):
        back = order[np.arange(placed.layers)[:, None], new[:, 1:]]
        assert same_routing(back, old[:, 1:])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_stored_placement_comes_into_force_and_tokens_stay(asynchronous):
    """`MOETUNER_PLACEMENT`: both ranks run our placement, the tokens and logical ids stay."""
    served = static(asynchronous)
    first, second = served.maps()
    assert first == second
    expected = mt.Placement.load(placement())
    assert by_rank(first[0], 2) != by_rank(first[-1], 2)  # vLLM starts with its own
    assert by_rank(first[-1], 2) == np.sort(expected.slots, axis=2).tolist()
    assert served.tokens == one_rank().tokens
    for ours, theirs in zip(served.routed, one_rank().routed, strict=True):
        assert same_routing(ours, theirs)
    assert "moetuner" in served.log.lower()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_live_rebalancing_agrees_on_all_ranks_and_tokens_stay(asynchronous):
    """`MOETUNER_REBALANCE`: the map in force is our policy's answer to the loads it saw."""
    served = live(asynchronous)
    first, second = served.maps()
    assert first == second
    assert len(first) > 1
    tables = sorted((served.folder / "loads").glob("*.npz"))
    assert tables, "no loads were recorded"
    load = np.load(tables[0])["load"]
    whole = [np.array(of) for of in first]
    answer = rebalance_experts(
        load[0], EXPERTS + COPIES, 1, 1, 2, whole[0], dead_zone=0, deviations=0
    )
    assert any((of == answer).all() for of in whole)
    assert served.tokens == one_rank().tokens
    for ours, theirs in zip(served.routed, one_rank().routed, strict=True):
        assert same_routing(ours, theirs)


def test_tokens_change_if_weights_do_not_move():
    """Negative control: maps in force without their weights give other tokens."""
    asked = (("MOETUNER_PLACEMENT", str(placement())), ("ENGINES_KEEP_WEIGHTS", "1"))
    served = balanced("vllm-weights-kept", False, asked)
    assert (
        by_rank(served.maps()[0][-1], 2)
        == np.sort(mt.Placement.load(placement()).slots, axis=2).tolist()
    )
    assert all(
        ours != theirs for ours, theirs in zip(served.tokens, one_rank().tokens, strict=True)
    )
