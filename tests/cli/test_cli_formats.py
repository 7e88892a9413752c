"""The command line with engines' files: record, solve, load, check."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import moetuner as mt
from moetuner.cli.advise import _serving
from moetuner.cli.options.traffic import Source

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
RANKS = [GOLDEN / "sglang" / f"two-ranks-per_token-{rank}.pt" for rank in range(2)]


def test_three_commands(ok, tmp_path):
    """What SGLang recorded, solved for it, in its format, and found good."""
    trace, placement, out = (tmp_path / name for name in ("t.safetensors", "p.json", "m.json"))
    assert "95 tokens, 4 layers, 16 experts, top-4" in ok("convert", *RANKS, "--out", trace)
    text = ok(
        *("solve", trace, "--devices", 2, "--for", "sglang", "--slots-per-device", 9),
        *("--method", "eplb", "--out", placement),
    )
    line = next(line for line in text.splitlines() if line.startswith("For SGLang"))
    assert "split nearest (the nearest, as static dispatch with --moe-a2a-backend does), " in line
    assert "9 full slots on every device in every layer (18 slots, 2 of them redundant)" in line
    ok("export", placement, "--to", "sglang", "--dense-layers", "none", "--out", out)
    text = ok("export", "--check", out, "--devices", 2, "--num-experts", 16, "--hidden-layers", 4)
    assert "nothing is wrong with it for SGLang" in text
    assert mt.read_placement(out, devices=2) == mt.Placement.load(placement)


def test_input_is_whatever_was_recorded(ok, tmp_path):
    """Responses, a folder of dumps, a folder of load tables as the plugin writes them."""
    path = GOLDEN / "vllm" / "completions.json"
    text = ok("inspect", path, "--num-experts", 16, "--devices", 2)
    assert "95 tokens, 3 layers" in text
    assert "as options of export: --hidden-layers 4 --dense-layers 0\n" in text
    folder = tmp_path / "dumps"
    folder.mkdir()
    for rank in range(2):
        name = f"two-ranks-per_pass-{rank}.pt"
        (folder / name).write_bytes((GOLDEN / "sglang" / name).read_bytes())
    assert "12 windows, 4 layers" in ok("inspect", folder, "--devices", 2)
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    for process in (7, 8):
        np.savez(recorded / f"load-{process}-2x4.npz", load=np.ones((3, 2, 4), dtype=int))
    assert "6 windows, 2 layers, 4 experts" in ok("inspect", recorded, "--devices", 2)
    out = tmp_path / "counts.safetensors"
    ok("convert", recorded, "--out", out)
    assert mt.RoutingStatistics.load(out).windows == 6


def test_several_inputs_are_one(ok, run, tmp_path):
    """Files of all ranks may be given wherever a folder may; none of them twice."""
    placement, said = tmp_path / "p.json", tmp_path / "s.json"
    text = ok("solve", *RANKS, "--devices", 2, "--method", "eplb", "--out", placement)
    assert "two-ranks-per_token-0.pt and 1 more file: trace, 95 tokens" in text
    assert "95 tokens" in ok("evaluate", placement, *RANKS, "--json", said)
    of = json.loads(said.read_text())["input"]
    assert of["files"] == [str(path) for path in RANKS]
    advice = ok("advise", *RANKS, "--devices", 2, "--copies", 0)
    assert "moetuner advise MORE --group-by files --devices 2" in advice
    status, _, error = run("inspect", RANKS[0], RANKS[0], "--devices", 2)
    assert status == 2
    assert "must name every file once" in error


def test_engine_is_a_default(ok, make_trace, tmp_path):
    """Options win over it, and without it nothing is set."""
    trace, said = tmp_path / "t.safetensors", tmp_path / "s.json"
    make_trace(300).save(trace)
    about = (*("--devices", 4, "--method", "lpt", "--out", tmp_path / "p.json"), "--json", said)

    def settings(line, *names):
        ok("solve", trace, *about, *line.split())
        actual = json.loads(said.read_text())["settings"]
        return [actual[name] for name in names]

    assert settings("", "engine", "split", "arrival") == [None, "even", "bursts"]
    engine = "--for tensorrt-llm"
    wanted = ["round_robin", "mixed", True]
    assert settings(engine, "split", "arrival", "fill_slots") == wanted
    mine = settings(f"{engine} --split even --arrival 0.5", "split", "arrival", "regime")
    assert mine == ["even", 0.5, "dispatch"]
    text = ok("solve", trace, *about, "--for", "sglang", "--split", "even")
    assert "; from your options: split even." in text
    line = ("--devices", 4, "--for", "megatron", "--methods", "lpt", "--splits", 1)
    text = ok("compare", trace, *line)
    assert "For Megatron-Core: regime dispatch, arrival bursts, 2 slots on every device" in text


def test_maps_of_others_are_converted_and_checked(ok, run, tmp_path):
    """SGLang's own map becomes one of others; what is wrong is said, dense layers first."""
    given, said = GOLDEN / "sglang" / "expert_location.json", tmp_path / "said.json"
    for form, name in (("vllm-ascend", "a.json"), ("json", "c.json")):
        ok("export", given, "--devices", 2, "--to", form, "--out", tmp_path / name)

    def refused(*arguments):
        status, out, err = run("export", *arguments)
        assert status == 2
        return out, err

    layers = ("--hidden-layers", 5, "--dense-layers")
    out, err = refused("--check", tmp_path / "a.json", *layers, "0,3-4")
    assert "must have 2 rows, one for layers with experts only, got 4" in err
    assert "- must have 2 rows" in out
    _, err = refused("--check", given, *layers, 0, "--json", said)
    assert "got 4, one for layers with experts only: off by the 1 dense layer" in err
    assert len(json.loads(said.read_text())["faults"]) == 1
    _, err = refused(given, "--to", "eplb", "--out", tmp_path / "x.npz")
    assert "devices must be given" in err


