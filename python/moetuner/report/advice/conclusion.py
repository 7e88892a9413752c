"""What the figures of all splits amount to: one of three answers, with reasons in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from moetuner.evaluation.auditing import Audit
from moetuner.evaluation.intervals import FEWEST, mean_interval
from moetuner.evaluation.units import Units
from moetuner.evaluation.verdicts import Verdict
from moetuner.files.text import name
from moetuner.report.advice.drift import Drift
from moetuner.report.advice.values import Answer, Copies, Judged
from moetuner.report.gains import Gain
from moetuner.topology import Regime

# Part of the best gain that a number of copies may miss and still be the knee, as a share.
KNEE = 0.005
# Times the price that the upper end of an interval may reach where nothing is to be won.
NEAR = 2
# Groups that are named.
LOSERS = 5
# Kinds of sequences below which it is said how few they are.
FEW_KINDS = 10
# Part of the gain that must be left on the other half of a recording that changes its kind.
CARRIED = 0.5


def judged_in(window: int | None, audits: list[Audit], price: float, likeness: float) -> Judged:
    """Average over splits what audits say of all traffic; their errors have a correlation."""
    gains, before, after = {}, {}, {}
    for measure in audits[0].whole:
        changes = [each.whole[measure] for each in audits]
        before[measure] = float(np.mean([each.baseline.value for each in changes]))
        after[measure] = float(np.mean([each.value.value for each in changes]))
        known = [each.change for each in changes if each.change is not None]
        if len(known) < len(changes):
            continue
        _, low, high = mean_interval(known, likeness)
        ends = None if low is None or high is None else (-high, -low)
        splits = tuple(-each.value for each in known)
        units = min(each.units[1] for each in audits)
        gains[measure] = Gain("proposed", "running", measure, splits, ends, units)
    measure = "predicted_layer_us"
    gain = gains[measure]
    low, high = gain.interval or (None, None)
    verdict = Verdict(
        measure, before[measure], after[measure], gain.mean, low, high, gain.units, price
    )
    return Judged(window, before, after, gains, verdict)


def knee_of(swept: tuple[Copies, ...]) -> int:
    """Return the fewest slots for copies whose gain comes near to the best that harms no window.

    Copies share tokens, and so have the weights of an expert read on several devices: in windows of
    few tokens that may cost more than balance saves.
    """
    plain = [each for each in swept if not each.shared]
    least = min(plain, key=lambda each: each.per_device)
    harmless = [
        each
        for each in plain
        if all(
            np.mean(gains) >= min(0.0, float(np.mean(least.gains[window]))) - KNEE
            for window, gains in each.gains.items()
        )
    ]
    best = max(each.best for each in harmless)
    return min(each.per_device for each in harmless if each.best >= best - KNEE)


def concluded(
    judged: tuple[Judged, ...],
    swept: tuple[Copies, ...],
    knee: int,
    found: Drift | None,
    carried: tuple[float, ...],
    kinds: tuple[str, ...] | None,
    price: float,
    *,
    running: str,
    model: str | None,
    devices: int,
    units: Units,
    losers: Mapping[str, float] = MappingProxyType({}),
    regime: Regime = "dispatch",
    held_out: bool = True,
    notes: tuple[str, ...] = (),
) -> tuple[Answer, tuple[str, ...], tuple[str, ...]]:
    """Decide, with reasons and warnings."""
    main = max(judged, key=lambda each: each.gain.mean)
    where = "on unseen traffic" if held_out else "on the traffic that placements were computed from"
    reasons, warnings = [_headline(main, running, where)], []
    for each in judged:
        if each is not main:
            reasons.append(_headline(each, running, where))
    reasons += _parts(main, price, regime)
    if knee or len(swept) > 1:
        reasons.append(_of_copies(swept, knee))
    reasons += notes
    answers = {each.verdict.answer for each in judged}
    answer: Answer
    if not held_out:
        answer = "not enough evidence"
        reasons.insert(
            0,
            "there is one window, so nothing is left to judge a placement on that it was not "
            "computed from; count loads in windows, or record a trace.",
        )
    elif answers == {"too few"}:
        answer = "not enough evidence"
        reasons.insert(0, _too_few(units, judged[0].gain.units))
    elif "worth it" in answers:
        answer = "worth a trial"
    elif all(_is_settled(each, price) for each in judged):
        answer = "not now"
        reasons.insert(1, f"that is less than the {100 * price:g} % that a change should gain")
    else:
        answer = "not enough evidence"
        reasons.append("The interval allows both nothing and a gain that would pay: record more.")
    warnings += _of_units(units, held_out)
    if any(each.verdict.answer == "worse" for each in judged) and answer == "worth a trial":
        warnings.append("In windows of another size the proposed placement is slower; see above.")
    if found is not None and found.is_told:
        change = (
            f"the second half of the recording sends {100 * found.distance:.0f} % of its tokens to "
            f"other experts than the first (by chance {100 * found.expected:.0f} %)"
        )
        if not carried:
            warnings.append(f"{change[0].upper()}{change[1:]}; its order was said not to matter.")
        elif found.is_of_groups:
            reasons.insert(
                1,
                f"the halves of the recording hold different groups: served mixed, the gain is "
                f"{_percent(main.gain.mean)}; served as recorded, a placement of one half gains "
                f"{_percent(min(carried))} or more on the other (lower end of 95 %)",
            )
        elif min(carried) > 0 and min(carried) >= CARRIED * main.gain.mean:
            warnings.append(
                f"{change[0].upper()}{change[1:]}; a placement of either half gains on the other."
            )
        else:
            answer = "not enough evidence"
            worst = min(carried)
            verb = "is sure to gain only" if worst >= 0 else "may lose up to"
            reasons.insert(
                0,
                f"{change}, and a placement of one half {verb} {100 * abs(worst):.1f} % on the "
                "other. What comes next is not known.",
            )
            warnings.append(
                "The unseen half is of another kind than the seen one. Record traffic as it will "
                "be served; if the order of the recording means nothing, say so (--any-order)."
            )
    if losers:
        named = list(losers.items())[:LOSERS]
        names = ", ".join(f"{name(each)} ({100 * change:.1f} %)" for each, change in named)
        more = f" and {len(losers) - LOSERS} more" if len(losers) > LOSERS else ""
        verb = "is" if len(losers) == 1 else "are"
        warnings.append(
            f"Beyond chance {names}{more} {verb} served slower than before; audit tells more."
        )
    if devices == 1:
        answer = "not now"
        reasons.insert(0, "there is one device, so all placements are alike.")
    if kinds is not None and len(kinds) == 1:
        answer = "not enough evidence"
        reasons.insert(0, f"all traffic is of one kind, {kinds[0]}; of others nothing is known.")
    if main.window is not None:
        warnings.append(f"Times are predicted, not measured, with {model or 'your cost model'}.")
    else:
        warnings.append(
            "Times are predicted, not measured; a load table does not tell which experts a token "
            "chose together, so traffic is an upper bound."
        )
    return answer, tuple(_sentence(each) for each in reasons), tuple(warnings)


def _too_few(units: Units, number: int) -> str:
    """Say that what was judged is too little, and what would help."""
    least = f"at least {FEWEST} are needed"
    if units.name == "kind":
        return (
            f"sequences are of {units.number} kinds only, {number} of them unseen, and {least} to "
            "say how sure a gain is; record more different prompts."
        )
    if units.blocks.length > 1:
        return (
            f"neighbouring windows are alike, so the unseen ones are worth {number} independent "
            f"windows, and {least} to say how sure a gain is; record longer, or with sequences."
        )
    return f"unseen {units.name}s are too few ({number}, and {least}) to say how sure a gain is."


def _of_units(units: Units, held_out: bool) -> list[str]:
    """Say what was taken for independent, where that is not each of many sequences."""
    if not held_out:
        return []
    if units.name == "kind" and units.number < FEW_KINDS:
        return [
            f"Sequences are of {units.number} kinds only, such as few prompts that are asked again "
            "and again; of other kinds nothing is known. Whole kinds were held out."
        ]
    if units.all_alike:
        return [
            "All sequences route alike, as far as their tokens tell: if they are one prompt, or "
            "random tokens, asked again and again, other text may gain nothing."
        ]
    if units.name != "window":
        return []
    text = "There are no sequence labels, so windows were judged"
    if units.blocks.length > 1:
        return [
            f"{text} in blocks of {units.blocks.length}, as neighbours are alike: they are worth "
            f"{units.number} independent ones. With sequences fewer tokens tell as much."
        ]
    return [f"{text} one by one, as neighbours are no more alike than others."]


def _is_settled(judged: Judged, price: float) -> bool:
    """Whether the traffic says that there is nothing to win that would pay.

    More of it is not worth recording where the gain is below its price, and surely not far above.
    """
    gain, high = judged.gain.mean, judged.verdict.high
    return judged.verdict.answer in ("certain but small", "worse") or (
        judged.verdict.answer == "no evidence"
        and high is not None
        and gain < price
        and high <= NEAR * price
    )


def _headline(judged: Judged, running: str, where: str) -> str:
    gain, verdict = judged.gain, judged.verdict
    notes = []
    if gain.interval is not None:
        low, high = (round(100 * end, 1) + 0.0 for end in gain.interval)
        notes.append(f"95 %: {low:.1f} to {high:.1f} %")
    if judged.window is not None:
        notes.append(f"windows of {judged.window:,} tokens")
    word = "less" if gain.mean >= 0 else "more"
    much = f"{100 * abs(gain.mean):.1f} % {word}" if abs(gain.mean) >= 0.0005 else "no less"
    return (
        f"{where} a layer takes {much} predicted time than with the {running} placement, "
        f"{verdict.before:.1f} to {verdict.after:.1f} us"
        + (f" ({', '.join(notes)})" if notes else "")
    )


def _parts(judged: Judged, price: float, regime: Regime) -> list[str]:
    """Say what balance and traffic have to do with it."""
    lines = []
    for measure, word, nothing, of in (
        ("imbalance", "Busiest device", "nothing to balance", None),
        ("fanout", "Devices that a token visits", "nothing to win in traffic", "dispatch"),
        ("node_fanout", "Nodes that a token visits", "nothing to win between nodes", "dispatch"),
        ("crossing", "Steps that leave the device", "nothing to win in traffic", "follow"),
    ):
        gain = judged.gains.get(measure)
        if gain is None or of not in (None, regime):
            continue
        before, after = judged.before[measure], judged.after[measure]
        unit = " x the mean" if measure == "imbalance" else ""
        line = f"{word}: {before:.2f} to {after:.2f}{unit}"
        if gain.mean <= -price:
            line += "; that is a cost"
        elif gain.mean < price:
            line += f"; {nothing}"
        elif gain.interval is None:
            line += "; how surely is not known"
        elif gain.interval[0] <= 0:
            line += "; that may be chance"
        lines.append(line)
    return lines


def _of_copies(swept: tuple[Copies, ...], knee: int) -> str:
    plain = [each for each in swept if not each.shared]
    (chosen,) = (each for each in plain if each.per_device == knee)
    best = max(plain, key=lambda each: each.best)
    text = "Copies: none"
    if knee:
        verb = "gains" if knee == 1 else "gain"
        text = f"Copies: {_slots(chosen)} {verb} {_percent(chosen.best)}"
    if knee and plain[0].per_device == 0:
        text += f", {_percent(plain[0].best)} without"
    if best.best > chosen.best + KNEE:
        worst = min(best.gains, key=lambda window: float(np.mean(best.gains[window])))
        loss = -100 * float(np.mean(best.gains[worst]))
        text += (
            f"; {_slots(best)} would gain {100 * best.best:.1f} %, but windows of {worst:,} tokens "
            f"would take {loss:.1f} % longer"
        )
    elif not knee:
        most = max(each.per_device for each in plain)
        text += (
            f"; up to {most} more slots per device and layer bring no more than one copy of each "
            "expert does"
        )
        if len(best.gains) == 1 and (window := next(iter(best.gains))) is not None:
            text += f" in windows of {window:,} tokens"
    return text


def _percent(share: float) -> str:
    # No minus before nothing.
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def _slots(copies: Copies) -> str:
    number = copies.per_device
    text = f"{number} more slot{'' if number == 1 else 's'} per device and layer"
    if copies.bytes_per_device is not None:
        text += f" ({copies.bytes_per_device / 1e9:.2f} GB per device)"
    return text


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}".rstrip(".") + "."
