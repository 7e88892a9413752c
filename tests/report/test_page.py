"""The page: what is drawn is what was found, and it asks nobody for anything."""

import base64
import gzip
import json
import re
import shlex
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsers import NO_BROWSER
from make import random_ids, trace_of

import moetuner as mt
from moetuner.charts import POINTS, thin
from moetuner.files.cells import digits
from moetuner.placement import contiguous as blocks_of
from moetuner.report import page
from moetuner.report.page import figures
from moetuner.report.page import panels as drawing
from moetuner.report.page.data import Origin
from moetuner.report.page.making import make_judgement_data
from moetuner.serving.recipes import Recipe
from moetuner.solver import Progress
from moetuner.solver.result import LOADS

pytest.importorskip("plotly", reason="the extra report is not installed")
pytest.importorskip("jinja2", reason="the extra report is not installed")

HOSTILE = ["</script><script>alert(1)</script>", 'say "no" & <b>', "\u202eright\u202c", "x" * 300]
MODEL = mt.CostModel.preset("h100")


def shown(trace, placement, topology, regime="dispatch", **others):
    """Make the data of a placement beside experts in blocks."""
    placements = blocks_of(placement), placement
    options = {"window": 100, "cost_model": MODEL, "mixed": False, "regime": regime}
    options |= {"window": None} if isinstance(trace, mt.RoutingStatistics) else {}
    evaluations = tuple(mt.evaluate(each, trace, topology, **options) for each in placements)
    contents = {"proposed": evaluations[1].to_dict()}
    made = make_judgement_data(
        mt.judge(*evaluations, by_group=True, names=("contiguous", "proposed")),
        Origin(HOSTILE[0], [], "moetuner report"),
        contents,
        traffic="<script>alert(2)</script>",
    )
    return replace(made, **others)


@pytest.fixture(scope="module")
def trace():
    """Trace of four layers, 16 experts and groups with names that would like to be more.

    Its last window is partial, and its last group has too few sequences to judge.
    """
    ids, sequence = random_ids(1640, 4, 2, 16), np.arange(1640) // 20
    group = np.where(sequence < 3, 3, sequence % 3)
    return trace_of(ids, 16, length=20, group=group, group_names=HOSTILE)


COMMAND = "moetuner export 'a b.json' --to eplb"
OPTIONS = ["--ep-num-redundant-experts 0", "--extra-slots 64", "--enable-expert-parallel"]


@pytest.fixture(scope="module")
def made(trace):
    """Page of a balanced placement with copies on two nodes, and of commands with long options."""
    topology = mt.Topology(8, devices_per_node=4)
    placement = mt.balance(
        mt.RoutingStatistics.from_trace(trace).total_load, devices=8, slots_per_device=3
    )
    made = shown(trace, placement, topology)
    serve = " ".join(["serve /a/long-path/to/a.json", *OPTIONS * 3])
    lines = [COMMAND, *(f"{serve} {'x' * size}".rstrip() for size in range(9))]
    recipes = tuple(
        Recipe(tuple(shlex.split(line)), "" if number else "why")
        for number, line in enumerate(lines)
    )
    reasons = ("<b>why", *(f"{'word ' * number}{' '.join(OPTIONS)}" for number in range(9)))
    contents = {**made.contents, "go_back": f"start it without {OPTIONS[0]}"}
    return replace(made, contents=contents, recipes=recipes, reasons=reasons)


@pytest.fixture(scope="module")
def html(made):
    """Give the page itself."""
    return page.render(made)


def data(html, key):
    """Unpack what the page carries."""
    actual = re.search(rf'id="data-{key}">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(actual)))


def first_variants(html):
    """Return what plotly draws before a reader has chosen anything."""
    return [chart["variants"][0] for chart in data(html, "charts").values()]


def numbers(packed):
    """Unpack numbers as plotly does."""
    values = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=f"<{packed['dtype']}")
    shape = packed.get("shape")
    return values if shape is None else values.reshape([int(n) for n in shape.split(",")])


def test_no_request_is_possible(made, html):
    """The policy forbids all; scripts run by their hashes only; nothing is fetched by name.

    The same results give the same bytes, and the first screen needs no script.
    """
    assert page.render(made) == html
    assert "<h1" in html
    assert "proposed has" in made.sentence
    for words in (made.sentence, *(of.value for of in made.tiles)):
        assert words in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline'; img-src" in policy  # styles only
    assert "unsafe-eval" not in policy
    assert "connect-src" not in policy
    assert not re.search(r'(src|href)="(?!#|data:,)', html)
    assert "showSendToCloud: false" in html


