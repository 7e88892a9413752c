"""Every public call with any wrong argument: one line that names it, and no warning.

Whatever a caller passes: the call works, or raises in one line that names the argument. What
``WRONG`` has for an argument is refused, and so is None unless it is the default.
"""

import inspect
import random
import warnings
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from make import random_ids

import moetuner as mt
from moetuner import router_groups
from moetuner.formats import eplb

IDS = random_ids(12, 1, 2, 4)
TRACE = mt.RoutingTrace.from_arrays(
    IDS, num_experts=4, sequence=np.arange(12) // 3, group=np.arange(12) // 6
)
LONG = mt.RoutingTrace.from_arrays(np.tile(IDS, (8, 1, 1)), num_experts=4, sequence=np.arange(96))
STATISTICS = mt.RoutingStatistics.from_trace(TRACE, window=3, by_group=True)
TOPOLOGY = mt.Topology(2)
NAN, INF, HUGE = float("nan"), float("inf"), 10**400
PROBLEM = mt.Problem(STATISTICS, TOPOLOGY, regime="follow", objective="traffic", max_imbalance=1.5)
PLACEMENT = mt.Placement.from_assignment([[0, 0, 1, 1]], 2)
EVALUATION = mt.evaluate(PLACEMENT, TRACE)
RESULT = mt.solve(PROBLEM, iterations=10)
CERTIFICATE = RESULT.certificate
SETS = mt.ExpertSets(np.array([[0, 1]]), np.array([1]))
LOAD = np.ones((2, 1, 4), int)
MODEL = mt.CostModel.preset("h100")
INSTANCES = (
    TRACE, STATISTICS, SETS, TOPOLOGY, mt.Tier(2, 1e9), MODEL, PLACEMENT,
    PLACEMENT.diff(PLACEMENT), EVALUATION, mt.verdict(EVALUATION, EVALUATION),
    mt.audit(PLACEMENT, TRACE, window=3), PROBLEM, PROBLEM.objective_function, RESULT,
    CERTIFICATE, mt.Serving(TOPOLOGY),
)  # fmt: skip
# What is right, by the name of a parameter, and where a call means something else by it.
RIGHT = {
    "trace": TRACE, "traffic": TRACE, "placement": PLACEMENT, "problem": PROBLEM,
    "statistics": STATISTICS, "topology": TOPOLOGY, "before": EVALUATION, "after": EVALUATION,
    "expert_ids": IDS, "num_experts": 4, "ids": TRACE.ids, "window_load": LOAD, "load": LOAD,
    "devices": 2, "bandwidth": 1e9, "slots": [[[0, 1], [2, 3]]], "device_of": [[0, 1]],
    "slots_per_device": 2, "initial": PLACEMENT, "expert_bytes": 1, "engine": "vllm",
    "share": 0.5, "parts": [STATISTICS], "base_us": 1, "expert_us": 1, "start_us": 1,
    "token_us": 1, "token_bytes": 1, "hidden": 8, "intermediate": 8, "flops": 1e12,
    "memory_bandwidth": 1e9, "gpu": "h100", "machine": "h100-nvl8-ib400", "other": PLACEMENT,
    "certificate": CERTIFICATE, "returns": True, "iterations": 1,
    "home": np.zeros(12, int), "ports": np.ones((2, 1)), "compute": np.ones((2, 2)),
    "communication": np.ones(2), "value": 1.0, "experts": 4, "tokens": np.ones((2, 2)),
    "to": "json", "settings": {}, "serving": mt.Serving(TOPOLOGY),
    "results": (EVALUATION, EVALUATION), "running": PLACEMENT, "lost": (), "rows": [1, 0],
}  # fmt: skip
BY_CALL = {
    "Serving.chosen": {"name": "split"},
    **{
        f"RoutingStatistics.{of}": {"tokens": by}
        for of, by in (("per_step", 5), ("joined", 6), ("runs", 6))
    },
    **{f"{of}.rows_in": {"window": 3} for of in ("RoutingTrace", "RoutingStatistics")},
    "drift": {"profile": LONG, "traffic": LONG},
    "ExpertSets": {"ids": SETS.ids, "counts": SETS.counts},
    "CostModel.fit": {
        "tokens": [1, 2, 3, 4, 500, 600, 700, 800, 900, 950],
        "experts": [1, 2, 3, 4, 1, 2, 1, 2, 1, 2],
        "microseconds": [20, 40, 60, 80, 500, 600, 700, 800, 900, 950],
        "others": None,
    },
}
# What is to be read; elsewhere a trace.
FILES = {
    "Topology.load": '{"devices": 2}', "RoutingStatistics.load": STATISTICS,
    "Placement.load": PLACEMENT, "Placement.save": PLACEMENT, "read_placement": PLACEMENT,
    "write_placement": PLACEMENT,
    "CostModel.load": MODEL, "CostModel.save": MODEL, "Certificate.load": CERTIFICATE,
}  # fmt: skip
# Values of their own classes are not made by users, and check nothing.
VALUES = {"PlacementDiff", "Evaluation", "Judgement", "Comparison", "Result", "Progress", "Trade",
          "Advice", "Drift", "Certificate", "Objective", "Plan"}  # fmt: skip
