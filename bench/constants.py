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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Report, benchmark, timed
from scorecard import (
    BALANCE,
    CAPPED,
    FOLLOW,
    QUICK,
    SLOW,
    Row,
    list_decisions,
    make_problem,
    split_traffic,
)

import moetuner as mt
from moetuner.solver import effort

# Cases that take long, and tell no more than smaller ones.
LONG = ("thorough", "58x256, joint, time", "75x256", "61x384")
# Facts of the core, and what is measured by its fields.
NOT_MEASURED = {"LANES", "EFFORTS", "PRICE_CONTENTS", "SET_PARTS"}
COPIES: dict[str, Any] = {"slots_per_device": 5}
# What the scorecard has no case for. A limit is in seconds.
MORE: dict[str, Row] = {
    "24x32, lp": ("24x32", 1, 8, "joint", {**BALANCE, "extra_slots": 48, "split": "lp"}),
    "24x32, survive": (
        "24x32",
        1,
        8,
        "joint",
        {**BALANCE, "slots_per_device": 9, "survive": "device"},
    ),
    "24x32, heuristic, traffic": ("24x32", 1, 8, "heuristic", FOLLOW),
    "2x4, tiny": ("2x4", 2, 2, "joint", {"slots_per_device": 2}),
    "2x4, tiny, traffic": ("2x4", 2, 2, "joint", {**CAPPED, "slots_per_device": 2}),
    "24x32, time, limit": ("24x32", 2, 4, "joint", {**COPIES, "limit": 1.0}),
    "24x32, balance, limit": ("24x32", 1, 8, "joint", {**BALANCE, **COPIES, "limit": 1.0}),
    "24x32, visits, limit": ("24x32", 1, 8, "joint", {**CAPPED, "limit": 1.0}),
    "8x16, crossing, limit": ("8x16", 1, 4, "joint", {**FOLLOW, "limit": 0.5}),
    "8x16, time, follow, limit": ("8x16", 1, 4, "joint", {"regime": "follow", "limit": 0.5}),
    "8x16, speeds, limit": (
        *("8x16", 2, 2, "joint"),
        {**COPIES, "speeds": [1.0, 1.0, 1.1, 1.1], "limit": 0.5},
    ),
}
ROWS = QUICK | SLOW | MORE
DECISIONS = dict(list_decisions())
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SEEDS = 3


class Measured(NamedTuple):
    """An answer: its objective, its bound, what was unseen, and seconds of the processor."""

    objective: float
    bound: float
    unseen: float
    seconds: float


class Case(NamedTuple):
    """A solve by a seed, and the figure of an unseen half under its placement."""

    solve: Callable[[int], Any]
    judge: Callable[[mt.Placement], float]

    def measure(self, seed: int = 0) -> Measured:
        """Solve, and judge the placement."""
        result, _, seconds = timed(partial(self.solve, seed))
        bound = math.nan if result.bound is None else result.bound
        return Measured(result.objective, bound, self.judge(result.placement), seconds)


def scorecard_case(name: str) -> Case:
    """Return a case of the scorecard."""
    name_of_traffic, nodes, per_node, method, rest = ROWS[name]
    level, limit = rest.get("effort", "default"), rest.get("limit")
    other = ("iterations", "effort", "limit")
    rules = {key: value for key, value in rest.items() if key not in other}
    problem, moves = make_problem(name_of_traffic, nodes, per_node, **rules)
    _, unseen, window = split_traffic(name_of_traffic)

    def solve(seed: int) -> mt.Result:
        return mt.solve(
            make_problem(name_of_traffic, nodes, per_node, **rules)[0],
            method,
            seed=seed,
            effort=level,
            time_limit=limit,
            initial=moves.initial,
            move_budget=moves.budget,
            move_cost=moves.cost,
        )

    def judge(placement: mt.Placement) -> float:
        # A split that divides windows is judged on counts of them.
        traffic = unseen
        if problem.split == "lp" and isinstance(unseen, mt.RoutingTrace):
            traffic = mt.RoutingStatistics.from_trace(unseen, window=window)
        judged = mt.evaluate(
            placement,
            traffic,
            problem.topology,
            window=window if isinstance(traffic, mt.RoutingTrace) else None,
            regime=problem.regime,
            split=problem.split,
        )
        return unseen_figure(judged, problem.goal)

    return Case(solve, judge)


