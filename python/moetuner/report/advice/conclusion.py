"""What the figures of all splits amount to: one of three answers, with reasons in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moetuner.cost import assumed_model
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.units import Units
from moetuner.files.cells import counted, in_bytes, listed, percent, signed, span
from moetuner.files.text import name
from moetuner.recording import Recording
from moetuner.report.advice.drift import Drift
from moetuner.report.advice.request import Request
from moetuner.report.advice.sweep import tokens_at_once
from moetuner.report.advice.values import (
    Advice,
    Answer,
    Copies,
    write_window,
    write_windows_of,
)
from moetuner.report.outcome import left_over, on_one_device
from moetuner.report.recording import PHASES
from moetuner.serving.arrival import Arrival
from moetuner.serving.engines import ENGINES, Engine
from moetuner.serving.phases import WINDOWS, name_phase
from moetuner.topology import Regime

# Part of the best gain that a number of copies may miss and still be the knee, as a share.
KNEE = 0.005
# Times the price that the upper end of an interval may reach where nothing is to be won.
NEAR = 2
# Groups that are named, and the smallest loss that is: less would be shown as nothing.
LOSERS, LEAST_SHOWN = 5, 0.0005
# Kinds of sequences below which it is said how few they are.
FEW_KINDS = 10
# What to do where a recording shows one kind of traffic.
MIX = "record a mix of what you serve: prefill and decode, several lengths, subjects and languages"
# Part of the gain that must be left on the other half of a recording that changes its kind.
CARRIED = 0.5
# Part of the layers that need copies from which on it is not worth a word that others do not.
MOST_LAYERS = 0.75


def find_knee(swept: tuple[Copies, ...], prefill_share: float | None = None) -> int:
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
        return min(slots for slots, gain in totals.items() if gain >= max(totals.values()) - KNEE)
    least = min(swept, key=lambda each: each.per_device)
    harmless = [
        each
        for each in swept
        if all(each.mean(window) >= min(0.0, least.mean(window)) - KNEE for window in each.gains)
    ]
    best = max(each.best for each in harmless)
    return min(each.per_device for each in harmless if each.best >= best - KNEE)


def write_audit(advice: Advice) -> str:
    """Write the call that shows which groups the proposed placement serves worse."""
    window = "" if advice.main.window is None else f", window={advice.main.window}"
    # Audit compares with experts in blocks, if nothing else is named.
    baseline = "" if advice.settings["initial"] == "contiguous" else ", baseline=running"
    return f"audit(placement, traffic{window}{baseline})"


def write_judged_on(request: Request, unseen: Recording) -> str:
    """Write what placements are judged on, and what of it is in no window."""
    text = counted(unseen.length, unseen.unit)
    if unseen.sequences is not None:
        text += f" of {counted(unseen.sequences, 'sequence')}"
    # The longest windows leave most over.
    longest = request.windows[-1]
    rest = left_over(unseen, longest)
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


def conclude(advice: Advice, notes: Sequence[str] = ()) -> Advice:
    """Return advice with its answer, its reasons, ``notes`` among them, and its warnings."""
    reasons = [*_write_gains(advice), *notes, *_write_losses(advice)]
    warnings = _write_units(advice.units, held_out=advice.settings["held_out"])
    answer, why = _answer_by_gains(advice)
    # What comes later overrules what came before, with the first reason.
    overruling: list[tuple[Answer, str]] = []
    mixed = ""
    if advice.drift is not None and advice.drift.is_beyond_chance:
        if advice.halves and advice.drift.is_of_groups:
            reasons.insert(0, _write_groups(advice))
            if min(gain.gain for gain in advice.halves) < CARRIED * advice.main.gain.gain:
                mixed = ", if you serve a mix of the groups"
        else:
            overruling += _weigh_drift(advice, advice.drift, warnings)
    main = advice.main
    slower = _write_slower(advice)
    warnings += [slower] * bool(slower)
    if advice.settings["devices"] == 1:
        overruling.append(("not now", "there is one device, so all placements are alike."))
        reasons = []
    if advice.one_kind is not None:
        one = f"{advice.one_kind}, so the figures hold for such traffic only; {MIX}"
        is_of_group = main.groups and not {*main.groups} & {*PHASES}
        if is_of_group:
            overruling.append(("not enough evidence", one))
        else:
            warnings.append(f"{one[0].upper()}{one[1:]}.")
    model = advice.problem.cost_model
    assert model is not None
    assumed = assumed_model(model)
    warnings.append(model.origin if assumed is None else assumed)
    if main.window is None:
        warnings.append(
            "A load table does not say which experts a token chose together, so traffic is an "
            "upper bound."
        )
    if overruling:
        answer, why = overruling[-1]
        reasons = [*(reason for _, reason in overruling[-2::-1]), *reasons]
    # Only what is worth a trial is solved again, and so can be audited.
    if slower and answer == "worth a trial":
        warnings[warnings.index(slower)] += f" To repeat: {write_audit(advice)}."
    head = _write_headline(advice, answer, why) + mixed * (answer == "worth a trial")
    reasons = [head, *(reason for reason in reasons if reason not in head)]
    # A name that is written with a small letter first, as vLLM, keeps it.
    first = (each[0] if each[1:2].isupper() else each[0].upper() for each in reasons)
    sentences = (
        f"{letter}{each[1:]}".rstrip(".") + "." for letter, each in zip(first, reasons, strict=True)
    )
    return replace(advice, answer=answer, reasons=tuple(sentences), warnings=tuple(warnings))


def _write_slower(advice: Advice) -> str:
    """Write which groups the proposed placement serves worse; "" if none."""
    main = advice.main
    losers = main.worse(LEAST_SHOWN, measures=(main.measure,)) if main.groups else []
    if not losers:
        return ""
    names = [f"{name(each.group)} ({100 * each.change.value:.1f} %)" for each in losers]
    return (
        f"Slower in {write_windows_of(main)}, each group alone and beyond chance: "
        f"{listed(names, LOSERS)}; one placement cannot suit all groups."
    )


def write_notes(request: Request, advice: Advice) -> list[str]:
    """Write what phases cost each other, what the engine cannot do, and what dispatchers could."""
    notes = [] if advice.phases is None else [advice.phases.sentence(request.price)]
    if request.engine is not None:
        notes += _write_engine(request, request.engine, advice)
    if request.serving.waterfill is not None:
        filled = advice.main.whole["imbalance_filled"]
        notes.append(
            f"With waterfill the busiest device would have {filled.before:.3f} x the mean of all "
            f"work with what runs, and {filled.after:.3f} with the proposal: even load is then "
            f"worth {percent(filled.gain)}"
        )
    return notes


def _write_engine(request: Request, engine: Engine, advice: Advice) -> list[str]:
    """Write how the engine serves, what it cannot do, and how it could divide tokens."""
    notes = []
    if not engine.may_copy and max(request.copies):
        form = "renumbered checkpoint" if engine.renumbers else "map"
        notes.append(
            f"Copies were left out: {engine.title} loads a placement as a {form}, which has every "
            "expert once"
        )
    copies = advice.knee
    tokens, without_copies = tokens_at_once(request, copies), tokens_at_once(request, 0)
    if tokens is not None and tokens < WINDOWS[-1]:
        without = f" ({without_copies:,} without copies)" if copies else ""
        notes.append(
            f"{engine.title} with DeepEP's low-latency kernels: a rank may send at most {tokens:,} "
            f"tokens at once, as their buffer of 32 GiB grows with the slots{without}"
        )
    if advice.division is not None and engine.dividing is not None:
        divided, even = advice.division
        notes.append(
            f"Copies whose tokens a linear programme divides ({engine.dividing[1]}) would "
            f"leave the busiest device {divided:.2f} x the mean of recorded windows, and "
            f"{even:.2f} if they share evenly; by LPLB's authors it takes 100 us and more in every "
            "layer"
        )
    return notes


def _write_losses(advice: Advice) -> list[str]:
    """Write what the loss of a device does to the proposed placement, where it has copies."""
    losses = advice.main.after.losses.get("device")
    return [] if losses is None else [f"If a device is lost: {losses.sentence}"]


# What a gain is called in the headline, before the phase or the windows that it is of.
CALLED = {
    "worth it": "worth a trial",
    "certain but small": "small",
    "no evidence": "no certain gain",
    "too few": "too little traffic to be sure",
    "worse": "slower",
}


def _write_headline(advice: Advice, answer: Answer, why: str) -> str:
    """Write the sentence that stands alone with the answer: the gains, or why there is none."""
    if answer == "not enough evidence" or (why and advice.settings["devices"] == 1):
        return why
    tail = f"; {why}" if why else ""
    ordered = sorted(advice.judged, key=lambda judged: -judged.gain.gain)
    if advice.total is not None:
        parts = ", ".join(
            f"{name_phase(judged.window)} {signed(judged.gain.gain)}" for judged in ordered
        )
        share, sure = 100 * advice.settings["prefill_share"], interval(advice.total)
        return (
            f"{advice.total.much} predicted time than with {running_name(advice)} where {share:g} "
            f"% of the time is prefill{sure and f' ({sure})'}: {parts}{tail}"
        )
    if len(ordered) == 1 and not advice.prefill_lacks:
        return f"{write_line(advice, ordered[0])}{tail}"
    by_word: dict[str, list[str]] = {word: [] for word in CALLED.values()}
    for judged in ordered:
        text = f"{name_phase(judged.window)} ({signed(judged.gain.gain)})"
        by_word[CALLED[judged.gain.answer]].append(text)
    texts = [f"{word} for {' and '.join(names)}" for word, names in by_word.items() if names]
    return f"{', '.join(texts)}{tail}{_write_prefill_lacks(advice)}"


def _write_prefill_lacks(advice: Advice) -> str:
    """Write what it takes to judge prefill; nothing where it is judged."""
    if not advice.prefill_lacks:
        return ""
    return f"; prefill not judged: record {advice.prefill_lacks:,} more tokens"


def interval(gain: Comparison) -> str:
    """Write the interval of a gain; empty if it has none, or nothing differs."""
    return "" if gain.interval == (0, 0) else gain.sure


def _write_with_interval(gain: Comparison) -> str:
    """Write a gain with its interval, if it has one."""
    ends = "" if gain.low is None else f" (95 % interval {span(gain.low, gain.high)})"
    return f"{signed(gain.gain)}{ends}"


def running_name(advice: Advice) -> str:
    """Write what runs."""
    running, _, redundant = advice.settings["initial"].partition(":")
    if running == "eplb":
        number = int(redundant or 0)
        return "EPLB's placement" + f" with {counted(number, 'redundant expert')}" * bool(number)
    return f"the {'running' if running == 'given' else running.replace('_', '-')} placement"


def _answer_by_gains(advice: Advice) -> tuple[Answer, str]:
    """Answer by the gains alone, with the reason if they do not speak for themselves."""
    price: float = advice.settings["price"]
    answers = {gain.answer for gain in advice.verdicts}

    def pays_nothing(gain: Comparison) -> bool:
        # More traffic is not worth recording where that is surely not far above the price.
        is_low = gain.high is not None and gain.gain <= price and gain.high <= NEAR * price
        return gain.answer in ("certain but small", "worse") or (
            gain.answer == "no evidence" and is_low
        )

    if not advice.settings["held_out"]:
        return "not enough evidence", (
            "there is one window, so nothing is left to judge a placement on that it was not "
            "computed from; count loads in windows, or record a trace."
        )
    if answers == {"too few"}:
        units, number = advice.units, advice.judged[0].gain.units
        least = f"at least {FEWEST} are needed"
        line = f"too few unseen {units.name}s ({number}; {least}) for an interval of the gain."
        if units.name == "kind":
            what, others = _write_kinds(units, " only")
            line = (
                f"{what[0].lower()}{what[1:]}; {number} of them are unseen, and {least} for an "
                f"interval of the gain; record more {others}."
            )
        elif units.kinds is not None:
            line = (
                f"steps were drawn from {units.number} windows of INPUT only, {number} of them "
                f"unseen, and {least} for an interval of the gain; record more windows."
            )
        elif units.blocks.length > 1:
            line = (
                f"neighbouring windows are alike, so the unseen ones are worth {number} "
                f"independent windows, and {least} for an interval of the gain; record longer, or "
                f"with sequences{_write_how_to_record(advice)}."
            )
            if number < 2:
                line = (
                    "the windows are too alike to tell what is chance: even distant ones resemble "
                    f"each other; record longer, or with sequences{_write_how_to_record(advice)}."
                )
        return "not enough evidence", line
    if "worth it" in answers:
        return "worth a trial", ""
    if all(pays_nothing(gain) for gain in advice.verdicts):
        if advice.prefill_lacks:
            gain = advice.judged[0].gain
            return "not enough evidence", (
                f"decode {_write_with_interval(gain)}{_write_prefill_lacks(advice)}"
            )
        return "not now", f"less than the {100 * price:g} % that a change should gain"
    main = max(advice.verdicts, key=lambda gain: gain.gain)
    return "not enough evidence", (
        f"the gain is {_write_with_interval(main)}: too uncertain to say whether it pays; "
        "record more"
    )


def _write_how_to_record(advice: Advice) -> str:
    """Write by which option the engine records sequences, and how kinds of windows are named."""
    engine, replayed = ENGINES.get(advice.settings["engine"]), advice.main.after.replayed
    text = f" ({engine.title}: {engine.records_by})" if engine and engine.records_by else ""
    if replayed is None or replayed.traffic.group is not None:
        return text
    return f"{text}; if windows are of several kinds, name them: group and group_names"


def _write_groups(advice: Advice) -> str:
    """Write what halves that hold different groups gain from each other, and what a mix gains."""
    worst = min(advice.halves, key=lambda gain: gain.gain)
    names = "; ".join(listed([*map(name, own)], LOSERS) for own in advice.groups_of_halves)
    return (
        f"the halves hold different groups ({names}): from one to the other "
        f"{_write_with_interval(worst)} at worst, for a mix (in_order=False) "
        f"{signed(advice.main.gain.gain)}, in {write_windows_of(advice.main)}"
    )


def _weigh_drift(advice: Advice, drift: Drift, warnings: list[str]) -> list[tuple[Answer, str]]:
    """Take into account that the halves of the recording differ; return what that overrules."""
    change = (
        f"the second half of the recording sends {100 * drift.distance:.0f} % of its tokens to "
        f"other experts than the first (by chance {100 * drift.expected:.0f} %)"
    )
    warning = f"T{change[1:]}"
    if not advice.halves:
        warnings.append(f"{warning}; in_order=False says that its order does not matter.")
        return []
    number = int(advice.carried[1] < advice.carried[0])
    gain, halves = advice.halves[number], ("first", "second")[:: -1 if number else 1]
    if min(advice.carried) > 0 and min(advice.carried) >= CARRIED * advice.main.gain.gain:
        warnings.append(f"{warning}; a placement of either half gains on the other.")
        return []
    warnings.append(
        "Record traffic as it will be served. If the order of the recording means nothing, pass "
        "in_order=False."
    )
    verb, sure = "gains" if gain.gain >= 0 else "loses", interval(gain)
    reason = (
        f"{change}, and a placement computed from the {halves[0]} half {verb} "
        f"{100 * abs(gain.gain):.1f} % on the {halves[1]}{sure and f' ({sure})'}"
    )
    return [("not enough evidence", reason)]


def _write_units(units: Units, *, held_out: bool) -> list[str]:
    """Write what was taken for independent, where that is not each of many sequences."""
    if not held_out:
        return []
    if units.name == "kind":
        only = " only" * (units.number < FEW_KINDS)
        what, others = _write_kinds(units, only)
        rest = f"; the gain on other {others} is unknown" * bool(only)
        return [f"{what}; each of them is seen or unseen as a whole{rest}."]
    if units.all_alike:
        return [
            "All sequences route alike: if they are one prompt, or "
            "random tokens, repeated, other text may gain nothing."
        ]
    if units.name != "window":
        return []
    counting = "windows count as independent, as neighbours are no more alike than others."
    if units.kinds is not None:
        counting = f"steps that were drawn from one window count as one, of {units.number}."
    if units.blocks.length > 1:
        worth = f"are worth {units.number} independent ones"
        if units.number < 2:
            worth = "are too alike to tell apart"
        counting = (
            f"windows count in blocks of {units.blocks.length}, as neighbours are alike, and "
            f"{worth}. With sequences fewer tokens suffice."
        )
    return [f"INPUT has no sequences: {counting}"]


def _write_kinds(units: Units, only: str) -> tuple[str, str]:
    """Write of what kinds requests, or windows, are, and what others would be."""
    number = units.number
    if units.sequences is None:
        return f"Windows are of {number} kinds of traffic{only}", "kinds"
    requests = counted(len(units.sequences), "request")
    if units.likeness == "text":
        return f"{requests} repeat {counted(number, 'prompt')}{only}", "prompts"
    if units.likeness == "part of the text":
        return f"{requests} share long parts, such as a document, of {number} texts{only}", "texts"
    return f"{requests} route alike in {number} kinds{only}, as those of one template do", "kinds"


def _write_gains(advice: Advice) -> list[str]:
    """Write what is gained in windows of each size, by what, and what copies have to do with it."""
    ordered = sorted(advice.judged, key=lambda judged: -judged.gain.gain)
    lines = [write_line(advice, ordered[0])]
    if len(ordered) > 1:
        lines = [_write_phase(judged) for judged in ordered]
    if advice.over_eplb:
        lines.append(_write_over_eplb([advice.over_eplb[judged.window] for judged in ordered]))
    lines += _write_on_one(advice)
    aspects = _find_small(advice.main, advice.settings["price"], advice.settings["regime"])
    if len(advice.copies) > 1 and not _copies_pay(advice):
        slots = counted(max(row.per_device for row in advice.copies), "slot")
        aspects.append(f"with {slots} for copies")
    if aspects:
        *others, last = aspects
        lines.append(f"little to gain {', '.join(others)}{' or ' * bool(others)}{last}")
    if advice.by_group:
        lines.append(_write_each_group(advice))
    if _copies_pay(advice):
        lines.append(
            _write_copies(advice.copies, advice.knee, advice.more, advice.problem.statistics.layers)
        )
    return lines


def _write_on_one(advice: Advice) -> list[str]:
    """Write how many tokens stay on one of two devices; nothing where that does not change."""
    devices = advice.settings["devices"]
    shares = [on_one_device(each, devices) for each in (advice.running, advice.proposed)]
    before, after = ("" if share is None else f"{share:.0f}" for share in shares)
    if before == after or advice.settings["regime"] != "dispatch":
        return []
    return [
        f"{before} of 100 tokens have all their experts of a layer on one device with "
        f"{running_name(advice)}, {after} would with the proposed one"
    ]


def _write_over_eplb(judged: list[Judgement]) -> str:
    """Write what the proposed placement gains over EPLB's, by phase where there are two."""
    gains = [judgement.gain for judgement in judged]
    intervals = [
        f" ({span(gain.low, gain.high)})" if gain.low is not None else "" for gain in gains
    ]
    parts = [
        f"{name_phase(judgement.window)} " * (len(judged) > 1) + signed(judgement.gain.gain) + ends
        for judgement, ends in zip(judged, intervals, strict=True)
    ]
    return f"against EPLB{' (95 % interval)' if any(intervals) else ''}: {', '.join(parts)}"


