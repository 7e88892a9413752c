"""What one method found, and what that does to other traffic: tables, sentences and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moetuner.cost import assumed_model
from moetuner.evaluation import Evaluation, evaluate_each
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.judgement import Judgement, judge
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.replay import without_groups
from moetuner.evaluation.units import units_of
from moetuner.files.cells import counted, distinct, number, percent
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.recording import Recording
from moetuner.serving import Serving
from moetuner.serving.phases import judged_windows
from moetuner.solver.bounds import caps
from moetuner.solver.result import Result
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
            *(FIGURES[name].text(getattr(evaluation, name)) for name in _figures(self.problem)),
            *(() if worth.is_predicted_time else (number(value, worth.decimals),)),
            percent(self.gap),
            number(self.result.seconds, 2),
        )


def head(problem: Problem, *, held_out: bool = False) -> tuple[str, ...]:
    """Return a table's columns, within 80 characters; a predicted time has one as a figure.

    The objective is of what was seen, which is said where the figures are of other traffic.
    """
    worth = problem.objective_function
    columns = [FIGURES[name].column for name in _figures(problem)]
    value = () if worth.is_predicted_time else ("objective" + ", seen" * held_out,)
    return ("method", *columns, *value, "gap", "seconds")


def _figures(problem: Problem) -> tuple[str, ...]:
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


def left_over(traffic: Recording, window: int | None) -> str:
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


def sentences(outcome: Outcome, *, held_out: bool = False) -> list[str]:
    """Return what was reached, and how far from the optimum it can be."""
    result, worth, problem = outcome.result, outcome.worth, outcome.problem
    lines, proven = [], ""
    if worth.cost_model is not None and outcome.evaluation.predicted_layer_us is not None:
        times = [
            f"{number(each.predicted_layer_us, 1)} us{windows_of(tokens, outcome)}"
            for tokens, each in outcome.phases.items()
        ]
        times[0] = times[0].replace(" us", " us per layer", 1)
        lines.append(f"Predicted time: {', '.join(times)}.")
    # A bound of loads alone says little of the placement.
    if result.bound is not None and result.gap is not None:
        which = caps.SINGLE if problem.stays_single else ""
        if problem.max_imbalance is not None:
            raised = result.details.caps.raised
            which += " under the caps that it keeps" if raised else " under this cap"
        if worth.is_predicted_time:
            proven = f"no placement{which} takes more than {percent(result.gap)} less time"
        else:
            proven = within(result, worth.text(result.bound), which)
    if worth.is_known:
        # A time that is predicted by counts would be a second one beside that of the replay.
        seen = " on the seen part" * held_out
        reached = f"Objective{seen}: {worth.text(result.objective)}"
        reached = "" if worth.is_predicted_time else reached
        line = "; ".join(filter(None, (reached, proven)))
        lines += [f"{line[0].upper()}{line[1:]}."] if line else []
    filled = outcome.evaluation.imbalance_filled
    if filled is not None:
        lines.append(f"With waterfill the busiest device has {filled:.3f} x the mean of all work.")
    for losses in outcome.evaluation.losses.values():
        lines.append(f"{losses.sentence[0].upper()}{losses.sentence[1:]}.")
    search = result.details.search
    if search.windows_searched is not None:
        lines.append(
            f"Searched on {search.windows_searched:,} representative windows, evaluated on all "
            f"{search.windows:,}."
        )
    if search.set_tokens is not None:
        lines.append(f"Expert sets were counted on a sample of {search.set_tokens:,} tokens.")
    return lines


def windows_of(tokens: int | None, outcome: Outcome) -> str:
    """Write in which windows a figure of an outcome is, if it has figures in several."""
    return f" in windows of {tokens:,} tokens" if outcome.longer and tokens else ""


def within(result: Result, bound: str, which: str = "") -> str:
    """Write what a bound proves of a placement."""
    gap = percent(result.gap)
    return f"no placement{which} is below {bound}, so this one is within {gap} of the optimum"


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


def empty_slots(outcome: Outcome) -> list[str]:
    """Return how many slots for copies are empty, and how to fill them; nothing if none is."""
    problem, slots = outcome.problem, outcome.result.placement.slots
    total = int(problem.capacity.sum())
    empty = total - int((slots != EMPTY).sum())
    if not empty or not problem.may_copy:
        return []
    return [
        f"{empty:,} of {total:,} slots are empty, as no copy that was tried there helps. Engines "
        "with redundant experts need full slots: pass --fill-slots, or --for ENGINE."
    ]


def slower(outcome: Outcome, before: Outcome, *, name: bool = False) -> list[str]:
    """Return a warning where a placement is predicted to take longer than one that may run."""
    slowed = [
        (tokens, time, less)
        for tokens, each in outcome.phases.items()
        if (time := each.predicted_layer_us) is not None
        and (less := before.phases[tokens].predicted_layer_us) is not None
        and time > less
    ]
    if not slowed:
        return []
    tokens, time, less = slowed[0]
    than = "contiguous" if before.result.method == "contiguous" else "what runs"
    problem, better = outcome.problem, f"keep {than}"
    fewest = -(-problem.experts // problem.devices)
    if problem.may_copy and problem.slots > fewest:
        better = (
            f"slots for copies cost more time than they save: try --slots-per-device {fewest}, or "
            '"moetuner advise", which tries several numbers'
        )
    if problem.goal != "time":
        better += ", or solve for --objective time"
    which = f"the placement of {outcome.result.method}" if name else "this placement"
    times = " against ".join(distinct(time, less, 1))
    return [
        f"Warning: {which} is predicted to be slower than {than}: "
        f"{times} us per layer{windows_of(tokens, outcome)}; "
        f"{better}."
    ]


def remarks(outcomes: list[Outcome], problem: Problem) -> list[str]:
    """Return what a reader of the table must know."""
    lines, worth = [], problem.objective_function
    if worth.cost_model is not None:
        replayed = outcomes[0].evaluation.replayed
        traffic = None if replayed is None else replayed.traffic
        lines.append(whose_times(problem.serving, traffic))
    if worth.lacks is not None:
        lines.append(f"INPUT has {worth.lacks}.")
    for outcome in outcomes:
        notes = caps.remarks(problem, outcome.result.details.caps)
        lines.extend(f"{outcome.result.method}: {line}" for line in notes)
        if outcome.breaks_rules:
            mark = f"{outcome.result.method} ! violates rules:"
            lines.extend(f"{mark} {broken}." for broken in outcome.result.violations)
        if outcome.result.status in ("interrupted", "time_limit"):
            lines.append(f"{outcome.result.method}: {outcome.result.status}, best so far.")
    return lines


def on_one_device(evaluation: Evaluation, devices: int) -> float | None:
    """Return the tokens in a hundred with all their experts of a layer on one device.

    None where it is not known, as on more than two devices: on two, a token visits one or both.
    """
    if devices != 2 or evaluation.fanout is None:
        return None
    return 100 * (2 - evaluation.fanout)


def whose_times(serving: Serving, traffic: Recording | None) -> str:
    """Return sentences on whose times are predicted, how to get others, and of which windows."""
    model = serving.cost_model
    assert model is not None
    line = assumed_model(model) or (
        f"Times are predicted with {model.shown_name}{model.weights}; "
        "for others: --cost-model FILE or GPU:HIDDENxINTERMEDIATE."
    )
    if model.measured is not None:
        line = model.origin
    if serving.arrival != "bursts" and traffic is not None and not traffic.ordered:
        line += " INPUT holds counts, so its windows are evaluated as recorded, not mixed."
    return line
