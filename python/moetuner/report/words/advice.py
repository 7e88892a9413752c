"""Clauses of advice: its headlines, reasons, costs and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetuner._texts import name
from moetuner.evaluation.comparison import Comparison
from moetuner.files.cells import (
    counted,
    digits,
    duration,
    in_bytes,
    listed,
    percent,
    signed,
    span,
    unit_of_time,
)
from moetuner.report.findings import Voice
from moetuner.report.words.parts import (
    Clause,
    name_running,
    name_windows,
    write_amount,
    write_gain,
    write_interval,
)
from moetuner.serving.engines import ENGINES
from moetuner.serving.phases import name_phase
from moetuner.serving.splits import RULES

# Groups that a sentence names.
MOST_NAMED = 5
# Recommendation where a recording has one kind of traffic.
MIX = "record a mix of what you serve: prefill and decode, several lengths, subjects and languages"
# Words for a gain in a headline, before the name of its phase.
ANSWER_WORDS = {
    "worth it": "worth a trial",
    "certain but small": "small",
    "no evidence": "no certain gain",
    "too few": "too little traffic to be sure",
    "worse": "slower",
}

# Headlines of advice that gains decide.


def _less_than(price: float | None) -> str:
    if price is None:
        return ""
    return f"; less than the {100 * price:g} % that a change should gain"


def _with_slots(slots: int) -> str:
    return f", with {counted(slots, 'more slot')} per device and layer" if slots else ""


def _name_time(is_of_step: bool) -> str:
    return "time of a step" if is_of_step else "MoE layer time"


def _saved_per_step(
    voice: Voice, saved: Mapping[str, tuple[float, float]], layers: int, step: str
) -> str:
    """Write what a step of all layers saves, and what it takes, in each phase."""
    texts = []
    for phase, (saved_us, takes_us) in saved.items():
        unit, scale = unit_of_time(max(takes_us, 1e3))
        less, takes = (digits(us / scale) for us in (saved_us, takes_us))
        text = f"{less} of {takes} {unit}"
        texts.append(f"{text} in {phase}" if len(saved) > 1 else text)
    return f"a {step} of {counted(layers, 'layer')} saves {', '.join(texts)}"


def _of_a_mix(groups: bool) -> str:
    return ", if you serve a mix of the groups" if groups else ""


def _gain(
    voice: Voice, gain: Comparison, window: int | None, recorded: int | None, running: str
) -> str:
    return (
        f"in {name_windows(window, recorded)} an MoE layer takes {write_amount(gain)} predicted "
        f"time than with {name_running(running)}, "
        f"{gain.before:,.1f} to {gain.after:,.1f} us{write_interval(gain)}"
    )


def _gain_of_one_size(
    voice: Voice,
    price: float | None,
    of_groups: bool,
    slots: int,
    is_of_step: bool,
    of_step: Comparison | None,
    **numbers: Any,
) -> str:
    gain, running = numbers["gain"], numbers["running"]
    clause = _gain(voice, **numbers)
    if voice.is_page:
        clause = f"{gain.amount} predicted MoE layer time than with {name_running(running)}"
    if of_step is not None:
        clause = f"a step takes {write_amount(of_step)} time{write_interval(of_step)}: {clause}"
    return f"{clause}{_with_slots(slots)}{_less_than(price)}{_of_a_mix(of_groups)}"


def _gains_of_phases(
    voice: Voice,
    gains: Mapping[str, Comparison],
    prefill_lacks: int,
    price: float | None,
    of_groups: bool,
    slots: int,
    is_of_step: bool,
) -> str:
    by_word: dict[str, list[str]] = {word: [] for word in ANSWER_WORDS.values()}
    for phase, gain in gains.items():
        by_word[ANSWER_WORDS[gain.answer]].append(f"{phase} ({signed(gain.gain)})")
    texts = [f"{word} for {' and '.join(names)}" for word, names in by_word.items() if names]
    lacks, time = _prefill_lacks(prefill_lacks), _name_time(is_of_step)
    return (
        f"{', '.join(texts)} in {time}{_with_slots(slots)}{_less_than(price)}{lacks}"
        f"{_of_a_mix(of_groups)}"
    )


def _gain_in_total(
    voice: Voice,
    gain: Comparison,
    prefill_share: float,
    gains: Mapping[str, Comparison],
    running: str,
    price: float | None,
    of_groups: bool,
    slots: int,
    is_of_step: bool,
) -> str:
    by_phase = ", ".join(f"{phase} {signed(of_phase.gain)}" for phase, of_phase in gains.items())
    return (
        f"{gain.amount} {_name_time(is_of_step)} than with {name_running(running)} where "
        f"{100 * prefill_share:g} % of the time is prefill{write_interval(gain)}: "
        f"{by_phase}{_with_slots(slots)}{_less_than(price)}{_of_a_mix(of_groups)}"
    )


def _prefill_lacks(tokens: int) -> str:
    return f"; prefill not judged: record {tokens:,} more tokens" if tokens else ""


# Too little evidence.


def _kinds(
    number: int, likeness: str | None, requests: int | None, only_few: bool
) -> tuple[str, str]:
    """Write how many kinds requests, or windows, are of, and the noun for other kinds."""
    only = " only" if only_few else ""
    if requests is None:
        return f"windows are of {number} kinds of traffic{only}", "kinds"
    texts = counted(requests, "request")
    if likeness == "text":
        return f"{texts} repeat {counted(number, 'prompt')}{only}", "prompts"
    if likeness == "part of the text":
        return f"{texts} share long parts, such as a document, of {number} texts{only}", "texts"
    if likeness == "in a row":
        return (
            f"{texts} are {number} samples{only}: those of a stretch of time that route alike, as "
            "the burst of one tenant does, count as one",
            "requests",
        )
    return f"{texts} route alike in {number} kinds{only}, as those of one template do", "kinds"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _too_few_kinds(voice: Voice, unseen: int, least: int, **kinds: Any) -> str:
    kinds_in_words, others = _kinds(**kinds)
    return (
        f"{kinds_in_words}; {unseen} of them {_are(unseen)} unseen, and an interval of the gain "
        f"needs {least}; record more {others}"
    )


def _neighbours_alike(
    voice: Voice,
    windows: int,
    unseen: int,
    least: int,
    needed: int,
    engine: str | None,
    may_name_kinds: bool,
) -> str:
    to_record = _record_requests(voice, engine, may_name_kinds)
    if unseen < 2:
        return (
            f"the windows are too alike, even distant ones: these {windows:,} are worth less than "
            f"two samples. Record requests{to_record}"
        )
    return (
        f"neighbouring windows are too alike: these {windows:,} are worth {unseen} samples, and an "
        f"interval of the gain needs {least}. Record {needed:,} windows or more, or requests"
        f"{to_record}"
    )


def _record_requests(voice: Voice, engine: str | None, may_name_kinds: bool) -> str:
    """Write how the engine records requests, and how to name kinds of windows."""
    text = ""
    if engine is not None and ENGINES[engine].records_by:
        text = f" ({ENGINES[engine].title}: {ENGINES[engine].records_by})"
    if not may_name_kinds:
        return text
    return f"{text}; if windows are of several kinds, name them: {voice.name_groups}"


# Gains, and the cost of moving.


def _gain_of_phase(voice: Voice, gain: Comparison, window: int | None, recorded: int | None) -> str:
    windows = f"{name_phase(window)}, {name_windows(window, recorded)}"
    return f"{windows}: {write_amount(gain)} MoE layer time{write_interval(gain)}"


def _gain_over_eplb(voice: Voice, gains: Mapping[str, Comparison]) -> str:
    has_interval = any(gain.low is not None for gain in gains.values())
    texts = []
    for phase, gain in gains.items():
        interval = "" if gain.low is None else f" ({span(gain.low, gain.high)})"
        texts.append((f"{phase} " if len(gains) > 1 else "") + signed(gain.gain) + interval)
    return f"against EPLB{' (95 % interval)' if has_interval else ''}: {', '.join(texts)}"


def _on_one_device(voice: Voice, before: str, after: str, running: str) -> str:
    return (
        f"{before} of 100 tokens have all their experts of a layer on one device with "
        f"{name_running(running)}, {after} would with the proposed one"
    )


def _little_to_gain(voice: Voice, aspects: list[str], slots: int | None) -> str:
    texts = list(aspects)
    if slots is not None:
        texts.append(f"with {counted(slots, 'slot')} for copies")
    *others, last = texts
    return f"little to gain {', '.join(others)}{' or ' if others else ''}{last}"


def _groups_apart(
    voice: Voice, gains: Mapping[str, Comparison], window: int | None, recorded: int | None
) -> str:
    texts = {group: f"{name(group)} ({signed(gain.gain)})" for group, gain in gains.items()}
    too_few = [group for group, gain in gains.items() if gain.is_too_few]
    uncertain = [group for group in gains if group not in too_few and (gains[group].low or 0) <= 0]
    line = (
        f"placements computed from all other groups gain for certain for "
        f"{len(gains) - len(too_few) - len(uncertain)} of {counted(len(gains), 'group')}, in "
        f"{name_windows(window, recorded)}"
    )
    if uncertain:
        line += f"; not for {listed([texts[group] for group in uncertain], 2 * MOST_NAMED)}"
    if too_few:
        line += f"; too little traffic to judge {listed([*map(name, too_few)], 2 * MOST_NAMED)}"
    return line


def _gains_or_loses(gain: Comparison) -> str:
    return f"{'gains' if gain.gain >= 0 else 'loses'} {100 * abs(gain.gain):.1f} %"


def _halves_of_groups(
    voice: Voice,
    groups: list[list[str]],
    worst: Comparison,
    mix: Comparison,
    window: int | None,
    recorded: int | None,
) -> str:
    names = "; ".join(listed([*map(name, half)], MOST_NAMED) for half in groups)
    return (
        f"the halves of the recording hold different groups ({names}). Placed on one half and "
        f"judged on the other it {_gains_or_loses(worst)}{write_interval(worst)} at worst; if you "
        f"serve all groups together ({voice.any_order}) it {_gains_or_loses(mix)}, in "
        f"{name_windows(window, recorded)}"
    )


def _slots_more(more: int, more_bytes: float | None) -> str:
    text = f"{counted(more, 'more slot')} per device and layer"
    if more_bytes is not None:
        text += f" ({in_bytes(more_bytes)} per device)"
    return text


def _room(cache_tokens: int | None, cache_share: float | None) -> str:
    """Write what memory is worth as KV cache; nothing where that is unknown."""
    texts = []
    if cache_tokens is not None:
        texts.append(f"the room of {cache_tokens:,} tokens of KV cache")
    if cache_share is not None:
        texts.append(f"{percent(cache_share)} of what is left beside the weights")
    return ", ".join(texts)


def _gains_by_window(gains: list[dict[str, Any]]) -> str:
    return " and ".join(
        signed(gain["gain"])
        + (f" in {name_phase(gain['window']) or name_windows(gain['window'])}" if rest else "")
        for rest, gain in ((len(gains) > 1, gain) for gain in gains)
    )


def _copies(
    voice: Voice,
    chosen: dict[str, Any],
    fewer: dict[str, Any] | None,
    larger: dict[str, Any] | None,
    device_bytes: float | None,
    too_large: int | None,
    spare_layers: dict[str, Any] | None,
) -> str:
    text = "copies, by short searches: "
    if chosen["more"]:
        text += f"{_slots_more(chosen['more'], chosen['more_bytes'])} gain"
        text += "s" if chosen["more"] == 1 else ""
        text += f" {_gains_by_window(chosen['gains'])}"
        text += _price_of(chosen, device_bytes)
    elif chosen["slots"]:
        text += f"those that run already gain {_gains_by_window(chosen['gains'])}"
    elif larger is None:
        text += "none pay"
    else:
        text += f"without {_gains_by_window(chosen['gains'])}"
    if fewer is not None:
        text += f"; without more memory {_gains_by_window(fewer['gains'])}"
    if larger is not None:
        text += f". A choice: {_slots_more(larger['more'], larger['more_bytes'])} would gain "
        text += f"{_gains_by_window(larger['gains'])}{_price_of(larger, device_bytes)}"
    if too_large is not None:
        text += f". {counted(too_large, 'slot')} and more do not fit beside the weights"
    if spare_layers is None:
        return text
    text += f". {spare_layers['number']} of {spare_layers['layers']} layers need no copies: without"
    text += " theirs nine tenths of the gain are left"
    if spare_layers["bytes_per_device"] is not None:
        text += f", and {in_bytes(spare_layers['bytes_per_device'])} per device are free"
    return f"{text}, where layers may differ in slots"


def _price_of(copies: dict[str, Any], device_bytes: float | None) -> str:
    """Write what the memory of copies costs; that it is unknown where it is."""
    room = _room(copies["cache_tokens"], copies["cache_share"])
    if not room:
        return "; what their memory costs is not known (bytes of an expert, or of a device)"
    of_device = "" if device_bytes is None else f" of {in_bytes(device_bytes)}"
    return f", for {room}{of_device}"


def _phases_apart(
    voice: Voice, costs_of_one: dict[str, float], costs: dict[str, float], two_pay: bool
) -> str:
    of_one, of_other = (
        " and ".join(f"{phase} {signed(cost)}" for phase, cost in by_phase.items())
        for by_phase in (costs_of_one, costs)
    )
    answer = "two placements pay" if two_pay else "one placement does for both"
    return (
        f"prefill and decode: {answer}. Over a placement of its own, one computed from both costs "
        f"{of_one} MoE layer time, and one computed from the other phase {of_other}"
    )


def _no_copies(voice: Voice, engine: str) -> str:
    form = "renumbered checkpoint" if ENGINES[engine].renumbers else "map"
    return (
        f"copies were left out: {ENGINES[engine].title} loads a placement as a {form}, which has "
        "every expert once"
    )


def _low_latency(voice: Voice, engine: str, tokens: int, without_copies: int | None) -> str:
    without = "" if without_copies is None else f" ({without_copies:,} without copies)"
    return (
        f"{ENGINES[engine].title} with DeepEP's low-latency kernels: a rank may send at most "
        f"{tokens:,} tokens at once, as their buffer of 32 GiB grows with the slots{without}"
    )


def _tokens_divided(voice: Voice, engine: str, imbalance: float, imbalance_even: float) -> str:
    window_split = ENGINES[engine].window_split
    assert window_split is not None
    split, options = window_split
    return (
        f"with {ENGINES[engine].title}'s {split} dispatch ({options}) the busiest device "
        f"would have {imbalance:.2f} x the mean instead of {imbalance_even:.2f}, for "
        f"{RULES[split].dispatch_us:g} us or more a layer"
    )


def _waterfill(voice: Voice, before: float, after: float, gain: float) -> str:
    return (
        f"with waterfill the busiest device would have {before:.3f} x the mean of all work with "
        f"what runs, and {after:.3f} with the proposal: even load is then worth {percent(gain)}"
    )


def _moving(
    voice: Voice,
    experts: int,
    of_experts: int,
    moved_bytes: float,
    of_bytes: float,
    seconds: float,
    device_bytes: tuple[float, float],
    steps: int | None,
    phase: str | None,
) -> str:
    text = f"to move: {experts:,} of {counted(of_experts, 'expert')}"
    text += f", {in_bytes(moved_bytes)} of {in_bytes(of_bytes)}"
    # The bandwidth of the links bounds the time from below.
    text += f", at least {duration(1e6 * seconds)}"
    before, after = map(in_bytes, device_bytes)
    if before != after:
        text += f"; experts take {before} per device now, {after} then"
    if steps is None:
        return f"{text}; moving does not pay"
    return f"{text}; paid back by {counted(steps, 'step' if phase is None else f'{phase} step')}"


def _few_moves(
    voice: Voice, experts: int, moved_bytes: float | None, gain: float, of_gain: float
) -> str:
    amount = f"about {100 * gain:.1f} of {percent(of_gain)}"
    if gain >= of_gain:
        amount = f"about {percent(gain)}, no less than all"
    size = "" if moved_bytes is None else f" ({in_bytes(moved_bytes)})"
    return f"moving {counted(experts, 'expert')}{size} gains {amount}"


# Warnings.


def _kinds_of_traffic(voice: Voice, **kinds: Any) -> str:
    kinds_in_words, others = _kinds(**kinds)
    rest = f"; the gain on other {others} is unknown" if kinds["only_few"] else ""
    return f"{kinds_in_words}; each of them is seen or unseen as a whole{rest}"


def _windows_in_blocks(voice: Voice, length: int, worth: int) -> str:
    samples = f"worth {worth} samples"
    if worth < 2:
        samples = "too alike to count as samples"
    return (
        f"{voice.recording} has no requests, and {length} neighbouring windows are alike: all "
        f"windows together are {samples}. With requests fewer tokens suffice"
    )


def _change_of_halves(distance: float, expected: float) -> str:
    return (
        f"the second half of the recording sends {100 * distance:.0f} % of its tokens to other "
        f"experts than the first (by chance {100 * expected:.0f} %)"
    )


def _drift(
    voice: Voice, distance: float, expected: float, seen: str, unseen: str, gain: Comparison
) -> str:
    return (
        f"{_change_of_halves(distance, expected)}, and a placement computed from the {seen} half "
        f"{_gains_or_loses(gain)} on the {unseen}{write_interval(gain)}"
    )


def _drift_in_any_order(voice: Voice, **change: float) -> str:
    return f"{_change_of_halves(**change)}; {voice.any_order} says that its order does not matter"


def _drift_that_carries(voice: Voice, **change: float) -> str:
    return f"{_change_of_halves(**change)}; a placement of either half gains on the other"


def _drift_that_may_carry(voice: Voice, distance: float, expected: float, independent: int) -> str:
    return (
        f"{_change_of_halves(distance, expected)}; a placement of either half gains on the other, "
        f"but traffic changes so slowly that this may be chance: {voice.recording} is worth "
        f"{counted(independent, 'independent block')} of time; record longer"
    )


def _slower_groups(
    voice: Voice,
    groups: Mapping[str, float],
    window: int | None,
    recorded: int | None,
    repeat: dict[str, Any] | None,
) -> str:
    names = [f"{name(group)} ({100 * change:.1f} %)" for group, change in groups.items()]
    text = (
        f"slower in {name_windows(window, recorded)}, each group alone and beyond chance: "
        f"{listed(names, MOST_NAMED)}; one placement cannot suit all groups"
    )
    if repeat is None:
        return text
    call = voice.audit
    if call is None:
        size = "" if repeat["window"] is None else f", window={repeat['window']}"
        # Audit compares with experts in blocks, if nothing else is named.
        baseline = "" if repeat["running"] == "contiguous" else ", baseline=running"
        call = f"audit(placement, traffic{size}{baseline})"
    return f"{text}. To repeat: {call}"


CLAUSES: dict[str, Clause] = {
    # Headlines.
    "gain of one size of windows": _gain_of_one_size,
    "gains of phases": _gains_of_phases,
    "gain in total": _gain_in_total,
    "one window": (
        "there is one window, so nothing is left to judge a placement on; count loads in several "
        "windows, or record a trace"
    ),
    "too few units": lambda voice, unseen, unit, least: (
        f"{counted(unseen, f'unseen {unit}')} {_are(unseen)} too few: an interval of the gain "
        f"needs {least}; record more"
    ),
    "too few kinds": _too_few_kinds,
    "too few drawn windows": (
        "steps were drawn from only {windows} windows of {voice.recording}, {unseen} of them "
        "unseen, and an interval of the gain needs {least}; record more windows"
    ),
    "neighbouring windows are alike": _neighbours_alike,
    "uncertain gain": lambda voice, gain: (
        f"the gain is {write_gain(gain)}: too uncertain to say whether it pays; record more"
    ),
    "prefill not judged": lambda voice, gain, tokens: (
        f"decode {write_gain(gain)}{_prefill_lacks(tokens)}"
    ),
    "nothing to place": lambda voice, engine: (
        f"{engine} splits layers or weights over devices, not experts, so no placement helps "
        "there. Its traces show which experts are hot, and whether a fixed set of them near the "
        f"GPU is worth it; for an engine with expert parallelism name it ({voice.engine})"
    ),
    "one device": "there is one device, so all placements are alike",
    "one kind of traffic": f"{{shows}}, so the figures hold for such traffic only; {MIX}",
    "drift": _drift,
    "drift that may carry": _drift_that_may_carry,
    # Reasons.
    "gain": _gain,
    "gain of a phase": _gain_of_phase,
    "gain over EPLB": _gain_over_eplb,
    "tokens on one device": _on_one_device,
    "little to gain": _little_to_gain,
    "groups apart": _groups_apart,
    "halves of other groups": _halves_of_groups,
    "copies": _copies,
    "saved per step": _saved_per_step,
    "phases apart": _phases_apart,
    "no copies": _no_copies,
    "low-latency kernels": _low_latency,
    "tokens divided": _tokens_divided,
    "waterfill": _waterfill,
    "lost device": lambda voice, losses: f"if a device is lost: {losses.sentence}",
    # Costs.
    "moving": _moving,
    "moving, size unknown": (
        "to move: {experts:,} of {of_experts:,} experts; {voice.expert_size} says bytes"
    ),
    "few moves": _few_moves,
    # Warnings.
    "kinds of traffic": _kinds_of_traffic,
    "sequences all alike": (
        "all sequences route alike: if they are one prompt, or random tokens, repeated, other "
        "text may gain nothing"
    ),
    "independent windows": ("{voice.recording} has no requests; each window counts as one sample"),
    "drawn windows": (
        "{voice.recording} has no requests; steps drawn from one window count as one sample, and "
        "there are {windows} windows"
    ),
    "windows in blocks": _windows_in_blocks,
    "drift in any order": _drift_in_any_order,
    "drift that carries": _drift_that_carries,
    "order of the recording": (
        "record traffic as it will be served. If the order of the recording means nothing, pass "
        "{voice.any_order}"
    ),
    "slower groups": _slower_groups,
    "load table": (
        "a load table does not say which experts a token chose together, so traffic is an upper "
        "bound"
    ),
}
