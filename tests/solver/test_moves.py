"""Moves from a running placement: caps and rules first, steps that gain most, never worse."""

from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
from brute_force import rank, small_problem
from make import random_ids, trace_of

import moetuner as mt
from moetuner.evaluation.losses import DOMAINS, number_domains
from moetuner.placement import blocks
from moetuner.problem.capacity import pad_slots
from moetuner.solver import budget, search_fewest_moves
from moetuner.solver.budget import Budget
from moetuner.solver.run import Moves, Run
from moetuner.solver.stages import moves
from moetuner.solver.stages.descent import descend
from moetuner.solver.stages.layers import LayerModel
from moetuner.solver.stages.moves import filling
from moetuner.solver.stages.moves.front import Front
from moetuner.solver.stages.moves.mixing import solve_knapsack, trace_back
from moetuner.solver.stages.repair import offer_running, repair


def statistics(seed=0, windows=3, layers=3, experts=16, transitions=False):
    """Skewed loads in windows; with transitions between neighbouring experts if asked for."""
    random = np.random.default_rng(seed)
    load = np.round(random.lognormal(3, 1, (windows, layers, experts))).astype(np.int64) + 1
    table = random.integers(0, 50, (layers - 1, experts, experts)) if transitions else None
    return mt.RoutingStatistics(load, table)


def steps(problem, initial, start=None, most=np.inf, threads=None):
    """List the steps that gain most for a move, from what runs or from slots [L,D,S]."""
    run, start = Run(problem), repair(problem, initial) if start is None else start
    return descend(run, LayerModel(run), start, initial, most, Budget(threads=threads))[0]


GOALS = [
    {"objective": "balance"},
    {"objective": "balance", "slots_per_device": 5},
    {"objective": "balance", "max_imbalance": 1.1},
    {"objective": "balance", "risk": 0.5},
    {"objective": "time", "regime": "dispatch"},
    {"objective": "time", "regime": "follow", "transitions": True},
    {"objective": "traffic", "regime": "follow", "max_imbalance": 1.3, "transitions": True},
    {"objective": "traffic", "regime": "follow", "slots_per_device": 5, "transitions": True},
]


def problem_of(goal, seed=0):
    """Make a problem of a goal, on four devices in two nodes."""
    rest = dict(goal)
    counts = statistics(seed, transitions=rest.pop("transitions", False))
    return mt.Problem(counts, mt.Topology(4, devices_per_node=2), **rest)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_few_moves_are_the_first_steps_that_gain_enough(goal, share):
    """They gain the share of what the end of all steps does; one step fewer does not."""
    problem, initial = problem_of(goal), blocks(3, 16, 4)
    path = steps(problem, initial)
    ends = [mt.Placement(path.after(step), num_experts=16) for step in range(len(path.moves))]
    values = [problem.value(end) for end in ends]
    wanted = values[0] - share * (values[0] - values[-1])
    found = search_fewest_moves(problem, initial, wanted, most_moves=int(path.moves[-1]))
    taken = next(step for step, end in enumerate(ends) if (end.held == found.held).all())
    assert values[taken] <= wanted
    within_caps = int(path.excess.argmin())
    assert taken >= within_caps
    is_enough = [value <= wanted for value in values]
    first_ones = [
        step
        for step in range(within_caps, len(ends))
        if is_enough[step] and (step == within_caps or not is_enough[step - 1])
    ]
    assert path.moves[taken] <= max(path.moves[first_ones])


def test_no_few_moves_where_steps_end_before():
    """Steps that cannot gain so much are not taken."""
    problem, initial = problem_of(GOALS[0]), blocks(3, 16, 4)
    better = problem.value(mt.solve(problem, "heuristic").placement)
    assert (
        search_fewest_moves(problem, initial, 2 * better - problem.value(initial), most_moves=48)
        is None
    )


