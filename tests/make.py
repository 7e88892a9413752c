"""Makers of routed experts, traces and placements: one of each, for the tests of every folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import moetuner as mt


def random_ids(
    tokens: int,
    layers: int,
    top_k: int,
    experts: int,
    *,
    seed: int = 0,
    liking: ArrayLike | None = None,
    dtype: type = np.uint8,
) -> np.ndarray:
    """Return skewed routing [T,L,K]: experts with the highest sums of noise and liking [T,L,E].

    Without ``liking``, each layer has favourites drawn by chance, as real models have.
    """
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(tokens, layers, experts))
    scores = noise + (rng.normal(size=(layers, experts)) if liking is None else np.asarray(liking))
    return np.argsort(-scores, axis=2)[:, :, :top_k].astype(dtype)


def trace_of(
    ids: ArrayLike, num_experts: int = 8, *, length: int | None = None, **labels: Any
) -> mt.RoutingTrace:
    """Return the trace of routed experts [T,L,K], in sequences of ``length`` tokens if given."""
    if length is not None:
        labels["sequence"] = np.arange(len(np.asarray(ids))) // length
    return mt.RoutingTrace.from_arrays(ids, num_experts=num_experts, **labels)


def trace(
    tokens: int = 200,
    layers: int = 3,
    top_k: int = 2,
    experts: int = 8,
    *,
    labelled: bool = True,
    sequences: bool = True,
    length: int = 10,
    groups: Sequence[str] | None = ("even", "odd", "empty"),
    model: str | None = "small",
    **drawn: Any,
) -> mt.RoutingTrace:
    """Return a small skewed trace, whose sequences of ``length`` are of the groups in turns.

    The last group has no token. Further arguments are those of `random_ids`.
    """
    ids = random_ids(tokens, layers, top_k, experts, **drawn)
    if not labelled:
        return trace_of(ids, experts)
    labels: dict[str, Any] = {"model": model}
    if groups is not None:
        turns = np.arange(tokens) // length % (len(groups) - 1)
        labels |= {"group": turns, "group_names": list(groups)}
    return trace_of(ids, experts, length=length if sequences else None, **labels)


def skewed_loads(
    layers: int, experts: int, *, windows: int = 1, seed: int = 0, spread: float = 0.8
) -> np.ndarray:
    """Return loads [W,L,E] of experts that are busy in different degrees.

    Several windows differ by up to a half. ``spread`` is the standard deviation of the logarithm
    of an expert's load.
    """
    rng = np.random.default_rng(seed)
    load = 1e4 * rng.lognormal(0, spread, (1, layers, experts))
    if windows > 1:
        load = load * rng.uniform(0.5, 1.5, (windows, layers, experts))
    return np.floor(load).astype(np.uint64)


def in_turns(layers: int, experts: int, devices: int) -> mt.Placement:
    """Return a placement of the experts on the devices in turns, one copy each."""
    return mt.Placement.from_assignment(np.tile(np.arange(experts) % devices, (layers, 1)), devices)
