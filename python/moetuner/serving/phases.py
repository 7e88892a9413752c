"""Phases of serving: windows of several sizes, each with its share of the time.

An engine decodes in steps of some hundred tokens and reads prompts in steps of thousands. The value
of a placement in one phase says little about the other: steps of few tokens wait for weights, steps
of many for the busiest device. So both phases count, by their shares of the serving time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moetuner import _checks as check
from moetuner.statistics import WINDOW, RoutingStatistics

# Share of the serving time, by tokens of a window.
Phases = Mapping[int, float]

# Tokens of a step as engines decode, and as they read prompts.
WINDOWS = (WINDOW, 8192)
# Windows in which prefill is judged, the preferred first: a recording must fill two of them.
PREFILL_WINDOWS = (WINDOWS[1], 4096, 2048)
# Share of the time that is prefill, where nobody says it. The mix is not known, so neither phase
# should lose much. Shares are of the time that blocks take, and prefill gains more than decode, so
# a share of 0.6 weighs both about equally in the end. Without copies each phase is then within
# 0.6 % of what a search for that phase alone finds (gpt-oss-20b on 8 and 16 devices), as from 0.35
# to 0.8. With copies, the walk that balances the phases' regrets begins here
# (``solver/stages/phases.py``).
PREFILL_SHARE = 0.6


def make_phases(share: float) -> dict[int, float]:
    """Return the two phases with this share of prefill."""
    return dict(zip(WINDOWS, (1 - share, share), strict=True))


def read_prefill_share(text: str) -> dict[int, float]:
    """Read a number from 0 to 1."""
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(text)
    return make_phases(share)


def choose_judged_windows(tokens: int, sizes: Iterable[int | None] = WINDOWS) -> tuple[int, ...]:
    """Return the sizes of windows to judge a placement in, on a number of tokens.

    Prefill is judged in the longest windows of which the tokens fill two, if there are such.
    """
    filled = [size for size in PREFILL_WINDOWS if tokens >= 2 * size]
    judged: list[int] = []
    for size in sizes:
        if size == WINDOWS[1]:
            judged += filled[:1]
        elif size is not None:
            judged.append(size)
    return tuple(judged)


def name_phase(window: int | None) -> str | None:
    """Return the name of the phase with this size of windows; None if it is neither."""
    if window == WINDOWS[0]:
        return "decode"
    return "prefill" if window in PREFILL_WINDOWS else None


def check_phases(phases: object) -> dict[int, float]:
    """Return phases as a dict, the shortest windows first; raise for a wrong size or share."""
    check.instance("phases", phases, Mapping, hint=" of shares by tokens of a window")
    assert isinstance(phases, Mapping)
    for tokens, share in phases.items():
        check.whole_number("phases: tokens of a window", tokens, highest=1 << 40)
        check.not_negative(f"phases: share of windows of {tokens:,} tokens", share, "number")
    if not any(phases.values()):
        raise check.ArgumentError(
            f"phases must have a share above 0, got {check.shown(dict(phases))}", "phases"
        )
    return {int(tokens): float(phases[tokens]) for tokens in sorted(phases)}


def from_keys(values: object) -> dict[int, float]:
    """Read phases from a placement's file, whose keys are texts as JSON wants them."""
    check.instance("phases", values, Mapping, hint=" of shares by tokens of a window")
    assert isinstance(values, Mapping)
    for tokens in values:
        if not (isinstance(tokens, str) and tokens.isascii() and tokens.isdigit()):
            raise check.ArgumentError(
                f"phases must be shares by tokens, got {check.shown(tokens)}", "phases"
            )
    return check_phases({int(tokens): share for tokens, share in values.items()})


def compute_phase_shares(
    statistics: RoutingStatistics, phases: Phases | None, step: int | None
) -> dict[int | None, float]:
    """Return the shares of the time, by tokens of a window, for some statistics.

    Without phases, statistics of a trace in steps of decode get both phases, however few tokens
    they have. All others are in one phase. ``step`` is the tokens of a step.
    """
    if phases is None:
        of_trace = statistics.transitions is not None or statistics.sets is not None
        if not of_trace or step != WINDOW:
            return {step: 1.0}
        phases = make_phases(PREFILL_SHARE)
    total = sum(phases.values())
    shares: dict[int | None, float] = {
        tokens: share / total for tokens, share in phases.items() if share
    }
    size = statistics.window
    for tokens in shares:
        if tokens is None or size is None or tokens % size:
            length = "of unknown length" if size is None else f"of {size:,} tokens each"
            raise check.ArgumentError(
                f"phases must be of whole windows of the traffic, which are {length}, "
                f"got {tokens or 0:,} tokens",
                "phases",
            )
    return shares


def describe(shares: Mapping[int | None, float]) -> str:
    """Write the sizes of windows with their shares of the time; nothing for a single size."""
    if len(shares) < 2:
        return ""
    (first, first_share), *others = shares.items()
    texts = [f"{tokens:,} ({100 * share:g} %)" for tokens, share in others]
    return (
        f"windows of {first:,} tokens ({100 * first_share:g} % of the time) "
        f"and of {', '.join(texts)}"
    )
