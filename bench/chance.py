"""What advise, audit, verdict and compare claim where nothing is the case, and find where it is.

    python bench/chance.py [--runs 150] [--audits 60] [--advices 40]

Routing of simulated sequences: each likes experts of its own, more or less, in every layer, and its
tokens follow. No expert is better than another before sequences are drawn, so a placement of
neighbours in blocks and one in turns are equally good in truth: what an audit of one against the
other calls worse is a false alarm, and an interval of the change that does not hold 0 misses.

The first table judges advise, verdict and compare by the truth, on traffic of laws that are known
(bench/simulated.py), with and without labels, of windows that are alike and that are not, that
change little by little, of few kinds, of groups that follow one another, of documents that requests
share, of shards that are counted and sampled, and of counters: how often a gain is claimed that
fresh traffic does not have, how many intervals hold the truth, and, where all text shares a skew,
how often the gain is found; and how often drift seems to be beyond chance between two recordings of
one law. The others print how often the interval of 95 % misses, by the number of sequences and how
they lie in windows; how often intervals would miss whose errors are of differences of windows; how
often a null audit of seven groups names somebody; how often one group that is served worse is
named; and what verdict says of a change between the two. Seeds are fixed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from harness import Report, benchmark
from numpy.typing import NDArray
from simulated import DEVICES as FEW
from simulated import WINDOW as LONG
from simulated import Law, advised, draw_table, placed, prompts, true_gain

import moetuner as mt
from moetuner.cli import moetuner as command_line
from moetuner.counting import total
from moetuner.evaluation import Replayed
from moetuner.evaluation.arrival import draw_mixed_order
from moetuner.evaluation.figures import compute_window_imbalances
from moetuner.evaluation.intervals import Spread
from moetuner.evaluation.replay import count_each

Traffic = mt.RoutingTrace | mt.RoutingStatistics
Rng = np.random.Generator

LAYERS, EXPERTS, TOP_K, DEVICES, WINDOW = 4, 16, 2, 4, 64
# How much sequences differ, in standard deviations of an expert's score.
LIKING = 0.5
MEASURES = ("imbalance", "predicted_layer_us", "fanout", "crossing")
MODEL = mt.CostModel(0, 0, 20, 0.5, token_bytes=1e4, name="simulated")
BLOCKS = mt.Placement.from_assignment(
    np.tile(np.arange(EXPERTS) * DEVICES // EXPERTS, (LAYERS, 1)), DEVICES
)
TURNS = mt.Placement.from_assignment(np.tile(np.arange(EXPERTS) % DEVICES, (LAYERS, 1)), DEVICES)

# How long sequences are, in windows, and whether they come one after the other.
SHAPES = {
    "one window each": ((1, 1), False),
    "crossing windows": ((0.5, 2.5), False),
    "many in a window": ((0.06, 0.2), False),
    "many windows each": ((3, 6), False),
    "served together": ((1, 2), True),
}


def draw_trace(
    sequences: int,
    shape: str,
    rng: np.random.Generator,
    *,
    groups: int = 1,
    served_worse: float = 0.0,
) -> mt.RoutingTrace:
    """Make a trace of groups of so many sequences each.

    All tokens of the first group like the first two experts more, by ``served_worse``, which is bad
    for blocks and does not matter in turns.
    """
    (shortest, longest), together = SHAPES[shape]
    number = sequences * groups
    length = np.maximum(np.round(rng.uniform(shortest, longest, number) * WINDOW), 1).astype(int)
    sequence = np.repeat(np.arange(number), length)
    if together:
        sequence = rng.permutation(sequence)
    liking = rng.normal(0, LIKING, (number, LAYERS, EXPERTS))
    liking[:sequences, :, :2] += served_worse
    scores = liking[sequence] + rng.gumbel(size=(len(sequence), LAYERS, EXPERTS))
    ids = np.argpartition(-scores, TOP_K, axis=2)[:, :, :TOP_K]
    group = sequence // sequences if groups > 1 else None
    return mt.RoutingTrace.from_arrays(ids, num_experts=EXPERTS, sequence=sequence, group=group)


def audit_blocks(trace: mt.RoutingTrace) -> mt.Judgement:
    """Audit blocks against turns."""
    return mt.audit(
        BLOCKS,
        trace,
        baseline=TURNS,
        window=WINDOW,
        cost_model=MODEL,
        threads=1,
    )


def measure_misses(sequences: int, shape: str, runs: int) -> NDArray[np.float64]:
    """Return the share of null audits whose interval of the change does not hold 0, by measure."""
    count = np.zeros(len(MEASURES))
    for run in range(runs):
        rng = np.random.default_rng([sequences, run])
        answer = audit_blocks(draw_trace(sequences, shape, rng)).whole
        for place, name in enumerate(MEASURES):
            count[place] += misses_zero(answer[name].change)
    return count / runs


def misses_zero(spread: Spread | None) -> bool:
    """Return whether an interval does not hold 0."""
    assert spread is not None
    assert spread.low is not None
    assert spread.high is not None
    return not spread.low <= 0 <= spread.high


def measure_window_misses(sequences: int, shape: str, runs: int) -> list[float | None]:
    """Return shares of null audits whose interval of the imbalance misses 0, by kind of error.

    The first error is that of halves. The others are of the differences of full windows: as if they
    were independent, robust to autocorrelation (Newey and West 1987), and to clusters, which are
    the sequences (Liang and Zeger 1986). Without two full windows these give no interval: None.
    """
    misses: list[list[bool]] = [[], [], [], []]
    for run in range(runs):
        trace = draw_trace(sequences, shape, np.random.default_rng([sequences, run]))
        judgement = audit_blocks(trace)
        misses[0].append(misses_zero(judgement.whole["imbalance"].change))
        before, after = (
            compute_imbalances(each.replayed) for each in (judgement.before, judgement.after)
        )
        number = len(before)
        if number < 2:
            continue
        value = after.mean() / before.mean() - 1
        difference = (after - after.mean() / before.mean() * before) / before.mean()
        products = np.outer(difference, difference) / number / (number - 1)
        # Bartlett's weights, up to the lag that Newey and West (1994) advise.
        lags = math.floor(4 * (number / 100) ** (2 / 9))
        lag = np.abs(np.subtract.outer(np.arange(number), np.arange(number)))
        robust = float((products * np.maximum(1 - lag / (lags + 1), 0)).sum())
        sequence = np.asarray(trace.sequence)[: number * WINDOW].reshape(number, WINDOW)
        labels = np.unique(sequence)
        # The share that every sequence has of every window [W,S].
        share = (sequence[:, :, None] == labels).mean(axis=1)
        clusters = len(labels)
        of_clusters = ((difference @ share) ** 2).sum() / number**2
        of_clusters *= clusters / max(clusters - 1, 1)
        errors = [
            (np.trace(products), number),
            (max(robust, 0.0), number),
            (of_clusters, clusters),
        ]
        for kind, (variance, units) in enumerate(errors, start=1):
            spread = Spread(value, math.sqrt(variance), max(units - 1, 1), units)
            misses[kind].append(misses_zero(spread))
    return [float(np.mean(missed)) if missed else None for missed in misses]


def compute_imbalances(replayed: Replayed | None) -> NDArray[np.float64]:
    """Compute the imbalance of every full window of an evaluation's traffic [W]."""
    assert replayed is not None
    [counts] = count_each(replayed.traffic, [replayed.setting])
    table = compute_window_imbalances(counts[None], replayed.setting)
    assert table is not None
    return table.mean(axis=1)[counts[None].is_full_window]