@pytest.mark.parametrize("goal", GOALS)
def test_figures_of_steps_are_what_placements_have(goal):
    """Moves and excess after every step are a fresh count's; a layer's own cost is exact, too."""
    problem, initial = problem_of(goal), blocks(3, 16, 4)
    path = steps(problem, initial)
    assert len(path.moves) > 5
    for step in range(len(path.moves)):
        placement = mt.Placement(path.after(step), num_experts=16)
        assert path.moves[step] == initial.diff(placement).experts_moved
        assert path.excess[step] == pytest.approx(rank(problem, placement)[0], abs=1e-9)
        gain = problem.value(placement) - problem.value(initial)
        if goal.get("objective") == "balance" and "risk" not in goal:
            assert path.value[step] == pytest.approx(gain, abs=1e-5)
        elif goal["objective"] == "traffic":
            # Steps in one layer change what those in the next are worth. Balance counts a
            # thousandth part, to decide between equals.
            assert path.value[step] == pytest.approx(gain, rel=0.02, abs=0.002)


def drawn(random):
    """Draw a problem on two nodes of two devices with unlike slots, pins, bans, and what survives.

    And what runs: experts anywhere, some slots of which are empty.
    """
    while True:
        capacity = random.integers(1, 5, 4)
        layers = [[None, 0, 1][at] for at in random.integers(3, size=random.integers(4))]
        rules = [(layer, *random.integers(4, size=2).tolist()) for layer in layers]
        pins = int(random.integers(len(rules) + 1))
        slots = np.full((2, 4, 4), -1)
        for layer, (device, size) in product(slots, enumerate(capacity)):
            held = random.permutation(4)[: random.integers(size + 1)]
            layer[device, : len(held)] = held
        try:
            problem = mt.Problem(
                statistics(layers=2, experts=4),
                mt.Topology(4, 2),
                slots_per_device=capacity.tolist(),
                objective="balance",
                survive=(None, *DOMAINS)[random.integers(3)],
                fill_slots=bool(random.integers(2)),
                pinned=rules[:pins],
                forbidden=rules[pins:],
            )
            return problem, mt.Placement(slots, num_experts=4)
        except ValueError:
            continue


def pinned_before_survival():
    """Return a problem whose balanced way leaves an expert on one node, and what runs."""
    problem = mt.Problem(
        statistics(layers=1, experts=3),
        mt.Topology(4, devices_per_node=2),
        slots_per_device=(2, 2, 1, 2),
        objective="balance",
        survive="node",
        pinned=[(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 2, 3)],
    )
    return problem, mt.Placement([[[0, 1], [-1, -1], [2, -1], [0, 1]]])


def least_moves(problem, running, layer):
    """Try all contents of devices: the fewest moves to some that keep the rules, if any."""
    subsets = np.array(list(product([False, True], repeat=problem.num_experts)))
    choices = []
    for device, slots in enumerate(problem.capacity[layer]):
        sizes = subsets.sum(axis=1)
        may = sizes == slots if problem.fill_slots else sizes <= slots
        for rule, wrong in ((problem.rules.pinned, False), (problem.rules.forbidden, True)):
            if rule is not None:
                may &= ~(rule[layer, :, device] & (subsets == wrong)).any(axis=1)
        choices.append(subsets[may])
    every = np.array(list(product(*(range(len(choice)) for choice in choices))))
    holds = np.stack([choice[at] for choice, at in zip(choices, every.T, strict=True)], axis=1)
    member, copies = np.zeros(problem.devices, int), 1
    if problem.survive is not None:
        member, copies = number_domains(problem.topology, problem.survive), 2
    domains = [holds[:, member == one].any(axis=1) for one in np.unique(member)]
    kept = (np.sum(domains, axis=0) >= copies).all(axis=1)
    moves = (holds & ~running.held[layer]).sum(axis=(1, 2))[kept]
    return int(moves.min()) if moves.size else None


# No placement keeps the rules of 31. In 366 and 852 the balanced way takes more moves, and so does
# the nearest one to which empty slots are added later.
@pytest.mark.parametrize("seed", [*range(16), 31, 366, 852, None])
def test_rules_take_the_fewest_moves(seed):
    """No placement that keeps the rules is nearer; a smaller budget is refused with that number."""
    is_drawn = seed is not None
    make = drawn(np.random.default_rng([107, seed])) if is_drawn else pinned_before_survival()
    problem, running = make
    least = [least_moves(problem, running, layer) for layer in range(problem.layers)]
    if None in least:
        with pytest.raises(ValueError, match="no slot is left for expert"):
            repair(problem, running)
        return
    nearest = mt.Placement(repair(problem, running), num_experts=problem.num_experts)
    result = mt.solve(problem, initial=running, move_budget=sum(least), iterations=20)
    for placement in (nearest, result.placement):
        assert problem.violations(placement) == ()
        assert running.diff(placement).experts_moved_per_layer.tolist() == least
    if sum(least):
        with pytest.raises(ValueError, match=f"takes {sum(least)} moves"):
            mt.solve(problem, initial=running, move_budget=sum(least) - 1)


