"""Compute lost experts and loads of a placement after the loss of a device, or a node.

Take an expert of load ``w`` and ``c`` copies, ``k`` of which are lost. With even shares each of the
other copies gets ``w (1 / (c - k) - 1 / c)`` more; a split that divides windows divides all tokens
anew. An expert whose copies are all lost has to be read from disk; until then no device serves its
tokens.
"""

from __future__ import annotations

import heapq
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import EMPTY, Placement, count_copies
from moetuner.serving.splits import RULES, Divide, Split
from moetuner.topology import Topology

Floats = NDArray[np.float64]
# Failure domain: the devices that are lost at once.
Domain = Literal["device", "node"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)


class Losses(NamedTuple):
    """Effects of the single losses of a failure domain.

    Parameters
    ----------
    domain, number
        The failure domain, and the number of such domains.
    fatal
        Share of the losses that lose an expert of some layer.
    experts_lost
        Experts of a layer that have to be read from disk after a loss, averaged over losses and
        layers.
    imbalance_after, imbalance_after_worst
        Busiest device after a loss / mean of the remaining ones, on the sum of all windows: average
        over losses and layers, and maximum. None where the nearest copy serves, for which there is
        no formula.
    worst_bound
        Lower bound of ``imbalance_after_worst`` of any placement in as many slots that loses no
        expert. None where it is at most 1, for nodes, for devices that differ in speed, and unless
        copies share evenly.
    """

    domain: Domain
    number: int
    fatal: float
    experts_lost: float
    imbalance_after: float | None
    imbalance_after_worst: float | None
    worst_bound: float | None = None

    @property
    def sentence(self) -> str:
        """Effects of a loss, in words."""
        lost = f"no loss of a {self.domain} loses an expert"
        if self.fatal:
            lost = f"{100 * self.fatal:.0f} % of the losses of a {self.domain} lose experts"
            if self.fatal == 1:
                lost = f"every loss of a {self.domain} loses experts"
            lost += f" ({self.experts_lost:.1f} of a layer must be read from disk, on average)"
        if self.imbalance_after is None or self.imbalance_after_worst is None:
            return lost
        bound = ""
        if self.worst_bound is not None:
            bound = f" (in as many slots no placement has less than {self.worst_bound:.2f})"
        return (
            f"{lost}; then the busiest device has {self.imbalance_after:.2f} x the mean of those "
            f"that are left, {self.imbalance_after_worst:.2f} at worst{bound}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        return self._asdict()


def number_domains(topology: Topology, domain: Domain) -> NDArray[np.int64]:
    """Return the number of the failure domain of every device [D]."""
    if domain == "node":
        return np.asarray(topology.node_of_device, dtype=np.int64)
    return np.arange(topology.devices)


def measure_losses(
    placement: Placement,
    load: NDArray[Any],
    topology: Topology,
    domain: Domain = "device",
    *,
    split: Split = "even",
    threads: int | None = None,
) -> Losses:
    """Compute the effects of single losses, given loads of experts [L,E]."""
    imbalance, lost = compute_imbalances_after_loss(
        placement, load, topology, domain, split=split, threads=threads
    )
    rule = RULES[split]
    has_formula = not rule.by_home
    bound = None
    is_even = rule.is_even and len(set(topology.speed_of_device.tolist())) == 1
    if domain == "device" and is_even and not lost.any():
        least = bound_worst_loss(load, placement.slots[0].size, placement.devices)
        bound = least if least > 1 else None
    return Losses(
        domain=domain,
        number=len(lost),
        fatal=float((lost > 0).any(axis=1).mean()),
        experts_lost=float(lost.mean()),
        imbalance_after=float(imbalance.mean()) if has_formula else None,
        imbalance_after_worst=float(imbalance.max()) if has_formula else None,
        worst_bound=bound,
    )


def bound_worst_loss(load: NDArray[Any], slots: int, devices: int) -> float:
    """Compute a lower bound of the imbalance after the worst loss of a device.

    Parameters
    ----------
    load
        Loads of experts [L,E], all of which have two copies or more that share evenly.
    slots
        Slots of a layer, at least 2E.
    devices
        Equally fast devices.

    Returns
    -------
    float
        Busiest device / mean of the remaining ones, in the worst layer. docs/
        mathematics.md derives it: ``(devices - 1) * (1 / devices + sum q^2 / (c (c - 1)))``, where
        ``q`` is an expert's share of the layer's load, and ``c`` its copies, which are distributed
        so that the sum is smallest.
    """
    shares = np.asarray(load, dtype=np.float64)
    totals = shares.sum(axis=1, keepdims=True)
    shares = np.divide(shares, totals, out=np.zeros_like(shares), where=totals > 0)
    worst = 0.0
    for layer in shares:
        copies = np.full(layer.size, 2)
        # The next copy goes where the sum falls most; it falls less with every copy of an expert.
        savings = [
            (-_compute_saving(share, 2), expert) for expert, share in enumerate(layer.tolist())
        ]
        heapq.heapify(savings)
        for _ in range(slots - 2 * layer.size):
            _, expert = savings[0]
            copies[expert] += 1
            saving = _compute_saving(float(layer[expert]), int(copies[expert]))
            heapq.heapreplace(savings, (-saving, expert))
        worst = max(worst, float((layer**2 / (copies * (copies - 1))).sum()))
    return (devices - 1) * (1 / devices + worst)


def _compute_saving(share: float, copies: int) -> float:
    """Compute the decrease of ``q^2 / (c (c - 1))`` with one more copy of an expert."""
    return 2 * share * share / ((copies - 1) * copies * (copies + 1))


def compute_imbalances_after_loss(
    placement: Placement,
    load: NDArray[Any],
    topology: Topology,
    domain: Domain,
    *,
    split: Split = "even",
    threads: int | None = None,
) -> tuple[Floats, NDArray[np.int64]]:
    """Compute the imbalance of the remaining devices, and experts lost, by loss and layer [F,L].

    The imbalance is the busiest device / mean; it is 1 where nothing is served.
    """
    member = number_domains(topology, domain)
    slots = np.ascontiguousarray(placement.slots, dtype=np.int32)
    tokens = np.ascontiguousarray(load, dtype=np.float64)
    divide = RULES[split].divide
    imbalance, lost = _core.measure_losses(
        slots, tokens, member.tolist(), topology.time_of_device.tolist(), threads=threads
    )
    # Without copies there is nothing to divide.
    if divide is not None and placement.has_copies:
        for number in range(len(lost)):
            is_gone = member == number
            imbalance[number] = _divide_after_loss(slots, tokens, topology, is_gone, divide)
    return imbalance, lost


def _divide_after_loss(
    slots: NDArray[np.int32],
    load: Floats,
    topology: Topology,
    is_gone: NDArray[np.bool_],
    divide: Divide,
) -> Floats:
    """Compute the imbalance [L] of the devices that are left if a dispatcher divides all tokens."""
    left = np.where(is_gone[:, None], EMPTY, slots)
    served = np.where(count_copies(left, load.shape[1]) > 0, load, 0.0)
    speed = topology.speed_of_device
    times = divide(left, served[None], speed)[0] / speed
    mean = served.sum(axis=1) / speed[~is_gone].sum()
    imbalance = np.ones(len(load))
    np.divide(times.max(axis=1), mean, out=imbalance, where=mean > 0)
    return imbalance