# Methods of problems and objectives that only the solver calls.
INNER = {
    f"Objective.{of}"
    for of in ("window_cost", "imbalances", "layers_traffic", "layer_costs", "compute_values")
}
INNER |= {
    "Problem.core_rules",
    "Problem.layers_that_keep_rules",
    "Objective.over",
    "Problem.objective_in",
    "CostModel.least_compute_us",
    "Objective.layer_factors",
}
OTHER_WORDS = {"window_load": "load", "gpu": "preset", "machine": "preset"}
OTHER_WORDS["share"] = "share|holdout"

# No number at all, whatever it is for; no count, no index and so on.
NO_NUMBER = (True, "4", b"4", [4], {}, 1j, object(), NAN, np.bool_(True), np.float64("nan"))
INDEX = (*NO_NUMBER, 4.5, 4.0, INF, np.float64(4.0), HUGE, 10**20, -1, np.int8(-1))
COUNT = (*INDEX, 0)
POSITIVE = (*NO_NUMBER, 0, -1, -INF, 1e-300, INF, HUGE, 1e300)
AT_LEAST_0 = (*NO_NUMBER, -1, -1e-300, -INF)
AMOUNT = (*AT_LEAST_0, INF, HUGE, 1e300)
SHARE = (True, "0.5", [0.5], NAN, 1.5, -0.1, 1j, object(), INF)
CHOICE = ("nonsense", "", b"even", 3, NAN, ["even"], {}, object())
FLAG = ("yes", 2, NAN, [], np.ones(2))
NO_TEXT = (3, b"name", ["name"], NAN, True)
NO_TABLE = ("abc", {}, object(), [[1, 2], [3]], [["a", "b"]], 5, 1j, [[[None]]], [[[1j]]], {1, 2})
SHAPES = (np.zeros(0), np.zeros((0, 0, 0)), np.zeros((1, 1, 1, 1)), np.zeros((2, 2, 2), bool))
CALLABLE = (3, "yes", [], object())
PATH = (3, NAN, [], {}, b"abc", True)
SLOTS = (*COUNT, [2, 2, 2], [2, -1], [2, 2.5], [2, NAN], [0, 0], ["2", "2"], [True, True], [[2, 2]],
         {2, 3}, 1 << 40, [2, HUGE])  # fmt: skip
SPEED = (3, "ab", [1, 0], [1, -1], [1, NAN], [1, INF], ["1", "1"], [True, True], [[1, 1]],
         [1, None], [1, HUGE], {1, 2}, [1] * 5)  # fmt: skip
TOKENS = (3, ["a"] * 12, np.zeros(12), np.zeros(11, int), np.zeros((12, 1), int), [None] * 12,
          np.zeros(12, bool), {}, [[1, 2], [3]])  # fmt: skip
RULES = (3, "abc", [(0, 0)], [("a", 0, 0)], [(0, 9, 0)], [(0, 0, -1)], [(9, 0, 0)],
         [(True, 0, 0)], [(0, 1.0, 0)], [(0, True, 0)], [None], [3], object())  # fmt: skip
