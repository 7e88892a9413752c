"""vLLM's entry point: replaces its load balancer's policy, where the environment asks for it.

Tested with 0.32 and 0.33. Up to 0.18 a policy returned three tensors, from 0.19 on one.
"""

from __future__ import annotations

import logging
from typing import Any

from moetuner.plugins.policy import Policy, asked
from moetuner.plugins.tensors import rank_of_process, three_maps

# A child of vLLM's logger, so that lines appear among its own.
LOG = logging.getLogger("vllm.moetuner")


def register() -> None:
    """Put our policy in the place of vLLM's default; nothing without ``MOETUNER_`` variables.

    vLLM calls this in every process, some of them several times.
    """
    settings = asked(LOG, "vLLM keeps its own policy")
    if settings is None:
        return
    try:
        from vllm.distributed.eplb.policy import EPLB_POLICIES

        theirs = EPLB_POLICIES["default"]
        if not hasattr(theirs, "moetuner"):
            EPLB_POLICIES["default"] = policy_class(theirs, Policy(settings, LOG))
    except Exception as error:
        # Another version: vLLM would not start if this were raised.
        LOG.warning("moetuner: vLLM keeps its own policy: %r", error)


def policy_class(theirs: Any, policy: Policy) -> Any:
    """Return a policy class of vLLM that decides by ours, and by ``theirs`` where ours fails."""
    import torch

    returns_three = (
        "tuple" in str(theirs.rebalance_experts.__annotations__.get("return", "")).lower()
    )

    class MoetunerPolicy(theirs):  # type: ignore[misc]
        """moetuner's placement in vLLM's expert-parallel load balancer."""

        moetuner = policy

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            sizes = (num_replicas, num_groups, num_nodes, num_ranks)
            try:
                rank = rank_of_process()
                loads = weight.detach().cpu().numpy()
                policy.record(loads, rank)
                if policy.decides:
                    old = old_global_expert_indices
                    old = None if old is None else old.cpu().numpy()
                    slots = policy.decide(loads, *sizes, old, rank=rank)
                    if not returns_three:
                        return torch.from_numpy(slots)
                    return three_maps(slots, num_ranks, loads.shape[1])
            except Exception as error:
                policy.failed("vLLM's own policy decides", error)
            return theirs.rebalance_experts(weight, *sizes, old_global_expert_indices)

    return MoetunerPolicy
