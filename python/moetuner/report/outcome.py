"""What one method found, and what that does to other traffic: tables, sentences and JSON."""

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
from moetuner.evaluation.replay import without_groups
from moetuner.evaluation.units import units_of
from moetuner.files.cells import counted, number, percent
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.recording import Recording
from moetuner.report.findings import Finding
from moetuner.serving import Serving
from moetuner.serving.phases import judged_windows
from moetuner.solver.result import CapsDetails, Result
from moetuner.statistics import RoutingStatistics

# Figures of every table.
MIXED = ("imbalance", "imbalance_mixed")


@dataclass(frozen=True)
class Outcome:
    """What one method found on the traffic it saw, and what that does to the traffic it did not.

    ``longer`` has the evaluations in other windows that the problem is about, by their tokens.
    """

    problem: Problem
    result: Result
    evaluation: Evaluation
    longer: Mapping[int | None, Evaluation] = field(default_factory=dict)

    @property
    def phases(self) -> dict[int | None, Evaluation]:
        """All evaluations, by the tokens of a window."""
        replayed = self.evaluation.replayed
        window = None if replayed is None else replayed.setting.window
        return {
            window: self.evaluation,
            **self.longer,
        }

    @property
    def worth(self) -> Objective:
        """What the placement is worth to the problem."""
        return self.problem.objective_function

    @property
    def breaks_rules(self) -> bool:
        """Whether the placement breaks rules, other than a cap that had to be raised."""
        return self.result.status == "violates rules"

    @property
    def gap(self) -> float | None:
        """Gap of the result; None where the objective is not known."""
        return self.result.gap if self.worth.is_known else None

    def to_dict(self) -> dict[str, Any]:
        """Return fields of the evaluation and of the result."""
        has_value = self.worth.is_known
        return {
            **self.evaluation.to_dict(),
            "phases": [
                {"window": tokens, "predicted_layer_us": each.predicted_layer_us}
                for tokens, each in self.phases.items()
            ],
            "objective": self.result.objective if has_value else None,
            "unit": self.worth.unit,
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
        """Return the cells of a table under ``head``."""
        evaluation, worth = self.evaluation, self.worth
        value = self.result.objective if worth.is_known else None
        return (
            f"{self.result.method} !" if self.breaks_rules else self.result.method,
            *(
                FIGURES[name].text(getattr(evaluation, name))
                for name in _list_figures(self.problem)
            ),
            *(() if worth.is_predicted_time else (number(value, worth.decimals),)),
            percent(self.gap),
            number(self.result.seconds, 2),
        )


def head(problem: Problem, *, held_out: bool = False) -> tuple[str, ...]:
    """Return a table's columns, within 80 characters; a predicted time has one as a figure.

    The objective is of what was seen, which is said where the figures are of other traffic.
    """
    worth = problem.objective_function
    columns = [FIGURES[name].column for name in _list_figures(problem)]
    value = () if worth.is_predicted_time else ("objective" + ", seen" * held_out,)
    return ("method", *columns, *value, "gap", "seconds")


def _list_figures(problem: Problem) -> tuple[str, ...]:
    """Return the figures of a table; where all windows are mixed, their imbalance stands once."""
    imbalance = MIXED[:1] if problem.arrival == "mixed" else MIXED
    return (*imbalance, *problem.objective_function.figures)


def replay(
    placements: Sequence[Placement],
    serving: Serving,
    traffic: Recording,
    windows: Sequence[int | None],
    options: ReplayOptions,
    *,
    by_group: bool = True,
    progress: Callable[[float], None] | None = None,
) -> dict[int | None, list[Evaluation]]:
    """Evaluate placements on traffic that is served in windows of several sizes.

    Without ``by_group`` no group of a trace is evaluated by itself, which takes as long as all of
    it. ``progress`` is as for ``evaluate_each``.
    """
    traffic = traffic if by_group else without_groups(traffic)
    servings = [replace(serving, window=window) for window in windows]
    evaluations = evaluate_each(placements, traffic, servings, options, progress=progress)
    return dict(zip(windows, evaluations, strict=True))


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
    """Evaluate the placements of results on other traffic, which is read once for all of them.

    In the windows that are served, and in all others that the problem is about. ``by_group`` and
    ``progress`` are as for ``replay``.
    """
    windows = [serving.window]
    if judged_on.ordered:
        judged = judged_windows(judged_on.length, problem.shares)
        windows += [tokens for tokens in judged if tokens != serving.window]
    placements = [result.placement for result in results]
    evaluations = replay(
        placements, serving, judged_on, windows, options, by_group=by_group, progress=progress
    )
    first = evaluations.pop(serving.window)
    return [
        Outcome(problem, *pair, {tokens: each[at] for tokens, each in evaluations.items()})
        for at, pair in enumerate(zip(results, first, strict=True))
    ]


def write_left_out(traffic: Recording, window: int | None) -> str:
    """Write what of some traffic is no step, so that no mean over windows has it; "" if nothing."""
    if isinstance(traffic, RoutingStatistics):
        short = int((~traffic.is_step).sum())
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
    """Judge the change from one outcome to another, in windows of so many tokens.

    The verdict is on the figure that the placement was computed for. ``recording`` is the whole of
    which both saw a part: it tells what is independent.
    """
    return judge(
        before.phases[window],
        after.phases[window],
        figure=after.worth.figure,
        by_group=by_group,
        units=units_of(recording, window=window),
        names=(before.result.method, after.result.method),
    )


def judge_outcomes(
    before: Outcome,
    after: Outcome,
    recording: Recording,
    *,
    by_group: bool = False,
) -> dict[int | None, Judgement]:
    """Judge the same in every size of windows; groups in the first ones alone."""
    first = next(iter(after.phases))
    return {
        tokens: judge_outcome(
            before, after, recording, tokens, by_group=by_group and tokens == first
        )
        for tokens in after.phases
        if tokens in before.phases
    }


def find_worth(outcome: Outcome, *, held_out: bool = False) -> list[Finding]:
    """Return what was reached, and how far from the optimum it can be."""
    result, worth = outcome.result, outcome.worth
    found: list[Finding] = []
    if worth.cost_model is not None and outcome.evaluation.predicted_layer_us is not None:
        times = [
            {"window": window_to_name(window, outcome), "us": each.predicted_layer_us}
            for window, each in outcome.phases.items()
        ]
        found.append(Finding("predicted time", {"times": times}))
    numbers: dict[str, Any] = {
        # A time that is predicted by counts would be a second one beside that of the replay.
        "reached": None if worth.is_predicted_time else worth.text(result.objective),
        "seen": held_out,
        "bound": _find_bound(outcome),
    }
    if worth.is_known and (numbers["reached"] or numbers["bound"]):
        found.append(Finding("objective", numbers))
    filled = outcome.evaluation.imbalance_filled
    if filled is not None:
        found.append(Finding("imbalance with waterfill", {"imbalance": filled}))
    found += [Finding("losses", {"losses": each}) for each in outcome.evaluation.losses.values()]
    search = result.details.search
    if search.windows_searched is not None:
        searched = {"searched": search.windows_searched, "windows": search.windows}
        found.append(Finding("representative windows", searched))
    if search.set_tokens is not None:
        found.append(Finding("sample of tokens", {"tokens": search.set_tokens}))
    return found


def _find_bound(outcome: Outcome) -> dict[str, Any] | None:
    """Return what is proven of a result; None where there is no bound."""
    result, problem = outcome.result, outcome.problem
    # A bound of loads alone says little of the placement.
    if result.bound is None or result.gap is None:
        return None
    cap = None
    if problem.max_imbalance is not None:
        cap = "raised" if result.details.caps.raised else "kept"
    is_time = outcome.worth.is_predicted_time
    bound = None if is_time else outcome.worth.text(result.bound)
    return {"bound": bound, "gap": result.gap, "single": problem.stays_single, "cap": cap}


def window_to_name(window: int | None, outcome: Outcome) -> int | None:
    """Return the tokens of a window, if an outcome has figures in windows of several sizes."""
    return window if outcome.longer else None


def find_gain(
    gain: Comparison, window: int | None = None, part: Literal["unseen", "seen"] | None = None
) -> Finding:
    """Return a gain that was judged, in windows and on a part of the traffic if these are said."""
    return Finding("judged gain", {"gain": gain, "window": window, "part": part})


def running(problem: Problem, placement: Placement, name: str = "running") -> Result:
    """Return the result that a placement which runs already would be; rules are not for it."""
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
    """Return how many slots for copies are empty; nothing if none is."""
    problem, slots = outcome.problem, outcome.result.placement.slots
    total = int(problem.capacity.sum())
    empty = total - int((slots != EMPTY).sum())
    if not empty or not problem.may_copy:
        return []
    return [Finding("empty slots", {"empty": empty, "slots": total}, "warning")]


def find_slower(outcome: Outcome, before: Outcome, *, name: bool = False) -> list[Finding]:
    """Return that a placement is predicted to take longer than one that may run, if it is."""
    slowed = [
        (tokens, time, less)
        for tokens, each in outcome.phases.items()
        if (time := each.predicted_layer_us) is not None
        and (less := before.phases[tokens].predicted_layer_us) is not None
        and time > less
    ]
    if not slowed:
        return []
    window, time, less = slowed[0]
    problem = outcome.problem
    fewest = -(-problem.experts // problem.devices)
    numbers = {
        "method": outcome.result.method if name else None,
        "than": before.result.method,
        "us": time,
        "us_before": less,
        "window": window_to_name(window, outcome),
        "fewest_slots": fewest if problem.may_copy and problem.slots > fewest else None,
        "goal": problem.goal,
        "survive": problem.survive,
    }
    return [Finding("slower than what runs", numbers, "warning")]


def find_remarks(outcomes: list[Outcome], problem: Problem) -> list[Finding]:
    """Return what a reader of the table must know."""
    found, worth = [], problem.objective_function
    if worth.cost_model is not None:
        replayed = outcomes[0].evaluation.replayed
        traffic = None if replayed is None else replayed.traffic
        found += find_times_of(problem.serving, traffic)
    if worth.lacks is not None:
        found.append(Finding("lacks of the recording", {"lacks": worth.lacks}))
    for outcome in outcomes:
        result, method = outcome.result, outcome.result.method
        for finding in find_caps(problem, result.details.caps):
            found.append(replace(finding, about=method))
        for rule in result.violations if outcome.breaks_rules else ():
            found.append(Finding("broken rule", {"rule": rule}, about=method))
        if result.status in ("interrupted", "time_limit"):
            found.append(Finding("cut short", {"status": result.status}, about=method))
    return found


def count_on_one_device(evaluation: Evaluation, devices: int) -> float | None:
    """Return the tokens in a hundred with all their experts of a layer on one device.

    None where it is not known, as on more than two devices: on two, a token visits one or both.
    """
    if devices != 2 or evaluation.fanout is None:
        return None
    return 100 * (2 - evaluation.fanout)


def find_caps(problem: Problem, details: CapsDetails) -> list[Finding]:
    """Return the layers whose load cap nothing keeps, and those where nothing was found that does.

    Layers have the smallest cap that can be kept, from and to.
    """
    numbers = {"single": problem.stays_single, "cap": problem.max_imbalance}
    numbers["layers"] = problem.layers
    found = []
    if details.infeasible:
        needs = {layer: list(ends) for layer, ends in details.infeasible.items()}
        found.append(Finding("cap that nothing keeps", numbers | {"needs": needs}))
    raised = [cap for layer, cap in details.raised.items() if layer not in details.infeasible]
    if raised:
        numbers |= {"raised": len(raised), "highest": max(raised)}
        found.append(Finding("cap that was raised", numbers))
    return found


def find_times(model: CostModel, traffic: Recording | None) -> Finding:
    """Return whose times a cost model predicts, as a warning."""
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
    """Return whose times are predicted, and of which windows."""
    assert serving.cost_model is not None
    times = find_times(serving.cost_model, traffic)
    if times.kind == "predicted times":
        times = replace(times, kind="cost model")  # which an option may replace
    found = [times]
    if serving.arrival != "bursts" and traffic is not None and not traffic.ordered:
        found.append(Finding("windows as recorded", role="warning"))
    return found
