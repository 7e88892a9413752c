"""What of a model's state depends on the order of its experts, in memory and in checkpoints alike.

Names and shapes are all there is to tell by. What is known to depend on the order moves with the
experts, what is known not to stays, and whatever else could is refused: a model that chooses other
experts without a word is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner.torch.reorder.order import ROUTER_NAMES

# What a router holds per expert, experts first.
ROWS = (
    "weight",
    "bias",
    "e_score_correction_bias",
    "expert_bias",
    "router_bias",
    "per_expert_scale",
)

# Tables of experts' ids: the ids change, and nothing moves.
TABLES = ("tid2eid",)

# Names that speak of choosing experts, wherever in a layer they stand.
CHOOSES = re.compile(r"router|expert|e_score|eid|correction|(^|[._])moe([._]|$)")

# Names of what computes the same for every order of the experts, and of what does if it does not
# speak of choosing.
APART = re.compile(r"(^|\.)shared?_|(^|\.)shared?\.|attn|attention|mamba|conv|rotary|rope")
DENSE = re.compile(r"norm|embed|(^|\.)(mlp|ffn|feed_forward|dense)\.")

# Whole numbers that come with quantised weights and with positions.
PACKED = re.compile(r"qweight|qzeros|g_idx|perm|weight_(shape|packed|zero_point)|position|quant")

# Up to the last number in the name of a block: its layer.
LAYER = re.compile(r"(?:.*\.)?\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorFacts:
    """Shape of a tensor, and whether it holds whole numbers of 16 bits or more."""

    shape: tuple[int, ...]
    is_whole: bool


def facts_of(tensor: Tensor) -> TensorFacts:
    """Return what decides how a tensor depends on the order of experts."""
    fractions = tensor.is_floating_point() or tensor.is_complex()
    return TensorFacts(tuple(tensor.shape), not fractions and tensor.element_size() > 1)


def bits_of(tensor: Tensor, experts: int) -> NDArray[np.uint8]:
    """Return the bytes of a tensor for each expert [E,..]: not every type can be indexed."""
    rows = tensor.detach().reshape(experts, -1).cpu().contiguous()
    bits: NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return bits


def dependents(
    tensors: Mapping[str, TensorFacts],
    routers: Mapping[str, str | None],
    experts: int,
    others: Iterable[str] = (),
) -> dict[str, tuple[str, bool]]:
    """Return what depends on the order of the experts, apart from the experts themselves.

    Parameters
    ----------
    tensors
        The tensors of a model by name, without those of the experts.
    routers
        Name of every MoE block that is put in order, with that of its router; None if the router
        is a child with a usual name.
    experts
        Number of experts E.
    others
        Names of MoE blocks that keep their order.

    Returns
    -------
    dict
        By name: the block, and whether it holds ids of experts, not a row for each.
    """
    others = set(others)
    places = sorted({*routers, *others}, key=len, reverse=True)
    layers: dict[str, list[str]] = {}
    for block in routers:
        if (layer := LAYER.match(block)) is not None:
            layers.setdefault(f"{layer[0]}.", []).append(block)
    depends: dict[str, tuple[str, bool]] = {}
    weights: dict[str, str] = {}
    for name, facts in tensors.items():
        place = next((place for place in places if _is_under(name, place)), None)
        if place in others or math.prod(facts.shape) <= 1:
            continue
        if place is not None:
            block, path = place, name[len(place) + 1 :] if place else name
            kind = _kind(path, facts, experts, routes=_routes(name, path, routers[block]))
        else:
            beside = next((start for start in layers if name.startswith(start)), "")
            path = name[len(beside) :]
            if not _may_choose(path, facts, experts, in_layer=bool(beside)):
                continue
            # Beside a block, in its layer: state of its router under another name.
            block, *more = layers.get(beside, [""])
            kind = None if more or not beside else _kind(path, facts, experts, routes=True)
        _check_kind(name, facts, experts, block, kind, weights)
        if kind:
            depends[name] = block, kind == "ids"
    return depends


def _check_kind(
    name: str,
    facts: TensorFacts,
    experts: int,
    block: str,
    kind: str | None,
    weights: dict[str, str],
) -> None:
    """Refuse what may depend on the order, and a second matrix of a router."""
    if kind is None:
        raise ValueError(
            f"{name}: {list(facts.shape)} may depend on the order of experts in a way that "
            "is not known"
        )
    # Of two matrices in a row one has rows per expert, and nobody can say which.
    is_weight = kind == "rows" and name.endswith("weight")
    if is_weight and weights.setdefault(block, name) != name:
        raise ValueError(
            f"{name}: {list(facts.shape)} must be the only weight of its router with "
            f"{experts} rows, {weights[block]} is another"
        )


def renumbered(name: str, table: Tensor, new: NDArray[np.int64]) -> Tensor:
    """Return a table of experts' ids with the new number of every old expert [E]."""
    old = table.long()
    if table.numel() and not 0 <= int(old.min()) <= int(old.max()) < len(new):
        raise ValueError(
            f"{name}: must hold experts 0 to {len(new) - 1}, got {int(old.min())} to "
            f"{int(old.max())}"
        )
    return torch.from_numpy(new).to(old.device)[old].to(table.dtype)


def _kind(path: str, facts: TensorFacts, experts: int, *, routes: bool) -> str | None:
    """Return "rows" or "ids" of what depends on the order, "" of what does not, None if unknown."""
    shape, last = facts.shape, path.rpartition(".")[2]
    chooses = routes or CHOOSES.search(path) is not None
    if APART.search(path) or (not chooses and DENSE.search(path)):
        return ""
    if last in TABLES and facts.is_whole:
        return "ids"
    # Under an unknown name there could be any matrix of as many rows.
    is_state = last in ROWS and "norm" not in path and (chooses or "." not in path)
    if is_state and (shape[0] == experts or shape == (1, experts)):
        return "rows"
    if not routes and last in ("weight", "bias") and experts not in shape:
        return ""  # a matrix before or behind the experts
    if chooses:
        return "" if ("norm" in path or last == "scale") and experts not in shape else None
    return None if experts in shape or facts.is_whole else ""


def _may_choose(path: str, facts: TensorFacts, experts: int, *, in_layer: bool) -> bool:
    """Whether what stands outside of all blocks has to be looked at."""
    if APART.search(path):
        return False
    if not in_layer:
        return CHOOSES.search(path) is not None and (experts in facts.shape or facts.is_whole)
    return CHOOSES.search(path) is not None or (facts.is_whole and not PACKED.search(path))


def _routes(name: str, path: str, router: str | None) -> bool:
    if router is not None:
        return _is_under(name, router)
    return any(part in ROUTER_NAMES for part in path.split("."))


def _is_under(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
