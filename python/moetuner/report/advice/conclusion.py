"""What the figures of all splits amount to: one of three answers, decided on findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.units import Units
from moetuner.files.cells import counted
from moetuner.recording import Recording
from moetuner.report.advice.request import Request
from moetuner.report.advice.sweep import compute_token_limit
from moetuner.report.advice.values import Advice, Answer, Copies, describe_windows
from moetuner.report.findings import Finding
from moetuner.report.outcome import count_on_one_device, find_times, write_left_out
from moetuner.report.recording import PHASES
from moetuner.report.words.parts import LEAST_SHOWN, name_windows
from moetuner.serving.arrival import Arrival
from moetuner.serving.engines import ENGINES, Engine
from moetuner.serving.phases import WINDOWS, name_phase
from moetuner.topology import Regime

# Part of the best gain that a number of copies may miss and still be the knee, as a share.
NEAR_BEST = 0.005
# Times the price that the upper end of an interval may reach where nothing is to be won.
NEAR_PRICE = 2
# Kinds of sequences below which it is said how few they are.
FEW_KINDS = 10
# Part of the gain that must be left on the other half of a recording that changes its kind.
CARRIED = 0.5
# Part of the layers that need copies from which on it is not worth a word that others do not.
MOST_LAYERS = 0.75


def find_fewest_copies_near_best(
    swept: tuple[Copies, ...], prefill_share: float | None = None
) -> int:
    """Return the fewest slots for copies whose gain comes near to the best that harms no window.

    Where the share of prefill is known, what counts is the gain of decode and prefill together.
    Copies share tokens, and so have the weights of an expert read on several devices: in windows of
    few tokens that may cost more than balance saves.
    """
    if prefill_share is not None:
        shares = dict(zip(swept[0].gains, (1 - prefill_share, prefill_share), strict=True))
        totals = {
            each.per_device: sum(share * each.mean(window) for window, share in shares.items())
            for each in swept
        }
        return min(
            slots for slots, gain in totals.items() if gain >= max(totals.values()) - NEAR_BEST
        )
    least = min(swept, key=lambda each: each.per_device)
    harmless = [
        each
        for each in swept
        if all(
            each.mean(window) >= min(0.0, least.mean(window)) - NEAR_BEST for window in each.gains
        )
    ]
    best = max(each.best for each in harmless)
    return min(each.per_device for each in harmless if each.best >= best - NEAR_BEST)


def write_judged_on(request: Request, unseen: Recording) -> str:
    """Write what placements are judged on, and what of it is in no window."""
    text = counted(unseen.length, unseen.unit)
    if unseen.sequences is not None:
        text += f" of {counted(unseen.sequences, 'sequence')}"
    # The longest windows leave most over.
    longest = request.windows[-1]
    rest = write_left_out(unseen, longest)
    where = "" if longest is None else f"in windows of {longest:,} "
    text += f" that the placement was {'not ' * request.is_held_out}computed from"
    text += write_order(request.serving.arrival, request.serving.engine)
    return f"{text}; {where}{rest}" if rest else text


def write_order(arrival: Arrival, engine: str | None) -> str:
    """Write that sequences are mixed, if they are, behind the tokens that were judged on."""
    if arrival != "mixed":
        return ""
    by_engine = "" if engine is None else f" as {ENGINES[engine].title} serves them"
    return f", sequences mixed{by_engine}"


def conclude(advice: Advice, notes: Sequence[Finding] = ()) -> Advice:
    """Return advice with its answer and its findings, ``notes`` among them.

    The last finding that forces an answer decides, and is the headline. Others that force one come
    before all other reasons.
    """
    changed, one_kind = _find_change(advice), _find_one_kind(advice)
    one_device = []
    if advice.settings["devices"] == 1:
        one_device = [Finding("one device", forces="not now")]
    forcing = [each for each in (*changed, *one_device, *one_kind) if each.forces]
    headline = (forcing or [_decide_by_gains(advice)])[-1]
    answer: Any = headline.forces
    reasons: list[Finding] = []
    if not one_device:
        reasons = [*_find_groups(advice), *_find_gains(advice), *notes, *_find_losses(advice)]
    warnings = [
        *find_units(advice.units, held_out=advice.settings["held_out"]),
        *(each for each in changed if each.role == "warning"),
        *_find_slower(advice, answer),
        *(each for each in one_kind if each.role == "warning"),
        *_find_time_source(advice),
    ]
    findings = (replace(headline, role="headline"), *forcing[-2::-1], *reasons, *warnings)
    return replace(advice, answer=answer, findings=findings)


def _gains_by_phase(judgements: Iterable[Judgement]) -> dict[str, Comparison]:
    """Return gains by the phase that has windows of their size, else by the windows."""
    return {name_phase(each.window) or name_windows(each.window): each.gain for each in judgements}


def _decide_by_gains(advice: Advice) -> Finding:
    """Return what the gains alone decide."""
    price: float = advice.settings["price"]
    answers = {gain.answer for gain in advice.verdicts}

    def pays_nothing(gain: Comparison) -> bool:
        # More traffic is not worth recording where that is surely not far above the price.
        is_low = gain.high is not None and gain.gain <= price and gain.high <= NEAR_PRICE * price
        return gain.answer in ("certain but small", "worse") or (
            gain.answer == "no evidence" and is_low
        )

    unsure = "not enough evidence"
    if not advice.settings["held_out"]:
        return Finding("one window", forces=unsure)
    if answers == {"too few"}:
        return _find_too_few(advice)
    if "worth it" in answers:
        return _find_headline(advice, None)
    if all(pays_nothing(gain) for gain in advice.verdicts):
        if not advice.prefill_lacks:
            return _find_headline(advice, price)
        numbers = {"gain": advice.judged[0].gain, "tokens": advice.prefill_lacks}
        return Finding("prefill not judged", numbers, forces=unsure)
    main = max(advice.verdicts, key=lambda gain: gain.gain)
    return Finding("uncertain gain", {"gain": main}, forces=unsure)


def _find_headline(advice: Advice, price: float | None) -> Finding:
    """Return the headline of gains that are worth a trial, or are below a price."""
    answer: Answer = "worth a trial" if price is None else "not now"
    parted = advice.halves and advice.drift is not None and advice.drift.is_of_groups
    numbers: dict[str, Any] = {
        "price": price,
        "of_groups": price is None
        and bool(parted)
        and min(gain.gain for gain in advice.halves) < CARRIED * advice.main.gain.gain,
    }
    running = {"running": advice.settings["initial"]}
    if advice.total is not None:
        share = advice.settings["prefill_share"]
        numbers |= {"gain": advice.total, "prefill_share": share, **running}
        numbers["gains"] = _gains_by_phase(advice.ordered)
        return Finding("gain in total", numbers, forces=answer)
    if len(advice.judged) == 1 and not advice.prefill_lacks:
        numbers |= {"gain": advice.main.gain, **describe_windows(advice.main), **running}
        return Finding("gain of one size of windows", numbers, forces=answer)
    numbers |= {"gains": _gains_by_phase(advice.ordered), "prefill_lacks": advice.prefill_lacks}
    return Finding("gains of phases", numbers, forces=answer)


def _find_too_few(advice: Advice) -> Finding:
    """Return why there is no interval, by what is independent in the traffic."""
    units = advice.units
    numbers: dict[str, Any] = {"unseen": advice.judged[0].gain.units, "least": FEWEST}
    kind = "too few units"
    if units.name == "kind":
        kind = "too few kinds"
        numbers |= _describe_kinds(units) | {"only_few": True}
    elif units.kinds is not None:
        kind = "too few drawn windows"
        numbers["windows"] = units.number
    elif units.blocks.length > 1:
        kind = "neighbouring windows are alike"
        engine, replayed = advice.settings["engine"], advice.main.after.replayed
        has_groups = replayed is None or replayed.traffic.group is not None
        numbers |= _count_windows(advice)
        numbers |= {"engine": engine if engine in ENGINES else None}
        numbers["may_name_kinds"] = not has_groups
    else:
        numbers["unit"] = units.name
    return Finding(kind, numbers, forces="not enough evidence")


def _count_windows(advice: Advice) -> dict[str, int]:
    """Return the unseen windows, and how many an interval needs of windows as alike as these."""
    main, blocks = advice.main, advice.units.blocks
    traffic = main.after.replayed.traffic if main.after.replayed is not None else None
    windows = 0 if traffic is None else traffic.length // (main.window or 1)
    # Half of them are held out.
    return {"windows": windows, "needed": math.ceil(2 * FEWEST * blocks.correlation)}


def _describe_kinds(units: Units) -> dict[str, Any]:
    """Return of what kinds requests, or windows, are."""
    requests = None if units.sequences is None else len(units.sequences)
    return {"number": units.number, "likeness": units.likeness, "requests": requests}


def find_units(units: Units, *, held_out: bool) -> list[Finding]:
    """Return what was taken for independent, where that is not each of many sequences."""
    found: list[tuple[str, dict[str, Any]]] = []
    if not held_out:
        return []
    if units.name == "kind":
        only_few = units.number < FEW_KINDS
        found = [("kinds of traffic", _describe_kinds(units) | {"only_few": only_few})]
    elif units.all_alike:
        found = [("sequences all alike", {})]
    elif units.name == "window" and units.blocks.length > 1:
        blocks = {"length": units.blocks.length, "worth": units.number}
        found = [("windows in blocks", blocks)]
    elif units.name == "window" and units.kinds is not None:
        found = [("drawn windows", {"windows": units.number})]
    elif units.name == "window":
        found = [("independent windows", {})]
    return [Finding(kind, numbers, "warning") for kind, numbers in found]


def _find_change(advice: Advice) -> list[Finding]:
    """Return what follows where the halves of the recording differ beyond chance."""
    drift = advice.drift
    if drift is None or not drift.is_beyond_chance:
        return []
    if advice.halves and drift.is_of_groups:
        return []  # which a reason tells
    change = {"distance": drift.distance, "expected": drift.expected}
    if not advice.halves:
        return [Finding("drift in any order", change, "warning")]
    if min(advice.carried) > 0 and min(advice.carried) >= CARRIED * advice.main.gain.gain:
        return [Finding("drift that carries", change, "warning")]
    number = int(advice.carried[1] < advice.carried[0])
    seen, unseen = ("first", "second")[:: -1 if number else 1]
    numbers = {**change, "seen": seen, "unseen": unseen, "gain": advice.halves[number]}
    return [
        Finding("order of the recording", role="warning"),
        Finding("drift", numbers, forces="not enough evidence"),
    ]


def _find_groups(advice: Advice) -> list[Finding]:
    """Return what halves that hold different groups gain from each other, and what a mix gains."""
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
    """Return that the recording is of one kind of traffic; of a group alone that decides."""
    if advice.one_kind is None:
        return []
    numbers, groups = {"shows": advice.one_kind}, advice.main.groups
    if groups and not {*groups} & {*PHASES}:
        return [Finding("one kind of traffic", numbers, forces="not enough evidence")]
    return [Finding("one kind of traffic", numbers, "warning")]


def _find_slower(advice: Advice, answer: Answer) -> list[Finding]:
    """Return the groups that the proposed placement serves worse, if any."""
    main = advice.main
    losers = main.worse(LEAST_SHOWN, measures=(main.measure,)) if main.groups else []
    if not losers:
        return []
    repeat = None
    # Only what is worth a trial is solved again, and so can be audited.
    if answer == "worth a trial":
        repeat = {"window": main.window, "running": advice.settings["initial"]}
    groups = {each.group: each.change.value for each in losers}
    numbers = {"groups": groups, **describe_windows(main), "repeat": repeat}
    return [Finding("slower groups", numbers, "warning")]


def _find_time_source(advice: Advice) -> list[Finding]:
    """Return whose times these are, and what a load table does not know."""
    model = advice.problem.cost_model
    assert model is not None
    found = [find_times(model, advice.problem.statistics)]
    if advice.main.window is None:
        found.append(Finding("load table", role="warning"))
    return found


def find_notes(request: Request, advice: Advice) -> list[Finding]:
    """Return what phases cost each other, what the engine cannot do, and what dispatchers could."""
    notes, phases = [], advice.phases
    if phases is not None:
        two_pay = max(phases.costs_of_one.values()) > request.price
        costs = {"costs_of_one": phases.costs_of_one, "costs": phases.costs}
        notes.append(Finding("phases apart", {**costs, "two_pay": two_pay}))
    if request.engine is not None and request.serving.engine is not None:
        notes += _find_engine(request, request.engine, request.serving.engine, advice)
    if request.serving.waterfill is not None:
        filled = advice.main.whole["imbalance_filled"]
        numbers = {"before": filled.before, "after": filled.after, "gain": filled.gain}
        notes.append(Finding("waterfill", numbers))
    return notes


def _find_engine(request: Request, engine: Engine, name: str, advice: Advice) -> list[Finding]:
    """Return what the engine cannot do, and how it could divide tokens."""
    notes = []
    if not engine.may_copy and max(request.copies):
        notes.append(Finding("no copies", {"engine": name}))
    tokens, without = compute_token_limit(request, advice.knee), compute_token_limit(request, 0)
    if tokens is not None and tokens < WINDOWS[-1]:
        limits = {"tokens": tokens, "without_copies": without if advice.knee else None}
        notes.append(Finding("low-latency kernels", {"engine": name, **limits}))
    if advice.division is not None and engine.dividing is not None:
        notes.append(Finding("tokens divided", {"engine": name, **advice.division._asdict()}))
    return notes


def _find_losses(advice: Advice) -> list[Finding]:
    """Return what the loss of a device does to the proposed placement, where it has copies."""
    losses = advice.main.after.losses.get("device")
    return [] if losses is None else [Finding("lost device", {"losses": losses})]


def _find_gains(advice: Advice) -> list[Finding]:
    """Return what is gained in windows of each size, in what, and what copies gain."""
    ordered = advice.ordered
    running = {"running": advice.settings["initial"]}
    found = [Finding("gain", {"gain": ordered[0].gain, **describe_windows(ordered[0]), **running})]
    if len(ordered) > 1:
        found = [
            Finding("gain of a phase", {"gain": judged.gain, **describe_windows(judged)})
            for judged in ordered
        ]
    if advice.over_eplb:
        gains = _gains_by_phase(advice.over_eplb[judged.window] for judged in ordered)
        found.append(Finding("gain over EPLB", {"gains": gains}))
    found += _find_on_one(advice)
    aspects = _find_small_gains(advice)
    slots = None
    if len(advice.copies) > 1 and not _copies_pay(advice):
        slots = max(row.per_device for row in advice.copies)
    if aspects or slots is not None:
        found.append(Finding("little to gain", {"aspects": aspects, "slots": slots}))
    if advice.by_group:
        main = advice.main
        by_group = {group: gains[main.window] for group, gains in advice.by_group.items()}
        found.append(Finding("groups apart", {"gains": by_group, **describe_windows(main)}))
    if _copies_pay(advice):
        layers = advice.problem.statistics.layers
        problem = advice.problem
        single = -(-problem.experts // problem.devices)
        running_slots = max(advice.placements[0].slots_per_device - single, 0)
        found.append(find_copies(advice.copies, advice.knee, advice.more, layers, running_slots))
    return found


def _find_on_one(advice: Advice) -> list[Finding]:
    """Return how many tokens stay on one of two devices; nothing where that does not change."""
    devices = advice.settings["devices"]
    shares = [count_on_one_device(each, devices) for each in (advice.running, advice.proposed)]
    before, after = ("" if share is None else f"{share:.0f}" for share in shares)
    if before == after or advice.settings["regime"] != "dispatch":
        return []
    numbers = {"before": before, "after": after, "running": advice.settings["initial"]}
    return [Finding("tokens on one device", numbers)]


def _copies_pay(advice: Advice) -> bool:
    """Return whether any number of copies gains more than the fewest; False for a single one."""
    if len(advice.copies) == 1:
        return False
    best = max(row.best for row in advice.copies)
    chosen = next(row for row in advice.copies if row.per_device == advice.knee)
    return bool(advice.knee or advice.more is not None or best > chosen.best + NEAR_BEST)


def _find_small_gains(advice: Advice) -> list[str]:
    """Return in what the gain is below the price: balance, traffic."""
    price: float = advice.settings["price"]
    regime: Regime = advice.settings["regime"]
    gains: dict[str, list[float]] = {}
    for measure, figure in FIGURES.items():
        gain = advice.main.gains.get(measure)
        if gain is not None and figure.title and figure.regime in (None, regime):
            gains.setdefault(figure.aspect, []).append(gain.gain)
    return [aspect for aspect, values in gains.items() if max(map(abs, values)) < price]


def find_copies(
    swept: tuple[Copies, ...], knee: int, more: int | None, layers: int, running: int = 0
) -> Finding:
    """Return what slots for copies gain that run already, ``running``, and what more would."""
    by_slots = {each.per_device: each for each in swept}
    chosen, least = by_slots[knee], min(by_slots)
    best = max(by_slots.values(), key=lambda each: each.best)
    numbers: dict[str, Any] = {"chosen": _describe_copies(chosen) | {"gain": chosen.best}}
    numbers["without"] = by_slots[0].best if knee and least == 0 else None
    numbers["more"] = numbers["larger"] = None
    if more is not None:
        row = by_slots[more]
        gains = [
            {"window": window, "gain": row.mean(window)}
            for window in sorted(row.gains, key=row.mean, reverse=True)
        ]
        numbers["more"] = _describe_copies(row) | {"gains": gains, "than_now": more - running}
    # What is gained without copies stands there already.
    elif best.best > chosen.best + NEAR_BEST and not (knee and best is by_slots[least]):
        worst = min(best.gains, key=best.mean)
        loses = {"window": worst, "share": -best.mean(worst)} if best.mean(worst) < 0 else None
        numbers["larger"] = _describe_copies(best) | {"gain": best.best, "loses": loses}
    numbers["spare_layers"] = _describe_layers(by_slots[more or knee], layers)
    return Finding("copies", numbers)


def _describe_copies(copies: Copies) -> dict[str, Any]:
    return {"slots": copies.per_device, "bytes_per_device": copies.bytes_per_device}


def _describe_layers(copies: Copies, layers: int) -> dict[str, Any] | None:
    """Return how many layers need no copies, where that is many of them."""
    if copies.layers is None or not copies.per_device or copies.layers > MOST_LAYERS * layers:
        return None
    saved = copies.bytes_per_device
    if saved is not None:
        saved *= 1 - copies.layers / layers
    return {"number": layers - copies.layers, "layers": layers, "bytes_per_device": saved}


def find_costs(advice: Advice) -> list[Finding]:
    """Return what has to be moved, and when that has paid; nothing where nothing is proposed."""
    moving, step = advice.moving, advice.step
    if not moving.experts or advice.answer == "not now":
        return []
    fewer = None
    if step is not None:
        of_gain = advice.main.gain.gain
        fewer = {"experts": step.experts, "moved_bytes": step.bytes, "gain": step.gain.gain}
        fewer["of_gain"] = of_gain
    numbers: dict[str, Any] = {"experts": moving.experts, "of_experts": moving.of_experts}
    if moving.bytes is None:
        found = [Finding("moving, size unknown", numbers, "cost")]
    else:
        numbers |= {
            "moved_bytes": moving.bytes,
            "of_bytes": moving.of_bytes,
            "seconds": moving.seconds or 0.0,
            "device_bytes": moving.device_bytes,
            "steps": None if moving.steps is None else int(moving.steps),
            "phase": name_phase(advice.main.window),
        }
        found = [Finding("moving", numbers, "cost")]
    return found if fewer is None else [*found, Finding("few moves", fewer, "cost")]