def test_the_page_carries_its_numbers_and_names_as_text(made, html):
    """The JSON is that of the results, but for matrices of groups; names cannot mark up the page.

    Groups cannot end the script or turn the text around.
    """
    assert html.count("<script") == 4
    assert "<script>alert" not in html
    assert "\u202e" not in html + json.dumps(data(html, "charts"))
    carried = data(html, "contents")
    wanted = json.loads(json.dumps(made.evaluations[1].to_dict()))
    for group in wanted["by_group"].values():
        del group["traffic"]
    assert (carried["proposed"], carried["moetuner"]) == (wanted, mt.__version__)


def test_drawn_is_computed(made, html):
    """Heat maps have the size of their matrices, and cells are what numpy says."""
    charts = data(html, "charts")
    (heat,) = charts["experts"]["variants"][0]["data"]
    placement = made.placements[1]
    shade, labels, share = (numbers(heat[key]) for key in ("z", "customdata", "text"))
    expert, copies = labels[:, :, 0], labels[:, :, 1]
    assert shade.shape == expert.shape == (4, 8 * 3)
    relative = made.load / made.load.mean(axis=1, keepdims=True)
    for layer, column in ((0, 0), (1, 7), (3, 12)):
        device = column // 3
        which = expert[layer, column]
        assert which in placement.slots[layer, device]
        assert copies[layer, column] == (placement.slots[layer] == which).sum()
        busy = relative[layer, which] / copies[layer, column]
        assert share[layer, column] == pytest.approx(busy, rel=1e-6)
        assert 2.0 ** shade[layer, column] == pytest.approx(busy, rel=1e-5)
    first, second = charts["links"]["variants"][0]["data"]
    for drawn, of in zip((first, second), made.evaluations, strict=True):
        table = of.traffic["dispatch"].sum(axis=0) / 4 / 1640 * 1000
        assert numbers(drawn["z"]) == pytest.approx(table, rel=1e-5)
    for drawn, of in zip(charts["layers"]["variants"][0]["data"], made.evaluations, strict=True):
        assert numbers(drawn["y"]) == pytest.approx(of.predicted_us_per_layer, rel=1e-6)
    for drawn, of in zip(charts["time"]["variants"][0]["data"], made.evaluations, strict=True):
        assert numbers(drawn["y"]) == pytest.approx(of.imbalance_per_window, rel=1e-6)
    (groups,) = charts["groups"]["variants"][0]["data"]
    assert groups["marker"]["symbol"] == ["x"] * 3 + ["circle-open"]
    assert groups["customdata"][3].endswith("(too few)")
    (moves,) = charts["moves"]["variants"][0]["data"]
    assert (numbers(moves["z"]) == made.moves.pairs).all()


@pytest.mark.parametrize("speed", [None, (1, 1, 1, 4)])
def test_hot_experts_show_the_device_that_waits(speed):
    """A box stands around the device that all others wait for, in every layer; a table has it."""
    load = np.random.default_rng(0).integers(1, 90, (6, 5, 8))
    table, topology = mt.RoutingStatistics.from_load(load), mt.Topology(4, speed=speed)
    placement = mt.Placement.from_assignment([np.arange(8) % 4] * 5, 4)
    made = shown(table, placement, topology)
    times = np.zeros((5, 4))
    for expert in range(8):
        times[:, expert % 4] += load.sum(axis=0)[:, expert] / topology.speed_of_device[expert % 4]
    slowest, ratios = times.argmax(axis=1), times.max(axis=1) / times.mean(axis=1)
    (panel,) = (each for each in drawing.make_panels(made) if each.key == "experts")
    spec = panel.charts[0].variants["proposed"]["layout"]
    (boxes,) = (each for each in spec["shapes"] if each.get("showlegend"))
    corners = [
        (float(left), float(top))
        for left, top in re.findall(r"M([-.\d]+),([-.\d]+)H", boxes["path"])
    ]
    assert corners == [(2 * device - 0.5, layer - 0.5) for layer, device in enumerate(slowest)]
    rows = [(row[3], row[4]) for row in panel.tables[0].rows]
    assert rows == [*zip(slowest.astype(str), map(digits, ratios), strict=True)]
    most = np.bincount(slowest, minlength=4)
    assert f"device {most.argmax()}: in {most.max()} of 5 layers." in panel.notes[1]


