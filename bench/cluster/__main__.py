"""The paper's table on an emulated cluster: what placements save, measured and predicted.

    python bench/cluster [--recorded TRACE.npz] [--links 0 2000 1000 500 200] [--quick]

Ranks are processes in network namespaces: two nodes of two ranks, fast links inside a node, and a
port of its own for each rank to the other node, shaped to so many Mbit/s and direction. They talk
gloo. `dispatch` is `moetuner.torch.ExpertParallelMoE`: a token goes to every device of its experts
and back. `follow` is the paper's setting: one expert a layer, and a token's state stays where that
was. Routing is replayed: placements are computed from one half of the sequences, and run on the
other. Results are compared with those of one process before anything is timed.

Times are of all ranks' stamps on one clock. Processing tail: the slowest rank's experts. All-to-all
tail and mean: from when the last rank has come until the slowest has left, or ranks on average.
Layer: from when the last rank has done the layer before. They are means over layers and steps, in
ms, but for p95 and p99; a step is all layers, with quartiles in brackets. Placements take turns.
Shares that are saved are of medians over steps, so that hiccups of the machine do not count. A cost
model is fitted to a few seen steps of the contiguous placement, and `evaluate` predicts from the
seen half alone, step by step: "saved" is the time less than with contiguous, "predicted" what
`evaluate` said, and "off" the ratio to contiguous predicted over that measured.

What this says: which part of a time a placement saves, where links and experts take times in a
given ratio, with real exchanges, real waiting for the slowest, and real routing. What it does not:
times of GPUs, kernels or NICs; ranks are as fast as a part of a core (`worker.py` says how), rows
are small, latency is that of processes on a few cores, and a port never meets other traffic. So a
cluster is found by its ratio of all-to-all to processing, not by its Mbit/s; the table of machines
has ratios that presets predict (the experts are DeepSeek-V3's if the trace's model is not known).
Without root, or without ip and tc, bytes are counted over loopback, and nothing is timed.

Wanted: ratios predicted within 10 %, and a step of the joint method faster by more than the paper's
17.5 % at some link. The paper (arXiv 2502.06643) compares with contiguous, on one node and on
several.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from network import Network, cluster, remove_leftovers, why_not
from numpy.typing import NDArray
from ranks import Fit, Floats, Ranks, Times, Work, ranks_in, typical

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Report, benchmark, spread
from instances import bundled

import moetuner as mt
from moetuner.cost import cost_model_of
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.presets import GPUS, MACHINES

METHODS = {"contiguous": "contiguous", "EPLB": "eplb", "paper": "paper", "joint": "joint"}
# What the paper saved, in %: on one node, and on several.
PAPER = {"processing tail": (36, 27), "all-to-all tail": (36.3, 30.5), "step": (9.3, 17.5)}
NODES, RANKS = 2, 4
HIDDEN, INNER = 512, 32


@dataclass(frozen=True)
class Outcome:
    """What was measured and predicted at one link.

    Parameters
    ----------
    megabits
        Of the link; 0 where it is not shaped.
    placements
        By name, the contiguous one first.
    times
        Measured on unseen steps.
    predicted
        Milliseconds of a layer [P], from the seen half.
    megabytes
        Sent to other nodes in a step [P].
    late
        Share of the experts' calls that could not keep their pace.
    """

    megabits: int
    placements: dict[str, mt.Placement]
    times: Times
    predicted: Floats
    megabytes: Floats
    late: float

    @property
    def measured_saved(self) -> Floats:
        """Share of the time that is less than with contiguous [P], in %."""
        layer = typical(self.times.layer)
        return 100 * (1 - layer / layer[0])

    @property
    def predicted_saved(self) -> Floats:
        """The same as predicted [P]."""
        return 100 * (1 - self.predicted / self.predicted[0])

    @property
    def off(self) -> Floats:
        """Ratio to contiguous predicted over that measured, less one [P], in %."""
        return 100 * ((100 - self.predicted_saved) / (100 - self.measured_saved) - 1)


def solved(work: Work, topology: mt.Topology, model: mt.CostModel) -> dict[str, mt.Placement]:
    """Compute all placements from the seen half, for a machine and its cost model."""
    rules: dict[str, Any] = {"regime": work.regime, "objective": "time", "cost_model": model}
    problem = mt.Problem(work.seen, topology, phases={work.tokens: 1.0}, **rules)
    return {name: mt.solve(problem, method).placement for name, method in METHODS.items()}


def predict(work: Work, placements: dict[str, mt.Placement], fit: Fit) -> Floats:
    """Predict milliseconds of a layer under all placements [P], from the seen half alone."""
    options: dict[str, Any] = {"cost_model": fit.cost_model, "regime": work.regime, "mixed": False}
    if work.regime == "dispatch":
        options["home"] = np.arange(work.tokens) % RANKS
    count = work.seen.tokens // work.tokens
    steps = [work.trace(ids) for ids in work.steps(work.seen, work.tokens, count)]
    each = [
        [
            mt.evaluate(placement, step, fit.topology, window=None, **options)
            for placement in placements.values()
        ]
        for step in steps
    ]
    return (
        typical(
            np.array([[evaluation.predicted_us_per_layer for evaluation in row] for row in each])
        )
        / 1e3
    )


def megabytes(
    work: Work, answers: list[dict[str, Any]], placements: list[mt.Placement], steps: NDArray[Any]
) -> Floats:
    """Return what was sent to other nodes in a step [P], after a check of all that was sent."""
    sent = np.stack([answer["sent"] for answer in answers], axis=2)
    out, back = work.row_bytes
    for number, placement in enumerate(placements):
        rows = work.rows(placement, steps).sum(axis=1)
        expected = rows * out + rows.transpose(0, 2, 1) * back
        if not np.array_equal(sent[:, number], expected):
            raise RuntimeError(f"sent {sent[:, number].sum()} bytes, expected {expected.sum()}")
    node = np.arange(sent.shape[2]) // (sent.shape[2] // NODES)
    return (sent * (node[:, None] != node)).sum(axis=(2, 3)).mean(axis=0) / 1e6


def study(ranks: Ranks, work: Work, asked: Any, report: Report) -> list[Outcome]:
    """Measure and predict at every link, and print how the gain depends on it."""
    steps = work.steps(work.unseen, work.tokens, asked.steps)
    columns = [f"{name}, predicted 17s" for name in list(METHODS)[1:]]
    table = report.table(
        f"{work.name}, {work.regime}: % of a step saved, by link",
        "Mbit/s <7s",
        "fitted, MB/s 12.1f",
        "all-to-all / processing 23.2f",
        "contiguous, ms 14.1f",
        *columns,
    )
    outcomes: list[Outcome] = []
    slots = np.arange(work.seen.num_experts).reshape(1, RANKS, -1)
    contiguous = mt.Placement(slots.repeat(work.seen.layers, axis=0))
    ranks.network.shape(0)
    inside = Fit.of(ranks, work, contiguous, None, asked.fitted).ms_per_byte
    for megabits in asked.links:
        ranks.network.shape(megabits)
        fit = Fit.of(ranks, work, contiguous, inside, asked.fitted)
        placements = solved(work, fit.topology, fit.cost_model)
        each = list(placements.values())
        answers = ranks.replay(work, steps, each, check=not outcomes)
        outcome = Outcome(
            megabits,
            placements,
            Times.of(answers),
            predict(work, placements, fit),
            megabytes(work, answers, each, steps),
            float(np.mean([answer["late"] for answer in answers])),
        )
        parts = (outcome.times.exchange, outcome.times.processing, outcome.times.layer)
        exchange, processing, layer = (typical(part)[0] for part in parts)
        pairs = zip(outcome.measured_saved[1:], outcome.predicted_saved[1:], strict=True)
        cells = [f"{saved:.1f}, {predicted:.1f}" for saved, predicted in pairs]
        rate = fit.topology.inter_node_bandwidth / 1e6
        table(link(megabits), rate, exchange / processing, layer * work.seen.layers, *cells)
        outcomes.append(outcome)
    return outcomes


def link(megabits: int) -> str:
    """Write a link's speed."""
    return f"{megabits}" if megabits else "as is"


