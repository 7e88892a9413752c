"""Answers on both sides of every size that something is compared with: no token changes them."""

from importlib import resources

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.serving.phases import PREFILL_WINDOWS, WINDOWS

TOPOLOGY = mt.Topology(4)
# Tokens of recordings: one and two windows of either phase, 17 windows of decode, and
# recordings whose halves fill two windows of prefill. One token more or less is no other traffic.
EDGES = sorted({WINDOWS[0] * n for n in (1, 2, 17)} | {WINDOWS[1] * n for n in (1, 2)})
HALVED = [4 * size for size in PREFILL_WINDOWS]


@pytest.fixture(scope="module")
def recording():
    """Return a maker of parts of the bundled trace, whose sequences are in random order."""
    with resources.as_file(resources.files("moetuner") / "data" / "small-moe.safetensors") as at:
        trace = mt.RoutingTrace.load(at)
    ids, sequence, group = trace.expert_ids[:], trace.sequence, trace.group
    order = np.random.default_rng(5).permutation(np.unique(sequence))
    rows = np.concatenate([np.flatnonzero(sequence == number) for number in order])

    def part(first, last):
        chosen = rows[first:last]
        return trace_of(
            ids[chosen],
            trace.num_experts,
            sequence=sequence[chosen],
            group=group[chosen],
            group_names=trace.group_names,
        )

    return part


def solved(trace, **options):
    """Return a placement for the default goal, and EPLB's of the same counts."""
    grouped = "groups" in options
    counts = mt.RoutingStatistics.from_trace(trace, sets=True, by_group=grouped)
    problem = mt.Problem(counts, TOPOLOGY, **options)
    return [mt.solve(problem, method, iterations=300).placement for method in ("joint", "eplb")]


def predict(placement, unseen):
    """Predict microseconds of a layer in windows of both phases."""
    return np.array(
        [
            mt.evaluate(placement, unseen, TOPOLOGY, window=size, mixed=False).predicted_layer_us
            for size in WINDOWS
        ]
    )


@pytest.mark.parametrize("tokens", EDGES)
def test_one_token_more_changes_no_phase(recording, tokens):
    """On unseen traffic, by more than chance, and no phase is behind EPLB by more than that."""
    unseen = recording(36_000, 61_440)
    times = []
    for size in (tokens - 1, tokens):
        placements = solved(recording(0, size))
        ours, eplb = (predict(each, unseen) for each in placements)
        # Half the interval of a gain of prefill on so many unseen tokens.
        assert (ours < eplb * 1.025).all()
        times.append(ours)
    assert np.ptp(times, axis=0) == pytest.approx([0, 0], abs=0.025 * times[0].max())
    assert (np.ptp(times, axis=0) < 0.05 * times[0]).all()


@pytest.mark.parametrize("groups", ["minimax", "equal"])
def test_groups_that_weigh_alike_lose_no_phase(recording, groups):
    """A recording whose groups fill no long window by themselves is searched for both phases."""
    trace, unseen = recording(0, 12_000), recording(36_000, 61_440)
    weights = dict.fromkeys(trace.group_names, 1.0) if groups == "equal" else groups
    grouped, eplb = (predict(each, unseen) for each in solved(trace, groups=weights))
    assert (grouped < eplb * 1.025).all()


@pytest.mark.parametrize("tokens", HALVED)
def test_advice_is_the_same_on_both_sides_of_a_size(brief, recording, tokens):
    """The gains of both phases differ within their intervals; what is not judged is found."""
    advices = [
        mt.advise(recording(0, size), mt.Topology(8), copies=(0,), splits=1)
        for size in (tokens - 2, tokens)
    ]
    fewer, more = advices
    if tokens == min(HALVED):
        assert (fewer.prefill_lacks, fewer.answer) == (2, "not enough evidence")
        assert fewer.findings[0].numbers["tokens"] == 2
        assert [each.window for each in more.judged] == [WINDOWS[0], PREFILL_WINDOWS[-1]]
        return
    assert fewer.answer == more.answer
    assert [len(advice.judged) for advice in advices] == [2, 2]
    for one, other in zip(fewer.judged, more.judged, strict=True):
        assert other.gain.low <= one.gain.gain <= other.gain.high
        assert one.gain.low <= other.gain.gain <= one.gain.high


def test_prefill_is_judged_in_the_longest_windows_that_are_filled_twice(brief, recording):
    """Of unseen traffic that is given apart, by its own size; the headline names both phases."""
    seen = recording(0, 9_000)
    for tokens, window in ((4_096, 2048), (16_384, 8192)):
        advice = mt.advise(
            seen, TOPOLOGY, unseen=recording(20_000, 20_000 + tokens), copies=(0,), splits=1
        )
        assert [each.window for each in advice.judged] == [512, window]
        assert advice.prefill_lacks == 0
        assert {"decode", "prefill"} <= set(advice.reasons[0].replace("(", " ").split())
    short = mt.advise(seen, TOPOLOGY, unseen=recording(20_000, 24_000), copies=(0,), splits=1)
    assert short.prefill_lacks == 96
