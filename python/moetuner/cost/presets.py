"""Sizes and weights of published models by their names, and the cost models that follow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from moetuner.cost.model import HIDDEN, INTERMEDIATE, WEIGHT_BITS, CostModel, Sizes
from moetuner.presets import (
    BITS_IN_NAMES,
    FOUR_BIT_WAYS,
    MEASURED,
    MODELS,
    OTHER_MODELS,
    OWN_SIZES,
)
from moetuner.recording import Recording

# Times are of this GPU by default.
DEFAULT_GPU = "h100"


def public_name(model: str | None) -> str | None:
    """Return the name under which a model's sizes are known; None if they are not."""
    if model is None:
        return None
    # Names on hubs come after an owner; people write the rest as they like.
    name = re.sub(r"[\s_]+", "-", model.strip().rstrip("/").rsplit("/", 1)[-1].lower())
    fits = [public for public in MODELS if re.match(rf"{re.escape(public)}([-.]|$)", name)]
    public = max(fits, key=len, default="")
    further_words = set(_words(name[len(public) :]))
    sizes = {word for word in further_words if re.fullmatch(r"\d+b", word)}
    return None if further_words & OTHER_MODELS or sizes - OWN_SIZES else public or None


@cache
def experts_of_served(name: str, top_k: int, experts: int | None = None) -> int | None:
    """Return the experts of a layer of a model by its name on a server; None if they are unknown.

    A server calls a model as its user likes. A name says something where it is that of a published
    model with as many experts per token, and in a layer if those are known.
    """
    model = MODELS.get(public_name(name) or "")
    if model is None or model.top_k != top_k or experts not in (None, model.experts):
        return None
    return model.experts


def size_of_expert(traffic: Recording) -> tuple[int, int] | None:
    """Return hidden and intermediate size of an expert, recorded or published; None if unknown."""
    public = MODELS.get(public_name(traffic.model) or "")
    return traffic.expert_size or (None if public is None else public[:2])


def type_in_name(model: str | None) -> str | None:
    """Return the type of weights that a checkpoint's name says, such as "fp8"; None for none."""
    name = re.sub(r"(?<!\d)(\d)[-_ ]bit", r"\1bit", (model or "").lower())
    types = [word for word in _words(name) if word in BITS_IN_NAMES]
    types = [word for word in types if word not in FOUR_BIT_WAYS] or types
    bits = [BITS_IN_NAMES[word] for word in types]
    # Where two types contradict each other, as bf16 and int4, the type is unknown.
    return types[0] if types and max(bits) - min(bits) < 1 else None


def _words(name: str) -> list[str]:
    """Return the words of a name in small letters, whatever is between them."""
    return re.findall(r"[a-z0-9]+", name)


def weight_bits_of(model: str | None) -> float:
    """Return the bits of a model's weights: by its name, else as published, else 8."""
    type_of_weights, public = type_in_name(model), public_name(model)
    if type_of_weights is not None:
        return BITS_IN_NAMES[type_of_weights]
    return WEIGHT_BITS if public is None else MODELS[public].weight_bits


def top_k_of(traffic: Recording) -> int | None:
    """Return experts per token, as recorded or as the public model has them; else None."""
    public = MODELS.get(public_name(traffic.model) or "")
    recorded: int | None = traffic.top_k
    return recorded or (None if public is None else public.top_k)


def bytes_of_expert(
    size: Sequence[int] | None, model: str | None, weight_bits: float | None = None
) -> float | None:
    """Return the bytes of an expert of one layer; None where its size is not known.

    Its weights have ``weight_bits``, by default those of the model.
    """
    public = MODELS.get(public_name(model) or "")
    size = size or (None if public is None else public[:2])
    bits = weight_bits_of(model) if weight_bits is None else weight_bits
    return None if size is None else 3.0 * size[0] * size[1] * bits / 8


def cost_model_of(
    traffic: Recording, gpu: str = DEFAULT_GPU, weight_bits: float | None = None
) -> CostModel:
    """Return the roofline of a GPU with the experts of the model of a trace or statistics.

    Where their size is not known they are DeepSeek-V3's, and weights have ``weight_bits``, by
    default those of the model. The name says whose they are.
    """
    if weight_bits is None and gpu not in MEASURED:
        weight_bits = weight_bits_of(traffic.model)
    hidden, intermediate = size_of_expert(traffic) or (HIDDEN, INTERMEDIATE)
    why = "traffic names no model" if traffic.model is None else f"{traffic.model:.40} is not known"
    public = public_name(traffic.model)
    sizes: Sizes = "published" if public is not None else "assumed"
    whose = public or f"deepseek-v3, as {why}"
    if traffic.expert_size is not None:
        sizes, whose = "recorded", traffic.model or "as recorded"
    model = CostModel.preset(gpu, hidden=hidden, intermediate=intermediate, weight_bits=weight_bits)
    return replace(model, name=f"{model.name} ({whose})", sizes=sizes)