def details(work: Work, outcome: Outcome, report: Report) -> None:
    """Print where the time of every placement goes at one link."""
    table = report.table(
        f"{work.name}, {work.regime}, {link(outcome.megabits)} Mbit/s: "
        "ms of a layer, and of a step",
        "placement <11s",
        "processing tail 15.2f",
        "all-to-all tail 15.2f",
        "mean 6.2f",
        "layer 6.2f",
        "p95 6.2f",
        "p99 6.2f",
        "step <24s",
        "MB between nodes 16.2f",
        "saved, % 8.1f",
        "predicted 9.1f",
        "off, % 6.1f",
    )
    times = outcome.times
    parts = (times.processing, times.exchange, times.exchange_mean, times.layer)
    means = [part.mean(axis=(0, 2)) for part in parts]
    tails = np.percentile(times.layer, (95, 99), axis=(0, 2))
    saved = (outcome.measured_saved, outcome.predicted_saved, outcome.off)
    for number, name in enumerate(outcome.placements):
        step = spread(times.layer[:, number].sum(axis=-1))
        before, after = ([row[number] for row in rows] for rows in ((*means, *tails), saved))
        table(name, *before, step, outcome.megabytes[number], *after)


def rows_of_pairs(ranks: Ranks, work: Work, outcome: Outcome, asked: Any, report: Report) -> None:
    """Print what a row for each expert, in place of each device, adds to a step."""
    ranks.network.shape(outcome.megabits)
    placements = {name: outcome.placements[name] for name in ("contiguous", "joint")}
    steps = work.steps(work.unseen, work.tokens, asked.steps)
    regimes, each = ["dispatch", "pairs"], list(placements.values())
    answers = ranks.replay(work, steps, each, regimes=regimes, check=True)
    sent = sum(answer["sent"].sum(axis=2).mean(axis=0) for answer in answers) / 1e6
    step = typical(Times.of(answers).layer) * work.seen.layers
    table = report.table(
        f"{work.name}, {link(outcome.megabits)} Mbit/s: a row for each device or expert of a token",
        "placement <11s",
        "device, ms 10.1f",
        "MB 6.2f",
        "expert, ms 10.1f",
        "MB 6.2f",
    )
    for number, name in enumerate(placements):
        other = number + len(placements)
        table(name, step[number], sent[number], step[other], sent[other])


