"""What audit claims where nothing is the case, and what it finds where something is.

    python bench/chance.py [--runs 150] [--audits 60]

Routing of simulated sequences: each likes experts of its own, more or less, in every layer, and its
tokens follow. No expert is better than another before sequences are drawn, so a placement of
neighbours in blocks and one in turns are equally good in truth: what an audit of one against the
other calls worse is a false alarm, and an interval of the change that does not hold 0 misses.

Prints how often the interval of 95 % misses, by the number of sequences and how they lie in
windows; how often a null audit of seven groups names somebody; how often one group that is served
worse is named; and what verdict says of a change between the two. Seeds are fixed.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

import moetuner as mt

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


def simulated(
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
    (least, most), together = SHAPES[shape]
    number = sequences * groups
    length = np.maximum(np.round(rng.uniform(least, most, number) * WINDOW), 1).astype(int)
    sequence = np.repeat(np.arange(number), length)
    if together:
        sequence = rng.permutation(sequence)
    liking = rng.normal(0, LIKING, (number, LAYERS, EXPERTS))
    liking[:sequences, :, :2] += served_worse
    scores = liking[sequence] + rng.gumbel(size=(len(sequence), LAYERS, EXPERTS))
    ids = np.argpartition(-scores, TOP_K, axis=2)[:, :, :TOP_K]
    group = sequence // sequences if groups > 1 else None
    return mt.RoutingTrace.from_arrays(ids, num_experts=EXPERTS, sequence=sequence, group=group)


def audited(trace: mt.RoutingTrace, seed: int, resamples: int = 1000) -> mt.Audit:
    """Audit blocks against turns."""
    return mt.audit(
        BLOCKS,
        trace,
        baseline=TURNS,
        window=WINDOW,
        cost_model=MODEL,
        resamples=resamples,
        seed=seed,
        threads=1,
    )


def missed(sequences: int, shape: str, runs: int, *, resamples: int = 1000) -> NDArray[np.float64]:
    """Share of null audits whose interval of the change does not hold 0, by measure."""
    count = np.zeros(len(MEASURES))
    for run in range(runs):
        rng = np.random.default_rng([sequences, run])
        found = audited(simulated(sequences, shape, rng), run, resamples).whole
        for place, name in enumerate(MEASURES):
            change = found[name].change
            assert change is not None
            assert change.low is not None
            assert change.high is not None
            count[place] += not change.low <= 0 <= change.high
    return count / runs


def named(
    sequences: int, shape: str, runs: int, *, served_worse: float = 0.0, resamples: int = 1000
) -> tuple[float, float, float, float]:
    """Shares of audits of seven groups: of any worse, any behind, either, and the first worse."""
    count = np.zeros(4)
    for run in range(runs):
        rng = np.random.default_rng([7, sequences, run])
        trace = simulated(sequences, shape, rng, groups=7, served_worse=served_worse)
        found = audited(trace, run, resamples)
        worse, behind = found.worse(), found.behind()
        first = any(each.group == "0" for each in worse)
        count += [bool(worse), bool(behind), bool(worse or behind), first]
    worse_share, behind_share, either, first_share = (count / runs).tolist()
    return worse_share, behind_share, either, first_share


def verdicts(sequences: int, shape: str, runs: int) -> tuple[float, float]:
    """Shares of changes that are worth it, by verdict, and if only the size of the gain counted."""
    count = np.zeros(2)
    for run in range(runs):
        trace = simulated(sequences, shape, np.random.default_rng([2, sequences, run]))
        before, after = (
            mt.evaluate(each, trace, window=WINDOW, mixed=False, threads=1)
            for each in (TURNS, BLOCKS)
        )
        found = mt.verdict(before, after)
        count += [found.is_worth_it, found.gain > found.price]
    worth_it, by_size = (count / runs).tolist()
    return worth_it, by_size


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=150, help="audits for each share of intervals")
    parser.add_argument("--audits", type=int, default=60, help="audits of seven groups for each")
    asked = parser.parse_args()
    runs, audits = asked.runs, asked.audits
    print(f"Intervals of 95 % that miss, in percent of {runs} null audits")
    print("sequences", *MEASURES, sep="  ")
    for shape in SHAPES:
        print(shape)
        for sequences in (3, 5, 10, 20, 50):
            shares = 100 * missed(sequences, shape, runs)
            print(f"{sequences:9}", *(f"{share:9.1f}" for share in shares), flush=True)
    print(f"Of {audits} null audits of seven groups, percent that name: worse, behind, either")
    for shape in ("one window each", "crossing windows", "many in a window"):
        for sequences in (1, 3, 5, 10, 20):
            shares = [100 * share for share in named(sequences, shape, audits)[:3]]
            print(f"{shape:18}{sequences:4}", *(f"{share:6.1f}" for share in shares), flush=True)
    print(f"Of {audits} audits of seven groups, percent that name the one that is served worse")
    for liking in (0.5, 1.0):
        rng = np.random.default_rng(0)
        large = simulated(100, "crossing windows", rng, groups=7, served_worse=liking)
        change = audited(large, 0, 2).groups["0"]["imbalance"].change
        assert change is not None
        for sequences in (5, 10, 20):
            share = named(sequences, "crossing windows", audits, served_worse=liking)[3]
            print(
                f"{100 * change.value:+.1f} %, {sequences:3} sequences {100 * share:6.1f}",
                flush=True,
            )
    print(f"Of {runs} changes between equal placements, percent worth it: by verdict, by size")
    for sequences in (3, 5, 10, 20, 50):
        shares = [100 * share for share in verdicts(sequences, "crossing windows", runs)]
        print(f"{sequences:3} sequences", *(f"{share:6.1f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
