"""Samples: what is independent in traffic, how much there is, and how it is held out."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.evaluation.arrival import draw_mixed_order
from moetuner.evaluation.samples import Samples, find_samples, measure_correlation_length
from moetuner.evaluation.samples.autocorrelation import Autocorrelation, measure_autocorrelation
from moetuner.evaluation.samples.holdout import choose_runs, hold_out
from moetuner.formats import open_input

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import simulated

LAW = simulated.Law()


def table(topics, windows, seed):
    """Load table of topics of so many windows."""
    return LAW.table(np.random.default_rng([topics, windows, seed]), topics, windows)


@pytest.mark.parametrize(("topics", "windows"), [(64, 1), (32, 2), (16, 4), (8, 8)])
def test_correlation_times_are_as_long_as_topics(topics, windows):
    """The correlation time is the topics' length, nearly, in the mean."""
    measured = [
        measure_autocorrelation(table(topics, windows, seed).window_load) for seed in range(8)
    ]
    assert np.mean([each.correlation_time for each in measured]) == pytest.approx(windows, rel=0.25)
    assert all(windows <= each.correlation_length + 1 for each in measured)
    # By themselves, windows seldom seem to be alike.
    assert windows > 1 or sum(each.correlation_length > 1 for each in measured) <= 1


def test_long_correlations_are_measured_on_fewer_windows():
    """Topics of 40 windows reach beyond the lags that are looked at."""
    measured = measure_autocorrelation(table(10, 40, 0).window_load)
    assert measured.correlation_time == pytest.approx(40, rel=0.4)


