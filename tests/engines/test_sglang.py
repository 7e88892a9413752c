"""SGLang serves tiny models with moetuner inside: a Qwen3-MoE, and a GLM-4-MoE with a dense layer.

Every run of the engine serves the same prompts greedily. A placement moves weights and nothing
else, so the tokens must stay what they are on one rank; the negative control shows that they do
not if weights are not moved.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer
from serving import (
    BELOW,
    COPIES,
    DEFAULTS,
    EXPERTS,
    SLOTS,
    TOKENS,
    Served,
    acted,
    any_placement,
    by_rank,
    experts_on_ranks,
    kill_a_rank,
    model,
    moetuner,
    permuted,
    same_routing,
    serve,
    solved,
    type_page,
)
from serving import on_two_ranks as serve_on_two_ranks

import moetuner as mt
from moetuner.formats.recipes import list_serving_recipes
from moetuner.plugins import rebalance_experts

MODEL, DENSE = "qwen3_moe", "glm4_moe"
PASSES = 12  # one of all prompts, and one for every token but the first
MODES = ("per_token", "per_pass", "stat")
# Steps that the recorder keeps in mode stat: more than there are, and fewer.
BUFFER = {"one": 16, "two": 8}
ONE = {"SGLANG_CPU_OMP_THREADS_BIND": "0"}
WITH_COPIES = {"ep_num_redundant_experts": COPIES}
BALANCED = {
    **WITH_COPIES,
    "enable_eplb": True,
    "eplb_algorithm": "moetuner",
    "eplb_rebalance_num_iterations": 4,
}
# So few tokens show nothing beyond chance; the thresholds are for loads of real traffic.
LIVE = {"MOETUNER_REBALANCE": 1, "MOETUNER_DEAD_ZONE": 0, "MOETUNER_DEVIATIONS": 0}


def recorder(mode: str, ranks: str) -> dict:
    arguments: dict = {"expert_distribution_recorder_mode": mode}
    if mode == "stat":
        arguments["expert_distribution_recorder_buffer_size"] = BUFFER[ranks]
    return arguments


def one_rank() -> Served:
    """Return what all others are compared with."""
    return recorded("per_token")


@cache
def recorded(mode: str) -> Served:
    """Serve on one rank while the recorder runs."""
    name = f"sglang-one-rank-{mode}"
    return serve("sglang", name, model(MODEL), recorder(mode, "one"), ONE)


@cache
def placement() -> Path:
    """Read what SGLang returned with its answers, and solve."""
    return solved("sglang", [one_rank().folder / "responses.json"], "--top-k", 4)


def trace() -> mt.RoutingTrace:
    """Return what SGLang returned with its answers."""
    return mt.RoutingTrace.load(placement().with_name("trace.safetensors"))


def on_two_ranks(
    name: str, arguments: dict, checkpoint: str | Path = MODEL, **variables: object
) -> Served:
    values = {key: str(value) for key, value in variables.items()}
    folder = model(checkpoint) if isinstance(checkpoint, str) else checkpoint
    served = serve_on_two_ranks("sglang", name, folder, arguments, values)
    assert "Failed to apply hooks" not in served.log
    return served


@cache
def placed(mode: str) -> Served:
    """Serve on two ranks with the file of our writer: the third command; the recorder runs."""
    location = one_rank().folder / "expert_location.json"
    layers = ["--hidden-layers", tiny_models.LAYERS]
    moetuner("export", placement(), "--to", "sglang", *layers, "--out", location)
    arguments = {**WITH_COPIES, **recorder(mode, "two"), "init_expert_location": str(location)}
    return on_two_ranks(f"sglang-two-ranks-{mode}", arguments)


def read(served: Served) -> mt.RoutingTrace | mt.RoutingStatistics:
    """Read the recorder's dump of a run."""
    out = served.folder / "dump.safetensors"
    moetuner("convert", *sorted(served.folder.glob("*.pt")), "--out", out)
    return mt.open_input(out)


def loads(ids: np.ndarray) -> np.ndarray:
    """Count tokens by expert [L,E], as an oracle."""
    return np.stack([np.bincount(of.ravel(), minlength=EXPERTS) for of in ids.transpose(1, 0, 2)])


