"""What Prometheus gets of decisions, and what the log has of them."""

import importlib
import logging
import re
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import stand_in_vllm

import moetuner as mt
from moetuner.plugins import balancer as module
from moetuner.plugins import vllm
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.decision import Case
from moetuner.plugins.log import Log
from moetuner.plugins.settings import Settings

torch = pytest.importorskip("torch")

RANDOM = np.random.default_rng(7)
LOAD = RANDOM.lognormal(5, 1, (4, 16)).round()
START = np.tile(np.arange(20) % 16, (4, 1))
WRONG = np.full((4, 16), np.nan)
LOGGER = logging.getLogger("moetuner.tests.metrics")


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Let there be a folder of metrics; return a function that reads the series of a balancer.

    Labels of a series are in the order of their names; counters have what they grew by since the
    fixture was made.
    """
    client = importlib.import_module("prometheus_client")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def scrape():
        lines = re.findall(r"^moetuner_(\S+?)(?:{(.*)})? (\S+)$", text(), re.MULTILINE)
        return {
            (name, *re.findall(r'"(.*?)"', labels)): float(value) for name, labels, value in lines
        }

    def text():
        return client.generate_latest().decode()

    before = scrape()

    def grown(balancer):
        balancer.flush()
        return {
            key: value - (before.get(key, 0.0) if re.search("_(total|count|sum)$", key[0]) else 0)
            for key, value in scrape().items()
        }

    return grown


def make(**settings):
    """Make a balancer by live loads, or of settings."""
    return Balancer(Settings(**(settings or {"rebalance": True})), Log(LOGGER))


def test_a_decision_in_numbers(read):
    """Its result, balance by layer before and after, gain, copies, seconds by part, and version."""
    balancer = make()
    decided = balancer.decide(LOAD, 20, 1, 1, 4, START)
    series = read(balancer)
    case = Case.from_arguments(LOAD, 20, 1, 1, 4, START)
    slots = decided.reshape(4, 4, 5).astype(np.int32)
    for name, table in (("before", case.slots), ("after", slots)):
        quantiles = np.quantile(case.imbalance(table), [0.5, 0.95, 1])
        for quantile, value in zip(("0.5", "0.95", "1"), quantiles, strict=True):
            assert series["imbalance", name, quantile] == pytest.approx(value)
    kept = case.balancedness(case.slots) / case.balancedness(slots)
    assert series["predicted_gain",] == pytest.approx(1 - kept)
    assert series["copies_moved_total",] == case.copies_moved(slots) > 0
    assert series["decisions_total", "live loads", "taken"] == series["map_in_force",] == 1
    assert [series["decision_seconds_count", part] for part in ("decide", "agree")] == [1, 1]
    assert series["build_info", mt.__version__] == 1
    assert series["placement_timestamp_seconds",] > 0
    assert series.get(("moved_bytes_total",), 0) == 0


def test_a_fall_back_is_seen_and_is_logged_again_after_a_success(read, caplog):
    """No figure of the last good decision remains; one line for those in a row."""
    caplog.set_level(logging.INFO, LOGGER.name)
    balancer = make()
    for turn in (1, 2):
        assert balancer.decide(LOAD, 20, 1, 1, 4, START) is not None
        for _ in range(3):
            assert balancer.decide(WRONG, 20, 1, 1, 4, START) is None
        series = read(balancer)
        assert series["decisions_total", "live loads", "taken"] == turn
        assert series["decisions_total", "rank failed", "own map"] == 3 * turn
        assert series["map_in_force",] == 0
        figures = [value for key, value in series.items() if key[0] == "imbalance"]
        figures += [series["predicted_gain",], series["placement_timestamp_seconds",]]
        assert np.isnan(figures).all()
        assert len(figures) == 8
        assert sum("own map" in line for line in caplog.messages) == turn


def test_a_draft_model_without_a_placement_is_no_fall_back(read, tmp_path):
    """Figures stay those of the main model, which serves its placement."""
    path = tmp_path / "main.json"
    mt.Placement(START.reshape(4, 4, 5)[:, ::-1]).save(path)
    balancer = make(placements=(path,))
    assert balancer.decide(LOAD, 20, 1, 1, 4, START, model="main") is not None
    before = read(balancer)
    assert before["map_in_force",] == 1
    assert balancer.decide(LOAD[:1], 20, 1, 1, 4, START[:1], model="main (draft)") is None
    assert read(balancer) == before


def test_off_is_counted_at_every_decision(read, tmp_path):
    """With the reason for which ranks take the engine's own map from now on."""
    balancer = make(placements=(tmp_path / "none.json",))
    for _ in range(3):
        assert balancer.decide(LOAD, 20, 1, 1, 4, START) is None
    assert read(balancer)["decisions_total", "files unreadable", "off"] == 3