def _write_amount(gain: Comparison) -> str:
    return gain.much if abs(gain.gain) >= 0.0005 else "no less"


def _write_phase(judged: Judgement) -> str:
    """Write what a phase gains; its table has the times."""
    gain, sure = judged.gain, interval(judged.gain)
    where = f"{name_phase(judged.window)}, {write_windows_of(judged)}"
    return f"{where}: {_write_amount(gain)} predicted time{sure and f' ({sure})'}"


def write_line(advice: Advice, judged: Judgement) -> str:
    """Write what a layer gains in windows of one size."""
    gain, sure = judged.gain, interval(judged.gain)
    return (
        f"in {write_windows_of(judged)} a layer takes {_write_amount(gain)} predicted time than "
        f"with {running_name(advice)}, "
        f"{gain.before:,.1f} to {gain.after:,.1f} us{sure and f' ({sure})'}"
    )


def _write_each_group(advice: Advice) -> str:
    """Write which groups a placement of all other groups serves, and which it does not."""
    gains = {name(group): each[advice.main.window] for group, each in advice.by_group.items()}
    texts = {group: f"{group} ({signed(gain.gain)})" for group, gain in gains.items()}
    unclear = [group for group, gain in gains.items() if gain.is_too_few]
    bad = [group for group in gains if group not in unclear and (gains[group].low or 0) <= 0]
    line = (
        f"placements computed from all other groups, in {write_windows_of(advice.main)}: a certain "
        f"gain for {len(gains) - len(unclear) - len(bad)} of {counted(len(gains), 'group')}"
    )
    if bad:
        line += f"; none for {listed([texts[group] for group in bad], 2 * LOSERS)}"
    return line + (
        f"; too little traffic to judge {listed(unclear, 2 * LOSERS)}" if unclear else ""
    )