def rows(ids: np.ndarray) -> list:
    """Return the tokens' sets of experts in an order of their own."""
    return sorted(np.sort(ids, axis=2).tolist())


PARSED = """
import json, sys
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.server_args import prepare_server_args

arguments = prepare_server_args(sys.argv[1:])
arguments.resolve_once()
print(json.dumps(resolved_view(arguments).ep_dispatch_algorithm))
"""
ON_CPU = ["--device", "cpu", "--attention-backend", "torch_native", "--skip-tokenizer-init"]


@pytest.mark.parametrize(
    ("split", "dispatch"), [("even", "dynamic"), ("nearest", "static"), ("lp", "lp")]
)
def test_the_printed_command_starts_the_dispatch_of_its_split(split, dispatch):
    """SGLang's own arguments take the line of `advise` and pages, whatever copies are split by."""
    placed = mt.Placement(np.arange(EXPERTS + COPIES).reshape(1, 2, -1) % EXPERTS)
    line = list_serving_recipes("sglang", placed, split=split)[-1].command
    words = shlex.split(line.replace("MODEL", str(model(MODEL))), comments=True)
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    done = subprocess.run(
        [sys.executable, "-c", PARSED, *words[3:], *ON_CPU],
        capture_output=True,
        text=True,
        env={**os.environ, **DEFAULTS["sglang"]},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dispatch


def test_routed_experts_are_what_transformers_routes():
    """Our reader gives what transformers' routers choose, and even in their order."""
    expected = np.concatenate(tiny_models.truth(model(MODEL), one_rank().sequences))
    assert (np.asarray(trace().expert_ids) == expected).all()


@pytest.mark.parametrize("mode", MODES)
def test_recorder_on_one_rank(mode):
    """What the recorder dumps is read as the loads of the returned trace."""
    served = recorded(mode)
    assert served.tokens == one_rank().tokens
    actual = read(served)
    ids = np.asarray(trace().expert_ids)
    if mode == "per_token":
        assert rows(np.asarray(actual.expert_ids)) == rows(ids)
    else:
        assert actual.windows == PASSES
        assert (actual.window_load.sum(axis=0) == loads(ids)).all()


@pytest.mark.parametrize("mode", MODES)
def test_file_of_our_writer_places_experts_and_slots_are_read_back(mode):
    """`--init-expert-location`: our placement is in force, tokens stay, slots become experts."""
    served = placed(mode)
    for maps in served.maps():
        assert by_rank(maps[0], 2) == experts_on_ranks(placement())
    served.check_same(one_rank())
    actual = read(served)
    ids = np.asarray(trace().expert_ids)
    if mode == "per_token":
        assert rows(np.asarray(actual.expert_ids)) == rows(ids)
    elif mode == "per_pass":
        # Both ranks of tensor parallelism count the same tokens, and SGLang adds them up.
        assert (actual.window_load.sum(axis=0) == 2 * loads(ids)).all()
    else:
        assert actual.windows == BUFFER["two"]


def test_commands_of_the_page_work_as_printed():
    """docs/engines/sglang.md, typed from its first line to its last."""
    sizes = {"RANKS": 2, "EXPERTS": EXPERTS, "LAYERS": tiny_models.LAYERS, "SLOTS": SLOTS}
    sizes |= {"TOPK": 4, "DENSE": "none", "COPIES": COPIES}
    folder, typed = type_page("sglang", {**sizes, "MODEL": model(MODEL)})
    servers = [of.output for of in typed if "launch_server" in of.command]
    assert len(servers) == 5
    assert (folder / "routed.jsonl").read_bytes().count(b"\n") == 2
    assert (
        "moetuner: registered, not asked yet; when asked, it serves "
        in Path(servers[3]).read_text()
    )
    assert (
        "moetuner: registered, not asked yet; when asked, it rebalances by live loads"
        in Path(servers[4]).read_text()
    )


def test_stored_placement_comes_into_force_and_tokens_stay():
    """`--eplb-algorithm moetuner` with `MOETUNER_PLACEMENT`: both ranks run our placement."""
    served = on_two_ranks("sglang-static", BALANCED, MOETUNER_PLACEMENT=placement())
    maps = served.common_maps()
    # From the load on.
    assert [by_rank(of, 2) for of in maps] == [experts_on_ranks(placement())] * len(maps)
    assert "moetuner: registered, not asked yet; when asked, it serves " in served.log
    served.check_same(one_rank())


@pytest.mark.parametrize("way", ["placement", "live"])
def test_weights_that_change_go_to_where_the_experts_are(way):
    """SGLang's own loader follows its map: from a file, from tensors, of two experts alone."""
    variables = LIVE if way == "live" else {"MOETUNER_PLACEMENT": trainer.placement()}
    actions, expected = [], []
    for action, after in (
        ((), "base"),
        (("disk", trainer.checkpoint("step")), "step"),
        (("tensors", trainer.checkpoint("base"), ""), "base"),
        (("tensors", trainer.checkpoint("step"), trainer.TWO_EXPERTS), "part"),
        (("disk", trainer.checkpoint("base")), "base"),
    ):
        if action:
            actions.append(list(map(str, action)))
            expected.append(True)
        actions.append(["generate", TOKENS])
        expected.append(trainer.tokens_of(after))
    texts = {key: str(value) for key, value in variables.items()}
    options = {**BALANCED, "enable_return_routed_experts": False}
    actual, _ = acted("sglang", f"sglang-updates-{way}", model(MODEL), options, texts, actions)
    for action, came, right in zip(actions, actual, expected, strict=True):
        assert came == right, action


def test_live_rebalancing_agrees_on_all_ranks_and_tokens_stay():
    """`MOETUNER_REBALANCE`: the map in force is our policy's answer to the loads it saw."""
    record = BELOW / "runs" / "sglang-live" / "loads"
    served = on_two_ranks("sglang-live", BALANCED, MOETUNER_RECORD=record, **LIVE)
    maps = served.common_maps()
    assert len(maps) > 1
    (table,) = sorted(record.glob("*.npz"))[:1]
    load = np.load(table)["load"][: BALANCED["eplb_rebalance_num_iterations"]]
    answer = rebalance_experts(
        load, EXPERTS + COPIES, None, 1, 2, np.array(maps[0]), dead_zone=0, deviations=0
    )
    assert answer.tolist() == maps[1]
    served.check_same(one_rank())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "from now on: rank 1: /nonexistent/placement.json"),
        ("variable", "from now on: rank 1: MOETUNER_REBALANCE must be 0 or 1"),
        ("raise", "own map: rank 1: broken on purpose"),
        ("unset", "own map: rank 1 did not answer within"),
    ],
)
def test_one_broken_rank_leaves_all_with_the_engines_own_map(how, reason):
    """No hang: both ranks run SGLang's own maps, tokens stay, and a line names the rank."""
    variables = {"MOETUNER_PLACEMENT": placement(), "ENGINES_BREAK": f"1:{how}"}
    served = on_two_ranks(f"sglang-broken-{how}", BALANCED, **variables)
    maps = served.common_maps()
    assert len(maps) > 1
    assert experts_on_ranks(placement()) not in [by_rank(of, 2) for of in maps]
    assert served.tokens == one_rank().tokens
    assert reason in served.log


