"""Halves: their figures are those of their own traffic, and tell how sure a figure is."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.figures import FIGURES, Figure
from moetuner.evaluation.halves import answers, cells, halve, halve_each, means
from moetuner.evaluation.halves.halvings import choose_halvings
from moetuner.evaluation.intervals import QUANTILES, estimate_spread
from moetuner.evaluation.judgement import MEASURES
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import RowReader
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.samples import Folds, Samples, find_samples
from moetuner.placement import blocks

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import simulated

IN_BLOCKS = blocks(simulated.LAYERS, simulated.EXPERTS, simulated.DEVICES)
COPIES = mt.Placement(
    [[[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12], [12, 13, 14, 15, 0]]] * 2
)


def setting(placement=IN_BLOCKS, window=64, **options):
    """Return how to replay, on two nodes, with predicted times."""
    model = mt.CostModel(0, 0.5, 5, 1.0, token_bytes=1000.0)
    serving = mt.Serving(mt.Topology(4, 2), window=window, cost_model=model, **options)
    return Setting(placement, serving)


def traffic(lengths, seed=0):
    """Draw sequences of such lengths."""
    return simulated.Law().trace(np.random.default_rng(seed), np.asarray(lengths))


@pytest.mark.parametrize("folds", range(1, 21))
def test_any_two_folds_are_parted_about_as_often_as_not(folds):
    """And none is always on one side; exactly so of 4, 8, 12 and 20 folds."""
    side = np.where(choose_halvings(folds), 1, -1)
    assert len(side) == 0 if folds == 1 else len(side) >= folds - 1
    together = (side.T @ side)[~np.eye(folds, dtype=bool)] / max(len(side), 1)
    limit = 1 / max(len(side), 1)
    assert (np.abs(together) <= limit + 1e-12).all() or folds in (2, 3)
    assert folds not in (4, 8, 12, 20) or together == pytest.approx(-limit)


@pytest.mark.parametrize("arrival", ["bursts", "mixed", 0.5])
def test_progress_of_a_comparison_rises_to_one(arrival, monkeypatch):
    """Windows are counted, then halves of a few at a time, in one order of arrival or in two."""
    monkeypatch.setattr(cells, "CELL_COUNTS_AT_ONCE", 500)
    trace, shares = traffic([100] * 12), []
    placements = [IN_BLOCKS, COPIES]
    serving = setting(arrival=arrival).serving
    evaluations = evaluate_each(placements, trace, [serving], ReplayOptions())
    mt.judge(*evaluations[0], progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize("topics", [1, 4])
def test_halves_that_have_windows_of_their_own_have_their_figures(topics):
    """Where sequences fill whole windows, a half's figures are what evaluate says of it alone."""
    trace, how = traffic([64 * topics] * 12), setting()
    actual = halve(trace, how, find_samples(trace))[None]
    folds = actual["imbalance"].folds
    for number, first in enumerate(choose_halvings(folds.number)):
        for side, chosen in enumerate((first, ~first)):
            part = trace.select(sequences=np.unique(trace.sequence[chosen[folds.fold]]))
            alone = mt.evaluate(IN_BLOCKS, part, how.serving, mixed=False)
            for name, figure in actual.items():
                assert figure.sides[side, number] == pytest.approx(getattr(alone, name)), name


@pytest.mark.parametrize("arrival", ["bursts", "mixed", 0.5])
@pytest.mark.parametrize("split", ["even", "nearest", "round_robin"])
def test_copies_are_halved_with_every_split(split, arrival):
    """All figures have all halves, and each half is near the whole."""
    trace = traffic([50] * 40)
    actual = halve(
        trace,
        setting(COPIES, split=split, arrival=arrival, waterfill=0.2, top_k=2),
        find_samples(trace),
    )[None]
    assert set(actual) == {*MEASURES}
    for figure in actual.values():
        assert figure.sides.shape == (2, 19)
        assert figure.sides == pytest.approx(figure.value, rel=0.25)


