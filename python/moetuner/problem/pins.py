"""Rules of slots: pins, bans, and copies that survive the loss of a device or node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import ArgumentError, shown, whole_number
from moetuner.files.cells import and_more
from moetuner.placement import Placement

# (layer, expert, device); layer None for all.
Pin = tuple[int | None, int, int]


class _Arguments(TypedDict):
    pinned: Iterable[Pin]
    forbidden: Iterable[Pin]
    survive: None


# Arguments of a problem without rules of slots, as relaxations are.
NO_RULES: _Arguments = {"pinned": (), "forbidden": (), "survive": None}


@dataclass(frozen=True)
class SlotRules:
    """Pins and bans [L,E,D], and the failure domain of every device [D]; None without rules."""

    pinned: NDArray[np.bool_] | None
    forbidden: NDArray[np.bool_] | None
    domain: NDArray[np.int64] | None = None

    @property
    def exist(self) -> bool:
        """True if there is a rule."""
        return any(rule is not None for rule in (self.pinned, self.forbidden, self.domain))

    @property
    def need_copies(self) -> bool:
        """True if an expert must have several copies in a layer."""
        is_pinned_twice = self.pinned is not None and bool((self.pinned.sum(axis=2) > 1).any())
        return is_pinned_twice or self.domain is not None

    def are_broken(self, layer: int, holders: NDArray[np.bool_]) -> bool:
        """Return whether the experts that devices hold in a layer [D,E] break a rule."""
        if self.pinned is not None and (self.pinned[layer].T & ~holders).any():
            return True
        if self.forbidden is not None and (self.forbidden[layer].T & holders).any():
            return True
        return self.domain is not None and bool(self._are_in_one_domain(holders[None]).any())

    def _are_in_one_domain(self, holders: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return whether all copies of an expert are in one failure domain [L,E]."""
        assert self.domain is not None
        held_in = [
            holders[:, self.domain == domain].any(axis=1) for domain in np.unique(self.domain)
        ]
        are_in_one: NDArray[np.bool_] = np.sum(held_in, axis=0) < 2
        return are_in_one

    def violations(self, placement: Placement) -> list[str]:
        """Return a sentence for each kind of rule that a placement breaks."""
        hosts, lines = placement.held.transpose(0, 2, 1), []
        for name, rule in (("pinned", self.pinned), ("forbidden", self.forbidden)):
            if rule is None:
                continue
            wrong = np.argwhere(rule & (hosts != (name == "pinned")))
            for layer, expert, device in wrong[:1]:
                verb = "is not" if name == "pinned" else "is"
                lines.append(
                    f"{name}: expert {expert} of layer {layer} {verb} on device {device}"
                    f"{and_more(len(wrong))}"
                )
        if self.domain is not None:
            not_spread = np.argwhere(self._are_in_one_domain(placement.held))
            for layer, expert in not_spread[:1]:
                lines.append(
                    f"survive: expert {expert} of layer {layer} has no copy outside one failure "
                    f"domain{and_more(len(not_spread))}"
                )
        return lines


def make_rules(
    pinned: Iterable[Pin],
    forbidden: Iterable[Pin],
    experts: int,
    capacity: NDArray[np.int64],
    domain: NDArray[np.int64] | None = None,
) -> SlotRules:
    """Build and check the rules for a number of experts in slots [L,D]."""
    shape = (len(capacity), experts, capacity.shape[1])
    pins = _build_table("pinned", pinned, shape)
    bans = _build_table("forbidden", forbidden, shape)
    if pins is not None:
        _check_pins(pins, bans, capacity)
    if bans is not None:
        _check_bans(bans, pins, capacity)
    if domain is not None:
        _check_copies(domain, experts, capacity)
    return SlotRules(pins, bans, domain)


