"""Verify certificates: recompute the bound that they prove, and trust nothing in them."""

from __future__ import annotations

import numpy as np

from moetuner import _core
from moetuner._checks import instance, shown, threads_in
from moetuner.problem import Problem
from moetuner.solver.bounds import pairs, visits
from moetuner.solver.bounds.certificate import Certificate


def verify(certificate: Certificate, problem: Problem, *, threads: int | None = None) -> int:
    """Recompute a bound from a certificate and the statistics alone.

    No placement of the problem is below it. It is a bound on ``Objective.cost`` or, where expert
    sets are known, on the visits of devices by all tokens.

    Raises
    ------
    ValueError
        If the certificate does not cover every placement of the problem: it is of other statistics,
        another topology, regime or other slots, its caps are below the problem's, or the problem's
        placements may have copies of experts. Also if a cut in it is not true, or no placement
        keeps its caps.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load, pairs = np.array([[[2, 2], [2, 2]]]), np.array([[[1, 1], [1, 1]]])
    >>> statistics = mt.RoutingStatistics(load, pairs)
    >>> problem = mt.Problem(statistics, mt.Topology(2), regime="follow", max_imbalance=1.0)
    >>> certificate = mt.solve(problem).certificate
    >>> mt.verify(certificate, problem) == certificate.cost
    True
    """
    instance("certificate", certificate, Certificate, hint=", such as Certificate.load(path)")
    instance("problem", problem, Problem, hint=", such as Problem(statistics, topology)")
    threads = threads_in(threads)
    for what, wanted, stored in (
        ("regime", problem.regime, certificate.regime),
        ("these statistics,", problem.statistics.fingerprint, certificate.fingerprint),
        ("slots per device", problem.slots, certificate.slots),
        ("caps of layers", problem.layers, len(certificate.caps)),
    ):
        if wanted != stored:
            raise ValueError(f"certificate must be of {what} {wanted}, got {shown(stored)}")
    _refuse_vacuous(certificate, problem, threads)
    _refuse_uncovered(certificate, problem)
    if certificate.method == "complete dynamic programme":
        return _complete_again(certificate, problem, threads)
    if certificate.method == "visits":
        return visits.recompute(problem, certificate.caps, certificate.visits, threads=threads)
    return pairs.recompute(problem, certificate.caps, certificate.proofs, threads=threads)


def _refuse_vacuous(certificate: Certificate, problem: Problem, threads: int | None) -> None:
    """Raise if a cap is below what counting, or trying all packings of few experts, allows."""
    total = problem.load.sum(axis=1, dtype=np.uint64)
    peaks = _core.smallest_peaks(
        problem.load, problem.devices, problem.slots, total, threads=threads
    )
    for layer, (cap, (_, least)) in enumerate(zip(certificate.caps.tolist(), peaks, strict=True)):
        if cap < least:
            raise ValueError(
                f"certificate must have caps that a placement can keep, got {cap} in layer "
                f"{layer}, where the fullest device carries at least {least}"
            )


def _refuse_uncovered(certificate: Certificate, problem: Problem) -> None:
    """Raise if the problem has placements that the certificate proves nothing about."""
    if problem.may_copy:
        raise ValueError(
            f"problem must have {certificate.scope}, which certificate is about, got one with "
            "slots for further copies"
        )
    if not problem.topology.has_equal_devices and problem.caps.exist:
        raise ValueError(
            "problem must have equal devices, as the caps in certificate are of equal devices, "
            "got devices of different speed or slots"
        )
    below = np.flatnonzero(certificate.caps < problem.caps.whole)
    if below.size:
        layer = below[0]
        raise ValueError(
            f"certificate must have caps of at least the problem's, got {certificate.caps[layer]} "
            f"in layer {layer}, where the problem allows a device load of "
            f"{problem.caps.whole[layer]}"
        )


def _complete_again(certificate: Certificate, problem: Problem, threads: int | None) -> int:
    """Recompute an optimum under a certificate's caps."""
    caps = np.minimum(certificate.caps, problem.load.sum(axis=1, dtype=np.uint64))
    optimum = pairs.solve_completely(problem, caps, threads=threads)
    if optimum is None:
        raise ValueError(
            "certificate says that dynamic programming over all partitions is its proof, which is "
            "out of reach for these sizes and links"
        )
    _, cost, _ = optimum
    if cost != certificate.cost:
        raise ValueError(
            f"certificate must be for these links: it was written for a cost of "
            f"{certificate.cost}, and the optimum here is {cost}"
        )
    return cost
