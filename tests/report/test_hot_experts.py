"""What the hottest experts take: a fixed set, a cache, and routing without preference."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of

import moetuner as mt
from moetuner import _core
from moetuner.report.hot_experts import SIZES, hold_out_hot_experts

# Which experts are hot is counted, whatever a search finds.
pytestmark = pytest.mark.usefixtures("brief")


def cached(ids, experts, held):
    """Count the ids [T,L,K] that caches hold, of so many experts of each layer, warm at first."""
    hits = 0
    for layer in range(ids.shape[1]):
        # The first experts, expert 0 the last that was used.
        cache = OrderedDict.fromkeys(range(held - 1, -1, -1))
        for expert in ids[:, layer].ravel().tolist():
            hits += expert in cache
            cache[expert] = None
            cache.move_to_end(expert)
            if len(cache) > held:
                cache.popitem(last=False)
    return hits


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(3, 9), st.data())
def test_places_are_what_caches_of_every_size_hold(tokens, layers, top_k, experts, data):
    """Ids of lower places are those that a cache of so many experts holds, in shards or whole."""
    ids = random_ids(tokens, layers, top_k, experts, seed=data.draw(st.integers(0, 99)))
    orders = np.tile(np.arange(experts, dtype=np.uint16), (layers, 1))
    _, counts = _core.count_recency(ids, orders)
    for held in range(1, experts + 1):
        assert counts[:, :held].sum() == cached(ids, experts, held)
    cut = data.draw(st.integers(0, tokens))
    between, first = _core.count_recency(ids[:cut], orders, 1)
    _, second = _core.count_recency(ids[cut:], between, 2)
    assert np.array_equal(first + second, counts)


def test_a_set_is_judged_on_what_it_was_not_chosen_by(make_trace):
    """The set is the most used of all layers in the half that is seen; shares are of the other."""
    trace = make_trace(600)
    hot = mt.structure(trace, 2).hot_experts
    seen, unseen = (
        mt.RoutingStatistics.from_trace(half, window=None).total_load
        for half in mt.hold_out(trace, 0.5, seed=0)
    )
    order = np.argsort(-seen.ravel().astype(float), kind="stable")
    for size, share in zip(SIZES, hot.static, strict=True):
        chosen = order[: round(size * order.size)]
        assert share == pytest.approx(unseen.ravel()[chosen].sum() / unseen.sum())
    assert hot.is_unseen
    assert set(hot.static_of_group) == {"even", "odd"}
    assert len(hot.static_of_layer) == trace.layers


def test_what_is_used_over_and_over_is_worth_a_set():
    """Where half of the experts take nearly all picks of every token, in any order."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((4000, 2, 1)) < 0.97, rng.integers(0, 4, (4000, 2, 1)), 6)
    hot = mt.structure(trace_of(ids), 2).hot_experts
    assert hot.answer == "a static set is worth it"
    assert hot.static[1] > 0.95


def test_what_changes_from_text_to_text_is_worth_a_cache():
    """Where every sequence has experts of its own, which the next one has not."""
    rng = np.random.default_rng(0)
    own = np.stack([rng.permutation(16)[:4] for _ in range(200)])
    ids = own[np.repeat(np.arange(200), 40), rng.integers(0, 4, 8000)][:, None, None]
    sequence = np.repeat(np.arange(200), 40)
    trace = trace_of(ids, 16, sequence=sequence)
    hot = mt.structure(trace, 2).hot_experts
    assert hot.answer == "a cache serves better"
    assert hot.cache[1] > hot.static[1] + 0.2


def test_routing_without_preference_is_flat():
    """Where every expert is as likely as any other, size decides."""
    ids = np.random.default_rng(0).integers(0, 16, (20000, 2, 1))
    hot = mt.structure(trace_of(ids, 16), 2).hot_experts
    assert hot.answer == "routing is flat"
    assert hot.static == pytest.approx(SIZES, abs=0.02)
    assert hot.cache == pytest.approx(SIZES, abs=0.02)


def test_counts_have_no_order():
    """Of a load table there is no cache; of one window no later half, and nothing is unseen."""
    load = np.random.default_rng(0).integers(0, 99, (6, 2, 8))
    hot = mt.structure(mt.RoutingStatistics.from_load(load), 2).hot_experts
    assert hot.cache is None
    assert hot.is_unseen
    early, late = load[:3].sum(axis=0), load[3:].sum(axis=0)
    chosen = np.argsort(-early.ravel(), kind="stable")[:8]
    assert hot.static_later == pytest.approx(late.ravel()[chosen].sum() / late.sum())
    one = mt.structure(mt.RoutingStatistics.from_load(load[0]), 2).hot_experts
    assert not one.is_unseen
    assert one.static_later is None
    assert "unseen" not in one.sentence


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(100, 64, 6), (300, 256, 8)])
def test_nothing_is_decided_where_nothing_is_held_out(tokens, experts, top_k):
    """One window of equally likely experts: the busiest half takes what it takes by chance."""
    rng = np.random.default_rng(experts)
    ids = rng.random((tokens, 12, experts)).argsort(axis=2)[:, :, :top_k]
    load = [np.bincount(layer.ravel(), minlength=experts) for layer in ids.swapaxes(0, 1)]
    hot = hold_out_hot_experts(mt.RoutingStatistics.from_load(load))
    assert hot.answer == "nothing is held out"
    assert hot.static == pytest.approx(hot.chance, abs=0.015)
    assert hot.static[1] > 0.55


def test_loads_of_saved_statistics_are_held_out(make_trace):
    """Pairs are counted over all windows, which the hottest experts do not need."""
    statistics = mt.RoutingStatistics.from_trace(make_trace(600), window=100)
    assert statistics.transitions is not None
    assert hold_out_hot_experts(statistics).is_unseen


def test_published_shares_of_gpt_oss(data):
    """On recorded prompts: a fixed half takes 79 %, a cache of that size 88 to 90 %."""
    hot = mt.structure(mt.open_input(data / "gpt-oss-20b.npz"), 2).hot_experts
    assert hot.static == pytest.approx((0.482, 0.792, 0.961), abs=0.01)
    assert hot.cache == pytest.approx((0.62, 0.885, 0.977), abs=0.015)
    assert hot.answer == "a cache serves better"
