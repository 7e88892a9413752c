"""Clauses on recordings: drift from a profile, structure, and devices that leave or join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetuner._texts import name
from moetuner.files.cells import counted, in_bytes, number, percent, span
from moetuner.report.findings import Voice
from moetuner.report.words.parts import Clause, in_windows

# Explanation of each answer on hot experts.
MEANING = {
    "a static set is worth it": "some experts are chosen far more often, and stay the same ones",
    "a cache serves better": "what was used last says more than what is used most",
    "routing is flat": "the number of experts that are kept near decides, not which ones",
    "nothing is held out": "whether a static set is worth it is not known from one window",
}


def _change(change: float, label: str, window: int | None) -> str:
    """Write how much a figure changes, and in which windows."""
    amount = f"{percent(abs(change))} {'less' if change < 0 else 'more'}"
    return f"{amount} {label}{in_windows(window)}"


def _profile_not_left(
    voice: Voice, change: float, label: str, window: int | None, is_worse: bool
) -> str:
    text = "the traffic has not left the profile: keep the placement"
    if not is_worse:
        return text
    # Experts have the same shares on average, but single windows differ more from them.
    worse = _change(change, label, window)
    return f"{text}. Its windows are less even than the profile's, though: {worse}"


def _hot_experts(
    voice: Voice, answer: str, static: float, cache: float | None, chance: float, is_unseen: bool
) -> str:
    with_cache = "" if cache is None else f", a cache of that size {100 * cache:.0f} %"
    picks = "unseen picks" if is_unseen else "picks that they are chosen by"
    return (
        f"{answer}: {MEANING[answer]}. Half of the experts take {100 * static:.0f} % of the "
        f"{picks}{with_cache}; without preference it would be {100 * chance:.0f} %"
    )


def _half_of_experts(
    voice: Voice,
    low: float,
    high: float,
    group: str | None,
    of_group: float | None,
    later: float | None,
) -> str:
    text = f"half of the experts take {percent(low)} to {percent(high)} of the picks of a layer"
    if group is not None:
        text += f"; chosen by all other groups, {percent(of_group)} of those of {name(group)}, the "
        text += "least of all groups"
    if later is not None:
        text += f"; chosen by the earlier half, {percent(later)} of those of the later half"
    return text


def _interval(low: float, high: float) -> str:
    return f"95 % interval {span(low, high, with_signs=False)}"


def _machine(layers: int, devices: int, slots: int) -> str:
    return f"{counted(layers, 'layer')}, {counted(devices, 'device')} x {counted(slots, 'slot')}"


def write_change(
    without: Sequence[int],
    retire: Sequence[int],
    fewer: int,
    join: int,
    slots_per_device: int | None,
) -> str:
    """Write which devices are lost, leave and join, and how many slots each has from now on."""
    texts = []
    if without:
        texts.append(f"{_named_devices(without)} lost")
    if retire:
        texts.append(f"{_named_devices(retire)} to leave")
    if fewer:
        texts.append(f"{counted(fewer, 'device')} fewer")
    if join:
        texts.append(f"{counted(join, 'device')} more")
    if slots_per_device is not None:
        texts.append(f"{counted(slots_per_device, 'slot')} on each from now on")
    return ", ".join(texts)


def _named_devices(devices: Sequence[int]) -> str:
    return f"{'device' if len(devices) == 1 else 'devices'} {', '.join(map(str, devices))}"


def _devices_that_serve(
    voice: Voice, machine: dict[str, int], change: dict[str, Any], serving: int
) -> str:
    return f"{_machine(**machine)}; {write_change(**change)}: {counted(serving, 'device')} serve"


def _experts_that_move(
    voice: Voice,
    experts: int,
    moved_bytes: float | None,
    from_disk: int = 0,
    between_nodes: int | None = None,
) -> str:
    text = f"{counted(experts, 'expert')} {'moves' if experts == 1 else 'move'}"
    if moved_bytes is not None:
        text += f" ({in_bytes(moved_bytes)})"
    if from_disk:
        text += f", {from_disk:,} of them from disk, as no device has them any more"
    if between_nodes is not None:
        text += f": {experts - between_nodes:,} inside nodes, {between_nodes:,} between nodes"
    return text


def _busiest_device(voice: Voice, before: float, after: float, window: int | None) -> str:
    where = f" in the windows of {voice.recording}" if window is None else in_windows(window)
    return f"busiest device: {before:.3f} x the mean load now, {after:.3f} x then,{where}"


CLAUSES: dict[str, Clause] = {
    # Drift from a profile.
    "shares of experts": lambda voice, distance, expected, worst_layer, worst_distance: (
        f"{percent(distance)} of the tokens go to other experts than in the profile; by chance it "
        f"would be {percent(expected)} (mean of layers; most in layer {worst_layer}: "
        f"{percent(worst_distance)})"
    ),
    "profile not left": _profile_not_left,
    "profile left, placement serves": lambda voice, **change: (
        f"the traffic has left the profile, and the placement still serves it: {_change(**change)}"
    ),
    "profile left, placement serves worse": lambda voice, **change: (
        f"the traffic has left the profile, and the placement serves it worse: "
        f"{_change(**change)}. Solve again:"
    ),
    "profile not left, placement serves worse": lambda voice, **change: (
        f"experts have the profile's shares, but the placement serves the windows worse: "
        f"{_change(**change)}. Solve again:"
    ),
    "seen profile": (
        "The placement was computed from all of this profile, which flatters its figures there"
    ),
    "another profile": "Warning: the placement was not computed from this profile",
    # Routing that no router made.
    "random routing": (
        "this routing looks random (experts have equal loads, and neighbouring tokens and layers "
        "share no more of them than by chance): a placement gains nothing on it, and it says "
        "nothing of real traffic. Record requests of users"
    ),
    "routing in turns": (
        "this routing looks dealt out in turns (the loads of experts are more equal than chance "
        "would make them): a placement gains nothing on it, and it says nothing of real traffic. "
        "Record requests of users"
    ),
    "even loads": (
        "experts have equal loads within chance, as random routing has them: no placement makes "
        "them more even. Loads of real traffic differ"
    ),
    # Structure.
    "no groups": "{voice.recording} has no groups to compare",
    "no transitions": (
        "{voice.recording} has no transitions, so it shows no structure between layers"
    ),
    "nothing held out": (
        "statistics have no sequences to hold out, so structure between layers is not measured. "
        "Give the trace instead"
    ),
    "too few sequences": (
        "fewer than {least} independent sequences are held out: structure may be chance. Record "
        "more, with sequence labels"
    ),
    "no structure": (
        "the independence null is about as good: neighbouring layers route almost independently"
    ),
    "uncertain structure": lambda voice, low, high: (
        f"the gap to the independence null ({_interval(low, high)}) may be chance"
    ),
    "structure": lambda voice, kept, low, high: (
        f"a placement keeps {100 * kept:.1f} more of 100 transitions ({_interval(low, high)}) on "
        "their device than the independence null, because neighbouring layers route together"
    ),
    "contiguous placement": lambda voice, imbalance, us: (
        f"contiguous placement: imbalance {number(imbalance, 3)}, predicted time {number(us, 1)} "
        "us per layer"
    ),
    "hot experts": _hot_experts,
    "half of the experts": _half_of_experts,
    # Devices that are lost, leave or join.
    "slow links": (
        "all links are taken for the slow links between the largest groups, as groups of a machine "
        "of three tiers or more have equally many devices"
    ),
    "devices that serve": _devices_that_serve,
    "devices that leave": lambda voice, devices: (
        f"{_named_devices(devices)} {'leaves' if len(devices) == 1 else 'leave'}"
    ),
    "experts that move": _experts_that_move,
    "busiest device": _busiest_device,
    "planned losses": lambda voice, machine, domain, planned, number, fatal: (
        f"{_machine(**machine)}; losses of a {domain}: {planned} of {number} planned, {fatal} lose "
        "an expert"
    ),
}