def test_tables_are_in_the_help(ok):
    """Every reader and every writer is named."""
    text = ok("convert", "--help")
    for name in mt.formats.READERS:
        assert f"{name}: " in text
    text = " ".join(ok("export", "--help").split())
    for name, writer in mt.formats.WRITERS.items():
        assert f"{name}: {writer.title}" in text


SERVED = {
    "vllm": "MOETUNER_PLACEMENT=placement.json vllm serve MODEL --tensor-parallel-size 2 "
    "--enable-expert-parallel --enable-eplb --eplb-config '{\"num_redundant_experts\": 2}'",
    "sglang": "--to sglang --hidden-layers 4 --dense-layers 0 --out experts.json",
    "tensorrt-llm": "--to tensorrt-llm --dense-layers 0 --out experts.yaml",
    "megatron": "--to megatron --checkpoint MODEL --out MODEL-placed",
}


@pytest.mark.parametrize(("engine", "words"), SERVED.items())
def test_commands_that_come_next_run_as_they_are(engine, words):
    """They say what the engine's map needs, and how many copies there are."""
    source = Source(input_files=(GOLDEN / "vllm" / "completions.json",), num_experts=16)
    statistics = mt.RoutingStatistics.from_trace(source.traffic, window=512)
    problem = mt.Problem(statistics, mt.Topology(2), slots_per_device=9)
    advice = SimpleNamespace(problem=problem, settings={"engine": engine, "initial": "contiguous"})
    assert any(words in line for line in _serving(source, advice))


def test_layers_that_nobody_numbers_are_said_to_start_at_0(ok, tmp_path):
    """TensorRT-LLM counts dense layers, and a placement does not know them."""
    placement, out = tmp_path / "placement.json", tmp_path / "experts.yaml"
    mt.Placement([[[0], [1]]]).save(placement)
    command = ("export", placement, "--to", "tensorrt-llm", "--out", out)
    assert "layers are numbered from 0" in ok(*command)
    assert "numbered" not in ok(*command, "--dense-layers", "0")
