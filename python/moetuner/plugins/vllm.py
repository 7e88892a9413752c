"""vLLM's entry point: replaces its load balancer's policy if the environment asks for it.

Tested with 0.32 and 0.33. Up to 0.18 a policy returned three tensors, from 0.19 on one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

from moetuner.plugins.balancer import Balancer
from moetuner.plugins.files import DRAFT
from moetuner.plugins.log import Log
from moetuner.plugins.tensors import find_group, find_process_rank, make_eplb_tensors, read_array
from moetuner.plugins.updates import follow_updates, wrap
from moetuner.serving.engines import tokens_per_rank

# A child of vLLM's logger, so that lines appear among its own.
LOG = Log(logging.getLogger("vllm.moetuner"))
LATE = "the placement takes effect at the first rearrangement, not at model load"
POLICIES, STATES = "vllm.distributed.eplb.policy", "vllm.distributed.eplb.eplb_state"
# The policy that is replaced, and what is said where another one decides, as on Ascend.
POLICY = "default"
OTHER_POLICY = (
    "never asked: policy {} of the engine decides; pass --eplb-config.policy default to serve "
    "moetuner's maps"
)
# Seconds that a rank waits for others at the load, which takes some longer than others.
WAIT_AT_LOAD = 120.0


def register() -> None:
    """Replace vLLM's default policy by ours; do nothing without ``MOETUNER_`` variables.

    vLLM calls this in every process, in some several times, and would not start if it raised.
    """
    try:
        if _is_registered() or (balancer := Balancer.from_environment(LOG, "vLLM")) is None:
            return
        replaced = attempt("vLLM keeps its own policy", lambda: replace_policy(balancer))
        if replaced and balancer.settings.decides:
            attempt(LATE, lambda: place_at_load(load_name(STATES, "EplbState"), balancer))
        if balancer.settings.updates:
            lost = "weights that change do not follow experts that move"
            attempt(lost, lambda: follow_experts(balancer))
        lost = "does not say that it is registered"
        attempt(lost, lambda: announce(load_name("vllm.config", "VllmConfig"), balancer))
    except Exception as error:
        LOG.warn(f"vLLM keeps its own policy: {error!r}")


def attempt(lost: str, step: Callable[[], None]) -> bool:
    """Run a step of the registration; warn and return False if this version of vLLM differs."""
    try:
        step()
    except Exception as error:
        LOG.warn(f"{lost}: {error!r}")
        return False
    return True


def _is_registered() -> bool:
    with contextlib.suppress(Exception):
        return hasattr(sys.modules[POLICIES].EPLB_POLICIES[POLICY], "moetuner")
    return False


def replace_policy(balancer: Balancer) -> None:
    """Replace vLLM's default policy by ours."""
    policies = load_name(POLICIES, "EPLB_POLICIES")
    if POLICY not in policies:
        raise LookupError(f"it has none named {POLICY}, but {', '.join(map(str, policies))}")
    policies[POLICY] = make_policy_class(policies[POLICY], balancer)


def follow_experts(balancer: Balancer) -> None:
    """Make weights that change follow the experts."""
    layers = _find("vllm.model_executor.layers.fused_moe.routed_experts", "RoutedExperts")
    worker = _find("vllm.v1.worker.gpu_worker", "Worker")
    settings = balancer.settings
    rearranges = not settings.placements or settings.reload is not None
    states = load_name(STATES, "EplbState")
    follow_updates(states, layers, worker, LOG, rearranges=rearranges)


def load_name(module: str, name: str) -> Any:
    """Return a name of a module of vLLM."""
    return getattr(importlib.import_module(module), name)


def _find(module: str, name: str) -> Any:
    """Return a name of a module of vLLM; None if this version does not have it."""
    with contextlib.suppress(Exception):
        return load_name(module, name)
    return None


