"""Whether a change of the code changes an answer: some hundred answers beside those stored.

    python bench/scorecard.py [NAME ...] [--quick] [--write]

Every case has a fixed seed and no time limit, so its answer is a function of the code alone. A case
is a solve (a part of a name selects it), a judgement of a placement, a decision of the plugins'
policy, or a command on the bundled trace with ``--json``. What came out last is in
``scorecard.json``; fields that differ are printed as a table, with ``worse`` where a solve ends
with a larger objective, a larger excess over caps or a smaller bound. The status is 1 if any
differs. ``--write`` stores what comes out; ``--quick`` takes the cases of ``QUICK``, judgements and
decisions, which ``tests/test_scorecard.py`` runs as well: the fewest seconds in which every method,
stage and term runs.

Slots are stored as a checksum. Lists of more than four numbers are stored as their length,
checksum and mean. Seconds, paths and progress are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from instances import domains, drifting, routing

import moetuner as mt
from moetuner.cli import main as command_line
from moetuner.plugins import rebalance_experts

STORED = Path(__file__).with_suffix(".json")
# Digits of a float that are compared: sums may end in other bits on another processor.
DIGITS = 9
# Numbers of a list that are stored one by one.
LISTED = 4
UNSTABLE = {"seconds", "solve_seconds", "history", "milliseconds", "version", "path", "file"}
FIGURES = ("imbalance", "imbalance_total", "crossing", "fanout", "predicted_layer_us")

Answer = dict[str, Any]
Case = Callable[[], Answer]

# name: layers, experts, top-k, tokens, tokens of a window
SIZES = {
    "24x32": (24, 32, 4, 8_000, 500),
    "32x8": (32, 8, 2, 8_000, 500),
    "26x64": (26, 64, 6, 6_000, 500),
    "8x16": (8, 16, 2, 6_000, 400),
    "3x12": (3, 12, 3, 1_200, 200),
    "2x4": (2, 4, 2, 600, 100),
    "4x64": (4, 64, 4, 4_000, 500),
    "3x128": (3, 128, 8, 4_000, 500),
    "58x256": (58, 256, 8, 8_192, 512),
    "61x384": (61, 384, 8, 8_192, 512),
}

# Tokens of the bundled trace: the seen half fills one window of prefill, or none.
SHORT = {"bundled 20,000": 20_000, "bundled 6,000": 6_000}

# Recordings of real models; a name of traffic may be a file there.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Load tables of ten groups. name: layers, experts, windows
TABLES = {
    "table 75x256": (75, 256, 80),
    "table 58x256": (58, 256, 40),
    "table 12x128": (12, 128, 40),
    "table 6x32": (6, 32, 1_300),
}


@cache
def split_traffic(
    name: str,
) -> tuple[
    mt.RoutingTrace | mt.RoutingStatistics, mt.RoutingTrace | mt.RoutingStatistics, int | None
]:
    """Return the seen and the unseen half of some traffic, and the tokens of a window."""
    if name in TABLES:
        layers, experts, windows = TABLES[name]
        load = domains(layers, windows, seed=0, experts=experts).astype(np.uint64)
        halves = (load[: windows // 2], load[windows // 2 :])
        return *map(mt.RoutingStatistics.from_load, halves), None
    if name.endswith(".npz"):
        return *mt.RoutingTrace.load(SHARED / name).split(0.5, seed=0), 512
    if name == "bundled" or name in SHORT:
        with resources.as_file(
            resources.files("moetuner") / "data" / "small-moe.safetensors"
        ) as at:
            trace = mt.RoutingTrace.load(at)
        if name in SHORT:
            # Of all groups: every so many-th sequence.
            sequences = np.unique(trace.sequence)[:: trace.tokens // SHORT[name]]
            trace = trace.select(sequences=sequences.tolist())
        seen, unseen = trace.split(0.5, seed=0)
        return seen, unseen, 512
    layers, experts, top_k, tokens, window = SIZES[name]
    trace = routing(layers, experts, top_k, tokens=tokens, types=12)
    group = np.arange(tokens) * 4 // tokens % 2
    trace = mt.RoutingTrace.from_arrays(
        trace.expert_ids[:],
        num_experts=experts,
        sequence=np.arange(tokens) // 100,
        group=group,
        group_names=["a", "b"],
    )
    seen, unseen = trace.split(0.5, seed=0)
    return seen, unseen, window


@cache
def count(name: str, *, sets: bool = True, by_group: bool = False) -> mt.RoutingStatistics:
    """Count the seen half."""
    seen, _, window = split_traffic(name)
    if isinstance(seen, mt.RoutingStatistics):
        return seen
    return mt.RoutingStatistics.from_trace(seen, window=window, sets=sets, by_group=by_group)


class Moves(NamedTuple):
    """A running placement, and what ``solve`` lets a move from it cost.

    Parameters
    ----------
    initial
        The running placement; None for none.
    budget
        Most experts that may move; None for any.
    cost
        Cost of a move.
    """

    initial: mt.Placement | None
    budget: float | None
    cost: float


def make_problem(
    traffic: str,
    nodes: int,
    per_node: int,
    *,
    initial: str | None = None,
    budget: float | None = None,
    price: float = 0.0,
    speeds: list[float] | None = None,
    sets: bool = True,
    **arguments: Any,
) -> tuple[mt.Problem, Moves]:
    """Return the problem of a case, and how far a placement may be from the running one."""
    devices = nodes * per_node
    topology = mt.Topology(devices, devices_per_node=per_node)
    if speeds is not None:
        topology = mt.Topology(devices, devices_per_node=per_node, speed=speeds)
    statistics = count(traffic, sets=sets, by_group="groups" in arguments)
    problem = mt.Problem(statistics, topology, **arguments)
    running = None if initial is None else mt.solve(problem, initial).placement
    experts = None if budget is None else budget * problem.layers * problem.num_experts
    return problem, Moves(running, experts, price)


def solve_case(
    traffic: str,
    nodes: int,
    per_node: int,
    method: str,
    *,
    iterations: int | None = None,
    effort: str = "default",
    time_limit: float | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Answer:
    """Solve one problem and judge the placement on the unseen half."""
    problem, moves = make_problem(traffic, nodes, per_node, **arguments)
    result = mt.solve(
        problem,
        method,
        iterations=iterations,
        effort=effort,
        time_limit=time_limit,
        seed=seed,
        initial=moves.initial,
        move_budget=moves.budget,
        move_cost=moves.cost,
    )
    _, unseen, window = split_traffic(traffic)
    if problem.split == "lp" and isinstance(unseen, mt.RoutingTrace):
        # It divides windows, and no single tokens.
        unseen, window = mt.RoutingStatistics.from_trace(unseen, window=window), None
    judged = mt.evaluate(
        result.placement,
        unseen,
        problem.topology,
        window=window,
        regime=problem.regime,
        split=problem.split,
    )
    slots = np.ascontiguousarray(result.placement.slots)
    return {
        "slots": checksum(slots),
        "status": result.status,
        "objective": result.objective,
        "bound": result.bound,
        "bound_source": result.bound_source,
        "excess": float(problem.caps.excess(result.placement).max())
        if problem.max_imbalance
        else 0.0,
        "moves": None
        if moves.initial is None
        else moves.initial.diff(result.placement).experts_moved,
        "violations": list(result.violations),
        **{name: getattr(judged, name) for name in FIGURES},
    }


BALANCE = {"objective": "balance"}
CAPPED = {"objective": "traffic", "max_imbalance": 1.05}
FOLLOW = {**CAPPED, "regime": "follow"}
Row = tuple[str, int, int, str, dict[str, Any]]
QUICK: dict[str, Row] = {
    # the bundled trace
    "bundled, joint, time": ("bundled", 1, 4, "joint", {}),
    "bundled, paper, follow": ("bundled", 1, 4, "paper", FOLLOW),
    "bundled, eplb, balance": ("bundled", 1, 4, "eplb", BALANCE),
    "bundled, quick, balance": ("bundled", 1, 4, "quick", BALANCE),
    # the paper's size
    "32x8, joint, follow": ("32x8", 1, 4, "joint", FOLLOW),
    "32x8, paper, follow": ("32x8", 1, 4, "paper", FOLLOW),
    "32x8, joint, follow, nodes": ("32x8", 2, 2, "joint", FOLLOW),
    # tiny: copies that tokens are dispatched to; of the least, the objective itself is polished
    "2x4, joint, visits, copies": ("2x4", 1, 2, "joint", {**CAPPED, "slots_per_device": 3}),
    "2x4, joint, balance, copies": ("2x4", 1, 2, "joint", {**BALANCE, "slots_per_device": 3}),
    "3x12, joint, time, copies, nearest": (
        *("3x12", 2, 2, "joint"),
        {"slots_per_device": 4, "split": "nearest"},
    ),
    # pairs alone, which tell visits nearly as well
    "3x12, joint, time, nodes, without sets": ("3x12", 2, 2, "joint", {"sets": False}),
    "3x12, joint, crossing, copies": ("3x12", 1, 4, "joint", {**FOLLOW, "slots_per_device": 4}),
    "3x12, joint, balance, budget of slots": (
        *("3x12", 1, 4, "joint"),
        {**BALANCE, "extra_slots": 6, "arrival": "mixed"},
    ),
    "3x12, exflow, follow": ("3x12", 1, 4, "exflow", FOLLOW),
    # small: every objective, regime and rule
    "8x16, joint, time, full slots": (
        *("8x16", 1, 4, "joint"),
        {"slots_per_device": 6, "fill_slots": True, "iterations": 500},
    ),
    "8x16, joint, visits, nodes": ("8x16", 2, 2, "joint", CAPPED),
    "8x16, joint, visits, copies, nearest": (
        *("8x16", 1, 4, "joint"),
        {**CAPPED, "slots_per_device": 5, "split": "nearest"},
    ),
    "8x16, joint, balance, risk": ("8x16", 1, 4, "joint", {**BALANCE, "risk": 0.8}),
    "8x16, joint, balance, minimax": ("8x16", 1, 4, "joint", {**BALANCE, "groups": "minimax"}),
    "8x16, joint, crossing, pins": (
        *("8x16", 1, 4, "joint"),
        {**FOLLOW, "pinned": [(None, 0, 3)], "forbidden": [(0, 5, 0)]},
    ),
    "8x16, joint, tight cap": (
        *("8x16", 1, 4, "joint"),
        {"objective": "traffic", "max_imbalance": 1.005, "regime": "follow"},
    ),
    "8x16, moves, balance": (
        *("8x16", 1, 4, "joint"),
        {**BALANCE, "initial": "contiguous", "budget": 0.1},
    ),
    "8x16, moves, time, price": (
        *("8x16", 1, 4, "joint"),
        {"initial": "contiguous", "price": 0.01},
    ),
    "8x16, moves, crossing": (
        *("8x16", 1, 4, "joint"),
        {**FOLLOW, "initial": "contiguous", "budget": 0.2},
    ),
    "8x16, heuristic, visits": ("8x16", 1, 4, "heuristic", CAPPED),
    # fewer tokens than two windows of prefill have
    "bundled 6,000, joint, time": ("bundled 6,000", 1, 4, "joint", {}),
    # baselines at a common size
    **{
        f"24x32, {method}, balance": ("24x32", 1, 8, method, BALANCE)
        for method in ("contiguous", "round_robin", "random", "lpt", "eplb", "quick")
    },
    "24x32, eplb, copies": ("24x32", 1, 8, "eplb", {**BALANCE, "slots_per_device": 5}),
    # devices of two speeds, and large layers in many windows
    "8x16, joint, time, copies, speeds": (
        *("8x16", 2, 2, "joint"),
        {"slots_per_device": 5, "speeds": [1.0, 1.0, 1.1, 1.1], "iterations": 500},
    ),
    "table 12x128, joint, time, copies": (
        *("table 12x128", 1, 16, "joint"),
        {"slots_per_device": 9},
    ),
    "table 12x128, joint, balance, copies": (
        *("table 12x128", 1, 16, "joint"),
        {**BALANCE, "slots_per_device": 9},
    ),
}
SLOW: dict[str, Row] = {
    # large: what plugins and limits take
    "58x256, quick, copies": (
        *("58x256", 1, 32, "quick"),
        {**BALANCE, "slots_per_device": 9, "sets": False},
    ),
    "58x256, eplb, copies": (
        *("58x256", 1, 32, "eplb"),
        {**BALANCE, "slots_per_device": 9, "sets": False},
    ),
    "8x16, joint, time": ("8x16", 1, 4, "joint", {}),
    "8x16, joint, time, follow": ("8x16", 1, 4, "joint", {"regime": "follow"}),
    # at thorough effort
    "8x16, joint, balance, copies, thorough": (
        *("8x16", 1, 4, "joint"),
        {**BALANCE, "slots_per_device": 5, "effort": "thorough"},
    ),
    "8x16, joint, crossing, copies, thorough": (
        *("8x16", 1, 4, "joint"),
        {**FOLLOW, "slots_per_device": 5, "effort": "thorough"},
    ),
    "8x16, joint, visits, copies, thorough": (
        *("8x16", 1, 4, "joint"),
        {**CAPPED, "slots_per_device": 5, "effort": "thorough"},
    ),
    "32x8, joint, time, copies": ("32x8", 1, 4, "joint", {"slots_per_device": 3}),
    "24x32, joint, crossing": ("24x32", 1, 8, "joint", FOLLOW),
    "24x32, joint, crossing, nodes": ("24x32", 2, 4, "joint", FOLLOW),
    "24x32, joint, visits": ("24x32", 1, 8, "joint", CAPPED),
    "24x32, joint, time": ("24x32", 1, 8, "joint", {}),
    "24x32, joint, time, copies": ("24x32", 2, 4, "joint", {"slots_per_device": 5}),
    "24x32, joint, time, nodes, without sets": ("24x32", 2, 4, "joint", {"sets": False}),
    "24x32, joint, time, copies, without sets": (
        *("24x32", 2, 4, "joint"),
        {"slots_per_device": 5, "sets": False},
    ),
    "24x32, joint, balance, copies": ("24x32", 1, 8, "joint", {**BALANCE, "slots_per_device": 5}),
    "24x32, paper, crossing": ("24x32", 1, 8, "paper", FOLLOW),
    "26x64, joint, time": ("26x64", 2, 4, "joint", {}),
    "26x64, joint, time, copies": ("26x64", 2, 4, "joint", {"slots_per_device": 10}),
    "26x64, moves, time": ("26x64", 2, 4, "joint", {"initial": "contiguous", "budget": 0.1}),
    "58x256, joint, balance, copies": (
        *("58x256", 1, 32, "joint"),
        {**BALANCE, "slots_per_device": 9, "sets": False},
    ),
    "58x256, joint, time, copies": ("58x256", 1, 32, "joint", {"slots_per_device": 9}),
    "58x256, moves, balance, copies": (
        *("58x256", 1, 32, "joint"),
        {
            **BALANCE,
            "slots_per_device": 9,
            "sets": False,
            "initial": "eplb",
            "budget": 0.02,
        },
    ),
    # more than 16 windows and 64 slots of a layer
    "table 75x256, joint, time, copies": (
        *("table 75x256", 1, 32, "joint"),
        {"slots_per_device": 9},
    ),
    "table 75x256, joint, time, copies, nodes": (
        *("table 75x256", 4, 8, "joint"),
        {"slots_per_device": 10},
    ),
    "table 58x256, joint, balance, copies": (
        *("table 58x256", 1, 32, "joint"),
        {**BALANCE, "slots_per_device": 9},
    ),
    "26x64, joint, time, copies, speeds": (
        *("26x64", 2, 4, "joint"),
        {"slots_per_device": 9, "speeds": [1.0] * 4 + [1.1] * 4},
    ),
    "61x384, quick": ("61x384", 1, 64, "quick", {**BALANCE, "sets": False}),
    "61x384, joint, crossing": ("61x384", 1, 64, "joint", {**FOLLOW, "sets": False}),
    # as the quick ones, of more experts or copies, under other rules, or of few tokens
    "bundled, joint, follow": ("bundled", 1, 4, "joint", FOLLOW),
    "bundled, joint, dispatch": ("bundled", 1, 4, "joint", CAPPED),
    "32x8, exflow, follow": ("32x8", 1, 4, "exflow", FOLLOW),
    "2x4, joint, time, copies": ("2x4", 1, 2, "joint", {"slots_per_device": 3}),
    "3x12, joint, time, copies": ("3x12", 2, 2, "joint", {"slots_per_device": 4}),
    "3x12, joint, visits, copies": ("3x12", 2, 2, "joint", {**CAPPED, "slots_per_device": 4}),
    "3x12, joint, visits": ("3x12", 2, 2, "joint", CAPPED),
    "8x16, joint, visits": ("8x16", 1, 4, "joint", CAPPED),
    "8x16, joint, crossing": ("8x16", 1, 4, "joint", FOLLOW),
    "8x16, joint, crossing, copies": ("8x16", 1, 4, "joint", {**FOLLOW, "slots_per_device": 5}),
    "8x16, joint, visits, copies": ("8x16", 1, 4, "joint", {**CAPPED, "slots_per_device": 5}),
    "8x16, joint, balance": ("8x16", 1, 4, "joint", BALANCE),
    "8x16, joint, balance, copies": ("8x16", 1, 4, "joint", {**BALANCE, "slots_per_device": 5}),
    "8x16, joint, balance, budget of slots": (
        *("8x16", 1, 4, "joint"),
        {**BALANCE, "extra_slots": 12},
    ),
    "8x16, joint, balance, mixed": ("8x16", 1, 4, "joint", {**BALANCE, "arrival": "mixed"}),
    "8x16, joint, balance, speeds": (
        *("8x16", 1, 4, "joint"),
        {**BALANCE, "speeds": [1.0, 1.0, 0.8, 0.5]},
    ),
    "bundled 20,000, joint, time": ("bundled 20,000", 1, 4, "joint", {}),
    "8x16, joint, time, nodes, without sets": ("8x16", 2, 2, "joint", {"sets": False}),
}


def list_judgements() -> Iterator[tuple[str, Case]]:
    """Yield what judges placements: on the bundled trace, and on a generated one."""
    for name, devices in (("bundled", 4), ("24x32", 8)):
        topology = mt.Topology(devices, devices_per_node=devices // 2)

        def placements(
            name: str = name, topology: mt.Topology = topology
        ) -> tuple[mt.Placement, ...]:
            problem = mt.Problem(count(name), topology, objective="balance")
            return tuple(mt.solve(problem, method).placement for method in ("contiguous", "lpt"))

        for regime in ("dispatch", "follow"):

            def evaluated(
                name: str = name, topology: mt.Topology = topology, regime: Any = regime
            ) -> Answer:
                _, unseen, window = split_traffic(name)
                placement = placements(name, topology)[1]
                return mt.evaluate(
                    placement, unseen, topology, window=window, regime=regime
                ).to_dict()

            yield f"evaluate {name}, {regime}", evaluated

        def audited(name: str = name, topology: mt.Topology = topology) -> Answer:
            _, unseen, window = split_traffic(name)
            before, after = placements(name, topology)
            return mt.audit(after, unseen, topology, baseline=before, window=window).to_dict()

        yield f"audit {name}", audited

        def compared(name: str = name, topology: mt.Topology = topology) -> Answer:
            _, unseen, window = split_traffic(name)
            pair = [
                mt.evaluate(placement, unseen, topology, window=window)
                for placement in placements(name, topology)
            ]
            result = mt.verdict(*pair)
            return {
                "answer": result.answer,
                "gain": result.gain,
                "low": result.low,
                "high": result.high,
            }

        yield f"verdict {name}", compared

        def advised(name: str = name, topology: mt.Topology = topology) -> Answer:
            trace, _, window = split_traffic(name)
            return mt.advise(
                trace, topology, copies=(0, 1), window=window, splits=2, iterations=200
            ).to_dict()

        yield f"advise {name}", advised


def list_decisions() -> Iterator[tuple[str, Case]]:
    """Yield decisions of the plugins' policy: from nothing, from what runs, and in windows."""
    shape = (58, 256, 288, 32)

    def loads(seed: int, windows: int = 1) -> Any:
        layers, experts = shape[:2]
        rng = np.random.default_rng(seed)
        popular = rng.lognormal(0, 0.8, (layers, experts))
        drift = rng.lognormal(0, 0.2, (windows, layers, experts))
        share = popular * drift
        return np.floor(1e6 * share / share.sum(axis=2, keepdims=True))

    def answer(slots: Any, old: Any, load: Any) -> Answer:
        rank = np.arange(shape[2]) // (shape[2] // shape[3])
        copies = np.stack([np.bincount(row, minlength=shape[1]) for row in slots])
        part = np.take_along_axis(load.sum(axis=0) / copies, slots, axis=1)
        ranks = np.stack([np.bincount(rank, row, shape[3]) for row in part])
        moved = None if old is None else int((slots != old).sum())
        imbalance = float((ranks.max(axis=1) / ranks.mean(axis=1)).mean())
        return {"slots": checksum(slots), "moves": moved, "objective": imbalance}

    def decide(load: Any, old: Any) -> Answer:
        return answer(rebalance_experts(load, shape[2], None, 1, shape[3], old), old, load)

    initial = np.tile(np.concatenate([np.arange(256), np.arange(32)]), (58, 1))
    yield "policy, from nothing", lambda: decide(loads(0), None)
    yield "policy, from the first map", lambda: decide(loads(0), initial)

    def drifted() -> Answer:
        old = rebalance_experts(loads(0), shape[2], None, 1, shape[3])
        return decide(loads(0, 2)[1:], old)

    yield "policy, drifted", drifted

    def after_first(load: Any) -> Answer:
        old = rebalance_experts(load[:1], shape[2], None, 1, shape[3])
        return decide(load[1:], old)

    # The next one is forecast by all windows, or by the last ones.
    yield "policy, windows of one law", lambda: after_first(loads(0, 17)[:, :8])
    yield "policy, windows that drift", lambda: after_first(drifting(8, 256, 17, 0.5, seed=0))
    yield "policy, windows", lambda: decide(loads(1, 16), initial)


