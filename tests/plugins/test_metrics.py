"""What Prometheus gets of decisions, and what the log has of them."""

import importlib
import logging
import os
import re
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch
from urllib.request import urlopen

import numpy as np
import pytest
import stand_in_vllm

import moetuner as mt
from moetuner.plugins import balancer as module
from moetuner.plugins import vllm
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.decision import Case
from moetuner.plugins.log import Log
from moetuner.plugins.metrics import Metrics, serve_metrics
from moetuner.plugins.settings import Settings, find_idle_variables
from moetuner.plugins.traffic import decide_drift

torch = pytest.importorskip("torch")

RANDOM = np.random.default_rng(7)
LOAD = RANDOM.lognormal(5, 1, (4, 16)).round()
START = np.tile(np.arange(20) % 16, (4, 1))
WRONG = np.full((4, 16), np.nan)
# Reasons for the engine's own map.
REASONS = ["files unreadable", "files differ", "maps differ", "rank failed", "rank silent"]
REASONS += ["rank late", "store failed", "round failed", "other"]
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
    np.testing.assert_equal(read(balancer), before)


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
    for running in (START, START):
        last = balancer.decide(LOAD, 20, 1, 1, 4, running)
    assert read(balancer)["map_in_force",] == 0
    # An engine may say what it runs before it asks again.
    balancer.confirm(last, 4, None)
    series = read(balancer)
    assert (series[key], series["map_in_force",]) == (3, 1)


def test_decisions_are_counted_from_zero():
    """Every result and reason is there before the first, which is an increase then."""
    client = importlib.import_module("prometheus_client")
    registry = client.CollectorRegistry()
    kinds = ("Counter", "Gauge", "Summary")
    Metrics(SimpleNamespace(**{k: partial(getattr(client, k), registry=registry) for k in kinds}))
    text = client.generate_latest(registry).decode()
    lines = re.findall(r"^moetuner_decisions_total{(.*)} (\S+)$", text, re.MULTILINE)
    counts = {tuple(re.findall(r'"(.*?)"', labels)): float(value) for labels, value in lines}
    assert not any(counts.values())
    fallbacks = [(reason, result) for result in ("own map", "off") for reason in REASONS]
    others = [("live loads", "taken"), ("stored placement", "taken")]
    assert set(counts) == {*fallbacks, *others, ("engine runs another", "not in force")}


