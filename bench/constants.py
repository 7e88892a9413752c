"""What every constant of ``solver/effort.py`` trades: answers and time at half and at twice it.

    python bench/constants.py [--names TRIALS] [--cases 6] [--most 20] [--record]

Each constant that an answer reads is halved and doubled, one at a time (a tuple: each of its
numbers; a share or a part of something stays below 1). It is measured on those cases that read it:
of the scorecard, its decisions of the plugins' policy, a few more here (lost devices, a dispatcher
that divides tokens, tiny layers, time limits), and halves of the shared recording of gpt-oss-20b,
if that is here. Figures are means over cases, in percent of what the constant has now:
of the objective, of the bound, of the unseen half's imbalance or time, and of the processor's
seconds. *Noise* is how far the objective and the unseen figure differ between three seeds.
Objectives that are less, and bounds that are larger, are better.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from harness import Report, benchmark, timed
from instances import drifting
from scorecard import (
    BALANCE,
    CAPPED,
    FOLLOW,
    QUICK,
    SHARED,
    SLOW,
    Answer,
    Row,
    list_decisions,
    make_problem,
    solve_case,
)

from moetuner.solver import effort
from moetuner.solver.rebalancing import Pairs, rebalance

# Cases that take long, and tell no more than smaller ones.
METHODS = ("joint", "paper", "heuristic", "quick", "eplb")
LONG = ("thorough", "58x256, joint, time", "75x256", "61x384")
# Facts of the core, and what is measured by its fields.
NOT_MEASURED = {"LANES", "EFFORTS", "PRICE_CONTENTS", "SET_PARTS"}
COPIES: dict[str, Any] = {"slots_per_device": 5}
SPARE: dict[str, Any] = {"slots_per_device": 9}
RUNNING: dict[str, Any] = {"initial": "contiguous"}
BUDGET: dict[str, Any] = {"budget": 0.2}
UNEQUAL: dict[str, Any] = {"speeds": [1.0, 1.0, 1.1, 1.1]}
RECORDED = "gpt-oss-20b.npz"
# What the scorecard has no case for.
MORE: dict[str, Row] = {
    "24x32, lp": ("24x32", 1, 8, "joint", {**BALANCE, "extra_slots": 48, "split": "lp"}),
    "24x32, survive": ("24x32", 1, 8, "joint", {**BALANCE, **SPARE, "survive": "device"}),
    "24x32, heuristic, traffic": ("24x32", 1, 8, "heuristic", FOLLOW),
    "4x64, visits": ("4x64", 1, 8, "joint", CAPPED),
    "3x128, visits": ("3x128", 1, 8, "joint", CAPPED),
    "2x4, tiny": ("2x4", 2, 2, "joint", {"slots_per_device": 2}),
    "2x4, tiny, traffic": ("2x4", 2, 2, "joint", {**CAPPED, "slots_per_device": 2}),
    "24x32, time, limit": ("24x32", 2, 4, "joint", {**COPIES, "time_limit": 1.0}),
    "24x32, balance, limit": ("24x32", 1, 8, "joint", {**BALANCE, **COPIES, "time_limit": 1.0}),
    "24x32, visits, limit": ("24x32", 1, 8, "joint", {**CAPPED, "time_limit": 1.0}),
    "8x16, crossing, limit": ("8x16", 1, 4, "joint", {**FOLLOW, "time_limit": 0.5}),
    "8x16, time, follow, limit": ("8x16", 1, 4, "joint", {"regime": "follow", "time_limit": 0.5}),
    "8x16, speeds, limit": ("8x16", 2, 2, "joint", {**COPIES, **UNEQUAL, "time_limit": 0.5}),
    "8x16, running, limit": ("8x16", 1, 4, "joint", {**RUNNING, "time_limit": 0.5}),
    "8x16, running, risk": ("8x16", 1, 4, "joint", {**BALANCE, **RUNNING, "risk": 0.8, **BUDGET}),
    "8x16, running, groups": (
        *("8x16", 1, 4, "joint"),
        {**BALANCE, **RUNNING, "groups": "minimax", **BUDGET},
    ),
    "8x16, paper, uneven": ("8x16", 1, 3, "paper", FOLLOW),
    "table 6x32, many windows": ("table 6x32", 1, 8, "joint", COPIES),
    "table 6x32, balance": ("table 6x32", 1, 8, "joint", {**BALANCE, **COPIES}),
}
if (SHARED / RECORDED).exists():
    MORE["recorded, time"] = (RECORDED, 1, 8, "joint", {})
    MORE["recorded, balance"] = (RECORDED, 1, 8, "joint", BALANCE)
ROWS = {
    name: row
    for name, row in (QUICK | SLOW | MORE).items()
    if row[3] in METHODS and not any(part in name for part in LONG)
}


def decide_with_pairs() -> Answer:
    """Rebalance live windows where pairs of experts count, too.

    The objective is the tokens of the slowest devices, plus the cost of pairs that are apart.
    Experts 2k and 2k + 1 are met together twice as often as others.
    """
    layers, experts, devices, slots = 24, 64, 8, 9
    windows = drifting(layers, experts, 9, 0.3, seed=0)
    pairs = np.ones((layers, experts, experts), dtype=np.uint64)
    even = np.arange(0, experts, 2)
    pairs[:, even, even + 1] = pairs[:, even + 1, even] = 2
    running = np.tile(np.arange(devices * slots, dtype=np.int32) % experts, (layers, 1))
    answer = rebalance(
        windows,
        running.reshape(layers, devices, slots),
        budget=200,
        pairs=Pairs(pairs, np.full(layers, windows.sum() / pairs.sum() / 4)),
    )
    return {"objective": float(answer.after.sum()), "slots": "", "moves": int(answer.moves.sum())}


DECISIONS = {**dict(list_decisions()), "live, with pairs": decide_with_pairs}
# Figure of the unseen half by the goal of a case.
UNSEEN = {"time": "predicted_layer_us", "balance": "imbalance", "traffic": "crossing"}
SEEDS = 3


class Measured(NamedTuple):
    """An answer: its objective, its bound, what was unseen, and seconds of the processor."""

    objective: float
    bound: float
    unseen: float
    seconds: float


class Noise(NamedTuple):
    """How far seeds differ in the objective and the unseen figure, %."""

    objective: float
    unseen: float


def measure(name: str, seed: int = 0) -> Measured:
    """Solve a case, or decide it, and judge the placement."""
    work: Callable[[], Answer]
    figure = ""
    if name in DECISIONS:
        work = DECISIONS[name]
    else:
        *case, rest = ROWS[name]
        arguments = {key: value for key, value in rest.items() if key != "iterations"}
        of_problem = {
            key: value for key, value in arguments.items() if key not in ("effort", "time_limit")
        }
        # What was computed of the counts before, as single copies, was by other constants.
        make_problem(*case[:3], **of_problem)[0].statistics.memo.clear()
        work = partial(solve_case, *case, seed=seed, **arguments)
        figure = UNSEEN[rest.get("objective", "time")]
    answer, _, seconds = timed(work)
    numbers = [answer["objective"], answer.get("bound"), answer.get(figure)]
    return Measured(*(math.nan if number is None else number for number in numbers), seconds)


class Watched(types.ModuleType):
    """The module of constants, which notes the names that are read."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.isupper():
            READ.add(name)
        elif isinstance(value, types.FunctionType):
            READ.update(name for name in value.__code__.co_names if name.isupper())
        return value