def list_commands() -> Iterator[tuple[str, Case]]:
    """Yield every command with ``--json`` on the bundled trace, in a folder made for it."""
    machine = ("--devices", "4")
    rows: dict[str, tuple[str, ...]] = {
        "inspect": ("inspect", "trace", *machine),
        "solve": ("solve", "trace", *machine, "--out", "other.json"),
        "solve --for vllm": (
            *("solve", "trace", *machine, "--for", "vllm", "--slots-per-device", "9"),
            *("--method", "quick", "--objective", "balance", "--out", "other.json"),
        ),
        "solve --initial": (
            *("solve", "trace", *machine, "--initial", "placement.json"),
            *("--objective", "balance", "--move-budget", "20", "--out", "other.json"),
        ),
        "compare": (
            *("compare", "trace", *machine, "--methods", "contiguous,eplb,paper"),
            *("--splits", "2", "--regime", "follow", "--max-imbalance", "1.05"),
        ),
        "evaluate": ("evaluate", "placement.json", "trace"),
        "evaluate --by-group": ("evaluate", "placement.json", "trace", "--by-group"),
        "advise": ("advise", "trace", *machine, "--copies", "0,1"),
        "export": ("export", "placement.json", "--to", "eplb", "--out", "map.npz"),
        "convert": ("convert", "trace", "--out", "again.safetensors"),
        "verify": ("verify", "certificate.json", "trace", *machine),
        "evaluate --report": ("evaluate", "placement.json", "trace", "--report", "page.html"),
    }
    for name, words in rows.items():
        yield f"moetuner {name}", lambda words=words: run_command(words)


