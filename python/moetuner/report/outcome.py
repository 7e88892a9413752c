"""What one method found, in tables, sentences and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation
from moetuner.problem import Problem
from moetuner.problem.objective import visit_costs
from moetuner.report.cells import number, percent
from moetuner.solver.bounds import caps
from moetuner.solver.result import Result


@dataclass(frozen=True)
class Outcome:
    """What one method found on the traffic it saw, and what that does to the traffic it did not."""

    problem: Problem
    result: Result
    evaluation: Evaluation

    @property
    def has_objective(self) -> bool:
        """Whether the counts suffice to say what the objective is."""
        return self.problem.goal != "traffic" or has_pairs(self.problem)

    @property
    def breaks_rules(self) -> bool:
        """Whether the placement breaks rules, other than a cap that had to be raised."""
        return self.result.status == "violates rules"

    def to_dict(self) -> dict[str, Any]:
        """Fields of the evaluation and of the result."""
        known = self.has_objective
        return {
            **self.evaluation.to_dict(),
            "objective": self.result.objective if known else None,
            "unit": unit(self.problem),
            "bound": self.result.bound if known else None,
            "bound_source": self.result.bound_source,
            "bound_scope": self.result.bound_scope if known else None,
            "gap": self.result.gap if known else None,
            "status": self.result.status,
            "violations": list(self.result.violations),
            "solve_seconds": self.result.seconds,
            "details": self.result.details,
        }

    def row(self) -> tuple[str, ...]:
        """Return the cells of a table under ``head``."""
        of, known = self.evaluation, self.has_objective
        figures = {
            "total": number(of.imbalance_total, 3),
            "crossing": number(of.crossing, 4),
            "fanout": number(of.fanout, 3),
            "nodes": number(of.node_fanout, 3),
            "layer us": number(of.predicted_layer_us, 1),
        }
        decimals = 1 if self.problem.goal == "time" else 4
        return (
            f"{self.result.method} !" if self.breaks_rules else self.result.method,
            number(of.imbalance, 3),
            number(of.imbalance_mixed, 3),
            *(figures[name] for name in _columns(self.problem)),
            number(self.result.objective if known else None, decimals),
            percent(self.result.gap if known else None),
            number(self.result.seconds, 2),
        )


def head(problem: Problem) -> tuple[str, ...]:
    """Columns of a table of outcomes: what says most of the objective, within 80 characters."""
    return ("method", "imbalance", "mixed", *_columns(problem), "objective", "gap", "seconds")


def _columns(problem: Problem) -> tuple[str, ...]:
    """Return the columns that depend on the problem: nodes are what dispatch visits, if any."""
    of_nodes = problem.regime == "dispatch" and problem.topology.nodes > 1
    if problem.goal == "time":
        moved = "nodes" if of_nodes else "fanout"
        return ("crossing" if problem.regime == "follow" else moved, "layer us")
    return ("total", "nodes" if of_nodes else "crossing", "fanout")


def has_pairs(problem: Problem) -> bool:
    """Whether the statistics have the pairs that the regime is about."""
    if problem.counts_visits:
        return True
    statistics = problem.statistics
    pairs = statistics.transitions if problem.regime == "follow" else statistics.coactivation
    return pairs is not None


def unit(problem: Problem) -> str:
    """Return the unit of the objective, for JSON."""
    if problem.goal == "time":
        return "us per layer"
    if problem.goal == "balance":
        return "max / mean load"
    if problem.counts_visits:
        _, node = visit_costs(problem.topology)
        return f"fanout + {node:.3g} node fanout" if node else "fanout"
    return "share of the traffic"


def worth(problem: Problem, value: float) -> str:
    """Write a value of the objective with its unit."""
    if problem.goal == "time":
        return f"{value:.1f} us per layer"
    if problem.goal == "balance":
        return f"imbalance {value:.4f}"
    if problem.counts_visits:
        _, node = visit_costs(problem.topology)
        name = f"fanout + {node:.3g} x node fanout =" if node else "fanout"
        return f"{name} {value:.4f}"
    if problem.regime == "follow":
        return f"crossing {value:.4f}"
    return f"{value:.4f} of the co-activations apart"


def sentences(outcome: Outcome) -> list[str]:
    """Return what was reached, how far from the optimum it can be, and what was chosen."""
    problem, result = outcome.problem, outcome.result
    lines = []
    if outcome.has_objective:
        line = f"Objective: {worth(problem, result.objective)}"
        if result.bound is not None and result.gap is not None:
            which = caps.SINGLE if problem.stays_single else ""
            if problem.max_imbalance is not None:
                raised = "caps_raised" in result.details
                which += " under the caps that it keeps" if raised else " under this cap"
            line += (
                f"; no placement{which} is below {worth(problem, result.bound)} "
                f"({result.bound_source}), so this one is within {percent(result.gap)}"
            )
        lines.append(line + ".")
    unseen = result.details.get("unseen")
    if unseen:
        why = unseen.get("reason")
        if why is None:
            score = unseen["scores"][unseen["chosen"]]
            folds = f"{unseen['folds']} folds of {unseen['held_out']}"
            why = f"max / mean {score:.3f}, bursts and mixed, in {folds}"
        lines.append(f"Chosen for unseen traffic: {unseen['chosen']} ({why}).")
    return lines


def remarks(outcomes: list[Outcome], problem: Problem) -> list[str]:
    """Return what a reader of the table must know."""
    lines = []
    if problem.goal == "time" and problem.cost_model is not None:
        lines.append(whose_times(problem.cost_model))
    if problem.goal != "balance" and not has_pairs(problem):
        wanted = "transitions" if problem.regime == "follow" else "co-activation"
        lines.append(f"INPUT has no {wanted}: methods could only balance the load.")
    elif problem.goal == "time" and problem.regime == "dispatch" and not problem.counts_visits:
        lines.append(
            "INPUT has no expert sets: tokens are sent to each of their experts by itself."
        )
    for outcome in outcomes:
        told = caps.remarks(problem, outcome.result.details)
        lines.extend(f"{outcome.result.method}: {line}" for line in told)
        if outcome.breaks_rules:
            mark = f"{outcome.result.method} ! violates rules:"
            lines.extend(f"{mark} {broken}." for broken in outcome.result.violations)
        if outcome.result.status in ("interrupted", "time_limit"):
            lines.append(f"{outcome.result.method}: {outcome.result.status}, best so far.")
    return lines


def whose_times(model: CostModel) -> str:
    """Return a sentence on whose times are predicted, and how to get others."""
    return (
        f"Predicted times are of {model.name or 'an unnamed cost model'}; for others: "
        "--cost-model FILE or GPU:HIDDENxINTERMEDIATE."
    )