def unseen_figure(judged: mt.Evaluation, goal: str) -> float:
    """Return the figure of a goal: time, imbalance, or what crosses."""
    name = {"time": "predicted_layer_us", "balance": "imbalance"}.get(goal, "crossing")
    value = getattr(judged, name)
    return math.nan if value is None else float(value)


def recorded_case(path: Path, goal: str) -> Case:
    """Return a solve of half of a recording on 8 devices, judged on the other half."""
    trace = mt.RoutingTrace.load(path)
    seen, unseen = trace.split(0.5, seed=0)
    topology = mt.Topology(8)
    sets = goal != "balance"

    def solve(seed: int) -> mt.Result:
        statistics = mt.RoutingStatistics.from_trace(seen, window=512, sets=sets)
        return mt.solve(mt.Problem(statistics, topology, objective=goal), seed=seed)

    def judge(placement: mt.Placement) -> float:
        return unseen_figure(mt.evaluate(placement, unseen, topology, window=512), goal)

    return Case(solve, judge)


class Decision(NamedTuple):
    """What the plugins' policy decided: its imbalance."""

    objective: float
    bound: None = None
    placement: None = None


@cache
def make_case(name: str) -> Case:
    """Return a case by its name."""
    if name in DECISIONS:
        decide = DECISIONS[name]
        return Case(lambda _: Decision(decide()["objective"]), lambda _: math.nan)
    if name.startswith("recorded"):
        return recorded_case(next(iter(recordings())), name.split(", ")[1])
    return scorecard_case(name)


def recordings() -> Iterator[Path]:
    """Yield shared recordings that cases are made of."""
    yield from sorted(SHARED.glob("gpt-oss-20b.npz"))


def list_cases() -> list[str]:
    """Return names of cases: what searches, of the scorecard and the shared recording."""
    names = [
        name
        for name, (*_, method, _) in ROWS.items()
        if method in ("joint", "paper", "heuristic", "quick")
        and not any(part in name for part in LONG)
    ]
    names += list(DECISIONS)
    if any(recordings()):
        names += ["recorded, time", "recorded, balance"]
    return names


class Watched(types.ModuleType):
    """The module of constants, which notes the names that are read."""

    def __getattribute__(self, name: str) -> Any:
        if name.isupper():
            READ.add(name)
        return super().__getattribute__(name)


READ: set[str] = set()
# Constants that the functions of the module read.
WITHIN = {
    "most_trials": ("SLOT_WORK", "MOST_TRIALS"),
    "start_trials": ("BALANCING_START", "LEAST_BALANCING"),
    "spread_trials": ("SPREAD_TRIALS", "LEAST_BALANCING"),
    "lp_split_trials": ("LP_SPLIT_TRIALS", "LP_SPLIT_WORK"),
    "quick_trials": ("BALANCING_TRIALS", "LEAST_BALANCING", "BALANCING_WORK"),
}


@contextmanager
def watching() -> Iterator[set[str]]:
    """Collect the names of constants that are read, those of called functions too."""
    READ.clear()
    effort.__class__ = Watched
    plain = {name: getattr(effort, name) for name in WITHIN if hasattr(effort, name)}

    def noted(name: str, *values: Any) -> Any:
        READ.update(WITHIN[name])
        return plain[name](*values)

    for name in plain:
        setattr(effort, name, partial(noted, name))
    try:
        yield READ
    finally:
        for name, function in plain.items():
            setattr(effort, name, function)
        effort.__class__ = types.ModuleType


def changed(value: Any, times: float) -> Any:
    """Return a constant, or every number of it, times a half or two; parts stay below 1."""
    if isinstance(value, dict):
        return {key: changed(number, times) for key, number in value.items()}
    if isinstance(value, tuple):
        return tuple(changed(number, times) for number in value)
    if isinstance(value, int):
        return max(int(value * times), 1)
    return min(value * times, 1.0) if value < 1 else value * times