def measure_alarms(
    sequences: int, shape: str, runs: int, *, served_worse: float = 0.0
) -> tuple[float, float, float, float]:
    """Return shares of audits of seven groups: any worse, any behind, either, first one worse."""
    count = np.zeros(4)
    for run in range(runs):
        rng = np.random.default_rng([7, sequences, run])
        trace = draw_trace(sequences, shape, rng, groups=7, served_worse=served_worse)
        answer = audit_blocks(trace)
        worse, behind = answer.worse(), answer.behind()
        first = any(each.group == "0" for each in worse)
        count += [bool(worse), bool(behind), bool(worse or behind), first]
    worse_share, behind_share, either, first_share = (count / runs).tolist()
    return worse_share, behind_share, either, first_share


def measure_verdicts(sequences: int, shape: str, runs: int) -> tuple[float, float]:
    """Return shares of changes that are worth it: by verdict, and by the size of the gain alone."""
    count = np.zeros(2)
    for run in range(runs):
        trace = draw_trace(sequences, shape, np.random.default_rng([2, sequences, run]))
        before, after = (
            mt.evaluate(each, trace, window=WINDOW, mixed=False, threads=1)
            for each in (TURNS, BLOCKS)
        )
        answer = mt.verdict(before, after)
        count += [answer.is_worth_it, answer.gain > answer.price]
    worth_it, by_size = (count / runs).tolist()
    return worth_it, by_size


