"""The paper's two stages: against brute force, and at the edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import broken

import moetuner as mt
from moetuner import Placement, Problem, RoutingStatistics, Topology, _core
from moetuner.solver.budget import Budget
from moetuner.solver.milp.highs import Ilp
from moetuner.solver.two_stage import cluster_layers, cluster_traffic, place_clusters, two_stage
from moetuner.solver.two_stage.place import place_by_ilp


@pytest.fixture(autouse=True, scope="module")
def starts_are_checked():
    """Hold the core's start of every programme against all of its rows."""
    solve = Ilp.solve

    def checked(self, start, **options):
        assert broken(self, np.asarray(start, dtype=np.float64)) is None
        return solve(self, start, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ilp, "solve", checked)
        yield


def problem(layers, experts, devices, *, pairs=True, slots=None) -> Problem:
    """Make a problem of random counts."""
    rng = np.random.default_rng(0)
    transitions = rng.integers(0, 50, (layers - 1, experts, experts)) if pairs else None
    statistics = RoutingStatistics(rng.integers(0, 200, (1, layers, experts)), transitions)
    return Problem(statistics, Topology(devices), slots_per_device=slots)


def least_deviation(load: np.ndarray, clusters: int, fewest: int, most: int) -> float:
    """Try every clustering of one layer: the least sum of abs(load_c - mean), over the mean."""
    experts, total = len(load), load.sum()
    best = np.inf
    for choice in itertools.product(range(clusters), repeat=experts):
        sizes = np.bincount(choice, minlength=clusters)
        if sizes.min() >= fewest and sizes.max() <= most:
            carried = np.bincount(choice, load, minlength=clusters)
            best = min(best, np.abs(carried * clusters - total).sum() / max(total, 1))
    return best


def least_bottleneck(traffic, cost, sizes=None):
    """Try every placement: the most level totals, then the least sums of busiest and all pairs."""
    n, layers = len(cost), len(traffic) + 1
    best = (np.inf, np.inf, np.inf)
    for devices in itertools.product(itertools.permutations(range(n)), repeat=layers):
        carried = np.zeros(n, dtype=int)
        if sizes is not None:
            np.add.at(carried, np.array(devices), sizes)
        times = [
            table * cost[np.ix_(a, b)]
            for table, a, b in zip(traffic, devices, devices[1:], strict=False)
        ]
        busiest, total = (sum(int(getattr(of, name)()) for of in times) for name in ("max", "sum"))
        best = min(best, (int((carried**2).sum()), busiest, total))
    return best


