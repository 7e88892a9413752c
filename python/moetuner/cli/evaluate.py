"""``moetuner evaluate``: replay a placement on traffic."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.inputs import describe, facts, read, window_of
from moetuner.cli.output import Output, number
from moetuner.cli.progress import working
from moetuner.evaluation import Evaluation, evaluate
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

HEAD = ("traffic", "tokens", "imbalance", "total", "worst", "crossing", "fanout", "nodes")


@click.command("evaluate")
@click.argument("placement_file", metavar="PLACEMENT", type=options.IN_FILE)
@options.input_options
@options.node_options
@options.window_option
@options.threads_option
@options.json_option
def command(
    placement_file: Path,
    input_file: Path,
    num_experts: int | None,
    devices_per_node: int | None,
    machine: Topology | None,
    window: int | None,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Replay a placement token by token, for all traffic and for each of its groups.

    imbalance: max / mean device load, averaged over layers and windows; total: of the sum of all
    windows; worst: of any layer and window; crossing: share of transitions between devices;
    fanout, nodes: devices and nodes that a token visits in a layer.
    """
    placement = Placement.load(placement_file)
    devices = placement.devices if machine is None else None
    topology = options.topology_of(devices, devices_per_node, machine)
    traffic = read(input_file, window=window, num_experts=num_experts)
    window = window_of(traffic, window)
    with working("replaying"):
        found = evaluate(
            placement,
            traffic,
            topology,
            window=None if isinstance(traffic, RoutingStatistics) else window,
            threads=threads,
        )

    output = Output(json_file)
    output.say(describe(input_file, traffic))
    windows = f", windows of {window} tokens" if window else ""
    output.say(
        f"{placement_file.name}: {placement.devices} devices x "
        f"{placement.slots_per_device} slots{windows}"
    )
    output.say()
    output.table(
        HEAD, [_row(name, each) for name, each in [("all", found), *found.by_group.items()]]
    )
    output.finish(
        {
            "input": facts(input_file, traffic),
            "placement": str(placement_file),
            "settings": {
                "devices": topology.devices,
                "devices_per_node": topology.devices_per_node,
                "window": window,
            },
            **found.to_dict(),
        }
    )


def _row(name: str, of: Evaluation) -> tuple[str, ...]:
    return (
        name,
        "-" if of.tokens is None else f"{of.tokens:,}",
        number(of.imbalance, 3),
        number(of.imbalance_total, 3),
        number(of.imbalance_worst, 2),
        number(of.crossing, 4),
        number(of.fanout, 3),
        number(of.node_fanout, 3),
    )
