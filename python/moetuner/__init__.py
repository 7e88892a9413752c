"""Expert placement for Mixture-of-Experts models.

Data flows one way: a recorded ``RoutingTrace`` is counted into ``RoutingStatistics``, which with a
``Topology`` makes a ``Problem``; ``solve`` answers it with a ``Result`` that holds a ``Placement``;
``evaluate`` replays the placement on a trace it has not seen.
"""

from moetuner._core import __version__
from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation, evaluate
from moetuner.placement import Placement, PlacementDiff
from moetuner.problem import Problem
from moetuner.solver import solve
from moetuner.solver.result import Progress, Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Tier, Topology
from moetuner.trace import RoutingTrace

__all__ = [
    "CostModel",
    "Evaluation",
    "Placement",
    "PlacementDiff",
    "Problem",
    "Progress",
    "Result",
    "RoutingStatistics",
    "RoutingTrace",
    "Tier",
    "Topology",
    "__version__",
    "evaluate",
    "solve",
]
