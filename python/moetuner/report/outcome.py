"""What one method found, in tables, sentences and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.cells import number, percent
from moetuner.solver.bounds import caps
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics

# Names and decimals of the columns that depend on the objective.
COLUMNS = {
    "imbalance_total": ("total", 3),
    "crossing": ("crossing", 4),
    "fanout": ("fanout", 3),
    "node_fanout": ("nodes", 3),
    "predicted_layer_us": ("layer us", 1),
}


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

    @property
    def gap(self) -> float | None:
        """Gap to a bound that says something; None to one of loads alone."""
        told = self.worth.is_known and not self.result.bound_is_of_loads
        return self.result.gap if told else None

    def to_dict(self) -> dict[str, Any]:
        """Return fields of the evaluation and of the result."""
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
            "details": self.result.details.to_dict(),
        }

    def row(self) -> tuple[str, ...]:
        """Return the cells of a table under ``head``."""
        of, worth = self.evaluation, self.worth
        value = self.result.objective if worth.is_known else None
        return (
            f"{self.result.method} !" if self.breaks_rules else self.result.method,
            number(of.imbalance, 3),
            number(of.imbalance_mixed, 3),
            *(number(getattr(of, name), COLUMNS[name][1]) for name in worth.figures),
            *_objective(worth, number(value, worth.decimals)),
            percent(self.gap),
            number(self.result.seconds, 2),
        )


def head(problem: Problem) -> tuple[str, ...]:
    """Return a table's columns: what says most of the objective, within 80 characters."""
    worth = Objective(problem)
    figures = [COLUMNS[name][0] for name in worth.figures]
    return (
        "method",
        "imbalance",
        "mixed",
        *figures,
        *_objective(worth, "objective"),
        "gap",
        "seconds",
    )


def _objective(worth: Objective, cell: str) -> tuple[str, ...]:
    """Return the cell of the objective, unless it is a predicted time, which has a column."""
    return () if worth.is_predicted_time else (cell,)


def sentences(outcome: Outcome) -> list[str]:
    """Return what was reached, how far from the optimum it can be, and what was chosen."""
    problem, result, worth = outcome.problem, outcome.result, outcome.worth
    lines = []
    time = outcome.evaluation.predicted_layer_us
    if worth.cost_model is not None and time is not None:
        lines.append(f"Predicted time: {number(time, 1)} us per layer.")
    if worth.is_known:
        # A time that is predicted by counts would be a second one beside that of the replay.
        line = "" if worth.is_predicted_time else f"Objective: {worth.text(result.objective)}"
        if result.bound_is_of_loads:
            bound = worth.text(result.bound or 0.0)
            if worth.is_predicted_time:
                bound = f"{percent(result.gap)} less time"
            line += f"; {loads_alone(bound)}"
        elif result.bound is not None and result.gap is not None:
            which = caps.SINGLE if problem.stays_single else ""
            if problem.max_imbalance is not None:
                raised = result.details.caps.raised
                which += " under the caps that it keeps" if raised else " under this cap"
            if worth.is_predicted_time:
                line = (
                    f"By INPUT's counts no placement{which} takes {percent(result.gap)} less time "
                    f"({result.bound_source})"
                )
            else:
                line += (
                    f"; no placement{which} is below {worth.text(result.bound)} "
                    f"({result.bound_source}), so this one is within {percent(result.gap)}"
                )
        if line:
            line = line.removeprefix("; ")
            lines.append(f"{line[0].upper()}{line[1:]}.")
    unseen = result.details.unseen
    if unseen is not None:
        lines.append(f"Chosen for unseen traffic: {unseen.chosen} ({unseen.reason}).")
    search = result.details.search
    if search.windows_searched is not None:
        lines.append(
            f"Searched on {search.windows_searched:,} means of windows that are alike, judged on "
            f"all {search.windows:,}."
        )
    if search.set_tokens is not None:
        lines.append(f"Expert sets are of a sample of {search.set_tokens:,} tokens.")
    return lines


def slower(outcome: Outcome, blocks: Outcome) -> list[str]:
    """Return a warning where a placement is predicted to take longer than experts in blocks."""
    time, before = (of.evaluation.predicted_layer_us for of in (outcome, blocks))
    if time is None or before is None or time <= before:
        return []
    problem = outcome.problem
    fewest = -(-problem.experts // problem.devices)
    if problem.may_copy and problem.slots > fewest:
        better = (
            f"slots for copies cost more than they bring here: try --slots-per-device {fewest}, or "
            '"moetuner advise", which tries several numbers'
        )
    else:
        better = "keep experts in blocks"
    return [
        f"Warning: this placement is predicted to be slower than experts in blocks: "
        f"{number(time, 1)} against {number(before, 1)} us per layer; {better}."
    ]


def loads_alone(bound: str) -> str:
    """Return what a bound of loads alone says, and what it does not."""
    return f"bound of loads alone: {bound}, which says little of how near this one is"


def remarks(outcomes: list[Outcome], problem: Problem) -> list[str]:
    """Return what a reader of the table must know."""
    lines, worth = [], Objective(problem)
    if worth.cost_model is not None:
        replayed = outcomes[0].evaluation.replayed
        traffic = None if replayed is None else replayed.traffic
        lines.append(whose_times(worth.cost_model, traffic, problem.arrival))
    if worth.lacks is not None:
        lines.append(f"INPUT has {worth.lacks}.")
    for outcome in outcomes:
        told = caps.remarks(problem, outcome.result.details.caps)
        lines.extend(f"{outcome.result.method}: {line}" for line in told)
        if outcome.breaks_rules:
            mark = f"{outcome.result.method} ! violates rules:"
            lines.extend(f"{mark} {broken}." for broken in outcome.result.violations)
        if outcome.result.status in ("interrupted", "time_limit"):
            lines.append(f"{outcome.result.method}: {outcome.result.status}, best so far.")
    return lines


def whose_times(model: CostModel, traffic: object, arrival: str | float) -> str:
    """Return sentences on whose times are predicted, how to get others, and of which windows."""
    line = (
        f"Predicted times are of {model.name or 'an unnamed cost model'}; for others: "
        "--cost-model FILE or GPU:HIDDENxINTERMEDIATE."
    )
    if arrival != "bursts" and isinstance(traffic, RoutingStatistics):
        line += (
            " INPUT holds counts, so its windows are evaluated as recorded: which sequences would "
            "be served together is not known."
        )
    return line