def test_what_a_half_has_of_a_window_is_scaled_to_all_of_it():
    """Of a window of 8 tokens one sequence has 4 on a device of two, the other 3 and 1."""
    ids = np.array([0, 0, 0, 0, 1, 1, 1, 0])[:, None, None]
    trace = trace_of(ids, 2, sequence=[0] * 4 + [1] * 4)
    how = Setting(blocks(1, 2, 2), mt.Serving(mt.Topology(2), window=8))
    actual = halve(trace, how, Samples("sequence", 2))[None]["imbalance"]
    assert actual.value == pytest.approx(5 / 4)
    assert sorted(actual.sides[:, 0].tolist()) == [3 / 2, 2]


@pytest.mark.parametrize("together", [False, True])
def test_sides_add_up_to_the_figure_of_all(together):
    """Of what counts every token: weighed by their tokens, sides of every halving are the whole."""
    trace = traffic(np.random.default_rng(1).integers(10, 90, 30))
    if together:
        sequence = np.random.default_rng(2).permutation(trace.sequence)
        trace = replace(trace, sequence=sequence)
    actual = halve(trace, setting(), Samples("sequence", 30))[None]
    for name in ("fanout", "node_fanout", "crossing"):
        figure = actual[name]
        first = choose_halvings(figure.folds.number)
        sizes = np.bincount(figure.folds.fold) / trace.tokens
        weights = np.stack([first @ sizes, ~first @ sizes])
        assert (weights * figure.sides).sum(axis=0) == pytest.approx(figure.value)


@pytest.mark.parametrize(
    ("module", "limit"),
    [(means, "SIDE_COUNTS_AT_ONCE"), (cells, "CELL_COUNTS_AT_ONCE")],
    ids=["means", "cells"],
)
@pytest.mark.parametrize("arrival", ["bursts", "mixed", 0.5])
def test_runs_of_windows_change_no_half(monkeypatch, arrival, module, limit):
    """However few windows of two sizes are read, or looked at, in one go."""
    sizes = np.random.default_rng(1).integers(10, 90, 30)
    settings = [setting(COPIES, window, arrival=arrival) for window in (64, 128)]
    trace = traffic(sizes)
    wanted = halve_each(trace, settings, find_samples(trace))
    monkeypatch.setattr(module, limit, 1)
    trace = traffic(sizes)
    actual = halve_each(trace, settings, find_samples(trace))
    for one, other in zip(actual, wanted, strict=True):
        for name, figure in other[None].items():
            assert one[None][name].sides == pytest.approx(figure.sides, rel=1e-12)


def test_windows_of_one_fold_are_not_read_again(monkeypatch):
    """Of sequences that fill windows nothing is: what each has is known of all of it."""
    asked = []

    def push(rows, ids, numbers, *options, **how):
        if len(rows.tokens) < 704:
            asked.extend(numbers.tolist())
        return count(rows, ids, numbers, *options, **how)

    count = RowReader.push
    monkeypatch.setattr(RowReader, "push", push)
    trace = traffic([64] * 10 + [32] * 2)
    halve(trace, setting(), find_samples(trace), names=["imbalance", "fanout"])
    assert asked == [*range(640, 704)]


def test_figures_that_were_not_asked_for_are_not_computed():
    """Those that were are as with all others, and known where all are."""
    trace, other, how = traffic([40] * 20), traffic([40] * 20), setting()
    few = halve(trace, how, find_samples(trace), names=["imbalance"])
    everything = halve(other, how, find_samples(other))
    assert list(few[None]) == ["imbalance"]
    assert (few[None]["imbalance"].sides == everything[None]["imbalance"].sides).all()
    assert halve(other, how, find_samples(other), names=["imbalance"]) is everything
    assert set(halve(trace, how, find_samples(trace))[None]) == set(everything[None])


