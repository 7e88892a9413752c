"""Tiny models of every architecture, from configurations; who imports this skips without torch."""

import os

import numpy as np
import pytest

import moetuner as mt

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

# Nothing here may ask the network for anything; two threads would only wait for each other.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "num_experts_per_tok": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
DEEPSEEK = {
    **LATENT,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
# Class names without Config and ForCausalLM, and what is special.
ARCHITECTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 16, "mlp_only_layers": [1], "head_dim": 8},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8}),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {**DEEPSEEK, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v3_groups": ("DeepseekV3", {**DEEPSEEK, "n_group": 4, "topk_group": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "head_dim": 8}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 8, "head_dim": 8}),
    "phimoe": ("Phimoe", {"num_local_experts": 8}),
}


def build(name, *, seed=0, **changes):
    """Build the model of an architecture with random weights, biases too."""
    torch.manual_seed(seed)
    stem, special = ARCHITECTURES[name]
    config = getattr(transformers, f"{stem}Config")(**{**SIZES, **special, **changes})
    config.bos_token_id = None
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # As they come, they are so small or equal that a wrong permutation could go unseen.
            if "gate.weight" in key or "router.weight" in key:
                tensor.normal_(std=0.5)
            elif "bias" in key:
                tensor.normal_(std=0.1)
            elif "experts" in key:
                tensor.normal_(std=0.2)
    return model


def prompts(rows=3, length=7, *, seed=1):
    """Token ids [rows,length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def logits(model, tokens=None):
    """Logits of the prompts."""
    with torch.no_grad():
        return model(input_ids=prompts(8, 16) if tokens is None else tokens).logits


def random_placement(layers, experts, devices, *, groups=1, seed=0):
    """Random placement with equal counts that keeps groups of experts whole."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in range(layers):
        runs = np.arange(experts).reshape(groups, -1)
        if groups == 1:
            slots.append(rng.permutation(experts))
        else:
            slots.append(np.concatenate([rng.permutation(run) for run in rng.permutation(runs)]))
    return mt.Placement(np.stack(slots).reshape(layers, devices, -1), num_experts=experts)
