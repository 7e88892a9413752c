"""Plan which copies move when devices are lost, removed or added.

Copies go where the live policy would put them (`rebalancing`), so a plan that was made in advance
is what the policy would decide. The devices that serve afterwards may be unevenly spread over
nodes, so nodes do not count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moetuner import _checks as check
from moetuner.evaluation.losses import DOMAINS, Domain, number_domains
from moetuner.frozen import Frozen
from moetuner.placement import EMPTY, Placement, count_copies
from moetuner.recording import labelling
from moetuner.solver.arrays import Bools, Floats, Integers, Slots
from moetuner.solver.rebalancing import rebalance, slowest
from moetuner.statistics import WINDOW, RoutingStatistics, check_recording, count_loads
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

# Source of a copy whose expert is on no device any more.
DISK = -1
# Largest number of windows, evenly spaced, that a search balances one by one.
SEARCHED_WINDOWS = 16
# Columns of the table of steps.
COLUMNS = ("layer", "expert", "source", "target", "slot", "batch")


@dataclass(frozen=True)
class _Service:
    """A placement that serves windows of load [W,L,E] on a machine, if that is known."""

    placement: Placement
    windows: Floats
    topology: Topology | None

    @cached_property
    def speed(self) -> Floats:
        """Speeds of devices [D]."""
        if self.topology is None:
            return np.ones(self.placement.devices)
        return self.topology.speed_of_device

    @cached_property
    def load(self) -> Floats:
        """Load of every expert over all windows [L,E]."""
        load: Floats = self.windows.sum(axis=0)
        return load

    @cached_property
    def imbalance(self) -> float:
        """The slowest device's time over that of an even load, on average."""
        return _imbalance(self.windows, self.placement.slots, self.speed)


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Frozen):
    """A placement for the devices that serve after a change, and the steps to it.

    Parameters
    ----------
    slots
        Expert ids [L,D,S] by today's numbers of devices, added ones last; -1 on devices that serve
        no longer.
    devices
        Numbers of the devices that serve [D'], ascending: device d of ``placement`` is
        ``devices[d]``.
    lost
        Number of experts of every layer that no device holds any more, so that they are read from
        disk [L].
    steps
        Layer, expert, source device (-1: disk), target device, its slot, and batch of every copy
        that moves [M,6], in an order in which no expert loses its last copy. The steps of a batch,
        mostly one, are taken at once.
    imbalance_before, imbalance_after
        Slowest device's time over that of an even load, averaged over layers and windows: of the
        running placement on all its devices, and of the plan.

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
    devices: Integers
    lost: Integers
    steps: Integers
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
    retire: Collection[int] = (),
    fewer: int = 0,
    join: int = 0,
    slots_per_device: int | None = None,
    more_copies: int | None = None,
    topology: Topology | None = None,
    window: int | None = WINDOW,
) -> Plan:
    """Return a placement for the devices that serve after a change, with few copies moved.

    Copies that must move go where the sum of all windows wants them. If more may move, a search of
    single windows is tried, too, and the placement that is more even in windows is returned.

    Parameters
    ----------
    running
        The placement that runs.
    traffic
        Traffic of the same experts: copies are given up, and placed, by its loads.
    without
        Devices that are lost: no copy can be read from them.
    retire
        Devices to remove. They serve, and copies are read from them, until the steps are done.
    fewer
        Number of further devices to remove, likewise: those whose removal moves the fewest copies,
        then those with the least load.
    join
        Number of devices to add, with as many slots as the others.
    slots_per_device
        Slots of a device in a layer from now on, where the devices that serve have too few for all
        experts. By default as many as now.
    more_copies
        Most copies to move beyond those that must move. By default none if devices are lost or
        removed, and as many as gain something if devices are added.
    topology
        The machine of ``running``: speeds of its devices, and the nearest source of a copy.
    window
        Tokens of a trace whose load is balanced together; None for all of it. Counts bring their
        windows.

    Raises
    ------
    ValueError
        If a device does not exist, or the devices that serve have fewer slots than experts.

    Examples
    --------
    >>> import moetuner as mt
    >>> running = mt.Placement([[[0, 1], [2, 0], [3, 1]]])
    >>> plan = mt.plan(running, mt.RoutingStatistics([[[4, 3, 2, 1]]]), without=[1])
    >>> plan.steps.tolist()  # layer, expert, from (-1: disk), to, slot, batch
    [[0, 2, -1, 0, 1, 0]]
    """
    check.instance("running", running, Placement)
    windows = _read_load(running, traffic, window)
    if slots_per_device is not None:
        running = _widen(running, slots_per_device)
    lost = check.chosen("without", without, running.devices)
    named = check.chosen("retire", retire, running.devices)
    if (lost & named).any():
        raise check.ArgumentError(
            f"retire must name devices that are not lost, got {np.flatnonzero(lost & named)[0]}",
            "retire",
        )
    removed = _choose_removed(running, windows.sum(axis=0), lost, named, fewer)
    check.whole_number("join", join, lowest=0, highest=check.DEVICE_LIMIT - running.devices)
    if more_copies is not None:
        check.whole_number("more_copies", more_copies, lowest=0)
    _check_machine(running, topology)
    return _plan(_Service(running, windows, topology), lost, removed, join, more_copies)


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
    _check_machine(running, topology)
    service = _Service(running, _read_load(running, traffic, window), topology)
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


def _check_machine(running: Placement, topology: Topology | None) -> None:
    """Raise if a machine is given and is not that of the placement."""
    if topology is None:
        return
    check.instance("topology", topology, Topology)
    if topology.devices != running.devices:
        raise check.ArgumentError(
            f"topology must have {running.devices} devices like running, got {topology.devices}",
            "topology",
        )


def _read_load(
    running: Placement, traffic: RoutingTrace | RoutingStatistics, window: int | None
) -> Floats:
    """Return the load of every expert in windows [W,L,E]; check that they are the placement's."""
    check_recording(traffic)
    window = check.window_in(window)
    # Windows of all tokens, whatever their groups, as they are evaluated.
    counted = count_loads(traffic, window=window, by_group=False)
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