@settings(deadline=None, max_examples=30)
@given(
    load=st.lists(st.integers(0, 60) | st.just(300), min_size=1, max_size=7),
    clusters=st.integers(1, 3),
    equal=st.booleans(),
)
@example(load=[0] * 6, clusters=3, equal=False)
def test_stage_1_is_optimal_within_the_tolerance(load, clusters, equal):
    """Deviation and bound enclose the optimum; without tolerance they meet it."""
    experts = len(load)
    least, most = (experts // clusters, -(-experts // clusters)) if equal else (1, experts)
    best = least_deviation(np.array(load), clusters, min(least, experts // clusters), most)
    for tolerance in (0.0, 0.025):
        clustered = cluster_layers([load], clusters, equal_sizes=equal, tolerance=tolerance)
        assert clustered.status == "gap_reached"
        assert clustered.bound[0] - 1e-9 <= best <= clustered.deviation[0] + 1e-9
        assert clustered.gap[0] <= tolerance + 2e-6
        sizes = np.bincount(clustered.cluster[0], minlength=clusters)
        assert sizes.min() >= min(least, experts // clusters)
        assert sizes.max() <= most
        carried = np.bincount(clustered.cluster[0], load, minlength=clusters)
        deviation = np.abs(carried * clusters - sum(load)).sum() / max(sum(load), 1)
        assert deviation == pytest.approx(clustered.deviation[0])


def test_stage_1_searches_where_it_must_alone() -> None:
    """The mean and the heaviest expert prove a start; two experts per cluster leave a gap."""
    rng = np.random.default_rng(3)
    assert not cluster_layers(rng.integers(900, 1100, (6, 64)), 8).searched.any()
    giant = cluster_layers([[1000, 1, 1, 1, 1, 1, 1, 1]], 4)
    assert not giant.searched.any()
    assert giant.deviation[0] == pytest.approx(giant.bound[0])
    few = cluster_layers(rng.integers(1, 1000, (8, 12)), 6, tolerance=0.01)
    assert few.searched.any()
    assert few.gap.max() <= 0.01 + 2e-6


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6), devices=st.integers(2, 4), per_node=st.sampled_from([1, 2, 4]))
def test_stage_2_and_the_program_enclose_the_optimum(seed, devices, per_node):
    """Assignment is optimal where links are alike; search, program and brute force agree."""
    rng = np.random.default_rng(seed)
    layers = 3 if devices < 4 else 2
    traffic = rng.integers(0, 100, (layers - 1, devices, devices)).astype(np.uint64)
    per_node = per_node if devices % per_node == 0 else devices
    cost = Topology(devices, devices_per_node=per_node).cost
    placed = place_clusters(traffic, cost, tolerance=0)
    alike = len(np.unique(cost)) < 3
    assert placed.way.startswith("exact" if alike else "heuristic")
    _, best, total = least_bottleneck(traffic.astype(int), cost)
    assert placed.bound <= best <= placed.bottleneck
    assert (placed.status == "optimal") == (placed.bottleneck == placed.bound)
    assert not alike or (placed.status, placed.total) == ("optimal", total)
    start = placed.device, None, (placed.bottleneck, 0)
    budget = Budget()
    solution, _ = place_by_ilp(traffic, cost, *start, tolerance=0, seed=0, budget=budget)
    scale = max(placed.bottleneck, 1)
    assert solution.bound * scale <= best + 1e-3
    assert best - 1e-3 <= solution.objective * scale <= placed.bottleneck + 1e-3
    assert solution.status == "feasible" or solution.objective * scale == pytest.approx(best)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), devices=st.integers(2, 3), layers=st.integers(2, 4))
def test_free_sizes_level_the_totals(seed: int, devices: int, layers: int) -> None:
    """Totals are as equal as any placement makes them; the bottleneck is bounded from below."""
    rng = np.random.default_rng(seed)
    traffic = rng.integers(0, 100, (layers - 1, devices, devices))
    sizes = 1 + rng.multinomial(2 * devices, np.full(devices, 1 / devices), layers)
    cost = Topology(devices).cost
    placed = place_clusters(traffic, cost, sizes=sizes, tolerance=0)
    carried = np.zeros(devices, dtype=int)
    np.add.at(carried, placed.device, sizes)
    levels, best, _ = least_bottleneck(traffic, cost, sizes)
    assert (carried**2).sum() == levels
    assert placed.bottleneck >= best
    assert placed.bound <= best
    if placed.status == "optimal":
        assert placed.bottleneck == best


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("layers", "experts", "devices", "slots"),
    [(3, 6, 3, 3), (2, 7, 3, 3), (4, 12, 3, 6), (1, 8, 4, None), (3, 8, 1, None), (3, 3, 5, None)],
)
def test_solves_whole_problems(layers, experts, devices, slots, equal) -> None:
    """Slots hold every expert once; details tell both stages; threads change nothing."""
    instance = problem(layers, experts, devices, slots=slots)
    one, two = (
        two_stage(instance, equal_sizes=equal, seed=1, budget=Budget(threads=threads))
        for threads in (1, 2)
    )
    assert np.array_equal(one[0], two[0])
    assert one[1:] == two[1:]
    placement = Placement(one[0], num_experts=experts)
    stage_1, stage_2 = one[2].stage_1, one[2].stage_2
    sizes = (placement.slots >= 0).sum(axis=2)
    assert sizes.min() >= (experts >= devices)
    assert not equal or sizes.max() - sizes.min() <= 1
    assert (stage_1.note is not None) == (experts < devices)
    assert stage_1.layers_proven_without_search + stage_1.layers_searched == layers
    assert stage_1.largest_gap <= 0.025 + 2e-6
    totals = sizes.sum(axis=0)
    assert stage_2.experts_per_device == (totals.min(), totals.max())


