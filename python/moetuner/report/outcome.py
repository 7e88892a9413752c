"""Outcomes: the result of a method and its evaluations, as rows of tables, findings and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation, evaluate_each
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.judgement import Judgement, judge
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.replay import drop_groups
from moetuner.evaluation.samples import find_samples
from moetuner.files.cells import counted, number, percent
from moetuner.placement import EMPTY, Placement, PlacementDiff
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.recording import Recording
from moetuner.report.findings import Finding
from moetuner.serving import Serving
from moetuner.serving.phases import choose_judged_windows
from moetuner.solver.result import CapsDetails, Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

# Figures of every table: the second is of windows whose tokens or sequences are mixed.
MIXED = ("imbalance", "imbalance_mixed")


@dataclass(frozen=True)
class Outcome:
    """The result of a method on seen traffic, with its evaluation on the traffic to judge on.

    ``longer`` has the evaluations in the other windows that the problem covers, by their tokens.
    """

    problem: Problem
    result: Result
    evaluation: Evaluation
    longer: Mapping[int | None, Evaluation] = field(default_factory=dict)

    @property
    def phases(self) -> dict[int | None, Evaluation]:
        """The evaluations in windows of all sizes, by the tokens of a window."""
        replayed = self.evaluation.replayed
        window = None if replayed is None else replayed.setting.window
        return {window: self.evaluation, **self.longer}

    @property
    def objective(self) -> Objective:
        """The objective of the problem."""
        return self.problem.objective_function

    @property
    def breaks_rules(self) -> bool:
        """True if the placement breaks rules, apart from load caps that had to be raised."""
        return self.result.status == "violates rules"

    @property
    def gap(self) -> float | None:
        """Gap of the result; None where the objective is unknown."""
        return self.result.gap if self.objective.has_needed_tables else None

    def to_dict(self) -> dict[str, Any]:
        """Return fields of the evaluation and of the result as JSON values."""
        has_value = self.objective.has_needed_tables
        return {
            **self.evaluation.to_dict(),
            "phases": [
                {"window": tokens, "predicted_layer_us": evaluation.predicted_layer_us}
                for tokens, evaluation in self.phases.items()
            ],
            "objective": self.result.objective if has_value else None,
            "unit": self.objective.unit,
            "bound": self.result.bound if has_value else None,
            "bound_source": self.result.bound_source,
            "bound_scope": self.result.bound_scope if has_value else None,
            "gap": self.gap,
            "status": self.result.status,
            "violations": list(self.result.violations),
            "solve_seconds": self.result.seconds,
            "details": self.result.details.to_dict(),
        }

    def row(self) -> tuple[str, ...]:
        """Return the cells of a row under ``head``."""
        objective, method = self.objective, self.result.method
        cells = [f"{method} !" if self.breaks_rules else method]
        for name in _list_figures(self.problem):
            cells.append(FIGURES[name].text(getattr(self.evaluation, name)))
        if not objective.is_predicted_time:
            value = self.result.objective if objective.has_needed_tables else None
            cells.append(number(value, objective.aim.decimals))
        return (*cells, percent(self.gap), number(self.result.seconds, 2))


def head(problem: Problem, *, held_out: bool = False) -> tuple[str, ...]:
    """Return a table's columns, within 80 characters.

    An objective that is a predicted time has no column of its own, as that figure has one. The
    objective is that of seen traffic; where figures are those of held-out traffic, its column says
    so.
    """
    columns = [FIGURES[name].column for name in _list_figures(problem)]
    if not problem.objective_function.is_predicted_time:
        columns.append("objective, seen" if held_out else "objective")
    return ("method", *columns, "gap", "seconds")


def _list_figures(problem: Problem) -> tuple[str, ...]:
    """Return the figures of a table; where all windows are mixed, the imbalance has one column."""
    imbalance = MIXED[:1] if problem.arrival == "mixed" else MIXED
    return (*imbalance, *problem.objective_function.figures)


def replay_results(
    results: Sequence[Result],
    problem: Problem,
    serving: Serving,
    judged_on: Recording,
    options: ReplayOptions,
    *,
    by_group: bool = True,
    progress: Callable[[float], None] | None = None,
) -> list[Outcome]:
    """Return outcomes of results on the traffic to judge on, which is read once for all of them.

    They have evaluations in the windows that are served, and in all others that the problem covers.
    ``by_group`` says whether to evaluate every group of a trace by itself too, which takes as long
    again. ``progress`` is as for ``evaluate_each``.
    """
    windows = [serving.window]
    if judged_on.ordered:
        others = choose_judged_windows(judged_on.length, problem.shares)
        windows += [tokens for tokens in others if tokens != serving.window]
    evaluations = evaluate_each(
        [result.placement for result in results],
        judged_on if by_group else drop_groups(judged_on),
        [replace(serving, window=window) for window in windows],
        options,
        progress=progress,
    )
    return [
        Outcome(problem, result, served, dict(zip(windows[1:], others, strict=True)))
        for result, (served, *others) in zip(results, zip(*evaluations, strict=True), strict=True)
    ]


def write_left_out(traffic: Recording, window: int | None) -> str:
    """Write which traffic fills no window, so that means over windows leave it out; "" if none."""
    if isinstance(traffic, RoutingStatistics):
        short = int((~traffic.is_full_window).sum())
        return f"imbalance and time leave out {counted(short, 'shorter window')}" if short else ""
    rest = traffic.length % (window or max(traffic.length, 1))
    if rest in (0, traffic.length):
        return ""
    return f"imbalance and time leave out the last {counted(rest, 'token')}, which fill none"


def judge_outcome(
    before: Outcome,
    after: Outcome,
    recording: Recording,
    window: int | None,
    *,
    by_group: bool = False,
) -> Judgement:
    """Judge the change from one outcome to another, in windows of a size.

    The verdict is on the figure that the placement was computed for. ``recording`` is the whole
    recording, seen and unseen, from which the independent samples are computed.
    """
    return judge(
        before.phases[window],
        after.phases[window],
        figure=after.objective.figure,
        by_group=by_group,
        units=find_samples(recording, window=window),
        names=(before.result.method, after.result.method),
    )


def judge_outcomes(
    before: Outcome, after: Outcome, recording: Recording, *, by_group: bool = False
) -> dict[int | None, Judgement]:
    """Judge the change from one outcome to another in every size of windows, by its tokens.

    Groups are judged in windows of the first size alone.
    """
    first = next(iter(after.phases))
    return {
        tokens: judge_outcome(
            before, after, recording, tokens, by_group=by_group and tokens == first
        )
        for tokens in after.phases
        if tokens in before.phases
    }


def find_objective(outcome: Outcome, *, held_out: bool = False) -> list[Finding]:
    """Return predicted time, objective and bound of an outcome, and how it was searched."""
    result, objective = outcome.result, outcome.objective
    findings: list[Finding] = []
    if objective.cost_model is not None and outcome.evaluation.predicted_layer_us is not None:
        times = [
            {"window": window_to_name(window, outcome), "us": evaluation.predicted_layer_us}
            for window, evaluation in outcome.phases.items()
        ]
        findings.append(Finding("predicted time", {"times": times}))
    numbers: dict[str, Any] = {
        # A time that is predicted from counts would be a second one beside that of the replay.
        "reached": None if objective.is_predicted_time else objective.text(result.objective),
        "seen": held_out,
        "bound": _find_bound(outcome),
    }
    if objective.has_needed_tables and (numbers["reached"] or numbers["bound"]):
        findings.append(Finding("objective", numbers))
    evaluation, search = outcome.evaluation, result.details.search
    if evaluation.imbalance_filled is not None:
        imbalance = {"imbalance": evaluation.imbalance_filled}
        findings.append(Finding("imbalance with waterfill", imbalance))
    findings += [Finding("losses", {"losses": losses}) for losses in evaluation.losses.values()]
    if search.windows_searched is not None:
        windows = {"searched": search.windows_searched, "windows": search.windows}
        findings.append(Finding("representative windows", windows))
    if search.set_tokens is not None:
        findings.append(Finding("sample of tokens", {"tokens": search.set_tokens}))
    return findings


def _find_bound(outcome: Outcome) -> dict[str, Any] | None:
    """Return the bound of a result and what it holds for; None where there is no bound or gap."""
    result, problem = outcome.result, outcome.problem
    # A bound without a gap is of loads alone, and says little about the placement.
    if result.bound is None or result.gap is None:
        return None
    cap = None
    if problem.max_imbalance is not None:
        cap = "raised" if result.details.caps.raised else "kept"
    is_time = outcome.objective.is_predicted_time
    bound = None if is_time else outcome.objective.text(result.bound)
    return {"bound": bound, "gap": result.gap, "single": problem.stays_single, "cap": cap}


def window_to_name(window: int | None, outcome: Outcome) -> int | None:
    """Return the tokens of a window, if an outcome has windows of several sizes; else None."""
    return window if outcome.longer else None


def find_gain(
    gain: Comparison, window: int | None = None, part: Literal["unseen", "seen"] | None = None
) -> Finding:
    """Return the finding of a gain, in windows of a size and on a part of traffic if named."""
    return Finding("judged gain", {"gain": gain, "window": window, "part": part})


def make_running_result(problem: Problem, placement: Placement, name: str = "running") -> Result:
    """Return a placement that runs already as a result, which need not keep the problem's rules."""
    return Result(
        placement,
        method=name,
        status="feasible",
        objective=problem.value(placement),
        bound=None,
        bound_source=None,
        seconds=0.0,
    )