COUNTS = (*NO_TABLE, *SHAPES[:3], *(LOAD * by for by in (-1, NAN, INF)), LOAD == 1, LOAD * 1j,
          LOAD.astype(str), np.full(LOAD.shape, HUGE), LOAD * 1e300)  # fmt: skip
PAIRS = (*NO_TABLE, *SHAPES, np.zeros((3, 4, 4)), -np.ones((2, 4, 4)), np.full((2, 4, 4), NAN),
         np.full((1, 4, 4), 0.5), np.full((1, 4, 4), 1e300))  # fmt: skip
OBJECTS = (TRACE, STATISTICS, PROBLEM, PLACEMENT, TOPOLOGY, MODEL, "h100", 3, {}, [], NAN, object(),
           True, mt.Topology)  # fmt: skip


def others(*kinds):
    """Give objects, of the package and not, that are of none of these kinds."""
    return tuple(item for item in OBJECTS if not isinstance(item, kinds))


# What is refused, by the name of the parameter, or of the call and the parameter.
WRONG = {
    **dict.fromkeys(("problem", "PlacementDiff.problem"), others(mt.Problem)),
    **dict.fromkeys(("placement", "initial", "baseline", "other", "plan.running",
                     "plan_losses.running"), others(mt.Placement)),
    **dict.fromkeys(("lost", "without", "retire"),
                    (3, "ab", [9], [-1], [1.0], ["0"], [None], [True], [HUGE])),
    **dict.fromkeys(("fewer", "join"), INDEX), "domain": CHOICE, "more_copies": INDEX,
    **dict.fromkeys(("before", "after"), others()), "names": ("ab", 3, ["a"], [1, 2]),
    **dict.fromkeys(("Placement.plot.before", "Result.plot.before"), others(mt.Placement)),
    "results": (*others(), [EVALUATION], (EVALUATION, PLACEMENT), (None, None),
                [*EVALUATION.by_group.values()]),
    "serving": others(mt.Serving),
    "statistics": others(mt.RoutingStatistics), "trace": others(mt.RoutingTrace),
    "traffic": others(mt.RoutingTrace, mt.RoutingStatistics),
    "profile": others(mt.RoutingTrace, mt.RoutingStatistics),
    "topology": others(mt.Topology), "cost_model": others(mt.CostModel),
    "certificate": others(mt.Certificate),
    **dict.fromkeys(("threads", "window", "num_experts", "devices", "nodes", "max_bytes",
                     "experts", "devices_per_node"), COUNT),
    **dict.fromkeys(("seed", "iterations", "mixed_seed", "extra_slots"), INDEX),
    **dict.fromkeys(("bandwidth", "intra_node_bandwidth", "inter_node_bandwidth", "hidden",
                     "intermediate", "flops", "memory_bandwidth", "dtype_bytes", "efficiency",
                     "waterfill"),
                    POSITIVE),
    **dict.fromkeys(("latency", "intra_node_latency", "inter_node_latency", "base_us", "expert_us",
                     "start_us", "token_us", "token_bytes", "combine_bytes", "residual",
                     "launch_us", "gap", "cutoff", "move_cost"), AMOUNT),
    "price": SHARE, "sample": COUNT, "time": INDEX, "population": others(),
    **dict.fromkeys(("time_limit", "move_budget"), AT_LEAST_0),
    **dict.fromkeys(("regime", "split", "method", "once_per", "per", "engine",
                     "recorded_by"), CHOICE),
    **dict.fromkeys(("transitions", "coactivation", "sets", "by_group", "mixed", "fill_slots",
                     "returns"), FLAG),
    **dict.fromkeys(("model", "name", "fingerprint", "bound_scope"), NO_TEXT),
    **dict.fromkeys(("progress", "report"), CALLABLE), "path": PATH,
    "expert_bytes": (*AT_LEAST_0, INF), "share": (*SHARE, 1.0),
    "arrival": (*CHOICE, *SHARE), "risk": (*CHOICE, *SHARE, 1.0),
    **dict.fromkeys(("overlap", "exposed"), (*AMOUNT, 1.5)),
    "max_imbalance": (*NO_NUMBER, 0, 0.5, -1, -INF), "bound": (*NO_NUMBER, INF),
    "slots_per_device": SLOTS, "speed": SPEED, "pinned": RULES, "forbidden": RULES,
    "expert_ids": (*NO_TABLE, *SHAPES, IDS * 1.0, IDS.astype(str), IDS + 200, IDS[0],
                   IDS.astype(int) - 5, np.zeros_like(IDS), np.datetime64("NaT")),
    "sequence": (*TOKENS, np.full(12, 1 << 31), np.full(12, -(1 << 40))),
    "group": (*TOKENS, np.full(12, -1), np.full(12, 1 << 15)),
    "group_names": ("ab", b"ab", 3, ["a", "a"], [1, 2], [None], NAN),
    "expert_size": (3, "4x4", (4,), (4, -1), (4.0, 4), (True, 4), (1, 2, 3), {4, 5}, (NAN, 4)),
    "window_load": COUNTS, "load": COUNTS,
    "parts": ([], [3], [TRACE], 3, "ab"),
    "layers": (3, "ab", [9], [-1], [1.0], ["0"], [], [0, 0], [True], [NAN], [HUGE]),
    "sequences": (3, "ab", [99], [-1], [1.0], ["0"], [None], [True], [NAN], [HUGE]),
    "rows": (3, "ab", [99], [-1], [1.0], ["0"], [None], [True], [NAN], [HUGE], [0, 0], [[0]]),
    "tiers": (3, "ab", [3], [None], [mt.Tier(3, 1)], [mt.Tier(2, 1), mt.Tier(3, 1)]),
    "link_cost": (*NO_TABLE, *SHAPES, np.ones((2, 2)), -np.ones((2, 2)), np.full((2, 2), NAN)),
    "home": ("nonsense", 3, [0], [0.0] * 12, [9] * 12, [-1] * 12, ["a"] * 12, {}),
    "measures": ("fanout", ["nonsense"], 3, [3]), "than": (*NO_NUMBER, INF),
    "device_of": (*NO_TABLE, *SHAPES, [[0, 2]], [[0, -1]], [[0.0, 1.0]], [0, 1]),
    "position": (3, "ab", [0], [0.0] * 12, ["a"] * 12, {}),
    **dict.fromkeys(("tokens", "microseconds"),
                    ("abcd", [1], [[1, 2], [3]], [NAN] * 10, [-1] * 10, [None] * 10, 3, {})),
    "Problem.phases": (0.5, 3, "ab", [512], True),
    "RoutingTrace.ids": (IDS, [], "abc", 3),
    "RoutingTrace.select.groups": (3, "z", ["z"], [9], [-1], [1.0], [None], [True], [HUGE], [b"0"]),
    "RoutingStatistics.transitions": PAIRS, "RoutingStatistics.coactivation": PAIRS,
    "RoutingStatistics.per_step.tokens": COUNT, "top_k": COUNT,
    "RoutingStatistics.joined.tokens": (*COUNT, 7), "RoutingStatistics.runs.tokens": (*COUNT, 7),
    "RoutingStatistics.sets": (3, "ab", [3], [None, None], [], {}),
    "RoutingStatistics.group": (3, [0, 1], [0, 9], [0, -1], ["a"] * 2, [0.0] * 2, [[0, 0]]),
    "Placement.num_experts": (*INDEX, 5, 1 << 40), "Placement.topology": NO_TEXT,
    "Placement.objective": (*NO_NUMBER, INF), "Problem.objective": CHOICE,
    **dict.fromkeys(("Problem.statistics", "Problem.served.statistics"),
                    others(mt.RoutingTrace, mt.RoutingStatistics)),
    "Placement.slots": (*NO_TABLE, *SHAPES, [[[0, 0], [1, 2]]], [[[0, 5]]], [[[-2, 0]]],
                        np.array([[[1 << 40]]]), np.array([[[1 << 63]]], np.uint64)),
    "Placement.from_assignment.slots_per_device": (*COUNT, 1 << 40),
    "Placement.filled, of some.load": (*NO_TABLE, *SHAPES, [[1, 2, NAN, 4]], [["a"] * 4]),
    "traces": ([], [3], [None], [STATISTICS], 3, "ab"),
    "Topology.slots_per_device": SLOTS, "Topology.name": NO_TEXT,
    "Problem.groups": (3, "z", ["0"], {"z": 1}, {"0": -1}, {"0": NAN}, {"0": "1"}, {"0": True},
                       {"0": INF}, {"0": 0, "1": 0}, {0: 1}, True, NAN, {"0": HUGE}),
    "CostModel.compute_us.tokens": (), "CostModel.compute_us.speed": (), "CostModel.fit.experts":
    ("abcd", [1], [NAN] * 10, [-1] * 10, 3, {}), "CostModel.layer_us.communication": (),
    "Problem.check_shape.name": (), "pareto.method": (*CHOICE, "eplb"),
    # Not looked at: the placement is full, its file says them.
    "Placement.filled.load": (), "read_placement.devices": (), "read_placement.num_experts": (),
    "balance.load": COUNTS[:-1], "advise.split": ("nonsense", 3, NAN),
}  # fmt: skip


