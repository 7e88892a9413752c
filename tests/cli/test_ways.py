"""Ways through the package: every command on every kind of input, and every option with some kind.

Each run ends well, or in one line that says what does not go together: never in a bug, a warning
or a word that only a program says. What commands print, tests/transcripts has in full, with most
options; answers of searches are those of bench/scorecard.json.
"""

import os
import re
import shlex
import warnings
from pathlib import Path

import make
import numpy as np
import pytest

import moetuner as mt
from moetuner.cli import moetuner
from moetuner.solver import METHODS

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
# Commands as they are run, INPUT left open.
BEGIN = {
    "inspect": "inspect INPUT",
    "advise": "advise INPUT --devices 4 --copies 0 --splits 1",
    "solve": "solve INPUT --devices 4 --out out.json",
    "compare": "compare INPUT --devices 4 --methods lpt,joint --splits 1",
    "evaluate": "evaluate PLACEMENT INPUT",
    "drift": "drift PLACEMENT INPUT --profile TRACE",
    "plan": "plan COPIES INPUT --with 1 --out more.json",
    "convert": "convert INPUT --out joined.safetensors",
    "verify": "verify PROOF INPUT --devices 4",
}
# Options, each of which the commands that have it try in turns: they are declared once for all.
OPTIONS = f"""
--for vllm
--for sglang
--for tensorrt-llm
--for vllm-ascend
--for megatron
--for deepspeed
--for transformers
--cost-model a100
--cost-model h100:64x32
--cost-model a800-measured
--regime follow
--split nearest
--arrival mixed
--arrival 0.5
--model mixtral-8x7b
--weight-bits 4.25
--window 64
--tokens-per-step 16 --top-k 2
--only a
--group-by files
--num-experts 8
--hidden-layers 2 --dense-layers none
--devices 4 --devices-per-node 2
--topology MACHINE
--prefill-share 0.3
--seed 3
--threads 1
--objective balance
--objective traffic
--slots-per-device 3
--slots-per-device 2,2,3,3
--extra-slots 2
--extra-slots 4 --fill-slots
--max-imbalance 1.2
--risk 0.5
--risk 0.9 --groups minimax
--groups a=1
--pin 0:1:2
--survive device --slots-per-device 6
--forbid *:1:2
--for megatron --router-groups 2
--effort thorough
--effort brief
--time-limit 0.01
--holdout 0
--initial PLACEMENT
--initial COPIES --slots-per-device 3
--initial COPIES --for vllm
--initial PLACEMENT --move-budget 3e5 --expert-bytes 1e5
--initial PLACEMENT --move-cost 1
--initial PLACEMENT --pareto --report page.html
--objective traffic --max-imbalance 2 --certificate proof.json
--method exflow
--method paper --slots-per-device 3
--methods {",".join(METHODS)}
--splits 2 --baseline lpt
--waterfill 1
--waterfill 2 --top-k 2
--by-group
--by-group --waterfill 0.5
--by-group --measure imbalance
--measure fanout --fail-if-gain-below 1
--fail-if-worse 1
--mixed-seed 4
--baseline COPIES --by-group
--report page.html
--report page.html --expert-bytes 1e6
--copies 0,1,2,4 --splits 3
--any-order
--price 0.5
--unseen NEWER
--unseen LOADS
--unseen STATISTICS
--fail-if-drift
--profile LOADS
--profile STATISTICS
--fewer 1
--without 0 --more-copies 2
--steps steps.json --expert-bytes 10
--from auto
--placement COPIES
--kv-bytes 1e5 --device-memory 80e9 --expert-bytes 1e6
--retire 0
--step-ms 2,9
--devices 4 --devices-per-node 3,1
"""
# Options that no line above has, nor a transcript of their command.
ELSEWHERE = {"--quiet": "test_output", "--figures": "needs a browser", "--json": "transcripts"}
KINDS = ("trace.safetensors", "plain.safetensors", "counted-trace.safetensors", "load-groups.npz")


def trace(tokens=480, *, groups=("a", "b", "c", "none of it"), model=None, **options):
    """Make a trace of two layers, with what labels are wanted."""
    return make.trace(tokens, 2, length=20, groups=groups, model=model, **options)


def write_inputs(folder):
    """Write files of every kind to a folder, and return the names of those that are INPUT."""
    load = np.random.default_rng(0).poisson(np.linspace(90, 10, 8), (20, 2, 8))
    idle, group = np.where(np.arange(20)[:, None, None] == 3, 0, load), np.arange(20) % 2
    traces = {
        "trace": trace(),
        "newer": trace(seed=1),
        "plain": trace(sequences=False, groups=None, model="mixtral-8x7b"),
        "groups": trace(sequences=False),
        "window": trace(40),
        "few": trace(3, groups=None),
        "one": trace(1, groups=None),
        "none": trace(0, sequences=False, groups=None),
    }
    for name, of in traces.items():
        of.save(folder / f"{name}.safetensors")
        if name in ("trace", "plain", "window"):
            how = {"window": 100, "sets": name == "trace", "by_group": of.group is not None}
            counted = mt.RoutingStatistics.from_trace(of, **how)
            counted.save(folder / f"counted-{name}.safetensors")
    mt.RoutingTrace.concat(map(mt.count, (traces["trace"], traces["newer"]))).save(
        folder / "counts.safetensors"
    )
    tables = {
        "load": {"load": load},
        "later": {"load": load[::-1].copy()},
        "load-groups": {"load": load, "group": group, "group_names": np.array(["a", "y"])},
        "load-model": {"load": load, "model": np.array("gpt-oss-20b")},
        "load-one": {"load": load[:1]},
        "load-two": {"load": load[:2]},
        "load-idle": {"load": idle},
        "load-zero": {"load": 0 * load},
    }
    for name, arrays in tables.items():
        np.savez(folder / f"{name}.npz", **arrays)
    np.save(folder / "flat.npy", 3 * load[0])
    return [
        *(f"{name}.safetensors" for name in traces),
        *(f"counted-{name}.safetensors" for name in ("trace", "plain", "window")),
        "counts.safetensors",
        *(f"{name}.npz" for name in tables),
        "flat.npy",
        "trace.safetensors newer.safetensors",
        "load.npz later.npz",
    ]


