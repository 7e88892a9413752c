"""What the figures of all splits amount to: one of three answers, with reasons in sentences."""

from __future__ import annotations

from dataclasses import replace

from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.units import Units
from moetuner.files.text import name
from moetuner.report.advice.drift import Drift
from moetuner.report.advice.values import Advice, Answer, Copies, Judged
from moetuner.report.cells import counted, listed, percent
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
        if all(each.mean(of) >= min(0.0, least.mean(of)) - KNEE for of in each.gains)
    ]
    best = max(each.best for each in harmless)
    return min(each.per_device for each in harmless if each.best >= best - KNEE)


def concluded(of: Advice, kinds: tuple[str, ...], notes: tuple[str, ...]) -> Advice:
    """Return advice with its answer, reasons and warnings.

    ``kinds`` are the groups of the traffic that are no phases; ``notes`` are more reasons.
    """
    reasons, warnings = [*_gains(of), *notes], _of_units(of.units, held_out=of.settings["held_out"])
    answer = _by_gains(of, reasons)
    # What comes later overrules what came before, with the first reason.
    overruling: list[tuple[Answer, str]] = []
    if answer == "worth a trial" and any(each.gain.answer == "worse" for each in of.judged):
        warnings.append("In windows of another size the proposed placement is slower; see above.")
    if of.drift is not None and of.drift.is_beyond_chance:
        overruling += _by_drift(of, of.drift, reasons, warnings)
    losers = of.audit.worse(measures=(of.main.gain.measure,)) if of.audit.groups else []
    if losers:
        names = [f"{name(each.group)} ({100 * each.change.value:.1f} %)" for each in losers]
        verb = "is" if len(names) == 1 else "are"
        warnings.append(
            f"Beyond chance {listed(names, LOSERS)} {verb} served slower than before; audit tells "
            "more."
        )
    if of.settings["devices"] == 1:
        overruling.append(("not now", "there is one device, so all placements are alike."))
    if len(kinds) == 1:
        kind = f"all traffic is of one kind, {kinds[0]}; of others nothing is known."
        overruling.append(("not enough evidence", kind))
    assert of.problem.cost_model is not None
    warnings.append(of.problem.cost_model.origin)
    if of.main.window is None:
        warnings[-1] += (
            " A load table does not tell which experts a token chose together, so traffic is an "
            "upper bound."
        )
    for overruled, reason in overruling:
        answer = overruled
        reasons.insert(0, reason)
    sentences = (f"{each[0].upper()}{each[1:]}".rstrip(".") + "." for each in reasons)
    return replace(of, answer=answer, reasons=tuple(sentences), warnings=tuple(warnings))


def _by_gains(of: Advice, reasons: list[str]) -> Answer:
    """Answer by the gains alone, and add to the reasons."""
    price: float = of.settings["price"]
    answers = {each.gain.answer for each in of.judged}

    def pays_nothing(gain: Comparison) -> bool:
        # More traffic is not worth recording where that is surely not far above the price.
        is_low = gain.high is not None and gain.mean < price and gain.high <= NEAR * price
        return gain.answer in ("certain but small", "worse") or (
            gain.answer == "no evidence" and is_low
        )

    if not of.settings["held_out"]:
        reasons.insert(
            0,
            "there is one window, so nothing is left to judge a placement on that it was not "
            "computed from; count loads in windows, or record a trace.",
        )
    elif answers == {"too few"}:
        units, number, least = of.units, of.judged[0].gain.units, f"at least {FEWEST} are needed"
        line = (
            f"unseen {units.name}s are too few ({number}, and {least}) to say how sure a gain is."
        )
        if units.name == "kind":
            line = (
                f"sequences are of {units.number} kinds only, {number} of them unseen, and {least} "
                "to say how sure a gain is; record more different prompts."
            )
        elif units.blocks.length > 1:
            line = (
                f"neighbouring windows are alike, so the unseen ones are worth {number} "
                f"independent windows, and {least} to say how sure a gain is; record longer, or "
                "with sequences."
            )
        reasons.insert(0, line)
    elif "worth it" in answers:
        return "worth a trial"
    elif all(pays_nothing(each.gain) for each in of.judged):
        reasons.insert(1, f"that is less than the {100 * price:g} % that a change should gain")
        return "not now"
    else:
        reasons.append("The interval allows both nothing and a gain that would pay: record more.")
    return "not enough evidence"


