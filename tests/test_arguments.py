"""Every public call with any wrong argument: one line that names it, and no warning."""

import inspect
import random
import warnings
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import random_ids

import moetuner as mt

IDS = random_ids(12, 1, 2, 4)
TRACE = mt.RoutingTrace.from_arrays(
    IDS, num_experts=4, sequence=np.arange(12) // 3, group=np.arange(12) // 6
)
STATISTICS = mt.RoutingStatistics.from_trace(TRACE, window=3, by_group=True)
TOPOLOGY = mt.Topology(2)
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
    mt.audit(PLACEMENT, TRACE, window=3, resamples=2), PROBLEM, mt.Objective(PROBLEM), RESULT,
    CERTIFICATE,
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
    "certificate": CERTIFICATE, "returns": True, "resamples": 2, "iterations": 1,
    "home": np.zeros(12, int), "ports": np.ones((2, 1)), "compute": np.ones((2, 2)),
    "communication": np.ones(2), "value": 1.0, "experts": 4, "tokens": np.ones((2, 2)),
}  # fmt: skip
BY_CALL = {
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
    "CostModel.load": MODEL, "CostModel.save": MODEL, "Certificate.load": CERTIFICATE,
}  # fmt: skip
# Values of their own classes are not made by users, and check nothing.
VALUES = {"PlacementDiff", "Evaluation", "Audit", "Verdict", "Result", "Progress", "Trade",
          "Advice", "Certificate"}  # fmt: skip
# Methods of the objective that only the solver calls.
INNER = {"Objective.window_cost", "Objective.imbalances", "Objective.layers_traffic"}
OTHER_WORDS = {"window_load": "load", "gpu": "preset", "machine": "preset", "ids": "ids"}


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
        of = next((each for each in INSTANCES if type(each) is what), None)
        for method, function in inspect.getmembers(what, inspect.isroutine):
            bound, own = inspect.ismethod(function), inspect.isfunction(function)
            if not method.startswith("_") and (bound or (own and of is not None)):
                yield f"{name}.{method}", function if bound else getattr(of, method)


CALLS = {name: call for name, call in calls() if name not in INNER}
# Slow ones get some of the values, drawn anew for each parameter.
SOME = 12


def right_of(name, parameters):
    """Return arguments that are right, and write the file that they name."""
    of = FILES.get(name, TRACE)
    as_json = isinstance(of, mt.Placement | mt.CostModel | str)
    path = Path("file.json" if as_json else "file.safetensors")
    if isinstance(of, str):
        path.write_text(of)
    else:
        of.save(path)
    own = RIGHT | {"path": path} | BY_CALL.get(name, {})
    return {
        each.name: own[each.name]
        for each in parameters
        if each.default is each.empty or each.name in ("iterations", "resamples")
    }


def complaint(call, arguments, parameter, value):
    """Say what is wrong with how a call answers; None if nothing."""
    given = {**arguments, parameter.name: value}
    first = [given.pop(name) for name in ("gpu", "machine") if name in given]
    try:
        found = call(*first, **given)
        if inspect.isgenerator(found):
            list(found)
    except (ValueError, TypeError, OSError) as error:
        text, word = str(error), OTHER_WORDS.get(parameter.name, parameter.name)
        named = word in text or (parameter.name == "path" and repr(str(value))[1:-1] in text)
        named |= isinstance(error, OSError) and error.filename is not None
        if isinstance(error, UnicodeError) or not named:
            return f"{type(error).__name__} does not name it: {text!r:.150}"
        return f"not one short line: {text!r:.300}" if "\n" in text or len(text) > 400 else None
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.150}"
    return None


@pytest.mark.parametrize("name", sorted(CALLS))
def test_whatever_is_wrong_is_named(name, tmp_path, monkeypatch):
    """TypeError, ValueError or OSError in one line with the argument's name; no warning."""
    monkeypatch.chdir(tmp_path)
    call = CALLS[name]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [
        each for each in inspect.signature(call).parameters.values() if each.kind not in kinds
    ]
    arguments = right_of(name, parameters)
    drawn, found = random.Random(name), []
    few = name in ("solve", "pareto", "advise", "structure", "audit")
    for parameter in parameters:
        values = hostile()
        for value in drawn.sample(values, SOME) if few else values:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                said = complaint(call, arguments, parameter, value)
            if said is not None:
                found.append(f"{parameter.name}={str(type(value))!s:.60} {value!r:.40}: {said}")
    assert not found, "\n".join(found)