def papers_table(rows: list[tuple[Work, Outcome]], report: Report) -> None:
    """Print the paper's table: its figures, and ours of the joint method and of its own one."""
    wholes = {"processing tail": "processing", "all-to-all tail": "exchange", "step": "layer"}
    table = report.table(
        "The paper's table: % less than with contiguous",
        "work <37s",
        "method <6s",
        *(f"{name} 15.1f" for name in PAPER),
    )
    for number, where in enumerate(("one node", "several nodes")):
        table(f"the paper's, {where}", "paper", *(figures[number] for figures in PAPER.values()))
    for work, outcome in rows:
        for number, method in enumerate(outcome.placements):
            if method in ("paper", "joint"):
                parts = (typical(getattr(outcome.times, name)) for name in wholes.values())
                saved = [100 * (1 - part[number] / part[0]) for part in parts]
                table(f"{work.name}, {work.regime}, {link(outcome.megabits)}", method, *saved)


def machines(work: Work, report: Report) -> None:
    """Print where real machines are on the curve, as presets predict it for this model."""
    sizes = (512, 8192)
    table = report.table(
        f"{work.name}, contiguous on two nodes of GPUs: all-to-all / processing, by presets",
        "machine <18s",
        *(f"{tokens} tokens a step 19.2f" for tokens in sizes),
    )
    for name, machine in MACHINES.items():
        gpu, devices = name.split("-")[0], 2 * machine.devices_per_node
        if gpu not in GPUS or work.seen.num_experts % devices:
            continue
        slots = np.arange(work.seen.num_experts).reshape(1, devices, -1)
        placement = mt.Placement(slots.repeat(work.seen.layers, axis=0))
        model = cost_model_of(work.seen, gpu)
        no_bytes = replace(model, token_bytes=0.0, combine_bytes=0.0)
        latency = {"intra_node_latency": 0.0, "inter_node_latency": 0.0}
        at_once = mt.Topology.preset(name, nodes=2, **latency)
        ratios = []
        for tokens in sizes:
            options: dict[str, Any] = {"window": tokens, "mixed": False}
            processing, complete = (
                mt.evaluate(
                    placement, work.seen, on, cost_model=model_used, **options
                ).predicted_layer_us
                for on, model_used in (
                    (at_once, no_bytes),
                    (mt.Topology.preset(name, nodes=2), model),
                )
            )
            ratios.append(complete / processing - 1)
        table(name, *ratios)


