"""Clauses on results: predicted times, outcomes of a method, and figures of a placement."""

from __future__ import annotations

from typing import Any

from moetuner.evaluation.comparison import Comparison
from moetuner.files.cells import counted, distinct, number, percent
from moetuner.problem.goals import AIMS
from moetuner.report.findings import Voice
from moetuner.report.words.parts import Clause, in_windows


def _cost_model(cost_model: str, weight_bits: float | None) -> str:
    return cost_model + ("" if weight_bits is None else f", weights in {weight_bits:g} bits")


def _measured_times(
    voice: Voice, cost_model: str, weight_bits: float | None, error: float | None
) -> str:
    model = f"measured ({cost_model})"
    off = "" if error is None else f", with an error of {100 * error:.1f} %"
    return (
        f"times of experts are {_cost_model(model, weight_bits)}{off}; times of links are predicted"
    )


def _assumed_experts(voice: Voice, model: str | None, weight_bits: float | None) -> str:
    why = f"{voice.recording} names no model" if model is None else f"{model:.40} is not known"
    bits = "" if weight_bits is None else f" in {weight_bits:g} bits"
    return f"times are of DeepSeek-V3's experts{bits}, as {why}: {voice.name_model}"


# Outcomes of a method.


def _predicted_time(voice: Voice, times: list[dict[str, Any]]) -> str:
    first, *others = times
    texts = [f"{number(first['us'], 1)} us per layer{in_windows(first['window'])}"]
    texts += [f"{number(time['us'], 1)} us{in_windows(time['window'])}" for time in others]
    return f"predicted time: {', '.join(texts)}"


def _empty_slots(
    voice: Voice, empty: int, slots: int, used: int, per_device: int, over: float | None
) -> str:
    enough = (
        f"no device uses more than {used:,} of its {per_device:,}, so {used:,} are enough"
        if used < per_device
        else "no copy that was tried there helps"
    )
    change = "" if over is None else f", and the objective is {100 * over:.1f} % higher then"
    return (
        f"{empty:,} of {slots:,} slots are empty: {enough}. Engines with redundant experts have no "
        f"empty slots: copies that take the fewest tokens fill their maps{change}. --fill-slots, "
        "or --for ENGINE, searches full slots"
    )


def _single(single: bool) -> str:
    return " with one copy of each expert" if single else ""


def _cap_that_nothing_keeps(
    voice: Voice, single: bool, cap: float, layers: int, needs: dict[int, list[float]]
) -> str:
    texts = [
        f"layer {layer} needs {low:.4f}" + (f" to {high:.4f}" if high > low else "")
        for layer, (low, high) in needs.items()
    ]
    rest = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
    return (
        f"no placement{_single(single)} keeps the load cap {cap:g} in {len(texts)} of {layers} "
        f"layers: {', '.join(texts[:3])}{rest}"
    )


def _proven(bound: str | None, gap: float, single: bool, cap: str | None) -> str:
    caps = {None: "", "kept": " under this cap", "raised": " under the caps that it keeps"}
    no_placement = f"no placement{_single(single)}{caps[cap]}"
    if bound is None:
        return f"{no_placement} takes more than {percent(gap)} less time"
    return f"{no_placement} is below {bound}, so this one is within {percent(gap)} of the optimum"


def _objective(voice: Voice, reached: str | None, seen: bool, bound: dict[str, Any] | None) -> str:
    texts = []
    if reached is not None:
        texts.append(f"objective{' on the seen part' if seen else ''}: {reached}")
    if bound is not None:
        texts.append(_proven(**bound))
    return "; ".join(texts)


def _judged_gain(voice: Voice, gain: Comparison, window: int | None, part: str | None) -> str:
    where = {
        None: "",
        "unseen": "on unseen traffic ",
        "seen": "on the traffic that it was computed from ",
    }
    return f"gain{in_windows(window)}: {where[part]}{gain.sentence}"


