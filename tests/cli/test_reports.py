"""Advise and report on the command line: what they say and write, and one line for mistakes."""

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from make import in_turns, random_ids, trace_of

import moetuner as mt
from moetuner.cli.options import pages
from moetuner.report.page.words import NOT_SHOWN, SETTINGS

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

FEW = ("--devices", 4, "--copies", "0", "--splits", 1)


def text_of(page):
    """Return what a page says, without the marks of words that do not break."""
    return html.unescape(re.sub(r"</?span[^>]*>", "", page))


@pytest.fixture
def skewed(tmp_path):
    """File of a trace that experts in blocks serve badly."""
    path, liking = tmp_path / "skewed.safetensors", np.linspace(3, 0, 16)
    trace_of(random_ids(2000, 3, 2, 16, liking=liking), 16, length=50).save(path)
    return path


def test_advise_says_what_json_has(ok, skewed, tmp_path):
    """The answer, the table and the next commands."""
    file = tmp_path / "advice.json"
    out = ok("advise", skewed, *FEW, "--expert-bytes", 1e6, "--json", file)
    actual = json.loads(file.read_text())
    assert actual["answer"].capitalize() in out
    commands = [command.partition("  # ")[0] for command in actual["commands"]]
    assert all(words in out for words in (*actual["reasons"][1:], *commands))
    assert actual["settings"]["expert_bytes"] == 1e6


@pytest.mark.parametrize(
    ("engine", "served"),
    [("vllm", "vllm serve"), ("sglang", "sglang.launch_server"), ("megatron", "--checkpoint")],
)
def test_advise_for_an_engine(ok, skewed, tmp_path, engine, served):
    """The engine stands in the commands, and no copies where it has none."""
    file, how = tmp_path / "advice.json", ("--for", engine, "--copies", "0,1", "--splits", 1)
    ok("advise", skewed, "--devices", 4, *how, "--json", file)
    actual = json.loads(file.read_text())
    assert any(f"--for {engine}" in line for line in actual["commands"])
    # What serves it is last, with as many copies as the placement has.
    assert served in actual["commands"][-1]
    counts = [row["per_device"] for row in actual["copies"]]
    assert counts == ([0] if engine == "megatron" else [0, 1])
    assert actual["settings"]["split"] == ("nearest" if engine == "sglang" else "even")


@pytest.mark.parametrize(
    "arguments",
    [
        ("advise", *FEW),
        ("advise", *FEW, "--by-group"),
        ("solve", "--devices", 4, "--objective", "balance", "--out", "/dev/null"),
        ("compare", "--devices", 4, "--methods", "contiguous,lpt", "--splits", 1),
        ("evaluate",),
    ],
)
def test_every_page_opens_and_is_the_same_every_time(ok, trace, tmp_path, arguments):
    """No time that anything took is in it, as long as nobody limits it."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    (command, *others), page, actual = arguments, tmp_path / "page.html", []
    words = (command, trace, *others, "--report", page)
    if command == "evaluate":
        placement = tmp_path / "placement.json"
        in_turns(3, 8, 4).save(placement)
        words = (command, placement, trace, "--report", page)
    for _ in range(2):
        ok(*words)
        actual.append(page.read_text())
    assert actual[0] == actual[1]
    assert 5 <= actual[0].count("<section") <= 10
    assert re.search("<h1[^>]*>[^<]+</h1>", actual[0])
    assert actual[0].count("<strong>") >= 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("advise", *FEW, "--for", "vllm"),
        (
            "solve",
            "--devices",
            4,
            "--slots-per-device",
            4,
            "--survive",
            "device",
            "--out",
            "/dev/null",
        ),
        ("compare", "--devices", 4, "--methods", "contiguous,lpt", "--splits", 1),
    ],
)
def test_settings_are_told_in_words(ok, trace, tmp_path, arguments):
    """Every setting of a command has words for its name, and no value is one of an option."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    (command, *others), page = arguments, tmp_path / "page.html"
    ok(command, trace, *others, "--report", page, "--json", tmp_path / "made.json")
    settings = json.loads((tmp_path / "made.json").read_text())["settings"]
    assert {*settings} <= {*SETTINGS, *NOT_SHOWN}
    facts = dict(
        re.findall(r"<dt>(.*?)</dt><dd dir=\"auto\">(.*?)</dd>", text_of(page.read_text()))
    )
    raw = {"dispatch", "follow", "even", "nearest", "mixed", "bursts", "contiguous", "mean", "vllm"}
    assert not {*facts.values()} & {*raw, "True", "yes", "None"}
    assert facts["After a layer, tokens"] == "go home"
    assert not any("_" in name for name in facts)


