"""The dashboard and the alerts of examples/monitoring fit the series that plugins export."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES += [
    variable["query"]["query"]
    for variable in DASHBOARD["templating"]["list"]
    if variable["type"] == "query"
]
TEXTS = {
    "dashboard.json": "\n".join(QUERIES),
    **{name: (FOLDER / name).read_text() for name in ("rules.yml", "rules_test.yml")},
}
# Labels that the scrape adds.
SCRAPED = {"job", "instance"}
# Decisions of every result on one rank, and the series as they are scraped.
DECISIONS = """
import logging, sys
from pathlib import Path
import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
import moetuner as mt
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.settings import Settings

load = np.random.default_rng(0).lognormal(5, 1, (4, 16)).round()
start = np.tile(np.arange(20) % 16, (4, 1))
path = Path(sys.argv[1])
mt.Placement(start.reshape(4, 4, 5)).save(path)

def decide(balancer, *loads):
    balancer.take_model(4, "tiny", 8)
    for load in loads:
        balancer.decide(load, 20, 1, 1, 4, start, model="tiny")
    balancer.flush()

log = Log(logging.getLogger("moetuner.tests.monitoring"))
decide(Balancer(Settings(rebalance=True), log), load, load, load * np.nan)
decide(Balancer(Settings(placements=(path,)), log), load)
decide(Balancer(Settings(placements=(path.with_suffix(".none"),)), log), load)
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Values of the labels of each series that a process exports after decisions of all results."""
    parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus_client")
    folder = tmp_path_factory.mktemp("series")
    done = subprocess.run(
        [sys.executable, "-c", DECISIONS, str(folder / "placement.json")],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    series = {}
    for family in parser.text_string_to_metric_families(done.stdout):
        for name, labels, *_ in family.samples:
            values = series.setdefault(name, {})
            for label, value in labels.items():
                values.setdefault(label, set()).add(value)
    return series


@pytest.fixture
def promtool():
    """Return a function that runs promtool, which must have no remark."""
    path = shutil.which(os.environ.get("PROMTOOL", "promtool"))
    if path is None:
        pytest.skip("needs promtool on the PATH, or its path in PROMTOOL")

    def run(*arguments):
        command = [path, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def list_selectors(text):
    """Return names of moetuner's series in a text, each with what it asks of labels."""
    found = re.findall(r"\b(moetuner_\w+)(?:{(.*?)})?", text, re.DOTALL)
    return [
        (name, re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"(.*?)"', labels)) for name, labels in found
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_series_and_labels_are_exported(name, exported):
    """Every series that a file names is one that plugins export, with these values of labels."""
    selectors = list_selectors(TEXTS[name])
    assert selectors
    for series, matchers in selectors:
        assert series in exported
        for label, values in matchers:
            assert label in exported[series].keys() | SCRAPED, series
            if label not in SCRAPED:
                assert set(values.split("|")) <= exported[series][label], series


def test_every_series_is_shown(exported):
    """The dashboard has all that plugins export."""
    assert exported.keys() == {series for series, _ in list_selectors(TEXTS["dashboard.json"])}


def test_groups_and_legends_are_of_labels(exported):
    """What queries group by and legends show are labels of the series in the query."""
    groups = re.compile(r"\b(?:by|on) \((.*?)\)")
    for panel in PANELS:
        for target in panel["targets"]:
            labels = SCRAPED.union(
                *(exported[series] for series, _ in list_selectors(target["expr"]))
            )
            used = {name for names in groups.findall(target["expr"]) for name in names.split(", ")}
            assert used <= labels, panel["title"]
            shown = set(re.findall(r"{{(.*?)}}", target["legendFormat"]))
            assert shown <= (used or labels), panel["title"]


def test_panels_are_complete():
    """Each has a title, a description, a unit and the data source that the user chooses."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert all(variables[name]["datasource"] == source for name in ("job", "instance"))
    assert 0 < len(PANELS) <= 12
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == source, panel["title"]
        targets = panel["targets"]
        assert len({target["refId"] for target in targets}) == len(targets) > 0, panel["title"]
        for target in targets:
            assert target["datasource"] == source, panel["title"]
            for _, matchers in list_selectors(target["expr"]):
                assert matchers[:2] == [("job", "$job"), ("instance", "$instance")]


def test_panels_do_not_overlap():
    """They lie within the 24 columns of a dashboard, beside and below each other."""
    places = [panel["gridPos"] for panel in PANELS]
    assert all(0 <= place["x"] < place["x"] + place["w"] <= 24 for place in places)
    assert all(place["y"] >= 0 < place["h"] for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_alerts_say_what_to_read():
    """Each has a severity, a summary, a test, and a page and section that are there."""
    alerts = TEXTS["rules.yml"].split("- alert: ")[1:]
    names = [alert.split()[0] for alert in alerts]
    assert len(set(names)) == len(names) == 6
    for name, alert in zip(names, alerts, strict=True):
        assert re.search(r"severity: (info|warning|critical)\n", alert), name
        assert re.search(r'summary: ".*instance.*"\n', alert), name
        text = " ".join(alert.partition("description: >-")[2].split())
        pages = re.findall(r'(?:"([^"]*)" in )?(docs/\S+\.md)', text)
        assert pages, name
        for section, page in pages:
            assert f"## {section}" in (ROOT / page).read_text(), name
        assert f'alertname="{name}", alertstate="firing"' in TEXTS["rules_test.yml"]


def test_rules_are_right(promtool):
    """Prometheus accepts them, and each alert fires where it should and nowhere else."""
    promtool("check", "rules", "rules.yml")
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "rules_test.yml")


def test_queries_are_right(promtool, tmp_path):
    """Prometheus can read every query of the dashboard."""
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)
