"""SGLang's entry point: adds ``--eplb-algorithm moetuner``.

Tested with 0.5.23.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.tensors import find_group, find_process_rank, make_eplb_tensors, read_array

LOG = Log(logging.getLogger("moetuner.plugins"))
LATE = "the placement takes effect at the first rebalance, not at model load"
ALGORITHM = "moetuner"
OPTIONS = f"--enable-eplb --eplb-algorithm {ALGORITHM}"
EPLB = "sglang.srt.eplb."
# Seconds that ranks wait for each other before they load weights.
WAIT_AT_LOAD = 120.0


def register() -> None:
    """Put hooks around SGLang's balancing algorithms.

    SGLang knows the name of ours in any case. Without ``MOETUNER_`` variables, or with wrong ones,
    its own algorithm runs under that name; otherwise the server would end at the first rebalance.
    """
    has_balancer = False
    try:
        balancer = Balancer.from_environment(LOG, "SGLang")
        has_balancer, hooks = balancer is not None, Hooks(balancer)
        targets: dict[str, Callable[..., Any]] = {
            "eplb_algorithms.compute_algorithm": hooks.compute_algorithm
        }
        if has_balancer:
            targets["eplb_algorithms.rebalance_experts"] = hooks.rebalance_experts
            targets["expert_location.ExpertLocationMetadata.init_trivial"] = hooks.init_trivial
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for target, hook in targets.items():
            HookRegistry.register(EPLB + target, hook, HookType.AROUND)
    except Exception as error:
        # Another version: SGLang would not start if this were raised.
        if has_balancer:
            LOG.warn(f"SGLang keeps its own algorithms: {error!r}")


class Hooks:
    """Hooks around SGLang's functions; they leave other algorithms than ours alone.

    In a version of SGLang with other arguments or names, its own functions run.
    """

    def __init__(self, balancer: Balancer | None) -> None:
        self.balancer = balancer
        self._original: Callable[..., Any] | None = None
        # Layers with experts, by the number of layers that the engine counts.
        self._sparse: dict[int, list[int]] = {}

    def compute_algorithm(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return SGLang's algorithm for a name, or ours."""
        self._original = original
        if ALGORITHM not in (*arguments, *named.values()):
            return original(*arguments, **named)
        if self.balancer is not None:
            return ALGORITHM
        LOG.warn(
            "neither MOETUNER_PLACEMENT nor MOETUNER_REBALANCE is set: SGLang's own algorithm "
            "decides",
            find_process_rank(),
        )
        return original(
            *("auto" if value == ALGORITHM else value for value in arguments),
            **{name: "auto" if value == ALGORITHM else value for name, value in named.items()},
        )

    def init_trivial(
        self, original: Callable[..., Any], model_config: Any, *arguments: Any, **named: Any
    ) -> Any:
        """Return the placement for loading the model: the stored one, if ranks agree."""
        trivial = original(model_config, *arguments, **named)
        if self.balancer is None or trivial is None:
            return trivial
        rank = find_process_rank()
        try:
            first = self._choose_first_map(self.balancer, model_config, trivial, rank)
            placed = trivial
            if first is not None:
                placed = type(trivial).init_by_mapping(model_config, first, *arguments, **named)
            running = placed.physical_to_logical_map_cpu.numpy()
            name = self.balancer.name_model(len(running))
            self.balancer.confirm(running, int(trivial.ep_size), name)
            return placed
        except Exception as error:
            # Another version, on all ranks alike.
            LOG.warn(f"{LATE}: {error!r}", rank)
            return trivial

    def _choose_first_map(
        self, balancer: Balancer, model_config: Any, trivial: Any, rank: int
    ) -> Any:
        """Return the stored map [L,P] for loading, None for SGLang's first map."""
        LOG.say(balancer.registered, rank)
        chosen = chosen_algorithm()
        if chosen != ALGORITHM:
            if balancer.settings.decides and chosen is not None:
                LOG.warn(f"does nothing without {OPTIONS}", rank)
            return None
        running = trivial.physical_to_logical_map_cpu.numpy()
        layers, slots = running.shape
        ranks, experts = int(trivial.ep_size), int(trivial.num_logical_experts)
        name = getattr(model_config, "model_path", None)
        self._sparse[layers] = list_sparse_layers(model_config, layers)
        balancer.take_model(layers, name)
        sizes = slots, None, 1, ranks
        first = balancer.decide(
            np.zeros((layers, experts), dtype=np.int64),
            *sizes,
            running,
            group=lambda: find_group(coordinator),
            model=name,
            rank=rank,
            wait=WAIT_AT_LOAD,
            form=lambda slots: make_eplb_tensors(slots, ranks, experts)[0],
            sparse=self._sparse[layers],
        )
        return None if first is None or (first.numpy() == running).all() else first

    def rebalance_experts(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return three tensors: experts of slots, slots of experts, and copies."""
        named |= dict(zip(inspect.signature(original).parameters, arguments, strict=False))
        try:
            maps = self._rebalance(**named)
        except Exception as error:
            # Another version, on all ranks alike.
            LOG.warn(f"SGLang's own algorithm decides: {error!r}", find_process_rank())
            maps = None
        if maps is not None:
            return maps
        if named.get("algorithm") == ALGORITHM:
            assert self._original is not None
            parameters = inspect.signature(self._original).parameters
            # SGLang chooses by some of the arguments.
            arguments_of_choice = {
                name: value for name, value in named.items() if name in parameters
            }
            named["algorithm"] = self._original("auto", **arguments_of_choice)
        return original(**named)

    def _rebalance(
        self,
        tokens_per_expert: Any,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
        **_: Any,
    ) -> Any:
        """Return our maps; None if SGLang's own algorithm decides."""
        assert self.balancer is not None
        loads, rank = read_array(tokens_per_expert), find_process_rank()
        self.balancer.record(loads, rank)
        if algorithm != ALGORITHM:
            return None
        ranks, experts = num_physical_experts // num_local_physical_experts, loads.shape[-1]
        layers, sizes = loads.shape[-2], (num_physical_experts, num_groups, num_nodes, ranks)
        maps = self.balancer.decide(
            loads,
            *sizes,
            running_map(layers),
            group=lambda: find_group(coordinator),
            model=self.balancer.name_model(layers),
            rank=rank,
            # Two copies of an expert on a rank are refused here: SGLang would fill only one.
            form=lambda slots: make_eplb_tensors(slots, ranks, experts),
            sparse=self._sparse.get(layers, []),
        )
        if maps is None:
            return None
        return tuple(tensor.to(tokens_per_expert.device) for tensor in maps)


def list_sparse_layers(model_config: Any, layers: int) -> list[int]:
    """List the layers with experts by a model's configuration; empty if it does not say."""
    config: Any = getattr(model_config, "hf_text_config", None)
    config = config or getattr(model_config, "hf_config", None)
    first = getattr(config, "first_k_dense_replace", None)
    frequency = getattr(config, "moe_layer_freq", None)
    dense = getattr(config, "mlp_only_layers", None)
    step = getattr(config, "decoder_sparse_step", 1)
    kinds = getattr(config, "mlp_layer_types", None)
    if isinstance(kinds, list):
        return [layer for layer, kind in enumerate(kinds[:layers]) if kind == "sparse"]
    if isinstance(frequency, list):
        return [layer for layer, sparse in enumerate(frequency[:layers]) if sparse]
    if isinstance(first, int) and frequency in (None, 1):
        return list(range(first, layers))
    if isinstance(dense, list) and isinstance(step, int) and step > 0:
        return [n for n in range(layers) if n not in dense and (n + 1) % step == 0]
    return []


def coordinator() -> Any:
    """Return SGLang's group of ranks that exchange experts; None if one rank decides for all."""
    from sglang.srt.distributed import get_tp_group

    try:
        from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

        elastic = ElasticEPStateManager.instance()
    except ImportError:
        elastic = None
    if elastic is not None and getattr(elastic, "has_scaled", False):
        # After scaling, rank 0 alone decides, and broadcasts its map.
        return None
    return get_tp_group()


def chosen_algorithm() -> str | None:
    """Return the value of ``--eplb-algorithm``; None if this version hides it."""
    try:
        from sglang.srt.runtime_context import get_exec

        return str(get_exec().moe.eplb_algorithm)
    except Exception as error:
        LOG.warn(f"{LATE}: {error!r}")
        return None


def running_map(layers: int) -> Any:
    """Return the running experts of slots [L,P]; None if nothing runs yet."""
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
