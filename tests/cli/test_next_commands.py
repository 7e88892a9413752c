"""What advise prints to be run next: every command runs, and shows the figure that was judged."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
from make import in_turns, random_ids, trace_of

import moetuner as mt
from moetuner.placement import blocks

# Options of advise, for a trace unless they name another input, and for its future if they say so.
CASES = """
--devices 4
--devices 4 --devices-per-node 2 --for vllm --copies 0,1 --seed 3 --initial eplb:4
--devices 4 --for sglang --copies 0,1 --initial round_robin --cost-model a100:1024x512 --any-order
--devices 4 --for megatron --only first --only second
--devices 4 --regime follow --window 100 --initial running.json
--devices 4 --window 100 --initial placement.json
--topology machine.json --arrival mixed --copies 1 --cost-model a100:1024x512
--devices 3 --split round_robin --objective balance --cost-model a100:1024x512 --unseen FUTURE
--devices 4 --for vllm --load
--devices 4 --objective traffic --prefill-share 0.5 --long
--devices 4 --long
--devices 4 --window 512 --long --quiet
"""
RUNNING = ("running.json", "placement.json")
WAITING = ("MODEL", "MORE", "NEWER")


def recorded(tokens, seed=0):
    """Trace of two groups whose tokens choose one of four pairs of experts that lie apart."""
    rng = np.random.default_rng(seed)
    sequence = np.arange(tokens) // 50
    pair = rng.choice(4, size=(tokens, 2), p=[0.4, 0.3, 0.2, 0.1])
    pair[sequence % 2 == 1, 1] = 0
    ids = np.stack([pair, pair + 4], axis=2)
    labels = {"sequence": sequence, "group": sequence % 2, "group_names": ["first", "second"]}
    return trace_of(ids, **labels)


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_every_next_command_shows_what_was_judged(ok, as_json, brief, tmp_path, monkeypatch, case):
    """A report of the placement that the printed commands compute has the gain of the headline."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    file, tokens = "trace.safetensors", 33_000 if "--long" in case else 4000
    recorded(tokens).save(file)
    recorded(1000, seed=1).save("FUTURE")
    running = in_turns(2, 8, 4)
    for name in RUNNING:
        running.save(name)
    (tmp_path / "machine.json").write_text('{"devices": 4, "devices_per_node": 2}')
    if "--load" in case:
        # A sequence of each group in every window: windows of one group would take turns.
        load = mt.RoutingStatistics.from_trace(recorded(4000), window=100).window_load
        file = "load.npz"
        np.savez(file, load=20 * load)
    options = [word for word in case.split() if word not in ("--load", "--long")]
    advice = as_json("advise", file, "--splits", 1, "--copies", 0, *options)
    assert advice["answer"] == "worth a trial", advice["reasons"]
    gains = [of["whole"]["predicted_layer_us"]["gain"] for of in advice["judged"]]
    commands = [shlex.split(line, comments=True) for line in advice["commands"]]
    own = [words[1:] for words in commands if words[0] == "moetuner"]
    assert {"solve", "evaluate"} <= {words[0] for words in own}
    for words in own:
        assert "--quiet" not in words  # it is for this output
        if words[0] == "evaluate":
            shown = as_json(*words)
            before, after = (of["predicted_layer_us"] for of in (shown["running"], shown))
            assert 1 - after / before == pytest.approx(max(gains), abs=1e-9)
        elif not any(waiting in words for waiting in WAITING):
            ok(*words)
    # What runs is compared with, so no command writes over it.
    assert RUNNING[1] not in case or mt.Placement.load(RUNNING[1]) == running