def find_empty_slots(outcome: Outcome) -> list[Finding]:
    """Return the finding of empty slots, if there are any and experts may have copies."""
    problem, slots = outcome.problem, outcome.result.placement.slots
    total = int(problem.capacity.sum())
    empty = total - int((slots != EMPTY).sum())
    if not empty or not problem.may_copy:
        return []
    used = int((slots != EMPTY).sum(axis=2).max())
    numbers: dict[str, Any] = {"empty": empty, "slots": total, "used": used}
    numbers |= {"per_device": problem.slots, "over": None}
    # An engine has as many slots on every device, and no two copies of an expert on one.
    if total == slots.size and problem.slots <= problem.num_experts:
        filled, reached = problem.value(outcome.result.placement.filled()), outcome.result.objective
        numbers["over"] = filled / reached - 1 if reached else None
    return [Finding("empty slots", numbers, "warning")]


def find_moves(diff: PlacementDiff, topology: Topology | None = None) -> Finding:
    """Return the finding of the experts that move, their bytes, and how many leave their node."""
    numbers = {"experts": diff.experts_moved, "moved_bytes": diff.bytes_moved}
    if topology is not None and topology.nodes > 1:
        node = topology.node_of_device
        numbers["between_nodes"] = int(diff.pairs[node[:, None] != node].sum())
    return Finding("experts that move", numbers, "cost")