def test_without_variables_the_name_is_sglangs_own_algorithm():
    """`--eplb-algorithm moetuner` alone ended the server at the first rebalance."""
    served = on_two_ranks("sglang-no-variables", BALANCED)
    assert len(served.common_maps()) > 1
    assert served.tokens == one_rank().tokens
    assert "neither MOETUNER_PLACEMENT nor MOETUNER_REBALANCE is set" in served.log


@pytest.mark.parametrize("call", [1, 2], ids=["at-the-load", "in-a-rebalance"])
def test_a_killed_rank_ends_the_engine(call):
    """SIGKILL of a rank in a decision: the engine ends as it does by itself, nothing waits."""
    variables = {"MOETUNER_PLACEMENT": str(placement()), "ENGINES_BREAK": f"1:kill-{call}"}
    kill_a_rank("sglang", f"sglang-killed-{call}", model(MODEL), BALANCED, variables)


def test_without_the_balancer_a_warning_says_so():
    """Without `--eplb-algorithm moetuner` nothing changes."""
    served = on_two_ranks("sglang-no-balancer", WITH_COPIES, MOETUNER_PLACEMENT=placement())
    assert served.tokens == one_rank().tokens
    assert "does nothing without --enable-eplb --eplb-algorithm moetuner" in served.log


