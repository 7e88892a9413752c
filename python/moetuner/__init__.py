"""Expert placement for Mixture-of-Experts models.

Data flows one way: a recorded ``RoutingTrace`` is counted into ``RoutingStatistics``, which with a
``Topology`` makes a ``Problem``; ``solve`` answers it with a ``Result`` that holds a ``Placement``;
``evaluate`` replays the placement on a trace it has not seen.
"""

from moetuner import _interrupts as _interrupts
from moetuner._core import __version__
from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation, evaluate
from moetuner.evaluation.auditing import Audit, audit
from moetuner.evaluation.verdicts import Verdict, verdict
from moetuner.placement import Placement, PlacementDiff
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import solve
from moetuner.solver.balancing import balance
from moetuner.solver.pareto import Trade, pareto
from moetuner.solver.result import Progress, Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Tier, Topology
from moetuner.trace import RoutingTrace

__all__ = [
    "Audit",
    "CostModel",
    "Evaluation",
    "Objective",
    "Placement",
    "PlacementDiff",
    "Problem",
    "Progress",
    "Result",
    "RoutingStatistics",
    "RoutingTrace",
    "Tier",
    "Topology",
    "Trade",
    "Verdict",
    "__version__",
    "audit",
    "balance",
    "evaluate",
    "pareto",
    "solve",
    "verdict",
]
