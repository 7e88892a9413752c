"""Names of tensors: whose expert's they are, and which MoE block a row of a placement is about.

Those of transformers and of the original checkpoints (one tensor per expert, or all experts
stacked), and Megatron's (``local_experts.3``, ``linear_fc1.weight3``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Tensors of experts: of one of them, by its number, or of all.
EXPERT = re.compile(
    r"(?P<head>(?:(?P<block>.+)\.)?experts\.(?:(?:local_experts\.)?(?=\d+\.)"
    r"|linear_fc[12]\.(?:weight|bias)(?=\d+$)))(?P<expert>\d+)(?P<tail>.*)"
)
STACKED = re.compile(r"(?:(?P<block>.+)\.)?experts\.(?P<rest>.+)")
LAYER = re.compile(r"layers?\.(\d+)\.")

# Blocks that predict further tokens, which are numbered for themselves.
PREDICTS = re.compile(r"(^|[._])(mtp|nextn|multi_token)", re.IGNORECASE)

# Up to the last number in the name of a block: its layer.
UP_TO_LAYER = re.compile(r"(?:.*\.)?\d+(?=\.|$)")


class ExpertName(NamedTuple):
    """A tensor of experts: its block, and of one expert its number and the name around that.

    Of all experts ``tail`` is the name within them.
    """

    block: str
    head: str = ""
    expert: str | None = None
    tail: str = ""

    @property
    def is_padded(self) -> bool:
        """Whether the number has leading zeros."""
        return self.expert is not None and len(self.expert) > 1 and self.expert.startswith("0")


def part_of(name: str) -> ExpertName | None:
    """Return what a name says of experts; None if it is of none."""
    if (one := EXPERT.fullmatch(name)) is not None:
        return ExpertName(one["block"] or "", one["head"], one["expert"], one["tail"])
    stacked = STACKED.fullmatch(name)
    return None if stacked is None else ExpertName(stacked["block"] or "", tail=stacked["rest"])


def parts_of(names: Iterable[str]) -> dict[str, ExpertName]:
    """Return the tensors of experts."""
    parts = ((name, part_of(name)) for name in names)
    return {name: part for name, part in parts if part is not None}


def widths_of(parts: Iterable[ExpertName]) -> dict[str, int]:
    """Return the digits of experts' numbers with leading zeros, by the name before the number."""
    return {part.head: len(part.expert or "") for part in parts if part.is_padded}


def layer_number(block: str) -> int:
    """Return the number of the layer that a block is in."""
    layer = LAYER.search(f"{block}.")
    numbers = [part for part in block.split(".") if part.isdigit()]
    return int(layer[1]) if layer else int(numbers[-1]) if numbers else 0


def predicts(block: str, hidden_layers: int | None) -> bool:
    """Return whether a block is beyond the model's own layers: it predicts further tokens."""
    beyond = hidden_layers is not None and layer_number(block) >= hidden_layers
    return beyond or PREDICTS.search(block) is not None


def blocks_of(names: Iterable[str], layers: int, hidden_layers: int | None) -> list[str]:
    """Return the MoE blocks of a checkpoint that a placement is about, by layer.

    Of the model's ``hidden_layers`` dense ones count too. What predicts further tokens comes last,
    and keeps its order if the placement does not speak of it.
    """

    def place(block: str) -> tuple[bool, int, list[tuple[int, str]]]:
        parts = [(int(word), "") if word.isdigit() else (-1, word) for word in block.split(".")]
        return predicts(block, hidden_layers), layer_number(block), parts

    ordered = sorted({part.block for part in parts_of(names).values()}, key=place)
    if len(ordered) > layers:
        ordered = [block for block in ordered if not predicts(block, hidden_layers)]
    if len(ordered) != layers:
        rule = f"as many layers as the checkpoint has MoE layers, {len(ordered)}"
        raise ValueError(f"placement must have {rule}, got {layers}")
    starts = {_start(block): block for block in ordered if not predicts(block, hidden_layers)}
    if len(starts) > 1:
        first, second, *_ = starts.values()
        raise ValueError(
            f"placement must be about one stack of layers, got {first} and {second}: "
            "apply_placement takes them in the model's order"
        )
    return ordered


def _start(block: str) -> str:
    """Return what the blocks of a stack of layers have in common: the name before the number."""
    layer = LAYER.search(f"{block}.") or re.search(r"\d+(?=\.|$)", block)
    return block[: layer.start()] if layer else ""
