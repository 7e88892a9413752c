"""Fixtures of several test modules, and how long hypothesis searches."""

import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import make
import pytest
from browsers import is_broken_promise, lines_of, skipped_without_browser
from hypothesis import HealthCheck, settings

import moetuner as mt
from moetuner.cli import main, output
from moetuner.report import structure
from moetuner.solver import effort

# Deterministic by default; HYPOTHESIS_PROFILE=thorough searches longer and anew each time.
quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=30, derandomize=True, database=None, **quiet)
settings.register_profile("thorough", max_examples=1000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

# Tests of real engines run in environments of their own: make engines.
collect_ignore = ["engines"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what runs in the background deaf to Ctrl-C, which many tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    """Say which tests a browser would have run, and how to get one."""
    names = skipped_without_browser(terminalreporter.stats.get("skipped", []))
    for line in lines_of(names):
        terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    """Fail a run that skipped tests for want of a browser where there should be one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and is_broken_promise(
        skipped_without_browser(reporter.stats.get("skipped", []))
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def make_trace() -> Callable[..., mt.RoutingTrace]:
    """Maker of small skewed traces with sequences of about ten tokens and two groups."""
    return make.trace


@pytest.fixture
def trace(make_trace, tmp_path):
    """File of a small trace."""
    make_trace(800).save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: status, standard output and standard error."""
    # On a busy machine progress may be due at any time.
    monkeypatch.setattr(output, "FIRST_S", 3600.0)
    monkeypatch.setattr(output, "INTERVAL_S", 3600.0)

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def shorten_searches(monkeypatch):
    """Let searches be as short as they can, without a clock."""
    monkeypatch.setitem(
        effort.EFFORTS, "brief", effort.Effort(5e4, 1, (math.inf,), 2, 1, 1, copy_searches=2)
    )
    monkeypatch.setitem(effort.EFFORTS, "default", effort.Effort(1e5, 2, (math.inf,), 4, 8, 1))
    monkeypatch.setitem(effort.EFFORTS, "thorough", effort.Effort(2e5, 4, (1.1, math.inf), 4, 8, 1))
    monkeypatch.setattr(structure, "ITERATIONS", 50)
    few = {"SLOT_WORK": 32}
    few |= {"CHAIN_LEAST": 50}
    few |= dict.fromkeys(("PAIR_TRIALS", "TANGENT_TRIALS", "CATCH_UP"), 50)
    few |= dict.fromkeys(("LIVE_TRIALS", "BOUND_ITERATIONS"), 4)
    few |= dict.fromkeys(("ROUNDS", "RESTARTS", "PRICE_ROUNDS"), 1)
    few |= dict.fromkeys(("TANGENT_STEPS", "STAGE_NODES", "PLACE_NODES"), 1)
    few |= {"POLISHED_SLOTS": 0}
    for name, value in few.items():
        monkeypatch.setattr(effort, name, value)


@pytest.fixture
def brief(monkeypatch):
    """Search as shortly as searches can."""
    shorten_searches(monkeypatch)


@pytest.fixture
def briefly():
    """Return a context in which searches are as short as they can be."""

    @contextmanager
    def briefly():
        with pytest.MonkeyPatch.context() as patch:
            shorten_searches(patch)
            yield

    return briefly


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real traces; tests that need it skip where it is not beside the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no real traces: {DATA} is absent")
    return DATA


@pytest.fixture
def ok(run):
    """Run a command that must succeed in silence, and give its output."""

    def ok(*arguments):
        status, out, err = run(*arguments)
        assert (status, err) == (0, ""), err
        return out

    return ok


@pytest.fixture
def as_json(ok):
    """Run a command that must succeed in silence, and give what ``--json -`` prints."""
    return lambda *arguments: json.loads(ok(*arguments, "--json", "-"))
