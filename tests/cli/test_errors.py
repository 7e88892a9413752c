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
inspect . | ids.npy: --num-experts is needed
inspect junk.txt | junk.txt
inspect ids.npy | --num-experts is needed
inspect TRACE --only 3 | '--only': INPUT has no group '3'
solve TRACE --devices 2 --groups 11=1 | Did you mean 1?
solve TRACE --devices 2 --risk 0.5 --time-limit soon | '--time-limit': 'soon' is not a number
solve TRACE --devices 4 --devices-per-node 3 | must divide
solve TRACE --devices 4 --method magic | got 'magic'
solve TRACE --devices 4 --out no/p.json | 'no' does not exist
solve TRACE --devices 4 --out . | is a directory
solve TRACE --topology junk.txt | must be a JSON object or TOML
compare TRACE --devices 4 --holdout nan | nan is not a number
compare TRACE --devices 4 --methods '' | must be some of
compare TRACE --devices 4 --baseline eblp | got 'eblp'. Did you mean eplb?
compare LOAD --devices 4 --window 64 | window must be left out
compare LOAD --devices 4 --objective speed | 'speed' is not one of
solve LOAD --devices 4 --move-budget 1 | needs '--initial'
solve LOAD --devices 2 --initial p.json | p.json: placement must have 2 devices like the topology
inspect TRACE --num-experts 9 | num_experts must be 8, got 9
inspect x-axes.npy --num-experts 8 | axes must be [tokens, layers, top_k], got 300 layers
inspect x-axes.npy --num-experts 8 | or if it is meant, say --hidden-layers 300
inspect x-last.npy --num-experts 8 | got 2 layers of top-3, whose experts repeat: swap axes
advise x-map.yaml --devices 4 | must be recorded routing, got a placement: the YAML of TensorRT-LLM
evaluate x-long.json TRACE | x-long.json: --devices must be given
evaluate x-map.yaml TRACE --devices 4 | layer 1: expert 0 is in every slot
evaluate x-zeros.json TRACE --devices 4 | x-zeros.json: row 0: expert 0 is in every slot
evaluate x-long.json TRACE --devices 4 | must have 3 layers like INPUT, got 4: if 1 of them
evaluate x-counts.json TRACE | not a placement but recorded routing, to be given as INPUT
export p.json --to moves --out m.json | '--to moves' needs '--initial'
evaluate TRACE TRACE | not a placement
evaluate p.json TRACE --cost-model tpu | must be a file or one of a100
evaluate p.json TRACE --cost-model h10:64x64 | Did you mean h100?
evaluate p.json TRACE --cost-model h100:big | sizes must be as in h100:4096x1024, got 'big'
evaluate p.json TRACE --cost-model junk.txt | not a cost model
export junk.txt --to eplb --out x.npz | junk.txt: not a placement
convert TRACE --out t.npz | must end in .safetensors, got 't.npz'
convert --out t.safetensors | Missing argument 'SOURCE...'
convert z.gz --num-experts 16 --out t.safetensors | not be compressed: unpack it with gunzip first
convert z.json --num-experts 16 --out t.safetensors | --enable-return-routed-expert
convert z.csv --num-experts 16 --out t.safetensors | or what an engine records; its first bytes
convert TRACE LOAD --out t.safetensors | sources must all be traces or all be counts
solve TRACE --for megatron --devices 3 | 2 or 4 would
solve TRACE --for vllm --devices 4 --extra-slots 5 | got 5: 0 or 12 would
solve TRACE --for vllm --devices 4 --slots-per-device 1 | --slots-per-device must be
solve TRACE --for vllm --devices 2 --slots-per-device 4,5 | 5 on every device would
solve TRACE --for vllm --devices 4 --router-groups 4 | vLLM does not
solve TRACE --devices 4 --router-groups 4 | needs '--for'
solve TRACE --for deepspeed --devices 4 --router-groups 8 | (moetuner.router_groups.merge
solve TRACE --for nobody --devices 4 | 'nobody' is not one of
solve TRACE --devices 4 --topology h100 | Did you mean h100-nvl8-ib400?
solve TRACE --devices 2 --slots-per-device 1 | --slots-per-device must be at least 4
solve TRACE --devices 2 --groups none=1 | --groups names 'none'
solve TRACE --devices 2 --risk 1 | --risk must be
solve LOAD --devices 4 --expert-bytes inf --initial p.json | '--expert-bytes': must be a finite
solve TRACE --devices 4 --method jont | Did you mean joint?
compare TRACE --devices 4 --methods ebpl | Did you mean eplb?
solve TRACE --devices 4 --initial epbl:4 | Did you mean eplb?
advise LOAD --devices 4 --unseen TRACE | --unseen must be counts like traffic, got a trace
advise TRACE --devices 4 --report page.pdf | must end in .html
advise TRACE --devices 4 --report /nowhere/page.html | does not exist
advise TRACE --devices 4 --devics 4 | Did you mean
drift p.json TRACE | Missing option '--profile'
drift p.json TRACE --profile LOAD --seed 0 | more sequences or windows: profile has 6 independent
drift other.json TRACE --profile LOAD | other.json: placement must have 3 layers
fit --out c.json | Missing option '--model' (or '--hidden' and '--intermediate')
fit --times z.csv --out c.json | Missing option '--model' (or '--hidden')
fit --times z.csv --model mixtral-8x7 --out c.json | Did you mean mixtral-8x7b?
fit --times z.csv --hidden 64 --out c.json | z.csv: line 2: must be tokens,experts,microseconds
evaluate p.json TRACE --fail-if-worse nan | '--fail-if-worse'
evaluate other.json TRACE | other.json: placement must have 3 layers
evaluate p.json TRACE --baseline other.json | other.json: placement must have 3 layers
inspect p.json --window 64 | '--window' is for recordings
inspect TRACE --expert-bytes 9 | '--expert-bytes' is for two placements
inspect p.json other.json x-map.yaml | must be one placement, or two to compare, got 3 files
convert TRACE --from npz --out t.safetensors | must be npz as --from says, got safetensors
export p.json --to eplb --out x.npz --model gpt-oss-20b | No such option '--model'.
inspect p.json other.json | 8 experts as p.json, got 1 layer, 2 devices, 8 experts
export p.json --to eblp --out x.npz | Did you mean eplb?
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
    np.save(at / "ids.npy", np.zeros((4, 2, 1), dtype=np.uint8))
    (at / "z.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (at / "z.json").write_text('{"choices": [{"text": "a", "finish_reason": "stop"}]}')
    (at / "z.csv").write_text("a,b\n1,2\n")
    (at / "junk.txt").write_text("junk")
    np.save(at / "x-axes.npy", ids.swapaxes(0, 1))
    np.save(at / "x-last.npy", ids[:, :, :2].swapaxes(1, 2))
    of_layers = f"0: {[*range(8)]}\n  1: {[0] * 8}\n  2: {[*range(8)]}\n"
    (at / "x-map.yaml").write_text(f"num_slots: 8\ninitial_global_assignments:\n  {of_layers}")
    for name, rows in (("zeros", [[0] * 8] * 3), ("long", [[*range(8)]] * 4)):
        (at / f"x-{name}.json").write_text(json.dumps({"physical_to_logical_map": rows}))
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
