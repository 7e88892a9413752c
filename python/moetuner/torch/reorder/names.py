"""Parse names of tensors: their expert, and the MoE block of each row of a placement.

It parses names of transformers and of original checkpoints (one tensor per expert, or all experts
stacked), and names of Megatron (``local_experts.3``, ``linear_fc1.weight3``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Names of tensors of one expert, with its number, and of all experts stacked.
EXPERT = re.compile(
    r"(?P<head>(?:(?P<block>.+)\.)?experts\.(?:(?:local_experts\.)?(?=\d+\.)"
    r"|linear_fc[12]\.(?:weight|bias)(?=\d+$)))(?P<expert>\d+)(?P<tail>.*)"
)
STACKED = re.compile(r"(?:(?P<block>.+)\.)?experts\.(?P<rest>.+)")
LAYER = re.compile(r"layers?\.(\d+)\.")

# Blocks of multi-token prediction (MTP), whose layers are numbered by themselves.
MTP = re.compile(r"(^|[._])(mtp|nextn|multi_token)", re.IGNORECASE)

# The name of a block up to its last number: its layer.
UP_TO_LAYER = re.compile(r"(?:.*\.)?\d+(?=\.|$)")


class ExpertName(NamedTuple):
    """The parsed name of a tensor of experts.

    Parameters
    ----------
    block
        Name of the MoE block.
    head, expert, tail
        Number of the expert, and the text before and behind it. For all experts stacked, the number
        is None and ``tail`` is the name within the experts.
    """

    block: str
    head: str = ""
    expert: str | None = None
    tail: str = ""

    @property
    def is_padded(self) -> bool:
        """Whether the number has leading zeros."""
        return self.expert is not None and len(self.expert) > 1 and self.expert.startswith("0")


def parse_name(name: str) -> ExpertName | None:
    """Parse the name of a tensor; None if it is not of experts."""
    if (single := EXPERT.fullmatch(name)) is not None:
        return ExpertName(single["block"] or "", single["head"], single["expert"], single["tail"])
    stacked = STACKED.fullmatch(name)
    return None if stacked is None else ExpertName(stacked["block"] or "", tail=stacked["rest"])


def parse_names(names: Iterable[str]) -> dict[str, ExpertName]:
    """Return the parsed names of tensors of experts, by name."""
    pairs = ((name, parse_name(name)) for name in names)
    return {name: expert_name for name, expert_name in pairs if expert_name is not None}


def find_number_widths(names: Iterable[ExpertName]) -> dict[str, int]:
    """Return the number of digits of experts' numbers with leading zeros, by the text before."""
    return {name.head: len(name.expert or "") for name in names if name.is_padded}


def find_layer(block: str) -> int:
    """Return the number of the layer that a block is in."""
    layer = LAYER.search(f"{block}.")
    numbers = [word for word in block.split(".") if word.isdigit()]
    return int(layer[1]) if layer else int(numbers[-1]) if numbers else 0


def is_mtp(block: str, hidden_layers: int | None) -> bool:
    """Return whether a block is of multi-token prediction, beyond the model's hidden layers."""
    is_beyond = hidden_layers is not None and find_layer(block) >= hidden_layers
    return is_beyond or MTP.search(block) is not None


def find_blocks(names: Iterable[str], layers: int, hidden_layers: int | None) -> list[str]:
    """Return the MoE blocks of a checkpoint for the layers of a placement, in their order.

    ``hidden_layers`` counts dense layers, too. Blocks of multi-token prediction come last. They are
    left out, and keep their order of experts, if the placement has no layers for them.
    """

    def sort_key(block: str) -> tuple[bool, int, list[tuple[int, str]]]:
        words = [(int(word), "") if word.isdigit() else (-1, word) for word in block.split(".")]
        return is_mtp(block, hidden_layers), find_layer(block), words

    blocks = {expert_name.block for expert_name in parse_names(names).values()}
    ordered = sorted(blocks, key=sort_key)
    if len(ordered) > layers:
        ordered = [block for block in ordered if not is_mtp(block, hidden_layers)]
    if len(ordered) != layers:
        rule = f"as many layers as the checkpoint has MoE layers, {len(ordered)}"
        raise ValueError(f"placement must have {rule}, got {layers}")
    starts = {_start(block): block for block in ordered if not is_mtp(block, hidden_layers)}
    if len(starts) > 1:
        first, second, *_ = starts.values()
        raise ValueError(
            f"placement must be about one stack of layers, got {first} and {second}: "
            "apply_placement takes them in the model's order"
        )
    return ordered


def _start(block: str) -> str:
    """Return the name of a block up to its layer's number, which a stack of layers shares."""
    layer = LAYER.search(f"{block}.") or re.search(r"\d+(?=\.|$)", block)
    return block[: layer.start()] if layer else ""
