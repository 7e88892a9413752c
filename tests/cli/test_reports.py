"""Advise and report on the command line: what they say and write, and one line for mistakes."""

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import moetuner as mt
from moetuner.cli.options import pages
from moetuner.report.page.words import SETTINGS, UNTOLD

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

FEW = ("--devices", 4, "--copies", "0", "--splits", 1)
BACK = "start SGLang without --init-expert-location"


def text_of(page):
    """Return what a page says, without the marks of words that do not break."""
    return html.unescape(re.sub(r"</?span[^>]*>", "", page))


@pytest.fixture
def skewed(tmp_path):
    """File of a trace that experts in blocks serve badly."""
    path, rng = tmp_path / "skewed.safetensors", np.random.default_rng(0)
    scores = rng.gumbel(size=(2000, 3, 16)) + np.linspace(3, 0, 16)
    ids = np.argsort(-scores, axis=2)[:, :, :2]
    mt.RoutingTrace.from_arrays(ids, num_experts=16, sequence=np.arange(2000) // 50).save(path)
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


def test_what_is_not_worth_a_trial_is_not_turned_on(ok, skewed, tmp_path):
    """What comes next is to look again or to record more, neither to solve nor to export."""
    flat = tmp_path / "flat.npz"
    np.savez(flat, load=np.full((40, 2, 8), 64))
    one = tmp_path / "one.npz"
    np.savez(one, load=np.arange(16).reshape(1, 2, 8))
    again = "moetuner advise NEWER --devices 4 --copies 0 --splits 1 --for vllm\n"
    more = "moetuner advise MORE --group-by files --devices 4"
    for file, answer, words in (
        (flat, "Not now", again),
        (one, "Not enough evidence: there is one window", more),
    ):
        out = ok("advise", file, *FEW, "--for", "vllm")
        assert answer in out
        after = out[out.index("Next:") :]
        assert words in after
        assert "solve" not in after
        assert "export" not in after


@pytest.mark.parametrize(
    ("engine", "served"),
    [("vllm", "vllm serve"), ("sglang", "sglang.launch_server"), ("megatron", "--checkpoint")],
)
def test_advise_for_an_engine(ok, skewed, tmp_path, engine, served):
    """The engine stands in the commands, and no copies where it has none, with the reason."""
    file, how = tmp_path / "advice.json", ("--for", engine, "--copies", "0,1", "--splits", 1)
    out = ok("advise", skewed, "--devices", 4, *how, "--json", file)
    actual = json.loads(file.read_text())
    assert any(f"--for {engine}" in line for line in actual["commands"])
    # What serves it is last, with as many copies as the placement has.
    assert served in actual["commands"][-1]
    counts = [row["per_device"] for row in actual["copies"]]
    assert counts == ([0] if engine == "megatron" else [0, 1])
    left_out = "Copies were left out: Megatron-Core loads a placement as a renumbered checkpoint"
    assert (left_out in out) == (engine == "megatron")
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
        mt.Placement.from_assignment(np.tile(np.arange(8) % 4, (3, 1)), 4).save(placement)
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
    assert {*settings} <= {*SETTINGS, *UNTOLD}
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
        scores = rng.gumbel(size=(2000, 2, 8)) + np.linspace(3, 0, 8)
        ids = np.argsort(-scores, axis=2)[:, :, :1]
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
        assert "not a file" in text
        assert 4 <= text.count("<section") <= 10


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ((), "without the map"),
        (("--for", "vllm"), "start vLLM without MOETUNER_PLACEMENT"),
        (("--for", "sglang"), f"{BACK}, and with --enable-eplb if it had it"),
    ],
)
def test_the_way_back_stands_below_the_next_commands(ok, skewed, tmp_path, engine, words):
    """The last line says what takes the placement away, where one is proposed."""
    out = ok("advise", skewed, *FEW, *engine, "--json", tmp_path / "a.json").splitlines()
    assert out[-1].startswith("  # to go back: ")
    assert out[-1].endswith(words)
    assert out[-1].endswith(json.loads((tmp_path / "a.json").read_text())["go_back"])
    # SGLang's balancer would replace its map, so it goes, and comes back with the way back.
    remark = "  # leave out --enable-eplb, which would replace the map"
    assert (remark in out) is ("sglang" in engine)


@pytest.mark.parametrize("command", ["advise", "evaluate"])
def test_a_page_says_the_way_back(ok, skewed, tmp_path, command):
    """Who has only the page finds below its commands what takes the placement away."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    page, placement = tmp_path / "page.html", tmp_path / "p.json"
    engine = ("--for", "sglang")
    if command == "advise":
        ok("advise", skewed, *FEW, *engine, "--report", page)
    else:
        ok("solve", skewed, "--devices", 4, "--method", "lpt", *engine, "--out", placement)
        ok("evaluate", placement, skewed, "--report", page)
    back = f"<p>To go back: {BACK}, and with --enable-eplb if it had it.</p>"
    text = text_of(page.read_text())
    assert back in text
    assert "leave out --enable-eplb" in text
    # The option has a mark that keeps it whole.
    assert back not in page.read_text()


def test_gains_of_copies_are_no_headline(ok, skewed, tmp_path):
    """Who compares the chart of copies with the headline reads why they differ."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    page, words = tmp_path / "page.html", ("--devices", 4, "--splits", 1, "--copies", "0,1")
    ok("advise", skewed, *words, "--report", page)
    assert "are compared by short searches, so gains are not the headline's." in text_of(
        page.read_text()
    )