@pytest.mark.parametrize(("arrival", "by_group"), [("bursts", True), ("mixed", False), (0.5, True)])
def test_halves_of_several_windows_are_those_of_each_by_itself(arrival, by_group):
    """Of two placements in windows of three sizes, which are read at once: of groups as well."""
    sizes = np.random.default_rng(1).integers(10, 90, 30)
    settings = [
        setting(placement, window, arrival=arrival)
        for window in (64, 256, 512)
        for placement in (IN_BLOCKS, COPIES)
    ]

    def recorded():
        trace = traffic(sizes)
        return replace(trace, group=trace.sequence % 2, group_names=("even", "odd"))

    trace = recorded()
    together = halve_each(trace, settings, find_samples(trace), by_group=by_group)
    for how, actual in zip(settings, together, strict=True):
        alone = recorded()
        wanted = halve(alone, how, find_samples(alone), by_group=by_group)
        assert actual.keys() == wanted.keys() == {None, *(("even", "odd") if by_group else ())}
        for group, figures in wanted.items():
            for name, figure in figures.items():
                assert actual[group][name].value == pytest.approx(figure.value, rel=1e-12)
                assert actual[group][name].sides == pytest.approx(figure.sides, rel=1e-12)


def test_halves_that_are_known_are_not_computed_again():
    """Of the same trace, setting and units, without groups as well; of any other they are new."""
    trace, units = traffic([40] * 20), Samples("sequence", 20)
    trace = replace(trace, group=trace.sequence % 2, group_names=("even", "odd"))
    first = halve(trace, setting(), units)
    assert halve(trace, setting(), units) is first
    assert halve(trace, setting(), units, by_group=False) == {None: first[None]}
    for other in (
        halve(trace, setting(COPIES), units),
        halve(trace, setting(window=128), units),
        halve(trace, setting(), Samples("sequence", 20)),
        halve(replace(trace), setting(), units),
    ):
        assert other[None]["imbalance"] is not first[None]["imbalance"]


def test_a_trace_keeps_no_more_than_a_few_halves():
    """However many placements it is judged under, what is kept of them does not grow."""
    trace, units = traffic([40] * 4), Samples("sequence", 4)
    for window in range(1, 2 * answers.CACHED_SETTINGS):
        halve(trace, setting(window=window), units)
    assert len(trace.memo["halves"]) <= answers.CACHED_SETTINGS + 1


def test_a_new_figure_of_windows_has_an_interval(monkeypatch):
    """Whatever it computes of counts: declared once, it has a value and halves."""
    busy = Figure("busy", 2, "devices with tokens", windows=lambda counts, _: counts.load > 5)
    monkeypatch.setitem(FIGURES, "busy", busy)
    trace = traffic([40] * 20)
    figure = halve(trace, setting(), find_samples(trace))[None]["busy"]
    assert 0 < figure.value <= 4
    assert estimate_spread(*figure).error > 0


@pytest.mark.parametrize("units", [2, 3, 5, 7, 10, 50])
def test_intervals_of_means_hold_the_truth(units):
    """Of means of so many normal variates, about 95 of 100 intervals hold the mean."""
    rng = np.random.default_rng(units)
    number = min(units, 20)
    first = choose_halvings(number)
    folds = Folds(np.arange(units) % number, number, units)
    member = np.equal.outer(folds.fold, np.arange(number)) @ np.stack([first, ~first]).transpose(
        0, 2, 1
    )
    missed = 0
    for drawn in rng.normal(10, 1, (1000, units)):
        actual = estimate_spread(drawn.mean(), (drawn @ member) / member.sum(axis=1), folds)
        missed += not actual.low <= 10 <= actual.high
    assert 0.03 <= missed / 1000 <= 0.07


def test_an_interval_is_as_wide_as_students_t_says():
    """Of two sides of three halvings that are 2 apart, the error is 1, with as many less one."""
    folds = Folds(np.arange(4), 4, 4)
    actual = estimate_spread(5.0, np.array([[6.0, 4.0, 6.0], [4.0, 6.0, 4.0]]), folds)
    assert (actual.error, actual.freedom) == (1, 3)
    assert actual.interval == pytest.approx((5 - QUANTILES[2], 5 + QUANTILES[2]))
