"""What moetuner does inside PyTorch: record routing, count it, and move experts.

``capture`` records what the routers of a running model choose, ``RoutingCounters`` counts it on the
device, ``apply_placement`` and ``permute_state_dict`` put experts in the order that engines with
contiguous experts understand. ``import moetuner`` never imports this package.
"""

try:
    import torch as _torch  # noqa: F401 - only to say in one line that it is missing
except ImportError as error:
    raise ImportError("moetuner.torch needs PyTorch: pip install 'moetuner[torch]'") from error

from moetuner.torch.apply import apply_placement
from moetuner.torch.capture import Recorder, capture
from moetuner.torch.checkpoint import permute_state_dict
from moetuner.torch.counters import RoutingCounters
from moetuner.torch.routers import MoELayer, moe_layers

__all__ = [
    "MoELayer",
    "Recorder",
    "RoutingCounters",
    "apply_placement",
    "capture",
    "moe_layers",
    "permute_state_dict",
]
