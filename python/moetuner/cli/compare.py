"""``moetuner compare``: several methods on the same traffic, judged on what they have not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.inputs import Traffic, count, describe, facts, read, window_of
from moetuner.cli.output import Output, number, percent
from moetuner.cli.progress import working
from moetuner.evaluation import Evaluation, evaluate
from moetuner.holdout import hold_out
from moetuner.problem import Problem
from moetuner.solver import METHODS, caps, solve
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

DEFAULT_METHODS = "contiguous,lpt,eplb,moetuner,joint"
HEAD = (
    "method",
    "imbalance",
    "mixed",
    "total",
    "crossing",
    "fanout",
    "objective",
    "gap",
    "seconds",
)


@dataclass(frozen=True)
class Outcome:
    """What one method found on the traffic it saw, and what that does to the traffic it did not."""

    result: Result
    evaluation: Evaluation
    has_objective: bool

    def to_dict(self) -> dict[str, Any]:
        """Fields of the evaluation and of the result."""
        return {
            **self.evaluation.to_dict(),
            "objective": self.result.objective if self.has_objective else None,
            "bound": self.result.bound if self.has_objective else None,
            "bound_source": self.result.bound_source,
            "gap": self.result.gap if self.has_objective else None,
            "status": self.result.status,
            "solve_seconds": self.result.seconds,
            "details": self.result.details,
        }

    def row(self) -> tuple[str, ...]:
        """Give the cells of a table under ``HEAD``."""
        known = self.has_objective
        return (
            self.result.method,
            number(self.evaluation.imbalance, 3),
            number(self.evaluation.imbalance_mixed, 3),
            number(self.evaluation.imbalance_total, 3),
            number(self.evaluation.crossing, 4),
            number(self.evaluation.fanout, 3),
            number(self.result.objective if known else None, 4),
            percent(self.result.gap if known else None),
            number(self.result.seconds, 2),
        )


def try_method(
    method: str,
    problem: Problem,
    judged_on: Traffic,
    *,
    window: int | None,
    seed: int,
    time_limit: float | None = None,
    threads: int | None = None,
) -> Outcome:
    """Solve, and evaluate the placement on other traffic."""
    with working(f"solving, {method}") as progress:
        result = solve(
            problem,
            method,
            seed=seed,
            time_limit=time_limit,
            threads=threads,
            progress=progress,
        )
        evaluation = evaluate(
            result.placement, judged_on, problem.topology, window=window, threads=threads
        )
    return Outcome(result, evaluation, has_pairs(problem))


def has_pairs(problem: Problem) -> bool:
    """Whether the statistics have the pairs that the regime is about."""
    statistics = problem.statistics
    pairs = statistics.transitions if problem.regime == "follow" else statistics.coactivation
    return pairs is not None


def remarks(outcomes: list[Outcome], problem: Problem) -> list[str]:
    """Say what a reader of the table must know."""
    lines = []
    if not has_pairs(problem):
        wanted = "transitions" if problem.regime == "follow" else "co-activation"
        lines.append(f"INPUT has no {wanted}: methods could only balance the load.")
    for outcome in outcomes:
        told = caps.remarks(problem, outcome.result.details)
        lines.extend(f"{outcome.result.method}: {line}" for line in told)
        if outcome.result.status in ("interrupted", "time_limit"):
            lines.append(f"{outcome.result.method}: {outcome.result.status}, best so far.")
    return lines


def parse_methods(
    context: click.Context, parameter: click.Parameter, value: str
) -> tuple[str, ...]:
    """Split a list of methods; each is tried once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise click.BadParameter(
            f"must be some of {','.join(METHODS)}, got {unknown[0] if unknown else value!r}"
        )
    return names


@click.command("compare")
@options.input_options
@options.problem_options
@click.option(
    "--holdout",
    type=options.Number(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of the sequences (of a load table: windows) that methods do not see and are judged "
    "on; 0 judges on what they saw.",
)
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    callback=parse_methods,
    metavar="A,B,C",
    help=f"Out of {', '.join(METHODS)}.",
)
@options.seed_option
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
    holdout: float,
    methods: tuple[str, ...],
    seed: int,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compare methods on traffic that they have not seen.

    imbalance: max / mean device load, averaged over layers and windows in the order of INPUT;
    mixed: of windows in which sequences are served together; total: of the sum of all windows;
    crossing: share of transitions between devices; fanout: devices that a token visits in a layer.
    objective and gap are the solver's, on what it
    saw: the crossing (in regime dispatch: co-activations apart) weighed by the cost of links.
    """
    topology = options.topology_of(devices, devices_per_node, machine)
    traffic = read(input_file, window=window, num_experts=num_experts)
    seen, unseen = hold_out(traffic, holdout, seed=seed)
    window = window_of(traffic, window)
    statistics = count(seen, window, threads, sets=regime == "dispatch")
    problem = Problem(statistics, topology, slots_per_device, regime, max_imbalance)

    output = Output(json_file)
    output.say(describe(input_file, traffic))
    output.say(_setting(problem, window, holdout, unseen))
    output.say()
    outcomes: list[Outcome] = []
    for method in methods:
        outcomes.append(
            try_method(
                method,
                problem,
                unseen,
                window=None if isinstance(unseen, RoutingStatistics) else window,
                seed=seed,
                time_limit=time_limit,
                threads=threads,
            )
        )
        if outcomes[-1].result.status == "interrupted":
            break
    output.table(HEAD, [outcome.row() for outcome in outcomes])
    for line in remarks(outcomes, problem):
        output.say(line)
    output.finish(
        {
            "input": facts(input_file, traffic),
            "settings": {
                **settings(problem, window, seed, time_limit),
                "holdout": holdout,
                "threads": threads,
            },
            "methods": {outcome.result.method: outcome.to_dict() for outcome in outcomes},
        }
    )


def settings(
    problem: Problem, window: int | None, seed: int, time_limit: float | None
) -> dict[str, Any]:
    """Give what was asked for, for JSON."""
    topology: Topology = problem.topology
    return {
        "devices": topology.devices,
        "devices_per_node": topology.devices_per_node,
        "topology": topology.name,
        "slots_per_device": problem.slots_per_device,
        "regime": problem.regime,
        "max_imbalance": problem.max_imbalance,
        "window": window,
        "seed": seed,
        "time_limit": time_limit,
    }


def _setting(problem: Problem, window: int | None, holdout: float, unseen: Traffic) -> str:
    machine = f"{problem.devices} devices x {problem.slots} slots"
    if problem.topology.nodes > 1:
        machine += f" in {problem.topology.nodes} nodes"
    cap = f"load cap {problem.max_imbalance:g}"
    windows = f", windows of {window} tokens" if window else ""
    if holdout == 0:
        judged = "judged on the same traffic"
    elif isinstance(unseen, RoutingTrace):
        judged = f"judged on {unseen.tokens:,} unseen tokens"
    else:
        judged = f"judged on {unseen.windows:,} unseen windows"
    return f"{machine}, {problem.regime}, {cap}{windows}, {judged}"
