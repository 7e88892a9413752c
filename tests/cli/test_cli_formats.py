"""The command line with engines' files: record, solve, load, check."""

import json
from pathlib import Path

import pytest

import moetuner as mt

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
RANKS = [GOLDEN / "sglang" / f"two-ranks-per_token-{rank}.pt" for rank in range(2)]


def test_three_commands(ok, tmp_path):
    """What SGLang recorded, solved for it, in its format, and found good."""
    trace, placement, out = (tmp_path / name for name in ("t.safetensors", "p.json", "m.json"))
    ok("convert", *RANKS, "--out", trace)
    ok(
        *("solve", trace, "--devices", 2, "--for", "sglang", "--slots-per-device", 9),
        *("--method", "eplb", "--out", placement),
    )
    ok("export", placement, "--to", "sglang", "--dense-layers", "none", "--out", out)
    ok("export", "--check", out, "--devices", 2, "--num-experts", 16, "--hidden-layers", 4)
    assert mt.read_placement(out, devices=2) == mt.Placement.load(placement)


def test_several_inputs_are_one(as_json, ok, tmp_path):
    """Files of all ranks may be given wherever a folder may."""
    placement = tmp_path / "p.json"
    ok("solve", *RANKS, "--devices", 2, "--method", "eplb", "--out", placement)
    read = as_json("evaluate", placement, *RANKS)["input"]
    assert (read["files"], read["tokens"]) == ([str(path) for path in RANKS], 95)


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


def test_tables_are_in_the_help(ok):
    """Every reader and every writer is named."""
    text = ok("convert", "--help")
    for name in mt.formats.READERS:
        assert f"{name}: " in text
    text = " ".join(ok("export", "--help").split())
    for name, writer in mt.formats.WRITERS.items():
        assert f"{name}: {writer.title}" in text
