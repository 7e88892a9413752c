"""What one method found, in tables, sentences and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moetuner.cli.options.machine import say_times
from moetuner.cli.options.traffic import Traffic
from moetuner.cli.output import number, percent, working
from moetuner.evaluation import Evaluation, evaluate
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import solve
from moetuner.solver.bounds import caps
from moetuner.solver.result import Result


@dataclass(frozen=True)
class Outcome:
    """What one method found on the traffic it saw, and what that does to the traffic it did not."""

    problem: Problem
    result: Result
    evaluation: Evaluation

    @property
    def worth(self) -> Objective:
        """What the placement is worth to the problem."""
        return Objective(self.problem)

    @property
    def breaks_rules(self) -> bool:
        """Whether the placement breaks rules, other than a cap that had to be raised."""
        return self.result.status == "violates rules"

    def to_dict(self) -> dict[str, Any]:
        """Fields of the evaluation and of the result."""
        known = self.worth.is_known
        return {
            **self.evaluation.to_dict(),
            "objective": self.result.objective if known else None,
            "unit": self.worth.unit,
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
        """Give the cells of a table under ``head``."""
        of, worth = self.evaluation, self.worth
        figures = {
            "total": number(of.imbalance_total, 3),
            "crossing": number(of.crossing, 4),
            "fanout": number(of.fanout, 3),
            "nodes": number(of.node_fanout, 3),
            "layer us": number(of.predicted_layer_us, 1),
        }
        return (
            f"{self.result.method} !" if self.breaks_rules else self.result.method,
            number(of.imbalance, 3),
            number(of.imbalance_mixed, 3),
            *(figures[name] for name in judged(self.problem)),
            number(self.result.objective if worth.is_known else None, worth.decimals),
            percent(self.result.gap if worth.is_known else None),
            number(self.result.seconds, 2),
        )


def head(problem: Problem) -> tuple[str, ...]:
    """Columns of a table of outcomes: what says most of the objective, within 80 characters."""
    return ("method", "imbalance", "mixed", *judged(problem), "objective", "gap", "seconds")


def judged(problem: Problem) -> tuple[str, ...]:
    """Name the columns that depend on the problem: nodes are what dispatch visits, if any."""
    of_nodes = problem.regime == "dispatch" and problem.topology.nodes > 1
    if problem.goal == "time":
        moved = "nodes" if of_nodes else "fanout"
        return ("crossing" if problem.regime == "follow" else moved, "layer us")
    return ("total", "nodes" if of_nodes else "crossing", "fanout")


def try_method(
    method: str,
    problem: Problem,
    judged_on: Traffic,
    *,
    window: int | None,
    seed: int,
    time_limit: float | None = None,
    threads: int | None = None,
    **moving: Any,
) -> Outcome:
    """Solve, and evaluate the placement on other traffic; ``moving`` as for ``solve``."""
    with working(f"solving, {method}") as progress:
        result = solve(
            problem,
            method,
            seed=seed,
            time_limit=time_limit,
            threads=threads,
            progress=progress,
            **moving,
        )
        evaluation = evaluate(
            result.placement,
            judged_on,
            problem.topology,
            window=window,
            split=problem.split,
            cost_model=problem.cost_model if problem.goal == "time" else None,
            regime=problem.regime,
            threads=threads,
        )
    return Outcome(problem, result, evaluation)


def sentences(outcome: Outcome) -> list[str]:
    """Say what was reached, how far from the optimum it can be, and what was chosen on the way."""
    problem, result, worth = outcome.problem, outcome.result, outcome.worth
    lines = []
    if worth.is_known:
        line = f"Objective: {worth.text(result.objective)}"
        if result.bound is not None and result.gap is not None:
            which = caps.SINGLE if problem.stays_single else ""
            if problem.max_imbalance is not None:
                raised = "caps_raised" in result.details
                which += " under the caps that it keeps" if raised else " under this cap"
            line += (
                f"; no placement{which} is below {worth.text(result.bound)} "
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
    """Say what a reader of the table must know."""
    lines, worth = [], Objective(problem)
    if problem.goal == "time" and problem.cost_model is not None:
        lines.append(say_times(problem.cost_model))
    if problem.goal != "balance" and not worth.has_traffic:
        wanted = "transitions" if problem.regime == "follow" else "co-activation"
        lines.append(f"INPUT has no {wanted}: methods could only balance the load.")
    elif problem.goal == "time" and problem.regime == "dispatch" and not worth.counts_visits:
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
