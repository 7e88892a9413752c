"""The joint problem through HiGHS: the co-location programme, warm-started and bounded.

A placement enters; the same or a better one leaves, with a proven lower bound of the cost. The
programme names no device: it says which experts share one (docs/mathematics.md). It proves what is
small and has too many partitions for the complete chain; larger problems are left to the bounds.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.caps import device_load
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.budget import Budget, Progress
from moetuner.solver.milp.highs import Ilp, Solution
from moetuner.solver.result import Candidate

BOUND_SOURCE = "co-location integer programme"

Slots = NDArray[np.int32]
Devices = NDArray[np.int64]
Values = NDArray[np.float64]


def fits(problem: Problem) -> bool:
    """Return whether links are all alike and the programme is of a size that HiGHS can solve."""
    cost = problem.topology.cost
    alike = (cost[~np.eye(len(cost), dtype=bool)] == cost[0, -1]).all()
    entries, boundaries = problem.devices * problem.slots, problem.layers - 1
    rows = boundaries * math.comb(2 * entries, 3) * 3
    return bool(alike) and problem.regime == "follow" and 0 < rows <= effort.MOST_TRIANGLES


class Programme:
    """The programme: minimise the transitions that no device holds both ends of.

    Columns say whether two *entries* (experts, then empty slots) of a layer share a device, s, and
    whether two of neighbouring layers do, z. z need not be said to be whole: where s is, it is.

    Parameters
    ----------
    problem
        What to place; it must have at least two layers.
    caps
        Largest load of a device [L].
    """

    def __init__(self, problem: Problem, caps: NDArray[np.uint64]) -> None:
        traffic = problem.statistics.transitions_or_empty * float(problem.topology.cost[0, -1])
        self.devices, self.slots = problem.devices, problem.slots
        self.entries = P = self.devices * self.slots
        boundaries, E = traffic.shape[:2]
        upper = np.triu_indices(P, 1)
        whole = (boundaries + 1) * len(upper[0])
        s = np.full((boundaries + 1, P, P), whole + boundaries * P * P)
        s[:, upper[0], upper[1]] = np.arange(whole).reshape(boundaries + 1, -1)
        s = np.minimum(s, s.transpose(0, 2, 1))
        z = whole + np.arange(boundaries * P * P).reshape(boundaries, P, P)
        # Column of two entries of neighbouring layers [L-1,2P,2P]; of an entry and itself the last,
        # which is no column: it stands for 1.
        self.column = np.block([[s[:-1], z], [z.transpose(0, 2, 1), s[1:]]])
        self.columns = whole + z.size
        saved = np.zeros(self.columns)
        saved[z[:, :E, :E]] = traffic
        # Numbers near 1 are what HiGHS's tolerances are made for.
        self.unit = max(float(saved.sum()) / max(int((saved > 0).sum()), 1), 1.0)
        load = np.zeros((len(s), P))
        load[:, :E] = problem.load
        cap = np.maximum(caps.astype(np.float64), 1.0)
        self.ilp = Ilp(
            -saved / self.unit,
            upper=self._upper(s, load, cap),
            integer=np.arange(self.columns) < whole,
            offset=float(saved.sum()) / self.unit,
        )
        self._add_degrees_and_loads(s, z, load, cap)
        self.triangles = self._add_triangles()

    def _upper(self, s: NDArray[np.int64], load: Values, cap: Values) -> Values:
        """Return upper bounds: 0 for two experts that with the lightest others exceed the cap."""
        upper = np.ones(self.columns + 1)
        if self.slots > 1:
            # The lightest of all weigh no more than the lightest others.
            others = np.sort(load, axis=1)[:, : self.slots - 2].sum(axis=1)
            pairs = load[:, :, None] + load[:, None, :] + others[:, None, None]
            upper[s[pairs > cap[:, None, None] * (1 + 1e-9)]] = 0
        return upper[:-1]

    def _add_degrees_and_loads(
        self, s: NDArray[np.int64], z: NDArray[np.int64], load: Values, cap: Values
    ) -> None:
        P, C = self.entries, self.slots
        off = ~np.eye(P, dtype=bool)
        e, f = np.nonzero(off)
        for s_l, weight, most in zip(s, load, cap, strict=True):
            self.ilp.add_rows(np.full(P, C - 1), C - 1, e, s_l[off])
            # What the other devices cannot take, this one must.
            least = weight.sum() - (self.devices - 1) * most
            self.ilp.add_rows(
                (least - weight) / most, (most - weight) / most, e, s_l[off], weight[f] / most
            )
        for z_l in z:
            for row in np.indices(z_l.shape):
                self.ilp.add_rows(np.full(P, C), C, row, z_l)

    def _add_triangles(self) -> int:
        """Add ``x(i,j) + x(i,k) - x(j,k) <= 1``, with j before k: sharing is an equivalence."""
        i, j, k = np.indices((2 * self.entries,) * 3).reshape(3, -1)
        once = (j < k) & (i != j) & (i != k)
        i, j, k = i[once], j[once], k[once]
        inside = np.minimum(np.minimum(i, j), k) >= self.entries
        count = 0
        for at, column in enumerate(self.column):
            # What lies in the right layer alone is the next boundary's.
            own = ~inside | (at == len(self.column) - 1)
            terms = np.c_[column[i, j], column[i, k], column[j, k]][own]
            row = np.repeat(np.arange(len(terms)), 3)
            signs = np.tile([1.0, 1.0, -1.0], len(terms))
            self.ilp.add_rows(np.full(len(terms), -np.inf), 1, row, terms.ravel(), signs)
            count += len(terms)
        return count

    def values(self, device_of: Devices) -> Values:
        """Return the columns' values at the device of every entry [L,P]."""
        pairs = np.concatenate([device_of[:-1], device_of[1:]], axis=1)
        values = np.zeros(self.columns + 1)
        values[self.column] = pairs[:, :, None] == pairs[:, None, :]
        return values[:-1]

    def device_of(self, values: Values) -> Devices | None:
        """Read the device of every entry [L,P] back; None if values are no equivalence."""
        shares = np.append(values, 1.0)[self.column] > 0.5
        P = self.entries
        # The first layer names the devices, later ones follow.
        first = shares[0, :P, :P].argmax(axis=1)
        device_of = [np.unique(first, return_inverse=True)[1]]
        for table in shares:
            device_of.append(device_of[-1][table[:P, P:].argmax(axis=0)])
        devices = np.stack(device_of)
        fits = devices.max() < self.devices and (self.values(devices) == (values > 0.5)).all()
        return devices if fits else None


