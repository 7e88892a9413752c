"""Compute the next map of any engine from loads and the running map.

Every rank decides by itself on the same loads, and then exchanges weights with others, so the
answer is a function of the arguments alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._checks import (
    DEVICE_LIMIT,
    SLOT_LIMIT,
    array_in,
    at_least,
    chosen,
    numbers_in,
    whole_number,
)
from moetuner.placement import EMPTY, compare_holders, find_holders
from moetuner.router_groups import assign_nodes, count_nodes
from moetuner.solver.rebalancing import (
    DEAD_ZONE,
    DEVIATIONS,
    Pairs,
    Rebalanced,
    choose_repacked,
    rebalance,
    slowest,
)
from moetuner.statistics import RoutingStatistics

Slots = NDArray[np.int32]

# Time of a token's visit of a rank, in units of the time of an expert for a token.
TRAFFIC = 0.2
# Most windows in a decision.
MOST_WINDOWS = 64


def rebalance_experts(
    weight: ArrayLike,
    num_replicas: int,
    num_groups: int | None,
    num_nodes: int,
    num_ranks: int,
    old_map: ArrayLike | None = None,
    *,
    budget: int | None = None,
    dead_zone: float = DEAD_ZONE,
    deviations: float = DEVIATIONS,
    profile: RoutingStatistics | None = None,
    traffic: float = TRAFFIC,
    dead: Collection[int] = (),
) -> NDArray[np.int64]:
    """Return the expert of every slot [L,P] for live loads, as engines ask for it.

    The answer is a function of the arguments alone, on every rank. No rank gets two copies of an
    expert, unless it has more slots than there are experts. Copies that stay on a rank keep their
    slots.

    Parameters
    ----------
    weight
        Tokens per expert [L,E], or in windows [W,L,E], in any unit.
    num_replicas
        Slots of a layer, P: as many on every rank.
    num_groups
        Groups of experts that the router chooses among; None or 1 where it does not.
    num_nodes
        Nodes of ``num_ranks / num_nodes`` ranks. Where they divide the groups, every group is on
        one node, as in the engines' hierarchical policy, whatever that takes.
    num_ranks
        Ranks: slot p is on rank ``p // (P / num_ranks)``.
    old_map
        Experts in the running slots [L,P]; -1 is an empty slot. If it has another width, ranks
        were added or removed at the end. By default all slots are empty.
    budget
        Most copies that may move; by default as many as are worth their gain.
    dead_zone
        A layer stays as it is unless its slowest rank gains more than this share of its time.
    deviations
        The gain of a layer must also exceed chance. Counts scatter by so many of their standard
        deviations; only larger differences between ranks are expected to last. 0 takes any gain.
    profile
        Statistics with co-activation, of similar traffic: then a token's visits count as well.
    traffic
        Time of a token's visit of a rank, in units of the time of an expert for a token.
    dead
        Lost ranks: their slots are -1 in the answer, and their experts go to the others, whatever
        the budget is. Nodes and groups do not count then, as the remaining ranks are uneven.

    Raises
    ------
    ValueError
        If sizes do not fit one another, or a load makes no sense.

    Examples
    --------
    >>> from moetuner.plugins import rebalance_experts
    >>> rebalance_experts([[8, 1, 1, 2]], 6, None, 1, 2).tolist()
    [[0, 1, 3, 0, 2, 3]]
    """
    # Where a profile has fewer layers, those without load are dense.
    case = Case.from_arguments(
        weight, num_replicas, num_groups, num_nodes, num_ranks, old_map, sparse=()
    )
    limits = MoveLimits(budget, dead_zone, deviations, traffic)
    layers, ranks, width = case.slots.shape
    lost = chosen("dead", dead, ranks, "ranks")
    if not lost.any():
        return case.make_map(case.rebalance(limits, profile).slots)
    # Decide on the map of the ranks that are not lost.
    running = case.slots[:, ~lost].reshape(layers, -1)
    slots = running.shape[1]
    if slots < case.experts:
        raise ValueError(
            f"dead must leave a slot for each of {case.experts} experts, got {slots} slots"
        )
    survivors = ranks - int(lost.sum())
    case = Case.from_arguments(weight, slots, None, 1, survivors, running, sparse=())
    answer = np.full((layers, ranks, width), EMPTY, dtype=np.int64)
    served = case.make_map(case.rebalance(limits, profile).slots)
    answer[:, ~lost] = served.reshape(layers, -1, width)
    return answer.reshape(layers, -1)


@dataclass(frozen=True)
class MoveLimits:
    """Limits of moves for live loads; arguments of ``rebalance_experts``."""

    budget: int | None = None
    dead_zone: float = DEAD_ZONE
    deviations: float = DEVIATIONS
    traffic: float = TRAFFIC

    def __post_init__(self) -> None:
        if self.budget is not None:
            at_least("budget", self.budget, 0)
        for name in ("dead_zone", "deviations", "traffic"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Case:
    """The checked arguments of a decision: loads [W,L,E], running slots [L,D,S], groups, nodes.

    ``runs`` says whether any expert runs. In ``fresh`` layers [L] no load has shaped the slots:
    they are an engine's initial map, that of other ranks, or have an empty slot. ``sparse`` are the
    layers with experts if the engine counts dense ones, too, and empty if only loads tell which;
    None for an engine that counts no dense layers.
    """

    windows: NDArray[np.float64]
    slots: Slots
    runs: bool
    fresh: NDArray[np.bool_]
    groups: int
    nodes: int
    sparse: NDArray[np.intp] | None = None

    @classmethod
    def from_arguments(
        cls,
        weight: ArrayLike,
        num_replicas: int,
        num_groups: int | None,
        num_nodes: int,
        num_ranks: int,
        old_map: ArrayLike | None,
        sparse: Sequence[int] | None = None,
    ) -> Case:
        """Make a case from arguments of ``rebalance_experts``; raise for wrong ones."""
        windows = numbers_in("weight", join_windows(array_in("weight", weight)))
        if not (np.isfinite(windows).all() and (windows >= 0).all()):
            raise ValueError("weight must be finite and at least 0")
        whole_number("num_replicas", num_replicas, highest=SLOT_LIMIT)
        whole_number("num_ranks", num_ranks, highest=DEVICE_LIMIT)
        whole_number("num_nodes", num_nodes)
        _, layers, experts = windows.shape
        if num_replicas % num_ranks or num_replicas < experts:
            raise ValueError(
                f"num_replicas must be a multiple of num_ranks ({num_ranks}) and at least the "
                f"{experts} experts, got {num_replicas}"
            )
        shape = (layers, num_ranks, num_replicas // num_ranks)
        slots, fresh = _read_running(old_map, shape, experts)
        # Configurations of models without groups say 0 as well.
        groups = max(int(num_groups or 1), 1)
        nodes = count_nodes(groups, experts, num_nodes, num_ranks)
        layers_with_experts = None if sparse is None else np.array(sparse, dtype=np.intp)
        runs = bool((slots >= 0).any())
        return cls(windows, slots, runs, fresh, groups, nodes, layers_with_experts)

    @property
    def load(self) -> NDArray[np.float64]:
        """Tokens over all windows [L,E]."""
        total: NDArray[np.float64] = self.windows.sum(axis=0)
        return total

    @property
    def experts(self) -> int:
        """Number of experts of a layer."""
        return int(self.windows.shape[2])

    def make_map(self, slots: Slots) -> NDArray[np.int64]:
        """Return slots [L,D,S] as a map [L,P] for engines, with all slots full."""
        full = slots.reshape(len(slots), -1).astype(np.int64)
        old, width = self.slots.reshape(full.shape), slots.shape[2]
        for layer, slot in np.argwhere(full == EMPTY):
            # The rank holds all experts that it may: it gets one more copy of the expert with the
            # fewest copies there, preferably of one that it did not hold before.
            row = slice(slot // width * width, slot // width * width + width)
            experts_on_rank = full[layer, row]
            copies = np.bincount(experts_on_rank[experts_on_rank >= 0], minlength=self.experts)
            had = np.isin(np.arange(self.experts), old[layer, row])
            full[layer, slot] = np.lexsort((had, copies, copies == 0))[0]
        return full

    def balancedness(self, slots: Slots) -> float | None:
        """Return mean / slowest rank of the loads, summed over layers; None without loads."""
        busiest = slowest(self.load[None], slots).sum()
        if busiest == 0 or not find_holders(slots, self.experts).any(axis=1).all():
            return None
        return float(self.load.sum() / (slots.shape[1] * busiest))

    def imbalance(self, slots: Slots) -> NDArray[np.float64]:
        """Return slowest rank / mean of the loads, of each layer with load; empty without any."""
        used = self.load.any(axis=1)
        if not used.any() or not find_holders(slots, self.experts).any(axis=1).all():
            return np.empty(0)
        mean = self.load[used].sum(axis=1) / slots.shape[1]
        busiest: NDArray[np.float64] = slowest(self.load[None], slots)[used] / mean
        return busiest

    def copies_moved(self, slots: Slots) -> int:
        """Count the experts that come to a rank which does not hold them yet."""
        before, after = (find_holders(table, self.experts) for table in (self.slots, slots))
        return compare_holders(before, after, None, None).experts_moved

    def rebalance(self, limits: MoveLimits, profile: RoutingStatistics | None = None) -> Rebalanced:
        """Relieve the slowest ranks; with a profile, keep experts of the same tokens together."""
        pairs = None if profile is None else self.weigh_pairs(profile, limits.traffic)
        budget = self.slots.size if limits.budget is None else min(limits.budget, self.slots.size)
        if self.nodes > 1:
            return self._rebalance_nodes(budget, pairs, limits)
        return rebalance(
            self.windows,
            self.slots,
            budget=budget,
            dead_zone=limits.dead_zone,
            deviations=limits.deviations,
            fresh=self.fresh,
            pairs=pairs,
        )

    def _rebalance_nodes(self, budget: int, pairs: Pairs | None, limits: MoveLimits) -> Rebalanced:
        """Rebalance every node by itself, with the groups of experts that are on it."""
        layers, ranks, width = self.slots.shape
        nodes = self.nodes
        # Without load nothing moves, if all experts are there, and no rank lacks what it may hold.
        holders = find_holders(self.slots, self.experts)
        idle = ~self.load.any(axis=1) & np.all(holders.any(axis=1), axis=1)
        idle &= np.all(holders.sum(axis=2) >= min(width, self.experts // nodes), axis=1)
        idle &= np.all(self.slots != EMPTY, axis=(1, 2))
        if idle.all():
            none = np.zeros(layers)
            return Rebalanced(self.slots, none, none, none.astype(np.int64))
        anew = choose_repacked(self.fresh, self.slots, budget)
        homes = np.where(anew[:, None, None], EMPTY, self.slots)
        experts = assign_nodes(
            self.load,
            homes,
            self.groups,
            nodes,
            budget=budget,
            dead_zone=limits.dead_zone,
            deviations=limits.deviations,
        )
        # The experts of every node [L*N,E/N], where there is load.
        busy = np.repeat(~idle, nodes)
        experts = experts.reshape(layers * nodes, -1)[busy]
        row = np.repeat(np.arange(layers), nodes)[busy]
        number = np.arange(len(experts))[:, None]
        # Numbers of experts within their node; experts of other nodes and empty slots have none.
        local = np.full((len(experts), self.experts + 1), EMPTY, dtype=np.int32)
        local[number, experts] = np.arange(experts.shape[1])
        slots = self.slots.reshape(layers * nodes, ranks // nodes, width)
        if pairs is not None:
            pairs_on_nodes = row[:, None, None], experts[:, :, None], experts[:, None, :]
            pairs = Pairs(pairs.counts[pairs_on_nodes], pairs.cost[row])
        balanced = rebalance(
            np.ascontiguousarray(self.windows[:, row[:, None], experts]),
            local[number[:, :, None], slots[busy]],
            budget=budget,
            dead_zone=limits.dead_zone,
            deviations=limits.deviations,
            fresh=anew[row],
            pairs=pairs,
        )
        # Back from numbers within a node to numbers of experts.
        global_ids = experts[number[:, :, None], balanced.slots]
        slots = slots.copy()
        slots[busy] = np.where(balanced.slots == EMPTY, EMPTY, global_ids)
        figures = np.zeros((3, layers * nodes))
        figures[:, busy] = balanced.before, balanced.after, balanced.moves
        before, after, moves = figures.reshape(3, layers, nodes)
        return Rebalanced(
            slots.reshape(self.slots.shape),
            before.max(axis=1),
            after.max(axis=1),
            moves.sum(axis=1).astype(np.int64),
        )

    def weigh_pairs(self, profile: RoutingStatistics, traffic: float) -> Pairs:
        """Return the pairs of a profile, with their cost for the case's loads."""
        if profile.coactivation is None:
            raise ValueError("the profile has no co-activation: count it from a trace")
        if profile.num_experts != self.experts:
            raise ValueError(
                f"the profile has {profile.num_experts} experts a layer, and the engine "
                f"{self.experts}"
            )
        layers, ranks, _ = self.slots.shape
        counts = np.zeros((layers, self.experts, self.experts), dtype=np.uint64)
        cost = np.zeros(layers)
        if not self.load.any():
            return Pairs(counts, cost)
        rows = self.find_rows(profile.layers, "the profile")
        load, pairs = profile.total_load.sum(axis=1, dtype=np.float64), profile.coactivation
        twice = pairs.sum(axis=(1, 2), dtype=np.float64)
        # If K experts are on one rank instead of K ranks, K (K - 1) / 2 pairs save K - 1 visits.
        saved = load / np.maximum(load + twice, 1.0)
        live = self.load.sum(axis=1)[rows]
        cost[rows] = traffic * 2 * saved / ranks * live / np.maximum(load, 1.0)
        counts[rows] = pairs
        return Pairs(counts, cost)

    def find_rows(self, layers: int, what: str) -> NDArray[np.intp]:
        """Return the numbers of the engine's layers with experts; it may count dense ones too.

        ``what`` names what has ``layers`` layers, for errors.
        """
        counted = len(self.slots)
        if layers == counted:
            return np.arange(counted)
        text = f"{what} has {layers} layers, but the engine has {counted}"
        if self.sparse is None:
            raise ValueError(text)
        sparse = self.sparse if self.sparse.size else np.flatnonzero(self.load.any(axis=1))
        if len(sparse) != layers:
            with_experts = f"{len(sparse)} have experts" if sparse.size else "no load tells which"
            raise ValueError(f"{text}, of which {with_experts}")
        return sparse