def find_slower(outcome: Outcome, before: Outcome, *, name: bool = False) -> list[Finding]:
    """Return a warning if an outcome is predicted to be slower than what may run before it.

    ``name`` says whether to name the method of the slower one.
    """
    slower = []
    for tokens, evaluation in outcome.phases.items():
        time = evaluation.predicted_layer_us
        time_before = before.phases[tokens].predicted_layer_us
        if time is not None and time_before is not None and time > time_before:
            slower.append((tokens, time, time_before))
    if not slower:
        return []
    window, us, us_before = slower[0]
    problem = outcome.problem
    fewest = problem.single_slots
    numbers = {
        "method": outcome.result.method if name else None,
        "than": before.result.method,
        "us": us,
        "us_before": us_before,
        "window": window_to_name(window, outcome),
        "fewest_slots": fewest if problem.may_copy and problem.slots > fewest else None,
        "goal": problem.goal,
        "survive": problem.survive,
    }
    return [Finding("slower than what runs", numbers, "warning")]


def find_remarks(outcomes: list[Outcome], problem: Problem) -> list[Finding]:
    """Return the findings below a table of outcomes: on times, load caps and broken rules."""
    findings, objective = [], problem.objective_function
    if objective.cost_model is not None:
        replayed = outcomes[0].evaluation.replayed
        traffic = None if replayed is None else replayed.traffic
        findings += find_times_of(problem.serving, traffic)
    if objective.lacks is not None:
        findings.append(Finding("lacks of the recording", {"lacks": objective.lacks}))
    for outcome in outcomes:
        result, method = outcome.result, outcome.result.method
        for finding in find_caps(problem, result.details.caps):
            findings.append(replace(finding, about=method))
        for rule in result.violations if outcome.breaks_rules else ():
            findings.append(Finding("broken rule", {"rule": rule}, about=method))
        if result.status in ("interrupted", "time_limit"):
            findings.append(Finding("cut short", {"status": result.status}, about=method))
    return findings


def find_caps(problem: Problem, details: CapsDetails) -> list[Finding]:
    """Return the layers whose load cap no placement keeps, and those whose cap was raised.

    The former have the smallest cap that can be kept, as a range.
    """
    numbers: dict[str, Any] = {"single": problem.stays_single, "cap": problem.max_imbalance}
    numbers["layers"] = problem.layers
    findings = []
    if details.infeasible:
        needs = {layer: list(ends) for layer, ends in details.infeasible.items()}
        findings.append(Finding("cap that nothing keeps", numbers | {"needs": needs}))
    raised = [cap for layer, cap in details.raised.items() if layer not in details.infeasible]
    if raised:
        numbers |= {"raised": len(raised), "highest": max(raised)}
        findings.append(Finding("cap that was raised", numbers))
    return findings


def find_times(model: CostModel, traffic: Recording | None) -> Finding:
    """Return the warning that times are predicted or measured, and of which experts they are."""
    numbers: dict[str, Any] = {"weight_bits": model.weight_bits}
    if model.sizes == "assumed" and model.measured is None:
        numbers["model"] = None if traffic is None else traffic.model
        return Finding("assumed experts", numbers, "warning")
    numbers["cost_model"] = model.shown_name
    if model.measured is None:
        return Finding("predicted times", numbers, "warning")
    error = model.residual if model.prediction_error is None else model.prediction_error
    return Finding("measured times", numbers | {"error": error}, "warning")


def find_times_of(serving: Serving, traffic: Recording | None) -> list[Finding]:
    """Return the warnings on predicted times, for commands whose options name a cost model."""
    assert serving.cost_model is not None
    times = find_times(serving.cost_model, traffic)
    if times.kind == "predicted times":
        times = replace(times, kind="cost model")  # this sentence names the option
    warnings = [times]
    if serving.arrival != "bursts" and traffic is not None and not traffic.ordered:
        warnings.append(Finding("windows as recorded", role="warning"))
    return warnings
