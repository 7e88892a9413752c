"""Running: the running placement by name, as options and Python give it: ``eplb:32``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moetuner._checks import ArgumentError

# Methods of placements that may run: two that engines load by default, and EPLB's, which may have
# redundant experts.
STARTS = ("contiguous", "round_robin", "eplb")
NAME = re.compile(rf"({'|'.join(STARTS)})|eplb:\d{{1,5}}", re.ASCII)


@dataclass(frozen=True)
class Running:
    """The method that computes the running placement.

    Parameters
    ----------
    method
        One of ``STARTS``, or ``"given"`` for a placement of a user.
    redundant
        Redundant experts of EPLB's placement, over all devices.
    """

    method: str
    redundant: int = 0

    @classmethod
    def parse(cls, name: str) -> Running:
        """Read a name such as ``eplb:32``, which may be wrong: see ``is_name``."""
        method, _, redundant = name.partition(":")
        return cls(method, int(redundant or 0))

    @staticmethod
    def is_name(text: str) -> bool:
        """Return whether a text names a placement that a method of ``STARTS`` computes."""
        return NAME.fullmatch(text) is not None

    def count_slots(self, experts: int, devices: int) -> int:
        """Return the slots of a device in a layer.

        Raises ArgumentError if EPLB's redundant experts do not fill the devices evenly.
        """
        slots = -(-(experts + self.redundant) // devices)
        if self.method == "eplb" and slots * devices != experts + self.redundant:
            name = f"{self.method}:{self.redundant}" if self.redundant else self.method
            raise ArgumentError(
                f"initial {name} must fill all devices evenly: {experts} experts and "
                f"{self.redundant} redundant ones are no multiple of {devices} devices; "
                f"eplb:{slots * devices - experts} would do",
                "initial",
            )
        return slots