@pytest.mark.parametrize("lightest", [0, 2, 3])
def test_an_expert_goes_where_it_balances_beside_a_pin(lightest):
    """Of devices with a free slot the one with the least load gets what a pin displaces."""
    load = np.full((1, 1, 8), 10)
    running = np.array([[[0, 1, -1], [2, 3, 4], [5, 6, -1], [7, -1, -1]]])
    load[0, 0, running[0, lightest, 0]] = 1
    load[0, 0, 7] = 20 if lightest != 3 else 1
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(4),
        slots_per_device=3,
        objective="balance",
        pinned=[(0, 0, 1)],
        forbidden=[(0, 2, 1)],
    )
    running = mt.Placement(running)
    placement = mt.Placement(repair(problem, running))
    assert problem.violations(placement) == ()
    assert placement.held[0, lightest, 2]


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("limit", [{"time_limit": 0}, {"iterations": 10}])
def test_nothing_ends_worse_than_staying(goal, limit):
    """However short the search, what comes out is worth the moves that it takes at their price."""
    problem = problem_of(goal)
    initial = mt.solve(problem, "heuristic", iterations=200).placement
    before = rank(problem, initial)
    for cost in (0.0, before[1] / 1000):
        result = mt.solve(problem, initial=initial, move_cost=cost, **limit)
        moved = initial.diff(result.placement).experts_moved
        excess, value = rank(problem, result.placement)
        assert (excess, value + cost * moved) <= before


# With copies, under caps, and where layers add up, or do not.
@pytest.mark.parametrize("goal", [GOALS[number] for number in (1, 2, 4, 5, 6)])
def test_a_larger_budget_gives_no_worse_placement(goal):
    """As budgets rise, up to all slots, neither the load above caps does nor the value."""
    problem, initial = problem_of(goal), blocks(3, 16, 4)
    slots = int(problem.capacity.sum())
    before = (np.inf, np.inf)
    for limit in (0, 1, 5, slots - 1, slots):
        result = mt.solve(problem, "heuristic", initial=initial, move_budget=limit, iterations=30)
        excess, value = rank(problem, result.placement)
        assert (round(excess, 9), value * (1 - 1e-9)) <= before, limit
        before = (round(excess, 9), value)


@pytest.mark.parametrize("seed", range(8))
def test_layers_are_put_together_at_the_least_sum(seed):
    """At every budget no other choice of a row for each column has a lower sum."""
    random = np.random.default_rng([33, seed])
    moves, worth = random.integers(0, 5, (5, 3)), random.random((5, 3))
    # What runs takes no move.
    moves[0] = 0
    columns, limit = np.arange(3), 12
    chosen = solve_knapsack(moves, worth, limit)
    for budget_of_moves in range(limit + 1):
        rows = trace_back(chosen, moves, budget_of_moves)
        assert moves[rows, columns].sum() <= budget_of_moves
        least = min(
            worth[list(other), columns].sum()
            for other in product(range(5), repeat=3)
            if moves[list(other), columns].sum() <= budget_of_moves
        )
        assert worth[rows, columns].sum() == pytest.approx(least)


@pytest.mark.parametrize("goal", GOALS)
def test_an_initial_placement_is_no_handicap(goal):
    """Where moves are free, a poor one that runs costs nothing: the answer is a fresh solve's."""
    problem, initial = problem_of(goal), blocks(3, 16, 4)
    fresh = mt.solve(problem, "heuristic", iterations=1000)
    result = mt.solve(problem, "heuristic", iterations=1000, initial=initial)
    assert rank(problem, result.placement) <= rank(problem, fresh.placement)