def test_groups_have_levels_of_their_own():
    """Groups that follow one another are no correlation; without their labels they are."""
    rng = np.random.default_rng(0)
    share = np.repeat(rng.dirichlet(np.ones(8), (4, 1)), 16, axis=0)
    load = rng.multinomial(500, share)
    group = np.arange(64) // 16
    assert measure_autocorrelation(load, group).correlation_length == 1
    assert measure_autocorrelation(load).correlation_length > 4


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("order", ["turns", "runs", "chance"])
def test_windows_by_chance_are_independent_whatever_their_groups(order, groups):
    """The order in which groups come makes no window like its neighbour: one false alarm of ten."""
    alarms, windows = 0, 40
    for seed in range(20):
        random, turn = np.random.default_rng(seed), np.arange(windows)
        share = random.dirichlet(np.full(64, 2.0), 16)
        load = random.multinomial(16384, share, (windows, 16)).astype(np.uint64)
        chance = random.integers(0, groups, windows)
        by_order = {"turns": turn % groups, "runs": turn * groups // windows, "chance": chance}
        alarms += measure_autocorrelation(load, by_order[order]).correlation_length > 1
    assert alarms <= 2


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_held_out_with_a_gap(seed):
    """No window that is seen is within a block of one that is held out; few are lost."""
    load = table(32, 4, seed)
    length = measure_autocorrelation(load.window_load).correlation_length
    seen, unseen = choose_runs(128, 0.5, length, seed)
    assert not (seen & unseen).any()
    apart = np.abs(np.flatnonzero(seen)[:, None] - np.flatnonzero(unseen))
    assert np.minimum(apart, 128 - apart).min() > length
    assert seen.sum() + unseen.sum() >= 0.7 * 128


@pytest.mark.parametrize("gap", [1, 3, 50, 1000])
@pytest.mark.parametrize("number", [2, 3, 7, 64])
def test_both_parts_have_something_of_every_group(number, gap):
    """However long the gap, and however few there are, though groups follow one another."""
    for share in (0.01, 0.5, 0.99):
        assert all(part.any() for part in choose_runs(number, share, gap, 3))
    group = np.arange(400) // 100
    assert all(set(group[part]) == {0, 1, 2, 3} for part in choose_runs(400, 0.5, 5, 0))


def test_an_unlabelled_trace_is_held_out_further_than_its_sequences_reach():
    """No sequence that was seen has tokens in the unseen part, though nobody labelled it."""
    rng = np.random.default_rng(5)
    labelled = LAW.trace(rng, np.full(40, 300))
    trace = trace_of(labelled.expert_ids, simulated.EXPERTS)
    assert 200 <= measure_correlation_length(trace) <= 600
    seen, unseen = choose_runs(trace.tokens, 0.5, measure_correlation_length(trace), 0)
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
    units = find_samples(trace)
    assert (units.name, units.number) == ("kind", pytest.approx(kinds, abs=1))
    seen, unseen = (set(units.label_tokens(of.sequence)) for of in hold_out(trace, 0.5, seed=2))
    assert not seen & unseen


@pytest.mark.parametrize("evenness", [2.0, 20.0, 200.0])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_sequences_that_differ_are_units(evenness, skew):
    """However little they differ, sequences of kinds of their own count one by one."""
    rng = np.random.default_rng(3)
    units = find_samples(simulated.Law(skew, evenness).trace(rng, simulated.prompts(rng, 60)))
    assert (units.name, units.number) == ("sequence", 60)


def test_one_kind_is_told():
    """Sequences that all route alike may be one prompt: they count, and it is said."""
    rng = np.random.default_rng(4)
    units = find_samples(LAW.trace(rng, simulated.prompts(rng, 40), kinds=1))
    assert (units.name, units.number, units.all_alike) == ("sequence", 40, True)


def test_one_prompt_again_and_again_is_held_out_by_sequence():
    """Of requests that are all of one kind, some are seen and others are not."""
    ids = np.tile(np.arange(60).reshape(30, 1, 2) % 16, (20, 1, 1))
    sequence = np.arange(600) // 30
    trace = trace_of(ids, 16, sequence=sequence)
    assert find_samples(trace).number == 1
    assert [part.tokens for part in hold_out(trace, 0.5)] == [300, 300]


def test_runs_are_longer_than_windows_are_alike():
    """Folds of windows without labels follow one another, of three units each and of equal size."""
    dealt = Samples("window", 24, Autocorrelation(64 / 24, 3)).deal(
        table(16, 4, 0), np.arange(64), None
    )
    assert (dealt.number, dealt.units) == (8, 24)
    assert dealt.fold.tolist() == [window // 8 for window in range(64)]


@pytest.mark.parametrize("sequences", [1, 5, 19, 20, 21, 200])
def test_sequences_are_dealt_whole_and_evenly(sequences):
    """Each is in one fold, at most twenty have any, and none has a sequence more than the others.

    Where sequences differ in length, folds differ by no more than the longest.
    """
    rng = np.random.default_rng(sequences)
    trace = LAW.trace(rng, rng.integers(5, 40, sequences))
    dealt = Samples("sequence", sequences).deal(trace, np.arange(trace.tokens), 256)
    assert (dealt.number, dealt.units) == (min(sequences, 20), sequences)
    folds = {number: set(dealt.fold[trace.sequence == number]) for number in range(sequences)}
    assert all(len(fold) == 1 for fold in folds.values())
    sizes = np.bincount(dealt.fold, minlength=dealt.number)
    assert sizes.max() - sizes.min() <= np.bincount(trace.sequence).max()


def test_folds_are_not_alike_in_the_lengths_of_their_sequences():
    """Where lengths tell subjects, halves differ by them: one of 20 folds has several of the 20."""
    trace = LAW.trace(np.random.default_rng(0), np.arange(10, 50))
    dealt = Samples("sequence", 40).deal(trace, np.arange(trace.tokens), 64)
    longest = dealt.fold[np.flatnonzero(trace.sequence >= 20)]
    assert len(np.unique(longest)) < 20


def test_names_of_sequences_do_not_matter_to_folds():
    """Sequences by other numbers, in another order of them, are in the same folds."""
    rng = np.random.default_rng(0)
    trace = LAW.trace(rng, np.full(30, 9))
    renamed = replace(trace, sequence=rng.permutation(30).astype(np.int32)[trace.sequence])
    units = Samples("sequence", 30)
    one, other = (units.deal(each, np.arange(trace.tokens), 64) for each in (trace, renamed))
    assert one.fold.tolist() == other.fold.tolist()


def test_units_and_folds_are_the_same_however_many_tokens_are_looked_at_together(monkeypatch):
    """Of requests on few documents whose tokens were served in turns."""
    trace = LAW.documents(np.random.default_rng(0), 6, 4, 300)
    trace = trace.take(draw_mixed_order(trace.sequence, trace.tokens))
    dealt = []
    for piece in (1 << 20, 17):
        monkeypatch.setattr("moetuner.recording.labelling.PIECE", piece)
        fresh = replace(trace)  # of which nothing has been computed
        units, rows = find_samples(fresh), np.arange(fresh.tokens)
        parts = [part.sequence.tolist() for part in hold_out(fresh, 0.5, seed=1)]
        dealt.append((units.number, units.deal(fresh, rows, 64).fold.tolist(), parts))
    assert dealt[0] == dealt[1]
    assert dealt[0][0] == 6


# In which order kinds of windows come, of so many windows.
PATTERNS = {
    "turns of two": lambda n, rng: np.arange(n) // 8 * 2 + np.arange(n) % 2,
    "turns of three": lambda n, rng: np.arange(n) // 12 * 3 + np.arange(n) % 3,
    "turns of eight": lambda n, rng: np.arange(n) // 32 * 8 + np.arange(n) % 8,
    "random returns": lambda n, rng: rng.integers(0, 12, n),
    "bursts": lambda n, rng: np.repeat(rng.integers(0, 12, n // 4), 4),
}


def windows(kinds, rng, changed=0.0):
    """Load table of windows of such kinds [W], each changed by so much."""
    laws = np.array([LAW.kind(rng) for _ in range(kinds.max() + 1)])[kinds]
    laws = laws * np.exp(changed * rng.normal(size=laws.shape))
    load = [
        [rng.multinomial(1024, layer) for layer in law]
        for law in laws / laws.sum(axis=2, keepdims=True)
    ]
    return mt.RoutingStatistics.from_load(np.array(load).astype(np.uint64))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_kinds_of_windows_that_come_again_are_counted_and_on_one_side(pattern, groups):
    """Whichever turns they take, and whatever groups they are of."""
    rng = np.random.default_rng(len(pattern))
    kinds = PATTERNS[pattern](96, rng)
    table = windows(kinds, rng)
    group = {"group": np.arange(96) % groups, "group_names": ("prefill", "decode")[:groups]}
    numbered = mt.RoutingStatistics.from_load(table.window_load, **group)
    units = find_samples(numbered)
    assert (units.name, units.number) == ("kind", pytest.approx(len(np.unique(kinds)), abs=1))
    parts = hold_out(numbered, 0.5, seed=1)
    place = {load.tobytes(): number for number, load in enumerate(numbered.window_load)}
    seen, unseen = ({kinds[place[load.tobytes()]] for load in part.window_load} for part in parts)
    assert not seen & unseen


@pytest.mark.parametrize("pattern", ["turns of two", "turns of three"])
def test_windows_that_take_turns_are_alike_beyond_lag_one(pattern):
    """Windows that differ by more than noise count by all lags at which they are alike."""
    rng = np.random.default_rng(7)
    kinds = PATTERNS[pattern](192, rng)
    table = windows(kinds, rng, changed=0.5)
    measured = measure_autocorrelation(table.window_load)
    assert 4 <= measured.correlation_length <= 14
    assert measured.number(192) <= 80


def test_groups_are_held_out_at_the_same_times():
    """Where groups take turns, none of them is seen while another one is not."""
    group, number = np.arange(120) % 2, np.arange(120)
    seen, unseen = choose_runs(120, 0.5, 5, 0)
    apart = np.abs(number[seen & (group == 0)][:, None] - number[unseen & (group == 1)])
    assert np.minimum(apart, 120 - apart).min() > 5


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_repeated_text_is_one_kind_whatever_its_length(cut, together):
    """Eight prompts, short and long, asked ten times, cut off anywhere, or served together."""
    rng = np.random.default_rng(3)
    lengths = np.array([12, 20, 30, 60, 100, 200, 400, 900])
    prompts = [LAW.trace(rng, np.array([n])).expert_ids for n in lengths]
    which = rng.permutation(np.repeat(np.arange(8), 10))
    texts = [prompts[kind] for kind in which]
    if cut:
        texts = [text[: rng.integers(len(text) // 2, len(text)) + 1] for text in texts]
    sequence = np.repeat(np.arange(80), [*map(len, texts)])
    ids = np.concatenate(texts)
    if together:
        within = np.concatenate([np.arange(len(text)) for text in texts])
        order = np.lexsort((sequence, within, sequence // 16))
        ids, sequence = ids[order], sequence[order]
    trace = trace_of(ids, simulated.EXPERTS, sequence=sequence)
    units = find_samples(trace)
    assert (units.name, units.number) == ("kind", 8)
    kinds = units.label_tokens(np.arange(80, dtype=np.int32))
    assert len(set(zip(which, kinds, strict=True))) == 8


@pytest.mark.parametrize("seed", range(3))
def test_prompts_with_small_changes_are_kinds(seed):
    """Fifty prompts in 120 sequences, each changed a little, are far fewer units than sequences."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 50, 120)
    laws = np.array([LAW.kind(rng) for _ in range(50)])[kinds]
    ids = []
    for law, length in zip(laws, simulated.prompts(rng, 120), strict=True):
        near = rng.standard_gamma(law * 300 + 1e-6) + 1e-9
        noise = rng.gumbel(size=(length, *law.shape))
        ids.append(np.argpartition(-(np.log(near) + noise), 2, axis=2)[..., :2])
    sequence = np.repeat(np.arange(120), [*map(len, ids)])
    trace = trace_of(np.concatenate(ids), 16, sequence=sequence)
    units = find_samples(trace)
    assert units.name == "kind"
    assert 35 <= units.number <= 60


def draw_laws(rng, number, evenness=2.0):
    """Draw the shares [n,L,E] of requests that each like experts of their own."""
    share = rng.standard_gamma(np.full((number, 2, 16), evenness)) + 1e-6
    return share / share.sum(axis=2, keepdims=True)


def draw_requests(rng, laws, **labels):
    """Make a trace of one request of each law [n,L,E], in their order."""
    lengths = np.clip(rng.lognormal(5, 0.7, len(laws)), 20, 3000).astype(int)
    ids = [
        np.argpartition(-(np.log(law) + rng.gumbel(size=(size, *law.shape))), 2, axis=2)[..., :2]
        for law, size in zip(laws, lengths, strict=True)
    ]
    labels = {name: np.repeat(values, lengths) for name, values in labels.items()}
    sequence = np.repeat(np.arange(len(laws)), lengths)
    return np.concatenate(ids), {"sequence": sequence, **labels}


@pytest.mark.parametrize(
    ("number", "burst", "like"),
    [(100, 25, 25), (100, 8, 8), (100, 3, 1), (1600, 200, 200), (30, 20, 20)],
)
@pytest.mark.parametrize("seed", range(2))
def test_a_burst_of_one_law_is_one_unit(number, burst, like, seed):
    """Requests that route alike in a row are one sample, among many that do not.

    Fewer than a fold's are no matter. ``like`` are merged, give or take where neighbours were
    added up.
    """
    rng = np.random.default_rng([number, burst, seed])
    laws = draw_laws(rng, number)
    first = 4 * number // 11
    laws = np.insert(laws, [first] * burst, draw_laws(rng, 1)[0], axis=0)
    ids, labels = draw_requests(rng, laws)
    # Labels of sequences say nothing of their order.
    labels["sequence"] = rng.permutation(len(laws))[labels["sequence"]]
    units = find_samples(trace_of(ids, 16, **labels))
    close = 4 * (number > 1000)
    assert units.number == pytest.approx(number + burst - like + 1, abs=close)
    if like == 1:
        assert units.name == "sequence"
        return
    assert (units.name, units.likeness) == ("kind", "in a row")
    in_burst = np.zeros(len(laws), dtype=bool)
    in_burst[first : first + burst] = True
    order = np.unique(labels["sequence"], return_index=True)[1].argsort()
    kinds = units.kinds[order]
    assert len(np.unique(kinds[in_burst])) <= 1 + close
    assert not np.isin(kinds[~in_burst], kinds[in_burst]).sum() > close


def test_every_burst_is_a_unit():
    """Two tenants that come one after the other, and two later ones, are four units."""
    rng = np.random.default_rng(11)
    laws = draw_laws(rng, 100)
    runs = ((80, 15), (40, 30), (20, 15), (20, 15))  # the longest one is in the middle
    for (first, length), law in zip(runs, draw_laws(rng, len(runs)), strict=True):
        laws = np.insert(laws, [first] * length, law, axis=0)
    ids, labels = draw_requests(rng, laws)
    assert find_samples(trace_of(ids, 16, **labels)).number == 104


def test_a_burst_in_two_groups_is_two_units():
    """Two groups share no unit, though one law goes on from one into the other."""
    rng = np.random.default_rng(8)
    laws = np.insert(draw_laws(rng, 100), [50] * 30, draw_laws(rng, 1)[0], axis=0)
    group = (np.arange(130) >= 65).astype(int)
    ids, labels = draw_requests(rng, laws, group=group)
    units = find_samples(trace_of(ids, 16, group_names=["a", "b"], **labels))
    assert units.number == 102


@pytest.mark.parametrize("common", [0.5, 0.8])
def test_subjects_that_follow_one_another_are_no_bursts(common):
    """Requests of a subject have half of what sets them apart in common, and are units."""
    rng = np.random.default_rng(9)
    own, shared = (np.log(draw_laws(rng, number, 8.0)) for number in (120, 6))
    mixed = np.sqrt(1 - common) * own + np.sqrt(common) * shared.repeat(20, axis=0)
    laws = np.exp(mixed) / np.exp(mixed).sum(axis=2, keepdims=True)
    ids, labels = draw_requests(rng, laws)
    units = find_samples(trace_of(ids, 16, **labels))
    assert (units.name == "kind") == (common > 0.7)


def test_stretches_of_requests_by_chance_are_rare():
    """Of 40 recordings of requests that differ little, no stretch is taken for a burst."""
    for seed in range(40):
        rng = np.random.default_rng([10, seed])
        ids, labels = draw_requests(rng, draw_laws(rng, 60, 200.0))
        assert find_samples(trace_of(ids, 16, **labels)).number == 60


@pytest.mark.parametrize("grouped", [False, True])
def test_subjects_of_real_prompts_are_no_kinds(data, grouped):
    """Sequences of a real model are alike within subjects, and each is a unit all the same."""
    trace = open_input([data / "gpt-oss-20b.npz"])
    trace = trace if grouped else replace(trace, group=None, group_names=())
    units = find_samples(trace)
    assert (units.name, units.number) == ("sequence", 283)


# Shares of 160 windows that change little by little: how many independent ones they are worth.
PATHS = {
    "sines": (lambda law, rng: law.waves(rng, 160, (20, 80)), 20),
    "slow sines": (lambda law, rng: law.waves(rng, 160, (60, 160)), 8),
    "autoregression": (lambda law, rng: law.walk(rng, 160, 0.9), 20),
    "overlapping topics": (lambda law, rng: law.overlaps(rng, 160, 10), 24),
}


@pytest.mark.parametrize("path", PATHS)
def test_windows_that_change_little_by_little_are_blocks_of_time(path):
    """Pieces of a path are no kinds: neighbours would be seen and unseen."""
    draw, most = PATHS[path]
    for seed in range(3):
        rng = np.random.default_rng([seed, len(path)])
        table = simulated.draw_table(rng, draw(LAW, rng))
        units = find_samples(table)
        assert units.name == "window"
        assert 2 <= units.number <= most
        place = {load.tobytes(): number for number, load in enumerate(table.window_load)}
        seen, unseen = (
            np.array([place[load.tobytes()] for load in part.window_load])
            for part in hold_out(table, 0.5, seed=seed)
        )
        assert abs(seen[:, None] - unseen).min() > units.autocorrelation.correlation_length


def test_a_day_that_comes_again_is_of_kinds():
    """Pieces of three equal days are seen or unseen on all of them."""
    rng = np.random.default_rng(1)
    units = find_samples(simulated.draw_table(rng, LAW.waves(rng, 144, (48, 48), 1)))
    assert units.name == "kind"
    assert 10 <= units.number <= 48
    days = units.kinds.reshape(3, 48)
    assert (days[0] == days[1]).mean() > 0.6


@pytest.mark.parametrize("memory", [0.0, 0.1, 0.3])
def test_no_single_window_decides_how_many_are_independent(memory):
    """Of ten groups of eight windows any one may be missing: units stay within a tenth."""
    rng = np.random.default_rng(int(10 * memory))
    shares = np.concatenate([LAW.walk(rng, 8, memory) for _ in range(10)])
    load = simulated.draw_table(rng, shares, tokens=20000).window_load
    group = np.arange(80) // 8
    numbers = []
    for window in range(0, 80, 4):
        rest = np.arange(80) != window
        numbers.append(measure_autocorrelation(load[rest], group[rest]).number(79))
    assert max(numbers) <= 1.1 * np.median(numbers) + 1
    assert min(numbers) >= 0.9 * np.median(numbers) - 1


def test_groups_that_follow_one_another_are_in_both_parts():
    """However long windows are alike, what is judged is of the same mix as what is seen."""
    rng = np.random.default_rng(2)
    shares = np.concatenate([LAW.walk(rng, 16, 0.7) for _ in range(5)])
    table = simulated.draw_table(rng, shares, np.arange(80) // 16)
    assert find_samples(table).autocorrelation.correlation_length > 1
    for part in hold_out(table, 0.5):
        assert np.bincount(part.group, minlength=5).min() >= 3


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("number", [8, 20])
def test_steps_of_a_counter_are_one_unit(named, number):
    """Whether the kinds of counters are named or not, no counter has steps on both sides."""
    table = LAW.counters(np.random.default_rng(number), number)
    group = table.group
    if not named:
        table = replace(table, group=None, group_names=())
    assert table.windows > number
    assert find_samples(table).number == number
    units = find_samples(table)
    seen, unseen = (set(part.drawn_from) for part in hold_out(table, 0.5, seed=1))
    assert not seen & unseen
    folds = units.deal(table, np.arange(table.windows), None)
    assert all(len(np.unique(folds.fold[group == one])) == 1 for one in range(number))


@pytest.mark.parametrize("before", [0, 200])
@pytest.mark.parametrize(("number", "questions"), [(20, 4), (8, 10), (40, 2)])
def test_requests_on_one_document_are_one_unit(number, questions, before):
    """Whatever system prompt all requests begin with."""
    rng = np.random.default_rng([number, before])
    units = find_samples(LAW.documents(rng, number, questions, 300, before=before))
    assert (units.name, units.number) == ("kind", number)
    assert units.likeness == "part of the text"


@pytest.mark.parametrize("place", ["middle", "end"])
def test_a_document_is_found_wherever_it_stands(place):
    """In the middle of requests, and at their ends."""
    rng = np.random.default_rng(3)
    requests = []
    for _ in range(10):
        document = LAW.trace(rng, np.array([200])).expert_ids
        for _ in range(3):
            texts = [LAW.trace(rng, np.array([60])).expert_ids for _ in range(2)]
            texts.insert(1 if place == "middle" else 2, document)
            requests.append(np.concatenate(texts))
    sequence = np.repeat(np.arange(30), [*map(len, requests)])
    ids = np.concatenate(requests)
    units = find_samples(trace_of(ids, 16, sequence=sequence))
    assert (units.name, units.number) == ("kind", 10)


def test_what_all_requests_begin_with_is_no_document():
    """A system prompt of a third of the tokens leaves every request a unit."""
    units = find_samples(LAW.documents(np.random.default_rng(4), 60, 1, 1, before=90))
    assert (units.name, units.number) == ("sequence", 60)


def test_turns_of_a_conversation_are_one_unit():
    """Each request repeats what was said, and goes on."""
    rng = np.random.default_rng(5)
    requests = []
    for _ in range(12):
        turns = [LAW.trace(rng, np.array([50])).expert_ids for _ in range(4)]
        requests += [np.concatenate(turns[: last + 1]) for last in range(4)]
    sequence = np.repeat(np.arange(48), [*map(len, requests)])
    ids = np.concatenate(requests)
    units = find_samples(trace_of(ids, 16, sequence=sequence))
    assert (units.name, units.number, units.likeness) == ("kind", 12, "text")


@pytest.mark.parametrize("often", [0.0, 0.6, 0.95, 1.0])
def test_few_experts_make_no_text(often):
    """Where tokens are alike by chance, longer passages must be the same."""
    rng = np.random.default_rng(6)
    ids = np.where(rng.random((6000, 1, 1)) < often, 0, rng.integers(0, 8, (6000, 1, 1)))
    trace = trace_of(ids, length=100)
    units = find_samples(trace)
    assert units.number == (1 if often == 1 else 60)


def test_progress_of_readings_rises_to_one(make_trace):
    """Of what is independent, with labels and without, and of how far recordings differ."""
    trace = make_trace(tokens=2000)
    unlabelled, other = replace(trace, sequence=None), replace(trace)
    for work in (
        lambda progress: find_samples(trace, progress=progress),
        lambda progress: find_samples(unlabelled, progress=progress),
        lambda progress: mt.drift(trace, other, progress=progress),
    ):
        shares = []
        work(shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