def test_losses_are_shown_of_placements_with_copies(made, trace):
    """Bars and rows are what each loss does; experts in blocks have no copies, and no panel."""
    (panel,) = (each for each in drawing.make_panels(made) if each.key == "losses")
    imbalance, lost = made.evaluations[1].measure_each_loss()
    _, bars, _, busiest = panel.charts[0].variants[""]["data"]
    assert numbers(bars["y"]) == pytest.approx(lost.mean(axis=1))
    assert numbers(busiest["y"]) == pytest.approx(imbalance.mean(axis=1))
    assert len(panel.tables[0].rows) == 8
    plain = shown(trace, mt.Placement.from_assignment([np.arange(16) % 8] * 4, 8), mt.Topology(8))
    assert "losses" not in {each.key for each in drawing.make_panels(plain)}


def test_two_devices_have_a_chart_of_tokens_that_stay_on_one(trace):
    """It has both placements; more devices have none."""
    made = shown(trace, mt.Placement.from_assignment([np.arange(16) % 2] * 4, 2), mt.Topology(2))
    (panel,) = (each for each in drawing.make_panels(made) if each.key == "links")
    one, both = panel.charts[1].variants[""]["data"]
    wanted = [evaluation.on_one_device for evaluation in made.evaluations][::-1]
    assert numbers(one["x"]) == pytest.approx(wanted)
    assert numbers(both["x"]) == pytest.approx(100 - np.array(wanted))


@pytest.mark.parametrize(("load", "devices"), [([[[4, 3, 2, 1]]], 1), ([[[0, 0, 0, 0]]], 2)])
def test_nobody_waits_alone_or_without_tokens(load, devices):
    """One device waits for no other, and without a load none waits."""
    placement = mt.Placement.from_assignment([np.arange(4) % devices], devices)
    made = shown(mt.RoutingStatistics.from_load(load), placement, mt.Topology(devices))
    (panel,) = (each for each in drawing.make_panels(made) if each.key == "experts")
    assert "wait" not in str(panel)


def test_every_chart_is_plotlys_with_a_label_and_a_table(made, html):
    """Plotly takes the figures; who cannot see a chart reads what it shows, and the numbers."""
    objects = pytest.importorskip("plotly.graph_objects")
    for variant in (of for chart in data(html, "charts").values() for of in chart["variants"]):
        assert objects.Figure(data=variant["data"], layout=variant["layout"])
    panels = drawing.make_panels(made)
    questions = re.findall(r"<h2>(.*?)</h2>\n<p class=\"reading\">(.*?)</p>", html)
    assert [question[-1] for question, _ in questions] == [*["?"] * len(panels), "n"]
    assert all(reading.endswith(".") for _, reading in questions)
    assert all(panel.charts and panel.tables for panel in panels)
    labels = [each.label for of in panels for each in of.charts]
    assert all(f'role="group" aria-label="{label}"' in html for label in labels)


@pytest.mark.parametrize(
    ("load", "devices"),
    [([[[4, 3, 2, 1]]], 2), ([[[4, 3, 2, 1]] * 2] * 3, 1), ([[[0, 0, 0, 0]]] * 2, 4)],
)
def test_what_is_not_known_is_left_out(load, devices):
    """One layer, one window, one device, no transitions, no groups, no load: still a page."""
    table = mt.RoutingStatistics.from_load(load)
    placement = mt.Placement.from_assignment([np.arange(4) % devices] * len(load[0]), devices)
    made = shown(table, placement, mt.Topology(devices))
    html = page.render(made)
    assert not any(f'"{key}"' in html for key in ("links", "next", "groups", "search", "price"))
    assert 'id="layers"' in html


def test_many_windows_stay_few_points():
    """The least and most of every run of windows remain."""
    values = np.random.default_rng(0).normal(size=10_000)
    at, drawn = thin(values.tolist())
    assert len(at) <= POINTS
    assert (drawn.min(), drawn.max()) == (values.min(), values.max())
    assert (values[at] == drawn).all()