def test_huge_counts() -> None:
    """Counts near 2**63 neither wrap nor lose the order of placements."""
    huge = np.uint64((2**63 - 1) // 16)
    clustered = cluster_layers(np.full((1, 8), huge), 4)
    assert clustered.deviation[0] == 0
    transitions = np.zeros((1, 4, 4), dtype=np.uint64)
    transitions[0, [0, 1, 2, 3], [2, 3, 0, 1]] = huge
    statistics = RoutingStatistics(np.full((1, 2, 4), huge), transitions)
    instance = Problem(statistics, Topology(2))
    slots, _, search = two_stage(instance)
    cost = instance.objective_function.cost(Placement(slots, num_experts=4))
    assert cost in (0, 2 * int(huge))
    assert search.stage_2.bottleneck <= int(huge) * 2


def test_without_transitions_stage_2_is_skipped() -> None:
    """A load table alone balances; details say that nothing was known of the traffic."""
    _, _, search = two_stage(problem(3, 8, 4, pairs=False))
    assert search.stage_2.way == "skipped: no transitions were counted"
    _, _, levelled = two_stage(problem(3, 8, 4, pairs=False), equal_sizes=False)
    assert levelled.stage_2.experts_per_device == (6, 6)


def test_traffic_counts_every_token_once() -> None:
    """Traffic between clusters sums what the transitions hold."""
    rng = np.random.default_rng(0)
    transitions = rng.integers(0, 9, (2, 6, 6)).astype(np.uint64)
    cluster = rng.integers(0, 3, (3, 6))
    traffic = cluster_traffic(transitions, cluster, 3)
    for layer, c, d in np.ndindex(2, 3, 3):
        block = transitions[layer][np.ix_(cluster[layer] == c, cluster[layer + 1] == d)]
        assert traffic[layer, c, d] == block.sum()


def test_limits_end_it_early() -> None:
    """Without time the warm starts come back, and the status says why."""
    load = np.random.default_rng(3).integers(1, 1000, (4, 12))
    clustered = cluster_layers(load, 6, tolerance=0.0, budget=Budget(time_limit=0.0))
    assert clustered.status == "time_limit"
    assert clustered.searched.sum() <= 1


@settings(deadline=None, max_examples=40)
@given(
    load=st.lists(st.integers(0, 20) | st.integers(0, 200) | st.just(1000), min_size=1, max_size=8),
    devices=st.integers(1, 3),
    spare=st.integers(0, 2),
)
def test_packing_comes_near_the_least_peak(load: list[int], devices: int, spare: int) -> None:
    """Longest processing time first, then exchanges; the least peak is proven."""
    slots = -(-len(load) // devices) + spare
    counts = np.array([load], dtype=np.uint64)
    best = min(
        np.bincount(choice, load, minlength=devices).max()
        for choice in itertools.product(range(devices), repeat=len(load))
        if np.bincount(choice).max() <= slots
    )
    (device_of,), ((peak, bound, *_),), _ = _core.pack(counts, devices, (0, slots))
    assert np.bincount(device_of, load).max() == peak
    assert np.bincount(device_of).max() <= slots
    assert bound <= best <= peak <= best + sum(load) / 1000
    peaks = np.array([peak], dtype=np.uint64)
    assert _core.smallest_peaks(counts, devices, slots, peaks) == [(best, best)]


@pytest.mark.parametrize(("experts", "devices", "layers"), [(7, 3, 3), (60, 8, 24), (10, 4, 8)])
def test_totals_are_equal_where_devices_do_not_divide_experts(experts, devices, layers):
    """As the paper's stage 2 wants: clusters of two sizes, and as many experts on every device."""
    placement = mt.solve(problem(layers, experts, devices), "paper").placement
    carried = (placement.slots >= 0).sum(axis=(0, 2))
    assert carried.min() == carried.max()


@pytest.mark.parametrize("fill_slots", [False, True])
@pytest.mark.parametrize(
    "slots", [{"extra_slots": 0}, {"extra_slots": 7}, {"slots_per_device": (1, 3, 5, 6)}]
)
def test_no_device_gets_more_experts_than_it_has_slots(slots, fill_slots):
    """Slots may differ by device and by layer, which the stages do not know."""
    load = np.random.default_rng(5).integers(1, 1000, (40, 3, 9))
    statistics = RoutingStatistics.from_load(load)
    instance = Problem(statistics, Topology(4), fill_slots=fill_slots, **slots)
    placement = mt.solve(instance, "paper").placement
    assert not instance.violations(placement)
    assert (placement.held.sum(axis=1) >= 1).all()