@cache
def make_folder() -> Path:
    """Make the files that commands read: a trace, a placement and its certificate."""
    path = Path(tempfile.mkdtemp(prefix="scorecard-"))
    with resources.as_file(
        resources.files("moetuner") / "data" / "small-moe.safetensors"
    ) as bundled:
        (path / "trace").write_bytes(bundled.read_bytes())
    words = ("--regime", "follow", "--max-imbalance", "1.05", "--devices", "4")
    made = ("--out", path / "placement.json", "--certificate", path / "certificate.json")
    run_quietly(["solve", path / "trace", *words, *made])
    return path


def run_quietly(words: list[Any]) -> None:
    """Run a command in silence; it must succeed."""
    import contextlib
    import io

    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        failed = command_line([str(word) for word in words])
    if failed:
        raise RuntimeError(
            f"moetuner {' '.join(map(str, words))}: status {failed}: {said.getvalue()}"
        )


def run_command(words: tuple[str, ...]) -> Answer:
    """Run a command and return what its ``--json`` says."""
    files = ("trace", "placement.json", "certificate.json", "other.json", "map.npz")
    files += ("again.safetensors", "page.html")
    at = make_folder()
    named = [at / word if word in files else word for word in words]
    path = at / "out.json"
    path.unlink(missing_ok=True)
    run_quietly([*named, "--json", path])
    answer: Answer = json.loads(path.read_text().replace(str(at), "."))
    return answer


