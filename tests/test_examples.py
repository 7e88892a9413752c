"""Examples do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import notebooks
import numpy as np
import pytest
from engines_files import GOLDEN, truth

import moetuner as mt
from moetuner.counting import total

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Run an example in this process and a folder of its own, and give what it printed."""
    monkeypatch.chdir(tmp_path)

    def example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return example


def test_quick_start(make_trace, brief, tmp_path, example):
    """It answers, bounds, judges, and writes a placement that the engine can load."""
    make_trace(800).save(tmp_path / "trace.safetensors")
    arguments = ("trace.safetensors", "--devices", 4, "--engine", "vllm", "--out", "p.json")
    out = example("quick_start.py", *arguments).splitlines()
    assert re.match("(Worth a trial|Not now|Not enough evidence): ", out[0])
    objective, bound = map(float, re.findall(r"(\d+\.\d+)", out[1]))
    assert 0 < bound <= objective
    assert [line.split()[0] for line in out[2:]] == ["contiguous", "moetuner", "wrote"]
    assert mt.Placement.load(tmp_path / "p.json").slots.shape == (3, 4, 2)


def test_placed_model_is_the_same(tmp_path, brief, example):
    """The model is recorded, renumbered and saved; its logits do not change."""
    import moe_models  # noqa: F401 - one thread, no network; skips without transformers

    out = example("place_transformers.py", "--out", "placed")
    assert "RoutingTrace(tokens=4096, layers=4, top_k=2, num_experts=16" in out
    assert float(re.search(r"difference of a logit: (\S+)", out)[1]) < 1e-5
    assert (tmp_path / "placed" / "config.json").exists()


def test_windows_are_followed(example):
    """On traffic that changes the adapted map is better, and no step moves more than its budget."""
    out = example("rebalance_windows.py", "--budget", 12).splitlines()
    rows = np.array([line.split() for line in out[1:-1]], dtype=float)
    _, stays, follows, moves = rows.T
    assert (moves <= 12).all()
    assert moves.any()
    assert follows.mean() < 0.9 * stays.mean()
    means = [float(value) for value in out[-1].split()[1:3]]
    assert np.allclose([stays.mean(), follows.mean()], means, rtol=0, atol=0.001)


# Runs an example with a count that kills its process when it first meets one of the recordings.
DYING = """
import importlib, os, signal, sys

def dying(count, victim, marker):
    def count_or_die(item):
        path = str(item["path"] if isinstance(item, dict) else item)
        if path.endswith(victim) and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return count(item)
    return count_or_die

if __name__ == "__main__":
    name, victim, marker = sys.argv[1:4]
    example = importlib.import_module(name)
    example.count = dying(example.count, victim, marker)
    sys.argv = [name, *sys.argv[4:]]
    example.main()
"""


@pytest.mark.parametrize(("name", "library"), [("dask", "distributed"), ("ray", "ray.data")])
def test_counts_are_those_of_one_process(make_trace, tmp_path, name, library):
    """Workers that are processes count shards; one of them dies, and the bytes are the same."""
    pytest.importorskip(library, reason=f"needs {library}")
    paths = [tmp_path / f"shard-{number}.safetensors" for number in range(5)]
    for number, path in enumerate(paths):
        make_trace(tokens=100 + number, seed=number).save(path)
    expected, out = tmp_path / "expected.safetensors", tmp_path / "counts.safetensors"
    # Dask adds in the order of the files; Ray adds in any order, and is given their times.
    times = range(5) if name == "ray" else [None] * 5
    total(
        mt.count(mt.RoutingTrace.load(path), time=time)
        for path, time in zip(paths, times, strict=True)
    ).save(expected)
    # A file, which the workers import.
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    command = [sys.executable, script, f"count_with_{name}", paths[2].name, tmp_path / "dead"]
    done = subprocess.run(
        [*command, *paths, "--out", out],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{EXAMPLES}"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dead").exists()
    assert out.read_bytes() == expected.read_bytes()


LOGS = ["memra/trace.txt", "memra/weights.txt", "llama_traces/moe-trace.csv"]
LOGS += ["llama_traces/route_trace.csv", "llama_traces/rank.csv"]


@pytest.mark.parametrize("name", LOGS)
def test_logs_of_routers_are_converted(tmp_path, example, name):
    """Tokens that all layers computed are there, in order, best expert first, by prompt."""
    example("convert_router_logs.py", GOLDEN / name, "--out", "trace.csv")
    actual = mt.open_input(tmp_path / "trace.csv", num_experts=16)
    if name.startswith("memra"):
        assert np.array_equal(actual.expert_ids, truth("memra", "ids"))
        assert actual.sequence is None
        return
    ids, lengths = truth("llama_traces")
    first, computed = 0, []
    for prompt, answer in lengths[: 1 if "rank" in name else 2].tolist():
        # Rows of tokens have the last one of each batch of four; positions are of the last batch.
        others = [3] if "moe" in name and prompt > 4 else []
        computed.append(
            [first + at for at in (prompt - 1, *others, *range(prompt, prompt + answer))]
        )
        first += prompt + answer
    assert np.array_equal(actual.expert_ids, ids[np.concatenate(computed)])
    if len(computed) > 1:
        assert np.bincount(actual.sequence).tolist() == [*map(len, computed)]


def test_a_log_that_is_cut_off_is_converted(tmp_path, example):
    """What was being written when memra ended, and its pass, are left out."""
    content = (GOLDEN / "memra/trace.txt").read_text()
    cut_off = tmp_path / "trace.txt"
    cut_off.write_text(content[: content.rfind("65535") - 9])
    example("convert_router_logs.py", cut_off, "--out", "trace.csv")
    actual = mt.open_input(tmp_path / "trace.csv", num_experts=16)
    assert np.array_equal(actual.expert_ids, truth("memra", "ids")[:-1])


def test_notebook(brief, tmp_path, monkeypatch):
    """Every cell runs, every figure shows what was computed, and no output is committed."""
    figures = pytest.importorskip("plotly.graph_objects", reason="needs plotly")
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / "figures.ipynb"
    cells = [each for each in json.loads(path.read_text())["cells"] if "outputs" in each]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    names, shown = notebooks.run(path)
    assert shown[0] == names["trace"]
    heat, methods, over_time, copies = shown[1:]
    assert all(isinstance(figure, figures.Figure) for figure in shown[1:])
    assert np.array_equal(heat.data[0].z, names["load"])
    assert [figure.name for figure in methods.data] == list(names["found"])
    for point in methods.data:
        actual = names["found"][point.name]
        assert (point.x, point.y) == ((actual.imbalance,), (actual.fanout,))
    for line in over_time.data:
        actual = names["found"][line.name]
        assert np.array_equal(line.y, actual.imbalance_per_window)
    assert [line.name for line in copies.data] == ["windows of 512", "windows of 8,192"]
    assert list(copies.data[0].x) == [0, 1, 4]


def test_examples_are_listed():
    """Who reads about the examples finds all of them."""
    text = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.suffix not in (".py", ".ipynb") or f"({path.name})" in text