def test_what_is_proven_from_nothing_is_proven_from_what_runs():
    """Where moves are free and the optimum can be proven, it is, whatever runs."""
    problem = small_problem(4, 2, 8, 4, max_imbalance=2.0)
    fresh = mt.solve(problem)
    for initial in (blocks(2, 8, 4), fresh.placement):
        result = mt.solve(problem, initial=initial)
        assert (result.status, result.objective) == ("optimal", fresh.objective)
        assert result.bound == fresh.bound


def every_step(problem, slots):
    """Make every exchange and every new content of a slot, of one layer, that is a placement."""
    layers, devices, width = slots.shape
    places = list(product(range(devices), range(width)))
    for layer in range(layers):
        for a, b in combinations(places, 2):
            other = slots.copy()
            other[(layer, *a)], other[(layer, *b)] = slots[(layer, *b)], slots[(layer, *a)]
            yield other
        for place, expert in product(places, range(problem.num_experts)):
            other = slots.copy()
            other[(layer, *place)] = expert
            yield other


@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("seed", range(2))
def test_a_step_gains_most_for_a_move(seed, copies):
    """Of all exchanges and new contents of slots none gains more; the answer is not behind it."""
    counts, slots = statistics(seed, 5, 2, 8), {"slots_per_device": 2 + copies}
    problem = mt.Problem(counts, mt.Topology(4), objective="balance", **slots)
    initial = blocks(2, 8, 4)
    start = repair(problem, initial)
    for _ in range(3):
        path = steps(problem, initial, start)
        before, moved = problem.value(mt.Placement(start, num_experts=8)), path.moves[0]
        best = 0.0
        for slots in every_step(problem, start):
            try:
                placement = mt.Placement(slots, num_experts=8)
            except ValueError:
                continue
            moves = initial.diff(placement).experts_moved - moved
            gain = before - problem.value(placement)
            best = max(best, gain / (moves if moves > 0 else 1e-3))
        if len(path.moves) < 2:
            assert best < 1e-5
            return
        moves = path.moves[1] - moved
        assert -path.value[1] / (moves if moves > 0 else 1e-3) == pytest.approx(best, rel=1e-3)
        start = path.after(1)
    path = steps(problem, initial, most=6)
    ends = mt.Placement(path.after(path.best(6)), num_experts=8)
    result = mt.solve(problem, initial=initial, move_budget=6, iterations=500)
    assert result.objective <= problem.value(ends) * (1 + 1e-9)


def test_with_little_time_steps_come_first(monkeypatch):
    """Where steps take most of the time, nothing else is done, and their end is the answer."""
    problem, initial = problem_of(GOALS[0]), blocks(3, 16, 4)
    now = [0.0]

    def slow(*arguments):
        now[0] += 0.9
        return descend(*arguments)

    def improve(*_, **__):
        raise AssertionError("a search without time")

    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(filling, "descend", slow)
    monkeypatch.setattr(LayerModel, "improve", improve)
    result = mt.solve(problem, initial=initial, move_budget=8, time_limit=1.0)
    path = steps(problem, initial, most=8)
    best = mt.Placement(path.after(path.best(8)), num_experts=16)
    assert result.objective == problem.value(best)
    assert result.status == "time_limit"


@pytest.mark.parametrize("most", [0, 2, None])
def test_what_stays_keeps_a_slot_that_its_device_has(most):
    """A running table may be as wide as the widest device: what is beyond a device moves inside."""
    running = mt.Placement([[[0, -1, -1, 1], [2, 3, 4, 5]]])
    problem = mt.Problem(statistics(layers=1, experts=6), mt.Topology(2), slots_per_device=(2, 4))
    result = mt.solve(problem, "heuristic", initial=running, move_budget=most, iterations=100)
    assert (result.placement.slots[0, 0, 2:] == -1).all()
    front = mt.pareto(problem, running, iterations=100)
    assert all((trade.placement.slots[0, 0, 2:] == -1).all() for trade in front[1:])


@pytest.mark.parametrize("method", ["joint", "heuristic"])
def test_an_infinite_budget_is_none(method):
    """The same answer as without one, and nothing said of a budget."""
    problem = mt.Problem(statistics(), mt.Topology(4), objective="balance")
    running = blocks(3, 16, 4)
    arguments = {"initial": running, "iterations": 200, "expert_bytes": 44e6}
    free = mt.solve(problem, method, **arguments)
    for most in (np.inf, np.float32(np.inf)):
        result = mt.solve(problem, method, move_budget=most, **arguments)
        assert (result.placement, result.status) == (free.placement, free.status)
        assert result.violations == ()
        assert mt.solve(problem, method, move_budget=most, iterations=200).status == "feasible"