def test_a_map_that_the_engine_does_not_run_is_not_in_force(read):
    """Until it does; in whatever order the engine has the slots of a rank."""
    balancer = make()
    key = "decisions_total", "engine runs another", "not in force"
    first = balancer.decide(LOAD, 20, 1, 1, 4, START)
    assert read(balancer)["map_in_force",] == 1
    balancer.decide(LOAD, 20, 1, 1, 4, START)
    series = read(balancer)
    assert (series[key], series["map_in_force",]) == (1, 0)
    turned = first.reshape(4, 4, 5)[..., ::-1].reshape(4, 20)
    balancer.decide(LOAD, 20, 1, 1, 4, turned)
    series = read(balancer)
    assert (series[key], series["map_in_force",]) == (1, 1)


def test_other_ranks_have_no_series(read):
    """Of each decision there is one, however many ranks a node has."""
    balancer = make()
    balancer.decide(LOAD, 20, 1, 1, 4, START, rank=1)
    balancer.decide(WRONG, 20, 1, 1, 4, START, rank=1)
    assert not any(value for key, value in read(balancer).items() if key[0] == "decisions_total")


def test_a_stored_placement_has_the_date_of_its_file_and_bytes(read, tmp_path):
    """Bytes are known where the engine says the size of an expert, as vLLM does."""
    path = tmp_path / "placement.json"
    mt.Placement([[[0, 1, 2], [3, 4, 0]]] * 2).save(path)
    balancer = make(placements=(path,))
    model = stand_in_vllm.model()
    model.expert_weights = [[torch.zeros(3, 8), torch.zeros(3, 2, 2, dtype=torch.float64)]] * 2
    size = vllm.weigh_expert(model)
    assert size == 8 * 4 + 4 * 8
    assert vllm.weigh_expert(stand_in_vllm.model()) == 0
    balancer.take_model(2, "tiny", size)
    running = [[0, 1, 2, 3, 4, 4]] * 2
    assert balancer.decide(np.ones((2, 5)), 6, 1, 1, 2, running, model="tiny") is not None
    series = read(balancer)
    assert series["decisions_total", "stored placement", "taken"] == 1
    assert series["placement_timestamp_seconds",] == pytest.approx(path.stat().st_mtime)
    assert series["copies_moved_total",] == 2
    assert series["moved_bytes_total",] == 2 * size


@pytest.mark.parametrize("last", [0, -1])
def test_a_line_names_the_placement_of_the_file(last, tmp_path, caplog):
    """By one checksum, in whatever order the engine runs the slots of a rank.

    The map that fills an empty slot has another one.
    """
    caplog.set_level(logging.INFO, LOGGER.name)
    placement = mt.Placement([[[0, 1, 2], [3, 4, last]]] * 2)
    placement.save(tmp_path / "placement.json")
    balancer = make(placements=(tmp_path / "placement.json",))
    maps = set()
    for running in ([0, 1, 2, 3, 4, 4], [4, 0, 1, 2, 3, 3], [2, 3, 1, 0, 4, 4]):
        maps.add(str(balancer.decide(np.ones((2, 5)), 6, 1, 1, 2, [running] * 2)))
    balancer.flush()
    assert len(maps) == len(caplog.messages) == 3
    for line in caplog.messages:
        assert f"({placement.checksum})" in line
        assert f"map {placement.filled().checksum} of 2 layers" in line


def test_waiting_for_ranks_is_apart(read, caplog):
    """In the line and in the series, by a clock that each look takes further."""
    caplog.set_level(logging.INFO, LOGGER.name)
    balancer = make()
    clock = SimpleNamespace(perf_counter=iter([1.0, 1.5, 4.5]).__next__, time=lambda: 0.0)
    with patch.object(module, "time", clock):
        balancer.decide(LOAD, 20, 1, 1, 4, START)
        series = read(balancer)
    assert "decided in 500.0 ms, agreed in 3000.0 ms" in caplog.messages[0]
    assert series["decision_seconds_sum", "decide"] == pytest.approx(0.5)
    assert series["decision_seconds_sum", "agree"] == pytest.approx(3)