def _draw_labelled(law: Law, rng: Rng) -> Traffic:
    return law.trace(rng, prompts(rng, 60))


def _draw_unlabelled(law: Law, rng: Rng) -> Traffic:
    return law.trace(rng, np.full(40, 1000), labels=False)


def _draw_grouped(law: Law, rng: Rng) -> Traffic:
    return law.trace(rng, prompts(rng, 84), groups=7)


@dataclass(frozen=True)
class Recorded:
    """A kind of recording: how one is drawn, and fresh traffic of the same law.

    Parameters
    ----------
    draw
        Draws a recording.
    draw_fresh
        Draws as much fresh traffic as tells the truth; by default prompts of their own kinds.
    """

    draw: Callable[[Law, Rng], Traffic]
    draw_fresh: Callable[[Law, Rng], Traffic] = lambda law, rng: law.fresh(rng, 700)


def _of_shares(draw: Callable[[Law, Rng], NDArray[np.float64]]) -> Recorded:
    """Return recordings of windows of such shares, and fresh ones of ten times as many."""

    def draw_fresh(law: Law, rng: Rng) -> Traffic:
        return draw_table(rng, np.concatenate([draw(law, rng) for _ in range(10)]))

    return Recorded(lambda law, rng: draw_table(rng, draw(law, rng)), draw_fresh)