def test_filling_empty_slots_is_counted_in_the_budget():
    """What fills the slots of the running placement comes first; then the rest may be spent."""
    for seed in range(2):
        slots = {"slots_per_device": 3, "fill_slots": True}
        counts, running = statistics(seed, layers=2, experts=8), blocks(2, 8, 4)
        problem = mt.Problem(counts, mt.Topology(4), objective="balance", **slots)
        empty = int(problem.capacity.sum()) - 16
        for more in range(4):
            result = mt.solve(problem, initial=running, move_budget=empty + more, iterations=200)
            assert result.violations == ()
            assert running.diff(result.placement).experts_moved <= empty + more
        with pytest.raises(ValueError, match=f"fill_slots: .* takes {empty} moves"):
            mt.solve(problem, initial=running, move_budget=empty - 1)


@pytest.mark.parametrize("goal", GOALS)
def test_a_front_has_all_points_of_one_to_fewer_moves(goal):
    """Whatever the budget the search meets the same placements, and ends earlier for a smaller."""
    problem, initial = problem_of(goal), blocks(3, 16, 4)
    smaller: set[bytes] = set()
    for limit in (2, 5, 12):
        run = Run(problem, budget=Budget(iterations=30), moves=Moves(initial))
        offer_running(run)
        front = Front(run)
        filling.fill(front, run.budget, limit)
        points = set(front.points)
        assert points >= smaller
        smaller = points


@pytest.mark.parametrize("goal", GOALS)
def test_a_front_has_what_a_budget_finds(goal):
    """No point is behind what its moves as a budget find; more moves gain more."""
    problem, initial = problem_of(goal), blocks(3, 16, 4)
    trades = mt.pareto(problem, initial, iterations=30)
    ranks = [rank(problem, trade.placement) for trade in trades]
    assert len(trades) > 3
    assert trades[0].experts_moved == 0
    assert ranks == sorted(ranks, reverse=True)
    for trade, (excess, value) in list(zip(trades, ranks, strict=True))[:3]:
        result = mt.solve(
            *(problem, "heuristic"),
            initial=initial,
            move_budget=trade.experts_moved,
            iterations=30,
        )
        found = rank(problem, result.placement)
        assert (excess - 1e-9, value * (1 - 1e-9)) <= found


@pytest.mark.parametrize("goal", GOALS)
def test_no_point_within_the_budget_is_better_than_the_answer(monkeypatch, goal):
    """Neither of the best of a front, nor of the answer, which polishing may improve."""
    problem, initial, fronts = problem_of(goal), blocks(3, 16, 4), []

    def fill(front, *arguments):
        fronts.append(front)
        fill_front(front, *arguments)

    fill_front = moves.fill
    monkeypatch.setattr(moves, "fill", fill)
    for limit in (2, 5, 12):
        options = {"initial": initial, "move_budget": limit, "iterations": 30}
        result = mt.solve(problem, "heuristic", **options)
        front = fronts.pop()
        best = min(point.rank for point in front.points.values() if point.moves <= limit)
        assert front.best(limit).rank == best
        assert rank(problem, result.placement) <= (best[0] + 1e-9, best[1] * (1 + 1e-9))


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "balance"}, {"objective": "balance", "slots_per_device": 9}]
)
def test_layers_go_down_by_themselves_as_all_at_once(settings):
    """Where no number of moves joins the layers, their steps are those of one way down all."""
    trace = trace_of(random_ids(400, 3, 2, 32), 32)
    counted = mt.RoutingStatistics.from_trace(trace, window=50, sets=True)
    problem = mt.Problem(counted, mt.Topology(4), **settings)
    start = mt.solve(problem, "contiguous").placement.slots
    start = pad_slots(start, problem.capacity)
    layers, _ = LayerModel(Run(problem)).core()
    alone = layers.descend(start, start)
    together = layers.descend(start, start, max_moves=10**9)
    assert len(alone[2]) > problem.layers
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)
