"""Expert placement for Mixture-of-Experts models.

Data flows one way: a recorded ``RoutingTrace`` is counted into ``RoutingStatistics``, which with a
``Topology`` makes a ``Problem``; ``solve`` answers it with a ``Result`` that holds a ``Placement``;
``evaluate`` replays the placement on a trace it has not seen.
"""

from moetuner import _interrupts as _interrupts  # isort: skip - before what takes long to import
from moetuner._core import __version__
from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation, evaluate
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.judgement import Judgement, audit, judge, verdict
from moetuner.evaluation.rows import dispatch_rows
from moetuner.evaluation.units import hold_out
from moetuner.formats import open_input, read_placement, write_placement
from moetuner.placement import Placement, PlacementDiff
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.advice import advise
from moetuner.report.advice.drift import Drift, drift
from moetuner.report.advice.values import Advice
from moetuner.report.page import write_report
from moetuner.report.structure import structure
from moetuner.serving import Serving
from moetuner.serving.engines import engine_settings
from moetuner.solver import (
    Certificate,
    Plan,
    Progress,
    Result,
    Trade,
    balance,
    pareto,
    plan,
    plan_losses,
    solve,
    verify,
)
from moetuner.statistics import ExpertSets, RoutingStatistics
from moetuner.topology import Tier, Topology
from moetuner.trace import RoutingTrace

# In the order of the flow.
__all__ = [  # noqa: RUF022
    "RoutingTrace",
    "RoutingStatistics",
    "ExpertSets",
    "open_input",
    "structure",
    "hold_out",
    "Topology",
    "Tier",
    "CostModel",
    "Placement",
    "PlacementDiff",
    "Serving",
    "read_placement",
    "write_placement",
    "Evaluation",
    "evaluate",
    "dispatch_rows",
    "Judgement",
    "judge",
    "audit",
    "Comparison",
    "verdict",
    "Problem",
    "engine_settings",
    "Objective",
    "solve",
    "Result",
    "Progress",
    "Certificate",
    "verify",
    "pareto",
    "Trade",
    "balance",
    "Plan",
    "plan",
    "plan_losses",
    "advise",
    "Advice",
    "drift",
    "Drift",
    "write_report",
    "__version__",
]