def list_cases(*, quick: bool) -> dict[str, Case]:
    """Return all cases by name, or the quick ones."""
    rows = QUICK if quick else QUICK | SLOW
    result: dict[str, Case] = {}
    for name, (traffic, nodes, per_node, method, arguments) in rows.items():
        result[name] = partial(solve_case, traffic, nodes, per_node, method, **arguments)
    result |= {name: case for name, case in list_judgements() if not (quick and "24x32" in name)}
    result |= dict(list_decisions())
    # What commands print of the bundled trace is in tests/transcripts.
    return result if quick else result | dict(list_commands())


def checksum(array: Any) -> str:
    """Return a checksum of an array's content."""
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"


def flatten(answer: Any, at: str = "") -> Answer:
    """Write nested fields side by side, by dotted names; floats shortened, long lists summed up."""
    if isinstance(answer, np.ndarray | np.generic | tuple):
        answer = answer.tolist() if isinstance(answer, np.ndarray | np.generic) else list(answer)
    if isinstance(answer, dict):
        parts = [(str(name), part) for name, part in answer.items() if name not in UNSTABLE]
    elif isinstance(answer, list):
        parts = [(str(number), part) for number, part in enumerate(answer)]
    elif isinstance(answer, float):
        return {at: float(f"{answer:.{DIGITS}g}")}
    else:
        return {at: answer}
    fields: Answer = {}
    for name, part in parts:
        fields |= flatten(part, f"{at}.{name}" if at else name)
    if (isinstance(answer, list) and len(fields) > LISTED) or not parts:
        return {at: f"{len(answer)} entries, {zlib.crc32(json.dumps(fields).encode()):08x}"}
    return fields


