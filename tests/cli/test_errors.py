"""Everything that goes wrong is one line: the option or file, and what would be right."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner import cli
from moetuner.cli import drift, evaluate
from moetuner.placement import blocks

# A command, and what its error says; tests/transcripts/refusals.md has others, which write no file.
# TRACE and LOAD are files of a small trace and a load table.
WRONG = """
solve TRACE --devices 2 --groups 11=1 | Did you mean 1?
solve TRACE --topology junk.txt | must be a JSON object or TOML
compare TRACE --devices 4 --holdout nan | nan is not a number
compare TRACE --devices 4 --methods '' | must be some of
compare TRACE --devices 4 --baseline eblp | got 'eblp'. Did you mean eplb?
solve LOAD --devices 2 --initial p.json | p.json: placement must have 2 devices like the topology
inspect x-axes.npy --num-experts 8 | or if it is meant, say --hidden-layers 300
inspect x-last.npy --num-experts 8 | got 2 layers of top-3, whose experts repeat: swap axes
advise x-map.yaml --devices 4 | must be recorded routing, got a placement: the YAML of TensorRT-LLM
evaluate x-map.yaml TRACE --devices 4 | layer 1: expert 0 is in every slot
evaluate x-counts.json TRACE | not a placement but recorded routing, to be given as INPUT
evaluate p.json TRACE --cost-model h10:64x64 | Did you mean h100?
convert TRACE --out t.npz | must end in .safetensors, got 't.npz'
convert z.csv --num-experts 16 --out t.safetensors | or what an engine records; its first bytes
solve TRACE --for vllm --devices 4 --slots-per-device 1 | --slots-per-device must be
solve TRACE --for vllm --devices 2 --slots-per-device 4,5 | 5 on every device would
solve TRACE --for deepspeed --devices 4 --router-groups 8 | (moetuner.router_groups.merge
solve TRACE --devices 4 --topology h100 | Did you mean h100-nvl8-ib400?
solve LOAD --devices 4 --expert-bytes inf --initial p.json | '--expert-bytes': must be a finite
compare TRACE --devices 4 --methods ebpl | Did you mean eplb?
solve TRACE --devices 4 --initial epbl:4 | Did you mean eplb?
drift p.json TRACE --profile LOAD --seed 0 | more sequences or windows: profile has 6 independent
fit --out c.json | Missing option '--model' (or '--hidden' and '--intermediate')
fit --times z.csv --model mixtral-8x7 --out c.json | Did you mean mixtral-8x7b?
evaluate other.json TRACE | other.json: placement must have 3 layers
inspect p.json --window 64 | '--window' is for recordings
inspect TRACE --expert-bytes 9 | '--expert-bytes' is for two placements
inspect p.json other.json x-map.yaml | must be one placement, or two to compare, got 3 files
export p.json --to eblp --out x.npz | Did you mean eplb?
plan p.json LOAD --without x | device numbers and ranges of them
plan p.json LOAD --without 0-2 | at least 4 devices of 2 slots, or --slots-per-device=8, got 1
plan p.json LOAD --every-loss node --table t.json | no loss of a node
evaluate p.json LOAD --without 0-3 | --without must leave
"""
CASES = [tuple(line.split(" | ")) for line in WRONG.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with files that are right, and some that are not."""
    at = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    sequence = np.arange(300) // 10
    ids = np.argsort(random.random((300, 3, 8)), axis=2)[:, :, :2]
    trace = trace_of(ids, sequence=sequence, group=sequence % 2)
    trace.save(at / "trace.safetensors")
    load = random.integers(0, 100, (6, 3, 8))
    np.savez(at / "load.npz", load=load, group=np.arange(6) % 2, group_names=np.array(["a", "b"]))
    (at / "z.csv").write_text("a,b\n1,2\n")
    (at / "junk.txt").write_text("junk")
    np.save(at / "x-axes.npy", ids.swapaxes(0, 1))
    np.save(at / "x-last.npy", ids[:, :, :2].swapaxes(1, 2))
    of_layers = f"0: {[*range(8)]}\n  1: {[0] * 8}\n  2: {[*range(8)]}\n"
    (at / "x-map.yaml").write_text(f"num_slots: 8\ninitial_global_assignments:\n  {of_layers}")
    (at / "x-counts.json").write_text(json.dumps({"logical_count": [[0] * 8] * 3}))
    blocks(3, 8, 4).save(at / "p.json")
    mt.Placement([[[0, 1, 2, 3], [4, 5, 6, 7]]]).save(at / "other.json")
    return at


@pytest.mark.parametrize(("command", "words"), CASES)
def test_errors_are_one_line(run, folder, monkeypatch, command, words):
    """Status 2, nothing on standard output, one line that says what is wrong, no file written."""
    monkeypatch.chdir(folder)
    files = sorted(folder.iterdir())
    names = {"TRACE": "trace.safetensors", "LOAD": "load.npz"}
    words = words.replace("TRACE", names["TRACE"]).replace("LOAD", names["LOAD"])
    status, out, err = run(*(names.get(word, word) for word in shlex.split(command)))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"moetuner: error: [^\n]+\n", err)
    assert words in err
    assert err.count("Did you mean") <= 1
    assert sorted(folder.iterdir()) == files


PANIC = "the core panicked at rust/x.rs:1:2: of\nno use"


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyError("expert"), "KeyError: 'expert'"), (RuntimeError(PANIC), "rust/x.rs:1:2: of no use")],
)
def test_unforeseen_errors_are_one_line_too(run, folder, monkeypatch, error, words):
    """A bug, of Python or the core, is reported as one, without a traceback."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("moetuner.cli.inspect.structure", fail)
    status, out, err = run("inspect", folder / "trace.safetensors")
    assert (status, out, err.count("\n")) == (os.EX_SOFTWARE, "", 1)
    assert f"{words}; this is a bug in moetuner" in err


def test_every_status_has_a_row():
    """docs/status.md has those that the command line gives, and no others."""
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    rows = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    own = {cli.WRONG, cli.BUG, cli.INTERRUPTED, cli.GONE, evaluate.FAILED, drift.DRIFTED}
    # Done, Python's own, and the signal that is not Ctrl-C.
    assert rows == own | {0, 1, 128 + signal.SIGTERM}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "'--out': File 'placement.json' is a directory\n"),
        ("--out p.json --report f/a.html", "'f' is not writable\n"),
        ("--out p.json --report a.html", "is a directory\n"),
        ("--out p.json --json a.html", "is a directory\n"),
    ],
)
def test_what_cannot_be_written_is_no_choice(run, folder, tmp_path, monkeypatch, more, words):
    """Where a file cannot be written, given or by default, no other name is proposed."""
    monkeypatch.chdir(tmp_path)
    for name in ("placement.json", "a.html", "f"):
        (tmp_path / name).mkdir()
    access = os.access

    def refused(path, mode):  # root may write everywhere
        return Path(path).name != "f" and access(path, mode)

    monkeypatch.setattr("os.access", refused)
    status, _, err = run(
        "solve", folder / "trace.safetensors", "--devices", 2, *more.split(), "--method", "lpt"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert err.endswith(words)
