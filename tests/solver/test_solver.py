"""solve(): every method answers every problem validly, reproducibly, and within its limits."""

import itertools
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
from brute_force import optimum, raised_caps, small_problem

import moetuner as mt
from moetuner.report.outcome import find_caps
from moetuner.solver import METHODS, effort
from moetuner.solver.run import Run


@pytest.fixture
def problem(make_trace):
    """Eight experts in three layers, three devices."""
    stats = mt.RoutingStatistics.from_trace(make_trace(600), window=64, sets=False)
    return mt.Problem(stats, mt.Topology(4), max_imbalance=1.2)


# Experts, devices, and the problem: uneven counts leave slots empty, and without pairs every
# method still balances or ignores the load.
INSTANCES = {
    "dispatch": (8, 4, {"max_imbalance": 1.2}),
    "follow": (8, 4, {"max_imbalance": 1.2, "regime": "follow"}),
    "one device": (7, 1, {}),
    "uneven": (7, 3, {}),
    "few experts": (7, 9, {}),
    "loads alone": (8, 4, {"max_imbalance": 1.2}),
}


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_one_valid_placement(make_trace, method, name):
    """Sizes fit, threads change nothing, the objective is its own, and no bound is above it."""
    experts, devices, arguments = INSTANCES[name]
    statistics = mt.RoutingStatistics.from_trace(
        make_trace(200, experts=experts), window=64, sets=False
    )
    if name == "loads alone":
        statistics = mt.RoutingStatistics.from_load(statistics.window_load)
    problem = mt.Problem(statistics, mt.Topology(devices), **arguments)
    one, two = (mt.solve(problem, method, seed=3, iterations=500, threads=n) for n in (1, 2))
    assert one.placement == two.placement
    placement = one.placement
    assert (placement.layers, placement.num_experts, placement.devices) == (3, experts, devices)
    assert placement.slots_per_device == problem.slots
    assert (placement.replicas == 1).all()
    assert (placement.fingerprint, placement.model) == (statistics.fingerprint, statistics.model)
    assert one.objective == problem.value(placement)
    assert one.bound is None or one.bound <= one.objective * (1 + 1e-12)
    assert name != "loads alone" or not one.details.search.trials


def test_an_offer_beyond_slots_or_rules_is_no_answer():
    """Whatever a stage offers, the answer keeps slots, pins and bans where anything does."""
    load = mt.RoutingStatistics.from_load([[1, 1, 1, 90]])
    kept = np.array([[[0, 3], [1, 2]]], dtype=np.int32)
    offers = {
        "slots": np.array([[[3, -1, -1], [0, 1, 2]]], dtype=np.int32),
        "pinned": np.array([[[0, 1], [2, 3]]], dtype=np.int32),
        "forbidden": np.array([[[1, 3], [0, 2]]], dtype=np.int32),
    }
    for objective, (name, slots) in itertools.product(("time", "balance"), offers.items()):
        rule = {} if name == "slots" else {name: [(0, 3, 0) if name == "pinned" else (0, 0, 1)]}
        problem = mt.Problem(load, mt.Topology(2), objective=objective, **rule)
        run = Run(problem)
        run.offer(kept, "kept", is_start=True)
        run.offer(slots, "broken")
        assert run.best.by == run.answer().by == "kept"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("node", [None, 1])
def test_heuristic_finds_the_optimum_of_tiny_problems(seed, node, monkeypatch):
    """On four to six experts the search, unpolished, equals brute force, under the cap it keeps."""
    monkeypatch.setattr(effort, "POLISHED_SLOTS", 0)
    problem = small_problem(seed, 3, 4 + seed % 3, 2, devices_per_node=node, max_imbalance=1.1)
    placement = mt.solve(problem, "heuristic", iterations=5000).placement
    caps = raised_caps(problem, placement.slots)
    assert problem.objective_function.cost(placement) == optimum(problem, caps)


