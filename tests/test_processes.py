"""Living in other people's processes: forks, threads, signals, panics, memory."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner import _core
from moetuner.cli.interrupts import exit_status, raising_interrupts

SAMPLE = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
QUIET = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def work(threads=None, iterations=300):
    """Load, count, solve by search and by integer programme, and evaluate."""
    trace = mt.RoutingTrace.load(SAMPLE)
    statistics = mt.RoutingStatistics.from_trace(trace, window=512, threads=threads, sets=True)
    problem = mt.Problem(statistics, mt.Topology(4), regime="follow", max_imbalance=1.05)
    actual = [
        mt.solve(problem, method, threads=threads, iterations=iterations).placement
        for method in ("heuristic", "paper")
    ]
    return [mt.evaluate(item, trace, window=512, threads=threads).crossing for item in actual]


def forked(child):
    """Run a function in a forked child, and give its exit status: 1 if it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            given = child()
            code = 1 if given is None else given
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_a_forked_child_works(threads):
    """A child, and its child, does what its parent did with the same answer, and so does it after.

    Whoever forks after its own work, as its parent did, leaves its child able to work too.
    """
    expected = work(threads)

    def child():
        if work(threads) != expected:
            return 2
        return 0 if threads else forked(lambda: 0 if work() == expected else 3)

    assert forked(child) == 0
    assert work(threads) == expected


def program(text, *arguments, **how):
    """Run a program in a process of its own, which must end well, and give what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(text), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pools_are_forgotten_at_the_fork():
    """The core hears of forks itself: a child may have the number of an ancestor that is gone."""
    program("""
        import os
        hooks = []
        os.register_at_fork = lambda **hook: hooks.append(hook)
        import moetuner._core as core
        assert {'after_in_child': core.forget_pools} in hooks, hooks
    """)


def test_a_child_forked_by_others_works():
    """Also a fork that Python does not hear of, as of a C library, leaves a child able to work."""
    text = """
        import ctypes, os
        import numpy as np
        from moetuner import _core
        load = np.arange(8, dtype=np.uint64).reshape(1, 8)
        expected = _core.pack(load, 2, (0, 4), threads=1)[0]
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            found = _core.pack(load, 2, (0, 4), threads=1)[0]
            os._exit(0 if (found == expected).all() else 2)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, code
    """
    program(text, env=QUIET)


def test_children_forked_among_busy_threads_work():
    """Whatever other threads of their parent do in the core meanwhile, with or without a lock."""
    text = """
        import os, threading
        import numpy as np
        from moetuner import _core
        load = np.arange(8, dtype=np.uint64).reshape(1, 8)
        expected = _core.pack(load, 2, (0, 4), threads=1)[0]
        ended = threading.Event()
        def pack():
            while not ended.is_set():
                _core.pack(load, 2, (0, 4), threads=1)
        threads = [threading.Thread(target=pack) for _ in range(4)]
        for thread in threads:
            thread.start()
        codes = []
        for _ in range(100):
            pid = os.fork()
            if pid == 0:
                found = _core.pack(load, 2, (0, 4), threads=1)[0]
                os._exit(0 if (found == expected).all() else 2)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        ended.set()
        for thread in threads:
            thread.join()
        assert codes == [0] * 100, codes
    """
    program(text, env=QUIET)


def test_one_thread_is_one_thread():
    """With threads=1 nothing but one thread works (this one listens), and none is rayon's own."""
    text = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from test_processes import work
        def spent():
            tasks = {}
            for task in os.listdir('/proc/self/task'):
                name = open(f'/proc/self/task/{task}/comm').read().strip()
                fields = open(f'/proc/self/task/{task}/stat').read().rsplit(')')[-1].split()
                tasks[task, name] = int(fields[11]) + int(fields[12])
            return tasks
        work(1)
        before = spent()
        work(1, 3000)
        others = [key for key in spent() if key[0] != str(os.getpid())]
        assert all(name.startswith('moetuner-') for _, name in others), others
        busy = [key for key in others if spent()[key] > before.get(key, 0)]
        assert len(busy) <= 1, busy
    """
    program(text, str(Path(__file__).parent), env=QUIET)


def test_a_pool_has_at_most_four_threads_for_every_core():
    """However many are asked for."""
    text = """
        import os
        import numpy as np
        from moetuner import _core
        load = np.arange(8, dtype=np.uint64).reshape(1, 8)
        before = len(os.listdir('/proc/self/task'))
        _core.pack(load, 2, (0, 4), threads=2**31)
        assert len(os.listdir('/proc/self/task')) - before <= 4 * os.cpu_count()
    """
    program(text, env=QUIET)


def test_two_calls_have_two_pools(make_trace):
    """One-threaded solves at once both get on: neither waits until the other is done.

    Each searches until its limit, which never comes, and meets the other once it has found more
    than it began with.
    """
    statistics = mt.RoutingStatistics.from_trace(make_trace(400, 8, 4, 64))
    problem = mt.Problem(statistics, mt.Topology(8), regime="follow", max_imbalance=1.5)
    both, ended = threading.Barrier(2), []

    def solve():
        first = []

        def met(progress):
            if first == [-np.inf]:
                ended.append("called again after it raised")
            first.extend([] if first or progress.objective is None else [progress.objective])
            if first and progress.objective < first[0]:
                first[0] = -np.inf
                both.wait()
                raise InterruptedError

        try:
            mt.solve(problem, "heuristic", threads=1, time_limit=1e6, progress=met)
        except InterruptedError as error:
            ended.append(type(error))

    solves = [threading.Thread(target=solve) for _ in range(2)]
    for item in solves:
        item.start()
    for item in solves:
        item.join()
    assert ended == [InterruptedError, InterruptedError]


@pytest.fixture
def layers():
    """Make two layers of four experts on two devices."""
    tables = (np.ones((1, 2, 4)), np.ones(1), np.full((2, 2), 2), [0, 0], [1.0, 1.0])
    return _core.Layers(*tables, nearest=False, norm=0)


def test_panics_are_runtime_errors(layers, capfd, monkeypatch):
    """A panic in this thread or in a pool's says what and where in a RuntimeError, and no more."""
    monkeypatch.delenv("RUST_BACKTRACE", raising=False)
    few = (np.ones((1, 1, 1), dtype=np.uint64), np.ones((2, 2)))
    start = np.array([[[0, 1], [2, 3]]] * 2, dtype=np.int32)
    for threads in (1, 2):
        with pytest.raises(RuntimeError, match=r"the core panicked at rust/.*\.rs:\d+"):
            layers.place(start, trials=10, threads=threads, links=few)
    slots, _ = layers.place(start, trials=10)
    assert sorted(slots[0].ravel()) == [0, 1, 2, 3]
    assert capfd.readouterr().err == ""