class Sub(np.ndarray):
    """A subclass."""


def hostile():
    """Make the values, anew for each call: some of them can be used up."""
    read_only = np.arange(16.0).reshape(4, 4)[::2, ::2]
    read_only.flags.writeable = False
    return [
        None, True, float("nan"), float("inf"), -float("inf"), -1, 0, 0.5, 1.5, 1 << 63, 1 << 70,
        10**400, 1e300, "", "x" * 100_000, "a\nb", "a\0b", b"", b"abc", [], (), {}, {"a": 1},
        {1, 2}, object(), ..., range(3), iter([1, 2]), [[1, 2], [3]], [None], ["a", "b"],
        [float("nan")], [1 << 70], ["x" * 100_000], [object()], np.array(1), np.array("a"),
        np.array(None), np.array([]), np.zeros((0, 0, 0)), np.zeros((2, 2)), np.ones((2, 1, 4)),
        -np.ones((1, 4), int), np.full((2, 1, 4), np.nan), np.full((2, 1, 4), 1e300),
        np.full((1, 4), 1 << 63, np.uint64), np.full((2, 1, 4), 1 << 62),
        np.array([1, "a"], dtype=object), np.array([1 + 2j]), np.array(["2020"], "M8[D]"),
        np.datetime64("NaT"), np.timedelta64(1, "s"), read_only, np.zeros(2, "V4"),
        np.ma.masked_array([1, 2], mask=[0, 1]), np.ones((1, 4)).view(Sub), np.float16(1),
        np.bool_(True), 1j, Path("nowhere/x"), Path(), Path("/dev/null"), datetime(2020, 1, 1),
        "even", TRACE, STATISTICS, PROBLEM, PLACEMENT, MODEL,
    ]  # fmt: skip


