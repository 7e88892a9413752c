"""Expert placement for Mixture-of-Experts models.

Data flows one way: a recorded ``RoutingTrace`` is counted into ``RoutingStatistics``, which with a
``Topology`` makes a ``Problem``; ``solve`` answers it with a ``Result`` that holds a ``Placement``;
``evaluate`` replays the placement on a trace it has not seen.
"""

# Type checkers know this name. Importing typing would take longer than the rest, and in that time
# the command line could not handle Ctrl-C yet.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from moetuner._core import __version__
    from moetuner.cost import CostModel
    from moetuner.counting import count
    from moetuner.evaluation import Evaluation, evaluate
    from moetuner.evaluation.comparison import Comparison
    from moetuner.evaluation.judgement import Judgement, audit, judge, verdict
    from moetuner.evaluation.rows import dispatch_rows
    from moetuner.evaluation.samples.holdout import hold_out
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
        balance,
        plan,
        plan_losses,
        solve,
        verify,
    )
    from moetuner.solver.pareto import Trade, pareto
    from moetuner.statistics import RoutingStatistics
    from moetuner.statistics.sets import ExpertSets
    from moetuner.topology import Tier, Topology
    from moetuner.trace import RoutingTrace

# In the order of the flow.
__all__ = [  # noqa: RUF022
    "RoutingTrace",
    "RoutingStatistics",
    "ExpertSets",
    "open_input",
    "count",
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

# Where each name is: its module, with numpy, is loaded when the name is first used.
_HOMES = {
    "RoutingTrace": "trace",
    "RoutingStatistics": "statistics",
    "ExpertSets": "statistics.sets",
    "open_input": "formats",
    "count": "counting",
    "structure": "report.structure",
    "hold_out": "evaluation.samples.holdout",
    "Topology": "topology",
    "Tier": "topology",
    "CostModel": "cost",
    "Placement": "placement",
    "PlacementDiff": "placement",
    "Serving": "serving",
    "read_placement": "formats",
    "write_placement": "formats",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "dispatch_rows": "evaluation.rows",
    "Judgement": "evaluation.judgement",
    "judge": "evaluation.judgement",
    "audit": "evaluation.judgement",
    "Comparison": "evaluation.comparison",
    "verdict": "evaluation.judgement",
    "Problem": "problem",
    "engine_settings": "serving.engines",
    "Objective": "problem.objective",
    "solve": "solver",
    "Result": "solver",
    "Progress": "solver",
    "Certificate": "solver",
    "verify": "solver",
    "pareto": "solver.pareto",
    "Trade": "solver.pareto",
    "balance": "solver",
    "Plan": "solver",
    "plan": "solver",
    "plan_losses": "solver",
    "advise": "report.advice",
    "Advice": "report.advice.values",
    "drift": "report.advice.drift",
    "Drift": "report.advice.drift",
    "write_report": "report.page",
    "__version__": "_core",
}
# Modules that need no import of their own.
_MODULES = (
    *("charts", "cost", "evaluation", "files", "formats", "frozen", "placement", "presets"),
    *("problem", "recording", "report", "router_groups", "serving", "solver", "statistics"),
    *("topology", "trace"),
)


if not TYPE_CHECKING:  # where any name would be one of the package

    def __getattr__(name: str) -> object:
        """Return a name of the package, or a module of it, which is loaded now."""
        import importlib

        if name in _MODULES:
            return importlib.import_module(f"moetuner.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'moetuner' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"moetuner.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


del TYPE_CHECKING  # it is no name of the package


def __dir__() -> list[str]:
    """Return all names, whether they have been used or not."""
    return sorted({*globals(), *__all__, *_MODULES})
