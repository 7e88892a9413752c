"""Advise and report on the command line: what they say and write, and one line for mistakes."""

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import moetuner as mt
from moetuner.cli.options import pages
from moetuner.report.page.words import NOT_SHOWN, SETTINGS

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

FEW = ("--devices", 4, "--copies", "0", "--splits", 1)


def text_of(page):
    """Return what a page says, without the marks of words that do not break."""
    return html.unescape(re.sub(r"</?span[^>]*>", "", page))


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


def test_python_writes_the_same_pages(tmp_path):
    """Of an advice and of two evaluations, with the verdict and as many charts."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    load = np.random.default_rng(0).poisson(np.linspace(200, 20, 8), (40, 2, 8))
    traffic, page = mt.RoutingStatistics.from_load(load), tmp_path / "page.html"
    advice = mt.advise(traffic, mt.Topology(4), copies=(0,), splits=1, iterations=100)
    both, names = (advice.running, advice.proposed), ("now", "then")
    gain, less = replace(mt.verdict(*both), names=names), advice.main.gain.amount
    for results, sentence in ((advice, f"{less} predicted time than"), (both, gain.sentence)):
        mt.write_report(page, results, names=names)
        text = text_of(page.read_text())
        assert sentence in text
        assert 4 <= text.count("<section") <= 10


def test_missing_libraries_are_told_before_any_work(run, trace, tmp_path, monkeypatch):
    """One line names the extra."""

    def missing():
        raise ImportError("a report needs plotly and jinja2: pip install 'moetuner[report]'")

    monkeypatch.setattr(pages, "check_libraries", missing)
    status, out, err = run("advise", trace, *FEW, "--report", tmp_path / "page.html")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "pip install 'moetuner[report]'" in err
