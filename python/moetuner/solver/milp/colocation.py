"""The joint problem through HiGHS: the co-location programme, warm-started and bounded.

A placement enters; the same or a better one leaves, with a proven lower bound of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.caps import device_load
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.milp.highs import Ilp, Solution
from moetuner.solver.result import Candidate, Clock, Limits, Progress, Status

# A row counts as broken by more than this.
VIOLATION = 1e-3

Counts = NDArray[np.uint64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Relation:
    """Sharing a device, or a node: the devices in it, and what sharing it saves per pair."""

    devices: int
    saves: int


@dataclass(frozen=True)
class CoLocationData:
    """A joint problem of interchangeable devices, or a part of one.

    Parameters
    ----------
    load
        Of every expert [L,E].
    caps
        Largest load of a device [L].
    transitions
        Of neighbouring layers [L-1,E,E]; None where co-activation counts.
    coactivation
        Of a layer [L,E,E]; None where transitions count.
    devices, slots
        Devices D, and slots of each, C.
    relations
        From the coarsest on: nodes if there are any, then devices.
    """

    load: Counts
    caps: Counts
    transitions: Counts | None
    coactivation: Counts | None
    devices: int
    slots: int
    relations: tuple[Relation, ...]

    @classmethod
    def of(cls, problem: Problem, caps: Counts) -> CoLocationData | None:
        """Return the whole problem; None where links are not of two tiers, nodes the dearer."""
        topology, cost = problem.topology, problem.topology.cost
        follow = problem.regime == "follow"
        within, between = (
            (int(cost[0, min(1, len(cost) - 1)]), int(cost[0, -1])) if follow else (1, 1)
        )
        if within > between or (follow and not topology.is_two_tier):
            return None
        relations = [Relation(1, within)]
        if within < between:
            nested = topology.node_size > 1
            relations = [Relation(topology.node_size, between - within)] if nested else []
            relations.append(Relation(1, within if nested else between))
        return cls(
            problem.load,
            caps,
            problem.statistics.transitions_or_empty if follow else None,
            None if follow else problem.statistics.coactivation_or_empty,
            problem.devices,
            problem.slots,
            tuple(relations),
        )

    @property
    def boundaries(self) -> int:
        """Pairs of neighbouring layers that cost something, L-1 or none."""
        return 0 if self.transitions is None else len(self.transitions)

    @property
    def triangle_rows(self) -> int:
        """Rows of all triangles, over all relations."""
        P = self.devices * self.slots
        pairs = P * (P - 1) // 2
        inside, across = len(self.load) * pairs * (P - 2), 6 * self.boundaries * P * pairs
        return len(self.relations) * (inside + across)


class Model:
    """The programme: minimise ``(total - saved) / unit`` over the columns s, then z.

    Parameters
    ----------
    joint
        What to place.
    """

    def __init__(self, joint: CoLocationData) -> None:
        self.joint = joint
        self.layers, self.experts = joint.load.shape
        self.entries = P = joint.devices * joint.slots
        upper = np.triu_indices(P, 1)
        tiers = len(joint.relations)
        numbers = np.arange(tiers * self.layers * len(upper[0])).reshape(tiers, self.layers, -1)
        # Columns of s [tiers,L,P,P], symmetric, and of z [tiers,L-1,P,P].
        self.s = np.full((tiers, self.layers, P, P), -1, dtype=np.int64)
        self.s[:, :, upper[0], upper[1]] = self.s[:, :, upper[1], upper[0]] = numbers
        shape = (tiers, joint.boundaries, P, P)
        self.z = numbers.size + np.arange(math.prod(shape)).reshape(shape)
        self.columns = numbers.size + self.z.size
        saved = self._saved()
        # Numbers near 1 are what HiGHS's tolerances are made for.
        self.unit = max(float(saved.sum()) / max(int((saved > 0).sum()), 1), 1.0)
        self.total = round(float(saved.sum()))
        # z need not be said to be whole: where s is, it is a doubly stochastic matrix over devices.
        # See `tighten` for where it is said all the same.
        self.ilp = Ilp(
            -saved / self.unit,
            upper=self._upper(),
            integer=np.arange(self.columns) < numbers.size,
            offset=self.total / self.unit,
        )
        self._add_degrees_and_loads()
        self._add_nesting()
        self.rows = {"triangle_rows": 0, "gathering_rows": 0}

    @property
    def absolute_gap(self) -> float:
        """Gap that still proves an optimum, costs being whole numbers."""
        return max(0.95 / self.unit - self.ilp.margin, 0.0)

    def values(self, device_of: NDArray[np.int64]) -> Values:
        """Return the columns' values at the device of every entry [L,P]."""
        values = np.zeros(self.columns)
        e, f = np.triu_indices(self.entries, 1)
        for tier, relation in enumerate(self.joint.relations):
            place = device_of // relation.devices
            values[self.s[tier][:, e, f]] = place[:, e] == place[:, f]
            if self.joint.boundaries:
                values[self.z[tier]] = place[:-1, :, None] == place[1:, None, :]
        return values

    def device_of(self, values: Values) -> NDArray[np.int64] | None:
        """Read the device of every entry [L,P] back; None if values are no equivalence classes.

        Devices of a node, and nodes, get their names in the first layer; later layers follow.
        """
        device_of = np.zeros((self.layers, self.entries), dtype=np.int64)
        nodes = np.zeros_like(device_of)
        for tier, relation in enumerate(self.joint.relations):
            places = self.joint.devices // relation.devices
            for layer in range(self.layers):
                s = values[self.s[tier, layer]] > 0.5
                np.fill_diagonal(s, True)
                leader = s.argmax(axis=1)
                if layer and self.joint.boundaries:
                    z = values[self.z[tier, layer - 1]] > 0.5
                    place = device_of[layer - 1][z.argmax(axis=0)] // relation.devices
                elif relation.devices == 1 and len(self.joint.relations) == 2:
                    place = self._within_nodes(leader, nodes[layer])
                else:
                    place = np.unique(leader, return_inverse=True)[1]
                if place.max() >= places:
                    return None
                device_of[layer] = place * relation.devices
            if tier == 0:
                nodes = device_of // relation.devices
        same = self.values(device_of) == (values > 0.5)
        return device_of if same.all() else None

    def _within_nodes(
        self, leader: NDArray[np.int64], node: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        size = self.joint.relations[0].devices
        place = np.zeros(self.entries, dtype=np.int64)
        for n in np.unique(node):
            inside = node == n
            place[inside] = n * size + np.unique(leader[inside], return_inverse=True)[1]
        return place

    def tighten(
        self,
        cost: int,
        left: Callable[[], float | None],
        progress: Callable[[float | None, float], None] | None = None,
    ) -> tuple[float, Status]:
        """Add rows that the relaxation breaks, round after round, while that raises its bound.

        Takes the cost of the best placement, what tells the time left, and `Ilp.solve`'s progress;
        returns the dual bound (minus infinity without one) and why it ended, ``"feasible"`` if for
        want of progress.

        What gap is left decides whether z is said to be whole: reduced costs fix most of it where
        the gap is small, and where it is not HiGHS does better to branch on s alone.
        """
        bound = -math.inf
        for _ in range(effort.RELAXED_ROUNDS):
            relaxed = self.ilp.relax(time_limit=left(), progress=progress)
            if relaxed.values is None:
                return bound, relaxed.status
            rise, bound = relaxed.bound - bound, relaxed.bound
            if relaxed.status == "interrupted":
                return bound, relaxed.status
            gap = cost / self.unit - bound
            least = effort.RELAXED_PROGRESS * gap
            if not self.separate(relaxed.values) or gap <= 0 or rise < least:
                break
        if cost / self.unit - bound <= effort.SMALL_GAP * cost / self.unit:
            self.ilp.make_whole(self.z.ravel())
        return bound, "feasible"

    def separate(self, values: Values) -> int:
        """Add the triangles and gatherings that values break worst; how many were added."""
        triangles, row, column, factor = _core.separate(
            values,
            [relation.devices * self.joint.slots for relation in self.joint.relations],
            self.layers,
            self.entries,
            self.joint.boundaries,
            slack=VIOLATION,
            most=effort.ROWS_PER_ROUND,
        )
        count, gatherings = len(triangles), int(row[-1]) + 1 if row.size else 0
        each = np.repeat(np.arange(count), 3)
        signs = np.tile([1.0, 1.0, -1.0], count)
        self.ilp.add_rows(np.full(count, -np.inf), 1, each, triangles.ravel(), signs)
        self.ilp.add_rows(np.full(gatherings, -np.inf), 0, row, column, factor)
        self.rows["triangle_rows"] += count
        self.rows["gathering_rows"] += gatherings
        return count + gatherings

    def _saved(self) -> Values:
        """Compute the cost saved by every column."""
        joint, E = self.joint, self.experts
        saved = np.zeros(self.columns)
        for tier, relation in enumerate(joint.relations):
            if joint.transitions is not None:
                saved[self.z[tier][:, :E, :E]] = relation.saves * joint.transitions.astype(float)
            elif joint.coactivation is not None:
                e, f = np.triu_indices(E, 1)
                saved[self.s[tier][:, e, f]] = relation.saves * joint.coactivation[:, e, f]
        return saved

    def _upper(self) -> Values:
        """Return upper bounds: 0 for two experts that with the lightest others break the cap."""
        upper = np.ones(self.columns)
        C = self.joint.slots
        if C < 2:
            return upper
        for layer, load in enumerate(self._loads()):
            # The lightest of all weigh no more than the lightest others.
            others = np.sort(load)[: C - 2].sum()
            heavy = load[:, None] + load + others > self.joint.caps[layer] * (1 + 1e-9)
            np.fill_diagonal(heavy, False)
            upper[self.s[-1, layer][heavy]] = 0
        return upper

    def _loads(self) -> Values:
        loads = np.zeros((self.layers, self.entries))
        loads[:, : self.experts] = self.joint.load
        return loads

    def _add_degrees_and_loads(self) -> None:
        joint, P = self.joint, self.entries
        every, off = np.arange(P), ~np.eye(P, dtype=bool)
        e, f = np.nonzero(off)
        loads, caps = self._loads(), np.maximum(joint.caps.astype(float), 1.0)
        for tier, relation in enumerate(joint.relations):
            size = relation.devices * joint.slots
            for layer, (load, cap) in enumerate(zip(loads, caps, strict=True)):
                s = self.s[tier, layer][off]
                self.ilp.add_rows(np.full(P, size - 1), size - 1, e, s)
                # What the other devices cannot take, these must.
                least = load.sum() - (joint.devices - relation.devices) * cap
                most = relation.devices * cap
                self.ilp.add_rows((least - load) / cap, (most - load) / cap, e, s, load[f] / cap)
            for z in self.z[tier]:
                for row in (np.repeat(every, P), np.tile(every, P)):
                    self.ilp.add_rows(np.full(P, size), size, row, z.ravel())

    def _add_nesting(self) -> None:
        """Add rows that have what is on one device in one node."""
        if len(self.joint.relations) < 2:
            return
        e, f = np.triu_indices(self.entries, 1)
        outer, inner = (np.r_[self.s[t][:, e, f].ravel(), self.z[t].ravel()] for t in (0, 1))
        row = np.tile(np.arange(len(outer)), 2)
        value = np.repeat([1.0, -1.0], len(outer))
        self.ilp.add_rows(np.zeros(len(outer)), np.inf, row, np.r_[outer, inner], value)


BOUND_SOURCE = "co-location integer programme"


def fits(problem: Problem) -> bool:
    """Whether the whole programme is of a size that HiGHS makes headway with."""
    joint = CoLocationData.of(problem, problem.caps.whole)
    return joint is not None and joint.triangle_rows <= effort.MOST_TRIANGLES


def colocation(problem: Problem, *, seed: int, limits: Limits, start: Candidate) -> Candidate:
    """Improve a placement and prove how far from the optimum it can be.

    Links must be of one tier or two; `fits` says whether a problem is small enough. Where the start
    breaks a cap, that layer's cap becomes its largest device load: the bound is then that of these
    caps, which the answer carries. The answer is never worse than the start, and ``"optimal"`` only
    where cost and bound are equal. Of the limits, ``time_limit``, ``gap`` and ``progress`` apply;
    without ``time_limit`` the number of nodes is limited.
    """
    if limits.time_limit is not None and limits.time_limit <= 0:
        return replace(start, status="time_limit")
    clock = Clock(limits)
    caps = problem.caps.kept(start.slots)
    joint = CoLocationData.of(problem, caps)
    if joint is None:
        raise ValueError("co-location needs links of one kind, or dearer ones between nodes")
    model = Model(joint)

    worth, slots = Objective(problem), start.slots
    cost = worth.cost(Placement(slots, num_experts=problem.experts))
    bound = start.bound or 0

    def report(objective: float | None, dual: float) -> None:
        if limits.progress is not None:
            # While triangles are still to come, HiGHS's incumbent need be no placement.
            known = max(bound, model.ilp.proven(dual, model.unit)) / worth.scale
            limits.progress(Progress(clock.gone, "co-location", cost / worth.scale, known))

    device_of = entries_of(slots, problem.experts)
    rounds, first = 0, None
    relaxed, ended = model.tighten(cost, lambda: clock.left, report)
    status: Status = ended
    bound = max(bound, model.ilp.proven(relaxed, model.unit))
    while ended == "feasible" and bound < cost and rounds < effort.PROGRAMME_ROUNDS:
        solution = model.ilp.solve(
            start=model.values(device_of),
            start_objective=cost / model.unit,
            seed=seed,
            gap=limits.gap or 0.0,
            absolute_gap=model.absolute_gap,
            nodes=effort.PROGRAMME_NODES,
            time_limit=clock.left,
            progress=report,
        )
        rounds += 1
        first = solution.first if first is None else first
        status = solution.status
        bound = max(bound, model.ilp.proven(solution.bound, model.unit))
        found = _read(problem, model, caps, solution)
        if found is not None and found[1] < cost:
            slots, cost = found
            device_of = entries_of(slots, problem.experts)
        done = bound >= cost or status in ("interrupted", "time_limit")
        if done or solution.values is None or not model.separate(solution.values):
            break
    if bound >= cost:
        status = "optimal"
    elif limits.gap is not None and cost - bound <= limits.gap * cost:
        status = "gap_reached"
    elif status not in ("interrupted", "time_limit"):
        status = "feasible"
    details = start.details.searched(
        colocation={
            "columns": model.columns,
            **model.rows,
            "rounds": rounds,
            "first_incumbent": None if first is None else round(first * model.unit),
        }
    )
    source = BOUND_SOURCE if bound > (start.bound or 0) else start.bound_source
    return replace(
        start,
        slots=slots,
        status=status,
        bound=bound,
        bound_source=source,
        details=details,
        caps=caps,
    )


def entries_of(slots: NDArray[np.int32], experts: int) -> NDArray[np.int64]:
    """Return the device of every entry [L,P]: of the experts, then of the empty slots."""
    layers, _, per_device = slots.shape
    flat = slots.reshape(layers, -1)
    # Empty slots sort behind all experts, in order.
    order = np.argsort(np.where(flat == EMPTY, experts, flat), axis=1, kind="stable")
    device_of: NDArray[np.int64] = order // per_device
    return device_of


def _read(
    problem: Problem, model: Model, caps: NDArray[np.uint64], solution: Solution
) -> tuple[NDArray[np.int32], int] | None:
    """Read slots [L,D,S] and cost of a solution; None if it is no placement under the caps."""
    device_of = None if solution.values is None else model.device_of(solution.values)
    if device_of is None:
        return None
    device_of = device_of[:, : problem.experts]
    placement = Placement.from_assignment(
        device_of, problem.devices, slots_per_device=problem.slots
    )
    if (device_load(placement.slots, problem.load).max(axis=1) > caps).any():
        return None  # HiGHS allows a row to be broken by a millionth of it
    return placement.slots, Objective(problem).cost(placement)