def calls():
    """List what is public, by its name."""
    for name in mt.__all__:
        what = getattr(mt, name)
        if callable(what) and name not in VALUES:
            yield name, what
        if not inspect.isclass(what):
            continue
        of = next((item for item in INSTANCES if type(item) is what), None)
        for method, function in inspect.getmembers(what, inspect.isroutine):
            bound, own = inspect.ismethod(function), inspect.isfunction(function)
            if not method.startswith("_") and (bound or (own and of is not None)):
                yield f"{name}.{method}", function if bound else getattr(of, method)


# What is not public, or hides its arguments behind a mapping; `hostile` values are not for these.
EXTRA = {
    "router_groups.merge": lambda statistics=STATISTICS, groups=2: router_groups.merge(
        statistics, groups
    ),
    "router_groups.expand": lambda placement=PLACEMENT, experts=8: router_groups.expand(
        placement, experts
    ),
    "router_groups.forbid": lambda experts=8, groups=2, devices=4: router_groups.forbid(
        experts, groups, devices
    ),
    "eplb_maps": lambda placement=PLACEMENT: eplb.eplb_maps(placement),
    "Placement.with_names": lambda model=None, bound=None: PLACEMENT.with_names(
        model=model, bound=bound
    ),
    "RoutingTrace.concat": lambda traces=(TRACE,): mt.RoutingTrace.concat(traces),
    "Placement.filled, of some": mt.Placement([[[0, 1, -1], [0, 2, 3]]]).filled,
    "Topology.preset": lambda name=None: mt.Topology.preset("h100-nvl8-ib400", name=name),
    "RoutingStatistics.from_load": lambda group_names=("a",), model=None, window=None: (
        mt.RoutingStatistics.from_load(LOAD, group_names=group_names, model=model, window=window)
    ),
}
WRONG |= {"router_groups.merge.groups": (*COUNT, 3), "router_groups.forbid.groups": (*COUNT, 3)}
CALLS = {name: call for name, call in calls() if name not in INNER}
MOVING = {"initial": PLACEMENT}
# Slow ones get some of the values, drawn anew for each parameter.
SOME = 6
# None means something else than their defaults.
MAY_BE_NONE = ("group_names", "iterations", "window", "cost_model")


