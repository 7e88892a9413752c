"""Instances of all benchmarks: routing of the sizes of real models, made from a seed alone.

A token has a latent type (a few types are frequent, many are rare); in every layer a type has its
own liking for experts, on top of some experts being popular with all, and noise decides the rest.
So loads are skewed and transitions structured, as in real routing: what one layer says about the
type is what makes the next layer predictable.
"""

from __future__ import annotations

import numpy as np

import moetuner as mt

# name: layers, experts, top-k, devices
SIZES = {
    "paper": (32, 8, 2, 4),  # Mixtral-8x7B on four devices, the paper's size
    "paper/8": (8, 8, 2, 4),  # its first layers
    "24x32": (24, 32, 4, 4),
    "24x32/8": (24, 32, 4, 8),
    "26x64": (26, 64, 6, 8),
    "48x128": (48, 128, 8, 8),
    "58x256": (58, 256, 8, 32),
    "94x128": (94, 128, 8, 16),
    "61x384": (61, 384, 8, 72),
}


def routing(
    layers: int,
    experts: int,
    top_k: int,
    *,
    tokens: int = 20_000,
    types: int = 24,
    structure: float = 1.2,
    skew: float = 0.15,
    seed: int = 0,
) -> mt.RoutingTrace:
    """Route tokens [T,L,K] by their latent types.

    Parameters
    ----------
    structure, skew
        Spread of a type's liking and of popularity, in units of the noise (Gumbel, as in sampling).
    """
    random = np.random.default_rng(seed)
    share = np.arange(1, types + 1) ** -0.5
    type_of = random.choice(types, size=tokens, p=share / share.sum())
    ids = np.empty((tokens, layers, top_k), dtype=np.uint16)
    for layer in range(layers):
        popular = skew * random.normal(size=experts)
        liking = structure * random.normal(size=(types, experts))
        noise = random.gumbel(size=(tokens, experts))
        score = popular + liking[type_of] + noise
        ids[:, layer] = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
    return mt.RoutingTrace.from_arrays(ids, num_experts=experts)


def problem(
    name: str,
    *,
    layers: int | None = None,
    max_imbalance: float | None = 1.05,
    seed: int = 0,
    devices_per_node: int | None = None,
) -> mt.Problem:
    """Make the problem of a named size, or its first layers."""
    all_layers, experts, top_k, devices = SIZES[name]
    trace = routing(layers or all_layers, experts, top_k, seed=seed)
    return mt.Problem(
        mt.RoutingStatistics.from_trace(trace, window=None),
        mt.Topology(devices, devices_per_node=devices_per_node),
        regime="follow",
        max_imbalance=max_imbalance,
    )
