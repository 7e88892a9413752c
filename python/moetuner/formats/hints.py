"""Hints: sizes of model and engine that a user gives where a file does not have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import (
    DEVICE_LIMIT,
    LAYER_LIMIT,
    ArgumentError,
    MissingArgumentError,
    experts_in,
    listed,
    whole_number,
)
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

Traffic = RoutingTrace | RoutingStatistics

# No model has more.
MOST_LAYERS = 200


@dataclass(frozen=True, eq=False)
class Hints:
    """Sizes of model and engine that a file may leave out.

    Parameters
    ----------
    num_experts
        Experts per layer, E.
    top_k
        Experts per token and layer, K.
    hidden_layers
        Layers of the model, dense ones included.
    dense_layers
        Numbers of those hidden layers that have no experts; empty for none, None if not known.
    devices
        Devices, which engines call ranks, D.
    running
        Expert in every slot [L,P] of the placement that ran while an engine recorded, for those
        that count slots instead of experts.
    groups
        Group of every request by its name, for recordings that name requests.
    """

    num_experts: int | None = None
    top_k: int | None = None
    hidden_layers: int | None = None
    dense_layers: tuple[int, ...] | None = None
    devices: int | None = None
    running: NDArray[np.int64] | None = None
    groups: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.num_experts is not None:
            experts_in(self.num_experts)
        for name, highest in (
            ("top_k", 1 << 16),
            ("hidden_layers", LAYER_LIMIT),
            ("devices", DEVICE_LIMIT),
        ):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value, highest=highest)
        if self.dense_layers is not None:
            end = LAYER_LIMIT if self.hidden_layers is None else self.hidden_layers
            dense = {
                whole_number("dense_layers", layer, lowest=0, highest=end - 1)
                for layer in listed("dense_layers", self.dense_layers, "numbers")
            }
            object.__setattr__(self, "dense_layers", tuple(sorted(dense)))

    def check_experts(self, experts: int) -> None:
        """Raise if a file has another number of experts than the user says."""
        if self.num_experts not in (None, experts):
            raise ArgumentError(
                f"num_experts must be {experts}, got {self.num_experts}", "num_experts"
            )

    def check_axes(self, traffic: Traffic) -> None:
        """Raise if sizes, or repeated experts, show that axes are in a wrong order."""
        layers, order = traffic.layers, "[windows, layers, experts]"
        got, most_layers = f"{layers} layers", MOST_LAYERS
        if isinstance(traffic, RoutingTrace):
            order = "[tokens, layers, top_k]"
            got = f"{got} of {traffic.tokens} tokens"
            most_layers = min(most_layers, traffic.tokens or most_layers)
            try:
                if traffic.top_k > layers:
                    next(traffic.shards(1), None)
            except ValueError as error:
                if "appears twice" not in str(error):
                    raise
                # The axis of layers was taken for that of top-k, so any number is too many.
                got = f"{layers} layers of top-{traffic.top_k}, whose experts repeat"
                most_layers = 0
        if layers > most_layers and layers != self.hidden_layers:
            raise MissingArgumentError(
                f"axes must be {order}, got {got}: swap axes, or if it is meant, say hidden_layers "
                f"{layers}",
                "hidden_layers",
            )

    def experts_needed(self) -> int:
        """Return the experts per layer; raise if the user does not say them."""
        if self.num_experts is None:
            raise MissingArgumentError(
                "num_experts is needed: the file does not say it", "num_experts"
            )
        return self.num_experts

    def check_have_experts(self, layers: Iterable[int]) -> None:
        """Raise if a layer with experts is one that the user calls dense."""
        dense = set(layers) & set(self.dense_layers or ())
        if dense:
            raise ValueError(
                f"layer {min(dense)} must be dense as dense_layers says, got experts of it"
            )

    def moe_layers(self, hidden: int) -> list[int] | None:
        """Return the layers with experts among ``hidden`` ones; None if unknown."""
        if self.hidden_layers not in (None, hidden):
            raise ArgumentError(
                f"hidden_layers must be {hidden}, the layers that the file has, "
                f"got {self.hidden_layers}",
                "hidden_layers",
            )
        if self.dense_layers is None:
            return None
        if self.dense_layers and self.dense_layers[-1] >= hidden:
            raise ArgumentError(
                f"dense_layers must be below {hidden}, the layers that the file has, "
                f"got {self.dense_layers[-1]}",
                "dense_layers",
            )
        layers = sorted(set(range(hidden)) - set(self.dense_layers))
        if not layers:
            raise ArgumentError(
                f"dense_layers must leave a layer with experts, got all {hidden}", "dense_layers"
            )
        return layers

    def moe_numbers(self, layers: int) -> list[int]:
        """Return the numbers of a placement's layers among all hidden ones of the model."""
        dense = self.dense_layers or ()
        hidden = layers + len(dense) if self.hidden_layers is None else self.hidden_layers
        numbers = [layer for layer in range(hidden) if layer not in dense]
        if len(numbers) != layers:
            raise ArgumentError(
                f"hidden_layers and dense_layers must leave {layers} layers, as the placement has, "
                f"got {len(numbers)}",
                "hidden_layers",
                "dense_layers",
            )
        return numbers
