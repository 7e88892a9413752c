"""What is claimed of traffic that gains nothing: the first table of bench/chance.py in small."""

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import chance
import simulated

import moetuner as mt
from moetuner.counting import total

RUNS = 2


@pytest.mark.parametrize(
    "name",
    ["16 topics of 4 windows", "sequences without labels", "60 of 5 kinds", "waves", "documents"],
)
def test_no_gain_is_claimed_where_there_is_none(name):
    """Of traffic that is alike where it was recorded, and gains nothing elsewhere."""
    false, certain, trials, _ = chance.measure_advice(name, RUNS)
    assert false == trials == 0
    assert round(certain * RUNS) >= RUNS - 1


def test_a_gain_is_found_without_labels():
    """Windows that are alike hide no gain that all text has."""
    assert chance.measure_advice("40 topics of 4 windows", 2, 2.0)[2] == 1


def test_few_kinds_of_windows_are_told():
    """Eight topics of eight windows are eight kinds, four unseen, which is the reason."""
    table = simulated.Law(2.0).table(np.random.default_rng(0), 8, 8)
    advice = simulated.advised(table, 0, splits=1)
    assert advice.answer == "not enough evidence"
    assert advice.findings[0].kind == "too few kinds"
    numbers = advice.findings[0].numbers
    assert (numbers["number"], numbers["unseen"], numbers["requests"]) == (8, 4, None)
    assert "kinds of traffic" in [each.kind for each in advice.findings]


