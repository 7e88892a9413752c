"""``moetuner verify``: recompute a bound from its certificate alone."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from moetuner.cli import options
from moetuner.cli.inputs import Source, count, traffic_options
from moetuner.cli.machine import Machine, machine_options
from moetuner.cli.output import Output, percent
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver.bound import verify
from moetuner.solver.certificate import Certificate


@click.command("verify")
@click.argument("certificate_file", metavar="CERTIFICATE", type=options.IN_FILE)
@traffic_options
@machine_options
@click.option(
    "--placement",
    "placement_file",
    type=options.IN_FILE,
    metavar="FILE",
    help="A placement to hold against the bound.",
)
@options.json_option
def command(
    certificate_file: Path,
    source: Source,
    machine: Machine,
    placement_file: Path | None,
    json_file: Path | None,
) -> None:
    """Recompute the lower bound that CERTIFICATE proves for INPUT.

    Nothing of the solver is trusted: the bound follows from INPUT's counts and the certificate's
    numbers, whoever made them. INPUT and --window must be those of the solve.
    """
    certificate = Certificate.load(certificate_file)
    topology = machine.topology()
    statistics = count(source.traffic, source.counted, source.threads)
    problem = Problem(statistics, topology, certificate.slots, regime="follow", objective="traffic")
    cost = verify(certificate, problem)
    bound = cost / problem.cost_scale
    mean = problem.load.sum(axis=1, dtype=np.float64) / problem.devices
    imbalance = float((certificate.caps / np.maximum(mean, 1e-300)).max())

    output = Output(json_file)
    output.say(
        f"Proven: with {certificate.slots} slots per device and no device load above "
        f"{imbalance:.3f} of the mean, no placement has an objective below {bound:.6f}."
    )
    answer: dict[str, object] = {"bound": bound, "cost": cost, "max_imbalance": imbalance}
    if placement_file is not None:
        placement = Placement.load(placement_file)
        objective = problem.cost(placement) / problem.cost_scale
        heaviest = problem.device_load(placement.slots).max(axis=1)
        within = bool((heaviest <= certificate.caps).all())
        gap = max(objective - bound, 0.0) / objective if objective else 0.0
        if within:
            output.say(f"{placement_file}: objective {objective:.6f}, within {percent(gap)}.")
        else:
            output.say(
                f"{placement_file}: objective {objective:.6f}; it exceeds the load that the bound "
                "assumes, so the two cannot be compared."
            )
        answer |= {"objective": objective, "gap": gap if within else None}
    output.finish(answer)