@pytest.mark.parametrize("is_table", [False, True])
def test_the_verdict_on_a_page_is_short(ok, tmp_path, is_table):
    """Of loads as of a trace it is what is gained; times and intervals follow below."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    page, traffic, rng = tmp_path / "page.html", tmp_path / "traffic.npz", np.random.default_rng(0)
    if is_table:
        np.savez(traffic, load=rng.poisson(np.linspace(400, 20, 8), (60, 2, 8)))
    else:
        ids = random_ids(2000, 2, 1, 8, liking=np.linspace(3, 0, 8))
        np.savez(traffic, expert_ids=ids, num_experts=8, sequence=np.arange(2000) // 20)
    ok("advise", traffic, *FEW, *(() if is_table else ("--window", 100)), "--report", page)
    text = text_of(page.read_text())
    headline = re.search(r"<h1[^>]*>(.*?)</h1>", text)[1]
    assert re.fullmatch(
        r"(Worth a trial|Not now): [\d.]+ % less predicted time than with the contiguous placement"
        r"(; less than the 2 % that a change should gain)?\.",
        headline,
    )
    assert re.search(
        r"<li[^>]*>In [^<]* a layer takes [^<]* us \(95 % interval [^<]*\)\.</li>", text
    )


def test_python_writes_the_same_pages(tmp_path):
    """Of an advice and of two evaluations, with the verdict and as many charts."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    load = np.random.default_rng(0).poisson(np.linspace(200, 20, 8), (40, 2, 8))
    traffic, page = mt.RoutingStatistics.from_load(load), tmp_path / "page.html"
    advice = mt.advise(traffic, mt.Topology(4), copies=(0,), splits=1, iterations=100)
    both, names = (advice.running, advice.proposed), ("now", "then")
    gain, less = replace(mt.verdict(*both), names=names), advice.main.gain.much
    for results, sentence in ((advice, f"{less} predicted time than"), (both, gain.sentence)):
        mt.write_report(page, results, names=names)
        text = text_of(page.read_text())
        assert sentence in text
        assert 4 <= text.count("<section") <= 10


def test_a_page_has_the_digits_of_the_table(ok, skewed, tmp_path):
    """Times and imbalance on the first screen are those that the terminal has."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    page = tmp_path / "page.html"
    out = ok("advise", skewed, *FEW, "--cost-model", "h100:7168x2048", "--report", page)
    text = text_of(page.read_text())
    rows = {cells[0]: cells[2:5] for cells in (re.split(" {2,}", line) for line in out.split("\n"))}
    assert all(f"<b>{time} us</b>" in text for time in rows["layer us"])
    assert f"<strong>{rows['imbalance'][2]} x the mean</strong>" in text


def test_missing_libraries_are_told_before_any_work(run, trace, tmp_path, monkeypatch):
    """One line names the extra."""

    def missing():
        raise ImportError("a report needs plotly and jinja2: pip install 'moetuner[report]'")

    monkeypatch.setattr(pages, "check_libraries", missing)
    status, out, err = run("advise", trace, *FEW, "--report", tmp_path / "page.html")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "pip install 'moetuner[report]'" in err
