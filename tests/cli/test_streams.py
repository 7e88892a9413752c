"""Closed streams, readers that have gone, and signals: one rule for all commands."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import moetuner as mt
from moetuner.placement import blocks

MOETUNER = (sys.executable, "-m", "moetuner")
GONE = 128 + signal.SIGPIPE
COMMANDS = {
    "solve": "solve t.safetensors --devices 2 --method lpt",
    "evaluate": "evaluate p.json t.safetensors",
    "compare": "compare t.safetensors --devices 2 --methods lpt --splits 1",
    "export": "export p.json --to eplb --out e.npz",
}
COMMANDS = {name: line.split() for name, line in COMMANDS.items()}


@pytest.fixture
def files(make_trace, tmp_path):
    """Folder with a small trace and a placement of it."""
    make_trace(300).save(tmp_path / "t.safetensors")
    blocks(3, 8, 2).save(tmp_path / "p.json")
    return tmp_path


def finished(*command, **how):
    """Run a process to its end."""
    how = {"capture_output": True, "text": True, "check": False} | how
    return subprocess.run(command, **how)


def is_progress(line):
    """Return whether a line of standard error says what is being done, as after a second."""
    return re.match("moetuner: (?!error|warning|interrupted)", line) is not None


def shell(files, redirection, *arguments):
    """Run a command in a shell; return its status and what it says on standard error."""
    line = ("bash", "-c", f'"$@" {redirection}', "bash", *MOETUNER, *arguments)
    done = finished(*line, cwd=files)
    said = [line for line in done.stderr.splitlines() if not is_progress(line)]
    return done.returncode, said


# A closed stream, and one whose reader is gone.
UNREAD = {">&-": 0, '| head -0; exit "${PIPESTATUS[0]}"': GONE}


@pytest.mark.parametrize(("command", "redirection"), [*zip(COMMANDS, [*UNREAD] * 2, strict=True)])
def test_nobody_reads_standard_output(files, command, redirection):
    """Closed, or its reader gone, which ends as after SIGPIPE: files are written all the same."""
    actual = shell(files, redirection, *COMMANDS[command], "--json", "found.json")
    assert actual == (UNREAD[redirection], [])
    assert json.loads((files / "found.json").read_text())


def test_standard_error_may_be_closed(files):
    """What goes wrong then shows in the status alone, and nothing lands on standard output."""
    assert shell(files, "2>&- >out.txt", "solve", "none", "--devices", "2") == (2, [])
    assert (files / "out.txt").read_text() == ""
    assert shell(files, "<&- >&- 2>&-", *COMMANDS["solve"])[0] == 0


def test_a_full_disk_is_said_once(files):
    """It is no bug, and not silent either."""
    status, said = shell(files, ">/dev/full", *COMMANDS["evaluate"])
    assert status == 2
    assert said == ["moetuner: error: standard output: No space left on device"]


def test_a_demo_without_room_leaves_no_trace(tmp_path):
    """Its file appears whole or not at all, and is the one that the message names."""
    line = f"ulimit -f 8; {sys.executable} -m moetuner demo --out there"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moetuner: error: there/trace.safetensors: File too large\n"
    assert not list((tmp_path / "there").iterdir())


# The command line, which stays where it shows the first progress of some work until a signal comes.
# It shows progress later, too, where a search was interrupted and its best answer is judged.
HELD = """
import sys, time
from moetuner.cli import main, output
shown = []
def show(report, *_, **__):
    if WORK in report.label and not shown:
        shown.append(report.label)
        print("held", file=sys.stderr, flush=True)
        time.sleep(3600)
output.Report.show = show
sys.exit(main(sys.argv[1:]))
"""


def held(work=""):
    """Give the command line that is held in work whose label has these words."""
    return (sys.executable, "-c", HELD.replace("WORK", repr(work)))


# The command line, whose log gets a line at once for all progress.
CHATTY = """
import sys
from moetuner.cli import main, output
output.INTERVAL_S = 0.0
sys.exit(main(sys.argv[1:]))
"""


def interrupted(folder, number, command, *arguments, until):
    """Send a process a signal once it has said something; return its output and its errors."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *arguments], cwd=folder, **pipes)
    said = []
    for line in process.stderr:
        said.append(line.strip())
        if until in line:
            break
    process.send_signal(number)
    out, err = process.communicate()
    # click ends the line in which Ctrl-C was typed.
    said = [line for line in said + err.splitlines() if line not in ("held", "")]
    assert process.returncode == 128 + number, said
    assert "interrupted" in said[-1]
    assert all(is_progress(line) for line in said[:-1])
    return out, said[-1]


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(
    ("command", "number"),
    [*zip(("inspect", "compare", "advise", "solve"), SIGNALS * 2, strict=True)],
)
def test_a_signal_ends_every_command_alike(files, command, number):
    """Status 128 + signal, a line that says so, and no conclusion from what did not end."""
    devices = () if command == "inspect" else ("--devices", "2")
    words = (command, "t.safetensors", *devices)
    out, _ = interrupted(files, number, held(), *words, until="held")
    assert "null" not in out
    assert "worth a trial" not in out


