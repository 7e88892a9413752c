"""The benchmark against peers, in small and without their wheels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import versus
from instances import Instance, bundled, domains, routing
from peers import MtKaHyPar, memra_greedy

import moetuner as mt

SMALL = Instance("made", routing(2, 6, 2, tokens=500), mt.Topology(2), 3)
# Enough tokens for windows of prefill.
LONG = Instance("long", routing(2, 6, 2, tokens=20_000), mt.Topology(2), 3)
# Copies: five slots of two devices for eight experts.
LOADS = Instance(
    "loads", mt.RoutingStatistics.from_load(domains(2, 20, 0, 8)), mt.Topology(2), width=5
)


def methods(instance: Instance) -> dict[str, versus.Method]:
    return versus.others(instance, {}, None, Path("none"))


@pytest.mark.parametrize("instance", [SMALL, LOADS], ids=str)
def test_nothing_is_below_the_bound_or_the_oracle(brief: None, instance: Instance) -> None:
    """In the column of its goal: bound, oracle that is proven best, everybody else."""
    figures, bounds = versus.figures_of(instance, methods(instance), 1)
    columns = versus.columns_of(instance)
    assert any(bounds.values())
    for goal in versus.FREE if instance is SMALL else ["balance"]:
        column = versus.GOALS[goal][1]
        at = columns.index(column)
        for name, rows in figures.items():
            reached = np.array(rows)[:, at]
            assert (reached >= bounds[column][0] - 1e-9).all(), (goal, name)
            if goal in ("follow", "dispatch"):
                assert (reached >= figures[f"oracle, {goal}"][0][at] - 1e-9).all(), (goal, name)


@pytest.mark.parametrize("instance", [SMALL, LONG, LOADS], ids=str)
def test_what_is_made_small_is_the_figure_of_the_column(instance: Instance) -> None:
    """A goal's value of a placement is what its column shows, but for times by counts."""
    slots = methods(instance)["random"](versus.counted(instance.traffic), instance, 0)
    figures = versus.judged(instance, slots, instance.traffic)
    placement = mt.Placement(slots, num_experts=instance.traffic.num_experts)
    for goal in versus.figured(instance):
        posed = versus.problem_of(versus.counted(instance.traffic), instance, goal)
        shown = figures[versus.columns_of(instance).index(versus.GOALS[goal][1])]
        assert posed.value(placement) == pytest.approx(shown, rel=5e-3), goal


@pytest.mark.parametrize("name", [*methods(SMALL), "ours, plugins"])
def test_every_expert_is_placed_once(name: str) -> None:
    """Where there is a slot for each, in every layer."""
    method = (methods(SMALL) | {"ours, plugins": versus.plugin})[name]
    slots = method(versus.counted(SMALL.traffic), SMALL, 0)
    assert (np.sort(slots.reshape(2, -1), axis=1) == np.arange(6)).all()


@pytest.mark.parametrize(
    ("chosen", "device_of"),
    [
        # The hottest, 3, begins; 0 is chosen with it once, as 1 and 2 are with each other.
        ([[3, 0], [3, 3], [1, 2]], [0, 1, 1, 0]),
        # Of equal company the hotter one, of equal heat the first.
        ([[0, 1], [0, 2], [2, 2], [3, 3]], [0, 1, 0, 1]),
        ([[0, 0], [1, 1], [2, 2], [3, 3]], [0, 0, 1, 1]),
    ],
)
def test_memra_greedy_grows_cards_from_the_hottest(chosen: list, device_of: list) -> None:
    """A card takes what is chosen most often with what it has, then the hotter, then the first."""
    load, pairs = np.zeros((1, 1, 4), np.uint64), np.zeros((1, 4, 4), np.uint64)
    for one, other in chosen:
        load[0, 0, [one, other]] += 1
        if one != other:
            pairs[0, one, other] += 1
            pairs[0, other, one] += 1
    counts = mt.RoutingStatistics(load, coactivation=pairs)
    assert memra_greedy(counts, 2).tolist() == [device_of]


@pytest.mark.parametrize("way", ["follow", "pairs", "sets"])
def test_mt_kahypar_keeps_capacities(way: str) -> None:
    """Devices get as many experts of a layer as they have slots; the same seed, the same answer."""
    pytest.importorskip("mtkahypar", reason="mtkahypar is not installed: make bench-peers")
    pytest.importorskip("scipy", reason="scipy is not installed: make bench-peers")
    instance = bundled()
    counts = versus.counted(instance.traffic.select(groups=[0]))
    device_of = getattr(MtKaHyPar(counts, 4), way)(1)
    for row in device_of:
        assert np.bincount(row, minlength=4).tolist() == [4] * 4
    assert (getattr(MtKaHyPar(counts, 4), way)(1) == device_of).all()


def test_what_takes_longer_has_no_cell() -> None:
    """An answer counts from its time on, and the best one on what is seen stays."""
    run = versus.EqualSeconds(SMALL, "follow", [1e-9, 1e9])
    ways = [versus.solved("exflow", "follow"), versus.solved("contiguous", "follow")]
    run.one_by_one("both", ways, 1e9)
    run.one_by_one("first", ways[:1], 1e9)
    assert run.cells["both"][1e-9] == []
    assert run.cells["both"][1e9] == run.cells["first"][1e9] != []


def test_budgets_are_kept_in_a_sequence() -> None:
    """A decision brings no more copies than it may, and none where it may bring none."""
    size = versus.Size(2, 16, 24, 4)
    load = versus.drifting(2, 16, 2, 0.3, 0)
    for most in (0, 1, 5):
        new = versus.decide(size, load[0], size.initial(), most)
        assert versus.copies_moved(size, size.initial(), new) <= most
        assert 0 < versus.balancedness(size, load[1:], new) <= 1


def test_without_wheels_the_rest_runs() -> None:
    """A line for each peer that is missing, and the tables without them."""
    script = Path(versus.__file__)
    words = ["rebalances", "--quick", "--wheels", "none"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in versus.POLICIES:
        assert f"{name} is left out: " in done.stdout
    assert "by itself" in done.stdout


def test_a_sequence_counts_once_against_the_best_of_the_others() -> None:
    """Whatever the peers and draws: each begins with the initial map, and one of them is best."""
    policies: dict[str, versus.Peer] = {
        "stays": lambda wheels, size: lambda load, old: old,
        "anew": lambda wheels, size: lambda load, old: versus.decide(size, load, old * 0 - 1, None),
    }
    contest = versus.Contest(versus.Size(2, 16, 24, 4), policies, Path("none"))
    load = versus.drifting(2, 16, 4, 0.3, 0)
    for _ in range(2):
        contest.play(load, 1)
    for sequence in (contest.alone, *contest.runs["anew"]):
        balanced = [figures[0] for figures in sequence.figures]
        assert balanced[:3] == balanced[3:]
    assert contest.best == "anew"
    assert [gain >= 0 for gain, _ in contest.gains("stays")] == [True, True]
    for line in versus.summed({"one": contest, "two": contest}):
        assert "of 2 sequences" in line
        assert "anew" in line
