"""Split "lp": placements for a dispatcher that divides every window's tokens over copies."""

import itertools
import shlex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import skewed_loads

import moetuner as mt
from moetuner.formats.recipes import list_serving_recipes
from moetuner.placement import Placement
from moetuner.solver.terms import Terms, core_layers, make_site


def problem_of(load, devices=8, slots=10, **more):
    """Return the problem of balance by a linear programme."""
    statistics = mt.RoutingStatistics(load)
    arguments = {"objective": "balance", "split": "lp", "slots_per_device": slots, **more}
    return mt.Problem(statistics, mt.Topology(devices), **arguments)


def best_by_brute_force(problem):
    """Return the least objective of all placements of one layer, on devices that are alike."""
    devices, slots = problem.devices, problem.slots
    held = [
        (*chosen, *[-1] * (slots - size))
        for size in range(1, slots + 1)
        for chosen in itertools.combinations(range(problem.num_experts), size)
    ]
    values = [
        problem.value(Placement(np.array([content], np.int32), num_experts=problem.num_experts))
        for content in itertools.combinations_with_replacement(held, devices)
        if {e for row in content for e in row} >= set(range(problem.num_experts))
    ]
    return min(values)


@pytest.mark.parametrize(
    ("load", "devices", "slots"),
    [
        ([[9, 5, 3]], 2, 2),
        ([[12, 2, 1, 1]], 2, 3),
        ([[8, 7, 1, 0]], 3, 2),
        ([[5, 5, 5, 1]], 3, 2),
        ([[9, 1, 1], [1, 9, 1]], 3, 2),
        ([[20, 6, 5, 4]], 4, 2),
    ],
)
def test_it_is_the_best_of_all_placements(load, devices, slots):
    """On instances of few slots, nothing is better than the answer, and the bound is below it."""
    problem = problem_of(np.array(load, np.uint64)[:, None], devices, slots)
    result = mt.solve(problem)
    assert result.objective == pytest.approx(best_by_brute_force(problem))
    assert result.bound <= result.objective * (1 + 1e-9)


@pytest.mark.parametrize(
    ("objective", "part", "windows"),
    [("balance", 1, 1), ("balance", 1, 5), ("time", 1, 5), ("time", 500, 5)],
)
def test_it_is_never_behind_the_best_of_even_parts(objective, part, windows):
    """The answer of split even is no better, as long as it is searched, judged by the programme.

    Of few tokens copies take longer to read than they save: then even parts find the best answer.
    """
    load = skewed_loads(1, 64, windows=windows, seed=windows) // part
    problem = problem_of(load, objective=objective)
    even = mt.solve(problem_of(load, objective=objective, split="even"), effort="brief")
    assert mt.solve(problem, effort="brief").objective <= problem.value(even.placement) * (1 + 1e-9)


def test_even_windows_are_proven():
    """Where every device has the mean in every window, nothing is better: the gap is closed."""
    result = mt.solve(problem_of(skewed_loads(3, 64, seed=1)))
    assert result.status == "optimal"
    assert result.objective == pytest.approx(1.0)


def test_other_traffic_is_divided_better():
    """Loads that have moved cost less than with the copies that even parts ask for."""
    load = skewed_loads(4, 64, seed=2)
    moved = load * np.random.default_rng(3).lognormal(0, 0.4, load.shape)
    counts = mt.RoutingStatistics(np.rint(moved).astype(np.uint64))
    lp, even = (
        mt.evaluate(
            mt.solve(problem_of(load, split=split), effort="brief").placement, counts, split="lp"
        )
        for split in ("lp", "even")
    )
    assert lp.imbalance < even.imbalance - 0.03


def test_devices_share_copies_evenly():
    """Devices have as many shared experts, no two of them two, and all are joined."""
    problem = problem_of(skewed_loads(3, 64, seed=4), devices=16, slots=5)
    load = problem.windows.load
    layers = core_layers(load, np.ones(1), make_site(problem), terms=Terms(lp_split=True))
    for slots in layers.construct():
        copies = np.bincount(slots.ravel(), minlength=problem.num_experts)
        shares = np.array([[e in row for e in range(problem.num_experts)] for row in slots])
        pairs = (shares[:, copies > 1].astype(int)) @ shares[:, copies > 1].T
        assert np.ptp(np.diag(pairs)) <= 1
        np.fill_diagonal(pairs, 0)
        assert pairs.max() == 1
        assert (np.linalg.matrix_power(pairs + np.eye(16, dtype=int), 15) > 0).all()


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 40]), st.sampled_from([None, "device"]))
def test_rules_are_kept(seed, windows, survive):
    """Pins, bans and survival are, whatever the windows."""
    load = skewed_loads(2, 12, windows=windows, seed=seed)
    rules = {"pinned": [(None, 3, 1)], "forbidden": [(0, 5, 2)], "survive": survive}
    problem = problem_of(load, devices=4, slots=7, **rules)
    result = mt.solve(problem, iterations=50)
    assert problem.violations(result.placement) == ()


