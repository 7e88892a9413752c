"""``moetuner evaluate``: replay a placement on traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moetuner import _checks
from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.serving import Serving
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.evaluation import Evaluation, evaluate
from moetuner.evaluation.arrival import WINDOWS_MIXED, at_once
from moetuner.evaluation.figures import FIGURES, US, explain
from moetuner.files import text
from moetuner.report.cells import counted
from moetuner.report.outcome import whose_times
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

# Times have a table of their own.
TIMES = [name for name, figure in FIGURES.items() if figure.unit == US]
OTHERS = [name for name in FIGURES if name not in TIMES]
HELP = f"""Replay a placement token by token, with its groups.

{explain(*OTHERS, *TIMES)}.
"""


@options.command("evaluate", help=HELP)
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    source: Source,
    machine: Machine,
    serving: Serving,
    mixed_seed: int = option(click.IntRange(0, 2**63 - 1), default=0),
    output: Output,
) -> None:
    """Replay a placement, and print its figures.

    Parameters
    ----------
    mixed_seed
        Of the order in which sequences, or windows of statistics, are mixed.
    """
    placement = source.load(placement_file, devices=machine.given)
    topology = machine.topology(placement.devices)
    traffic, window = source.traffic, source.counted
    how = serving.arguments(traffic)
    seeds = {"mixed_seed": mixed_seed}
    with working("replaying"):
        replay: Any = {"window": source.replayed, "threads": source.threads, **seeds, **how}
        evaluation = evaluate(placement, traffic, topology, **replay)
    output.say(source.describe(), *serving.explain())
    windows = f", windows of {window} tokens" if window else ""
    output.say(
        f"{text.name(placement_file.name)}: {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}{windows}",
        "",
    )
    _table(output, "traffic", OTHERS, evaluation)
    output.say(_mixed(traffic, mixed_seed), "")
    _table(output, "layer, us", TIMES, evaluation)
    output.say(whose_times(how["cost_model"], traffic, how["arrival"]), "")
    output.say(*(_ports(name, ports) for name, ports in evaluation.busiest_port.items()))
    settings = serving.settings(topology, how) | {"window": window, **seeds}
    contents = {"input": source.facts(), "placement": str(placement_file), "settings": settings}
    output.finish(contents | evaluation.to_dict())


def _mixed(traffic: RoutingTrace | RoutingStatistics, seed: int) -> str:
    """Return what a mixed window is made of: other numbers of sequences are other figures."""
    if isinstance(traffic, RoutingStatistics):
        return f"mixed: means of {min(traffic.windows, WINDOWS_MIXED)} windows, seed {seed}"
    if traffic.sequence is None:
        return f"mixed: tokens in random order, as sequences are not known, seed {seed}"
    sequences = _checks.distinct(traffic.sequence).size
    running = min(at_once(sequences), sequences)
    return f"mixed: {running} of {sequences:,} sequences at once, groups fewer, seed {seed}"


def _table(output: Output, title: str, names: list[str], evaluation: Evaluation) -> None:
    """Print figures of all traffic and of groups; times begin with their mean."""
    head = [FIGURES[name].column for name in names]
    head[0] = "mean" if names is TIMES else head[0]
    rows = {"all": evaluation, **evaluation.by_group}
    cells = [
        (group, *(FIGURES[name].text(getattr(of, name)) for name in names))
        for group, of in rows.items()
    ]
    output.table((title, *head), cells)


def _ports(regime: str, ports: dict[str, list[float]]) -> str:
    """Write the rows of the busiest port of every tier that carries any."""
    tiers = ["in a node", "between nodes", *(f"tier {n}" for n in range(3, 1 + len(ports["out"])))]
    parts = [
        f"{tier} {out:,.0f} out, {into:,.0f} in"
        for tier, out, into in zip(tiers, ports["out"], ports["in"], strict=False)
        if out or into
    ]
    return f"busiest port, {regime}, rows of a layer: {'; '.join(parts) or 'none'}"
