"""``moetuner verify``: recompute a bound from its certificate alone."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.traffic import Source, count, traffic_options
from moetuner.cli.output import Output
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.caps import device_load
from moetuner.problem.objective import Objective
from moetuner.report.cells import percent
from moetuner.solver import Certificate, verify

# Sums of visits may be off by this part.
ROUNDING = 1e-12
# Decimals of an imbalance, and imbalances that are told one by one.
DECIMALS, FEW = 4, 6


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
    of_visits = certificate.method == "visits"
    statistics = count(source.traffic, source.counted, source.threads, sets=of_visits)
    topology = machine.topology()
    imbalances = _imbalances(statistics.total_load, topology.devices, certificate)
    # The tightest cap that the certificate covers in every layer; its own caps are said below.
    problem = Problem(
        statistics,
        topology,
        regime=certificate.regime,
        objective="traffic",
        max_imbalance=max(min(imbalances), 1.0),
    )
    cost = verify(certificate, problem, threads=source.threads)
    worth = Objective(problem)
    scale = worth.tokens if of_visits else worth.scale
    bound = cost / scale

    output = Output(json_file)
    proof = "prices or tangents of" if of_visits else "a"
    output.say(
        f"Proven by {proof} {certificate.method}: of {certificate.about}, with "
        f"{certificate.slots} slots per device and no device load above {_told(imbalances)}, no "
        f"placement has an objective below {bound:.6f}."
    )
    answer: dict[str, object] = {
        "bound": bound,
        "cost": cost,
        "scope": certificate.about,
        "method": certificate.method,
        "regime": certificate.regime,
        "max_imbalance": imbalances if len(imbalances) > 1 else imbalances[0],
        "caps": certificate.caps.tolist(),
    }
    if placement_file is not None:
        placement = Placement.load(placement_file)
        _check(placement_file, placement, problem)
        objective = worth.traffic(placement)
        reached = objective * scale * (1 + ROUNDING) if of_visits else worth.cost(placement)
        within = bool(
            (device_load(placement.slots, problem.load) <= certificate.caps[:, None]).all()
            and (placement.slots >= 0).sum(axis=2).max() <= certificate.slots
        )
        if within and reached < cost:
            raise click.ClickException(
                f"{placement_file}: objective {objective:.6f} is below the bound {bound:.6f} that "
                f"{certificate_file} proves, though the placement is one that it is about: one of "
                "the two must be wrong; please report it"
            )
        gap = (objective - bound) / objective if objective and within else 0.0
        if within:
            output.say(f"{placement_file}: objective {objective:.6f}, within {percent(gap)}.")
        else:
            output.say(
                f"{placement_file}: objective {objective:.6f}; it exceeds the load or the slots "
                "that the bound assumes, so the two cannot be compared."
            )
        answer |= {"objective": objective, "gap": gap if within else None}
    output.finish(answer)


def _check(path: Path, placement: Placement, problem: Problem) -> None:
    """Raise unless the bound and a placement are about the same kind of thing."""
    found = (placement.layers, placement.num_experts, placement.devices)
    wanted = (problem.layers, problem.experts, problem.devices)
    if found != wanted:
        raise click.ClickException(
            f"{path}: must have {wanted[0]} layers, {wanted[1]} experts and {wanted[2]} devices "
            f"like INPUT and the machine, got {found[0]}, {found[1]} and {found[2]}"
        )
    if placement.has_copies:
        raise click.ClickException(
            f"{path}: must have one copy of each expert, which the bound is about; it has more"
        )


def _imbalances(load: NDArray[np.uint64], devices: int, certificate: Certificate) -> list[float]:
    """Return caps as imbalances, load over the mean: one if it says them all, else by layer [L].

    A cap is a whole number of tokens, so a range of imbalances says the same; of these a short one
    is told. Whatever is within it keeps the cap. The loads are of layers and experts [L,E].
    """
    total = load.sum(axis=1, dtype=np.uint64).tolist()
    if len(total) != len(certificate.caps):
        return [1.0]  # of another model, which `verify` says
    caps = [min(each) for each in zip(certificate.caps.tolist(), total, strict=True)]
    ranges = [
        (Fraction(cap * devices, load), Fraction((cap + 1) * devices, load))
        for cap, load in zip(caps, total, strict=True)
        if load
    ] or [(Fraction(1), Fraction(2))]
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    if low < high:
        return [_short(low, high)]
    short = iter([_short(*each) for each in ranges])
    return [next(short) if load else 1.0 for load in total]


def _short(low: Fraction, high: Fraction) -> float:
    """Find a short decimal that is at least ``low`` and below ``high``; else one a hair lower."""
    for digits in range(1, DECIMALS + 1):
        found = Fraction(math.ceil(low * 10**digits), 10**digits)
        if found < high:
            return float(found)
    return float(Fraction(math.floor(low * 10**DECIMALS), 10**DECIMALS))


def _told(imbalances: list[float]) -> str:
    """Write imbalances in words: one, or by layer."""
    if len(imbalances) == 1:
        return f"{imbalances[0]:.{DECIMALS}f} of the mean"
    layers: dict[float, list[int]] = {}
    for layer, each in enumerate(imbalances):
        layers.setdefault(each, []).append(layer)
    most = max(layers, key=lambda each: len(layers[each]))
    others = [(layer, each) for layer, each in enumerate(imbalances) if each != most]
    few = ", ".join(f"{each:.{DECIMALS}f} in layer {layer}" for layer, each in others[:FEW])
    more = f" and others in {len(others) - FEW} layers more, see --json" * (len(others) > FEW)
    return f"the cap of its layer ({few}{more}; elsewhere {most:.{DECIMALS}f} of the mean)"
