"""Units: what is independent in traffic, how much there is, and how it is held out."""

import sys
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.evaluation.intervals import Sums, paired
from moetuner.evaluation.units import Blocks, alike_tokens, blocks_of, hold_out, runs, units_of

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import simulated

LAW = simulated.Law()


def table(topics, windows, seed):
    """Load table of topics of so many windows."""
    return LAW.table(np.random.default_rng([topics, windows, seed]), topics, windows)


@pytest.mark.parametrize(("topics", "windows"), [(64, 1), (32, 2), (16, 4), (8, 8)])
def test_blocks_are_as_long_as_topics(topics, windows):
    """The correlation time is the topics' length, nearly, in the mean."""
    blocks = [blocks_of(table(topics, windows, seed).window_load) for seed in range(8)]
    assert np.mean([each.correlation for each in blocks]) == pytest.approx(windows, rel=0.25)
    assert all(windows <= each.length + 1 for each in blocks)
    # By themselves, windows seldom seem to be alike.
    assert windows > 1 or sum(each.length > 1 for each in blocks) <= 1


def test_long_correlations_are_measured_on_fewer_windows():
    """Topics of 40 windows reach beyond the lags that are looked at."""
    blocks = blocks_of(table(10, 40, 0).window_load)
    assert blocks.correlation == pytest.approx(40, rel=0.4)


def test_groups_have_levels_of_their_own():
    """Groups that follow one another are no correlation; without their labels they are."""
    rng = np.random.default_rng(0)
    share = np.repeat(rng.dirichlet(np.ones(8), (4, 1)), 16, axis=0)
    load = rng.multinomial(500, share)
    group = np.arange(64) // 16
    assert blocks_of(load, group).length == 1
    assert blocks_of(load).length > 4


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_held_out_with_a_gap(seed):
    """No window that is seen is within a block of one that is held out; few are lost."""
    load = table(32, 4, seed)
    length = blocks_of(load.window_load).length
    numbered = mt.RoutingStatistics.from_load(
        load.window_load, group=np.zeros(128, int), group_names=("all",)
    )
    seen, unseen = runs(128, 0.5, length, seed)
    assert not (seen & unseen).any()
    apart = np.abs(np.flatnonzero(seen)[:, None] - np.flatnonzero(unseen))
    assert np.minimum(apart, 128 - apart).min() > length
    assert seen.sum() + unseen.sum() >= 0.7 * 128
    parts = hold_out(numbered, 0.5, seed=seed)
    assert [part.windows for part in parts] == [seen.sum(), unseen.sum()]


@pytest.mark.parametrize("gap", [1, 3, 50, 1000])
@pytest.mark.parametrize("number", [2, 3, 7, 64])
def test_both_parts_have_something_of_every_group(number, gap):
    """However long the gap, and however few there are, though groups follow one another."""
    for share in (0.01, 0.5, 0.99):
        assert all(part.any() for part in runs(number, share, gap, 3))
    group = np.arange(400) // 100
    assert all(set(group[part]) == {0, 1, 2, 3} for part in runs(400, 0.5, 5, 0, group))


def test_an_unlabelled_trace_is_held_out_further_than_its_sequences_reach():
    """No sequence that was seen has tokens in the unseen part, though nobody labelled it."""
    rng = np.random.default_rng(5)
    labelled = LAW.trace(rng, np.full(40, 300))
    trace = mt.RoutingTrace.from_arrays(labelled.expert_ids, num_experts=simulated.EXPERTS)
    assert 200 <= alike_tokens(trace) <= 600
    seen, unseen = runs(trace.tokens, 0.5, alike_tokens(trace), 0)
    both = set(labelled.sequence[seen]) & set(labelled.sequence[unseen])
    assert len(both) <= 2
    parts = hold_out(trace, 0.5)
    assert [part.tokens for part in parts] == [seen.sum(), unseen.sum()]
    assert parts[0].sequence is None


@pytest.mark.parametrize("kinds", [2, 5, 8, 12])
def test_few_kinds_are_counted_and_on_one_side(kinds):
    """Prompts that are asked again are as many units as there are prompts, seen or unseen."""
    rng = np.random.default_rng(kinds)
    trace = LAW.trace(rng, simulated.prompts(rng, 60), kinds=kinds)
    units = units_of(trace)
    assert (units.name, units.number) == ("kind", pytest.approx(kinds, abs=1))
    seen, unseen = (set(units.of_tokens(of.sequence)) for of in hold_out(trace, 0.5, seed=2))
    assert not seen & unseen


@pytest.mark.parametrize("evenness", [2.0, 20.0, 200.0])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_sequences_that_differ_are_units(evenness, skew):
    """However little they differ, sequences of kinds of their own count one by one."""
    rng = np.random.default_rng(3)
    units = units_of(simulated.Law(skew, evenness).trace(rng, simulated.prompts(rng, 60)))
    assert (units.name, units.number) == ("sequence", 60)


def test_one_kind_is_told():
    """Sequences that all route alike may be one prompt: they count, and it is said."""
    rng = np.random.default_rng(4)
    units = units_of(LAW.trace(rng, simulated.prompts(rng, 40), kinds=1))
    assert (units.name, units.number, units.all_alike) == ("sequence", 40, True)


def test_blocks_widen_intervals_as_much_as_windows_are_alike():
    """The interval of windows that come four times is that of four times fewer."""
    rng = np.random.default_rng(6)
    each = 1 + 0.1 * rng.normal(size=60)

    def width(repeat, blocks):
        above, ones = each.repeat(repeat), np.ones(60 * repeat)
        flat = Sums(1.0, ones, ones, blocks)
        sums = Sums(float(above.mean()), above, ones, blocks)
        change = paired({"x": sums}, {"x": flat}, rng=np.random.default_rng(0))["x"].change
        assert change.units == 60
        return change.high - change.low

    lag = 1 - np.arange(1, 4) / 4
    inside = 1 + 2 * (lag * lag).sum()
    blocks = Blocks(4.0, 4, float(np.sqrt(4 / inside)))
    assert width(4, blocks) == pytest.approx(width(1, Blocks()), rel=0.2)
