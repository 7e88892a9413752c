"""A trainer's checkpoints of the tiny Qwen3-MoE, and their tokens as transformers computes them.

`base` is the model itself, `step` has all weights elsewhere, and `part` is `base` with two experts
of one layer from `step`. All three say different tokens.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tiny_models
from serving import EXPERTS, SLOTS, TOKENS, any_placement, model

BASE = "qwen3_moe"
TWO_EXPERTS = r"layers\.1\.mlp\.experts\.(3|4)\."


@cache
def checkpoint(name: str) -> Path:
    """Return one of the checkpoints."""
    if name == "base":
        return model(BASE)
    pattern = "" if name == "step" else TWO_EXPERTS
    return tiny_models.trained(model(BASE), f"{BASE}_{name}", pattern)


@cache
def all_tokens() -> dict[str, list[list[int]]]:
    """Return the tokens of every checkpoint; assert that no two say the same."""
    said = {
        name: [
            tiny_models.greedy(checkpoint(name), prompt, TOKENS) for prompt in tiny_models.prompts()
        ]
        for name in ("base", "step", "part")
    }
    assert len({str(tokens) for tokens in said.values()}) == len(said)
    return said


def tokens_of(name: str, count: int = TOKENS) -> list[list[int]]:
    """Return the first tokens that a checkpoint says."""
    return [tokens[:count] for tokens in all_tokens()[name]]


def placement() -> Path:
    """Return a placement unlike any engine's own, with copies."""
    return any_placement("updates", tiny_models.LAYERS, EXPERTS, SLOTS)
