"""What importing the package does to the process that imports it: nothing."""

import ast
import doctest
import html
import importlib.metadata
import inspect
import json
import pkgutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.report import structure

CHECK = """
import json, logging, os, sys, threading

def logging_state():
    root = logging.root
    return root.level, list(root.handlers), sorted(root.manager.loggerDict)

before = logging_state()
import moetuner
after = logging_state()
first = "numpy" in sys.modules
import moetuner.plugins.vllm, moetuner.plugins.sglang
heavy = ("torch", "vllm", "sglang", "rich", "highspy", "click", "plotly", "jinja2")
print(json.dumps({
    "first": first,
    "heavy": [name for name in heavy if name in sys.modules],
    "threads": threading.active_count(),
    "native": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1,
    "logging": after == before,
}))
"""


def test_import_is_silent_and_light():
    """Nothing is printed, no heavy module comes in, no thread starts, logging stays as it was.

    Nor does a heavy one come in with the file of an engine; numpy comes with the first name used.
    """
    # NumPy's linear algebra starts its own threads unless it is told not to.
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", CHECK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    silent = {"first": False, "heavy": [], "threads": 1, "native": 1, "logging": True}
    assert json.loads(done.stdout) == silent


def test_version_is_the_crates():
    """Distribution, package and core agree."""
    assert mt.__version__ == importlib.metadata.version("moetuner")


def test_public_names_exist():
    """Everything in __all__ is there, with an example; nothing else but modules is public."""
    for name in set(mt.__all__) - {"__version__"}:
        text = inspect.getdoc(getattr(mt, name))
        assert "\nExamples\n--------\n" in text, name
        # They are run with the documents.
        assert doctest.DocTestParser().get_examples(text), name
    others = {name for name in vars(mt) if not name.startswith("_")} - set(mt.__all__)
    assert all(inspect.ismodule(getattr(mt, name)) for name in others)
    # ``import moetuner.audit as a`` gives a module or fails; it never gives a function.
    assert not {module.name for module in pkgutil.iter_modules(mt.__path__)} & set(mt.__all__)


FRESH = """
import moetuner, pickle
assert set(moetuner.__all__) <= set(dir(moetuner))
from moetuner import *
for name in moetuner.__all__:
    value = getattr(moetuner, name)
    assert value is globals()[name] is getattr(moetuner, name), name
    assert pickle.loads(pickle.dumps(value)) == value, name
for name in ("formats", "presets", "serving", "solver"):
    assert getattr(moetuner, name).__name__ == f"moetuner.{name}"
try:
    moetuner.Placemnt
except AttributeError as error:
    assert "Placemnt" in str(error)
"""


def test_names_are_loaded_when_they_are_used():
    """Each is listed before it is there, is always the same object, and can be pickled."""
    subprocess.run([sys.executable, "-c", FRESH], check=True)


def test_editors_see_the_names_that_are_loaded():
    """What type checkers read says of each name the module that it is loaded from."""
    tree = ast.parse(inspect.getsource(mt))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and "not" not in ast.unparse(node.test)
    )
    told = {name.name: of.module for of in block.body for name in of.names}
    assert told == {name: f"moetuner.{module}" for name, module in mt._HOMES.items()}
    assert list(mt._HOMES) == mt.__all__