def _by_drift(
    of: Advice, drift: Drift, reasons: list[str], warnings: list[str]
) -> list[tuple[Answer, str]]:
    """Take into account that the halves of the recording differ; return what that overrules."""
    change = (
        f"the second half of the recording sends {100 * drift.distance:.0f} % of its tokens to "
        f"other experts than the first (by chance {100 * drift.expected:.0f} %)"
    )
    warning = f"T{change[1:]}"
    least = min(of.carried, default=0.0)
    if not of.carried:
        warnings.append(f"{warning}; its order was said not to matter.")
    elif drift.is_of_groups:
        reasons.insert(
            1,
            f"the halves of the recording hold different groups: served mixed, the gain is "
            f"{percent(of.main.gain.mean)}; served as recorded, a placement of one half gains "
            f"{percent(least)} or more on the other (lower end of 95 %)",
        )
    elif least > 0 and least >= CARRIED * of.main.gain.mean:
        warnings.append(f"{warning}; a placement of either half gains on the other.")
    else:
        warnings.append(
            "The unseen half is of another kind than the seen one. Record traffic as it will be "
            "served; if the order of the recording means nothing, say so (--any-order)."
        )
        verb = "is sure to gain only" if least >= 0 else "may lose up to"
        reason = f"{change}, and a placement of one half {verb} {100 * abs(least):.1f} % on the "
        return [("not enough evidence", f"{reason}other. What comes next is not known.")]
    return []


def _of_units(units: Units, *, held_out: bool) -> list[str]:
    """Write what was taken for independent, where that is not each of many sequences."""
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
    how = "one by one, as neighbours are no more alike than others."
    if units.blocks.length > 1:
        how = (
            f"in blocks of {units.blocks.length}, as neighbours are alike: they are worth "
            f"{units.number} independent ones. With sequences fewer tokens tell as much."
        )
    return [f"There are no sequence labels, so windows were judged {how}"]


def _gains(of: Advice) -> list[str]:
    """Write what is gained in windows of each size, by what, and what copies have to do with it."""
    main, settings, lines = of.main, of.settings, []
    where = "on unseen traffic"
    if not settings["held_out"]:
        where = "on the traffic that placements were computed from"
    running = settings["initial"].replace("_", " ")
    running = "running" if running == "given" else running
    for judged in (main, *(each for each in of.judged if each is not main)):
        gain = judged.gain
        size = "" if judged.window is None else f"windows of {judged.window:,} tokens"
        notes = ", ".join(filter(None, (gain.sure, size)))
        much = gain.much if abs(gain.mean) >= 0.0005 else "no less"
        lines.append(
            f"{where} a layer takes {much} predicted time than with the {running} placement, "
            f"{gain.before:.1f} to {gain.after:.1f} us{notes and f' ({notes})'}"
        )
    lines += _parts(main, settings["price"], settings["regime"])
    return [*lines, _of_copies(of.copies, of.knee)] if of.knee or len(of.copies) > 1 else lines


def _parts(judged: Judged, price: float, regime: Regime) -> list[str]:
    """Write what balance and traffic have to do with it."""
    lines = []
    for measure, figure in FIGURES.items():
        gain = judged.gains.get(measure)
        if gain is None or not figure.title or figure.regime not in (None, regime):
            continue
        line = f"{figure.title}: {gain.before:.2f} to {gain.after:.2f}{figure.unit}"
        if gain.mean <= -price:
            line += "; that is a cost"
        elif gain.mean < price:
            line += f"; {figure.nothing}"
        elif gain.low is None:
            line += "; how surely is not known"
        elif gain.low <= 0:
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
        text = f"Copies: {_slots(chosen)} {verb} {percent(chosen.best)}"
    if knee and plain[0].per_device == 0:
        text += f", {percent(plain[0].best)} without"
    if best.best > chosen.best + KNEE:
        worst = min(best.gains, key=best.mean)
        text += (
            f"; {_slots(best)} would gain {100 * best.best:.1f} %, but windows of {worst:,} tokens "
            f"would take {-100 * best.mean(worst):.1f} % longer"
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


def _slots(copies: Copies) -> str:
    text = f"{counted(copies.per_device, 'more slot')} per device and layer"
    if copies.bytes_per_device is not None:
        text += f" ({copies.bytes_per_device / 1e9:.2f} GB per device)"
    return text