def join_windows(weight: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return at most ``MOST_WINDOWS`` windows [W,L,E] with load, of loads [L,E] or [W,L,E].

    Neighbours are added up if there are more. Without any load one window is returned.
    """
    windows = weight[None] if weight.ndim == 2 else weight
    if windows.ndim != 3 or windows.size == 0:
        raise ValueError(
            "weight must be [layers, experts] or [windows, layers, experts], none of them zero, "
            f"got {list(weight.shape)}"
        )
    used = windows[windows.any(axis=(1, 2))] if len(windows) > 1 else windows
    if not len(used):
        return windows[:1]
    if len(used) <= MOST_WINDOWS:
        return used
    begin = np.arange(MOST_WINDOWS) * len(used) // MOST_WINDOWS
    # In floats, which do not wrap; they are exact up to 2**53 tokens.
    joined: NDArray[np.generic] = np.add.reduceat(used, begin, axis=0, dtype=np.float64)
    return joined


def _read_running(
    old_map: ArrayLike | None, shape: tuple[int, int, int], experts: int
) -> tuple[Slots, NDArray[np.bool_]]:
    """Return the running slots [L,D,S] on the current ranks, and which layers [L] are fresh."""
    layers, slots = shape[0], np.full((shape[0], shape[1] * shape[2]), EMPTY, dtype=np.int32)
    old = slots if old_map is None else np.asarray(old_map)
    if old.ndim != 2 or len(old) != layers or old.dtype.kind not in "iu":
        raise ValueError(
            f"old_map must be integers [{layers}, slots], got {old.dtype} {list(old.shape)}"
        )
    # Ranks are added and removed at the end, so the other slots keep their numbers.
    same = min(old.shape[1], slots.shape[1])
    slots[:, :same] = np.where((old >= 0) & (old < experts), old, EMPTY)[:, :same]
    in_order = np.all(slots == np.arange(slots.shape[1]) % experts, axis=1)
    fresh = in_order | np.any(slots == EMPTY, axis=1) | (old.shape[1] != slots.shape[1])
    return slots.reshape(shape), fresh