@pytest.fixture(scope="module")
def values():
    """One of everything that is public and a value, twice, made alike."""

    def make():
        random = np.random.default_rng(0)
        ids = np.argsort(random.random((600, 3, 8)), axis=2)[:, :, :2]
        group = np.repeat([0, 1], 300)
        trace = trace_of(ids, length=20, group=group, group_names=("a", "b"))
        statistics = mt.RoutingStatistics.from_trace(trace, window=50, sets=True, by_group=True)
        topology = mt.Topology(
            4, 2, speed=[1, 1, 2, 2], link_cost=1.0 - np.eye(4), slots_per_device=[2, 2, 3, 3]
        )
        problem = mt.Problem(statistics, topology, groups={"a": 2.0}, pinned=[[0, 1, 2]])
        plain = mt.Problem(
            mt.RoutingStatistics.from_trace(trace), mt.Topology(4), regime="follow", max_imbalance=2
        )
        result = mt.solve(plain, iterations=100)
        assert result.certificate is not None
        placement = mt.solve(problem, "lpt").placement
        how = {"window": 50, "cost_model": problem.cost_model}
        evaluation = mt.evaluate(placement, trace, topology, **how)
        return [
            *(statistics, statistics.sets[0], topology, mt.Tier(2, 1e9), problem.cost_model),
            *(problem, replace(result, seconds=0.0), result.certificate, result.details),
            *(placement, placement.diff(result.placement, topology=topology, expert_bytes=2)),
            *(evaluation, mt.audit(placement, trace, topology, window=50)),
            *(mt.verdict(evaluation, evaluation), mt.pareto(problem, placement, iterations=10)[-1]),
            *(mt.structure(trace), mt.Progress(1.0, "search"), trace),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "ITERATIONS", 50)  # else it searches for seconds
        return make(), make()


def test_values_are_equal_by_content_and_have_a_hash(values):
    """Arrays and dictionaries in fields do not raise; a trace, which may be a file, is itself."""
    for one, two in zip(*values, strict=True):
        assert one == one
        assert (one == two) != isinstance(one, mt.RoutingTrace), one
        assert isinstance(one, mt.RoutingTrace) or hash(one) == hash(two)
        assert len({one, two, one}) == 1 + isinstance(one, mt.RoutingTrace)


def test_results_are_json_and_a_table(values):
    """Each has ``to_dict`` of JSON values and ``_repr_html_``; an advice has its answer in both."""
    statistics, steps = values[0][0], []
    how = {"copies": (0,), "splits": 1, "iterations": 10, "progress": steps.append}
    advice = mt.advise(replace(statistics, sets=None), mt.Topology(4), **how)
    assert steps
    results = [*advice.judged, *advice.copies, advice, mt.drift(statistics, statistics)]
    for value in (*results, *values[0][:-1]):
        actual = value.to_dict()
        assert json.loads(json.dumps(actual)).keys() == actual.keys() != set()
        assert value._repr_html_().startswith("<table>")
    assert advice.to_dict()["sentence"] == advice.sentence
    assert advice.sentence in html.unescape(advice._repr_html_())


def test_values_differ_where_a_number_does(values):
    """One count more makes other statistics, another topology another problem."""
    statistics, _, topology, _, _, problem, *_ = values[0]
    more = statistics.window_load.copy()
    more[-1, -1, -1] += 1
    assert replace(statistics, window_load=more, sets=None) != replace(statistics, sets=None)
    assert replace(problem, topology=replace(topology, link_cost=None)) != problem


def test_values_are_shown_in_a_few_lines(values):
    """Of arrays and long lists there is the size; notebooks get a table."""
    for value in values[0]:
        lines = repr(value).split("\n")
        assert lines[0].startswith(f"{type(value).__name__}(")
        assert len(lines) <= 8
        assert max(map(len, lines)) <= 160, lines
    for value in values[0][:-1]:  # but for the trace
        actual = value._repr_html_()
        rows = [row.count("</t") for row in actual.split("\n")[1:-1]]
        assert len(rows) >= 2
        assert len(set(rows)) == 1


@pytest.mark.parametrize(
    "named", [mt.Problem, mt.Placement, mt.RoutingTrace, mt.Topology, mt.solve]
)
def test_arguments_have_names_after_the_first_two(named):
    """What callers make themselves takes two arguments by their places, all others by name."""
    kinds = [item.kind for item in inspect.signature(named).parameters.values()]
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_torch_that_is_missing_is_named_in_one_line():
    """The error has one traceback, whose last line says what to install."""
    code = "import sys; sys.modules['torch'] = None; import moetuner.torch"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: moetuner.torch needs PyTorch: pip install 'moetuner[torch]'"
    )
