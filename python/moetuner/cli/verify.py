"""``moetuner verify``: recompute a bound from its certificate alone."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from moetuner.cli import options
from moetuner.cli.options import argument, kinds, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.files import naming
from moetuner.files.cells import percent
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.caps import device_load
from moetuner.solver import Certificate, verify

# Largest relative error of a sum of visits.
ROUNDING = 1e-12
# Decimals of an imbalance.
DECIMALS = 4
# Most imbalances that a sentence names.
MOST_NAMED = 6


@options.command("verify", example="proof.json trace.safetensors --devices 8")
def command(
    *,
    certificate_file: Path = argument("CERTIFICATE", kinds.IN_FILE),
    source: Source,
    machine: Machine,
    placement_file: Path | None = option(kinds.IN_FILE, "FILE"),
    output: Output,
) -> None:
    """Recompute the bound that a certificate proves.

    The solver is not trusted: the bound follows from INPUT's counts and the certificate's
    numbers, whoever made them. INPUT and --window must be those of the solve.

    Parameters
    ----------
    placement_file
        Placement to compare with the bound.
    """
    certificate = Certificate.load(certificate_file)
    is_about_visits = certificate.method == "visits"
    statistics = source.count_for_search(sets=is_about_visits)
    topology = machine.topology()
    imbalances = _imbalances(statistics.total_load, topology.devices, certificate.caps)
    # The tightest cap that the certificate covers in every layer; its own caps are said below.
    problem = Problem(
        statistics,
        topology,
        regime=certificate.regime,
        objective="traffic",
        max_imbalance=max(min(imbalances), 1.0),
    )
    cost = verify(certificate, problem, threads=source.threads)
    objective = problem.objective_function
    bound = cost / (objective.tokens if is_about_visits else objective.scale)
    proof = "prices or tangents of" if is_about_visits else "a"
    output.say(
        f"Proven by {proof} {certificate.method}: of {certificate.scope}, with "
        f"{certificate.slots} slots per device and no device load above {_caps(imbalances)}, "
        f"none has an objective below {bound:.6f}."
    )
    contents: dict[str, Any] = {"bound": bound, "cost": cost, "scope": certificate.scope}
    contents["bound_scope"] = certificate.scope
    contents |= {"method": certificate.method, "regime": certificate.regime}
    contents["max_imbalance"] = imbalances if len(imbalances) > 1 else imbalances[0]
    contents["caps"] = certificate.caps.tolist()
    if placement_file is not None:
        contents |= _compare(placement_file, certificate, cost, bound, problem, output)
    output.finish(contents)


def _compare(
    path: Path, certificate: Certificate, cost: int, bound: float, problem: Problem, output: Output
) -> dict[str, float | None]:
    """Compare a placement with the bound; print and return its objective and gap."""
    placement, function = Placement.load(path), problem.objective_function
    with naming(path):
        problem.check_shape(placement)
    if placement.has_copies:
        raise click.ClickException(
            f"{path}: must have one copy of each expert, which the bound is about; it has more"
        )
    objective = function.traffic(placement)
    reached: float = function.cost(placement)
    if certificate.method == "visits":
        reached = objective * function.tokens * (1 + ROUNDING)
    line = f"{path}: objective {objective:.6f}"
    overloads = (device_load(placement.slots, problem.load) > certificate.caps[:, None]).any()
    if overloads or (placement.slots >= 0).sum(axis=2).max() > certificate.slots:
        output.say(
            f"{line}; it exceeds the load or the slots that the bound assumes, so the two cannot "
            "be compared."
        )
        return {"objective": objective, "gap": None}
    if reached < cost:
        raise click.ClickException(
            f"{line} is below the bound {bound:.6f} of the certificate, though the placement is "
            "one that the bound is about: one of the two must be wrong; please report it"
        )
    gap = (objective - bound) / objective if objective else 0.0
    output.say(f"{line}, within {percent(gap)}.")
    return {"objective": objective, "gap": gap}


def _imbalances(load: NDArray[np.uint64], devices: int, caps: NDArray[np.uint64]) -> list[float]:
    """Return caps of layers [L] as imbalances of loads [L,E]: a single one if it fits all layers.

    A cap is a whole number of tokens, so it stands for a range of imbalances: from the first number
    of a pair to below the second.
    """
    totals = load.sum(axis=1, dtype=np.uint64).tolist()
    if len(totals) != len(caps):
        return [1.0]  # of another model, which `verify` says
    ranges = []
    for cap, total in zip(caps.tolist(), totals, strict=True):
        if not total:
            ranges.append((Fraction(1), Fraction(devices)))
            continue
        tokens = min(cap, total)
        low, high = (Fraction(number * devices, total) for number in (tokens, tokens + 1))
        ranges.append((low, high))
    common = _shortest(max(low for low, _ in ranges), min(high for _, high in ranges))
    return [common] if common else [_shortest(low, high) or 1.0 for low, high in ranges]


def _shortest(low: Fraction, high: Fraction) -> float | None:
    """Return the shortest decimal from ``low`` to below ``high``, or one just below the range."""
    for unit in (10**digits for digits in range(1, DECIMALS + 1)):
        short = Fraction(math.ceil(low * unit), unit)
        if short < high:
            return float(short)
    return math.floor(low * unit) / unit if low < high else None


def _caps(imbalances: list[float]) -> str:
    """Write one imbalance, or those of layers that differ from most."""
    if len(imbalances) == 1:
        return f"{imbalances[0]:.{DECIMALS}f} of the mean"
    usual = max(imbalances, key=imbalances.count)
    others = [(layer, cap) for layer, cap in enumerate(imbalances) if cap != usual]
    named = ", ".join(f"{cap:.{DECIMALS}f} in layer {layer}" for layer, cap in others[:MOST_NAMED])
    if len(others) > MOST_NAMED:
        named += f" and others in {len(others) - MOST_NAMED} layers more, see --json"
    return f"the cap of its layer ({named}; elsewhere {usual:.{DECIMALS}f} of the mean)"
