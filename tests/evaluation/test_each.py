"""Several placements are replayed in one reading, in both orders of arrival, as each by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import random_ids, trace_of
from placements import random_slots
from served import replayed

import moetuner as mt
from moetuner import _core
from moetuner.evaluation import evaluate_each, figures, reading
from moetuner.evaluation.arrival import draw_mixed_order
from moetuner.evaluation.options import ReplayOptions
from moetuner.serving.splits import SPLITS as ALL_SPLITS

MODEL = mt.CostModel(1.0, 0.5, 0.01, 2.0, 64.0)
# Of counts alone, which have no tokens to replay.
SPLITS = tuple(split for split in ALL_SPLITS if split != "lp")
# Whole evaluations of several groups, twice: fewer examples do.
few = settings(max_examples=max(settings.default.max_examples // 3, 1))


@few
@given(
    st.sampled_from(SPLITS),
    st.sampled_from(["bursts", "mixed", 0.3]),
    st.sampled_from([(5, 10), (20, 5), (16, 48, 32), (7, 9), (6, None), (100, 200), (None,)]),
    st.integers(0, 5),
)
def test_placements_and_windows_are_replayed_as_each_by_itself(split, arrival, windows, seed):
    """What is shared by placements, and by windows of any sizes, changes nothing of any group.

    Sizes are several times the shortest or not, or beyond the trace; the first ones are mixed, too.
    """
    rng = np.random.default_rng(seed)
    trace = trace_of(random_ids(90, 2, 2, 8, seed=seed), length=7, group=np.arange(90) // 7 % 2)
    topology = mt.Topology(4, devices_per_node=2)
    placements = [
        mt.Placement(random_slots(rng, 2, 4, 8, spare=more), num_experts=8) for more in (0, 2)
    ]
    placements.append(placements[1])
    how = {"split": split, "arrival": arrival, "cost_model": MODEL}
    servings = [mt.Serving(topology, window=window, **how) for window in windows]
    together = evaluate_each(placements, trace, servings, ReplayOptions())
    for serving, evaluations in zip(servings, together, strict=True):
        options = ReplayOptions(mixed=serving is servings[0])
        for placement, evaluation in zip(placements, evaluations, strict=True):
            [[alone]] = evaluate_each([placement], trace, [serving], options)
            assert evaluation.to_dict() == alone.to_dict()


def test_progress_is_the_share_of_tokens(make_trace, monkeypatch):
    """It rises to one, and a reading serves all placements."""
    trace = make_trace(tokens=500, experts=4, layers=2)
    monkeypatch.setattr(reading, "SHARD_BYTES", 400)
    shares, slots = [], np.arange(4).reshape(1, 2, 2).repeat(2, axis=0)
    placements = [mt.Placement(slots), mt.Placement(slots[:, ::-1].copy())]
    serving = mt.Serving(mt.Topology(2), window=16)
    evaluate_each(placements, trace, [serving], ReplayOptions(), progress=shares.append)
    assert shares == sorted(shares)
    assert (len(shares), shares[-1]) == (5, 1.0)


@given(
    st.sampled_from(["even", "nearest", "round_robin"]),
    st.integers(0, 2),
    st.integers(0, 99),
    st.sampled_from([(4, 2), (4, 1), (12, 3), (72, 9)]),
    st.sampled_from([1, 3, 40]),
)
def test_rows_are_replays_of_their_tokens(split, spare, seed, machine, run):
    """Cut anywhere, tokens count in their rows, at their positions, as a plain loop counts them.

    Rows are those of single tokens, or of runs that are counted together.
    """
    rng, (devices, nodes) = np.random.default_rng(seed), machine
    ids = random_ids(90, 3, 2, 2 * devices, seed=seed)
    slots = random_slots(rng, 3, devices, 2 * devices, spare=spare)
    slots = mt.Placement(slots, num_experts=2 * devices).slots
    node = (np.arange(devices) * nodes // devices).tolist()
    rows, cut = rng.integers(0, 5, 90).repeat(run)[:90].astype(np.uint32), rng.integers(0, 91)
    counter = _core.Replay(
        slots, 2 * devices, 2, node, rows=5, most_tokens=90, split=split, stays=True
    )
    for part in (slice(0, cut), slice(cut, 90)):
        counter.push(ids[part], rows[part], positions=np.arange(90, dtype=np.uint64)[part])
    load, visits, node_visits, _, _, stays = counter.finish()
    # Windows of one token each are the tokens' own counts.
    wanted, _, *wanted_visits = replayed(slots, ids, node, 1, split)
    for mine, each in zip((load, visits, node_visits), (wanted, *wanted_visits), strict=True):
        for row in range(5):
            assert mine[row].tolist() == each[rows == row].sum(axis=0).tolist()
    # Pairs that one device serves both: of tokens, the products of what it serves of both layers.
    same = (wanted[:, :-1] * wanted[:, 1:]).sum(axis=(1, 2))
    assert stays.tolist() == [same[rows == row].sum() for row in range(5)]


def test_blocks_of_windows_change_nothing(make_trace, monkeypatch):
    """Hundreds of windows are worked on in runs, to the same figures."""
    trace = make_trace(tokens=800)
    rng = np.random.default_rng(0)
    topology = mt.Topology(4, devices_per_node=2)
    statistics = mt.RoutingStatistics.from_trace(trace, window=2, sets=True)
    cases = [
        (mt.Placement(random_slots(rng, 3, 4, 8, spare=spare), num_experts=8), traffic, split)
        for spare in (0, 1)
        for split in ("even", "nearest")
        for traffic in (trace, statistics)
    ]

    def figures():
        return [
            mt.evaluate(each, traffic, topology, window=2, split=split, cost_model=MODEL)
            for each, traffic, split in cases
        ]

    whole = figures()
    monkeypatch.setattr("moetuner.evaluation.chunks.CHUNK_BYTES", 1000)
    for evaluation, alone in zip(figures(), whole, strict=True):
        for name in ("imbalance", "imbalance_mixed", "imbalance_worst", "predicted_layer_us"):
            assert getattr(evaluation, name) == pytest.approx(getattr(alone, name), rel=1e-12), name
        assert evaluation.predicted_us_per_layer == pytest.approx(alone.predicted_us_per_layer)


@few
@given(st.sampled_from(SPLITS), st.integers(0, 2), st.integers(1, 40), st.booleans())
def test_arrival_is_the_replay_of_tokens_in_that_order(split, spare, window, labelled):
    """Evaluated in mixed order, a trace is what a trace in that order is as recorded."""
    rng = np.random.default_rng(spare)
    ids = random_ids(90, 2, 3, 8, seed=window)
    sequence = np.arange(90, dtype=np.int32) // 4 if labelled else None
    group = rng.integers(0, 2, 90)
    trace = trace_of(ids, sequence=sequence, group=group)
    order = draw_mixed_order(sequence, 90)
    served = trace_of(
        ids[order], sequence=None if sequence is None else sequence[order], group=group[order]
    )
    placement = mt.Placement(random_slots(rng, 2, 4, 8, spare=spare), num_experts=8)
    how = {"window": window, "split": split, "cost_model": MODEL}
    mixed = mt.evaluate(placement, trace, arrival="mixed", mixed=False, **how)
    oracle = mt.evaluate(placement, served, mixed=False, **how)
    assert mixed.to_dict() == oracle.to_dict()
    assert mt.evaluate(placement, trace, arrival=1, **how).imbalance_mixed == mixed.imbalance
    # As recorded, tokens are counted at their places in that order, beside another placement.
    other = mt.Placement(random_slots(rng, 2, 4, 8, spare=0), num_experts=8)
    served_so = mt.Serving(mt.Topology(4), **how)
    [[_, recorded]] = evaluate_each([other, placement], trace, [served_so], ReplayOptions())
    assert recorded.imbalance_mixed == mixed.imbalance


@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_a_weight_mixes_both_orders(share, window):
    """Figures over windows are means by weight, the worst is the worst of both."""
    rng = np.random.default_rng(window)
    trace = trace_of(random_ids(80, 2, 2, 8, seed=1), length=5)
    placement = mt.Placement(random_slots(rng, 2, 4, 8, spare=1), num_experts=8)
    how = {"window": window, "cost_model": MODEL}
    bursts, mixed, both = (
        mt.evaluate(placement, trace, arrival=arrival, **how)
        for arrival in ("bursts", "mixed", share)
    )
    for name in ("imbalance", "predicted_layer_us"):
        ends = [getattr(each, name) for each in (bursts, mixed)]
        assert getattr(both, name) == pytest.approx((1 - share) * ends[0] + share * ends[1])
    assert both.imbalance_worst == max(bursts.imbalance_worst, mixed.imbalance_worst)
    assert both.imbalance_mixed == mixed.imbalance
    assert both.imbalance_total == bursts.imbalance_total


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_percentile_of_two_parts(some, others):
    """Half of the weight on each part: the least value that reaches the share of the weight."""
    parts = [(0.5, np.array(some, float)), (0.5, np.array(others, float))]
    for percent in (50, 95, 99):
        actual = figures.compute_percentile(parts, percent)
        reached, before = (
            sum(0.5 * np.mean(compare(part, actual)) for _, part in parts)
            for compare in (np.less_equal, np.less)
        )
        assert before - 1e-9 <= percent / 100 <= reached + 1e-9


@pytest.mark.parametrize("parts", [([2, 3, 4, 5], [4, 5, 6]), ([0, 1, 5, 9], [1, 6, 9, 11])])
def test_readers_of_some_tokens_count_what_each_counts_alone(parts):
    """A reader finds its tokens among those that are read for others, with and without gaps."""
    rng = np.random.default_rng(0)
    trace = mt.RoutingTrace.from_arrays(rng.integers(8, size=(12, 2, 1)), num_experts=8)
    readers = [reading.RowReader.by_window(trace, np.array(tokens), window=2) for tokens in parts]
    replays = [reader.count_experts() for reader in readers]
    reading.read(readers)
    for tokens, replay in zip(parts, replays, strict=True):
        alone = mt.RoutingStatistics.from_trace(trace.take(tokens), window=2)
        assert replay.finish()[0].tolist() == alone.window_load.tolist()