def test_threads_change_nothing():
    """The answer is a function of the problem and the seed."""
    problem = problem_of(skewed_loads(3, 64, windows=3, seed=5))
    one, two = (mt.solve(problem, threads=threads).placement for threads in (1, 2))
    assert np.array_equal(one.slots, two.slots)


def test_moves_from_a_running_placement_are_judged_by_it():
    """No answer within a budget of moves is behind what runs."""
    load = skewed_loads(3, 64, seed=6)
    running = mt.solve(problem_of(load, split="even"), method="eplb").placement
    problem = problem_of(skewed_loads(3, 64, seed=7))
    result = mt.solve(problem, initial=running, move_budget=6, iterations=200)
    assert result.objective <= problem.value(running)


def placed(redundant):
    """Place eight experts, and so many copies, on two devices."""
    return Placement(np.arange(8 + redundant).reshape(1, 2, -1) % 8)


@pytest.mark.parametrize(
    ("engine", "split", "is_told"),
    [("sglang", "lp", True), ("sglang", "nearest", False), ("vllm", "lp", False)],
)
def test_only_the_engine_that_can_is_told(engine, split, is_told):
    """An option is printed for the split that it is about, of the engine that has it."""
    line = list_serving_recipes(engine, placed(redundant=4), split=split)[-1].command
    assert (" --ep-dispatch-algorithm lp" in line) is is_told


@pytest.mark.parametrize(
    ("engine", "heads_are_divided"),
    [("vllm", "--tensor-parallel-size 4"), ("sglang", "--model MODEL --tp-size 4 --ep-size 4")],
)
def test_devices_that_divide_no_heads_are_data_parallel(engine, heads_are_divided):
    """With 7 ranks of tensor parallelism a model of 64 heads would not start."""

    def line(devices):
        placement = Placement.from_assignment([np.arange(28) % devices], devices)
        return list_serving_recipes(engine, placement)[-1].command

    assert heads_are_divided in line(4)
    is_vllm = engine == "vllm"
    assert ("--data-parallel-size 7 " if is_vllm else "--dp-size 7 --enable-dp-attention") in line(
        7
    )
    assert "tensor-parallel" not in line(7)


@pytest.mark.parametrize(
    ("engine", "nodes", "options", "remark"),
    [
        ("vllm", 1, [], ""),
        ("vllm", 2, ["--nnodes", "2", "--node-rank", "--master-addr"], "--headless"),
        ("sglang", 2, ["--nnodes", "2", "--node-rank", "--dist-init-addr"], "its own rank"),
        ("tensorrt-llm", 2, [], ""),
    ],
)
def test_two_nodes_are_told_of_each_other(engine, nodes, options, remark):
    """The line of one node does not serve on two, unless another program starts them."""
    recipe = list_serving_recipes(engine, placed(redundant=4), nodes=nodes)[-1]
    words = shlex.split(recipe.command)
    assert [word for word in options if word not in words] == []
    assert ("--nnodes" in words) is bool(options)
    assert remark in recipe.why
    assert ("on every node" in recipe.why) is bool(options)


@pytest.mark.parametrize(
    ("model", "engine", "is_trap"),
    [
        ("openai/gpt-oss-20b", "vllm", True),
        ("unsloth/gpt-oss-20b-BF16", "vllm", False),
        ("openai/gpt-oss-20b", "sglang", False),
        ("Qwen/Qwen3-30B-A3B", "vllm", False),
        (None, "vllm", False),
    ],
)
def test_weights_that_do_not_start_are_named(model, engine, is_trap):
    """The line does not start as it stands with weights in MXFP4, and says so."""
    recipe = list_serving_recipes(engine, placed(redundant=4), model=model)[-1]
    assert ("MXFP4" in recipe.why) is is_trap


def test_names_of_others_are_words_of_the_command():
    """Whatever file and model are called, the line has them whole, and a shell reads them back."""
    file, model = "a {b} 'MODEL'.json", r"of placement.json/{ranks} \1"
    (served,) = list_serving_recipes("vllm", placed(redundant=4), file, model=model)
    words = shlex.split(served.command)
    assert words[0] == f"MOETUNER_PLACEMENT={file}"
    assert words[1:4] == ["vllm", "serve", model]
    assert words[-1] == '{"num_redundant_experts": 4}'
    export, served = list_serving_recipes("sglang", placed(redundant=4), file, model=model)
    assert shlex.split(export.command)[:3] == ["moetuner", "export", file]
    assert shlex.split(served.command)[3:5] == ["--model", model]


@pytest.mark.parametrize("split", ["even", "nearest", "lp"])
@pytest.mark.parametrize("redundant", [0, 4])
def test_sglang_has_a_back_end_where_copies_are_not_shared_evenly(split, redundant):
    """Without one SGLang takes copies in turns, and does not start with another dispatch."""
    line = list_serving_recipes("sglang", placed(redundant), split=split)[-1].command
    words = shlex.split(line, comments=True)
    assert ("--moe-a2a-backend" in words) is (redundant > 0 and split != "even")
    assert ("--ep-dispatch-algorithm" in words) is (redundant > 0 and split == "lp")