def announce(configurations: Any, balancer: Balancer) -> None:
    """Log that the plugin is there, once the engine has its ``VllmConfig`` and its log."""
    # Engines have many processes; only the first one logs for those that start like it.
    rank = int(multiprocessing.parent_process() is not None)

    def announced(post_init: Any, self: Any, *arguments: Any, **named: Any) -> None:
        post_init(self, *arguments, **named)
        with contextlib.suppress(AttributeError):
            parallel = self.parallel_config
            policy = getattr(getattr(parallel, "eplb_config", None), "policy", POLICY)
            if not parallel.enable_eplb:
                LOG.warn("does nothing without --enable-eplb", rank)
            elif policy != POLICY:
                LOG.warn(OTHER_POLICY.format(policy), rank)
            else:
                LOG.say(balancer.registered, rank, once=True)

    wrap(configurations, "__post_init__", "announces", announced)


def coordinator() -> Any:
    """Return vLLM's group of ranks that exchange experts."""
    from vllm.distributed.parallel_state import get_ep_group

    return get_ep_group()


def make_policy_class(theirs: Any, balancer: Balancer) -> Any:
    """Make a policy class that decides by ours, and by ``theirs`` (vLLM's) if ours fails."""
    import torch

    returns_three = (
        "tuple" in str(theirs.rebalance_experts.__annotations__.get("return", "")).lower()
    )

    class MoetunerPolicy(theirs):  # type: ignore[misc]
        """moetuner's placement in vLLM's expert-parallel load balancer."""

        moetuner = balancer

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
            loads = read_array(weight)
            rank = find_process_rank()
            balancer.record(loads, rank)
            old = old_global_expert_indices
            maps = balancer.decide(
                loads,
                *sizes,
                None if old is None else old.cpu().numpy(),
                group=lambda: find_group(coordinator),
                model=balancer.name_model(len(loads)),
                rank=rank,
                sparse=None,
                form=lambda slots: (
                    make_eplb_tensors(slots, num_ranks, loads.shape[1])
                    if returns_three
                    else torch.from_numpy(slots)
                ),
            )
            if maps is not None:
                return maps
            return theirs.rebalance_experts(weight, *sizes, old_global_expert_indices)

    return MoetunerPolicy


def place_at_load(states: Any, balancer: Balancer) -> None:
    """Put a stored placement in force when a model is added to ``states`` (``EplbState``).

    That is after its weights were loaded and before it serves: all ranks are there, and vLLM's own
    rearrangement moves the weights. With elastic expert parallelism ranks may come one by one; then
    the first rearrangement puts the placement in force.
    """
    wrap(states, "add_model", "places", functools.partial(_add_and_place, balancer))
    if hasattr(states, "rearrange"):
        wrap(states, "rearrange", "confirms", functools.partial(_rearrange_and_confirm, balancer))


def _rearrange_and_confirm(
    balancer: Balancer, rearrange: Any, self: Any, *arguments: Any, **named: Any
) -> Any:
    result = rearrange(self, *arguments, **named)
    if named.get("is_profile", arguments[:1] == (True,)):
        # Its maps are not taken: weights stay where they are.
        balancer.expect_nothing()
    elif not (balancer.is_placing or getattr(self, "is_async", True)):
        with contextlib.suppress(Exception):
            for state in self.model_states.values():
                confirm(state, state.model, balancer)
    return result


def confirm(state: Any, model: Any, balancer: Balancer) -> None:
    """Compare the map that a model of vLLM runs with the one that ranks took."""
    running = read_array(state.physical_to_logical_map)
    ranks = model.num_physical_experts // model.num_local_physical_experts
    balancer.confirm(running, ranks, balancer.name_model(len(running)))


def _add_and_place(
    balancer: Balancer, add_model: Any, self: Any, *arguments: Any, **named: Any
) -> Any:
    added = add_model(self, *arguments, **named)
    arguments_by_name = dict(zip(("model", "model_config"), arguments, strict=False)) | named
    with contextlib.suppress(Exception):
        warn_of_traps(
            arguments_by_name["model"], arguments_by_name["model_config"], self.parallel_config
        )
    if not getattr(getattr(self, "parallel_config", None), "enable_elastic_ep", False):
        drafts = getattr(arguments_by_name.get("model_config"), "runner_type", "") == "draft"
        place(self, arguments_by_name.get("model"), balancer, drafts=drafts)
    return added


