"""Files of all kinds: written whole, through or not at all, and never over what was read."""

import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner._texts import clean, name, printable
from moetuner.files import delete_left_behind, read_whole, replacing
from moetuner.solver.bounds.certificate import Certificate

PLACEMENT = mt.Placement([[[0], [1]]])
ESCAPE = "\x1b[31mred\x1b]0;title\x07"
# Of a machine that knows only ASCII.
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def pipe(tmp_path):
    """Make a FIFO with a reader that stays, whoever opens and closes the other end."""
    os.mkfifo(tmp_path / "pipe")
    handle = os.open(tmp_path / "pipe", os.O_RDWR)
    yield tmp_path / "pipe", handle
    os.close(handle)


def test_a_pipe_gets_the_bytes(tmp_path, pipe):
    """What is written to a FIFO arrives at its reader, and the FIFO stays one."""
    PLACEMENT.save(pipe[0])
    PLACEMENT.save(tmp_path / "plain.json")
    assert os.read(pipe[1], 1 << 20) == (tmp_path / "plain.json").read_bytes()
    assert stat.S_ISFIFO(pipe[0].stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "plain.json"}


def test_a_descriptor_gets_the_bytes(tmp_path):
    """A path of an open descriptor, as of process substitution, is written to where it stands."""
    out = tmp_path / "out"
    with out.open("wb") as file:
        file.write(b"before\n")
        file.flush()
        PLACEMENT.save(f"/dev/fd/{file.fileno()}")
        file.write(b"after\n")
    lines = out.read_bytes().splitlines()
    assert (lines[0], lines[-1]) == (b"before", b"after")
    assert json.loads(lines[1])["num_experts"] == 2


def test_a_link_stays(tmp_path):
    """What a link points to is replaced, or made; the link stays."""
    (tmp_path / "folder").mkdir()
    for there in (True, False):
        target, link = tmp_path / "folder" / f"{there}.json", tmp_path / f"{there}"
        if there:
            target.write_text("old")
        link.symlink_to(target)
        PLACEMENT.save(link)
        assert link.is_symlink()
        assert mt.Placement.load(target) == PLACEMENT


def test_modes_are_kept(tmp_path):
    """A file that was private stays so; a new one has the mode that the umask leaves."""
    private, new = tmp_path / "private", tmp_path / "new"
    private.write_text("old")
    private.chmod(0o604)
    before = os.umask(0o027)
    try:
        with replacing(private) as temporary:
            # What was private is not open for a while.
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        PLACEMENT.save(new)
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == 0o604
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


def test_errors_name_the_file(tmp_path):
    """Whatever fails, before or while it is written, names the path asked for and leaves none."""
    target = tmp_path / "target"
    for path, number in ((target / "p.json", errno.ENOENT), (tmp_path, errno.EISDIR)):
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            PLACEMENT.save(path)
        assert caught.value.errno == number
    with pytest.raises(OSError, match=f"'{target}'"), replacing(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="'input'"), replacing(target):
        raise OSError(errno.EIO, "broken", "input")
    assert not list(tmp_path.iterdir())


def test_a_file_is_synced_before_it_replaces(monkeypatch, tmp_path):
    """The bytes are on the disk before the name is: else a power cut leaves an empty file."""
    steps = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), rename(*paths)))
    with replacing(tmp_path / "target") as temporary:
        temporary.write_text("new")
    assert steps == ["sync", "replace", "sync"]