READ: set[str] = set()


def measure_reads(name: str) -> tuple[Measured, set[str]]:
    """Measure a case, and return the names of the constants that it reads, too."""
    READ.clear()
    effort.__class__ = Watched
    try:
        return measure(name), set(READ)
    finally:
        effort.__class__ = types.ModuleType


def changed(value: Any, times: float) -> Any:
    """Return a constant, or every number of it, times a half or two; parts stay below 1."""
    if isinstance(value, tuple):
        return tuple(changed(number, times) for number in value)
    if isinstance(value, int):
        return max(int(value * times), 1)
    return min(value * times, 1.0) if value < 1 else value * times


@contextmanager
def set_to(name: str, times: float) -> Iterator[None]:
    """Set a constant, or a field of the default effort, to its value times a factor."""
    if name.startswith(FIELDS):
        holder, key, before = effort.EFFORTS, "default", effort.EFFORTS["default"]
        field = name.removeprefix(FIELDS)
        after = replace(before, **{field: changed(getattr(before, field), times)})
    else:
        holder, key, before = vars(effort), name, getattr(effort, name)
        after = changed(before, times)
    holder[key] = after
    try:
        yield
    finally:
        holder[key] = before


FIELDS = "EFFORTS."


def list_constants() -> list[str]:
    """Return names of all constants, and of the fields of an effort that are numbers."""
    names = [
        name
        for name, value in vars(effort).items()
        if name.isupper() and isinstance(value, int | float | tuple) and name not in NOT_MEASURED
    ]
    default = effort.EFFORTS["default"]
    return names + [
        FIELDS + field.name
        for field in fields(default)
        if type(getattr(default, field.name)) in (int, float)
    ]