@pytest.mark.parametrize("running", ["contiguous", *RUNNING])
def test_the_audit_of_groups_that_lose_runs_as_it_is_printed(
    ok, as_json, brief, tmp_path, monkeypatch, running
):
    """Advice names groups that are slower, and the command beside them shows the same losses."""
    monkeypatch.chdir(tmp_path)
    group = (np.arange(6000) // 50 % 5 == 4).astype(int)
    liked = np.stack([np.linspace(2, 0, 8), np.tile([2.0, 0.0], 4)])
    ids = random_ids(6000, 3, 2, 8, liking=liked[group][:, None])
    trace_of(ids, length=50, group=group, group_names=["many", "few"]).save("mine.safetensors")
    for name in RUNNING:
        blocks(3, 8, 4).save(name)
    words = ["mine.safetensors", "--devices", 4, "--copies", 0, "--splits", 1, "--window", 512]
    advice = as_json("advise", *words, "--cost-model", "h100:7168x2048", "--initial", running)
    (loss,) = (warning for warning in advice["warnings"] if warning.startswith("Slower in"))
    command = loss.partition("To repeat: moetuner ")[2].rstrip(".")
    for line in advice["commands"]:
        name, *others = shlex.split(line, comments=True)
        if name == "moetuner" and others[0] == "solve":
            ok(*others)
    much = loss.partition("few (")[2].partition(" %)")[0]
    judged = as_json(*shlex.split(command))["judgement"]
    assert {"group": "few", "measure": "predicted_layer_us"} in judged["worse"]
    assert f"{-100 * judged['groups']['few']['predicted_layer_us']['gain']:.1f}" == much


RECORDERS = {
    "vllm": "--enable-return-routed-experts",
    "sglang": "--expert-distribution-recorder-mode per_token",
    "tensorrt-llm": "EXPERT_STATISTIC_PATH=MORE",
    "megatron": "--moe-routing-trace-path MORE",
}


@pytest.mark.parametrize("engine", [*RECORDERS, None])
def test_what_to_record_is_the_engine_s_own_way(as_json, brief, tmp_path, monkeypatch, engine):
    """Where evidence is missing, the engine's recorder comes next, with a group for every file."""
    monkeypatch.chdir(tmp_path)
    short = recorded(60)
    short.save("trace.safetensors")
    chosen = [] if engine is None else ["--for", engine]
    words = ["--devices", 4, "--copies", 0, "--splits", 1]
    advice = as_json("advise", "trace.safetensors", *words, *chosen, "--only", "first")
    assert advice["answer"] == "not enough evidence"
    record, again = advice["commands"]
    if engine is None:
        assert record.startswith("moetuner collect MODEL")
    else:
        assert RECORDERS[engine] in record
        assert "moetuner collect" not in record
        assert again.startswith("moetuner advise MORE")
        assert "--group-by files" in again
    assert ("--only first" in again) == (engine is None)


@pytest.mark.parametrize("engine", ["vllm", None])
@pytest.mark.parametrize("tokens", [60, 4000])
def test_names_of_one_recording_are_not_those_of_another(
    as_json, brief, tmp_path, monkeypatch, engine, tokens
):
    """--group-by FILE names sequences of INPUT: what is recorded next has a file of its own."""
    monkeypatch.chdir(tmp_path)
    replace(recorded(tokens), group=None).save("trace.safetensors")
    names = ["first", "second"] * 40
    (tmp_path / "mine.csv").write_text("\n".join(["kind", *names[: -(-tokens // 50)]]) + "\n")
    words = ["--devices", 4, "--copies", 0, "--splits", 1, "--price", 0.9, "--window", 512]
    chosen = [] if engine is None else ["--for", engine]
    words += ["--group-by", "mine.csv:kind", *chosen]
    advice = as_json("advise", "trace.safetensors", *words)
    assert advice["answer"] == ("not enough evidence" if tokens == 60 else "not now")
    name = "MORE" if tokens == 60 else "NEWER"
    other = "files" if tokens == 60 and engine else f"{name}.csv:kind"
    assert f"moetuner advise {name} --group-by {other} " in advice["commands"][-1]


def test_a_recording_tells_its_engine(as_json, brief, tmp_path, monkeypatch):
    """What an engine recorded is recorded again by that engine, without --for."""
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).random((30, 2, 8)).argsort(axis=2)[..., :2]
    np.savez("routed.npz", *[ids[:10], ids[10:20], ids[20:]])
    words = ["--num-experts", 8, "--devices", 4, "--copies", 0, "--splits", 1]
    record, _ = as_json("advise", "routed.npz", *words)["commands"]
    assert record.startswith("vllm serve MODEL --tensor-parallel-size 4")
    assert RECORDERS["vllm"] in record