def test_a_large_model_stays_small():
    """61 layers of 384 experts on 72 devices in nine nodes: below 3 MB."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 384 // 4, (64, 61, 4)) + 96 * np.arange(4)
    large = trace_of(ids, 384)
    slots = np.full((61, 72, 6), -1)
    for layer in slots:
        layer.reshape(-1)[rng.permutation(432)[:384]] = rng.permutation(384)
    topology = mt.Topology(72, devices_per_node=8)
    made = shown(large, mt.Placement(slots, num_experts=384), topology)
    assert len(page.render(made).encode()) < 3_000_000


def find_browser():
    """Return a Chromium of the system, or that of Playwright; None if there is neither."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    cached = Path.home() / ".cache" / "ms-playwright"
    return next(map(str, sorted(cached.glob("chromium-*/chrome-linux*/chrome"))), None)


BROWSER = find_browser()
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)


def test_what_is_missing_is_named(monkeypatch):
    """An extra, or the browser, in one line."""
    with monkeypatch.context() as patch:
        for module, checks in ((page, page.check_libraries), (figures, figures.check_figures)):
            patch.setattr(module, "find_spec", lambda library: None)
            with pytest.raises(ImportError, match=r"pip install 'moetuner\[(report|figures)\]'"):
                checks()
    pytest.importorskip("kaleido", reason="the extra figures is not installed")
    from choreographer.browsers.chromium import Chromium

    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(Chromium, "find_browser", lambda **_: None)
    with pytest.raises(ImportError, match=r"none is installed: plotly_get_chrome[^\n]*$"):
        figures.check_figures()


@NEEDS_BROWSER
@pytest.mark.filterwarnings("ignore")
def test_figures_are_charts_of_the_page(made, tmp_path, monkeypatch):
    """An SVG, with heat maps as images in it, and a PNG of each chart; nothing is loaded."""
    generator = pytest.importorskip(
        "kaleido._page_generator", reason="the extra figures is not installed"
    ).PageGenerator
    pages, make_page = [], generator.generate_index

    def keep_page(self, *arguments):
        pages.append(make_page(self, *arguments))
        return pages[-1]

    monkeypatch.setattr(generator, "generate_index", keep_page)
    folder = tmp_path / "new" / "figures"
    charts = {chart.key: chart for panel in drawing.make_panels(made) for chart in panel.charts}
    number = figures.write_figures(folder, [charts["links"], charts["time"]])
    names = {"links.svg", "links.png", "time.svg", "time.png"}
    assert {file.name for file in folder.iterdir()} == names
    assert number == len(names)
    text = (folder / "links.svg").read_text()
    assert text.count("<image") == 2
    assert 'width="1080"' in text
    assert "var(--" not in text
    assert (folder / "links.png").read_bytes()[16:20] == (2 * 1080).to_bytes(4, "big")
    # A second one is made if the browser missed a figure.
    assert pages
    assert all("://" in page and "http" not in page for page in pages)


@NEEDS_BROWSER
def test_a_figure_that_is_not_drawn_is_an_error(made, tmp_path, monkeypatch):
    """Kaleido returns the error and does not raise it."""
    kaleido = pytest.importorskip("kaleido", reason="the extra figures is not installed")
    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", lambda *_, **__: (ValueError(),))
    charts = drawing.make_panels(made)[0].charts[:1]
    with pytest.raises(OSError, match=rf"did not draw \S+{charts[0].key}\.svg; run"):
        figures.write_figures(tmp_path, charts, ("svg",))


@NEEDS_BROWSER
def test_a_figure_that_was_missed_is_asked_for_again(made, tmp_path, monkeypatch):
    """That one alone."""
    kaleido = pytest.importorskip("kaleido", reason="the extra figures is not installed")
    asked = []

    def draw(figures, **_):
        asked.append([each["path"].name for each in figures])
        for each in figures[len(asked) == 1 :]:
            each["path"].touch()

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", draw)
    charts = drawing.make_panels(made)[0].charts[:1]
    assert figures.write_figures(tmp_path, charts) == 2
    key = charts[0].key
    assert asked == [[f"{key}.svg", f"{key}.png"], [f"{key}.svg"]]


