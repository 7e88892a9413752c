"""What callers get wrong: one line that names the argument, whatever the value."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import random_ids

import moetuner as mt
from moetuner import router_groups
from moetuner._checks import one_of
from moetuner.evaluation.rows import dispatch_rows
from moetuner.evaluation.units import hold_out
from moetuner.files import jsonl
from moetuner.files.contents import TraceContents
from moetuner.formats import eplb
from moetuner.report.structure import structure

NAN, INF = float("nan"), float("inf")
HUGE = 10**400

# No number at all, whatever it is for.
NO_NUMBER = (True, "4", b"4", [4], {}, 1j, object(), NAN, np.bool_(True), np.float64("nan"))
NO_INTEGER = (*NO_NUMBER, 4.5, 4.0, INF, np.float64(4.0), HUGE, 10**20)
COUNT = (*NO_INTEGER, -1, 0, np.int64(-1))
INDEX = (*NO_INTEGER, -1, np.int8(-1))
POSITIVE = (*NO_NUMBER, 0, -1, -INF, 1e-300)
AT_LEAST_0 = (*NO_NUMBER, -1, -1e-300, -INF)
FINITE = (INF, HUGE, 1e300)
CHOICE = ("nonsense", "", b"even", 3, NAN, ["even"], {}, object())
NO_TABLE = ("abc", {}, object(), [[1, 2], [3]], [["a", "b"]], 5, 1j, [[[None]]], [[[1j]]], {1, 2})
SHAPES = (np.zeros(0), np.zeros((0, 0, 0)), np.zeros((1, 1, 1, 1)), np.zeros((2, 2, 2), bool))
FLAG = ("yes", 2, None, NAN, [], np.ones(2))
NO_TEXT = (3, b"name", ["name"], NAN, True)


class Call(NamedTuple):
    """Something public, arguments that are right, and values of each that are not."""

    call: Callable[..., Any]
    right: dict[str, Any]
    wrong: dict[str, tuple[Any, ...]]


@cache
def trace() -> mt.RoutingTrace:
    """Make a small trace."""
    ids = random_ids(60, 2, 2, 4)
    return mt.RoutingTrace.from_arrays(
        ids, num_experts=4, sequence=np.arange(60) // 10, group=np.arange(60) // 10 % 2
    )


@cache
def statistics() -> mt.RoutingStatistics:
    """Count it."""
    return mt.RoutingStatistics.from_trace(trace(), window=10, by_group=True)


@cache
def problem() -> mt.Problem:
    """Make a problem of it."""
    return mt.Problem(statistics(), mt.Topology(2))


@cache
def placement() -> mt.Placement:
    """Place it."""
    return mt.Placement.from_assignment([[0, 0, 1, 1]] * 2, 2)


@cache
def evaluation() -> mt.Evaluation:
    """Replay it."""
    return mt.evaluate(placement(), trace())


def no(*kinds: type) -> tuple[Any, ...]:
    """Give objects of the package, and others, that are none of these kinds."""
    others = (
        trace(),
        statistics(),
        problem(),
        placement(),
        mt.Topology(2),
        mt.CostModel.preset("h100"),
    )
    plain = ("h100", 3, {}, [], NAN, object(), True, mt.Topology)
    return (*(each for each in others if not isinstance(each, kinds)), *plain)


def calls() -> dict[str, Call]:
    """List what is public."""
    ids = random_ids(12, 2, 2, 4)
    load = np.ones((3, 2, 4), dtype=np.int64)
    traffics = no(mt.RoutingTrace, mt.RoutingStatistics)
    sizes = (3, "4x4", (4,), (4, -1), (4.0, 4), (True, 4), (1, 2, 3), {4, 5}, (NAN, 4), (HUGE, 1))
    threads = {"threads": tuple(each for each in COUNT)}
    replay = {
        "placement": no(mt.Placement),
        "traffic": traffics,
        "topology": no(mt.Topology),
        "window": COUNT,
        "cost_model": no(mt.CostModel),
        "regime": CHOICE,
        **threads,
    }
    rules = (
        3,
        "abc",
        [(0, 0)],
        [("a", 0, 0)],
        [(0, 9, 0)],
        [(0, 0, -1)],
        [(9, 0, 0)],
        [(True, 0, 0)],
        [(0, 1.0, 0)],
        [(0, True, 0)],
        [None],
        [3],
        object(),
    )
    solving = {
        "seed": INDEX,
        "time_limit": AT_LEAST_0,
        "iterations": INDEX,
        **threads,
        "progress": (3, "yes", [], object()),
    }
    slots = (
        *COUNT,
        [2],
        [2, 2, 2],
        [2, -1],
        [2, 2.5],
        [2, NAN],
        [0, 0],
        ["2", "2"],
        [True, True],
        [[2, 2]],
        {2, 3},
        (1 << 40),
        [2, HUGE],
    )
    speeds = (
        3,
        "ab",
        [1],
        [1, 0],
        [1, -1],
        [1, NAN],
        [1, INF],
        ["1", "1"],
        [True, True],
        [[1, 1]],
        [1, None],
        [1, HUGE],
        {1, 2},
    )
    tokens = (
        3,
        ["a"] * 12,
        np.zeros(12),
        np.zeros(11, int),
        np.zeros((12, 1), int),
        [None] * 12,
        np.zeros(12, bool),
        {},
        [[1, 2], [3]],
    )
    names = ("ab", b"ab", 3, ["a", "a"], [1, 2], [None], NAN)
    counts = (
        *NO_TABLE,
        *SHAPES,
        -load,
        load * 0.5,
        load * NAN,
        load * INF,
        load * (1 << 61),
        load * 1e18,
        load * 1e300,
        load == 1,
        load.astype(str),
        load.astype(complex),
        np.full((3, 2, 4), HUGE),
    )
    pairs = (
        *NO_TABLE,
        *SHAPES,
        np.zeros((3, 4, 4)),
        -np.ones((2, 4, 4)),
        np.full((2, 4, 4), NAN),
        np.full((1, 4, 4), -1),
        np.full((1, 4, 4), 0.5),
        np.full((1, 4, 4), 1e300),
    )
    labels = {
        "sequence": (*tokens, np.full(12, 1 << 31), np.full(12, -(1 << 40))),
        "group": (*tokens, np.full(12, -1), np.full(12, 1 << 15)),
        "group_names": names,
        "model": NO_TEXT,
        "expert_size": sizes,
    }
    of_counts = {
        "window": COUNT,
        "group": (3, [0, 1], [0, 1, 9], [0, 1, -1], ["a"] * 3, [0.0] * 3, [[0, 0, 0]]),
        "group_names": names,
        "model": NO_TEXT,
        "expert_size": sizes,
    }
    bandwidth, latency = POSITIVE + FINITE, AT_LEAST_0 + FINITE
    per_node = (*COUNT, 3, 8)
    shares = (True, "0.5", [0.5], NAN, 1.0, 1.5, -0.1, 1j, object(), INF)
    return {
        "RoutingTrace.from_arrays": Call(
            mt.RoutingTrace.from_arrays,
            {"expert_ids": ids, "num_experts": 4, "group_names": ["a"], "group": np.zeros(12, int)},
            {
                "expert_ids": (
                    *NO_TABLE,
                    *SHAPES,
                    ids * 1.0,
                    ids.astype(str),
                    ids + 200,
                    ids[0],
                    None,
                    ids.astype(int) - 5,
                    np.zeros_like(ids),
                    ids.astype(complex),
                    np.datetime64("NaT"),
                ),
                "num_experts": (*COUNT, None, 1 << 17),
                **labels,
            },
        ),
        "RoutingTrace": Call(
            mt.RoutingTrace,
            {"ids": trace().ids, "num_experts": 4},
            {"ids": (ids, None, [], "abc", 3), "num_experts": (*COUNT, None)},
        ),
        "RoutingTrace.load": Call(
            mt.RoutingTrace.load, {"path": __file__}, {"path": (3, None, NAN, [], {}, b"abc", True)}
        ),
        "RoutingTrace.save": Call(trace().save, {"path": "x"}, {"path": (3, None, [], {}, True)}),
        "RoutingTrace.shards": Call(
            lambda **given: list(trace().shards(**given)), {}, {"max_bytes": COUNT, **threads}
        ),
        "RoutingTrace.split": Call(
            trace().split, {"share": 0.5}, {"share": (*shares, 0, None), "seed": (*INDEX, None)}
        ),
        "RoutingTrace.select": Call(
            trace().select,
            {},
            {
                "layers": (3, "ab", [9], [-1], [1.0], ["0"], [], [0, 0], [True], [NAN], [HUGE]),
                "groups": (3, "z", ["z"], [9], [-1], [1.0], [None], [True], [NAN], [HUGE], [b"0"]),
                "sequences": (3, "ab", [99], [-1], [1.0], ["0"], [None], [True], [NAN], [HUGE]),
            },
        ),
        "RoutingTrace.concat": Call(
            lambda traces: mt.RoutingTrace.concat(traces),
            {},
            {"traces": ([], [3], [None], [statistics()], 3, "ab", None)},
        ),
        "RoutingStatistics": Call(
            mt.RoutingStatistics,
            {"window_load": load, "group_names": ["a", "b"]},
            {
                "window_load": counts,
                "transitions": pairs,
                "coactivation": (*pairs, np.ones((2, 4, 4), int)),
                "sets": (3, "ab", [3], [None, None], [], {}),
                **of_counts,
            },
        ),
        "RoutingStatistics.from_load": Call(
            mt.RoutingStatistics.from_load,
            {"load": load, "group_names": ["a", "b"]},
            {"load": counts, **of_counts},
        ),
        "RoutingStatistics.from_trace": Call(
            mt.RoutingStatistics.from_trace,
            {"trace": trace()},
            {
                "trace": (*no(mt.RoutingTrace), ids, None),
                "window": COUNT,
                "transitions": FLAG,
                "coactivation": FLAG,
                "sets": FLAG,
                "by_group": FLAG,
                **threads,
            },
        ),
        "RoutingStatistics.sum": Call(
            mt.RoutingStatistics.sum, {}, {"parts": ([], [3], [trace()], 3, None, "ab")}
        ),
        "RoutingStatistics.load": Call(
            mt.RoutingStatistics.load, {}, {"path": (3, None, [], {}, True)}
        ),
        "Tier": Call(
            mt.Tier,
            {"devices": 2, "bandwidth": 1e9},
            {
                "devices": (*COUNT, None, 1 << 20),
                "bandwidth": (*bandwidth, None),
                "latency": (*latency, None),
            },
        ),
        "Topology": Call(
            mt.Topology,
            {"devices": 4},
            {
                "devices": (*COUNT, None, 1 << 20),
                "devices_per_node": per_node,
                "intra_node_bandwidth": bandwidth,
                "inter_node_bandwidth": bandwidth,
                "intra_node_latency": latency,
                "inter_node_latency": latency,
                "name": NO_TEXT,
                "tiers": (3, "ab", [3], [None], [mt.Tier(3, 1)], [mt.Tier(2, 1), mt.Tier(3, 1)]),
                "link_cost": (
                    *NO_TABLE,
                    *SHAPES,
                    np.ones((4, 4)),
                    -np.ones((4, 4)),
                    np.zeros((4, 4)),
                    np.full((4, 4), NAN),
                ),
                "speed": (*speeds, [1] * 5),
                "slots_per_device": tuple(each for each in slots if np.shape(each) != (2,)),
            },
        ),
        "Topology.preset": Call(
            lambda machine, **others: mt.Topology.preset(machine, **others),
            {"machine": "h100-nvl8-ib400"},
            {"nodes": (*COUNT, None, 1 << 20), "name": NO_TEXT},
        ),
        "Topology.load": Call(mt.Topology.load, {}, {"path": (3, None, [], {}, True)}),
        "CostModel": Call(
            mt.CostModel,
            {"base_us": 1, "expert_us": 1, "start_us": 1, "token_us": 1, "token_bytes": 1},
            {
                **dict.fromkeys(
                    ("base_us", "expert_us", "start_us", "token_us", "token_bytes"), latency
                ),
                "combine_bytes": latency,
                "overlap": (*latency, 1.5),
                "once_per": CHOICE,
                "name": NO_TEXT,
                "residual": latency,
            },
        ),
        "CostModel.from_hardware": Call(
            mt.CostModel.from_hardware,
            {"hidden": 8, "intermediate": 8, "flops": 1e12, "memory_bandwidth": 1e9},
            {
                **dict.fromkeys(
                    (
                        "hidden",
                        "intermediate",
                        "flops",
                        "memory_bandwidth",
                        "dtype_bytes",
                        "efficiency",
                    ),
                    bandwidth,
                ),
                "launch_us": latency,
            },
        ),
        "CostModel.fit": Call(
            lambda **given: mt.CostModel.fit(**given, token_bytes=1),
            {"tokens": [1, 2, 3, 4], "experts": [1, 1, 2, 2], "microseconds": [1, 2, 3, 4]},
            dict.fromkeys(
                ("tokens", "experts", "microseconds"),
                (
                    "abcd",
                    [1],
                    [[1, 2], [3]],
                    [NAN] * 4,
                    [-1] * 4,
                    [None] * 4,
                    3,
                    {},
                    ["a"] * 4,
                    [INF] * 4,
                ),
            ),
        ),
        "CostModel.crossing_us": Call(
            mt.CostModel.preset("h100").crossing_us,
            {"topology": mt.Topology(2), "returns": True},
            {"topology": (*no(mt.Topology), None)},
        ),
        "CostModel.load": Call(mt.CostModel.load, {}, {"path": (3, None, [], {}, True)}),
        "Problem": Call(
            mt.Problem,
            {"statistics": statistics(), "topology": mt.Topology(2)},
            {
                "statistics": (*no(mt.RoutingStatistics), None),
                "topology": (*no(mt.Topology), None),
                "slots_per_device": slots,
                "regime": (*CHOICE, None),
                "max_imbalance": (*NO_NUMBER, 0, 0.5, -1, -INF),
                "objective": CHOICE,
                "cost_model": tuple(each for each in no(mt.CostModel) if each != "h100"),
                "split": (*CHOICE, None),
                "extra_slots": (*INDEX, 1 << 40),
                "arrival": (*CHOICE, True, 1.5, -0.1, INF, None, 1j),
                "risk": (*CHOICE, True, 1.0, 1.5, -0.1, INF, None, 1j),
                "groups": (
                    3,
                    "z",
                    ["0"],
                    {"z": 1},
                    {"0": -1},
                    {"0": NAN},
                    {"0": "1"},
                    {"0": True},
                    {"0": INF},
                    {"0": 0, "1": 0},
                    {0: 1},
                    True,
                    NAN,
                    {"0": HUGE},
                ),
                "pinned": rules,
                "forbidden": rules,
                "fill_slots": FLAG,
            },
        ),
        "Objective.value": Call(
            mt.Objective(problem()).value, {}, {"placement": (*no(mt.Placement), None)}
        ),
        "Objective.traffic": Call(
            mt.Objective(problem()).traffic, {}, {"placement": (*no(mt.Placement), None)}
        ),
        "Objective.cost": Call(
            mt.Objective(problem()).cost, {}, {"placement": (*no(mt.Placement), None)}
        ),
        "Problem.violations": Call(
            problem().violations, {}, {"placement": (*no(mt.Placement), None)}
        ),
        "solve": Call(
            mt.solve,
            {"problem": problem(), "method": "heuristic", "iterations": 10},
            {
                "problem": (*no(mt.Problem), None),
                "method": (*CHOICE, None),
                **solving,
                "gap": (*AT_LEAST_0, *FINITE),
                "initial": no(mt.Placement),
            },
        ),
        "solve from a placement": Call(
            mt.solve,
            {
                "problem": problem(),
                "method": "heuristic",
                "iterations": 10,
                "initial": placement(),
            },
            {
                "move_budget": AT_LEAST_0,
                "move_cost": (*AT_LEAST_0, *FINITE, None),
                "expert_bytes": (*AT_LEAST_0, *FINITE, None),
            },
        ),
        "pareto": Call(
            mt.pareto,
            {"problem": problem(), "initial": placement(), "iterations": 10},
            {
                "problem": (*no(mt.Problem), None),
                "initial": (*no(mt.Placement), None),
                "expert_bytes": (*POSITIVE, *FINITE, None),
                "method": (*CHOICE, "eplb", None),
                **solving,
            },
        ),
        "balance": Call(
            mt.balance,
            {"load": load, "devices": 2, "slots_per_device": 2},
            {
                "load": (
                    *NO_TABLE,
                    *SHAPES[:3],
                    -load,
                    load * NAN,
                    load * INF,
                    load == 1,
                    load.astype(str),
                    load.astype(complex),
                    None,
                ),
                "devices": (*COUNT, None, 1 << 20),
                "slots_per_device": (*slots, None),
                "speed": speeds[1:],
            },
        ),
        "evaluate": Call(
            mt.evaluate,
            {"placement": placement(), "traffic": trace()},
            {
                **replay,
                "split": (*CHOICE, None),
                "home": ("nonsense", 3, [0], [0.0] * 60, [9] * 60, [-1] * 60, ["a"] * 60, {}),
                "mixed": FLAG,
            },
        ),
        "audit": Call(
            mt.audit,
            {"placement": placement(), "traffic": trace(), "resamples": 10},
            {
                **replay,
                "window": (*COUNT, None),
                "baseline": no(mt.Placement),
                "resamples": (*COUNT, None, 1 << 40),
                "seed": (*INDEX, None),
            },
        ),
        "Audit.worse": Call(
            mt.audit(placement(), trace(), resamples=10).worse,
            {},
            {"than": (*NO_NUMBER, INF, None), "measures": ("fanout", ["nonsense"], 3, [3])},
        ),
        "verdict": Call(
            mt.verdict,
            {"before": evaluation(), "after": evaluation()},
            {
                "before": (*no(mt.Evaluation), None),
                "after": (*no(mt.Evaluation), None),
                "price": (*AT_LEAST_0, *FINITE, None),
            },
        ),
        "Placement": Call(
            mt.Placement,
            {"slots": [[[0, 1], [2, 3]]]},
            {
                "slots": (
                    *NO_TABLE,
                    *SHAPES,
                    [[[0, 0], [1, 2]]],
                    [[[0, 5]]],
                    [[[-2, 0]]],
                    None,
                    np.array([[[1 << 40]]]),
                    np.array([[[1 << 63]]], np.uint64),
                ),
                "num_experts": (*INDEX, None, 5, 1 << 40),
                "model": NO_TEXT,
                "topology": NO_TEXT,
                "fingerprint": NO_TEXT,
                "bound_scope": NO_TEXT,
                "objective": (*NO_NUMBER, INF),
                "bound": (*NO_NUMBER, INF),
            },
        ),
        "Placement.from_assignment": Call(
            mt.Placement.from_assignment,
            {"device_of": [[0, 1]], "devices": 2},
            {
                "device_of": (*NO_TABLE, *SHAPES, [[0, 2]], [[0, -1]], [[0.0, 1.0]], [0, 1], None),
                "devices": (*COUNT, None, 1 << 40),
                "slots_per_device": (*COUNT, 1 << 40),
                "model": NO_TEXT,
            },
        ),
        "Placement.with_names": Call(
            placement().with_names,
            {},
            {"model": NO_TEXT, "bound": (*NO_NUMBER, INF), "slots": (3,)},
        ),
        "Placement.filled": Call(
            mt.Placement([[[0, 1, -1], [0, 2, 3]]]).filled,
            {},
            {"load": (*NO_TABLE, *SHAPES, [[1, 2, NAN, 4]], [[1, 2, 3]], [["a"] * 4])},
        ),
        "Placement.load": Call(mt.Placement.load, {}, {"path": (3, None, [], {}, True)}),
        "Placement.diff": Call(
            placement().diff,
            {"other": placement()},
            {
                "other": (*no(mt.Placement), None, mt.Placement([[[0]]])),
                "expert_bytes": (*AT_LEAST_0, INF),
                "topology": (*no(mt.Topology), mt.Topology(3)),
            },
        ),
        "dispatch_rows": Call(
            dispatch_rows,
            {"placement": placement(), "trace": trace()},
            {
                "placement": (*no(mt.Placement), None),
                "trace": (*no(mt.RoutingTrace), None),
                "home": ("nonsense", 3, [0], [0.0] * 60, [9] * 60, [-1] * 60, ["a"] * 60, {}, None),
                "split": (*CHOICE, None, "round_robin"),
                "devices_per_node": (*COUNT, 3),
                "position": (3, "ab", [0], [0.0] * 60, ["a"] * 60, {}),
            },
        ),
        "router_groups.merged": Call(
            router_groups.merged,
            {"statistics": statistics(), "groups": 2},
            {"statistics": (*no(mt.RoutingStatistics), None), "groups": (*COUNT, 3, None)},
        ),
        "router_groups.expanded": Call(
            router_groups.expanded,
            {"placement": placement(), "experts": 8},
            {"placement": (*no(mt.Placement), None), "experts": (*COUNT, 3, None)},
        ),
        "router_groups.forbidden": Call(
            router_groups.forbidden,
            {"experts": 8, "groups": 2, "devices": 4},
            {
                "experts": (*COUNT, 3, None),
                "groups": (*COUNT, 3, None),
                "devices": (*COUNT, 3, None),
            },
        ),
        "structure": Call(
            structure,
            {"traffic": trace()},
            {
                "traffic": (*traffics, None),
                "devices": (*COUNT, None, 1 << 20),
                "max_imbalance": (*NO_NUMBER, 0, 0.5, -1),
                "seed": (*INDEX, None),
                **threads,
            },
        ),
        "hold_out": Call(
            hold_out,
            {"traffic": trace(), "share": 0.5},
            {"traffic": (*traffics, None), "share": (*shares, None), "seed": (*INDEX, None)},
        ),
        "eplb_maps": Call(eplb.eplb_maps, {}, {"placement": (*no(mt.Placement), None)}),
        "jsonl.write": Call(
            jsonl.write,
            {"trace": trace().contents, "path": "/nonexistent/x"},
            {"trace": (*no(TraceContents), None), "per": (*CHOICE, None)},
        ),
    }


# What names something else than the argument, for a reason.
SAID_OTHERWISE = {
    "share": "share|holdout",
    "window_load": "load",
    "cost_model": "cost_model|preset",
    "machine": "preset",
    "ids": "ids",
}


def complaint(call: Callable[..., Any], given: dict[str, Any], name: str) -> str | None:
    """Say what is wrong with how a call answers a wrong argument; None if nothing."""
    words = SAID_OTHERWISE.get(name, name).split("|")
    try:
        found = call(**given)
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        if isinstance(error, UnicodeError) or not any(word in text for word in words):
            return f"{type(error).__name__} does not name it: {text!r:.150}"
        if "\n" in text or len(text) > 300:
            return f"{type(error).__name__} is long: {text!r:.300}"
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error!r:.150}"
    return f"accepted: {type(found).__name__}"


CALLS = calls()


@pytest.mark.parametrize(
    ("of", "name"), [(of, name) for of, each in CALLS.items() for name in each.wrong]
)
def test_a_wrong_argument_is_named_in_one_line(of, name):
    """Whatever is wrong with it: a ValueError or TypeError that names it."""
    call, right, wrong = CALLS[of]
    found = []
    for value in wrong[name]:
        said = complaint(call, {**right, name: value}, name)
        if said is not None:
            found.append(f"{value!r:.60} -> {said}")
    assert not found, "\n".join(found)


def test_a_choice_is_a_string_of_those_there_are():
    """Also where the choices come one by one, and what is compared does not say yes or no."""
    one_of("way", "b", iter("abc"))
    for value in (np.array(["a"]), ["a"], b"a", None, "ab", ""):
        with pytest.raises(ValueError, match="way must be one of a, b, c, got"):
            one_of("way", value, iter("abc"))
