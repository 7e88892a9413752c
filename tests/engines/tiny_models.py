"""Tiny Mixture-of-Experts checkpoints for real engines, and what transformers routes in them.

The models are made from configs with seeded weights, so nothing is downloaded; the tokenizer knows
the 256 bytes. Hidden sizes are multiples of 32, as vLLM's CPU kernels want.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch

END = 256  # the one token that is no byte
LAYERS = 4
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
COMMON = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "tie_word_embeddings": False,
}
WIDE = {"head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 64}
TOP = {"num_experts_per_tok": 4, "norm_topk_prob": True}
QWEN = {**WIDE, **TOP, "num_experts": 16}
# Name: architecture and what its config has beyond COMMON. Layer 0 of the second is dense, and of
# the last, whose router chooses among groups; SGLang knows no dense layers in a Qwen3-MoE.
MODELS = {
    "qwen3_moe": ("Qwen3Moe", QWEN),
    "qwen3_moe_dense": ("Qwen3Moe", {**QWEN, "mlp_only_layers": [0]}),
    # Its experts take most of a step, also on a CPU, and its routers choose the first half of them.
    "qwen3_moe_hot": ("Qwen3Moe", {**QWEN, "hidden_size": 256, "moe_intermediate_size": 1024}),
    "mixtral": (
        "Mixtral",
        {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "olmoe": (
        "Olmoe",
        # SGLang has as many heads of keys as of queries there, like the models that are released.
        {
            "intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 4,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **WIDE,
            **TOP,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
        },
    ),
}

# Models whose routers choose the first half of the experts for most tokens.
HOT = ("qwen3_moe_hot",)


def prompts(lengths: tuple[int, ...] = (5, 17, 40)) -> list[list[int]]:
    """Return token ids of prompts of these lengths, the same ones always."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


def tokenizer():
    """Return a tokenizer of bytes with an end token and a chat template that only joins."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: at for at, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": END}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<end>", pad_token="<end>", chat_template=CHAT
    )


def build(name: str, folder: Path) -> Path:
    """Write the checkpoint ``name`` below ``folder`` unless it is there; return its folder."""
    import transformers

    target = folder / name
    if (target / "tokenizer.json").exists():  # written last
        return target
    architecture, extra = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**{**COMMON, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() >= 2:  # strong enough that other experts would say other tokens
                weight.normal_(0, 0.4 if key.endswith("gate.weight") else 0.15)
            if name in HOT and key.endswith("gate.weight"):
                weight[: len(weight) // 2] *= 4
    model.save_pretrained(target)
    tokenizer().save_pretrained(target)
    return target


def trained(checkpoint: Path, name: str, pattern: str = "") -> Path:
    """Write a checkpoint beside another, with the weights that match far from where they were."""
    import shutil

    from safetensors.torch import load_file, save_file

    target = checkpoint.with_name(name)
    if (target / "tokenizer.json").exists():
        return target
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("tokenizer.json"))
    tensors, random = load_file(checkpoint / "model.safetensors"), torch.Generator().manual_seed(7)
    for key, weight in sorted(tensors.items()):
        step = 0.5 * weight.std() * torch.randn(weight.shape, generator=random)
        if weight.dim() > 1 and re.search(pattern, key):
            tensors[key] = (weight + step).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint / "tokenizer.json", target)
    return target


def fused(checkpoint: Path, name: str) -> Path:
    """Write a checkpoint of Qwen3-MoE beside itself, with all experts of a layer in one tensor."""
    import shutil

    from safetensors.torch import load_file, save_file

    target = checkpoint.with_name(name)
    if (target / "tokenizer.json").exists():
        return target
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("tokenizer.json"))
    tensors = load_file(checkpoint / "model.safetensors")
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack(
                [
                    tensors.pop(f"{experts}.{expert}.{kind}_proj.weight")
                    for expert in range(QWEN["num_experts"])
                ]
            )
            for kind in ("gate", "up", "down")
        )
        tensors[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{experts}.down_proj"] = down
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint / "tokenizer.json", target)
    return target


def truth(checkpoint: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """Compute the experts [T,L,K] of every token of every sequence, best first, MoE layers only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    chosen: dict[int, np.ndarray] = {}
    for key, module in model.named_modules():
        if type(module).__name__.endswith("Router"):
            layer = int(key.split("layers.")[1].split(".")[0])
            module.register_forward_hook(
                lambda _module, _input, output, layer=layer: chosen.__setitem__(
                    layer, output[2].numpy()
                )
            )
    actual = []
    for ids in sequences:
        with torch.no_grad():
            model(torch.tensor([ids]))
        actual.append(np.stack([chosen[layer] for layer in sorted(chosen)], axis=1))
    return actual


def greedy(checkpoint: Path, prompt: list[int], tokens: int) -> list[int]:
    """Compute the likeliest continuation of a prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


if __name__ == "__main__":
    for name in MODELS:
        build(name, Path(sys.argv[1]))