def test_a_search_is_shown_by_its_steps(made):
    """Without a time limit a page knows nothing of the clock; with one, seconds are the axis."""
    history = (
        Progress(0.21, "search", 3.0),
        Progress(0.3, "layers", 2.5, is_step=True),
        Progress(0.5, "layers", 2.0, is_step=True),
        Progress(0.7, "answer", 2.0, 1.5, is_step=True),
    )
    placement = made.placements[1]
    result = mt.Result(placement, "joint", "feasible", 2.0, 1.5, "load", 0.7, history=history)
    for timed, steps in ((False, [1, 2, 3]), (True, [0.21, 0.3, 0.5, 0.7])):
        unit = "us per layer"
        panels = drawing.make_panels(replace(made, result=result, timed=timed, unit=unit))
        (search,) = (of for of in panels if of.key == "search")
        best, bound = search.charts[0].variants[""]["data"]
        assert numbers(best["x"]).tolist() == pytest.approx(steps)
        assert numbers(best["y"])[-1] == 2.0
        assert numbers(bound["y"]).tolist() == [1.5, 1.5]
        assert search.tables[0].rows[-1][1:] == ("answer", "2.00", "1.50", "25.0 %")
        assert search.charts[0].variants[""]["layout"]["yaxis"]["title"] == {"text": unit}
        assert search.tables[0].title == "Progress, us per layer"
        assert "below 1.50 us per layer, so this one is within 25.0 %" in search.notes[0]


@pytest.mark.parametrize("proven", [{"bound": None}, {"bound": 0.0}, {"bound_source": LOADS}])
def test_a_search_without_a_bound_is_not_shown(made, proven):
    """Steps alone say nothing of how good the search is."""
    history = [Progress(0.1 * step, "layers", 3.0 - step, is_step=True) for step in range(2)]
    bounded = {"bound": 1.5, "bound_source": "load"} | proven
    result = mt.Result(
        made.placements[1], "joint", "feasible", 2.0, seconds=0.7, history=(*history,), **bounded
    )
    panels = drawing.make_panels(replace(made, result=result))
    assert "search" not in {panel.key for panel in panels}


@pytest.mark.parametrize("windows", [2, 4, 5])
def test_few_windows_are_a_table(windows):
    """Below five windows there are their figures, open to see, and no line between them."""
    load = np.random.default_rng(windows).integers(1, 90, (windows, 2, 4))
    table = mt.RoutingStatistics.from_load(load)
    placement = mt.Placement.from_assignment([np.arange(4) % 2] * 2, 2)
    made = shown(table, placement, mt.Topology(2))
    (panel,) = (each for each in drawing.make_panels(made) if each.key == "time")
    assert bool(panel.charts) == (windows == 5)
    section = re.search(r'<section id="time">(.*?)</section>', page.render(made), re.DOTALL)[1]
    assert ("<details open>" in section) == (windows < 5)
    assert ("Drag" in section) == (windows == 5)
    assert section.count("<div") == section.count("</div>")
    if windows < 5:
        figures_of = [each.imbalance_per_window for each in made.evaluations]
        wanted = [
            (str(at), *map(digits, pair)) for at, pair in enumerate(zip(*figures_of, strict=True))
        ]
        assert panel.tables[0].rows == wanted


def marks_of(paper):
    """Count the images and the lines of a PDF as Chromium writes it."""
    streams = re.findall(rb"/FlateDecode[^>]*>>\s*stream\r?\n(.*?)endstream", paper, re.DOTALL)
    drawn = b"\n".join(zlib.decompressobj().decompress(each) for each in streams)
    lines = len(re.findall(rb"(?m)^[Sf]\*?$", drawn))
    return {"images": paper.count(b"/Subtype /Image"), "lines": lines}


@pytest.fixture(scope="module")
def browser():
    """Start a browser for all tests of pages, each of which has contexts of its own."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=0)
        yield browser
        browser.close()


def is_drawn(tab):
    """Return whether all of a page is drawn."""
    return tab.evaluate("document.documentElement.dataset.ready")


def wait_until(tab, condition):
    """Ask a page again until a condition holds; a page that never does ends with the suite."""
    while not condition(tab):
        tab.wait_for_timeout(20)


def open_page(context, file):
    """Open a page, and wait until all of it is drawn."""
    context.set_default_timeout(300_000)
    tab = context.new_page()
    tab.goto(file.as_uri())
    wait_until(tab, is_drawn)
    return tab


# Whether every chart that is seen is as wide as its place.
CHARTS_FIT = """() => [...document.querySelectorAll(".chart")].every((place) => {
  const drawing = place.querySelector(".main-svg");
  return !place.clientWidth || drawing.clientWidth === place.clientWidth;
})
"""


def set_width(tab, width):
    """Make the window of a page as wide, and wait until its charts follow."""
    tab.set_viewport_size({"width": width, "height": 900})
    wait_until(tab, lambda tab: tab.evaluate(CHARTS_FIT))


@pytest.fixture(scope="module")
def wide_tab(html, browser, tmp_path_factory):
    """Open the page once for the tests below, and give what it asked for and printed as well."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(html)
    heard = []
    viewport = {"width": 1280, "height": 900}
    permissions = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(offline=True, viewport=viewport, permissions=permissions)
    context.on("console", lambda message: heard.append(message.text))
    context.on("weberror", lambda error: heard.append(str(error.error)))
    context.on("request", lambda request: heard.append(request.url))
    return open_page(context, file), file, heard