def _widen(running: Placement, slots_per_device: int) -> Placement:
    """Return a placement with more slots on every device; those that are new are empty, and last.

    Experts keep their slots, which steps name.
    """
    fewest = running.slots_per_device
    limit = max(fewest, running.num_experts)
    check.whole_number("slots_per_device", slots_per_device, lowest=fewest, highest=limit)
    added = ((0, 0), (0, 0), (0, slots_per_device - fewest))
    slots = np.pad(running.slots, added, constant_values=EMPTY)
    return Placement(slots, num_experts=running.num_experts)


def _choose_removed(
    running: Placement, load: Floats, lost: Bools, named: Bools, number: int
) -> Bools:
    """Return which devices are removed [D]: those that are named, and a number of others.

    Greedily, the device is chosen next that holds the fewest experts which no other one holds. Then
    chosen devices are exchanged for others as long as fewer copies have to move.
    """
    stays = ~(lost | named)
    check.whole_number("fewer", number, lowest=0, highest=max(int(stays.sum()) - 1, 0))
    holders = running.held & ~lost[:, None]
    copies = holders.sum(axis=1)
    tokens = (holders * (load / np.maximum(copies, 1))[:, None]).sum(axis=(0, 2))
    known: list[int] = np.flatnonzero(named).tolist()
    chosen: list[int] = []

    def cost(devices: list[int]) -> tuple[int, float]:
        """Return the experts that no other device holds, and the tokens that devices serve.

        Devices that are named leave, too.
        """
        copies_removed = holders[:, [*known, *devices]].sum(axis=1)
        must_move = (copies_removed == copies) & (copies > 0)
        return int(must_move.sum()), float(tokens[devices].sum())

    def others() -> list[int]:
        """Return the devices that stay and are not chosen."""
        return [device for device in np.flatnonzero(stays).tolist() if device not in chosen]

    for _ in range(number):
        chosen.append(min(others(), key=lambda device: cost([*chosen, device])))
    is_better = number > 1
    while is_better:
        is_better = False
        for place in range(number):
            rest = chosen[:place] + chosen[place + 1 :]
            options = [[*rest, device] for device in others()]
            best = min(options, key=cost)
            if cost(best) < cost(chosen):
                chosen, is_better = best, True
    removed = named.copy()
    removed[chosen] = True
    return removed


def _plan(
    service: _Service, lost: Bools, removed: Bools, join: int, more_copies: int | None
) -> Plan:
    """Place missing experts, and as many more copies as gain something and are allowed."""
    running, windows = service.placement, service.windows
    width, experts = running.slots_per_device, running.num_experts
    added = np.full((running.layers, join, width), EMPTY, dtype=np.int32)
    before = np.concatenate([running.slots, added], axis=1)
    before[:, np.flatnonzero(lost)] = EMPTY
    serves = np.concatenate([~(lost | removed), np.ones(join, dtype=bool)])
    number = int(serves.sum())
    if number * width < experts:
        wider = f", or slots_per_device={-(-experts // number)}" if number else ""
        raise check.ArgumentError(
            f"devices must have a slot for each of {experts} experts: at least "
            f"{-(-experts // width)} devices of {width} slots{wider}, got {number}",
            "slots_per_device",
        )
    start = np.ascontiguousarray(before[:, serves])
    speed = np.concatenate([service.speed, np.ones(join)])
    time = speed[serves].min() / speed[serves]
    budget = 0
    if more_copies is None and join:
        budget = start.size
    elif more_copies:
        budget = int((count_copies(start, experts) == 0).sum()) + more_copies
    slots = np.full(before.shape, EMPTY, dtype=np.int32)
    # An empty slot is filled where that gains something, if more may move than must.
    end = rebalance(service.load, start, budget=budget, time=time, full=False).slots
    slots[:, serves] = _keep_copies(start, end)
    if budget and len(windows) > 1:
        chosen = labelling.evenly_spaced(len(windows), SEARCHED_WINDOWS)
        by_windows = rebalance(windows[chosen], start, budget=budget, time=time, full=False)
        other = _keep_copies(start, by_windows.slots)
        by_sum = _imbalance(windows, slots[:, serves], speed[serves])
        if by_windows.moves.sum() <= budget and _imbalance(windows, other, speed[serves]) < by_sum:
            slots[:, serves] = other
    serving = np.concatenate([~lost, np.zeros(join, dtype=bool)])
    return Plan(
        num_experts=experts,
        slots=slots,
        devices=np.flatnonzero(serves),
        lost=(count_copies(before, experts) == 0).sum(axis=1),
        steps=_order_steps(np.where(serving[:, None], before, EMPTY), slots, service.topology),
        imbalance_before=service.imbalance,
        imbalance_after=_imbalance(windows, slots[:, serves], speed[serves]),
    )


