"""Counting pairs of experts on the device, in whichever of two ways is faster at the size.

Adding one per pair costs K*K additions at scattered places per token; a product of one-hot matrices
costs E*E multiplications, which are far cheaper each. Both are exact: the sums of a product stay
below 2**24, where every integer is a float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The product is faster up to this many experts per top-k. CPU: 5 ns per addition, 0.027 ns per
# multiplication on one core (AVX-512), so E*E * 0.027 < K*K * 5. CUDA: from data sheets (3e9
# atomic additions and 2.5e13 float32 multiplications a second), not measured.
PRODUCT_UP_TO = {"cpu": 13, "cuda": 90}

# Bytes of one-hot matrices, or of places to add to, at a time.
CHUNK_BYTES = 32 << 20


def add_pairs(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    """Add pairs of experts to a table, without waiting for the device.

    Parameters
    ----------
    table
        Counts [L,E,E], int64, contiguous; changed in place.
    first, second
        Expert ids [T,L,K], int64; each of ``first`` pairs with each of ``second``.
    keep
        Tokens that count [T]; None counts all.
    """
    tokens, layers, top_k = first.shape
    experts = table.shape[1]
    if not tokens or not layers:
        return
    product = experts <= top_k * PRODUCT_UP_TO.get(table.device.type, 0)
    token_bytes = layers * (8 * experts if product else 16 * top_k * top_k)
    step = max(1, min(CHUNK_BYTES // token_bytes, (1 << 24) - 1))
    add = _add_product if product else _add_scattered
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        left = first[part]
        right = left if second is first else second[part]
        add(table, left, right, None if keep is None else keep[part])


def _add_product(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    left = _one_hot(first, table.shape[1], keep)
    right = left if second is first else _one_hot(second, table.shape[1], None)
    table += torch.bmm(left.mT, right).long()


def _one_hot(ids: Tensor, experts: int, keep: Tensor | None) -> Tensor:
    """Which experts a token visits [L,T,E], as 0 and 1; nothing for tokens that do not count."""
    tokens, layers, top_k = ids.shape
    hot = torch.zeros(layers, tokens, experts, device=ids.device, dtype=torch.float32)
    ones = torch.ones((), device=ids.device, dtype=torch.float32)
    marks = ones if keep is None else keep.to(torch.float32)[None, :, None]
    hot.scatter_add_(2, ids.permute(1, 0, 2), marks.expand(layers, tokens, top_k))
    return hot


def _add_scattered(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    layers, experts, _ = table.shape
    row = torch.arange(layers, device=table.device)[None, :, None] * experts + first
    place = row[..., None] * experts + second[:, :, None, :]
    add_ones(table, place, keep)


def add_ones(table: Tensor, place: Tensor, keep: Tensor | None) -> None:
    """Add one at each place [T,..] of a flattened table, for the tokens that count [T]."""
    if keep is None:
        ones = torch.ones((), device=table.device, dtype=table.dtype).expand(place.numel())
    else:
        marks = keep.to(table.dtype).reshape(-1, *[1] * (place.dim() - 1))
        ones = marks.expand(place.shape).reshape(-1)
    table.view(-1).scatter_add_(0, place.reshape(-1), ones)