@pytest.mark.parametrize("method", ["joint", "heuristic"])
@pytest.mark.parametrize("seed", range(6))
def test_infeasible_caps_are_named(method, seed):
    """Layers whose cap nothing keeps are named, with the smallest cap, whatever all speeds are."""
    problem = small_problem(seed, 3, 7, 3, max_imbalance=1.03)
    speed = ((1.0, 1.5, 0.5)[seed % 3],) * 3
    problem = replace(problem, topology=replace(problem.topology, speed=speed))
    result = mt.solve(problem, method, iterations=2000).details.caps
    least = {}
    for layer, load in enumerate(problem.load.astype(int)):
        ways = np.array(list(itertools.product(range(3), repeat=7)))
        holds = (ways[:, :, None] == np.arange(3)).astype(int)
        holds = holds[(holds.sum(axis=1) <= problem.slots).all(axis=1)]
        peak = np.einsum("wed,e->wd", holds, load).max(axis=1).min()
        if peak > problem.caps.whole[layer]:
            least[layer] = peak * 3 / load.sum()
    assert result.infeasible == {
        layer: (pytest.approx(cap), pytest.approx(cap)) for layer, cap in least.items()
    }
    assert bool(least) == (
        "cap that nothing keeps" in [of.kind for of in find_caps(problem, result)]
    )


def test_no_time_gives_a_placement(problem):
    """A time limit of zero still answers."""
    for method in METHODS:
        result = mt.solve(problem, method, time_limit=0)
        assert (result.placement.replicas == 1).all()


def test_a_time_limit_ends_a_search(make_trace):
    """Also one of more steps than anybody would wait for."""
    stats = mt.RoutingStatistics.from_trace(make_trace(500, layers=12, experts=64), sets=False)
    problem = mt.Problem(stats, mt.Topology(8), max_imbalance=1.3)
    result = mt.solve(problem, "heuristic", iterations=1 << 50, time_limit=0.3)
    assert result.details.search.trials < 1 << 40


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer's signal")
def test_what_a_handler_of_signals_raises_is_raised(make_trace):
    """Only Ctrl-C asks for the best so far: a timer's error is not taken for it, nor lost."""
    stats = mt.RoutingStatistics.from_trace(make_trace(500, layers=12, experts=64), sets=False)
    problem = mt.Problem(stats, mt.Topology(8), max_imbalance=1.3)

    def late(number, frame):
        raise TimeoutError("late")

    def begin(progress):
        if progress.phase == "search":  # which goes on until the timer ends it
            signal.setitimer(signal.ITIMER_REAL, 0.001)

    # The limit of the whole test is a timer too: it is put back.
    before, handler = signal.getitimer(signal.ITIMER_REAL), signal.signal(signal.SIGALRM, late)
    try:
        with pytest.raises(TimeoutError, match="late"):
            mt.solve(problem, "heuristic", time_limit=1e6, progress=begin)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="needs signals")
@pytest.mark.parametrize("error", [None, RuntimeError])
@pytest.mark.parametrize("phase", ["search", "bound"])
def test_interrupt_in_every_phase(make_trace, phase, error):
    """Ctrl-C in search or bound ends it with the best, bound and all; an error there is raised.

    Both phases are heard of as soon as they begin.
    """
    stats = mt.RoutingStatistics.from_trace(make_trace(3000, layers=6, experts=32), sets=False)
    problem = mt.Problem(
        stats, mt.Topology(4), regime="follow", max_imbalance=1.3, objective="traffic"
    )
    seen = []

    def interrupt(line):
        seen.append(line.phase)
        if line.phase == phase and error is not None:
            raise error(phase)
        if line.phase == phase and seen.count(phase) == 1:
            signal.raise_signal(signal.SIGINT)

    if error is not None:
        with pytest.raises(error, match=phase):
            mt.solve(problem, iterations=1000, progress=interrupt)
        return
    result = mt.solve(problem, iterations=1000, progress=interrupt)
    assert (result.placement.replicas == 1).all()
    assert phase in seen
    assert result.status == "interrupted"
    assert phase == "search" or 0 < result.bound <= result.objective


def test_progress_tells_the_seconds_of_all_phases(make_trace):
    """Time goes on from phase to phase, and lines come from the calling thread."""
    stats = mt.RoutingStatistics.from_trace(make_trace(600, layers=3, experts=16), sets=False)
    problem = mt.Problem(stats, mt.Topology(4), max_imbalance=1.3, objective="traffic")
    seen, threads = [], set()

    def listen(line):
        seen.append(line)
        threads.add(threading.get_ident())

    result = mt.solve(problem, iterations=1000, progress=listen)
    assert threads == {threading.get_ident()}
    assert {"search", "bound"} <= {line.phase for line in seen}
    seconds = [line.seconds for line in seen]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert seconds[-1] <= result.seconds


def test_the_papers_method_has_two_names(problem):
    """``moetuner`` means ``paper``, and the result says so."""
    results = [mt.solve(problem, method) for method in ("paper", "moetuner")]
    assert [result.method for result in results] == ["paper", "paper"]
    assert results[0].placement == results[1].placement