def _check_copies(domain: NDArray[np.int64], experts: int, capacity: NDArray[np.int64]) -> None:
    """Raise where slots [L,D] do not suffice for copies of all experts in two failure domains."""
    slots = np.stack([capacity[:, domain == n].sum(axis=1) for n in np.unique(domain)])
    if len(slots) < 2:
        if len(domain) == 1:
            raise ArgumentError("survive needs two devices or more, got one", "survive")
        raise ArgumentError(
            "survive node needs devices_per_node: there is one node", "survive", "devices_per_node"
        )
    # A domain holds each expert once at most, so slots beyond the number of experts do not count.
    usable = np.minimum(slots, experts).sum(axis=0)
    for layer in np.flatnonzero(usable < 2 * experts)[:1]:
        raise ArgumentError(
            f"survive needs two slots for each of {experts} experts, {2 * experts} in all, got "
            f"{usable[layer]} in layer {layer}",
            "survive",
        )


def _check_pins(
    pinned: NDArray[np.bool_], forbidden: NDArray[np.bool_] | None, capacity: NDArray[np.int64]
) -> None:
    """Raise if pins contradict bans, or leave too few slots [L,D]."""
    if forbidden is not None:
        for layer, expert, device in np.argwhere(pinned & forbidden):
            raise ArgumentError(
                f"pinned and forbidden contradict each other: expert {expert} of layer {layer} "
                f"on device {device}",
                "pinned",
                "forbidden",
            )
    by_device = pinned.sum(axis=1)
    for layer, device in np.argwhere(by_device > capacity):
        raise ArgumentError(
            f"pinned puts {by_device[layer, device]} experts of layer {layer} on device {device}, "
            f"which has {capacity[layer, device]} slots",
            "pinned",
        )
    unpinned = (~pinned.any(axis=2)).sum(axis=1)
    free = (capacity - by_device).sum(axis=1)
    for layer in np.flatnonzero(free < unpinned):
        raise ArgumentError(
            f"pinned leaves {free[layer]} slots of layer {layer} for the {unpinned[layer]} "
            "experts that are not pinned",
            "pinned",
        )


def _check_bans(
    forbidden: NDArray[np.bool_], pinned: NDArray[np.bool_] | None, capacity: NDArray[np.int64]
) -> None:
    """Raise if bans leave an expert no device, or some experts of a layer too few slots [L,D]."""
    for layer, expert in np.argwhere(forbidden.all(axis=2)):
        raise ArgumentError(
            f"forbidden leaves no device for expert {expert} of layer {layer}", "forbidden"
        )
    checked = set()
    for layer, ban in enumerate(forbidden):
        fixed = np.zeros_like(ban) if pinned is None else pinned[layer]
        key = (ban.tobytes(), fixed.tobytes(), capacity[layer].tobytes())
        if key in checked or not ban.any():
            continue
        checked.add(key)
        free = capacity[layer] - fixed.sum(axis=0)
        shortage = _core.find_shortage(ban[~fixed.any(axis=1)], free.tolist())
        if shortage is not None:
            experts, devices = shortage
            slots = free[devices].sum()
            raise ArgumentError(
                f"forbidden leaves {slots} slots in layer {layer}, on "
                f"{', '.join(map(str, devices)) or 'no device'}, for {experts} experts that may be "
                "nowhere else",
                "forbidden",
            )


def _build_table(
    name: str, rules: Iterable[Pin], shape: tuple[int, int, int]
) -> NDArray[np.bool_] | None:
    """Build the table [L,E,D] of pins or bans; None if there are none."""
    table: NDArray[np.bool_] | None = None
    for rule in rules:
        try:
            layer, expert, device = rule
        except (TypeError, ValueError):
            raise ArgumentError(
                f"{name} must be (layer, expert, device), got {shown(rule)}", name
            ) from None
        for what, value, count in (("expert", expert, shape[1]), ("device", device, shape[2])):
            whole_number(f"{name}: {what}", value, lowest=0, highest=count - 1)
        if layer is not None:
            whole_number(f"{name}: layer (None for all)", layer, lowest=0, highest=shape[0] - 1)
        if table is None:
            table = np.zeros(shape, dtype=bool)
        table[slice(None) if layer is None else layer, expert, device] = True
    return table