@pytest.mark.parametrize("target", ["target", "n" * 240], ids=["short", "long"])
def test_temporaries_of_killed_runs_are_deleted(tmp_path, target):
    """The next write to the same name deletes what a killed process left, and nothing else."""
    program = (
        "import os, sys\n"
        "from moetuner.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / target
    subprocess.run([sys.executable, "-c", program, path], check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    other = tmp_path / f".{target}.notes"
    other.write_text("mine")
    with replacing(tmp_path / "other") as temporary:
        temporary.write_text("new")
    assert left[0].exists()
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert {item.name for item in tmp_path.iterdir()} == {target, "other", other.name}


@pytest.mark.parametrize("is_late", [False, True])
def test_several_processes_write_one_file(monkeypatch, tmp_path, is_late):
    """A temporary file that another one takes for left behind, before it is locked, is made anew.

    The other one has its lock then, and deletes it at once or later.
    """
    opened, lost = os.open, []

    def open_and_lose(path, flags, *mode):
        handle = opened(path, flags, *mode)
        if flags & os.O_EXCL and not lost:
            lost[:] = path, opened(path, os.O_RDONLY)
            fcntl.flock(lost[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_late:
                path.unlink()
                os.close(lost[1])
        return handle

    monkeypatch.setattr(os, "open", open_and_lose)
    with replacing(tmp_path / "target") as temporary:
        temporary.write_text("new")
        if is_late:
            lost[0].unlink()
            os.close(lost[1])
        delete_left_behind(tmp_path, "target")
    assert (tmp_path / "target").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
import moetuner as mt
ids = np.arange(24, dtype=np.uint8).reshape(4, 3, 2) % 5
trace = mt.RoutingTrace.from_arrays(ids, num_experts=5)
placement = mt.Placement([[[0, 1, 2], [3, 4, 5]]])
for name, save in (
    ("t.safetensors", trace.save),
    ("s.safetensors", mt.RoutingStatistics.from_trace(trace).save),
    ("p.json", placement.save),
    ("p.npz", lambda path: mt.write_placement(placement, "eplb", path)),
):
    path = Path(name)
    save(path)
    content = path.read_bytes()
    for most in {0, len(content) // 2, len(content) - 9, len(content) - 1}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            save(path)
            print(f"{name} of {len(content)} bytes was saved in {most}")
        except OSError as error:
            assert str(path) in str(error), error
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert path.read_bytes() == content
    assert [*Path().glob(".*")] == []
"""


def test_a_full_disk_is_an_error(tmp_path):
    """Whichever byte has no room, also the last one; the old file stays, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_temporary_in_use_is_not_deleted(tmp_path):
    """Two writers of one name do not touch each other's temporary files; the last one wins."""
    path = tmp_path / "target"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


SAME = """
solve TRACE --devices 2 --out TRACE
solve TRACE --devices 2 --out link
solve TRACE --devices 2 --out hard
solve TRACE --devices 2 --out new --json new
solve TRACE --devices 2 --out new --json folder/../new
solve TRACE --devices 2 --out n --certificate n
solve TRACE --topology machine.json --out machine.json
solve TRACE --devices 2 --cost-model cost.json --out cost.json
solve TRACE --devices 2 --initial saved.json --out saved.json
inspect TRACE --json TRACE
compare TRACE --devices 2 --json TRACE
evaluate saved.json TRACE --json saved.json
evaluate saved.json TRACE --json TRACE
evaluate p.json TRACE --baseline saved.json --json saved.json
convert TRACE --out TRACE
convert TRACE --out new.safetensors --json TRACE
export saved.json --to json --out saved.json
export saved.json --to json --out n.json --json n.json
export saved.json --to moves --initial p.json --out p.json
verify c TRACE --devices 2 --json c
demo --out folder --json folder/placement.json
collect model --dataset texts --out o.safetensors --json texts
"""


@pytest.mark.parametrize("command", SAME.strip().splitlines())
def test_no_output_is_an_input(run, trace, tmp_path, monkeypatch, command):
    """A command that would write over what it reads, or twice, is refused before it begins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(trace)
    (tmp_path / "hard").hardlink_to(trace)
    (tmp_path / "machine.json").write_text('{"devices": 2}')
    mt.CostModel.preset("h100").save(tmp_path / "cost.json")
    for saved in ("saved.json", "p.json", "c", "texts"):
        PLACEMENT.save(tmp_path / saved)
    (tmp_path / "folder").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    status, out, err = run(*command.replace("TRACE", "trace.safetensors").split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "must be another file than" in err
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before


def test_two_outputs_may_be_one_pipe(run, trace, pipe):
    """Only of regular files would one output be lost: a pipe gets both, one after the other."""
    how = ("--devices", 2, "--method", "contiguous")
    assert run("solve", trace, *how, "--out", pipe[0], "--json", pipe[0])[0] == 0
    seen = os.read(pipe[1], 1 << 20)
    assert seen.startswith(b'{"schema"')
    assert b'"settings"' in seen


def test_json_on_a_descriptor_of_standard_output(trace, tmp_path):
    """--json /dev/fd/1 is --json -: only JSON goes to standard output, and it stays a pipe."""
    command = [sys.executable, "-m", "moetuner", "solve", trace, "--devices", "2"]
    command += ["--method", "contiguous", "--out", tmp_path / "p.json", "--json", "/dev/fd/1"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout)["method"] == "contiguous"


READERS = {
    "placement": mt.Placement.load,
    "topology": mt.Topology.load,
    "cost model": mt.CostModel.load,
    "certificate": Certificate.load,
    "statistics": mt.RoutingStatistics.load,
    "trace": mt.RoutingTrace.load,
    "whole": read_whole,
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/null"])
def test_readers_refuse_what_is_no_regular_file(what, kind, tmp_path):
    """A pipe would block, and a device never end."""
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / kind
    with pytest.raises(ValueError, match="must be a regular file") as caught:
        READERS[what](path)
    assert str(path) in str(caught.value)


def test_readers_refuse_endless_files(tmp_path):
    """A file that pretends to have more than memory is refused by its size alone."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for what in ("placement", "topology", "cost model", "whole"):
        with pytest.raises(ValueError, match="must have at most"):
            READERS[what](path)


def test_texts_are_read_from_files(tmp_path, monkeypatch):
    """The texts of a collection, too, are no pipe and have no endless line."""
    pytest.importorskip("torch")
    collect = pytest.importorskip("moetuner.torch.collect")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="must be a regular file"):
        next(collect.read_texts(tmp_path / "fifo"))
    (tmp_path / "line").write_text("0123456789")
    monkeypatch.setattr(collect, "LONGEST_TEXT", 8)
    with pytest.raises(ValueError, match="line 1: must have at most 8 bytes"):
        next(collect.read_texts(tmp_path / "line"))


def test_control_characters_are_not_shown():
    """What a terminal would obey, or breaks a line or turns its direction, is a question mark."""
    for bad in "\x1b\x07\x9b\r\n\u202e\udcff\x7f":
        assert clean(f"a{bad}b") == "a?b"
        assert bad not in printable(f"a{bad}b")
        assert name(f"a{bad}b") == "a?b"
    assert clean("  ä -> 漢") == "  ä -> 漢"
    assert len(printable("word " * 10_000)) == 303
    assert len(printable("x" * 10_000)) == 59
    assert printable("/folder" * 30) == "/folder" * 30
    assert (len(name("x" * 500)), name("a" * 100 + "z")[-1]) == (59, "z")


def test_names_do_nothing_to_a_terminal(run, brief, tmp_path, monkeypatch):
    """Escape sequences in names of files, groups and models reach neither output."""
    monkeypatch.chdir(tmp_path)
    path, sequence, seen = f"t{ESCAPE}.safetensors", np.arange(80) // 4, ""
    labels = {"sequence": sequence, "group": sequence % 2, "model": f"m{ESCAPE}" + "long" * 100}
    names = [f"g{ESCAPE}", "long" * 100]
    ids = random_ids(80, 2, 2, 8)
    trace_of(ids, group_names=names, **labels).save(path)
    for command in (
        ("inspect", path),
        ("solve", path, "--devices", 2, "--method", "lpt", "--out", f"p{ESCAPE}.json"),
        ("evaluate", f"p{ESCAPE}.json", path),
        ("evaluate", f"p{ESCAPE}.json", path, "--by-group"),
        ("solve", path, "--devices", 2, "--method", f"x{ESCAPE}"),
        (f"x{ESCAPE}",),
        ("inspect", f"missing{ESCAPE}"),
        ("solve", path, "--devices", 2, "--groups", f"x{ESCAPE}=2"),
    ):
        _, out, err = run(*command)
        seen += out + err
        assert max(map(len, (out + err).splitlines())) < 1100
    assert not [bad for bad in ("\x1b", "\x07", "long" * 30) if bad in seen]
    assert "red" in seen


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict"])
def test_paths_of_any_bytes(trace, tmp_path, encoding):
    """Paths that are not UTF-8 can be read and written, on terminals that know only ASCII too."""
    folder = os.fsencode(tmp_path)
    source, out = folder + b"/t\xff\xe4.safetensors", folder + b"/p\xff.json"
    trace.rename(os.fsdecode(source))
    environment = {**ASCII, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "moetuner", "solve", source, "--devices", "2"]
    command += ["--method", "contiguous", "--out", out, "--json", folder + b"/j\xff.json"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert mt.Placement.load(os.fsdecode(out)).devices == 2
    assert json.loads((tmp_path / os.fsdecode(b"j\xff.json")).read_text())["method"] == "contiguous"


def test_json_files_are_utf8_in_any_locale(tmp_path):
    """A name in another alphabet is read alike where the locale knows only ASCII."""
    machine = tmp_path / "machine.json"
    machine.write_text('{"devices": 2, "name": "bücher"}', encoding="utf-8")
    program = "import moetuner, sys; print(ascii(moetuner.Topology.load(sys.argv[1]).name))"
    command = [sys.executable, "-c", program, machine]
    done = subprocess.run(command, capture_output=True, env=ASCII, check=True)
    assert done.stdout.strip() == b"'b\\xfccher'"
