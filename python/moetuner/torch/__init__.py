"""What needs PyTorch: running a placement expert-parallel, and changing it while serving."""

from moetuner.torch.expert_parallel import ExpertParallelMoE
from moetuner.torch.experts import Experts, GroupedExperts, swiglu
from moetuner.torch.traffic import TrafficCounters

__all__ = ["ExpertParallelMoE", "Experts", "GroupedExperts", "TrafficCounters", "swiglu"]