def _slower_than_running(
    voice: Voice,
    method: str | None,
    than: str,
    us: float,
    us_before: float,
    window: int | None,
    fewest_slots: int | None,
    goal: str,
    survive: str | None,
) -> str:
    running = "contiguous" if than == "contiguous" else "what runs"
    remedy = f"keep {running}"
    if fewest_slots is not None:
        remedy = (
            "slots for copies cost more time than they save: try --slots-per-device "
            f'{fewest_slots}, or "moetuner advise", which tries several numbers'
        )
    if not AIMS[goal].predicts_time:
        remedy += ", or solve for --objective time"
    slower = "this placement" if method is None else f"the placement of {method}"
    times = " against ".join(distinct(us, us_before, 1))
    if survive is not None:
        of_method = "" if method is None else f" with {method}"
        return (
            f"Warning: surviving the loss of a {survive}{of_method} costs "
            f"{percent(us / us_before - 1)} more predicted time than {running}{in_windows(window)}"
            f", {times} us per layer; leave out --survive if that is too much"
        )
    return (
        f"Warning: {slower} is predicted to be slower than {running}: "
        f"{times} us per layer{in_windows(window)}; {remedy}"
    )


def _busiest_ports(voice: Voice, regime: str, out: list[float], **others: list[float]) -> str:
    """Write the rows at the busiest port of every tier that carries any."""
    tiers = ["in a node", "between nodes", *(f"tier {n}" for n in range(3, 1 + len(out)))]
    texts = [
        f"{tier} {sent:,.0f} out, {received:,.0f} in"
        for tier, sent, received in zip(tiers, out, others["in"], strict=False)
        if sent or received
    ]
    rows = "; ".join(texts) or "none"
    return f"rows per layer at the busiest port, regime {regime}: {rows}"


CLAUSES: dict[str, Clause] = {
    # Which times are predicted.
    "assumed experts": _assumed_experts,
    "predicted times": lambda voice, **model: (
        f"times are predicted, not measured, with {_cost_model(**model)}"
    ),
    "cost model": lambda voice, **model: (
        f"times are predicted with {_cost_model(**model)}; for others: --cost-model FILE or "
        "GPU:HIDDENxINTERMEDIATE"
    ),
    "measured times": _measured_times,
    "times of a model": lambda voice, weight_bits: (
        f"times are predicted by {_cost_model('a cost model, not measured', weight_bits)}"
    ),
    "windows as recorded": (
        "{voice.recording} holds counts, so its windows are evaluated as recorded, not mixed"
    ),
    # Outcomes of a method.
    "predicted time": _predicted_time,
    "objective": _objective,
    "bound": lambda voice, **bound: _proven(**bound),
    "imbalance with waterfill": (
        "with waterfill the busiest device has {imbalance:.3f} x the mean of all work"
    ),
    "losses": "{losses.sentence}",
    "representative windows": (
        "searched on {searched:,} representative windows, evaluated on all {windows:,}"
    ),
    "sample of tokens": "expert sets were counted on a sample of {tokens:,} tokens",
    "empty slots": _empty_slots,
    "slower than what runs": _slower_than_running,
    "running kept": lambda voice, experts: (
        f"what runs stays: the gain of moving {counted(experts, 'expert')} may be chance. To move "
        "them nevertheless, leave out --holdout"
    ),
    "judged gain": _judged_gain,
    "no smaller objective": lambda voice, window, over: (
        f"gain{in_windows(window)}: no method has a smaller objective than {over} on the seen part"
    ),
    "lacks of the recording": "{voice.recording} has {lacks}",
    "cap that nothing keeps": _cap_that_nothing_keeps,
    "cap that was raised": lambda voice, single, cap, layers, raised, highest: (
        f"found no placement{_single(single)} under the load cap {cap:g} in {raised} of {layers} "
        f"layers and allowed up to {highest:.3f} there"
    ),
    "broken rule": "violates rules (!): {rule}",
    "cut short": "{status}, best so far",
    # Figures of a placement.
    "tokens together": (
        "{tokens:.1f} of 100 tokens have all their experts of a layer on one device"
    ),
    "mixed windows": "mixed windows are means of {windows} windows, drawn with seed {seed}",
    "mixed tokens": (
        "mixed windows have tokens in random order, drawn with seed {seed}, as {voice.recording} "
        "has no sequences"
    ),
    "mixed sequences": (
        "mixed windows have {running} of {of:,} sequences at once (fewer in a group), drawn with "
        "seed {seed}"
    ),
    "busiest ports": _busiest_ports,
}
