"""Every command on every kind of input, with the options that its help and the README name.

Each run ends well, or in one line that says what does not go together: never in a bug, a warning
or a word that only a program says. Searches are short, as they are not what is asked about.
"""

import os
import re
import warnings
from pathlib import Path

import make
import numpy as np
import pytest

import moetuner as mt
from moetuner.cli import moetuner
from moetuner.solver import METHODS

# How the traffic is served and read: options of every command that takes INPUT.
READING = """
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
"""
SEARCHING = """
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
"""
OWN = {
    "inspect": "--max-imbalance 1.1\n--devices 2",
    "advise": """
--copies 0,1
--copies 0,1,2,4 --splits 3
--initial round_robin
--initial eplb
--initial eplb:4
--initial PLACEMENT
--initial COPIES --for vllm
--expert-bytes 1e6
--price 0.5
--waterfill 1
--by-group
--by-group --report page.html
--any-order
--objective balance
--objective traffic
--time-limit 0.01
--report page.html
--unseen NEWER
--unseen LOADS
--unseen STATISTICS
""",
    "solve": f"""{SEARCHING}
--holdout 0.5 --report page.html
--for vllm --slots-per-device 3 --holdout 0.5
--initial PLACEMENT
--initial PLACEMENT --move-budget 3
--initial PLACEMENT --move-budget 3e5 --expert-bytes 1e5
--initial PLACEMENT --move-cost 1
--initial PLACEMENT --pareto --report page.html
--initial COPIES --slots-per-device 3
--objective traffic --max-imbalance 2 --certificate proof.json
"""
    + "".join(f"--method {name}\n--method {name} --slots-per-device 3\n" for name in METHODS),
    "compare": f"""{SEARCHING}
--methods {",".join(METHODS)}
--splits 2 --baseline lpt
--waterfill 1
--holdout 0 --report page.html
--initial PLACEMENT
--initial COPIES --slots-per-device 3
""",
    "evaluate": """
--baseline COPIES
--baseline COPIES --by-group
--mixed-seed 4
--waterfill 1
--waterfill 2 --top-k 2
--by-group
--by-group --waterfill 0.5
--fail-if-worse 1
--fail-if-gain-below 1
--by-group --measure imbalance
--measure fanout --fail-if-gain-below 1
--report page.html
--report page.html --expert-bytes 1e6 --baseline COPIES
""",
    "drift": "--fail-if-drift\n--fail-if-worse 1\n--profile LOADS\n--profile STATISTICS",
    "plan": """
--retire 1
--without 0 --more-copies 2
--steps steps.json --expert-bytes 10
""",
    "convert": "--from auto\n--top-k 2",
    "verify": "--placement COPIES",
}
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
# Commands without INPUT have a test of their own each.
OTHERS = {"demo", "collect", "export", "fit"}


def trace(tokens=480, *, groups=("a", "b", "c", "none of it"), model=None, **options):
    """Make a trace of two layers, with what labels are wanted."""
    return make.trace(tokens, 2, length=20, groups=groups, model=model, **options)


def write_inputs():
    """Write files of every kind, and return the names of those that are INPUT."""
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
        of.save(f"{name}.safetensors")
        if name in ("trace", "plain", "window"):
            how = {"window": 100, "sets": name == "trace", "by_group": of.group is not None}
            mt.RoutingStatistics.from_trace(of, **how).save(f"counted-{name}.safetensors")
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
        np.savez(f"{name}.npz", **arrays)
    np.save("flat.npy", 3 * load[0])
    return [
        *(f"{name}.safetensors" for name in traces),
        *(f"counted-{name}.safetensors" for name in ("trace", "plain", "window")),
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


@pytest.fixture
def inputs(run, brief, tmp_path, monkeypatch):
    """Folder with files of every kind, and what else commands read; names of INPUT."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    names = write_inputs()
    make.in_turns(2, 8, 4).save("placement.json")
    mt.Placement([[[0, 1, 2], [2, 3, 0], [4, 5, 0], [6, 7, 1]]] * 2).save("copies.json")
    Path("machine.json").write_text('{"devices": 4, "devices_per_node": 2}')
    how = ("--objective", "traffic", "--max-imbalance", 2, "--certificate", "proof.json")
    assert run("solve", "trace.safetensors", "--devices", 4, *how, "--out", "best.json")[0] == 0
    return names


def lines_of(command):
    """Return the command lines of a command, INPUT left open."""
    lines = [BEGIN[command]]
    has = {flag for of in moetuner.commands[command].params for flag in of.opts}
    for more in (READING + "\n" + OWN[command]).strip().splitlines():
        options = {word for word in more.split() if word.startswith("--")}
        if options <= has:
            lines.append(f"{BEGIN[command]} {more}")
    return lines


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


@pytest.mark.parametrize("command", BEGIN)
def test_every_command_on_every_kind_of_input(run, inputs, command):
    """Bare on each; with each of its options on a trace and another kind, in turns by command.

    How INPUT is read is declared once for all commands: each tries such options on one kind.
    """
    turn = [*BEGIN].index(command)
    trace, *others = (
        "trace.safetensors",
        "plain.safetensors",
        "counted-trace.safetensors",
        "load-groups.npz",
    )
    is_thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

    def answered_of(line, names):
        return [name for name in names if check_run(run, line.replace("INPUT", name)) != 2]

    for number, line in enumerate(lines_of(command)):
        # Copies may lose on any kind, which is told in other words.
        is_bare = line == BEGIN[command] or line.endswith("--copies 0,1")
        kinds = (others, inputs)[(number + turn) % 2]
        names = {kinds[(number + turn) // 2 % len(kinds)]}
        if line.removeprefix(f"{BEGIN[command]} ") not in READING.splitlines():
            names.add(trace)
        answered = answered_of(line, inputs if is_bare or is_thorough else names)
        # Some options are of one kind alone.
        answered = answered or answered_of(line, {trace, *others} - names)
        # What a proof or a profile is of is one kind; prefill wants more tokens than any has here.
        if command not in ("drift", "verify"):
            assert answered or "--prefill-share" in line, line
            assert not is_bare or {"trace.safetensors", "load.npz"} <= {*answered}


def test_every_option_is_in_the_table():
    """An option that is new is tried with every kind of input, or is named here with a reason."""
    elsewhere = {
        "--json": "test_json",
        "--quiet": "test_output",
        "--figures": "needs a browser",
        "--expert-bytes": "of inspect, for two placements: test_json",
        "--out": "in every line that needs it",
        "--running": "formats/test_tensorrt_llm",
        "--every-loss": "test_plan",
        "--table": "test_plan",
        "--without": "test_plan",
    }
    shown = {name for name, command in moetuner.commands.items() if not command.hidden}
    assert {*BEGIN} | OTHERS == shown
    for command in BEGIN:
        flags = {max(of.opts, key=len) for of in moetuner.commands[command].params}
        tried = {word for line in lines_of(command) for word in line.split()}
        missing = {flag for flag in flags if flag.startswith("--")} - tried - {*elsewhere}
        assert not missing, f"{command}: {missing}"


def test_the_readme_names_options_of_the_table():
    """Options that the README gives a command are among those that are tried."""
    text = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", " ")
    for command, more in re.findall(r"^moetuner ([a-z]+) ([^\n#]*)", text, re.MULTILINE):
        if command in BEGIN:
            tried = {word for line in lines_of(command) for word in line.split()} | {"--out"}
            named = {word for word in more.split() if word.startswith("--")}
            assert named <= tried, f"{command}: {named - tried}"
