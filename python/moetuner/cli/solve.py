"""``moetuner solve``: compute a placement and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.compare import HEAD, remarks, settings, try_method
from moetuner.cli.inputs import count, describe, facts, read, window_of
from moetuner.cli.output import Output, percent
from moetuner.problem import Problem
from moetuner.solver import METHODS
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology


@click.command("solve")
@options.input_options
@options.problem_options
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="joint",
    show_default=True,
    help="joint, the paper's two stages (moetuner), the search alone, or a baseline.",
)
@options.seed_option
@click.option(
    "--out",
    "out_file",
    type=options.OutFile(),
    default="placement.json",
    show_default=True,
    metavar="FILE",
    help="Placement to write, as JSON.",
)
@click.option(
    "--certificate",
    "certificate_file",
    type=options.OutFile(),
    metavar="FILE",
    help='Write the proof of the bound, for "moetuner verify".',
)
@options.threads_option
@options.json_option
def command(
    input_file: Path,
    num_experts: int | None,
    devices: int | None,
    devices_per_node: int | None,
    machine: Topology | None,
    slots_per_device: int | None,
    regime: Any,
    max_imbalance: float,
    window: int | None,
    time_limit: float | None,
    method: str,
    seed: int,
    out_file: Path,
    certificate_file: Path | None,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compute a placement for all of INPUT and write it.

    Ctrl-C writes the best placement so far. "moetuner compare" says what to expect on traffic that
    the solver has not seen.
    """
    topology = options.topology_of(devices, devices_per_node, machine)
    traffic = read(input_file, window=window, num_experts=num_experts)
    window = window_of(traffic, window)
    statistics = count(traffic, window, threads, sets=regime == "dispatch")
    problem = Problem(statistics, topology, slots_per_device, regime, max_imbalance)
    judged = None if isinstance(traffic, RoutingStatistics) else window

    output = Output(json_file)
    output.say(describe(input_file, traffic))
    outcome = try_method(
        method,
        problem,
        traffic,
        window=judged,
        seed=seed,
        time_limit=time_limit,
        threads=threads,
    )
    # Written before anything is said about it: a closed pipe must not lose the answer.
    outcome.result.placement.save(out_file)
    output.say()
    outcomes = [outcome]
    if method != "contiguous" and outcome.result.status != "interrupted":
        before = try_method(
            "contiguous", problem, traffic, window=judged, seed=seed, threads=threads
        )
        outcomes.insert(0, before)
    output.table(HEAD, [each.row() for each in outcomes])
    for line in remarks([outcome], problem):
        output.say(line)
    if outcome.has_objective and outcome.result.gap is not None:
        output.say(
            f"No placement under this cap is below {outcome.result.bound:.4f} "
            f"({outcome.result.bound_source}); this one is within {percent(outcome.result.gap)}."
        )
    output.say(f"wrote {out_file}")
    if certificate_file is not None:
        output.say(_prove(outcome.result, certificate_file))
    output.finish(
        {
            "input": facts(input_file, traffic),
            "settings": {**settings(problem, window, seed, time_limit), "threads": threads},
            "placement": str(out_file),
            "method": method,
            **outcome.to_dict(),
        }
    )


def _prove(result: Result, path: Path) -> str:
    """Write the certificate of a bound, and say so."""
    if result.certificate is None:
        source = result.bound_source or "no bound"
        return f"no certificate: {source} has no multipliers to write"
    result.certificate.save(path)
    return f"wrote {path}"