def find_differences(before: Answer, after: Answer) -> list[tuple[str, Any, Any, str]]:
    """Return fields that differ: name, stored, now, and what that means."""
    rows = []
    for field in sorted(before.keys() | after.keys()):
        old, new = before.get(field, "-"), after.get(field, "-")
        if old == new:
            continue
        meaning = ""
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in (old, new)):
            change = new / old - 1 if old else float("inf")
            meaning = f"{100 * change:+.3f} %"
            if (field in ("objective", "excess") and new > old) or (field == "bound" and new < old):
                meaning += " worse"
        rows.append((field, old, new, meaning))
    return rows


def main() -> int:
    """Run cases, print what differs, and store what came out if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="the cases that tests run")
    parser.add_argument("--write", action="store_true", help="store what comes out")
    options = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    chosen = {
        name: case
        for name, case in list_cases(quick=options.quick).items()
        if not options.names or any(part in name for part in options.names)
    }
    changed, begin = 0, time.perf_counter()
    for name, case in chosen.items():
        since = time.perf_counter()
        after = flatten(case())
        rows = find_differences(stored.get(name, {}), after)
        changed += bool(rows)
        took = time.perf_counter() - since
        print(
            f"{name:44} {took:6.1f} s  {'as stored' if not rows else f'{len(rows)} differ'}",
            flush=True,
        )
        if name in stored:
            for field, old, new, meaning in rows:
                print(f"    {field:40} {old!s:>24.24} {new!s:>24.24}  {meaning}")
        stored[name] = after
    if options.write:
        names = list_cases(quick=False)
        present = {name: stored[name] for name in names if name in stored}
        STORED.write_text(json.dumps(present, indent=1, sort_keys=True) + "\n")
    print(f"{len(chosen)} cases, {changed} differ, {time.perf_counter() - begin:.0f} s")
    return int(changed > 0 and not options.write)


if __name__ == "__main__":
    sys.exit(main())
