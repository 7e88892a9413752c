"""Expert state: the weights in slots, saved and loaded expert by expert.

A slot means nothing without the placement, and every rank has a slot 0. An expert's number means
the same on all ranks, so states of all ranks are one checkpoint, for any placement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetuner.placement import EMPTY


class ByExpert:
    """Weights by names such as ``3.up``, which are attributes as well: first ``3``, then ``up``.

    So ``torch.distributed.checkpoint`` finds what the keys of a state name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    def __getattr__(self, name: str) -> Any:
        """Give the weight of that name, or those whose names begin with it."""
        weights = self.__dict__.get("weights", {})
        if name in weights:
            return weights[name]
        below = {
            key[len(name) + 1 :]: w for key, w in weights.items() if key.startswith(f"{name}.")
        }
        if not below:
            raise AttributeError(f"no expert or weight {name!r}")
        return ByExpert(below)


def by_expert(weights: Mapping[str, Tensor], slots: Sequence[int]) -> ByExpert:
    """Give the weights [S,..] of slots that hold experts [S] one by one, as views."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for slot, expert in enumerate(slots):
            if expert != EMPTY:
                found.setdefault(f"{expert}.{name}", weight[slot])
    return ByExpert(found)


def own_tensors(experts: object, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a module's parameters and buffers, by name, that its weights are or are views of."""
    if not isinstance(experts, nn.Module):
        return {}
    parts = {id(part) for weight in weights.values() for part in (weight, weight._base)}
    held = (
        *experts.named_parameters(remove_duplicate=False),
        *experts.named_buffers(remove_duplicate=False),
    )
    return {name: tensor for name, tensor in held if id(tensor) in parts}


def renewed(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give new memory for weights [S,..], of the type and where the given ones are."""
    found = {}
    for name, weight in weights.items():
        like = next((w for key, w in given.items() if key.partition(".")[2] == name), weight)
        found[name] = like.new_zeros(weight.shape)
    return found


def fill(
    weights: Mapping[str, Tensor],
    slots: Sequence[int],
    given: Mapping[str, Any],
    num_experts: int,
) -> tuple[list[str], list[str], list[str]]:
    """Copy the weights of experts into their slots [S].

    Parameters
    ----------
    weights
        Weights by name [S,..].
    slots
        Experts of the slots, -1 for none.
    given
        Weights by expert and name; those of experts that are elsewhere are left out.
    num_experts
        Number of experts E.

    Returns
    -------
    tuple of lists
        Names that are missing, names that nobody knows, and what else is wrong.
    """
    missing: dict[str, None] = {}
    wrong: list[str] = []
    for name, weight in weights.items():
        for slot, expert in enumerate(slots):
            key = f"{expert}.{name}"
            if expert == EMPTY:
                continue
            if key not in given:
                missing[key] = None
            elif given[key].shape != weight.shape[1:]:
                found, needed = list(given[key].shape), list(weight.shape[1:])
                wrong.append(f"{key} must be {needed}, got {found}")
            else:
                with torch.no_grad():
                    weight[slot].copy_(given[key])
    strange = []
    for key in given:
        number, _, name = key.partition(".")
        if not (number.isdecimal() and int(number) < num_experts and name in weights):
            strange.append(key)
    return list(missing), strange, wrong
