"""Write parts of sentences: windows, the running placement, gains and their intervals."""

from __future__ import annotations

from collections.abc import Callable

from moetuner.evaluation.comparison import Comparison
from moetuner.files.cells import counted, signed, span
from moetuner.serving.running import Running

# A text that is filled with the numbers of a finding and the voice, or a function of both.
Clause = str | Callable[..., str]
# Smallest gain that is shown as more than nothing.
LEAST_SHOWN = 0.0005


def name_windows(window: int | None, recorded: int | None = None) -> str:
    """Write the size of windows; for those of a load table, ``recorded`` is the size, if known."""
    if window is not None:
        return f"windows of {window:,} tokens"
    return "recorded windows" + (f" of {recorded:,} tokens" if recorded else "")


def in_windows(window: int | None) -> str:
    """Write in which windows a figure is, to follow it; nothing where the size is None."""
    return "" if window is None else f" in {name_windows(window)}"


def name_running(initial: str) -> str:
    """Write the name of the running placement, such as ``"eplb:32"``, or ``"given"`` by a user."""
    running = Running.parse(initial)
    if running.method == "given":
        return "the running placement"
    if running.method != "eplb":
        return f"the {running.method.replace('_', '-')} placement"
    if not running.redundant:
        return "EPLB's placement"
    return f"EPLB's placement with {counted(running.redundant, 'redundant expert')}"


def write_interval(gain: Comparison) -> str:
    """Write the interval of a gain in brackets; nothing if it has none, or nothing differs."""
    if not gain.interval_in_words or gain.interval == (0, 0):
        return ""
    return f" ({gain.interval_in_words})"


def write_gain(gain: Comparison) -> str:
    """Write a gain with its interval, if it has one."""
    ends = "" if gain.low is None else f" (95 % interval {span(gain.low, gain.high)})"
    return f"{signed(gain.gain)}{ends}"


def write_amount(gain: Comparison) -> str:
    """Write how much less, or more, the figure is after the change."""
    return gain.amount if abs(gain.gain) >= LEAST_SHOWN else "no less"