def place(states: Any, model: Any, balancer: Balancer, *, drafts: bool = False) -> None:
    """Put a stored placement in force for the model that was just added to an ``EplbState``.

    ``drafts`` says whether it is a draft model, which earlier versions of vLLM do not mark by name.
    """
    try:
        models = states.model_states
        added, state = list(models.items())[-1]
        running = state.physical_to_logical_map.cpu().numpy().copy()
        name = getattr(state, "model_name", None)
        if name and drafts and not name.endswith(DRAFT):
            name += DRAFT
        load = running[:, : model.num_logical_experts] * 0
        ranks = model.num_physical_experts // model.num_local_physical_experts
        sizes = (model.num_physical_experts, model.num_expert_groups, 1, ranks)
        rearrange, asynchronous = states.rearrange, states.is_async
        policy = getattr(states, "policy", None)
    except Exception as error:
        # Another version, on all ranks alike.
        LOG.warn(f"{LATE}: {error!r}")
        return
    if not (policy is None or hasattr(policy, "moetuner")):
        name_of_policy = getattr(policy, "__name__", type(policy).__name__)
        LOG.warn(OTHER_POLICY.format(name_of_policy), find_process_rank())
        return
    balancer.take_model(len(running), name, weigh_expert(model))
    # Ranks that follow live loads take part as well, as here all ranks compare their files.
    maps = balancer.decide(
        load,
        *sizes,
        running,
        group=lambda: find_group(coordinator),
        model=name,
        rank=find_process_rank(),
        wait=WAIT_AT_LOAD,
        quiet=True,
        sparse=None,
    )
    if maps is None:
        return
    if not (maps == running).all():
        # The asynchronous balancer can rearrange like the synchronous one. Only the added model
        # moves: without load yet, vLLM would make all copies of another those of its first expert.
        states.is_async, states.model_states, balancer.is_placing = False, {added: state}, True
        try:
            rearrange()
        finally:
            states.is_async, states.model_states = asynchronous, models
            balancer.is_placing = False
    balancer.expect(maps, running, ranks, balancer.name_model(len(running)))
    confirm(state, model, balancer)


def weigh_expert(model: Any) -> int:
    """Return the bytes of an expert of a layer; 0 if this version does not say."""
    with contextlib.suppress(Exception):
        first = [weight[0] for weight in model.expert_weights[0]]
        return sum(weight.numel() * weight.element_size() for weight in first)
    return 0


def warn_of_traps(model: Any, model_config: Any, parallel_config: Any) -> None:
    """Warn of known faults of this version of vLLM that matter once experts move."""
    names = {type(module).__name__ for module in model.modules()}
    if any("FusedMoE" in name and "LoRA" in name for name in names):
        LOG.warn(
            "adapters (LoRA) of experts: vLLM slices them by ep_rank * num_experts (pull request "
            "40867), so that experts which moved may get the adapter of others"
        )
    quantization = str(getattr(model_config, "quantization", None) or "")
    if any(kind in quantization for kind in ("fp4", "fp8", "compressed", "modelopt")):
        from vllm.model_executor.models import interfaces

        if not hasattr(interfaces, "get_mixture_of_experts_model"):
            LOG.warn(
                f"{quantization} weights: scales move with their expert since vLLM's pull request "
                "48355, which this version does not have; compare answers before and after"
            )
    slots = model.num_physical_experts
    backend = getattr(parallel_config, "all2all_backend", "")
    if slots > model.num_logical_experts and backend == "deepep_low_latency":
        most_tokens = tokens_per_rank(model_config.get_hidden_size(), slots)
        LOG.warn(
            f"deepep_low_latency: with {slots} slots its buffer of 32 GiB takes {most_tokens} "
            "tokens a rank at most, and vLLM does not check it (issue 57894)"
        )
