"""What the processes of the transformers tests do."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# What the processes would import one by one.
import transformers.distributed.fsdp
import transformers.distributed.tensor_parallel
import transformers.models.gpt_oss.modeling_gpt_oss
import transformers.models.mixtral.modeling_mixtral
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from placements import random_slots
from transformers import (
    AutoModelForCausalLM,
    DistributedConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import moetuner as mt
from moetuner.torch import Rebalancer, RoutingCounters, register_placement

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "mixtral": (MixtralConfig, {"num_local_experts": 8, "intermediate_size": 12}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 8, "moe_intermediate_size": 12, "mlp_only_layers": [0]},
    ),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 8, "intermediate_size": 12}),
}
TOKENS = torch.arange(2 * 11).reshape(2, 11) * 7 % 64


def save_models(rank, folder):
    """Write a small random model of each family; gives the logits of one process."""
    logits = {}
    for family, (kind, more) in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**SMALL, **more)).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(f"{folder}/{family}")
        with torch.no_grad():
            logits[family] = model(TOKENS).logits.numpy()
    return logits


def many(rank, folder, calls):
    """Call functions of this file with a model's folder, layers and a seed: what they give."""
    results = []
    for name, family, layers, seed in calls:
        try:
            results.append(globals()[name](rank, f"{folder}/{family}", layers, seed))
        except ValueError as error:
            results.append(str(error))
    return results


def shared_batch(rank, folder, layers, seed):
    """All ranks hold one batch: logits, whether rows are counted as predicted, and their number."""
    ranks = dist.get_world_size()
    rng = np.random.default_rng(seed)
    placement = mt.Placement(random_slots(rng, layers, ranks, 8, 1), num_experts=8)
    placed = register_placement(placement)
    config = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation="moetuner")
    logits, ids = run(folder, config, TOKENS)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=8)
    predicted = mt.evaluate(placement, trace, home="blocks").traffic["dispatch"]
    counted = np.stack([layer.traffic.rows_sent for layer in placed])
    return logits, np.array_equal(counted, predicted[:, rank]), int(counted.sum())


def own_batches(rank, folder, layers, seed):
    """Every rank has a batch of its own, the last one a longer one: give its logits."""
    ranks = dist.get_world_size()
    rng = np.random.default_rng(seed)
    placement = mt.Placement(random_slots(rng, layers, ranks, 8, 1), num_experts=8)
    register_placement(placement, devices_per_node=2, split="nearest")
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="moetuner")
    return run(folder, config, TOKENS[:, : 5 + rank])[0]


def rebalanced(rank, folder, layers, seed):
    """Give logits before and after a move, and whether it was counted and experts have moved."""
    ranks = dist.get_world_size()
    slots = random_slots(np.random.default_rng(seed), layers, ranks, 8, 1)
    placed = register_placement(mt.Placement(slots, num_experts=8))
    config = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation="moetuner")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    cost = mt.CostModel(base_us=5, expert_us=5, start_us=5, token_us=10, token_bytes=64)
    with torch.no_grad(), RoutingCounters.attach(model) as counters:
        before = model(TOKENS).logits
        rebalancer = Rebalancer(placed, cost, steps_ahead=10**9)
        # One batch on all ranks, so each has counted all of it.
        rebalancer.observe(counters.statistics())
        counted = rebalancer.load.sum() == layers * TOKENS.numel() * 2
        rebalancer.observe(2 ** np.arange(8) * np.ones((layers, 1)))
        decision = rebalancer.step()
        after = model(TOKENS).logits
    moved = placed[0].placement.diff(mt.Placement(slots, num_experts=8)).experts_moved
    return before.float().numpy(), after.float().numpy(), decision.moved and moved > 0 and counted


def saved(rank, folder, layers, seed):
    """Give what a placed model says when it is saved and loaded, and the files that are left."""
    model = placed_model(folder, layers, seed)
    said = []
    target = f"{folder}-{rank}"
    for use in (
        lambda: model.save_pretrained(target),
        lambda: model.load_state_dict({}),
        lambda: torch.save(model.state_dict(), f"{target}.pt"),
    ):
        try:
            use()
        except NotImplementedError as error:
            said.append(str(error))
    return said, [str(path) for path in Path(folder).parent.rglob(f"{Path(target).name}*/*.safe*")]


def in_half(rank, folder, layers, seed):
    """Give logits of a model that is made one of bfloat16 after its experts were placed."""
    with torch.no_grad():
        return placed_model(folder, layers, seed).bfloat16()(TOKENS).logits.float().numpy()


def placed_model(folder, layers, seed):
    """Load a model, and run it once, so that its experts are placed."""
    ranks = dist.get_world_size()
    slots = random_slots(np.random.default_rng(seed), layers, ranks, 8, 0)
    register_placement(mt.Placement(slots, num_experts=8))
    config = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation="moetuner")
    # Plain products, which take matrices of any size and type.
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        model(TOKENS)
    return model


def run(folder, config, tokens):
    """Load, and run once: logits, and ids [T,L,K]."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    chosen = []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")):
            module.register_forward_hook(lambda _module, _in, out: chosen.append(out[2]))
    with torch.no_grad():
        logits = model(tokens).logits
    if hasattr(logits, "full_tensor"):
        logits = logits.full_tensor()
    return logits.float().numpy(), torch.stack(chosen, dim=1).numpy()