@contextmanager
def set_to(name: str, times: float) -> Iterator[None]:
    """Set a constant, or a field of the default effort, to its value times a factor."""
    holder, _, field = name.partition(".")
    before = getattr(effort, holder)
    if field:
        default = before["default"]
        value = changed(getattr(default, field), times)
        before["default"] = replace(default, **{field: value})
    else:
        setattr(effort, holder, changed(before, times))
    try:
        yield
    finally:
        if field:
            before["default"] = default
        else:
            setattr(effort, holder, before)


def list_constants() -> list[str]:
    """Return names of all constants, and of the fields of an effort that are numbers."""
    numbers = (int, float, tuple, dict)
    names = [
        name
        for name, value in vars(effort).items()
        if name.isupper() and isinstance(value, numbers) and name not in NOT_MEASURED
    ]
    default = effort.EFFORTS["default"]
    return names + [
        f"EFFORTS.{field.name}"
        for field in fields(default)
        if type(getattr(default, field.name)) in (int, float)
    ]


def behind(after: list[float], before: list[float]) -> float:
    """Return by how many percent numbers are larger than others, on the geometric mean."""
    pairs = [
        (one, other)
        for one, other in zip(after, before, strict=True)
        if one > 0 and other > 0 and math.isfinite(one) and math.isfinite(other)
    ]
    if not pairs:
        return math.nan
    return 100 * (math.exp(np.mean([math.log(one / other) for one, other in pairs])) - 1)


def compare(report: Report, asked: Any) -> None:
    """Print what constants trade."""
    now: dict[str, Measured] = {}
    readers: dict[str, list[str]] = {}
    noise: dict[str, tuple[float, float]] = {}
    for name in list_cases():
        case = make_case(name)
        with watching() as read:
            now[name] = case.measure()
        for constant in set(read) | {f"EFFORTS.{field.name}" for field in fields(effort.Effort)}:
            readers.setdefault(constant, []).append(name)
    quick = {name for name, measured in now.items() if measured.seconds <= asked.most}
    for name in quick:
        now[name] = make_case(name).measure()  # anew: the first one read and counted, too
        others = [make_case(name).measure(seed) for seed in range(1, SEEDS)]
        values = [now[name], *others]
        spread = [
            100 * float(np.std([value[at] for value in values], ddof=1) / values[0][at])
            for at in (0, 2)
        ]
        noise[name] = (spread[0], spread[1])
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
        names = [name for name in readers.get(constant, []) if name in quick]
        names = sorted(names, key=lambda name: now[name].seconds)
        if not names:
            continue
        # The quickest, and the slowest that are not too slow: a case of either kind.
        chosen = names if len(names) <= asked.cases else spaced(names, asked.cases)
        for times in (0.5, 2.0):
            with set_to(constant, times):
                after = [make_case(name).measure() for name in chosen]
            before = [now[name] for name in chosen]
            columns = list(zip(*after, strict=True)), list(zip(*before, strict=True))
            objective, bound, unseen, seconds = (
                behind(list(one), list(other)) for one, other in zip(*columns, strict=True)
            )
            worst = max(
                behind([one.objective], [other.objective])
                for one, other in zip(after, before, strict=True)
            )
            spreads = np.nanmean([noise[name] for name in chosen], axis=0) / len(chosen) ** 0.5
            figures = (objective, float(spreads[0]), worst, unseen, float(spreads[1]))
            row(constant, times, len(chosen), *figures, bound, seconds)
    unread = [name for name in list_constants() if name not in readers]
    report.say(f"No case reads {', '.join(unread) or 'none'}.")


def spaced(names: list[str], number: int) -> list[str]:
    """Return so many of some names, at even distances, the last among them."""
    places = np.linspace(0, len(names) - 1, number).round().astype(int)
    return [names[place] for place in places]


def main() -> None:
    """Print the table."""
    with benchmark(__doc__, {}, names=[""][1:], cases=6, most=20.0) as (asked, report):
        compare(report, asked)


if __name__ == "__main__":
    main()
