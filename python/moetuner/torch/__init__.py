"""Record and count routing inside PyTorch; apply, run and change placements.

``capture`` records what the routers of a running model choose, ``RoutingCounters`` counts it on the
device; ``apply_placement``, ``permute_state_dict`` and ``Renumbering`` put experts in the order of
a placement, for engines with contiguous experts; ``ExpertParallelMoE`` runs any placement,
``Rebalancer`` changes it while serving. ``import moetuner`` never imports this package.
"""

from typing import TYPE_CHECKING, Any

try:
    import torch as _torch  # noqa: F401 - only to say in one line that it is missing
except ModuleNotFoundError as error:
    if error.name != "torch":  # it is there, and misses something else
        raise
    raise ImportError("moetuner.torch needs PyTorch: pip install 'moetuner[torch]'") from None

from moetuner.torch.models import MoELayer, moe_layers
from moetuner.torch.parallel import migrate, rebalance
from moetuner.torch.parallel.agreement import MoveError
from moetuner.torch.parallel.exchange import TrafficCounters
from moetuner.torch.parallel.experts import Experts, GroupedExperts, swiglu
from moetuner.torch.parallel.layer import ExpertParallelMoE
from moetuner.torch.parallel.rebalance import ComputeCost, Decision, Rebalancer
from moetuner.torch.record.capture import Recorder, capture
from moetuner.torch.record.counters import RoutingCounters
from moetuner.torch.reorder.checkpoint import permute_state_dict
from moetuner.torch.reorder.model import apply_placement
from moetuner.torch.reorder.renumbering import Renumbering

# Former name of a module, which programs of others import.
migration = migrate

if TYPE_CHECKING:
    from moetuner.torch.parallel.transformers import register_placement

__all__ = [
    "ComputeCost",
    "Decision",
    "ExpertParallelMoE",
    "Experts",
    "GroupedExperts",
    "MoELayer",
    "MoveError",
    "Rebalancer",
    "Recorder",
    "Renumbering",
    "RoutingCounters",
    "TrafficCounters",
    "apply_placement",
    "capture",
    "migration",
    "moe_layers",
    "permute_state_dict",
    "rebalance",
    "register_placement",
    "swiglu",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    if name == "register_placement":
        from moetuner.torch.parallel.transformers import register_placement

        return register_placement
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