def test_a_page_has_the_digits_of_the_table(ok, skewed, tmp_path):
    """Times and imbalance on the first screen are those that the terminal has."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    page = tmp_path / "page.html"
    out = ok("advise", skewed, *FEW, "--cost-model", "h100:7168x2048", "--report", page)
    text = text_of(page.read_text())
    rows = {cells[0]: cells[2:5] for cells in (re.split(" {2,}", line) for line in out.split("\n"))}
    assert all(f"<b>{time} us</b>" in text for time in rows["layer us"])
    assert f"<strong>{rows['imbalance'][2]} x the mean</strong>" in text


@pytest.mark.parametrize(("copies", "compared"), [("1", False), ("1,2", True)])
def test_one_number_of_copies_is_compared_with_none(ok, skewed, copies, compared):
    """Where as many slots run already, the gain is no copies' but the placement's."""
    words = ("--devices", 4, "--initial", "eplb:4", "--copies", copies, "--splits", 1)
    out = ok("advise", skewed, *words)
    assert ("Copies, by short searches" in out or "slots for copies." in out) == compared
    assert ("more slot per device and layer" in out) <= compared
    assert ("slots for copies  " in out) <= compared


@pytest.mark.parametrize("per_node", [4, 2])
def test_several_nodes_are_served_as_several(ok, skewed, tmp_path, monkeypatch, per_node):
    """SGLang is told of its nodes by advice and by a report if it has several."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    machine = ("--devices", 4, "--devices-per-node", per_node, "--for", "sglang")
    out = ok("advise", skewed, *machine, "--copies", 0, "--splits", 1)
    ok("solve", skewed, *machine, "--method", "lpt", "--out", "p.json")
    ok("evaluate", "p.json", skewed, "--report", "page.html")
    options = " --nnodes 2 --node-rank 0 --dist-init-addr HOST:PORT"
    lines = [line for line in out.splitlines() if "launch_server" in line]
    assert [line.endswith(options) for line in lines] == [per_node == 2]
    assert ("; on every node, each with its own rank" in out) == (per_node == 2)
    assert (options in text_of((tmp_path / "page.html").read_text())) == (per_node == 2)


def test_an_engine_without_expert_parallelism_is_refused_with_the_reason(run, skewed):
    """One line, which is no list of choices."""
    status, out, err = run("advise", skewed, *FEW, "--for", "llama.cpp")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "splits layers or weights over devices, not experts" in err


def test_a_page_has_the_command_of_the_placement_to_serve(ok, skewed, tmp_path):
    """What is served comes from all of INPUT: by a command, right before those that serve it."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    page = tmp_path / "page.html"
    ok("advise", skewed, *FEW, "--for", "vllm", "--report", page)
    text = text_of(page.read_text())
    commands = re.findall(r'<code id="command-\d+">(.*?)</code>', text)
    judged, *_, solved, served = commands
    assert judged.startswith("moetuner solve ")
    assert solved == judged.replace(" --holdout 0.5", "")
    assert solved != judged
    assert served.startswith("MOETUNER_PLACEMENT=placement.json vllm serve ")
    assert "leave out --holdout" not in text


def test_missing_libraries_are_told_before_any_work(run, trace, tmp_path, monkeypatch):
    """One line names the extra."""

    def missing():
        raise ImportError("a report needs plotly and jinja2: pip install 'moetuner[report]'")

    monkeypatch.setattr(pages, "check_libraries", missing)
    status, out, err = run("advise", trace, *FEW, "--report", tmp_path / "page.html")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "pip install 'moetuner[report]'" in err


def test_the_headline_of_a_table_is_as_short_as_a_traces(ok, tmp_path, monkeypatch):
    """One line says what INPUT and the machine are; what was assumed of a table follows below."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    np.savez("loads.npz", load=np.random.default_rng(0).integers(1, 99, (6, 2, 8)))
    ok("solve", "loads.npz", "--devices", 2, "--method", "lpt", "--out", "p.json")
    ok("evaluate", "p.json", "loads.npz", "--report", "page.html")
    page = html.unescape((tmp_path / "page.html").read_text())
    headline = re.search(r'<p class="subtitle">(.*?)</p>', page, re.DOTALL)[1]
    assert headline == "loads.npz: load table, 6 windows, 2 layers, 8 experts; 2 devices"
    assert re.search(r'class="warning"[^\n]*The median window is [^\n]* many steps\.</p>', page)


@pytest.mark.parametrize(
    ("engine", "lines"),
    [
        ("vllm", ["MOETUNER_PLACEMENT=p.json vllm serve MODEL --tensor-parallel-size 4"]),
        (
            "sglang",
            [
                "moetuner export p.json --to sglang --hidden-layers N --dense-layers A-B",
                "python -m sglang.launch_server",
            ],
        ),
        (None, ["moetuner export p.json --to eplb --out experts.npz"]),
    ],
)
def test_a_page_says_how_its_engine_is_served(ok, skewed, tmp_path, monkeypatch, engine, lines):
    """The commands are those of the engine that the placement is for, as advise prints them."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    how = ("--for", engine) if engine else ()
    ok("solve", skewed, "--devices", 4, "--method", "lpt", *how, "--out", "p.json")
    ok("evaluate", "p.json", skewed, "--report", "page.html")
    page = text_of((tmp_path / "page.html").read_text())
    for line in lines:
        assert line in page
    assert ("--to eplb" in page) == (engine is None)
