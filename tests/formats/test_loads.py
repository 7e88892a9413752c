"""Load tables as people and servers write them: every form gives the same counts."""

import json

import numpy as np
import pytest
from engines_files import npy
from hypothesis import given
from hypothesis import strategies as st
from make import trace_of

import moetuner as mt
from moetuner.report.recording import list_warnings

RANDOM = np.random.default_rng(0)
LOAD = RANDOM.multinomial(4096, RANDOM.dirichlet(np.ones(12), 4), (3, 4))
NAMES = ",".join(f"expert_{expert}" for expert in range(12))
ROWS = [(w, layer, e, LOAD[w, layer, e]) for w, layer, e in np.ndindex(LOAD.shape)]


def csv(load=LOAD, *, head="", about=lambda window, layer: ()):
    """Write a row for every layer; without a header, empty lines part windows."""
    rows = [
        [",".join(map(str, (*about(w, at), *row))) for at, row in enumerate(table)]
        for w, table in enumerate(load)
    ]
    between = "\n" if head else "\n\n"
    return head + between.join("\n".join(of) for of in rows) + "\n"


def scrape(until):
    """Give what a server has counted up to a window, half of it on each of two ranks."""
    total = LOAD[: until + 1].sum(axis=0)
    return "# TYPE moe_tokens counter\n" + "".join(
        f'moe_tokens{{layer="{at}",expert="{e}",rank="{rank}"}} {(total[at, e] + rank) // 2}\n'
        for at, e in np.ndindex(total.shape)
        for rank in range(2)
        if total[at, e]
    )


