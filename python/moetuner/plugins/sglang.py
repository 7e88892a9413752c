"""SGLang's entry point: makes ``--eplb-algorithm moetuner`` known, where the environment asks.

Tested with 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from moetuner.plugins.policy import Policy, asked
from moetuner.plugins.tensors import rank_of_process, three_maps

LOG = logging.getLogger("moetuner.plugins")
ALGORITHM = "moetuner"
MODULE = "sglang.srt.eplb.eplb_algorithms"


def register() -> None:
    """Put hooks around SGLang's balancing algorithms; nothing without ``MOETUNER_`` variables."""
    settings = asked(LOG, "SGLang keeps its own algorithms")
    if settings is None:
        return
    hooks = Hooks(Policy(settings, LOG))
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for function in (hooks.compute_algorithm, hooks.rebalance_experts):
            HookRegistry.register(f"{MODULE}.{function.__name__}", function, HookType.AROUND)
    except Exception as error:
        LOG.warning("moetuner: SGLang keeps its own algorithms: %r", error)


class Hooks:
    """What stands around SGLang's functions; other algorithms than ours pass through."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._theirs: Callable[..., Any] | None = None

    def compute_algorithm(
        self,
        original: Callable[..., Any],
        raw_algorithm: str,
        num_groups: int | None,
        num_nodes: int,
    ) -> Any:
        """Return the algorithm of a name, ours by its name."""
        self._theirs = original
        if raw_algorithm == ALGORITHM:
            return ALGORITHM
        return original(raw_algorithm, num_groups, num_nodes)

    def rebalance_experts(
        self,
        original: Callable[..., Any],
        tokens_per_expert: Any,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Any:
        """Return three tensors: experts of slots, slots of experts, and copies."""
        sizes = {
            "num_physical_experts": num_physical_experts,
            "num_local_physical_experts": num_local_physical_experts,
            "num_groups": num_groups,
            "num_nodes": num_nodes,
        }
        try:
            loads = tokens_per_expert.detach().cpu().numpy()
            rank = rank_of_process()
            self.policy.record(loads, rank)
            if algorithm == ALGORITHM and self.policy.decides:
                ranks = num_physical_experts // num_local_physical_experts
                slots = self.policy.decide(
                    loads,
                    num_physical_experts,
                    num_groups,
                    num_nodes,
                    ranks,
                    running_map(loads.shape[-2]),
                    rank=rank,
                )
                # Two copies of an expert on a rank are refused here: SGLang would fill only one.
                maps = three_maps(slots, ranks, loads.shape[-1])
                return tuple(of.to(tokens_per_expert.device) for of in maps)
        except Exception as error:
            self.policy.failed("SGLang's own algorithm decides", error)
        if algorithm == ALGORITHM:
            assert self._theirs is not None
            algorithm = self._theirs("auto", num_groups, num_nodes)
        return original(tokens_per_expert=tokens_per_expert, **sizes, algorithm=algorithm)


def running_map(layers: int) -> Any:
    """Return experts of slots [L,P] as they run, None where nothing runs yet."""
    try:
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        metadata = get_global_expert_location_metadata()
    except Exception:
        # Before the engine has its resources.
        return None
    if metadata is None:
        return None
    running = metadata.physical_to_logical_map_cpu.numpy()
    return running if len(running) == layers else None