def _keep_copies(start: Slots, end: Slots) -> Slots:
    """Return the end slots [L,D,S]; an empty one keeps its copy if the device has no other one."""
    filled = np.where(end == EMPTY, start, end)
    for layer, device, slot in np.argwhere(filled != end):
        if filled[layer, device, slot] in end[layer, device]:
            filled[layer, device, slot] = EMPTY
    return filled


def _imbalance(windows: Floats, slots: Slots, speed: Floats) -> float:
    """Compute the slowest device's time over that of an even load.

    It is averaged over the layers and windows of loads [W,L,E] that are not empty.
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


def _order_steps(before: Slots, after: Slots, topology: Topology | None) -> Integers:
    """Return steps [M,6] between slots [L,D,S], ordered so that no expert loses its last copy."""
    experts = int(max(before.max(), after.max())) + 1
    distance = np.zeros((before.shape[1],) * 2)
    if topology is not None:
        number = topology.devices
        distance[:number, :number] = topology.tier if topology.link_cost is None else topology.cost
    copies = count_copies(before, experts)
    arrives = (after != before) & (after != EMPTY)
    steps, batch = [], 0
    for layer in np.flatnonzero(arrives.any(axis=(1, 2))).tolist():
        arriving = np.argwhere(arrives[layer])
        order = _Order(before[layer], after[layer], arriving, copies[layer], distance)
        for exchange in order.batches():
            steps += [(layer, *step, batch) for step in exchange]
            batch += 1
    return np.array(steps, dtype=np.int64).reshape(-1, len(COLUMNS))


Place = tuple[int, int]
Step = tuple[int, int, int, int]


class _Order:
    """The steps of one layer that are still to take, and the slots after those that were taken.

    Parameters
    ----------
    now, end
        Expert ids [D,S] of the layer, before and after all steps.
    arriving
        Device and slot of every copy that arrives [M,2].
    copies
        Copies of every expert that serve before the steps [E].
    distance
        Distance from device to device [D,D].
    """

    def __init__(
        self, now: Slots, end: Slots, arriving: Integers, copies: Integers, distance: Floats
    ) -> None:
        self.now, self.end, self.distance = now.copy(), end, distance
        self.copies = copies.copy()
        places: list[Place] = [(device, slot) for device, slot in arriving.tolist()]
        # Experts that no device serves come first.
        self.remaining = sorted(places, key=lambda place: self.copies[end[place]] > 0)

    def batches(self) -> Iterator[list[Step]]:
        """Yield steps to take at once: expert, source and target device, and its slot."""
        while self.remaining:
            blocked = []
            for place in self.remaining:
                if self._is_spare(place):
                    yield self._take([place])
                else:
                    blocked.append(place)
            is_stuck = len(blocked) == len(self.remaining)
            self.remaining = blocked
            if is_stuck:
                circle = self._find_circle()
                self.remaining = [place for place in self.remaining if place not in circle]
                yield self._take(circle)

    def _is_spare(self, place: Place) -> bool:
        """Return whether a slot is empty, or its expert has another copy that serves."""
        overwritten = self.now[place]
        return bool(overwritten == EMPTY or self.copies[overwritten] > 1)

    def _find_circle(self) -> list[Place]:
        """Return steps each of which overwrites the last copy of what the next one moves."""
        brings = {int(self.end[place]): place for place in reversed(self.remaining)}
        path: deque[Place] = deque([self.remaining[0]])
        while True:
            following = brings[int(self.now[path[-1]])]
            if following in path:
                while path[0] != following:
                    path.popleft()
                return list(path)
            path.append(following)

    def _take(self, places: list[Place]) -> list[Step]:
        """Take a step, or all steps of an exchange at once, and return them."""
        steps = []
        for device, slot in places:
            expert = int(self.end[device, slot])
            source = DISK
            if self.copies[expert]:
                sources = np.flatnonzero((self.now == expert).any(axis=1))
                source = int(sources[self.distance[sources, device].argmin()])
            steps.append((expert, source, device, slot))
        for place in places:
            overwritten, self.now[place] = self.now[place], EMPTY
            if overwritten != EMPTY:
                self.copies[overwritten] -= 1
        for place in places:
            self.copies[self.end[place]] += 1
            self.now[place] = self.end[place]
        return steps