def right_of(name, parameters):
    """Return arguments that are right, and write the file that they name."""
    of = FILES.get(name, TRACE)
    as_json = isinstance(of, mt.Placement | mt.CostModel | str)
    path = Path("file.json" if as_json else "file.safetensors")
    (path.write_text if isinstance(of, str) else lambda _: of.save(path))(of)
    own = RIGHT | {"path": path} | BY_CALL.get(name, {})
    wanted = [of for of in parameters if of.default is of.empty]
    wanted += [of for of in parameters if of not in wanted and of.name == "iterations"]
    return {of.name: own[of.name] for of in wanted}


def complaint(call, given, name, *, is_wrong):
    """Say what is wrong with how a call answers; None if nothing."""
    given = dict(given)
    first = [given.pop(of) for of in ("gpu", "machine") if of in given]
    try:
        result = call(*first, **given)
        if inspect.isgenerator(result):
            list(result)
    except (ValueError, TypeError, OSError) as error:
        text, words = str(error), OTHER_WORDS.get(name, name).split("|")
        named = any(word in text for word in words)
        named |= name == "path" and repr(str(given.get("path")))[1:-1] in text
        named |= isinstance(error, OSError) and error.filename is not None
        if isinstance(error, UnicodeError) or not named:
            return f"{type(error).__name__} does not name it: {text!r:.150}"
        return f"not one short line: {text!r:.300}" if "\n" in text or len(text) > 400 else None
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.150}"
    return "accepted" if is_wrong else None


def complaints(call, arguments, parameter, values, *, is_wrong=False):
    """List what is wrong with how a call answers values of a parameter."""
    for value in values:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = {**arguments, parameter: value}
            said = complaint(call, given, parameter, is_wrong=is_wrong)
        if said is not None:
            yield f"{parameter}={str(type(value))!s:.60} {value!r:.40}: {said}"


def wrong(name, parameter):
    """Give what is to be refused."""
    by_name = WRONG.get(parameter.name, ())
    values = WRONG.get(f"{name}.{parameter.name}", by_name)
    may_be_none = parameter.default is None or parameter.name in MAY_BE_NONE
    return values if may_be_none or not values else (*values, None)


@pytest.mark.parametrize("name", sorted({*CALLS, *EXTRA}))
def test_whatever_is_wrong_is_named(name, brief, tmp_path, monkeypatch):
    """TypeError, ValueError or OSError in one line with the argument's name; no warning."""
    monkeypatch.chdir(tmp_path)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    drawn, faults = random.Random(name), []
    for call in filter(None, (CALLS.get(name), EXTRA.get(name))):
        is_public = call is CALLS.get(name)
        parameters = [
            item for item in inspect.signature(call).parameters.values() if item.kind not in kinds
        ]
        arguments = right_of(name, parameters) if is_public else {}
        few = name in ("solve", "pareto", "advise", "structure", "audit", "write_report")
        for parameter in parameters:
            mine = arguments | MOVING if parameter.name.startswith("move_") else arguments
            if is_public:
                values = drawn.sample(hostile(), SOME) if few else hostile()
                faults += complaints(call, mine, parameter.name, values)
            values = wrong(name, parameter)
            faults += complaints(call, mine, parameter.name, values, is_wrong=True)
    assert not faults, "\n".join(faults)
