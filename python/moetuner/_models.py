"""Sizes of the experts of public models, so that predicted times are of the model at hand."""

from __future__ import annotations

import re
from typing import Protocol

from moetuner.cost import HIDDEN, INTERMEDIATE, CostModel

# Whose times count when nobody says.
DEFAULT_GPU = "h100"

# Hidden and intermediate size of a routed expert: `hidden_size` and `moe_intermediate_size` (where
# that is missing `intermediate_size`, of dbrx `d_model` and `ffn_hidden_size`) of the config.json
# that the model was published with. A name stands for itself and whatever comes after it and "-" or
# ".", such as "-instruct" or "-v0.1".
SIZES = {
    "dbrx": (6144, 10752),
    "deepseek-moe-16b": (2048, 1408),
    "deepseek-r1": (7168, 2048),
    "deepseek-v2": (5120, 1536),
    "deepseek-v2-lite": (2048, 1408),
    "deepseek-v3": (7168, 2048),
    "glm-4.5": (5120, 1536),
    "glm-4.5-air": (4096, 1408),
    "glm-4.6": (5120, 1536),
    "gpt-oss-120b": (2880, 2880),
    "gpt-oss-20b": (2880, 2880),
    "kimi-k2": (7168, 2048),
    "llama-4-maverick": (5120, 8192),
    "llama-4-scout": (5120, 8192),
    "minimax-m2": (3072, 1536),
    "mixtral-8x22b": (6144, 16384),
    "mixtral-8x7b": (4096, 14336),
    "olmoe-1b-7b": (2048, 1024),
    "phi-3.5-moe": (4096, 6400),
    "qwen1.5-moe-a2.7b": (2048, 1408),
    "qwen2-57b-a14b": (3584, 2560),
    "qwen3-235b-a22b": (4096, 1536),
    "qwen3-30b-a3b": (2048, 768),
    "qwen3-coder-30b-a3b": (2048, 768),
    "qwen3-coder-480b-a35b": (6144, 2560),
    "qwen3-next-80b-a3b": (2048, 512),
}


class Named(Protocol):
    """Traces and statistics: they may know their model, and the sizes of its experts."""

    @property
    def model(self) -> str | None:
        """Name of the model."""
        ...

    @property
    def expert_size(self) -> tuple[int, int] | None:
        """Hidden and intermediate size of an expert."""
        ...


def known_as(model: str | None) -> str | None:
    """Return the name under which a model's sizes are known; None if they are not."""
    if model is None:
        return None
    # Names on hubs come after an owner; people write the rest as they like.
    name = re.sub(r"[\s_]+", "-", model.strip().rsplit("/", 1)[-1].lower())
    fits = [known for known in SIZES if re.match(rf"{re.escape(known)}([-.]|$)", name)]
    return max(fits, key=len, default=None)


def cost_model_of(traffic: Named, gpu: str = DEFAULT_GPU) -> CostModel:
    """Return the roofline of a GPU with the experts of a traffic's model.

    Sizes that were recorded come first, then those of a public model of that name; where neither is
    known they are DeepSeek-V3's. The name says whose they are.
    """
    known = known_as(traffic.model)
    if traffic.expert_size is not None:
        (hidden, intermediate), whose = traffic.expert_size, traffic.model or "as recorded"
    elif known is not None:
        (hidden, intermediate), whose = SIZES[known], known
    else:
        hidden, intermediate = HIDDEN, INTERMEDIATE
        whose = "deepseek-v3, as INPUT's model is not known"
    name = f"{gpu}:{hidden}x{intermediate} ({whose})"
    return CostModel.preset(gpu, hidden=hidden, intermediate=intermediate, name=name)
