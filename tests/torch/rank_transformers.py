"""Checks of real transformers models whose experts moetuner places, which processes run."""

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
from rank_layer import message, on
from transformers import AutoModelForCausalLM as AnyModel
from transformers import DistributedConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import moetuner as mt
from moetuner.torch import Rebalancer, RoutingCounters, register_placement

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_experts_per_tok": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
EIGHT = {"num_local_experts": 8, "intermediate_size": 12, "max_position_embeddings": 64}
DENSE = {"num_experts": 8, "moe_intermediate_size": 12, "mlp_only_layers": [0]}
CONFIGS = {
    "mixtral": (MixtralConfig, EIGHT),
    "qwen3_moe": (Qwen3MoeConfig, DENSE),
    "gpt_oss": (GptOssConfig, EIGHT),
}
TOKENS = torch.arange(2 * 11).reshape(2, 11) * 7 % 64


def write_models(rank, folder):
    """Write a small random model of each family, and its logits in one process."""
    for family, (kind, more) in CONFIGS.items():
        torch.manual_seed(0)
        model = AnyModel.from_config(kind(**SMALL, **more)).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(f"{folder}/{family}")
        with torch.no_grad():
            np.save(f"{folder}/{family}.npy", model(TOKENS).logits.numpy())


def load(folder, family, *, layers=3, spare=1, tp=True, seed=1, **options):
    """Load a model whose experts a random placement has: the model, that, and its layers."""
    ranks = dist.get_world_size()
    slots = random_slots(np.random.default_rng(seed), layers, ranks, 8, spare)
    placement = mt.Placement(slots, num_experts=8)
    sizes = {"tp_size" if tp else "fsdp_size": ranks, "ep_size": ranks}
    config = DistributedConfig(**sizes, ep_implementation="moetuner")
    placed = register_placement(placement, **options)
    # Plain products, which take matrices of any size and type.
    how = {} if spare else {"experts_implementation": "eager"}
    how |= {"distributed_config": config}
    model = AnyModel.from_pretrained(f"{folder}/{family}", **how)
    return model.eval(), placement, placed


def is_right(folder, family, logits, tokens=slice(None), tolerance=1e-5):
    """Return whether logits are those of one process."""
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    expected = np.load(f"{folder}/{family}.npy")[:, tokens]
    return np.abs(logits.detach().float().numpy() - expected).max() < tolerance


@on(2, 4)
def test_logits_and_traffic_of_one_batch(rank, folder):
    """Logits are those of one process, and every row is predicted by the router's ids."""
    other = {2: ("gpt_oss", 3), 4: ("qwen3_moe", 2)}[dist.get_world_size()]
    for family, layers in (("mixtral", 3), other):
        model, placement, placed = load(folder, family, layers=layers)
        chosen = []
        for name, module in model.named_modules():
            if name.endswith((".gate", ".router")):
                module.register_forward_hook(lambda _module, _in, out, to=chosen: to.append(out[2]))
        with torch.no_grad():
            assert is_right(folder, family, model(TOKENS).logits)
        ids = torch.stack(chosen, dim=1).numpy()
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=8)
        predicted = mt.evaluate(placement, trace, home="blocks").traffic["dispatch"]
        counted = np.stack([layer.traffic.rows_sent for layer in placed])
        assert counted.any()
        assert np.array_equal(counted, predicted[:, rank])


@on(2, 8)
def test_batches_of_their_own(rank, folder):
    """Data-parallel ranks with batches of different lengths, through nodes, nearest copies."""
    options = {"devices_per_node": 2, "split": "nearest"}
    model, *_ = load(folder, "mixtral", tp=False, seed=2, **options)
    own = slice(5 + rank)
    with torch.no_grad():
        assert is_right(folder, "mixtral", model(TOKENS[:, own]).logits, own)


@on(4)
def test_a_model_is_rebalanced(rank, folder):
    """Its experts move while it serves, and its logits stay."""
    model, placement, placed = load(folder, "gpt_oss")
    cost = mt.CostModel(base_us=5, expert_us=5, start_us=5, token_us=10, token_bytes=64)
    with torch.no_grad(), RoutingCounters.attach(model) as counters:
        assert is_right(folder, "gpt_oss", model(TOKENS).logits)
        rebalancer = Rebalancer(placed, cost, steps_ahead=10**9)
        # One batch on all ranks, so each has counted all of it.
        rebalancer.observe(counters.statistics())
        assert rebalancer.load.sum() == 3 * TOKENS.numel() * 2
        rebalancer.observe(2 ** np.arange(8) * np.ones((3, 1)))
        assert rebalancer.step().moved
        assert is_right(folder, "gpt_oss", model(TOKENS).logits)
    assert placed[0].placement.diff(placement).experts_moved


@on(2)
def test_a_placement_of_another_model_is_refused(rank, folder):
    """On every rank an error comes before the first step."""
    model, *_ = load(folder, "mixtral", layers=2)
    error = message(ValueError, model, TOKENS)
    assert "placement must have 3 layers like the model, got 2" in error


@on(2)
def test_weights_outside_the_parameters_are_refused(rank, folder):
    """Quantisers keep them there, nobody could send them: an error on every rank names them."""
    for outside in (lambda weight: weight, lambda weight: {"scales": [weight]}):
        model, *_ = load(folder, "gpt_oss")
        for module in model.modules():
            if type(module).__name__ == "GptOssExperts":
                weight = module._parameters.pop("down_proj").detach()
                module.packed = outside(weight.to_local())
        error = message(ValueError, model, TOKENS)
        assert "MoE layer 0: the weights of GptOssExperts must be its own parameters" in error
        assert "packed" in error


@on(2)
def test_a_placed_model_is_not_saved_but_changes_its_type(rank, folder):
    """Saving and loading are refused on every rank, no weights are written; experts move along."""
    model, *_ = load(folder, "mixtral", spare=0)
    with torch.no_grad():
        model(TOKENS)
        for use, given in (
            (model.save_pretrained, f"{folder}/saved-{rank}"),
            (model.load_state_dict, {}),
            (lambda path: torch.save(model.state_dict(), path), f"{folder}/saved.pt"),
        ):
            error = message(NotImplementedError, use, given)
            assert "whose experts are placed cannot be saved" in error
        assert not list(Path(folder).rglob("saved*/*.safe*"))
        logits = model.bfloat16()(TOKENS).logits
    largest = np.abs(np.load(f"{folder}/mixtral.npy")).max()
    assert is_right(folder, "mixtral", logits, tolerance=0.1 * largest)
