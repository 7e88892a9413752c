"""Weights that change in vLLM while experts are elsewhere than where it loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from serving import COPIES, TOKENS, acted
from trainer import BASE, TWO_EXPERTS, checkpoint, placement, tokens_of

# A session sends the checkpoint in these parts.
PARTS = [r"layers\.[01]\.", r"layers\.[23]\.", r"^(?!.*layers\.)"]
ALL_SLOTS = 0  # wrong slots of each of two ranks


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

    def run(
        self, name: str, options: dict[str, Any], folder: Path | None = None, **variables: Any
    ) -> tuple[list[Any], str]:
        """Do all of it with `base` or another checkpoint; return what came of it, and the log."""
        environment = {key: str(value) for key, value in variables.items()}
        environment["ENGINES_PLAIN"] = "1"
        folder = folder or checkpoint("base")
        return acted("vllm", name, folder, options, environment, self.actions)


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


@pytest.mark.parametrize("variable", ["MOETUNER_PLACEMENT", "MOETUNER_UPDATES"])
def test_a_checkpoint_with_all_experts_in_one_tensor_fills_every_copy(variable):
    """At the first load, of which vLLM leaves the copies without weights, and at the next."""
    plan = Plan()
    plan.check("base")
    plan.do("reload_weights", gives=[None] * 2)
    plan.check("base")
    variables = {variable: placement() if variable == "MOETUNER_PLACEMENT" else 1}
    folder = tiny_models.fused(checkpoint("base"), f"{BASE}_fused")
    name = f"vllm-fused-{variable.lower()}"
    actual, _ = plan.run(name, arguments(10**4), folder, **variables)
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