def _draw_in_groups(law: Law, rng: Rng) -> Traffic:
    return draw_table(rng, _draw_walks(law, rng), np.arange(80) // 8)


def _draw_walks(law: Law, rng: Rng) -> NDArray[np.float64]:
    return np.concatenate([law.walk(rng, 8, 0.4) for _ in range(10)])


def _of_documents(number: int, questions: int, size: int, before: int = 0) -> Recorded:
    """Return recordings of questions on documents, and fresh ones on other documents."""
    return Recorded(
        lambda law, rng: law.documents(rng, number, questions, size, before=before),
        lambda law, rng: law.documents(rng, 300, 1, size, before=before),
    )


# Shards of a recording that is counted, sequences of each, and the tokens that counts keep: a
# quarter of all. Fresh shards are so many that what they leave open is small beside an interval.
SHARDS, IN_SHARD, SAMPLE, FRESH_SHARDS = 8, 180, 1 << 16, 40


def _draw_shards(law: Law, rng: Rng, number: int, *, together: bool) -> list[mt.RoutingTrace]:
    """Draw shards, whose sequences come one after the other, or are served together."""
    shards = [law.trace(rng, prompts(rng, IN_SHARD)) for _ in range(number)]
    if together:
        shards = [shard.take(draw_mixed_order(shard.sequence, shard.tokens)) for shard in shards]
    return shards


def _of_counts(*, together: bool) -> Recorded:
    """Return recordings whose shards are counted one by one, and fresh shards of the same kind."""

    def draw(law: Law, rng: Rng) -> Traffic:
        shards = _draw_shards(law, rng, SHARDS, together=together)
        return total([mt.count(shard, sample=SAMPLE, threads=1) for shard in shards])

    def draw_fresh(law: Law, rng: Rng) -> Traffic:
        return mt.RoutingTrace.concat(_draw_shards(law, rng, FRESH_SHARDS, together=together))

    return Recorded(draw, draw_fresh)


# Recordings by name.
RECORDINGS: dict[str, Recorded] = {
    "60 sequences": Recorded(_draw_labelled),
    "sequences without labels": Recorded(_draw_unlabelled),
    "60 of 5 kinds": Recorded(lambda law, rng: law.trace(rng, prompts(rng, 60), kinds=5)),
    "60 of 20 kinds": Recorded(lambda law, rng: law.trace(rng, prompts(rng, 60), kinds=20)),
    "64 windows": Recorded(lambda law, rng: law.table(rng, 64, 1)),
    "16 topics of 4 windows": Recorded(lambda law, rng: law.table(rng, 16, 4)),
    "8 topics of 8 windows": Recorded(lambda law, rng: law.table(rng, 8, 8)),
    "40 topics of 4 windows": Recorded(lambda law, rng: law.table(rng, 40, 4)),
    "7 groups, one by one": Recorded(_draw_grouped, lambda law, rng: law.fresh(rng, 700, groups=7)),
    "waves": _of_shares(lambda law, rng: law.waves(rng, 160, (20, 80))),
    "slow waves": _of_shares(lambda law, rng: law.waves(rng, 160, (60, 160))),
    "autoregression": _of_shares(lambda law, rng: law.walk(rng, 160, 0.9)),
    "overlapping topics": _of_shares(lambda law, rng: law.overlaps(rng, 160, 10)),
    "10 groups of 8 windows": Recorded(
        _draw_in_groups, _of_shares(lambda law, rng: _draw_walks(law, rng)).draw_fresh
    ),
    "documents": _of_documents(20, 4, 300),
    "documents, a third": _of_documents(20, 4, 90),
    "one system prompt": _of_documents(80, 1, 1, 200),
    "counted, one by one": _of_counts(together=False),
    "counted, served together": _of_counts(together=True),
    "32 steps of 16 counters": Recorded(
        lambda law, rng: law.counters(rng, 16),
        lambda law, rng: law.table(rng, 400, 1, tokens=WINDOW),
    ),
}


def measure_advice(name: str, runs: int, skew: float = 0.0) -> tuple[float, float, float, float]:
    """Return shares of advice: false claims, intervals that hold the truth, trials; and the truth.

    An interval is of the placement that is proposed; one that nothing is concluded from holds
    all. A claim is false if the advice is worth a trial and fresh traffic has less than the price.
    """
    law, recorded = Law(skew), RECORDINGS[name]
    fresh = recorded.draw_fresh(law, np.random.default_rng(1))
    count = np.zeros(4)
    for run in range(runs):
        advice = advised(recorded.draw(law, np.random.default_rng([5, run])), run)
        truth = true_gain(advice.placements, fresh)
        low, high = advice.judged[0].gain.interval or (-np.inf, np.inf)
        claims = advice.answer == "worth a trial"
        count += [claims and truth < advice.settings["price"], low <= truth <= high, claims, truth]
    false, holding, trials, truth = (count / runs).tolist()
    return false, holding, trials, truth


def measure_drift(name: str, runs: int) -> tuple[float, float, float]:
    """Return shares of pairs of recordings of one law: drifted, by chance of a hundredth, told."""
    recorded, count = RECORDINGS[name], np.zeros(3)
    for run in range(runs):
        sides = [recorded.draw(Law(), np.random.default_rng([8, run, side])) for side in (0, 1)]
        with suppress(ValueError):  # too little to tell
            answer = mt.drift(sides[0], sides[1], seed=run)
            count += [answer.is_beyond_chance, answer.chance <= 0.01, 1]
    drifted, seldom, told = (count / runs).tolist()
    return drifted, seldom, told


def measure_certainty(name: str, runs: int) -> tuple[float, float]:
    """Return shares of verdicts and of audits that are certain, of equally good placements."""
    recorded, count = RECORDINGS[name], np.zeros(2)
    for run in range(runs):
        rng = np.random.default_rng([6, run])
        traffic, (one, other) = recorded.draw(Law(), rng), (placed(rng), placed(rng))
        before, after = (
            mt.evaluate(each, traffic, window=LONG, mixed=False, threads=1) for each in (one, other)
        )
        answer = mt.verdict(before, after).answer
        audit = mt.audit(other, traffic, baseline=one, window=LONG, threads=1)
        change = audit.whole["imbalance"].change
        assert change is not None
        ends = (change.low or 0.0, change.high or 0.0)
        is_sure = not audit.too_few.get("all") and (ends[0] > 0 or ends[1] < 0)
        count += [answer not in ("no evidence", "too few"), is_sure]
    by_verdict, by_audit = (count / runs).tolist()
    return by_verdict, by_audit


def measure_compare(name: str, runs: int, *, splits: int = 3) -> tuple[float, float]:
    """Return shares of comparisons: sure that eplb differs from blocks, and all splits agree."""
    recorded, count = RECORDINGS[name], np.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        file, written = Path(folder) / "traffic.safetensors", Path(folder) / "found.json"
        for run in range(runs):
            traffic = recorded.draw(Law(), np.random.default_rng([7, run]))
            traffic.save(file)
            options = f"--devices {FEW} --objective balance --methods contiguous,eplb --threads 1"
            options += f" --baseline contiguous --splits {splits} --seed {run} --json {written}"
            options += f" --window {LONG}" * isinstance(traffic, mt.RoutingTrace)
            CliRunner().invoke(command_line, ["compare", str(file), *options.split()])
            gain = json.loads(written.read_text())["methods"]["eplb"]["gain"]
            low, high = gain["interval"] or (-1, 1)
            count += [low > 0 or high < 0, min(gain["splits"]) > 0 or max(gain["splits"]) < 0]
    sure, agreed = (count / runs).tolist()
    return sure, agreed


def print_claims(report: Report, advices_of_each: int) -> None:
    """Print what advice, verdict, audit and compare claim, by recording."""
    table = report.table(
        f"Of {advices_of_each} advices and of as many pairs of equally good placements, percent",
        "recording <26s",
        "advice: false 14.1f",
        "interval holds 15.1f",
        "gain found 11.1f",
        "of a gain of 13.1f",
        "certain by verdict 19.1f",
        "by audit 9.1f",
        "by compare 11.1f",
        "splits agree 13.1f",
        "drift <= 1 % 14.1f",
        "of told 9.1f",
    )
    for name in RECORDINGS:
        false, holding, _, _ = measure_advice(name, advices_of_each)
        *_, power, gain = measure_advice(name, advices_of_each, 1.0)
        others = (
            *measure_certainty(name, advices_of_each),
            *measure_compare(name, advices_of_each),
            *measure_drift(name, advices_of_each)[1:],
        )
        table(name, *(100 * share for share in (false, holding, power, gain, *others)))


def print_audits(report: Report, runs: int, audits: int) -> None:
    """Print what audits claim, by shape and number of sequences."""
    table = report.table(
        f"Intervals of 95 % that miss, percent of {runs} null audits",
        "shape <18s",
        "sequences 10d",
        *(f"{name} {max(len(name), 9) + 1}.1f" for name in MEASURES),
    )
    for shape in SHAPES:
        for sequences in (3, 5, 10, 20, 50):
            table(shape, sequences, *(100 * measure_misses(sequences, shape, runs)))
    table = report.table(
        f"Intervals of the imbalance that miss, percent of {runs} null audits, by their errors",
        "shape <18s",
        "sequences 10d",
        "halves 7.1f",
        "windows 8.1f",
        "autocorrelated 15.1f",
        "clusters 9.1f",
    )
    for shape in SHAPES:
        for sequences in (5, 10, 20, 50):
            shares = measure_window_misses(sequences, shape, runs)
            cells = ["none" if share is None else 100 * share for share in shares]
            table(shape, sequences, *cells)
    table = report.table(
        f"Groups that {audits} null audits of seven name, percent of audits",
        "shape <18s",
        "sequences 10d",
        "worse 7.1f",
        "behind 7.1f",
        "either 7.1f",
    )
    for shape in ("one window each", "crossing windows", "many in a window"):
        for sequences in (1, 3, 5, 10, 20):
            *shares, _ = measure_alarms(sequences, shape, audits)
            table(shape, sequences, *(100 * share for share in shares))
    table = report.table(
        f"The one group of seven that is served worse, named by so many percent of {audits} audits",
        "change, % 10.1f",
        "sequences 10d",
        "named 7.1f",
    )
    for liking in (0.5, 1.0):
        rng = np.random.default_rng(0)
        large = draw_trace(100, "crossing windows", rng, groups=7, served_worse=liking)
        change = audit_blocks(large).groups["0"]["imbalance"].change
        assert change is not None
        for sequences in (5, 10, 20):
            share = measure_alarms(sequences, "crossing windows", audits, served_worse=liking)[3]
            table(100 * change.value, sequences, 100 * share)


def main() -> None:
    """Print the tables."""
    with benchmark(__doc__, runs=150, audits=60, advices=40) as (options, report):
        print_claims(report, options.advices)
        print_audits(report, options.runs, options.audits)
        table = report.table(
            f"Of {options.runs} changes between equal placements, percent that are worth it",
            "sequences 10d",
            "by verdict 11.1f",
            "by size 8.1f",
        )
        for sequences in (3, 5, 10, 20, 50):
            shares = measure_verdicts(sequences, "crossing windows", options.runs)
            table(sequences, *(100 * share for share in shares))


if __name__ == "__main__":
    main()
