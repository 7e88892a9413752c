"""Decide the answer of an advice and write its findings, from the figures of all splits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.samples import Samples
from moetuner.files.cells import counted
from moetuner.recording import Recording
from moetuner.report.advice.copies import Choice, copies_matter, count_running_copies, find_copies
from moetuner.report.advice.drift import Drift
from moetuner.report.advice.request import Request
from moetuner.report.advice.sweep import compute_token_limit
from moetuner.report.advice.values import Advice, Answer, compute_saved_us, describe_windows
from moetuner.report.findings import Finding
from moetuner.report.outcome import find_times, write_left_out
from moetuner.report.recording import PHASES
from moetuner.report.words.parts import LEAST_SHOWN, name_windows
from moetuner.serving.arrival import Arrival
from moetuner.serving.engines import ENGINES, Engine
from moetuner.serving.phases import WINDOWS, name_phase
from moetuner.serving.regimes import WAYS
from moetuner.topology import Regime

# A gain above the price is ruled out if the upper end of its interval is at most so many prices.
NEAR_PRICE = 2
# Kinds of sequences below which a warning says how few they are.
FEW_KINDS = 10
# Share of the gain that a placement of one half must keep on the other, where halves differ.
CARRIED = 0.5
# Fewest degrees of freedom of a half in time: with one, no gain of less than 13 errors would carry.
FEWEST_FREEDOM = 2


def write_judged_on(request: Request, unseen: Recording) -> str:
    """Write what traffic placements are judged on, and how much of it fills no window."""
    text = counted(unseen.length, unseen.unit)
    if unseen.sequences is not None:
        text += f" of {counted(unseen.sequences, 'sequence')}"
    # The longest windows leave most over.
    longest = request.windows[-1]
    rest = write_left_out(unseen, longest)
    where = "" if longest is None else f"in windows of {longest:,} "
    text += f" that the placement was {'not computed' if request.is_held_out else 'computed'} from"
    text += write_order(request.serving.arrival, request.serving.engine)
    return f"{text}; {where}{rest}" if rest else text


def write_order(arrival: Arrival, engine: str | None) -> str:
    """Write that sequences are mixed, as a clause behind the tokens; "" if they are not."""
    if arrival != "mixed":
        return ""
    by_engine = "" if engine is None else f" as {ENGINES[engine].title} serves them"
    return f", sequences mixed{by_engine}"


def conclude(advice: Advice, notes: Sequence[Finding] = (), length: int = 0) -> Advice:
    """Return advice with its answer and its findings, ``notes`` among them.

    ``length`` is the number of tokens, or of windows, of the recording that is judged on.

    The last finding that forces an answer decides, and is the headline. Others that force one come
    before all other reasons.
    """
    changed, one_kind = _find_change(advice), _find_one_kind(advice)
    one_device = []
    if advice.settings["devices"] == 1:
        one_device = [Finding("one device", forces="not now")]
    forcing = [finding for finding in (*changed, *one_device, *one_kind) if finding.forces]
    if not forcing:
        forcing = [_decide_by_gains(advice, length)]
    *overruled, headline = forcing
    answer: Any = headline.forces
    reasons: list[Finding] = []
    if not one_device:
        reasons = [*_find_groups(advice), *_find_gains(advice), *notes, *_find_losses(advice)]
    warnings = [
        *find_units(advice.units, held_out=advice.settings["held_out"]),
        *(finding for finding in changed if finding.role == "warning"),
        *_find_slower(advice, answer),
        *(finding for finding in one_kind if finding.role == "warning"),
        *_find_time_source(advice),
    ]
    findings = (replace(headline, role="headline"), *reversed(overruled), *reasons, *warnings)
    return replace(advice, answer=answer, findings=findings)


def _gains_by_phase(
    judgements: Iterable[Judgement], of_step: Mapping[int | None, Comparison] | None = None
) -> dict[str, Comparison]:
    """Return gains by the phase that has windows of their size, else by the windows.

    They are gains of a step where ``of_step`` has them.
    """
    of_step = of_step or {}
    return {
        name_phase(judgement.window) or name_windows(judgement.window): of_step.get(
            judgement.window, judgement.gain
        )
        for judgement in judgements
    }


def _decide_by_gains(advice: Advice, length: int) -> Finding:
    """Return the headline that the gains alone give."""
    price: float = advice.settings["price"]
    answers = {gain.answer for gain in advice.verdicts}

    def is_ruled_out(gain: Comparison) -> bool:
        # More traffic is not worth recording where the gain is surely not far above the price.
        is_low = gain.high is not None and gain.gain <= price and gain.high <= NEAR_PRICE * price
        return gain.answer in ("certain but small", "worse") or (
            gain.answer == "no evidence" and is_low
        )

    unsure = "not enough evidence"
    if not advice.settings["held_out"]:
        return Finding("one window", forces=unsure)
    if answers == {"too few"}:
        return _find_too_few(advice, length)
    if "worth it" in answers:
        return _find_headline(advice, "worth a trial")
    if all(is_ruled_out(gain) for gain in advice.verdicts):
        if not advice.prefill_lacks:
            return _find_headline(advice, "not now")
        numbers = {"gain": advice.judged[0].gain, "tokens": advice.prefill_lacks}
        return Finding("prefill not judged", numbers, forces=unsure)
    main = max(advice.verdicts, key=lambda gain: gain.gain)
    return Finding("uncertain gain", {"gain": main}, forces=unsure)


def _find_headline(advice: Advice, answer: Answer) -> Finding:
    """Return the headline of gains that are worth a trial, or not above the price."""
    price = None if answer == "worth a trial" else advice.settings["price"]
    # True if the gain does not carry from one half's groups to the other's.
    of_groups = False
    if price is None and advice.halves and advice.drift is not None and advice.drift.is_of_groups:
        worst = min(gain.gain for gain in advice.halves)
        of_groups = worst < CARRIED * advice.main.gain.gain
    slots = max(advice.chosen_copies - count_running_copies(advice), 0)
    numbers: dict[str, Any] = {"price": price, "of_groups": of_groups, "slots": slots}
    numbers["is_of_step"] = len(advice.of_step) == len(advice.judged)
    running = {"running": advice.settings["initial"]}
    if advice.total is not None:
        share = advice.settings["prefill_share"]
        numbers |= {"gain": advice.total, "prefill_share": share, **running}
        numbers["gains"] = _gains_by_phase(advice.judged_by_gain, advice.of_step)
        return Finding("gain in total", numbers, forces=answer)
    if len(advice.judged) == 1 and not advice.prefill_lacks:
        numbers |= {**_describe_gain(advice.main), **running}
        numbers["of_step"] = advice.of_step.get(advice.main.window)
        return Finding("gain of one size of windows", numbers, forces=answer)
    numbers |= {
        "gains": _gains_by_phase(advice.judged_by_gain, advice.of_step),
        "prefill_lacks": advice.prefill_lacks,
    }
    return Finding("gains of phases", numbers, forces=answer)


def _find_too_few(advice: Advice, length: int) -> Finding:
    """Return the headline for too few independent samples, by what the samples are."""
    units = advice.units
    numbers: dict[str, Any] = {"unseen": advice.judged[0].gain.units, "least": FEWEST}
    kind = "too few units"
    if units.name == "kind":
        kind = "too few kinds"
        numbers |= _describe_kinds(units) | {"only_few": True}
    elif units.kinds is not None:
        kind = "too few drawn windows"
        numbers["windows"] = units.number
    elif units.autocorrelation.correlation_length > 1:
        kind = "neighbouring windows are alike"
        engine, replayed = advice.settings["engine"], advice.main.after.replayed
        has_groups = replayed is None or replayed.traffic.group is not None
        numbers |= _count_windows(advice, length)
        numbers |= {"engine": engine if engine in ENGINES else None}
        numbers["may_name_kinds"] = not has_groups
    else:
        numbers["unit"] = units.name
    return Finding(kind, numbers, forces="not enough evidence")


def _count_windows(advice: Advice, length: int) -> dict[str, int]:
    """Return the number of unseen windows, and how many an interval needs if as alike as these.

    The share of the recording that is left unseen, where neighbours are alike, is taken as it is.
    """
    replayed, autocorrelation = advice.main.after.replayed, advice.units.autocorrelation
    windows, size = 0, advice.main.window or 1
    if replayed is not None:
        windows = replayed.traffic.length // size
    # Half of them are held out, or fewer: as many samples as came out, or fewer, are in so many.
    samples = max(advice.judged[0].gain.units, 1)
    needed = max(2 * FEWEST * autocorrelation.correlation_time, length // size * FEWEST / samples)
    return {"windows": windows, "needed": math.ceil(needed)}


def _describe_kinds(units: Samples) -> dict[str, Any]:
    """Return the number of kinds that requests, or windows, are of, and how kinds were found."""
    requests = None if units.sequences is None else len(units.sequences)
    return {"number": units.number, "likeness": units.likeness, "requests": requests}


def find_units(units: Samples, *, held_out: bool) -> list[Finding]:
    """Return what counts as an independent sample, unless that is each of many sequences."""
    if not held_out:
        return []
    kind = ""
    numbers: dict[str, Any] = {}
    if units.name == "kind":
        kind = "kinds of traffic"
        numbers = _describe_kinds(units) | {"only_few": units.number < FEW_KINDS}
    elif units.all_alike:
        kind = "sequences all alike"
    elif units.name == "window" and units.autocorrelation.correlation_length > 1:
        kind = "windows in blocks"
        numbers = {"length": units.autocorrelation.correlation_length, "worth": units.number}
    elif units.name == "window" and units.kinds is not None:
        kind, numbers = "drawn windows", {"windows": units.number}
    elif units.name == "window":
        kind = "independent windows"
    return [Finding(kind, numbers, "warning")] if kind else []


def _find_change(advice: Advice) -> list[Finding]:
    """Return findings if the halves of the recording differ beyond chance; some force an answer."""
    drift = advice.drift
    if drift is None or not drift.is_beyond_chance:
        return []
    if advice.halves and drift.is_of_groups:
        return []  # _find_groups has the reason
    change: dict[str, Any] = {"distance": drift.distance, "expected": drift.expected}
    if not advice.halves:
        return [Finding("drift in any order", change, "warning")]
    if min(advice.carried) > 0 and min(advice.carried) >= CARRIED * advice.main.gain.gain:
        if not all(_carries_in_time(gain, drift) for gain in advice.halves):
            return [
                Finding("order of the recording", role="warning"),
                Finding(
                    "drift that may carry",
                    change | {"independent": drift.independent},
                    forces="not enough evidence",
                ),
            ]
        return [Finding("drift that carries", change, "warning")]
    numbers = {**change, "seen": "first", "unseen": "second", "gain": advice.halves[0]}
    if advice.carried[1] < advice.carried[0]:
        numbers |= {"seen": "second", "unseen": "first", "gain": advice.halves[1]}
    return [
        Finding("order of the recording", role="warning"),
        Finding("drift", numbers, forces="not enough evidence"),
    ]


def _carries_in_time(gain: Comparison, drift: Drift) -> bool:
    """Return whether a gain on one half is above 0, where the half is few blocks of time.

    The blocks of a path are alike, so its halves suit one placement by chance more often than an
    interval of independent sequences says.
    """
    spread = -gain.change
    if spread.error is None or drift.blocks is None or drift.independent is None:
        return False
    error = spread.error * math.sqrt(drift.blocks / drift.independent)
    low = replace(spread, error=error, freedom=max(drift.independent // 2 - 1, FEWEST_FREEDOM)).low
    return low is not None and low > 0


def _find_groups(advice: Advice) -> list[Finding]:
    """Return the gains of placements of halves with different groups, and that of a mix of them."""
    drift = advice.drift
    if drift is None or not (drift.is_beyond_chance and drift.is_of_groups and advice.halves):
        return []
    numbers = {
        "groups": [list(names) for names in advice.groups_of_halves],
        "worst": min(advice.halves, key=lambda gain: gain.gain),
        "mix": advice.main.gain,
        **describe_windows(advice.main),
    }
    return [Finding("halves of other groups", numbers)]


def _find_one_kind(advice: Advice) -> list[Finding]:
    """Return that the recording is of one kind of traffic, which decides if that is one group."""
    if advice.one_kind is None:
        return []
    numbers, groups = {"shows": advice.one_kind}, advice.main.groups
    if groups and not {*groups} & {*PHASES}:
        return [Finding("one kind of traffic", numbers, forces="not enough evidence")]
    return [Finding("one kind of traffic", numbers, "warning")]


def _find_slower(advice: Advice, answer: Answer) -> list[Finding]:
    """Return the groups that the proposed placement serves worse, if any."""
    main = advice.main
    slower = main.worse(LEAST_SHOWN, measures=(main.measure,)) if main.groups else []
    if not slower:
        return []
    repeat = None
    # There is a placement to evaluate only where it is worth a trial.
    if answer == "worth a trial":
        repeat = {"window": main.window, "running": advice.settings["initial"]}
    groups = {loss.group: loss.change.value for loss in slower}
    numbers = {"groups": groups, **describe_windows(main), "repeat": repeat}
    return [Finding("slower groups", numbers, "warning")]


def _find_time_source(advice: Advice) -> list[Finding]:
    """Return which model predicts the times, and what a load table does not have."""
    model = advice.problem.cost_model
    assert model is not None
    warnings = [find_times(model, advice.problem.statistics)]
    if advice.main.window is None:
        warnings.append(Finding("load table", role="warning"))
    return warnings


def find_notes(request: Request, advice: Advice) -> list[Finding]:
    """Return findings on one placement for both phases, on the engine, and on waterfill."""
    notes, phases = [], advice.phases
    if phases is not None:
        two_pay = phases.gain_of_two > request.price
        costs = {"costs_of_one": phases.costs_of_one, "costs": phases.costs}
        # Only recordings with labels say that they hold both phases.
        if two_pay or set(PHASES) <= advice.main.groups.keys():
            notes.append(Finding("phases apart", {**costs, "two_pay": two_pay}))
    if request.engine is not None and request.serving.engine is not None:
        notes += _find_engine(request, request.engine, request.serving.engine, advice)
    if request.serving.waterfill is not None:
        imbalance = advice.main.whole["imbalance_filled"]
        numbers = {"before": imbalance.before, "after": imbalance.after, "gain": imbalance.gain}
        notes.append(Finding("waterfill", numbers))
    return notes


def _find_engine(request: Request, engine: Engine, name: str, advice: Advice) -> list[Finding]:
    """Return limits of the engine, and the imbalance if it divided tokens of copies."""
    notes = []
    if not engine.may_copy and max(request.copies):
        notes.append(Finding("no copies", {"engine": name}))
    tokens = compute_token_limit(request, advice.chosen_copies)
    if tokens is not None and tokens < WINDOWS[-1]:
        without_copies = compute_token_limit(request, 0) if advice.chosen_copies else None
        limits = {"tokens": tokens, "without_copies": without_copies}
        notes.append(Finding("low-latency kernels", {"engine": name, **limits}))
    if advice.lp_split is not None and engine.window_split is not None:
        notes.append(Finding("tokens divided", {"engine": name, **advice.lp_split._asdict()}))
    return notes


def _find_losses(advice: Advice) -> list[Finding]:
    """Return what the loss of a device does to the proposed placement, where it has copies."""
    losses = advice.main.after.losses.get("device")
    return [] if losses is None else [Finding("lost device", {"losses": losses})]


def _find_gains(advice: Advice) -> list[Finding]:
    """Return the gains in windows of each size, over EPLB, by group, and of copies."""
    ordered = advice.judged_by_gain
    running = {"running": advice.settings["initial"]}

    reasons = [Finding("gain", {**_describe_gain(ordered[0]), **running})]
    if len(ordered) > 1:
        reasons = [Finding("gain of a phase", _describe_gain(judgement)) for judgement in ordered]
    reasons.append(_find_saved(ordered))
    if advice.over_eplb:
        gains = _gains_by_phase(advice.over_eplb[judgement.window] for judgement in ordered)
        reasons.append(Finding("gain over EPLB", {"gains": gains}))
    reasons += _find_on_one(advice)
    aspects = _find_small_gains(advice)
    slots = None
    if len(advice.copies) > 1 and not copies_matter(advice):
        slots = max(row.per_device for row in advice.copies)
    if aspects or slots is not None:
        reasons.append(Finding("little to gain", {"aspects": aspects, "slots": slots}))
    if advice.by_group:
        main = advice.main
        by_group = {group: gains[main.window] for group, gains in advice.by_group.items()}
        reasons.append(Finding("groups apart", {"gains": by_group, **describe_windows(main)}))
    if copies_matter(advice):
        reasons.append(
            find_copies(
                advice.copies,
                Choice(advice.chosen_copies, advice.fewer_copies, advice.larger_copies),
                advice.problem.statistics.layers,
                running=count_running_copies(advice),
                memory=advice.memory,
            )
        )
    return reasons


def _describe_gain(judgement: Judgement) -> dict[str, Any]:
    return {"gain": judgement.gain, **describe_windows(judgement)}


def _find_saved(judged: Sequence[Judgement]) -> Finding:
    """Return what a step of all layers saves, and what it takes now, in microseconds by phase."""
    saved = {
        name_phase(judgement.window) or name_windows(judgement.window): (
            compute_saved_us(judgement),
            judgement.layers * judgement.gain.before,
        )
        for judgement in judged
    }
    step = "step" if judged[0].window else "window"
    return Finding("saved per step", {"saved": saved, "layers": judged[0].layers, "step": step})


def _find_on_one(advice: Advice) -> list[Finding]:
    """Return how many tokens stay on one of two devices; nothing where that does not change."""
    counts = [evaluation.on_one_device for evaluation in (advice.running, advice.proposed)]
    before, after = ("" if count is None else f"{count:.0f}" for count in counts)
    if before == after or WAYS[advice.settings["regime"]].joins_layers:
        return []
    numbers = {"before": before, "after": after, "running": advice.settings["initial"]}
    return [Finding("tokens on one device", numbers)]


def _find_small_gains(advice: Advice) -> list[str]:
    """Return the aspects, such as balance, whose figures change by less than the price."""
    price: float = advice.settings["price"]
    regime: Regime = advice.settings["regime"]
    gains: dict[str, list[float]] = {}
    for measure, figure in FIGURES.items():
        gain = advice.main.gains.get(measure)
        if gain is not None and figure.title and figure.matters_in(regime):
            gains.setdefault(figure.aspect, []).append(gain.gain)
    return [aspect for aspect, values in gains.items() if max(map(abs, values)) < price]


def find_costs(advice: Advice) -> list[Finding]:
    """Return what has to move, and when that has paid; nothing where nothing is proposed."""
    moving, step = advice.moving, advice.step
    if not moving.experts or advice.answer == "not now":
        return []
    numbers: dict[str, Any] = {"experts": moving.experts, "of_experts": moving.of_experts}
    if moving.bytes is None:
        costs = [Finding("moving, size unknown", numbers, "cost")]
    else:
        numbers |= {
            "moved_bytes": moving.bytes,
            "of_bytes": moving.of_bytes,
            "seconds": moving.seconds or 0.0,
            "device_bytes": moving.device_bytes,
            "steps": None if moving.steps is None else int(moving.steps),
            "phase": name_phase(advice.main.window),
        }
        costs = [Finding("moving", numbers, "cost")]
    if step is not None:
        numbers = {"experts": step.experts, "moved_bytes": step.bytes, "gain": step.gain.gain}
        numbers["of_gain"] = advice.main.gain.gain
        costs.append(Finding("few moves", numbers, "cost"))
    return costs