# A process of rank 0 or of another one that decides at the load of a model, and its series.
LOAD_ALONE = """
import logging, sys
import numpy as np
from prometheus_client import generate_latest
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.settings import Settings

balancer = Balancer(Settings(rebalance=True), Log(logging.getLogger()))
balancer.decide(np.zeros((1, 4)), 4, 1, 1, 2, quiet=True, rank=int(sys.argv[1]))
balancer.flush()
print(generate_latest().decode())
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_series_are_there_from_the_load_on(rank, tmp_path):
    """Of rank 0, though a decision at the load of a model is not counted."""
    pytest.importorskip("prometheus_client")
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", LOAD_ALONE, str(rank)]
    text = subprocess.run(command, env=environment, check=True, capture_output=True).stdout.decode()
    series = 'moetuner_decisions_total{reason="live loads",result="taken"} 0.0'
    assert (series in text) == (rank == 0)


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
    lines = [line for line in caplog.messages if "layers change" in line]
    assert len(maps) == len(lines) == 3
    for line in lines:
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


def follow(balancer, loads, running, sizes=(20, 1, 1, 4), model=None):
    """Decide on loads one after another; the engine runs what was decided. Return all maps."""
    maps = [np.array(running)]
    for load in loads:
        maps.append(balancer.decide(load, *sizes, maps[-1], model=model))
    return maps


def find_distances(load, profile):
    """Compute the distance of two loads, layer by layer and expert by expert."""
    distances = []
    for row, other in zip(load.tolist(), profile.tolist(), strict=True):
        if sum(row) and sum(other):
            pairs = zip(row, other, strict=True)
            apart = [abs(one / sum(row) - two / sum(other)) for one, two in pairs]
            distances.append(sum(apart) / 2)
    return distances


def count_busiest(load, table, ranks):
    """Count the tokens of the slowest ranks, summed over layers; copies share evenly."""
    total = 0.0
    for row, experts in zip(load.tolist(), table.tolist(), strict=True):
        tokens = np.zeros(ranks)
        for slot, expert in enumerate(experts):
            tokens[slot // (len(experts) // ranks)] += row[expert] / experts.count(expert)
        total += tokens.max()
    return total


def test_how_far_live_loads_are_from_those_of_the_decision(read):
    """By quantile over layers, first unknown; against the loads by which the map was taken."""
    balancer = make()
    others = [RANDOM.lognormal(5, 1, (4, 16)).round() for _ in range(2)]
    maps = follow(balancer, [LOAD], START)
    series = read(balancer)
    assert all(np.isnan(series["traffic_distance", name]) for name in ("0.5", "0.95", "1"))
    profile = LOAD
    for other in others:
        maps += follow(balancer, [other], maps[-1])[1:]
        series = read(balancer)
        quantiles = np.quantile(find_distances(other, profile), [0.5, 0.95, 1])
        for name, value in zip(("0.5", "0.95", "1"), quantiles, strict=True):
            assert series["traffic_distance", name] == pytest.approx(value)
        if not np.array_equal(maps[-1], maps[-2]):
            profile = other
        assert np.isnan(series["traffic_has_drifted",])
    assert len(set(quantiles)) == 3


@pytest.fixture
def placed(tmp_path):
    """Store a placement of two layers with the loads that it was computed from."""
    load = np.array([[40, 10, 10, 10, 10], [10, 10, 10, 20, 30]])
    placement = mt.Placement([[[0, 1, 2], [3, 4, 0]], [[4, 1, 2], [3, 4, 0]]]).with_load(load)
    placement.save(tmp_path / "placement.json")
    return tmp_path / "placement.json", load


def test_a_stored_placement_is_compared_with_the_loads_of_its_file(read, placed):
    """In the layers that have experts; other traffic has drifted once enough of it was seen."""
    path, profile = placed
    balancer = make(placements=(path,))
    running = np.tile([0, 1, 2, 3, 4, 0], (3, 1))
    random = np.random.default_rng(0)
    for kind, expected in ((profile, 0), (profile[:, ::-1], 1)):
        for number in range(16):
            live = np.concatenate([np.zeros((1, 5)), random.poisson(20 * kind)])
            running = balancer.decide(live, 6, 1, 1, 2, running)
            series = read(balancer)
            if number < 7 and not expected:
                assert np.isnan(series["traffic_has_drifted",])
        quantiles = np.quantile(find_distances(live[1:], profile), [0.5, 0.95, 1])
        shown = [series["traffic_distance", name] for name in ("0.5", "0.95", "1")]
        assert shown == pytest.approx(quantiles.tolist())
        assert series["traffic_has_drifted",] == expected
        assert (series["traffic_distance", "1"] > 0.2) == bool(expected)


@pytest.mark.parametrize("load", [None, [[1, 2]], [["a"] * 5] * 2, [[-1.0] * 5] * 2])
def test_a_file_without_loads_says_no_distance(load, read, placed):
    """Nor does one with loads that make no sense; all other figures are there."""
    path, _ = placed
    placement = mt.Placement.load(path)
    placement.with_names(settings={} if load is None else {"load": load}).save(path)
    balancer = make(placements=(path,))
    follow(balancer, [np.ones((2, 5))] * 9, [[0, 1, 2, 3, 4, 0]] * 2, (6, 1, 1, 2))
    series = read(balancer)
    distances = [series["traffic_distance", name] for name in ("0.5", "0.95", "1")]
    assert np.isnan([*distances, series["traffic_has_drifted",]]).all()
    assert series["map_in_force",] == 1
    assert not np.isnan(series["seen_gain",])


@pytest.mark.parametrize("start", ["own", None])
def test_the_gain_that_was_seen(start, read, placed):
    """Against the engine's own map, summed over decisions, from the one after the map was taken.

    Where the engine does not say what it runs at first, that is the map with which engines begin.
    """
    path, _ = placed
    own = np.array([[4, 3, 2, 1, 0, 0]] * 2 if start else [[0, 1, 2, 3, 4, 0]] * 2)
    balancer = make(placements=(path,))
    first = balancer.decide(np.zeros((2, 5)), 6, 1, 1, 2, own if start else None)
    assert np.isnan(read(balancer)["seen_gain",])
    random = np.random.default_rng(1)
    loads = random.poisson(random.lognormal(5, 1, (3, 2, 5)))
    before = after = 0.0
    for load in loads:
        # A rank's slots in another order are the same map.
        turned = first.reshape(2, 2, 3)[..., ::-1].reshape(2, 6)
        balancer.decide(load, 6, 1, 1, 2, turned)
        before += count_busiest(load, own, 2)
        after += count_busiest(load, first, 2)
        assert read(balancer)["seen_gain",] == pytest.approx(1 - after / before)
    assert before != pytest.approx(after)
    # The engine ran another map, which saved nothing of ours, and is its own from now on.
    other = np.array([[0, 1, 4, 3, 2, 1]] * 2)
    balancer.decide(loads[0], 6, 1, 1, 2, other)
    assert np.isnan(read(balancer)["seen_gain",])
    balancer.decide(loads[1], 6, 1, 1, 2, first)
    saved = 1 - count_busiest(loads[1], first, 2) / count_busiest(loads[1], other, 2)
    assert read(balancer)["seen_gain",] == pytest.approx(saved)


def test_the_seen_gain_is_the_predicted_one_on_the_same_loads(read):
    """Of live loads that stay as they are."""
    balancer = make()
    follow(balancer, [LOAD], START)
    predicted = read(balancer)["predicted_gain",]
    follow(balancer, [LOAD], balancer.decide(LOAD, 20, 1, 1, 4, START))
    assert read(balancer)["seen_gain",] == pytest.approx(predicted)
    assert predicted > 0.1


def test_no_value_of_before_a_fall_back_remains(read, placed):
    """Distance, drift and seen gain are no number while the engine serves its own map."""
    path, load = placed
    balancer = make(placements=(path,))
    maps = follow(balancer, [load] * 9, [[0, 1, 2, 3, 4, 0]] * 2, (6, 1, 1, 2))
    names = [("traffic_distance", "1"), ("traffic_has_drifted",), ("seen_gain",)]
    series = read(balancer)
    assert not np.isnan([series[name] for name in names]).any()
    balancer.decide(np.full((2, 5), np.nan), 6, 1, 1, 2, maps[-1])
    series = read(balancer)
    assert np.isnan([series[name] for name in names]).all()


def test_windows_of_before_a_map_say_nothing_of_its_loads(read):
    """With live loads that jump, the map changes, and enough windows have to come again."""
    balancer = make()
    maps = follow(balancer, [LOAD] * 9, START)
    assert read(balancer)["traffic_has_drifted",] == 0
    maps = follow(balancer, [LOAD[:, ::-1]] * 2, maps[-1])
    assert np.isnan(read(balancer)["traffic_has_drifted",])
    follow(balancer, [LOAD[:, ::-1]] * 7, maps[-1])
    assert read(balancer)["traffic_has_drifted",] == 0


@pytest.mark.parametrize(
    ("tokens", "profile_tokens", "shift"),
    [
        (40, 40, 0),
        (40, 4000, 0),
        (4000, 200, 0),
        (4000, 4000, 0.02),
        (40, 4000, 0.3),
        (4000, 4000, 0.3),
    ],
)
def test_chance_is_not_taken_for_drift(tokens, profile_tokens, shift):
    """Neither where live windows are small nor where the profile is; a shift of 0.3 is."""
    random = np.random.default_rng(5)
    share = random.dirichlet(np.ones(64), 6)
    moved = (1 - shift) * share + shift * np.roll(share, 1, axis=1)
    profile = random.poisson(profile_tokens * share).astype(float)
    windows = [random.poisson(tokens * moved).astype(float) for _ in range(16)]
    assert decide_drift(windows, profile) == (shift > 0.1)
    assert np.isnan(decide_drift(windows[:7], profile))
    assert not np.isnan(decide_drift(windows[:8], profile))


@pytest.mark.parametrize(("high", "expected"), [(11, 0), (16, 1)])
def test_windows_that_jump_are_no_drift(high, expected):
    """Farther from the profile than halves are from each other on average, but not than all."""
    windows = [np.array([[90.0, 10]])] * high + [np.array([[10.0, 90]])] * (16 - high)
    assert decide_drift(windows, np.array([[5e5, 5e5]])) == expected


@pytest.fixture
def alone(monkeypatch):
    """Let no engine collect metrics."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    serve_metrics.cache_clear()
    yield
    serve_metrics.cache_clear()