def conclude(all_of: list[tuple[Work, Outcome]], late: float, report: Report) -> None:
    """Say what was wanted, and what came."""
    every = [(abs(off), work, outcome) for work, outcome in all_of for off in outcome.off[1:]]
    within = [off <= 10 for off, _, _ in every]
    shaped = [
        is_near for is_near, (_, _, outcome) in zip(within, every, strict=True) if outcome.megabits
    ]
    worst, work, outcome = max(every, key=lambda each: each[0])
    report.say(
        f"Of {len(every)} ratios to contiguous, {sum(within)} are predicted within 10 %; where "
        f"links are shaped, {sum(shaped)} of {len(shaped)}. The median is "
        f"{np.median([off for off, _, _ in every]):.1f} % off, the worst {worst:.1f} % "
        f"({work.name}, {work.regime}, {link(outcome.megabits)})."
    )
    work, outcome = max(all_of, key=lambda each: each[1].measured_saved[-1])
    report.say(
        f"Joint saves at most {outcome.measured_saved[-1]:.1f} % of a step ({work.name}, "
        f"{work.regime}, {link(outcome.megabits)} Mbit/s); the paper's is {PAPER['step'][1]} % on "
        "several nodes."
    )
    report.say(
        f"{100 * late:.1f} % of the experts' calls took longer than their pace, since other "
        "processes had the cores."
    )


def counted(ranks: Ranks, work: Work, asked: Any, report: Report) -> None:
    """Print bytes over loopback, where links cannot be shaped."""
    topology = mt.Topology(RANKS, RANKS // NODES, inter_node_bandwidth=50e6)
    out, back = work.row_bytes
    placements = solved(work, topology, mt.CostModel(0, 0, 1e3, 10, out, combine_bytes=back))
    steps, each = work.steps(work.unseen, work.tokens, asked.steps), list(placements.values())
    answers = ranks.replay(work, steps, each, check=True)
    between = megabytes(work, answers, each, steps)
    table = report.table(
        f"{work.name}, {work.regime}: MB of a step",
        "placement <11s",
        "between nodes 13.2f",
        "of contiguous, % 15.1f",
    )
    for name, size in zip(placements, between, strict=True):
        table(name, size, 100 * size / between[0])


def works_of(asked: Any, report: Report) -> list[Work]:
    """Return what to run: the bundled model's layers, and recorded ones if they are here."""
    named: dict[str, Any] = {"bundled": bundled().traffic}
    if asked.quick:
        named["bundled"] = named["bundled"].select(layers=range(2))
    elif asked.recorded.is_file():
        trace = mt.RoutingTrace.load(asked.recorded)
        named[trace.model or asked.recorded.stem] = trace
    else:
        report.say(f"No {asked.recorded}: --recorded names a trace to replay beside the bundled.")
    works = []
    for name, trace in named.items():
        shape = f"{name} {trace.layers} x {trace.num_experts}"
        for regime in ("dispatch", "follow"):
            if regime == "follow":
                first = trace.expert_ids[:, :, :1]
                labels = {
                    label: getattr(trace, label) for label in ("sequence", "group", "group_names")
                }
                trace = mt.RoutingTrace.from_arrays(first, num_experts=trace.num_experts, **labels)
            seen, unseen = hold_out(trace, 0.5)
            tokens = asked.visits // trace.top_k
            works.append(Work(shape, regime, seen, unseen, tokens, HIDDEN, INNER))
    return works


def main() -> None:
    """Run all works at all links."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    remove_leftovers()
    options = {"recorded": Path("../shared/data/gpt-oss-20b.npz"), "quick": False}
    sizes = {"links": [0, 2000, 1000, 500, 200], "link": 500, "visits": 4096, "steps": 4}
    with benchmark(__doc__, **options, **sizes, fitted=4) as (asked, report):
        if asked.quick:
            asked.links, asked.link, asked.visits, asked.steps = [200], 200, 1024, 2
        works = works_of(asked, report)
        reason = why_not()
        if reason is not None:
            report.say(f"Bytes are counted over loopback and nothing is timed: {reason}.")
            with ranks_in(Network(NODES, RANKS // NODES)) as ranks:
                for work in works:
                    counted(ranks, work, asked, report)
            return
        with cluster(NODES, RANKS // NODES) as network, ranks_in(network) as ranks:
            measure(ranks, works, asked, report)


def measure(ranks: Ranks, works: list[Work], asked: Any, report: Report) -> None:
    """Run all works at all links, and print every table."""
    all_of, in_table = [], []
    for work in works:
        outcomes = study(ranks, work, asked, report)
        for outcome in outcomes:
            if outcome.megabits == asked.link:
                details(work, outcome, report)
                if work.regime == "dispatch":
                    rows_of_pairs(ranks, work, outcome, asked, report)
            if outcome.megabits in (0, asked.link):
                in_table.append((work, outcome))
        all_of += [(work, outcome) for outcome in outcomes]
    machines(next(work for work in reversed(works) if work.regime == "dispatch"), report)
    papers_table(in_table, report)
    conclude(all_of, float(np.mean([outcome.late for _, outcome in all_of])), report)


if __name__ == "__main__":
    main()
