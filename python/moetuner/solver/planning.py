"""plan(): what a running placement becomes when devices are lost, leave or come.

Copies come where the live policy would bring them (`rebalancing`), so a plan that is looked up is
what the policy would decide. What is left of a machine may be uneven, so nodes do not count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner.evaluation.losses import DOMAINS, Domain, number_domains
from moetuner.frozen import Frozen
from moetuner.placement import EMPTY, Placement, count_copies
from moetuner.solver.rebalancing import rebalance, slowest
from moetuner.statistics import WINDOW, RoutingStatistics, as_counts, check_recording
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

Slots = NDArray[np.int32]
# Where a copy comes from if no device holds the expert any more.
DISK = -1
# Windows at most, at even distances, that a search sees one by one.
SEARCHED = 16
# What a step says, in this order.
COLUMNS = ("layer", "expert", "source", "target", "slot", "batch")


@dataclass(frozen=True)
class _Service:
    """A placement that serves windows of load [W,L,E] on a machine, if that is known."""

    placement: Placement
    windows: NDArray[np.float64]
    topology: Topology | None

    @cached_property
    def speed(self) -> NDArray[np.float64]:
        """Speeds of devices [D]."""
        if self.topology is None:
            return np.ones(self.placement.devices)
        return self.topology.speed_of_device

    @cached_property
    def load(self) -> NDArray[np.float64]:
        """Load of every expert over all windows [L,E]."""
        load: NDArray[np.float64] = self.windows.sum(axis=0)
        return load

    @cached_property
    def imbalance(self) -> float:
        """Slowest device's time over that of even ones."""
        return _imbalance(self.windows, self.placement.slots, self.speed)


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Frozen):
    """A placement for the devices that are left or came, and how to get there.

    Parameters
    ----------
    slots
        Expert ids [L,D,S] by the numbers that devices have now, those that come last; -1 on devices
        that are gone.
    devices
        Numbers of the devices that serve [D'], rising: device d of ``placement`` is ``devices[d]``.
    lost
        Experts of every layer that no device holds any more, so that they are read from disk [L].
    steps
        Layer, expert, device from (-1: disk), device to, its slot, and batch of each copy that is
        brought [M,6], in an order in which no expert that is served loses its last copy. The steps
        of a batch, mostly one, are exchanged at once.
    imbalance_before, imbalance_after
        Busiest device / mean device, mean of layers and windows: of what ran on all its devices,
        and of the plan.

    Examples
    --------
    >>> import moetuner as mt
    >>> running = mt.Placement([[[0, 1, 2], [2, 3, 0], [1, 3, 0]]])
    >>> plan = mt.plan(running, mt.RoutingStatistics([[[4, 3, 2, 1]]]), without=[1])
    >>> plan.placement.slots.tolist()
    [[[0, 1, 2], [1, 3, 0]]]
    >>> len(plan.steps)
    0
    """

    num_experts: int
    slots: Slots
    devices: NDArray[np.int64]
    lost: NDArray[np.int64]
    steps: NDArray[np.int64]
    imbalance_before: float
    imbalance_after: float

    @property
    def placement(self) -> Placement:
        """The placement on the devices that serve, numbered anew in their order."""
        return Placement(self.slots[:, self.devices], num_experts=self.num_experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values: the map [L,P] of all slots, and the steps."""
        layers = len(self.slots)
        return {
            "devices": self.devices.tolist(),
            "experts_from_disk": int(self.lost.sum()),
            "copies": len(self.steps),
            "imbalance_before": self.imbalance_before,
            "imbalance_after": self.imbalance_after,
            "physical_to_logical_map": self.slots.reshape(layers, -1).tolist(),
            "columns": list(COLUMNS),
            "steps": self.steps.tolist(),
        }


def plan(
    running: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    *,
    without: Collection[int] = (),
    retire: int = 0,
    join: int = 0,
    more_copies: int | None = None,
    topology: Topology | None = None,
    window: int | None = WINDOW,
) -> Plan:
    """Return the placement for the devices that are left or came, by few copies brought.

    What must move goes where all loads together ask for it. Where more may move, a search of single
    windows is tried as well; of both the placement that is more even in windows is taken.

    Parameters
    ----------
    running
        The placement that runs.
    traffic
        Traffic of the same experts: its loads say where copies are missed least.
    without
        Devices that are lost: nothing can be read from them any more.
    retire
        How many devices are to leave: those whose leave brings the fewest copies, then those with
        the least load. They serve, and give what they hold, until the steps are done.
    join
        How many devices come, with as many slots each as one has now.
    more_copies
        Most copies to move beyond those that must move. By default none where devices are lost or
        leave, and as many as gain something where devices come.
    topology
        The machine of ``running``: devices of other speeds, and from where a copy comes soonest.
    window
        Tokens of a trace whose load is balanced together; None for all of it. Counts bring their
        windows.

    Raises
    ------
    ValueError
        If a device does not exist, or the slots that are left are fewer than the experts.

    Examples
    --------
    >>> import moetuner as mt
    >>> running = mt.Placement([[[0, 1], [2, 0], [3, 1]]])
    >>> plan = mt.plan(running, mt.RoutingStatistics([[[4, 3, 2, 1]]]), without=[1])
    >>> plan.steps.tolist()  # layer, expert, from (-1: disk), to, slot, batch
    [[0, 2, -1, 0, 1, 0]]
    """
    check.instance("running", running, Placement)
    windows = _read_load(running, traffic, check.window_in(window))
    lost = check.chosen("without", without, running.devices)
    leaving = _choose_leaving(running, windows.sum(axis=0), lost, retire)
    check.whole_number("join", join, lowest=0, highest=check.DEVICE_LIMIT - running.devices)
    if more_copies is not None:
        check.whole_number("more_copies", more_copies, lowest=0)
    if topology is not None:
        _check_machine(running, topology)
    service = _Service(running, windows, topology)
    return _plan(service, lost, leaving, join, more_copies)


def plan_losses(
    running: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    domain: Domain = "device",
    *,
    topology: Topology | None = None,
    window: int | None = WINDOW,
    progress: Callable[[float], None] | None = None,
) -> dict[int, Plan]:
    """Return a plan for the loss of every device, or node, by its number.

    A loss that leaves fewer slots than there are experts has no plan. ``progress`` gets the share
    of the losses that are planned.

    Examples
    --------
    >>> import moetuner as mt
    >>> running = mt.Placement([[[0, 1], [2, 0], [3, 1]]])
    >>> plans = mt.plan_losses(running, mt.RoutingStatistics([[[4, 3, 2, 1]]]))
    >>> {device: int(plan.lost.sum()) for device, plan in plans.items()}
    {0: 0, 1: 1, 2: 1}
    """
    check.instance("running", running, Placement)
    check.one_of("domain", domain, DOMAINS)
    check.callable_or_none("progress", progress)
    if topology is not None:
        _check_machine(running, topology)
    windows = _read_load(running, traffic, check.window_in(window))
    service = _Service(running, windows, topology)
    member = number_domains(topology or Topology(running.devices), domain)
    plans, numbers = {}, int(member.max()) + 1
    for number in range(numbers):
        lost = member == number
        if (~lost).sum() * running.slots_per_device >= running.num_experts:
            none = np.zeros_like(lost)
            plans[number] = _plan(service, lost, none, 0, None)
        if progress is not None:
            progress((number + 1) / numbers)
    return plans


def _check_machine(running: Placement, topology: Topology) -> None:
    check.instance("topology", topology, Topology)
    if topology.devices != running.devices:
        raise check.ArgumentError(
            f"topology must have {running.devices} devices like running, got {topology.devices}",
            "topology",
        )


def _read_load(
    running: Placement, traffic: RoutingTrace | RoutingStatistics, window: int | None
) -> NDArray[np.float64]:
    """Return tokens of every expert in windows [W,L,E], checked to be of a placement's experts."""
    check_recording(traffic)
    # Windows of all tokens, whatever their groups, as they are evaluated.
    loads_alone = {"sets": False, "transitions": False, "coactivation": False}
    counted = as_counts(traffic, window=window, by_group=False, **loads_alone)
    load = counted.window_load.astype(np.float64)
    if counted.is_full_window.any():  # the last tokens, which fill no window, are in no mean
        load = load[counted.is_full_window]
    if load.shape[1:] != (running.layers, running.num_experts):
        raise check.ArgumentError(
            f"traffic must have {running.layers} layers of {running.num_experts} experts like "
            f"running, got {load.shape[1]} of {load.shape[2]}",
            "traffic",
        )
    return load


def _choose_leaving(
    running: Placement, load: NDArray[np.float64], lost: NDArray[np.bool_], number: int
) -> NDArray[np.bool_]:
    """Return which devices leave [D], so many of those that are left.

    One after the other the device with the fewest experts that nobody else holds; then each is
    exchanged for another one, as long as fewer copies have to be brought.
    """
    check.whole_number("retire", number, lowest=0, highest=int((~lost).sum()) - 1)
    held = running.held & ~lost[:, None]
    copies = held.sum(axis=1)
    tokens = (held * (load / np.maximum(copies, 1))[:, None]).sum(axis=(0, 2))
    chosen: list[int] = []

    def cost(devices: list[int]) -> tuple[int, float]:
        gone = held[:, devices].sum(axis=1)
        return int(((gone == copies) & (copies > 0)).sum()), float(tokens[devices].sum())

    def others() -> list[int]:
        return [d for d in np.flatnonzero(~lost).tolist() if d not in chosen]

    for _ in range(number):
        chosen.append(min(others(), key=lambda device: cost([*chosen, device])))
    is_better = number > 1
    while is_better:
        is_better = False
        for at in range(number):
            rest = chosen[:at] + chosen[at + 1 :]
            options = [[*rest, device] for device in others()]
            best = min(options, key=cost)
            if cost(best) < cost(chosen):
                chosen, is_better = best, True
    leaving = np.zeros(running.devices, dtype=bool)
    leaving[chosen] = True
    return leaving


def _plan(
    service: _Service,
    lost: NDArray[np.bool_],
    leaving: NDArray[np.bool_],
    join: int,
    more_copies: int | None,
) -> Plan:
    """Bring what is missing, and as many copies more as gain something and are allowed."""
    running, windows = service.placement, service.windows
    width, experts = running.slots_per_device, running.num_experts
    coming = np.full((running.layers, join, width), EMPTY, dtype=np.int32)
    before = np.concatenate([running.slots, coming], axis=1)
    before[:, np.flatnonzero(lost)] = EMPTY
    stays = np.concatenate([~(lost | leaving), np.ones(join, dtype=bool)])
    if stays.sum() * width < experts:
        raise ValueError(
            f"devices must have a slot for each of {experts} experts: at least "
            f"{-(-experts // width)} devices of {width} slots, got {stays.sum()}"
        )
    start = np.ascontiguousarray(before[:, stays])
    speed = np.concatenate([service.speed, np.ones(join)])
    time = speed[stays].min() / speed[stays]
    budget = 0
    if more_copies is None and join:
        budget = start.size
    elif more_copies:
        budget = int((count_copies(start, experts) == 0).sum()) + more_copies
    slots = np.full(before.shape, EMPTY, dtype=np.int32)
    # An empty slot is filled where that gains something, if more may move than must.
    end = rebalance(service.load, start, budget=budget, time=time, full=False).slots
    slots[:, stays] = _keep_copies(start, end)
    if budget and len(windows) > 1:
        chosen = check.evenly_spaced(len(windows), SEARCHED)
        found = rebalance(windows[chosen], start, budget=budget, time=time, full=False)
        other = _keep_copies(start, found.slots)
        by_sum = _imbalance(windows, slots[:, stays], speed[stays])
        if found.moves.sum() <= budget and _imbalance(windows, other, speed[stays]) < by_sum:
            slots[:, stays] = other
    serving = np.concatenate([~lost, np.zeros(join, dtype=bool)])
    return Plan(
        num_experts=experts,
        slots=slots,
        devices=np.flatnonzero(stays),
        lost=(count_copies(before, experts) == 0).sum(axis=1),
        steps=_order_steps(np.where(serving[:, None], before, EMPTY), slots, service.topology),
        imbalance_before=service.imbalance,
        imbalance_after=_imbalance(windows, slots[:, stays], speed[stays]),
    )


def _keep_copies(start: Slots, end: Slots) -> Slots:
    """Return slots [L,D,S] in which what nothing replaces stays, unless its device has it."""
    kept = np.where(end == EMPTY, start, end)
    for layer, device, slot in np.argwhere(kept != end):
        if kept[layer, device, slot] in end[layer, device]:
            kept[layer, device, slot] = EMPTY
    return kept


def _imbalance(windows: NDArray[np.float64], slots: Slots, speed: NDArray[np.float64]) -> float:
    """Compute the slowest device's time over that of even ones.

    That is the mean of layers and windows, of loads [W,L,E], that have load.
    """
    even = windows.sum(axis=2) * speed.min() / speed.sum()
    if not even.any():
        return 1.0
    # The core adds up windows, each over its even load.
    shares = np.divide(
        windows, even[:, :, None], out=np.zeros_like(windows), where=even[:, :, None] > 0
    )
    summed = slowest(shares, np.ascontiguousarray(slots), time=speed.min() / speed)
    return float(summed.sum() / (even > 0).sum())


def _order_steps(before: Slots, after: Slots, topology: Topology | None) -> NDArray[np.int64]:
    """Return the steps [M,6] from slots [L,D,S] to others, in an order that keeps experts alive."""
    experts = int(max(before.max(), after.max())) + 1
    distance = np.zeros((before.shape[1],) * 2)
    if topology is not None:
        known = topology.devices
        distance[:known, :known] = topology.tier if topology.link_cost is None else topology.cost
    copies = count_copies(before, experts)
    is_brought = (after != before) & (after != EMPTY)
    steps, batch = [], 0
    for layer in np.flatnonzero(is_brought.any(axis=(1, 2))).tolist():
        brought = np.argwhere(is_brought[layer])
        order = _Order(before[layer], after[layer], brought, copies[layer], distance)
        for exchange in order.batches():
            steps += [(layer, *step, batch) for step in exchange]
            batch += 1
    return np.array(steps, dtype=np.int64).reshape(-1, len(COLUMNS))


Place = tuple[int, int]
Step = tuple[int, int, int, int]


class _Order:
    """The steps of one layer that are left, and what every slot holds by now."""

    def __init__(
        self,
        now: Slots,
        end: Slots,
        brought: NDArray[np.int64],
        copies: NDArray[np.int64],
        distance: NDArray[np.float64],
    ) -> None:
        self.now, self.end, self.distance = now.copy(), end, distance
        self.copies = copies.copy()
        places: list[Place] = [(device, slot) for device, slot in brought.tolist()]
        # What nobody serves comes first.
        self.left = sorted(places, key=lambda place: self.copies[end[place]] > 0)

    def batches(self) -> Iterator[list[Step]]:
        """Yield the steps that are taken at once: expert, device from and to, and its slot."""
        while self.left:
            blocked = []
            for place in self.left:
                if self._is_spare(place):
                    yield self._take([place])
                else:
                    blocked.append(place)
            is_stuck = len(blocked) == len(self.left)
            self.left = blocked
            if is_stuck:
                circle = self._find_circle()
                self.left = [place for place in self.left if place not in circle]
                yield self._take(circle)

    def _is_spare(self, place: Place) -> bool:
        """Return whether what is in a slot has another copy that serves, or is nothing."""
        gone = self.now[place]
        return bool(gone == EMPTY or self.copies[gone] > 1)

    def _find_circle(self) -> list[Place]:
        """Return steps each of which overwrites the last copy of what the next one brings."""
        brings = {int(self.end[place]): place for place in reversed(self.left)}
        path: deque[Place] = deque([self.left[0]])
        while True:
            following = brings[int(self.now[path[-1]])]
            if following in path:
                while path[0] != following:
                    path.popleft()
                return list(path)
            path.append(following)

    def _take(self, places: list[Place]) -> list[Step]:
        """Note what slots hold after a step, or after all of an exchange."""
        steps = []
        for device, slot in places:
            expert = int(self.end[device, slot])
            source = DISK
            if self.copies[expert]:
                sources = np.flatnonzero((self.now == expert).any(axis=1))
                source = int(sources[self.distance[sources, device].argmin()])
            steps.append((expert, source, device, slot))
        for place in places:
            gone, self.now[place] = self.now[place], EMPTY
            if gone != EMPTY:
                self.copies[gone] -= 1
        for place in places:
            self.copies[self.end[place]] += 1
            self.now[place] = self.end[place]
        return steps