def serve(caplog, port="0"):
    """Decide with a port for metrics; return the balancer and the ports that the log names."""
    caplog.set_level(logging.INFO, LOGGER.name)
    variables = {"MOETUNER_REBALANCE": "1", "MOETUNER_METRICS_PORT": port}
    balancer = Balancer(Settings.from_environment(variables), Log(LOGGER))
    assert balancer.decide(LOAD, 20, 1, 1, 4, START) is not None
    balancer.flush()
    lines = [line for line in caplog.messages if "serve" in line]
    return balancer, [int(port) for port in re.findall(r"metrics at port (\d+)", str(lines))]


def scrape(port):
    """Read what is served at a port."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return answer.read().decode()


def test_rank_0_serves_its_metrics_where_no_engine_does(alone, caplog):
    """At the port of the variable, once a process, with the series of later decisions too."""
    balancer, ports = serve(caplog)
    assert len(ports) == 1
    assert "moetuner_map_in_force 1.0\n" in scrape(*ports)
    assert re.search(r'^moetuner_imbalance{map="after",quantile="1"} 1\.\d+$', scrape(*ports), re.M)
    assert balancer.decide(WRONG, 20, 1, 1, 4, START) is None
    balancer.flush()
    assert "moetuner_map_in_force 0.0\n" in scrape(*ports)
    _, again = serve(caplog)
    assert set(again) == set(ports)


def test_a_port_that_is_taken_stops_nothing(alone, caplog):
    """One warning names it, however many decisions follow."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        balancer, ports = serve(caplog, str(port))
        assert balancer.decide(LOAD, 20, 1, 1, 4, START) is not None
        balancer.flush()
    assert not ports
    [line] = [line for line in caplog.messages if "not served" in line]
    assert f"port {port} of MOETUNER_METRICS_PORT" in line
    assert "in use" in line


