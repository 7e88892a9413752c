"""Weights that change in vLLM while experts are elsewhere than where it loads them.

Checkpoints of a trainer: `base`, `step`, which has all weights elsewhere, and `part`, which is
`base` with two experts of one layer from `step`. Their tokens are transformers'; all differ.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from serving import COPIES, EXPERTS, SLOTS, TOKENS, acted, any_placement, model

BASE = "qwen3_moe"
TWO_EXPERTS = r"layers\.1\.mlp\.experts\.(3|4)\."
# A session sends the checkpoint in these parts.
PARTS = [r"layers\.[01]\.", r"layers\.[23]\.", r"^(?!.*layers\.)"]
ALL_SLOTS = 0  # wrong slots of each of two ranks


@cache
def checkpoint(name: str) -> Path:
    """Return a trainer's checkpoint."""
    if name == "base":
        return model(BASE)
    pattern = "" if name == "step" else TWO_EXPERTS
    return tiny_models.trained(model(BASE), f"{BASE}_{name}", pattern)


@cache
def tokens_of(name: str, count: int = TOKENS) -> list[list[int]]:
    """Return the tokens of a checkpoint as transformers computes them."""
    return [tiny_models.greedy(checkpoint(name), prompt, count) for prompt in tiny_models.prompts()]


def test_the_checkpoints_say_different_tokens():
    """Or nothing below would show anything."""
    first, second, third = map(tokens_of, ("base", "step", "part"))
    for prompt in range(len(first)):
        assert first[prompt] != second[prompt]
        assert second[prompt] != third[prompt]
    assert first != third


def arguments(interval: int, asynchronous: bool = False) -> dict[str, Any]:
    """Return the arguments of vLLM that rearranges every so many steps."""
    config = {
        "window_size": 4,
        "step_interval": interval,
        "num_redundant_experts": COPIES,
        "use_async": asynchronous,
        "communicator": "torch_gloo",
    }
    return {
        "enable_eplb": True,
        "eplb_config": config,
        "worker_extension_cls": "weights.Workers",
        "weight_transfer_config": {"backend": "disk"},
        "enable_return_routed_experts": False,
    }


class Plan:
    """Actions of an engine, and what has to come of each."""

    def __init__(self) -> None:
        self.actions: list[list[Any]] = []
        self.expected: list[Any] = []

    def do(self, *action: Any, gives: Any = None) -> None:
        """Do something that gives this on each rank."""
        self.actions.append(list(action))
        self.expected.append(gives)

    def check(self, name: str, count: int = TOKENS) -> None:
        """Serve, and compare tokens, and the weights of all slots, with a checkpoint."""
        self.do("generate", count, gives=tokens_of(name, count))
        self.do("wrong_slots", str(checkpoint(name)), gives=[ALL_SLOTS] * 2)

    def update_in_every_way(self) -> None:
        """Reload the same and another checkpoint, load directly, in part, and in a session."""
        nothing = [None] * 2
        self.check("base")
        self.do("reload_weights", gives=nothing)
        self.check("base")
        self.do("reload_weights", {"weights_path": str(checkpoint("step"))}, gives=nothing)
        self.check("step")
        self.do("load_directly", str(checkpoint("base")), gives=nothing)
        self.check("base")
        self.do("load_directly", str(checkpoint("step")), TWO_EXPERTS, gives=nothing)
        self.check("part")
        self.do("session", str(checkpoint("step")), *PARTS)
        self.check("step")
        self.do("session", str(checkpoint("base")), *PARTS)
        self.check("base")

    def lose_all(self) -> None:
        """Lose what a sleep of level 2 discards, and load another checkpoint."""
        self.do("lose_all", gives=[None] * 2)
        path = {"weights_path": str(checkpoint("step"))}
        self.do("reload_weights", path, gives=[None] * 2)
        self.check("step")

    def run(self, name: str, options: dict[str, Any], **variables: Any) -> tuple[list[Any], str]:
        """Do all of it; return what came of each action, and the log."""
        environment = {key: str(value) for key, value in variables.items()}
        environment["ENGINES_PLAIN"] = "1"
        return acted("vllm", name, model(BASE), options, environment, self.actions)


def placement() -> Path:
    """Return a placement unlike vLLM's own, with copies."""
    return any_placement("vllm-updates", tiny_models.LAYERS, EXPERTS, SLOTS)


# How often vLLM rearranges, and what the plugin is asked for.
WAYS = {
    "placement": (10**4, {"MOETUNER_PLACEMENT": None}),
    "live": (8, {"MOETUNER_REBALANCE": 1, "MOETUNER_DEAD_ZONE": 0, "MOETUNER_DEVIATIONS": 0}),
    "vllms-own": (8, {"MOETUNER_UPDATES": 1}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_update_goes_to_where_the_experts_are(way):
    """Same tokens as the checkpoint's, and its weights in every slot; also after a sleep."""
    interval, variables = WAYS[way]
    plan = Plan()
    plan.update_in_every_way()
    plan.lose_all()
    if "MOETUNER_PLACEMENT" in variables:
        variables = {"MOETUNER_PLACEMENT": placement()}
    actual, _ = plan.run(f"vllm-updates-{way}", arguments(interval), **variables)
    for action, came, expected in zip(plan.actions, actual, plan.expected, strict=True):
        assert came == expected, action


def test_weights_that_were_staged_before_an_update_are_dropped():
    """The update falls at another place of an asynchronous rearrangement each time."""
    plan, other = Plan(), "base"
    for count in range(3, 8):
        plan.do("generate", count, gives=tokens_of(other, count))
        other = "step" if other == "base" else "base"
        path = {"weights_path": str(checkpoint(other))}
        plan.do("reload_weights", path, gives=[None] * 2)
        plan.check(other, 5)
    actual, log = plan.run(
        "vllm-updates-async", arguments(8, asynchronous=True), MOETUNER_UPDATES=1
    )
    for action, came, expected in zip(plan.actions, actual, plan.expected, strict=True):
        assert came == expected, action
    assert "Draining async EPLB worker" in log


def test_weights_in_the_kernels_format_are_refused():
    """By the engine's caller, with the reason; what runs stays, and so does the next update."""
    plan = Plan()
    plan.check("base")
    kernel = {"is_checkpoint_format": False, "weights_path": str(checkpoint("step"))}
    plan.do("reload_weights", kernel)
    plan.check("base")
    path = {"weights_path": str(checkpoint("step"))}
    plan.do("reload_weights", path, gives=[None] * 2)
    plan.check("step")
    actual, _ = plan.run("vllm-updates-kernel", arguments(10**4), MOETUNER_PLACEMENT=placement())
    assert "moetuner: reload_weights is refused" in actual[2]
    plan.expected[2] = actual[2]
    assert actual == plan.expected


def test_without_it_every_update_is_wrong():
    """Negative control: vLLM's loader, as it is, under a placement."""
    plan = Plan()
    plan.check("base")
    path = {"weights_path": str(checkpoint("step"))}
    plan.do("reload_weights", path, gives=[None] * 2)
    plan.check("step")
    variables = {"MOETUNER_PLACEMENT": placement(), "MOETUNER_UPDATES": 0}
    actual, _ = plan.run("vllm-updates-off", arguments(10**4), **variables)
    assert actual[:3] == plan.expected[:3]
    tokens, wrong = actual[3:]
    assert all(ours != right for ours, right in zip(tokens, plan.expected[3], strict=True))
    assert all(count > 0 for count in wrong)