def test_what_is_too_little_without_labels_is_told():
    """Windows that change little by little are few independent ones, which is the reason."""
    rng, law = np.random.default_rng(0), simulated.Law(2.0)
    laws = np.repeat([law.kind(rng) for _ in range(8)], 8, axis=0)
    laws = laws * np.exp(0.6 * rng.normal(size=laws.shape))
    laws /= laws.sum(axis=2, keepdims=True)
    load = np.array([[rng.multinomial(1024, layer) for layer in each] for each in laws])
    table = mt.RoutingStatistics.from_load(load.astype(np.uint64))
    advice = simulated.advised(table, 0, splits=1)
    assert advice.answer == "not enough evidence"
    assert advice.findings[0].kind == "neighbouring windows are alike"
    assert (
        advice.to_dict()["units"]["block_length"]
        == advice.units.autocorrelation.correlation_length
        > 5
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_burst_of_one_tenant_is_no_gain(seed):
    """Requests of one law in a row, once, gain nothing elsewhere: they are one sample, and told."""
    rng, law = np.random.default_rng([74, seed]), simulated.Law()
    single = law.trace(rng, simulated.prompts(rng, 100))
    trace = mt.RoutingTrace.concat([single, law.trace(rng, simulated.prompts(rng, 25), kinds=1)])
    advice = simulated.advised(trace, 0, splits=1)
    assert advice.units.number == 101
    assert advice.answer != "worth a trial"
    (told,) = (each for each in advice.findings if each.kind == "kinds of traffic")
    assert told.numbers["likeness"] == "in a row"
    assert any(
        "125 requests are 101 samples: those of a stretch" in line for line in advice.warnings
    )


def draw_requests(rng, likings):
    """Draw a request of each of some likings [n,L,E], relative to each other."""
    ids = []
    for liking in likings:
        share = liking / liking.sum(axis=1, keepdims=True)
        size = int(np.clip(rng.lognormal(5, 0.7), 20, 3000))
        scores = np.log(share) + rng.gumbel(size=(size, *share.shape))
        ids.append(np.argpartition(-scores, simulated.TOP_K, axis=2)[..., : simulated.TOP_K])
    return mt.RoutingTrace.from_arrays(
        np.concatenate(ids),
        num_experts=simulated.EXPERTS,
        sequence=np.repeat(np.arange(len(ids)), [*map(len, ids)]),
    )


def draw_slow_shards(seed):
    """Draw ten shards of requests, whose likings walk slowly between -1.2 and 1.2."""
    rng, shape = np.random.default_rng([131, seed]), (simulated.LAYERS, simulated.EXPERTS)
    liking, likings = rng.uniform(-1.2, 1.2, shape), []
    for _ in range(150):
        liking = liking + rng.normal(0, 0.1, shape)
        liking = np.where(abs(liking) > 1.2, 2.4 * np.sign(liking) - liking, liking)
        likings.append(liking)
    likings = np.exp(likings + rng.normal(0, 0.5, (150, *shape)))
    return [draw_requests(rng, part) for part in np.split(likings, 10)]


@pytest.mark.parametrize("seed", [0, 2, 12])
def test_slow_change_that_carries_by_chance_is_no_gain(seed):
    """Two halves of a path may suit one placement; counts of its shards say the same."""
    shards = draw_slow_shards(seed)
    advice = simulated.advised(mt.RoutingTrace.concat(shards), seed, splits=1)
    assert min(advice.carried) >= 0.5 * advice.main.gain.gain > 0
    assert advice.answer == "not enough evidence"
    assert advice.findings[0].kind == "drift that may carry"
    assert advice.findings[0].numbers["independent"] == advice.drift.independent < 10
    assert advice.drift.blocks == 32
    counted = total(mt.count(shard) for shard in shards)
    assert simulated.advised(counted, seed, splits=1).to_dict() == advice.to_dict()


def test_a_gain_of_all_text_carries_though_traffic_changes():
    """A skew that all text has gains on both halves, whatever else changes slowly."""
    rng, shape = np.random.default_rng(5), (simulated.LAYERS, simulated.EXPERTS)
    trend = np.linspace(-0.4, 0.4, 300)[:, None, None] * rng.choice([-1, 1], shape)
    liking = np.linspace(2, 0, simulated.EXPERTS) + trend + rng.normal(0, 0.8, (300, *shape))
    advice = simulated.advised(draw_requests(rng, np.exp(liking)), 0, splits=1)
    assert advice.drift.independent < 10
    assert advice.answer == "worth a trial"
    assert "drift that carries" in [each.kind for each in advice.findings]


def test_few_kinds_are_told():
    """Five kinds of prompts, six by their tokens, are too few."""
    rng = np.random.default_rng(0)
    trace = simulated.Law(2.0).trace(rng, simulated.prompts(rng, 60), kinds=5)
    advice = simulated.advised(trace, 0, splits=1)
    assert advice.answer == "not enough evidence"
    assert advice.findings[0].kind == "too few kinds"
    numbers = advice.findings[0].numbers
    assert (numbers["number"], numbers["requests"]) == (advice.units.number, 60)
    assert 5 <= advice.units.number <= 6


@pytest.mark.parametrize("name", ["64 windows", "16 topics of 4 windows"])
def test_equally_good_placements_are_seldom_certain(name):
    """Of 16 tables at most two seem to tell them apart; of windows alone every third would."""
    assert max(chance.measure_certainty(name, 16)) <= 2 / 16


def test_splits_that_agree_are_no_evidence():
    """The sentence of compare is by the interval; all splits agree more often."""
    sure, agreed = chance.measure_compare("60 sequences", 5)
    assert sure <= 1 / 5
    assert sure <= agreed


def test_groups_that_follow_one_another_are_judged_mixed_and_as_recorded():
    """Both gains are found; the order is no reason to refuse."""
    rng = np.random.default_rng(0)
    law = simulated.Law(2.0)
    trace = law.trace(rng, simulated.prompts(rng, 80), groups=2)
    advice = simulated.advised(trace, 0, splits=1)
    assert advice.drift.is_beyond_chance
    assert advice.drift.is_of_groups
    assert advice.answer == "worth a trial"
    (found,) = (each for each in advice.findings if each.kind == "halves of other groups")
    assert min(found.numbers["worst"].gain, found.numbers["mix"].gain) > 0


def test_drift_counts_kinds():
    """Other prompts of one law, each asked many times, are few units and no change of traffic."""
    law, beyond = simulated.Law(), 0
    for seed in range(5):
        rng = np.random.default_rng([9, seed])
        sides = [law.trace(rng, np.full(90, 150), kinds=9) for _ in range(2)]
        beyond += mt.drift(*sides).is_beyond_chance
        tables = [law.table(rng, 9, 10) for _ in range(2)]
        beyond += mt.drift(*tables).is_beyond_chance
    assert beyond <= 1


@pytest.mark.parametrize("lasting", [5, 10])
def test_recordings_of_overlapping_topics_do_not_drift(lasting):
    """Neighbouring blocks share topics, so those that change sides are longer than topics last."""
    law, chances = simulated.Law(), []
    for seed in range(8):
        rng = np.random.default_rng([10, seed])
        sides = [simulated.draw_table(rng, law.overlaps(rng, 240, lasting)) for _ in range(2)]
        with suppress(ValueError):  # too few blocks to tell
            chances.append(mt.drift(*sides, seed=seed).chance)
    assert sum(chance <= 0.01 for chance in chances) <= 1