@pytest.fixture
def tab(wide_tab):
    """Give the open page as it was when it was opened; nothing was asked for since."""
    tab, file, heard = wide_tab
    tab.emulate_media(media="null", color_scheme="light")
    set_width(tab, 1280)
    tab.evaluate("for (const of of document.querySelectorAll('details')) of.open = false")
    yield tab
    assert heard == [file.as_uri()]


@NEEDS_BROWSER
def test_a_command_is_copied(tab):
    """The button copies the command and says so."""
    from playwright.sync_api import expect

    tab.evaluate("navigator.clipboard.writeText('')")
    tab.get_by_role("button", name="Copy command 1").first.click()
    expect(tab.get_by_role("status")).to_have_text("Copied", timeout=300_000)
    assert tab.evaluate("navigator.clipboard.readText()") == COMMAND


@NEEDS_BROWSER
@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
def test_a_page_is_read_aloud_narrowed_and_printed(tab, scheme, width):
    """No violation of axe's rules in either scheme; paper holds all charts, whole and light."""
    rules = pytest.importorskip("axe_playwright_python", reason="axe is not installed").__path__[0]
    tab.emulate_media(color_scheme=scheme)
    set_width(tab, width)
    images = tab.locator("#chart-links .heatmaplayer image").all()
    first, second = (image.bounding_box() for image in images)
    assert (second["y"] >= first["y"] + first["height"]) == (width == 390)
    tab.evaluate("for (const of of document.querySelectorAll('details')) of.open = true")
    tab.evaluate(Path(rules, "axe.min.js").read_text())
    broken = tab.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in broken] == []
    # As a browser does, which lays out paper of 703 pixels without a word of its size.
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    charts = [of.bounding_box() for of in tab.locator(".chart .main-svg:first-child").all()]
    assert max(of["width"] for of in charts) <= 703
    tab.emulate_media(media="print", color_scheme=scheme)
    tab.set_viewport_size({"width": 703, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") == 703
    colour = "getComputedStyle(document.querySelector('.ytick text')).fill == 'rgb(28, 32, 38)'"
    assert tab.evaluate(colour)
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate(colour) == (scheme == "light")


# How many lines each option of a page stands on.
BROKEN_OPTIONS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const all = [];
  while (walker.nextNode()) {
    const text = walker.currentNode;
    if (text.parentNode.closest("script, [hidden]")) continue;
    for (const found of text.data.matchAll(/--[a-z][a-z-]+/g)) {
      const range = document.createRange();
      range.setStart(text, found.index);
      range.setEnd(text, found.index + found[0].length);
      all.push(range.getClientRects().length);
    }
  }
  return all;
}
"""


# How many texts charts have, and those that are cut, by how much on each side.
CUT_TEXTS = """() => {
  let seen = 0;
  const cut = [];
  for (const place of document.querySelectorAll(".chart")) {
    const box = place.parentNode.getBoundingClientRect();
    for (const text of place.querySelectorAll(".main-svg text")) {
      const part = text.getBoundingClientRect();
      if (!part.width) continue;
      seen++;
      const over = [box.left - part.left, part.right - box.right, box.top - part.top,
        part.bottom - box.bottom];
      const words = [place.dataset.chart, text.textContent];
      if (Math.max(...over) > 1) cut.push([...words, ...over]);
    }
  }
  return [seen, cut];
}
"""


@NEEDS_BROWSER
def test_no_option_is_broken_and_axes_are_whole(tab):
    """Options stand on one line, and no label of an axis is cut, on a window of any width."""
    for width in (320, 700, 1280):
        set_width(tab, width)
        lines = tab.evaluate(BROKEN_OPTIONS)
        assert len(lines) > 9 * 12
        assert {*lines} == {1}, width
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        seen, cut = tab.evaluate(CUT_TEXTS)
        assert seen > 50
        assert cut == [], width


@NEEDS_BROWSER
def test_axes_of_many_slots_are_whole(browser, tmp_path):
    """No label is cut on a phone, where the page is narrow from the first."""
    file = tmp_path / "page.html"
    load = np.random.default_rng(0).integers(1, 90, (6, 3, 512))
    placement = mt.Placement.from_assignment([np.arange(512) % 8] * 3, 8)
    page.write_page(file, shown(mt.RoutingStatistics.from_load(load), placement, mt.Topology(8)))
    tab = open_page(browser.new_context(viewport={"width": 390, "height": 900}), file)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    seen, cut = tab.evaluate(CUT_TEXTS)
    assert seen > 50
    assert cut == []


@NEEDS_BROWSER
def test_printed_at_once_is_printed_later(html, tab, browser):
    """Who prints before anything is drawn gets what they get who wait: every chart."""
    new = browser.new_page()
    new.goto(tab.url, wait_until="domcontentloaded", timeout=0)
    printed = [new.pdf(), tab.pdf()]
    new.close()
    marks = [marks_of(paper) for paper in printed]
    maps = json.dumps(first_variants(html)).count('"type": "heatmap"')
    assert marks[1]["images"] >= maps >= 4
    assert marks[0] == marks[1]


@NEEDS_BROWSER
def test_a_reader_sees_what_numpy_says(made, html, tab, browser):
    """Pixels of heat maps are their cells, hovering tells a cell, tables are the JSON's rows.

    The page asks for nothing and prints nothing; its answer can be read without a script.
    """
    charts = sum(len(each.charts) for each in drawing.make_panels(made))
    assert tab.locator('[data-drawn="yes"]').count() == charts
    assert "Share chart" not in tab.locator("body").inner_text()
    sizes = tab.evaluate(
        """async () => {
          const found = {};
          const all = "#chart-experts .heatmaplayer image, #chart-links .heatmaplayer image";
          for (const image of document.querySelectorAll(all)) {
            const read = new Image(), key = image.closest("[data-chart]").dataset.chart;
            read.src = image.href.baseVal;
            await read.decode();
            (found[key] ||= []).push([read.naturalWidth, read.naturalHeight]);
          }
          return found;
        }"""
    )
    placement = made.placements[1]
    slots = placement.devices * placement.slots_per_device
    assert sizes == {"experts": [[slots, placement.layers]], "links": [[8, 8], [8, 8]]}
    tab.locator("#chart-experts").scroll_into_view_if_needed()
    box = tab.locator("#chart-experts .heatmaplayer image").first.bounding_box()
    hover = tab.locator("#chart-experts .hoverlayer text")
    relative = made.load / made.load.mean(axis=1, keepdims=True)
    for layer, device in ((0, 0), (1, 3), (3, 7)):
        # The busiest of a device comes first.
        own = placement.slots[layer, device]
        share = {e: relative[layer, e] / placement.replicas[layer, e] for e in own.tolist()}
        expert = max(own.tolist(), key=share.get)
        column = device * placement.slots_per_device
        tab.mouse.move(
            box["x"] + box["width"] * (column + 0.5) / slots,
            box["y"] + box["height"] * (layer + 0.5) / placement.layers,
        )
        wanted = f"layer {layer}, expert {expert}: {digits(share[expert])} x the mean"
        while wanted not in "".join(hover.all_text_contents()):
            tab.wait_for_timeout(20)
    rows = tab.evaluate(
        "[...document.querySelectorAll('#layers tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    times = data(html, "contents")["proposed"]["predicted_us_per_layer"]
    assert [row[2] for row in rows] == [digits(each) for each in times]
    plain = browser.new_context(offline=True, java_script_enabled=False).new_page()
    plain.goto(tab.url)
    seen = plain.locator("body").inner_text()
    assert all(words in seen for words in (made.sentence, *(of.value for of in made.tiles)))


def test_what_losses_do_stands_on_the_first_screen(made):
    """A tile for devices and one for nodes, beside what runs."""
    tiles = {tile.label: tile for tile in made.tiles}
    losses = made.evaluations[1].losses
    assert {*losses} == {"device", "node"}
    for domain, each in losses.items():
        tile = tiles[f"Fatal losses of a {domain}"]
        assert tile.value == f"{100 * each.fatal:.1f} %"
        assert "100.0 % do with contiguous" in tile.note