NAMES = {
    "PLACEMENT": "placement.json",
    "COPIES": "copies.json",
    "PROOF": "proof.json",
    "MACHINE": "machine.json",
    "TRACE": "trace.safetensors",
    "NEWER": "newer.safetensors",
    "LOADS": "later.npz",
    "STATISTICS": "counted-trace.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with files of every kind, and what else commands read; names of INPUT."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    folder = tmp_path_factory.mktemp("ways")
    names = write_inputs(folder)
    make.in_turns(2, 8, 4).save(folder / "placement.json")
    copies = [[0, 1, 2], [2, 3, 0], [4, 5, 0], [6, 7, 1]]
    mt.Placement([copies] * 2).save(folder / "copies.json")
    (folder / "machine.json").write_text('{"devices": 4, "devices_per_node": 2}')
    how = {"objective": "traffic", "max_imbalance": 2}
    problem = mt.Problem(trace(), mt.Topology(4), **how)
    mt.solve(problem, iterations=100).certificate.save(folder / "proof.json")
    return folder, names


@pytest.fixture
def inputs(folder, brief, monkeypatch):
    """Work in the folder, and give the names of INPUT."""
    monkeypatch.chdir(folder[0])
    return folder[1]


def options_of(command):
    """Return the names of a command's options."""
    return {name for item in moetuner.commands[command].params for name in item.opts}


def check_run(run, line):
    """Run a line; it ends well, or in one line of what is wrong, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, out, err = run(*(NAMES.get(word, word) for word in line.split()))
    assert "this is a bug" not in err, f"{line}: {err}"
    assert status in (0, 2, 3), f"{line}: {status} {err}"
    if status == 2:
        assert re.fullmatch(r"moetuner: error: [^\n]+\n", err), f"{line}: {err}"
    else:
        assert err == "", f"{line}: {err}"
    strange = re.search(r"\b(None|nan|NaN|inf|Traceback)\b", out)
    assert strange is None, f"{line}: {out}"
    return status


def find_answered(run, line, names):
    """Run a line on inputs, and return those that it has an answer for."""
    return [name for name in names if check_run(run, line.replace("INPUT", name)) != 2]


@pytest.mark.parametrize(
    "line", [line.replace("--copies 0", "--copies 0,1") for line in BEGIN.values()]
)
def test_every_command_on_every_kind_of_input(run, inputs, line):
    """What a proof or a profile is of is one kind; all else takes traces and load tables.

    Copies may lose on any kind, which advice tells in other words.
    """
    answered = find_answered(run, line, inputs)
    assert line.split()[0] in ("drift", "verify") or {KINDS[0], "load.npz"} <= {*answered}


def list_ways():
    """Give options with a command that has them, each command in its turn."""
    for number, line in enumerate(OPTIONS.strip().splitlines()):
        names = {word for word in line.split() if word.startswith("--")}
        able = [command for command in BEGIN if names <= options_of(command)]
        assert able, f"no command has all of {line}"
        yield line, able[number % len(able)]


@pytest.mark.parametrize(("line", "command"), [*list_ways()])
def test_every_option_on_some_kind_of_input(run, inputs, line, command):
    """On a trace and on another kind; some options are of one kind alone.

    Prefill wants more tokens than any has here. The thorough profile tries all kinds.
    """
    other = inputs[len(line) % len(inputs)]
    names = inputs if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else {KINDS[0], other}
    way = f"{BEGIN[command]} {line}"
    answered = find_answered(run, way, names) or find_answered(run, way, {*KINDS} - {*names})
    assert answered or "--prefill-share" in line or command in ("drift", "verify")


def test_every_option_is_tried():
    """A new one has a line here, or a command of a transcript that ends well."""
    tried = {word for line in [*BEGIN.values(), OPTIONS] for word in line.split()} | {*ELSEWHERE}
    shown = {name: set() for name, command in moetuner.commands.items() if not command.hidden}
    for page in TRANSCRIPTS.glob("*.md"):
        for part in page.read_text().split("\n$ moetuner ")[1:]:
            line, _, output = part.partition("\n")
            command, *words = shlex.split(line)
            if command in shown and "\nexit status 2" not in output.partition("```")[0]:
                shown[command].update(words)
    for command in BEGIN:
        missing = {name for name in options_of(command) if name[:2] == "--"} - tried
        assert not missing - shown[command], f"{command}: {missing - shown[command]}"
