"""What needs PyTorch: running a placement expert-parallel, and changing it while serving."""

from typing import TYPE_CHECKING, Any

from moetuner.torch.agreement import MoveError
from moetuner.torch.expert_parallel import ExpertParallelMoE
from moetuner.torch.experts import Experts, GroupedExperts, swiglu
from moetuner.torch.rebalance import ComputeCost, Decision, Rebalancer
from moetuner.torch.traffic import TrafficCounters

if TYPE_CHECKING:
    from moetuner.torch.transformers_ep import register_placement

__all__ = [
    "ComputeCost",
    "Decision",
    "ExpertParallelMoE",
    "Experts",
    "GroupedExperts",
    "MoveError",
    "Rebalancer",
    "TrafficCounters",
    "register_placement",
    "swiglu",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    if name == "register_placement":
        from moetuner.torch.transformers_ep import register_placement

        return register_placement
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
