"""The time of a layer: the cost model, its fit to measured times, and published sizes."""

from moetuner.cost.model import CostModel, busiest_ports, compute_move_us, from_keys
from moetuner.cost.presets import (
    DEFAULT_GPU,
    bytes_of_expert,
    cost_model_of,
    experts_of_served,
    public_name,
    size_of_expert,
    top_k_of,
    type_in_name,
    weight_bits_of,
)

__all__ = [
    "DEFAULT_GPU",
    "CostModel",
    "busiest_ports",
    "bytes_of_expert",
    "compute_move_us",
    "cost_model_of",
    "experts_of_served",
    "from_keys",
    "public_name",
    "size_of_expert",
    "top_k_of",
    "type_in_name",
    "weight_bits_of",
]