def _copies_pay(advice: Advice) -> bool:
    """Return whether any number of copies gains more than the fewest; False for a single one."""
    if len(advice.copies) == 1:
        return False
    best = max(row.best for row in advice.copies)
    chosen = next(row for row in advice.copies if row.per_device == advice.knee)
    return bool(advice.knee or advice.more is not None or best > chosen.best + KNEE)


def _find_small(judged: Judgement, price: float, regime: Regime) -> list[str]:
    """Return in what the gain is below the price: balance, traffic."""
    gains: dict[str, list[float]] = {}
    for measure, figure in FIGURES.items():
        gain = judged.gains.get(measure)
        if gain is not None and figure.title and figure.regime in (None, regime):
            gains.setdefault(figure.aspect, []).append(gain.gain)
    return [aspect for aspect, values in gains.items() if max(map(abs, values)) < price]


def _write_copies(swept: tuple[Copies, ...], knee: int, more: int | None, layers: int) -> str:
    """Write what slots for copies gain that run already, and what more of them would."""
    by_slots = {each.per_device: each for each in swept}
    chosen, least = by_slots[knee], min(by_slots)
    best = max(by_slots.values(), key=lambda each: each.best)
    text = "Copies, numbers compared by short searches: "
    if knee:
        verb = "gains" if knee == 1 else "gain"
        text += f"{_write_slots(chosen)} {verb} {percent(chosen.best)}"
    else:
        text += "none"
    if knee and least == 0:
        text += f", {percent(by_slots[0].best)} without"
    if more is not None:
        gains = by_slots[more].gains
        parts = [
            percent(by_slots[more].mean(window)) + f" in {write_window(window)}" * (len(gains) > 1)
            for window in sorted(gains, key=by_slots[more].mean, reverse=True)
        ]
        text += f". With more memory than now: {_write_slots(by_slots[more])} would gain "
        text += ", ".join(parts)
    # What is gained without copies stands there already.
    elif best.best > chosen.best + KNEE and not (knee and best is by_slots[least]):
        worst = min(best.gains, key=best.mean)
        text += f"; {_write_slots(best)} would gain {percent(best.best)}"
        if best.mean(worst) < 0:
            longer = percent(-best.mean(worst))
            text += f", but {write_window(worst)} would take {longer} longer"
    return text + _write_layers(by_slots[more or knee], layers)


def _write_layers(copies: Copies, layers: int) -> str:
    """Write how many layers need no copies, where that is many of them."""
    if copies.layers is None or not copies.per_device or copies.layers > MOST_LAYERS * layers:
        return ""
    saved = ""
    if copies.bytes_per_device is not None:
        less = copies.bytes_per_device * (1 - copies.layers / layers)
        saved = f" and take {in_bytes(less)} per device less"
    return (
        f"; {layers - copies.layers} of {layers} layers need none: copies in the others bring nine "
        f"tenths of what all bring{saved}, where layers may differ in slots"
    )


def _write_slots(copies: Copies) -> str:
    text = f"{counted(copies.per_device, 'more slot')} per device and layer"
    if copies.bytes_per_device is not None:
        text += f" ({in_bytes(copies.bytes_per_device)} per device)"
    return text
