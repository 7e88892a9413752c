"""``moetuner evaluate``: replay a placement on traffic."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner import _checks
from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.serving import Serving, serving_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output, working
from moetuner.evaluation import Evaluation, evaluate
from moetuner.evaluation.arrival import WINDOWS_MIXED, at_once
from moetuner.files import text
from moetuner.report.cells import counted, number
from moetuner.report.outcome import whose_times
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

HEAD = ("traffic", "tokens", "imbalance", "mixed", "total", "worst", "crossing", "fanout", "nodes")
TIMES = ("layer, us", "mean", "p50", "p95", "p99")


@click.command("evaluate")
@click.argument("placement_file", metavar="PLACEMENT", type=options.IN_FILE)
@traffic_options
@machine_options
@serving_options
@click.option(
    "--mixed-seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the order in which sequences, or windows of statistics, are mixed.",
)
@options.json_option
def command(
    placement_file: Path,
    source: Source,
    machine: Machine,
    serving: Serving,
    mixed_seed: int,
    json_file: Path | None,
) -> None:
    """Replay a placement token by token, with its groups.

    imbalance: max / mean device load, averaged over layers and windows as they arrive (--arrival);
    mixed: of windows in which sequences are served together, the more the more INPUT has, so that
    inputs of different size do not compare; total: of the sum of all windows; worst: of any layer
    and window; crossing: share of transitions between devices; fanout, nodes: devices and nodes
    that a token visits in a layer; layer us: predicted time of a layer, and what 50, 95 and 99
    percent of layers and windows do not exceed.
    """
    placement = source.load(placement_file)
    topology = machine.topology(placement.devices)
    traffic, window = source.traffic, source.counted
    how = serving.arguments(traffic)
    with working("replaying"):
        found = evaluate(
            placement,
            traffic,
            topology,
            window=source.replayed,
            **how,
            mixed_seed=mixed_seed,
            threads=source.threads,
        )

    output = Output(json_file)
    output.say(source.describe())
    if serving.engine is not None:
        output.say(serving.explain())
    windows = f", windows of {window} tokens" if window else ""
    output.say(
        f"{text.name(placement_file.name)}: {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}{windows}"
    )
    output.say()
    rows = [("all", found), *found.by_group.items()]
    output.table(HEAD, [_row(name, each) for name, each in rows])
    output.say(_mixed(traffic, mixed_seed))
    output.say()
    output.table(TIMES, [_times(name, each) for name, each in rows])
    output.say(whose_times(how["cost_model"], traffic, how["arrival"]))
    output.say()
    for name, ports in found.busiest_port.items():
        output.say(_ports(name, ports))
    output.finish(
        {
            "input": source.facts(),
            "placement": str(placement_file),
            "settings": {
                **serving.settings(topology, how),
                "window": window,
                "mixed_seed": mixed_seed,
            },
            **found.to_dict(),
        }
    )


def _mixed(traffic: RoutingTrace | RoutingStatistics, seed: int) -> str:
    """Return what a mixed window is made of: other numbers of sequences are other figures."""
    if isinstance(traffic, RoutingStatistics):
        return f"mixed: means of {min(traffic.windows, WINDOWS_MIXED)} windows, seed {seed}"
    if traffic.sequence is None:
        return f"mixed: tokens in random order, as sequences are not known, seed {seed}"
    sequences = _checks.distinct(traffic.sequence).size
    running = min(at_once(sequences), sequences)
    return f"mixed: {running} of {sequences:,} sequences at once, groups fewer, seed {seed}"


def _row(name: str, of: Evaluation) -> tuple[str, ...]:
    return (
        name,
        "-" if of.tokens is None else f"{of.tokens:,}",
        number(of.imbalance, 3),
        number(of.imbalance_mixed, 3),
        number(of.imbalance_total, 3),
        number(of.imbalance_worst, 2),
        number(of.crossing, 4),
        number(of.fanout, 3),
        number(of.node_fanout, 3),
    )


def _times(name: str, of: Evaluation) -> tuple[str, ...]:
    return (
        name,
        number(of.predicted_layer_us, 1),
        number(of.predicted_layer_us_p50, 1),
        number(of.predicted_layer_us_p95, 1),
        number(of.predicted_layer_us_p99, 1),
    )


def _ports(regime: str, ports: dict[str, list[float]]) -> str:
    tiers = ["in a node", "between nodes", *(f"tier {n}" for n in range(3, 1 + len(ports["out"])))]
    parts = [
        f"{tier} {out:,.0f} out, {into:,.0f} in"
        for tier, out, into in zip(tiers, ports["out"], ports["in"], strict=False)
        if out or into
    ]
    return f"busiest port, {regime}, rows of a layer: {'; '.join(parts) or 'none'}"