def test_a_model_without_a_balancer_serves_as_ever():
    """SGLang knows no places of experts for Mixtral: nothing of ours comes into force."""
    path = any_placement("sglang-mixtral", tiny_models.LAYERS, 8, 4)
    served = on_two_ranks("sglang-mixtral", {}, "mixtral", MOETUNER_PLACEMENT=path)
    served.check_greedy(model("mixtral"))


def test_tokens_change_if_weights_do_not_move():
    """Negative control: maps that change without their weights give other tokens.

    A stored placement would not do: weights are loaded by it.
    """
    served = on_two_ranks("sglang-weights-kept", BALANCED, ENGINES_KEEP_WEIGHTS=1, **LIVE)
    assert len(served.common_maps()) > 1
    pairs = zip(served.tokens, one_rank().tokens, strict=True)
    assert all(ours != theirs for ours, theirs in pairs)


def test_permuted_checkpoint_serves_the_same_tokens():
    """Experts renumbered in the checkpoint: same tokens on two ranks, and ids map back."""
    served, order = permuted("sglang", model(MODEL), trace())
    assert "Failed to apply hooks" not in served.log
    assert served.tokens == one_rank().tokens
    for new, old in zip(served.routed, one_rank().routed, strict=True):
        assert same_routing(order[np.arange(len(order))[:, None], new], old)


def test_dense_layers_have_rows_in_the_file_and_none_in_the_trace():
    """GLM-4-MoE, layer 0 dense, a router of groups: placed on two ranks by our file.

    Without copies: SGLang 0.5.23 makes no slots for them in this model.
    """
    options = {"disable_shared_experts_fusion": True}
    before = serve("sglang", "sglang-dense-one-rank", model(DENSE), options, ONE)
    before.check_greedy(model(DENSE))
    folder = before.folder
    recorded = folder / "trace.safetensors"
    arguments = ["--num-experts", EXPERTS, "--top-k", 4, "--dense-layers", 0]
    moetuner("convert", folder / "responses.json", *arguments, "--out", recorded)
    expected = np.concatenate(tiny_models.truth(model(DENSE), before.sequences))
    assert same_routing(np.asarray(mt.RoutingTrace.load(recorded).expert_ids), expected)
    answer, location = folder / "placement.json", folder / "expert_location.json"
    moetuner("solve", recorded, "--for", "sglang", "--devices", 2, "--out", answer)
    arguments = ["--dense-layers", 0, "--hidden-layers", tiny_models.LAYERS]
    moetuner("export", answer, "--to", "sglang", *arguments, "--out", location)
    options |= {**recorder("stat", "one"), "init_expert_location": str(location)}
    after = on_two_ranks("sglang-dense-two-ranks", options, DENSE)
    assert after.tokens == before.tokens
    assert by_rank(after.maps()[0][0][1:], 2) == experts_on_ranks(answer)
    actual = read(after)
    assert (actual.window_load.sum(axis=0) == 2 * loads(expected)).all()
    # By the plugin as well, from the load on: the configuration tells which layer is dense. It is
    # not to rebalance, for which SGLang 0.5.23 lacks a name in this model.
    options = {**BALANCED, "ep_num_redundant_experts": 0, "disable_shared_experts_fusion": True}
    options["eplb_rebalance_num_iterations"] = 1000
    plugged = on_two_ranks("sglang-dense-plugin", options, DENSE, MOETUNER_PLACEMENT=answer)
    assert plugged.tokens == before.tokens
    assert by_rank(plugged.maps()[0][0][1:], 2) == experts_on_ranks(answer)