def colocation(problem: Problem, *, seed: int, budget: Budget, start: Candidate) -> Candidate:
    """Improve a placement and prove how far from the optimum it can be.

    `fits` says for which problems. Where the start exceeds a cap, that layer's cap becomes its
    largest device load: the bound is then that of these caps, which the answer carries. The answer
    is never worse than the start, and ``"optimal"`` only where cost and bound are equal. Of the
    budget, ``time_limit``, ``gap`` and ``progress`` apply; without ``time_limit`` the number of
    nodes is limited.
    """
    if budget.is_over():
        return replace(start, status="time_limit")
    objective = problem.objective_function
    caps = problem.caps.raised_for(start.slots)
    model = Programme(problem, caps)
    cost = objective.cost(Placement(start.slots, num_experts=problem.experts))
    before = start.bound or 0

    def report(_: float | None, dual: float) -> None:
        if budget.progress is not None:
            # HiGHS's incumbent is a placement only within its tolerances.
            proven = max(before, model.ilp.proven(dual, model.unit)) / objective.scale
            budget.progress(Progress(budget.gone, "co-location", cost / objective.scale, proven))

    solution = model.ilp.solve(
        start=model.values(_entries(start.slots, problem.experts)),
        start_objective=cost / model.unit,
        seed=seed,
        gap=budget.gap or 0.0,
        absolute_gap=max(0.95 / model.unit - model.ilp.margin, 0.0),  # costs are whole numbers
        nodes=effort.PROGRAMME_NODES,
        time_limit=budget.left,
        progress=report,
    )
    slots, cost = _better(problem, model, caps, solution, (start.slots, cost))
    bound = max(before, model.ilp.proven(solution.bound, model.unit))
    status = solution.status
    if bound >= cost:
        status = "optimal"
    elif budget.gap is not None and cost - bound <= budget.gap * cost:
        status = "gap_reached"
    elif status not in ("interrupted", "time_limit"):
        status = "feasible"
    first = None if solution.first is None else round(solution.first * model.unit)
    size = {"columns": model.columns, "triangle_rows": model.triangles, "first_incumbent": first}
    return replace(
        start,
        slots=slots,
        status=status,
        bound=bound,
        bound_source=BOUND_SOURCE if bound > before else start.bound_source,
        details=start.details.searched(colocation=size),
    )


def _entries(slots: Slots, experts: int) -> Devices:
    """Return the device of every entry [L,P]: of the experts, then of the empty slots."""
    layers, _, per_device = slots.shape
    flat = slots.reshape(layers, -1)
    # Empty slots sort behind all experts, in order.
    order = np.argsort(np.where(flat == EMPTY, experts, flat), axis=1, kind="stable")
    device_of: Devices = order // per_device
    return device_of


def _better(
    problem: Problem,
    model: Programme,
    caps: NDArray[np.uint64],
    solution: Solution,
    best: tuple[Slots, int],
) -> tuple[Slots, int]:
    """Return the placement of a solution and its cost if it keeps the caps and costs less."""
    device_of = None if solution.values is None else model.device_of(solution.values)
    if device_of is None:
        return best
    slots = Placement.from_assignment(
        device_of[:, : problem.experts], problem.devices, slots_per_device=problem.slots
    ).slots
    # HiGHS allows a row to be broken by a millionth of it.
    if (device_load(slots, problem.load).max(axis=1) > caps).any():
        return best
    cost = Objective(problem).cost(Placement(slots, num_experts=problem.experts))
    return (slots, cost) if cost < best[1] else best