@pytest.mark.parametrize(("json_file", "number"), [*zip(("-", "found.json"), SIGNALS, strict=True)])
def test_a_signal_writes_the_best_so_far(make_trace, tmp_path, number, json_file):
    """Placement and JSON are there, and are said to be the best so far, by whichever is read.

    The search is as long as its limit; its progress is on standard error alone.
    """
    make_trace(400, layers=8, top_k=4, experts=64).save(tmp_path / "t.safetensors")
    line = "solve t.safetensors --devices 8 --objective traffic --time-limit 1e6 --out p.json"
    words = (*line.split(), "--json", json_file)
    command = (sys.executable, "-c", CHATTY)
    out, said = interrupted(tmp_path, number, command, *words, until="solving, joint: ")
    assert mt.Placement.load(tmp_path / "p.json").devices == 8
    text = out if json_file == "-" else (tmp_path / json_file).read_text()
    assert json.loads(text)["status"] == "interrupted"
    assert json_file == "-" or "interrupted, best so far" in out
    assert said == "moetuner: interrupted: this is the best so far"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_writes_what_was_counted_so_far(make_trace, tmp_path, number):
    """While the second of three recordings is counted: the file has the first one."""
    for place in range(3):
        make_trace(60, seed=place).save(tmp_path / f"{place}.safetensors")
    line = "convert 0.safetensors 1.safetensors 2.safetensors --count --out counts.safetensors"
    out, said = interrupted(tmp_path, number, held("2 of 3"), *line.split(), until="held")
    assert "Counted: 1 recording with 60 tokens" in out
    assert said == "moetuner: interrupted: this is the best so far"
    assert mt.RoutingTrace.load(tmp_path / "counts.safetensors").population.recordings == 1


def test_a_panic_under_a_signal_is_the_signal(run, monkeypatch):
    """Where a signal makes the core panic nobody is shown the core's inside."""

    class Panic(BaseException):
        pass

    def panic(*_, **__):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise Panic("PyErr { type: KeyboardInterrupt }") from None

    monkeypatch.setattr("moetuner.cli._share_memory", lambda: None)
    monkeypatch.setattr("moetuner.cli.verify.command.callback", panic)
    monkeypatch.setattr("moetuner.cli.verify.command.params", [])
    assert run("verify") == (143, "", "moetuner: error: interrupted\n")


HEAPS = """
import ctypes, resource, sys, threading
from moetuner.cli import main
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 42, 1 << 42))
main(["--version"])
barrier = threading.Barrier(4)
def work():
    mine = [bytes(2000) for _ in range(100)]
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fclose(ctypes.c_void_p(file))
"""


def test_threads_share_memory_where_addresses_are_limited(tmp_path):
    """Under ulimit -v no thread asks for 64 MB of its own, which it would not get."""
    heaps = {}
    for name in ("limited", "free"):
        finished(sys.executable, "-c", HEAPS, name, str(tmp_path / name), check=True)
        heaps[name] = (tmp_path / name).read_text().count("<heap nr=")
    assert heaps["limited"] == 1
    assert heaps["free"] > 1


# Little more than what the process has by then: less than the stacks of four threads.
LITTLE = """
import resource, sys
from pathlib import Path
from moetuner.cli import main
import moetuner.cli.evaluate
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (6 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


def test_threads_without_memory_are_no_bug(files):
    """The line says how to take fewer."""
    line = (*COMMANDS["evaluate"], "--threads", "500")
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = finished(sys.executable, "-c", LITTLE, *line, cwd=files, env=one_thread)
    assert done.returncode == 2
    assert re.fullmatch(r"moetuner: error: threads: [^\n]+ --threads[^\n]+\n", done.stderr)


def test_imports_without_memory_are_one_line():
    """Where this process is the command line, which is imported before its own code runs."""
    program = "import sys; sys.argv = ['moetuner']; import moetuner.cli; raise MemoryError"
    done = finished(sys.executable, "-c", program)
    assert (done.returncode, done.stderr) == (1, "moetuner: error: out of memory\n")