def record(load):
    """Give what vLLM records: loads of slots, of which two hold copies."""
    slots = np.concatenate([load, load[:, :2] // 2], axis=1)
    slots[:, :2] -= load[:, :2] // 2
    fields = {"record_type": "eplb_load_stats", "expert_load": slots.tolist()}
    return json.dumps(fields | {"p2l_map": [[*range(12), 0, 1]] * 4}) + "\n"


DENSE = np.pad(LOAD, ((0, 0), (1, 0), (0, 0)))
WHOLE = {
    "rows": csv(),
    "windows": csv(head=f"step,layer,{NAMES}\n", about=lambda *at: at),
    "layers": csv(head=f"layer,{NAMES}\n", about=lambda _, layer: (layer + 3,)),
    "pandas": csv(head=f",{NAMES}\n", about=lambda _, layer: (layer,)),
    "long": "window,layer,expert,count\n" + "".join(f"{','.join(map(str, r))}\n" for r in ROWS),
    # Spreadsheets begin a CSV with a byte order mark.
    "marked rows": b"\xef\xbb\xbf" + csv().encode(),
    "marked names": f"\ufeffstep,layer,{NAMES}\n" + csv(about=lambda *at: at),
    "json": json.dumps(LOAD.tolist()),
    "sglang": json.dumps({"logical_count": DENSE.tolist()}),
    "vllm": "".join(map(record, LOAD)),
    "npy": npy(LOAD),
    "floats": npy(LOAD.astype("f4")),
    "large": npy(LOAD << 20),
}


@pytest.mark.parametrize("form", WHOLE)
def test_forms(tmp_path, form):
    """The counts are those that were written, whatever the name of the file."""
    path, content = tmp_path / "loads", WHOLE[form]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    actual = mt.open_input(path)
    assert np.array_equal(actual.window_load, LOAD << 20 * (form == "large"))
    assert actual.left_out == ((5, (0,)) if form == "sglang" else None)
    if form != "long":  # which has a row for every count, so experts without any are not seen
        with pytest.raises(ValueError, match="num_experts must be 12, got 13"):
            mt.open_input(path, num_experts=13)


@pytest.mark.parametrize(
    ("names", "experts", "kept"),
    [
        ("0 2 5", None, (6, 0)),
        ("0 2 5", 8, (8, 0)),
        ("1 2 3", None, (3, 1)),
        ("5 0 2", None, (6, 0)),
        ("1 3 6", 6, (6, 1)),
    ],
)
def test_columns_keep_their_numbers(tmp_path, names, experts, kept):
    """Experts without a column were never chosen; numbers begin at 0, or at 1 without a gap."""
    numbers, (width, first) = [*map(int, names.split())], kept
    expected = np.zeros((3, 4, width), int)
    expected[:, :, np.array(numbers) - first] = LOAD[:, :, :3]
    head = f"step,layer,{','.join(f'e{number}' for number in numbers)}\n"
    (tmp_path / "loads").write_text(csv(LOAD[:, :, :3], head=head, about=lambda *at: at))
    actual = mt.open_input(tmp_path / "loads", num_experts=experts)
    assert np.array_equal(actual.window_load, expected)


def test_half_floats(tmp_path):
    """They are counts like others, though their type does not hold the largest count."""
    for load in (LOAD // 4, LOAD[:1] // 4):
        (tmp_path / "loads").write_bytes(npy(np.squeeze(load).astype("f2")))
        assert np.array_equal(mt.open_input(tmp_path / "loads").window_load, load)


def test_scrapes(tmp_path):
    """One scrape is a window; of several the windows are what was counted in between."""
    paths = [tmp_path / f"{number}.prom" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(scrape(number))
    assert np.array_equal(mt.open_input(paths[0], num_experts=12).window_load, LOAD[:1])
    assert np.array_equal(mt.open_input(paths).window_load, LOAD[1:])
    with pytest.raises(ValueError, match="counters must grow"):
        mt.open_input(paths[::-1])
    paths[0].write_text('sglang:eplb_gpu_physical_count_bucket{layer="0",le="1.0"} 4\n')
    with pytest.raises(ValueError, match="with labels layer and expert, got none: record experts"):
        mt.open_input(paths[0])


@given(st.integers(0, 1 << 30), st.integers(1, 4096), st.integers(1, 8))
def test_means_of_steps(seed, tokens, top_k):
    """Every layer keeps its total, every expert its share but for rounding, whatever the scale."""
    load = np.random.default_rng(seed).poisson(np.random.default_rng(seed).pareto(1, (3, 2, 9)) * 9)
    load[:, :, 0] += 1
    whole = mt.RoutingStatistics.from_load(load * 32)
    step = whole.per_step(tokens, top_k=top_k, drawn=False)
    sums = load.sum(axis=2, keepdims=True)
    wanted = np.rint(tokens * top_k * (sums / sums.max(axis=1, keepdims=True)))
    actual = step.window_load.astype(int)
    assert np.array_equal(actual.sum(axis=2, keepdims=True), wanted)
    assert (np.abs(actual - load / sums * wanted) < 1).all()
    assert step == mt.RoutingStatistics.from_load(load).per_step(tokens, top_k=top_k, drawn=False)
    size = int(sums[0].max())
    alone = mt.RoutingStatistics.from_load(load[:1])
    mean = whole.per_step(size, drawn=False)
    assert np.array_equal(mean.window_load[0], alone.window_load[0])
    # A single window is scaled, too.
    assert alone.per_step(tokens) == alone.per_step(tokens, drawn=False)


@pytest.mark.parametrize("tokens", [16, 512, 8192])
@pytest.mark.parametrize("windows", [2, 64])
def test_steps_are_drawn_by_chance(tokens, windows):
    """Loads of single steps scatter as choices do, in proportion to their window's, by a seed."""
    rng = np.random.default_rng([tokens, windows])
    shares = rng.dirichlet(np.full(12, 3.0), (windows, 2))
    load = np.round(1e12 * shares * [[[1], [0.5]]]).astype(np.uint64)
    table = mt.RoutingStatistics.from_load(load)
    steps = table.per_step(tokens, top_k=4)
    each = -(-32 // windows)
    assert steps.windows == windows * each
    assert (steps.window_load.sum(axis=2) == [[4 * tokens, 2 * tokens]]).all()
    expected = np.repeat(shares, each, axis=0) * 4 * tokens * [[[1], [0.5]]]
    off = (steps.window_load.astype(float) - expected) / np.sqrt(
        expected * (1 - np.repeat(shares, each, axis=0))
    )
    assert abs(off.mean()) < 0.2
    assert off.std() == pytest.approx(1, abs=0.15)
    assert steps == table.per_step(tokens, top_k=4, seed=0)
    assert steps != table.per_step(tokens, top_k=4, seed=1)
    # Another recording has other steps, though its shares are next to the same.
    more = load.copy()
    more[0, 0, 0] += 1 << 20
    other = mt.RoutingStatistics.from_load(more).per_step(tokens, top_k=4)
    assert not np.array_equal(steps.window_load[0], other.window_load[0])
    # Counters of as many more steps are of the same steps; the next window's differ by chance.
    assert steps == mt.RoutingStatistics.from_load(load * 4).per_step(tokens, top_k=4)
    again = mt.RoutingStatistics.from_load(load[[0, *range(windows)]]).per_step(tokens, top_k=4)
    assert not np.array_equal(again.window_load[0], again.window_load[each])


@pytest.mark.parametrize("tokens", [16, 64, 512, 8192])
def test_the_imbalance_of_steps_is_that_of_single_ones(tokens):
    """Counters of many steps tell the imbalance that a step has, where their mean is more even."""
    rng = np.random.default_rng(tokens)
    law = rng.dirichlet(np.full(64, 8.0))
    counters = rng.multinomial(tokens * 8 * 500, law, (200, 1))
    single = rng.multinomial(tokens * 8, law, (200, 1))
    blocks = mt.Placement.from_assignment(np.arange(64)[None] // 8, 8)
    table = mt.RoutingStatistics.from_load(counters)
    told, mean, true = (
        mt.evaluate(blocks, traffic, mixed=False).imbalance
        for traffic in (
            table.per_step(tokens, top_k=8),
            table.per_step(tokens, top_k=8, drawn=False),
            mt.RoutingStatistics.from_load(single),
        )
    )
    assert told == pytest.approx(true, rel=0.02)
    assert mean < told


ONE = np.where(np.arange(32), 1, 1000) * np.ones((1, 4, 1), int)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (LOAD, None),
        (0 * LOAD, "every count is zero"),
        (LOAD // 400, "choices per expert and layer are too few"),
        (ONE + np.arange(4)[:, None], "2 of 32 experts take"),
        (LOAD[:, [0, 1, 0]], "layer 2 has exactly what layer 0 has: record"),
    ],
)
def test_worthless_recordings(load, words):
    """What is wrong with a recording is said of counts and of a trace alike."""
    warnings = list_warnings(mt.RoutingStatistics.from_load(load))
    assert [words in line for line in warnings] == ([] if words is None else [True])
    if load.any():
        rows = [np.repeat(np.arange(of.size), of) for of in load[0]]
        rows = [np.random.default_rng(len(row)).permutation(row) for row in rows]
        ids = np.stack([row[: min(map(len, rows))] for row in rows], axis=1)[:, :, None]
        trace = trace_of(ids, load.shape[2])
        assert [words in line for line in list_warnings(trace)] == ([] if words is None else [True])


def test_empty_windows_are_counted(as_json, tmp_path):
    """Windows in which nothing was served make every mean look better, which is said."""
    load = LOAD[[0, 0, 1, 1, 2]]
    load[[1, 3]] = 0
    (line,) = list_warnings(mt.RoutingStatistics.from_load(load))
    assert line.startswith("Warning: empty windows, 2 of 5, count as steps of even load")
    np.savez(tmp_path / "load.npz", load=load)
    assert as_json("inspect", tmp_path / "load.npz")["input"]["warnings"] == [line]
    uneven = mt.Placement([[range(6), range(6, 12)]] * load.shape[1])
    all_windows, served = (
        mt.evaluate(uneven, mt.RoutingStatistics.from_load(each)).imbalance
        for each in (load, load[[0, 2, 4]])
    )
    assert all_windows == pytest.approx((3 * served + 2) / 5)


def test_counters_that_sum_over_steps_give_the_same(as_json, tmp_path):
    """Times are of one step of the model's tokens, but for chance, however many a window has."""
    times, common = [], ("--devices", 4, "--method", "lpt", "--out", tmp_path / "p.json")
    for steps, more in ((1, ()), (32, ("--tokens-per-step", 512))):
        path = tmp_path / f"{steps}.npz"
        np.savez(path, load=DENSE * steps, model="deepseek-v3")
        solved = as_json("solve", path, *common, *more)
        times.append((solved["predicted_layer_us"], solved["imbalance"]))
    assert times[0] == pytest.approx(times[1], rel=0.02)