@pytest.mark.parametrize("port", ["x", "-1", "65536", "1e3", "0x10", "٣", "9" * 400, "8000.5"])
def test_a_wrong_port_is_one_line(port, alone, caplog):
    """It changes nothing of what ranks decide, and nothing is served."""
    _, ports = serve(caplog, port)
    assert not ports
    variables = {"MOETUNER_REBALANCE": "1", "MOETUNER_METRICS_PORT": port}
    [line] = find_idle_variables(variables)
    assert line.startswith("MOETUNER_METRICS_PORT must be a port from 0 to 65535, got ")
    assert "\n" not in line
    settings = [
        Settings.from_environment(variables | {"MOETUNER_METRICS_PORT": text})
        for text in ("", "9100", "65535")
    ]
    assert [one.metrics_port for one in settings] == [None, 9100, 65535]
    assert len({Balancer(one, Log(LOGGER)).purpose for one in settings}) == 1


def test_without_the_variable_nothing_is_served(alone, caplog):
    """Nor on other ranks, nor beside an engine that collects the series."""
    assert serve(caplog, "")[1] == []
    balancer = make(rebalance=True, metrics_port=0)
    balancer.decide(LOAD, 20, 1, 1, 4, START, rank=1)
    balancer.flush()
    assert not serve_metrics.cache_info().misses
    both = {"MOETUNER_REBALANCE": "1", "MOETUNER_METRICS_PORT": "0"}
    both["PROMETHEUS_MULTIPROC_DIR"] = "folder"
    assert Settings.from_environment(both).metrics_port is None
    assert find_idle_variables(both) == [
        "MOETUNER_METRICS_PORT does nothing where PROMETHEUS_MULTIPROC_DIR is set"
    ]


def test_metrics_without_their_library_are_one_line(alone, caplog, monkeypatch):
    """The engine goes on."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    _, ports = serve(caplog)
    assert not ports
    assert sum("metrics are not served" in line for line in caplog.messages) == 1
