"""The placement programme: for devices and links that differ, and for experts that are pinned.

``x_l[e,d]`` = 1 if expert e of layer l is on device d. With ``r_l[e,f]`` the share of e's
transitions that go to f, ``u_l[e,d,d']`` is the share of them that goes from d to d':

- ``sum_d' u_l[e,d,d'] = x_l[e,d]`` and ``sum_d u_l[e,d,d'] = sum_f r_l[e,f] x_{l+1}[f,d']``.

So u costs E D^2 columns per boundary, not E^2 D^2, and is what it should be wherever x is whole.
Devices have names here, so the bound is weak; `colocation` has the strong one where it applies.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver.bounds.caps import raised
from moetuner.solver.milp.highs import Ilp
from moetuner.solver.result import Candidate, Limits, Progress, Status

BOUND_SOURCE = "placement integer programme"

# Nodes of the search tree, so that the answer does not depend on the machine.
NODES = 500

Values = NDArray[np.float64]


def placement_ilp(
    problem: Problem,
    *,
    seed: int,
    limits: Limits,
    start: Candidate,
    caps: NDArray[np.uint64] | None = None,
    pinned: NDArray[np.integer] | None = None,
) -> Candidate:
    """Improve a placement where devices are not interchangeable.

    Parameters
    ----------
    problem
        With any links.
    seed
        For HiGHS.
    limits
        Of them, ``time_limit``, ``gap`` and ``progress`` apply; without ``time_limit`` the number
        of nodes is limited.
    start
        To begin from. Where it breaks a cap, that cap becomes the device's load.
    caps
        Largest load per layer and device [L,D]; the problem's by default.
    pinned
        Device of every expert [L,E], -1 where it is free.

    Returns
    -------
    Candidate
        Never worse than the start; ``"optimal"`` only where cost and bound are equal.

    Raises
    ------
    ValueError
        If the start has a pinned expert elsewhere, or shapes do not fit.
    """
    placement = Placement(start.slots, num_experts=problem.experts)
    device_of = placement.device_of
    whole = np.repeat(problem.caps.whole[:, None], problem.devices, axis=1)
    asked = whole if caps is None else caps
    caps = _kept(problem, device_of, asked)
    pins = None if pinned is None else np.asarray(pinned, dtype=np.int64)
    if pins is not None:
        if pins.shape != device_of.shape:
            raise ValueError(f"pinned must be {list(device_of.shape)}, got {list(pins.shape)}")
        wrong = np.argwhere((pins >= 0) & (pins != device_of))
        if len(wrong):
            layer, expert = wrong[0]
            raise ValueError(
                f"start must keep pinned experts: layer {layer}, expert {expert} is on device "
                f"{device_of[layer, expert]}, not {pins[layer, expert]}"
            )
    if limits.time_limit is not None and limits.time_limit <= 0:
        return replace(start, status="time_limit")
    begin = time.monotonic()
    model = _Model(problem, caps, pins)
    worth = Objective(problem)
    cost = worth.cost(placement)

    def report(objective: float | None, dual: float) -> None:
        if limits.progress is not None:
            value = cost if objective is None else round(objective * model.unit)
            known = max(start.bound or 0, model.ilp.proven(dual, model.unit))
            shares = value / worth.scale, known / worth.scale
            limits.progress(Progress(time.monotonic() - begin, "placement", *shares))

    solution = model.ilp.solve(
        start=model.values(device_of),
        start_objective=cost / model.unit,
        seed=seed,
        gap=limits.gap or 0.0,
        absolute_gap=max(0.95 / model.unit - model.ilp.margin, 0.0),
        nodes=NODES,
        time_limit=limits.time_limit,
        progress=report,
    )
    slots = start.slots
    assert solution.values is not None
    found = solution.values[model.x].argmax(axis=2)
    if (_device_load(problem, found) <= caps).all():  # else broken by a millionth of it
        better = Placement.from_assignment(found, problem.devices, slots_per_device=problem.slots)
        if worth.cost(better) < cost:
            slots, cost = better.slots, worth.cost(better)
    own = model.ilp.proven(solution.bound, model.unit)
    bound = max(start.bound or 0, own)
    status: Status = "feasible"
    if bound >= cost:
        status = "optimal"
    elif limits.gap is not None and cost - bound <= limits.gap * cost:
        status = "gap_reached"
    elif solution.status in ("interrupted", "time_limit"):
        status = solution.status
    details = {**start.details, **raised(problem, caps, asked=asked, threads=limits.threads)}
    source = BOUND_SOURCE if bound > (start.bound or 0) else start.bound_source
    return replace(
        start, slots=slots, status=status, bound=bound, bound_source=source, details=details
    )


class _Model:
    """The programme, in units that keep its numbers near 1."""

    def __init__(
        self, problem: Problem, caps: NDArray[np.uint64], pinned: NDArray[np.int64] | None
    ) -> None:
        L, E, D = problem.layers, problem.experts, problem.devices
        self.problem = problem
        self.x = np.arange(L * E * D).reshape(L, E, D)
        follow = problem.regime == "follow"
        shape = (L - 1, E, D, D) if follow else (L, E, D)
        self.u = self.x.size + np.arange(np.prod(shape, dtype=int)).reshape(shape)
        if follow:
            tables = problem.statistics.transitions_or_empty.astype(np.float64)
            links = problem.topology.cost.astype(np.float64)
        else:
            # Every pair is in the table twice.
            tables = problem.statistics.coactivation_or_empty.astype(np.float64) / 2
            links = -np.ones(1)
        sent = tables.sum(axis=2)
        self.share = tables / np.maximum(sent, 1e-300)[:, :, None]
        # An expert that nobody leaves costs nothing wherever its u lies.
        self.unit = max(float(sent.mean()) * float(np.abs(links).mean()), 1.0) if sent.size else 1.0
        columns = self.x.size + self.u.size
        objective, upper = np.zeros(columns), np.ones(columns)
        objective[self.u] = sent.reshape(L - 1 if follow else L, E, *[1] * (self.u.ndim - 2))
        objective[self.u] *= links / self.unit
        total = 0.0 if follow else float(sent.sum())
        lower, integer = np.zeros(columns), np.zeros(columns)
        integer[self.x] = 1
        if pinned is not None:
            layer, expert = np.nonzero(pinned >= 0)
            upper[self.x[layer, expert]] = 0
            at = self.x[layer, expert, pinned[layer, expert]]
            lower[at] = upper[at] = 1
        self.ilp = Ilp(
            objective, lower=lower, upper=upper, integer=integer, offset=total / self.unit
        )
        layer, e, d = np.indices(self.x.shape)
        self.ilp.add_rows(np.ones(L * E), 1, layer * E + e, self.x)
        self.ilp.add_rows(np.zeros(L * D), problem.slots, layer * D + d, self.x)
        cap = np.maximum(caps.astype(np.float64), 1.0)
        weight = problem.load.astype(np.float64)[:, :, None] / cap[:, None, :]
        self.ilp.add_rows(
            np.full(L * D, -np.inf), (caps / cap).ravel(), layer * D + d, self.x, weight
        )
        if follow and L > 1:
            self._add_flows()
        elif not follow:
            self._add_meetings()

    def _add_flows(self) -> None:
        """Let what e sends leave from where e is and arrive where its partners are."""
        boundaries, E, D, _ = self.u.shape
        layer, e, d, d2 = (index.ravel() for index in np.indices(self.u.shape))
        u, rows = self.u.ravel(), np.arange(boundaries * E * D)
        x, sends = self.x[:-1].ravel(), (self.share.sum(axis=2) > 0).astype(np.float64)
        row, value = np.r_[(layer * E + e) * D + d, rows], np.ones(len(u))
        self.ilp.add_rows(
            np.zeros(len(rows)), 0, row, np.r_[u, x], np.r_[value, -np.repeat(sends.ravel(), D)]
        )
        l2, e2, f2, d3 = (i.ravel() for i in np.indices((boundaries, E, E, D)))
        share = self.share[l2, e2, f2]
        some = share > 0
        self.ilp.add_rows(
            np.zeros(len(rows)),
            0,
            np.r_[(layer * E + e) * D + d2, ((l2 * E + e2) * D + d3)[some]],
            np.r_[u, self.x[l2 + 1, f2, d3][some]],
            np.r_[value, -share[some]],
        )

    def _add_meetings(self) -> None:
        """Limit what e meets on d: by whether e is there, and by who else is."""
        layers, E, D = self.u.shape
        rows = np.arange(self.u.size)
        none = np.full(len(rows), -np.inf)
        row, entries = np.tile(rows, 2), np.r_[self.u.ravel(), self.x.ravel()]
        self.ilp.add_rows(none, 0, row, entries, np.repeat([1.0, -1.0], len(rows)))
        layer, e, f, d = (index.ravel() for index in np.indices((layers, E, E, D)))
        share = self.share[layer, e, f]
        some = share > 0
        self.ilp.add_rows(
            none,
            0,
            np.r_[rows, ((layer * E + e) * D + d)[some]],
            np.r_[self.u.ravel(), self.x[layer, f, d][some]],
            np.r_[np.ones(len(rows)), -share[some]],
        )

    def values(self, device_of: NDArray[np.int64]) -> Values:
        """Give the columns their values at the device of every expert [L,E]."""
        x = (device_of[:, :, None] == np.arange(self.problem.devices)).astype(np.float64)
        if self.problem.regime == "follow":
            u = x[:-1, :, :, None] * (self.share @ x[1:])[:, :, None, :]
        else:
            u = x * (self.share @ x)
        values: Values = np.r_[x.ravel(), u.ravel()]
        return values


def _kept(
    problem: Problem, device_of: NDArray[np.int64], asked: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Caps [L,D], raised where a placement breaks them."""
    if asked.shape != (problem.layers, problem.devices):
        wanted = [problem.layers, problem.devices]
        raise ValueError(f"caps must be {wanted}, got {list(asked.shape)}")
    kept: NDArray[np.uint64] = np.maximum(asked, _device_load(problem, device_of))
    return kept


def _device_load(problem: Problem, device_of: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Load of every device [L,D]."""
    load = np.zeros((problem.layers, problem.devices), dtype=np.uint64)
    np.add.at(load, (np.arange(problem.layers)[:, None], device_of), problem.load)
    return load