def behind(after: Sequence[float], before: Sequence[float]) -> float:
    """Return by how many percent numbers are larger than others, on the geometric mean."""
    pairs = [
        (one, other)
        for one, other in zip(after, before, strict=True)
        if one > 0 and other > 0 and math.isfinite(one) and math.isfinite(other)
    ]
    if not pairs:
        return math.nan
    return 100 * (math.exp(np.mean([math.log(one / other) for one, other in pairs])) - 1)


def spread_of_seeds(name: str, now: Measured) -> Noise:
    """Compute the standard deviation over seeds, of which ``now`` is the first, %."""
    answers = [now, *(measure(name, seed) for seed in range(1, SEEDS))]
    figures = np.array([[answer.objective, answer.unseen] for answer in answers])
    return Noise(*(100 * figures.std(axis=0, ddof=1) / figures[0]).tolist())


def spaced(names: list[str], number: int) -> list[str]:
    """Return so many of some names, at even distances, the first and the last among them."""
    places = np.linspace(0, len(names) - 1, min(number, len(names))).round().astype(int)
    return [names[place] for place in places]


def compare(report: Report, asked: Any) -> None:
    """Print what constants trade."""
    now: dict[str, Measured] = {}
    noise: dict[str, Noise] = {}
    readers: dict[str, list[str]] = {}
    for name in (*ROWS, *DECISIONS):
        first, read = measure_reads(name)
        if first.seconds <= asked.most:
            now[name] = measure(name)  # anew: the first one counted, too
            noise[name] = spread_of_seeds(name, now[name])
            for constant in read | {FIELDS + field.name for field in fields(effort.Effort)}:
                readers.setdefault(constant, []).append(name)
    row = report.table(
        "Constants at half and at twice their value, %",
        "constant <24",
        "times 4.1f",
        "cases 3d",
        "objective 9.3f",
        "noise 7.3f",
        "worst 8.3f",
        "unseen 8.3f",
        "noise 7.3f",
        "bound 8.3f",
        "seconds 8.1f",
    )
    for constant in list_constants():
        if asked.names and not any(part in constant for part in asked.names):
            continue
        names = sorted(readers.get(constant, []), key=lambda name: now[name].seconds)
        if not names:
            continue
        # The quickest, and the slowest that are not too slow: a case of either kind.
        names = spaced(names, asked.cases)
        before = [now[name] for name in names]
        by_chance = np.array([noise[name] for name in names]).mean(axis=0) / len(names) ** 0.5
        for times in (0.5, 2.0):
            with set_to(constant, times):
                after = [measure(name) for name in names]
            objective, bound, unseen, seconds = (
                behind(*columns)
                for columns in zip(zip(*after, strict=True), zip(*before, strict=True), strict=True)
            )
            worst = max(
                behind([one.objective], [other.objective])
                for one, other in zip(after, before, strict=True)
            )
            figures = (objective, by_chance[0], worst, unseen, by_chance[1], bound, seconds)
            row(constant, times, len(names), *figures)
    unread = [name for name in list_constants() if name not in readers]
    report.say(f"No case reads {', '.join(unread) or 'none'}.")


def main() -> None:
    """Print the table."""
    with benchmark(__doc__, {}, names=[""][1:], cases=6, most=20.0) as (asked, report):
        compare(report, asked)


if __name__ == "__main__":
    main()
