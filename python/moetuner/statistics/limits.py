"""How much of a trace is counted at a time, and what of it: shards, tables, samples of sets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moetuner.trace import RoutingTrace

# Fields that are tables of pairs of experts [L-n,E,E], and their n.
PAIRS = {"transitions": 1, "coactivation": 0}
# Largest tables in bytes: larger ones come from a wrong number of experts or a wrong window.
TABLE_LIMIT = 16 << 30
# Distinct expert sets of all layers, of a layer, and of a layer for each pair of experts, beyond
# which only a sample of the tokens is counted: the time of searches grows with the number of sets
# ("Long traces" in docs/experiments.md).
MOST_SETS, LAYER_SETS, PAIR_SETS = 1 << 22, 40_000, 32
# Bytes of a shard that stays in the cache of most processors between reading and counting.
SHARD_BYTES = 16 << 20
# Wide tables do not fit the cache, so the core adds up this many tokens before it writes to them.
WIDE_SHARD_BYTES, WIDE_SHARD_TOKENS = 64 << 20, 1 << 15


def choose_shard_bytes(trace: RoutingTrace) -> int:
    """Return the bytes of a trace to count at a time."""
    tokens = WIDE_SHARD_TOKENS * trace.layers * trace.top_k * trace.ids.dtype.itemsize
    return min(max(SHARD_BYTES, tokens), WIDE_SHARD_BYTES)


def check_table_bytes(trace: RoutingTrace, window: int | None, tables: Mapping[str, bool]) -> None:
    """Raise if the tables of a trace would take more than ``TABLE_LIMIT``."""
    layers, experts = trace.layers, trace.num_experts
    windows = 1 if window is None else max(1, -(-trace.tokens // window))
    pairs = sum(tables[name] * (layers - fewer) for name, fewer in PAIRS.items())
    width = np.min_scalar_type(trace.tokens if window is None else window).itemsize
    size = experts * (width * windows * layers + 8 * pairs * experts)
    if size > TABLE_LIMIT:
        raise ValueError(
            f"counts must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for {windows} "
            f"windows, {layers} layers, {experts} experts: count fewer windows or leave out pairs"
        )


def choose_stride(trace: RoutingTrace) -> int:
    """Return the n of which every n-th token's set is counted: 1 if there are few sets."""
    experts, top_k = trace.num_experts, trace.top_k
    distinct = min(trace.tokens, math.comb(experts, top_k))
    enough = max(LAYER_SETS, PAIR_SETS * experts**2 // max(top_k * (top_k - 1), 1))
    enough = min(enough, MOST_SETS // max(trace.layers, 1))
    return 1 if distinct <= enough else -(-trace.tokens // enough)
