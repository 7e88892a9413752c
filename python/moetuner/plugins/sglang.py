"""SGLang's entry point: makes ``--eplb-algorithm moetuner`` known.

Tested with 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.tensors import group_of, rank_of_process, three_maps

LOG = Log(logging.getLogger("moetuner.plugins"))
ALGORITHM = "moetuner"
OPTIONS = f"--enable-eplb --eplb-algorithm {ALGORITHM}"
EPLB = "sglang.srt.eplb."
# Seconds that ranks wait for each other before they load weights.
WAIT_AT_LOAD = 120.0


def register() -> None:
    """Put hooks around SGLang's balancing algorithms.

    The name of ours is known in any case: without ``MOETUNER_`` variables, or with bad ones,
    SGLang's own algorithm answers to it. It would end the server at the first rebalance otherwise.
    """
    balancer = Balancer.of(LOG, "SGLang")
    hooks = Hooks(balancer)
    targets: dict[str, Callable[..., Any]] = {
        "eplb_algorithms.compute_algorithm": hooks.compute_algorithm
    }
    if balancer is not None:
        targets["eplb_algorithms.rebalance_experts"] = hooks.rebalance_experts
        targets["expert_location.ExpertLocationMetadata.init_trivial"] = hooks.init_trivial
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for target, hook in targets.items():
            HookRegistry.register(EPLB + target, hook, HookType.AROUND)
    except Exception as error:
        if balancer is not None:
            LOG.warn(f"SGLang keeps its own algorithms: {error!r}")


class Hooks:
    """What stands around SGLang's functions; other algorithms than ours pass through."""

    def __init__(self, balancer: Balancer | None) -> None:
        self.balancer = balancer
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
        if raw_algorithm != ALGORITHM:
            return original(raw_algorithm, num_groups, num_nodes)
        if self.balancer is not None:
            return ALGORITHM
        LOG.warn(
            "neither MOETUNER_PLACEMENT nor MOETUNER_REBALANCE is set: SGLang's own algorithm "
            "decides",
            rank_of_process(),
        )
        return original("auto", num_groups, num_nodes)

    def init_trivial(
        self, original: Callable[..., Any], model_config: Any, moe_ep_rank: int
    ) -> Any:
        """Return where experts are when the model is loaded: as stored, if ranks agree."""
        trivial = original(model_config, moe_ep_rank)
        balancer, rank = self.balancer, rank_of_process()
        if balancer is None or trivial is None:
            return trivial
        LOG.say(f"in use: {balancer.purpose}", rank)
        chosen = chosen_algorithm()
        if chosen != ALGORITHM:
            if balancer.settings.decides and chosen is not None:
                LOG.warn(f"does nothing without {OPTIONS}", rank)
            return trivial
        running = trivial.physical_to_logical_map_cpu.numpy()
        layers, slots = running.shape
        ranks, experts = int(trivial.ep_size), int(trivial.num_logical_experts)
        first = balancer.decide(
            np.zeros((layers, experts), dtype=np.int64),
            slots,
            None,
            1,
            ranks,
            running,
            group=lambda: group_of(coordinator),
            rank=rank,
            wait=WAIT_AT_LOAD,
            form=lambda slots: three_maps(slots, ranks, experts)[0],
        )
        if first is None or (first.numpy() == running).all():
            return trivial
        try:
            return type(trivial).init_by_mapping(model_config, first, moe_ep_rank)
        except Exception as error:
            # Another version, on all ranks alike.
            LOG.warn(f"serves from the first rebalance on, not from the load on: {error!r}", rank)
            return trivial

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
        assert self.balancer is not None
        loads, rank = tokens_per_expert.detach().cpu().numpy(), rank_of_process()
        self.balancer.record(loads, rank)
        if algorithm == ALGORITHM:
            ranks, experts = num_physical_experts // num_local_physical_experts, loads.shape[-1]
            maps = self.balancer.decide(
                loads,
                num_physical_experts,
                num_groups,
                num_nodes,
                ranks,
                running_map(loads.shape[-2]),
                group=lambda: group_of(coordinator),
                rank=rank,
                # Two copies of an expert on a rank are refused here: SGLang would fill only one.
                form=lambda slots: three_maps(slots, ranks, experts),
            )
            if maps is not None:
                return tuple(of.to(tokens_per_expert.device) for of in maps)
            assert self._theirs is not None
            algorithm = self._theirs("auto", num_groups, num_nodes)
        return original(
            tokens_per_expert=tokens_per_expert,
            num_physical_experts=num_physical_experts,
            num_local_physical_experts=num_local_physical_experts,
            num_groups=num_groups,
            num_nodes=num_nodes,
            algorithm=algorithm,
        )


def coordinator() -> Any:
    """Return the ranks that exchange experts, None where one decides for all."""
    from sglang.srt.distributed import get_tp_group

    try:
        from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

        elastic = ElasticEPStateManager.instance()
    except ImportError:
        elastic = None
    if elastic is not None and getattr(elastic, "has_scaled", False):
        # From then on rank 0 alone decides, and broadcasts its map.
        return None
    return get_tp_group()


def chosen_algorithm() -> str | None:
    """Return the value of ``--eplb-algorithm``, None where this version hides it."""
    try:
        from sglang.srt.runtime_context import get_exec

        return str(get_exec().moe.eplb_algorithm)
    except Exception as error:
        LOG.warn(f"serves from the first rebalance on, not from the load on: {error!r}")
        return None


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