def test_memory_that_is_not_there_is_an_error():
    """Where tables fit the rules but not the machine, calls raise MemoryError; nothing aborts."""
    text = """
        import resource, numpy as np, moetuner as mt
        from moetuner import _core
        _core.replicate_experts(np.ones((1, 4)), np.full((1, 2), 2), np.ones(2))
        ids = np.zeros((1, 40, 1), dtype=np.uint16)
        counter = _core.StatisticsCounter(40, 60000, 1, window=1, transitions=False,
                                          coactivation=False)
        many = np.zeros((200, 40, 1), dtype=np.uint16)
        counter.push(ids)
        slots = np.arange(16384, dtype=np.int32).reshape(1, 8192, 2).repeat(40, axis=0)
        load = np.ones((4096, 8))
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        def replay():
            _core.Replay(slots, 16384, 1, [0] * 8192, rows=1, most_tokens=1, pairs=True)
        def count():
            _core.StatisticsCounter(40, 60000, 1)
        for call in (
            replay,
            count,
            lambda: counter.push(many),
            lambda: mt.balance(load, devices=8192, slots_per_device=8),
            lambda: _core.search((np.ones((2, 200), np.uint64), np.ones(2, np.uint64),
                                  np.zeros((1, 1), np.int64), 65536, None,
                                  np.zeros((2, 200, 200), np.uint64))),
        ):
            try:
                call()
            except MemoryError as error:
                print(type(error).__name__, error)
        counter.push(ids)
    """
    lines = program(text).splitlines()
    assert len(lines) == 5, lines
    assert all(line.startswith("MemoryError") for line in lines), lines


BEYOND = [("time_limit", limit) for limit in (float("inf"), 1e308, 1e9 + 1)]
BEYOND += [("max_imbalance", cap) for cap in (1e300, 1.7e308, 1e10)]


@pytest.mark.parametrize("objective", ["time", "traffic"])
def test_a_limit_beyond_all_numbers_is_none(objective):
    """Time that no clock can count, or a cap that no placement can break: as without a limit."""
    load = np.random.default_rng(1).integers(0, 99, (3, 2, 8)).astype(np.uint64)
    statistics = mt.RoutingStatistics.from_load(load)

    def answer(max_imbalance=float("inf"), **limit):
        rules = {"max_imbalance": max_imbalance, "objective": objective}
        problem = mt.Problem(statistics, mt.Topology(2), **rules)
        return mt.solve(problem, "heuristic", iterations=100, **limit)

    unlimited = answer()
    for name, value in BEYOND:
        limited = answer(**{name: value})
        assert limited.placement == unlimited.placement, (name, value)
        assert limited.status != "time_limit", (name, value)
        assert not limited.details.caps.raised, (name, value)


# Found by the interpreter when it starts: sends a signal once a module is looked for.
SENDER = """
import os, sys
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SENT_AT"]:
            os.kill(os.getpid(), int(os.environ["SENT"]))
sys.meta_path.insert(0, Sender())
"""


IMPORTS = (
    "moetuner._core",
    "typing",
    "re",
    "numpy.lib",
    "moetuner.trace",
    "click",
    "moetuner.cli.inspect",
)


@pytest.mark.parametrize(
    ("name", "number"), [*zip(IMPORTS, cycle([signal.SIGINT, signal.SIGTERM]), strict=False)]
)
def test_a_signal_while_it_is_imported_prints_no_traceback(tmp_path, name, number):
    """From the first import on that could listen, the command line ends with one line."""
    (tmp_path / "sitecustomize.py").write_text(SENDER)
    line = [sys.executable, "-m", "moetuner", "inspect", SAMPLE]
    environment = {"PYTHONPATH": str(tmp_path), "SENT_AT": name, "SENT": str(int(number))}
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})
    actual = (done.returncode, done.stdout, done.stderr)
    assert actual == (128 + number, "", "moetuner: error: interrupted\n")


def test_the_library_leaves_signals_alone(run):
    """Importing the package changes no handler; a command that was run here leaves none behind."""
    program("""
        import signal
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        import moetuner, moetuner.cli
        assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    """)
    before = signal.getsignal(signal.SIGTERM)
    assert run("--version")[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_first_sigterm_interrupts():
    """A second one, as sent to a whole group, does not break off the writing of the answer."""
    with raising_interrupts():
        assert exit_status() is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert exit_status() == 143
