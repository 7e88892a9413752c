"""What a forward pass was given: how many sequences and tokens, and which of them are padding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetuner.torch.generation import GenerateHooks, Generation

# The new name first: transformers warns where the old one is looked up.
CACHE_NAMES = ("cache", "past_key_values")
# Where the sequences of a packed row begin and end.
PACKED = "cu_seq_lens_q"


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one forward pass.

    Attributes
    ----------
    rows
        Sequences, B.
    length
        Tokens of each, padding included, S.
    keep
        Which tokens are not padding [B*S], boolean, on the device of the mask; None if all are.
    cache
        The key-value cache that was passed in, or the generation that goes without, which tells a
        later step of the same sequences.
    paged
        Whether tokens of many sequences, each with a past, stand in one row.
    """

    rows: int
    length: int
    keep: Tensor | None
    cache: object | None
    paged: bool = False

    @property
    def tokens(self) -> int:
        """Tokens with padding, T = B*S."""
        return self.rows * self.length


def arguments_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of ``model.forward`` by name."""
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def batch_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mask: Tensor | None = None,
    generations: GenerateHooks | None = None,
) -> Batch:
    """Read the arguments of a forward pass.

    Parameters
    ----------
    model
        The module that is called.
    args, kwargs
        What it is called with.
    mask
        Used instead of the argument ``attention_mask``.
    generations
        What is known of the model's ``generate``.

    Raises
    ------
    ValueError
        If there are no tokens to be found, or the mask does not fit them.
    """
    given = arguments_of(model, args, kwargs)
    rows, length = _sizes(model, given)
    generation = generations.of(given) if generations is not None else None
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    packed = given.get(PACKED)
    if mask is None:
        mask = given.get("attention_mask")
        if generation is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = generation.mask
    if isinstance(packed, Tensor) and rows == 1:
        # Sequences one after the other, and padding behind the last; the mask is of pairs.
        keep: Tensor | None = torch.arange(length, device=packed.device) < packed[-1]
    else:
        keep = None if mask is None else _kept(mask, rows, length)
    if generation is not None:
        keep = _generated(keep, rows, length, cache, generation)
        cache = generation if cache is None else cache
    return Batch(rows, length, keep, cache, isinstance(packed, Tensor) and cache is not None)


def cache_of(output: object) -> object | None:
    """Give the key-value cache that a model returned, if it did."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def _sizes(model: nn.Module, given: Mapping[str, Any]) -> tuple[int, int]:
    named = [given.get(name) for name in ("input_ids", "inputs_embeds")]
    for tokens in [*named, *given.values()]:
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            # A matrix of numbers is tokens by features, without a batch.
            flat = tokens.dim() == 2 and tokens.is_floating_point()
            return (1, tokens.shape[0]) if flat else (tokens.shape[0], tokens.shape[1])
    raise ValueError(
        f"{type(model).__name__} must be called with input_ids [batch, tokens] or inputs_embeds, "
        f"got {sorted(given)}"
    )


def _kept(mask: object, rows: int, length: int) -> Tensor:
    """Last ``length`` columns of a mask: the earlier ones are tokens of earlier steps."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] with a batch of {rows}, got {found}; where "
            "the model is called with another, set the recorder's attention_mask"
        )
    if mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must have at least {length} tokens, got {list(mask.shape)}"
        )
    return (mask[:, mask.shape[1] - length :] != 0).reshape(-1)


def _generated(
    keep: Tensor | None, rows: int, length: int, cache: object | None, generation: Generation
) -> Tensor | None:
    """Leave out sequences that have ended and, without a cache, tokens that were there before."""
    if cache is None:
        first, generation.seen = generation.seen, length
        if 0 < first < length:
            new = (torch.arange(length) >= first).repeat(rows)
            keep = new if keep is None else keep & new.to(keep.device)
    ended = generation.ended
    if ended is not None and len(ended) == rows:
        goes_on = ~ended.repeat_interleave(length)
        keep = goes_on if keep is None else keep.to(goes_on.device) & goes_on
    return keep
