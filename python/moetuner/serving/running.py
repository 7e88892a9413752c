"""Running: the running placement by name, as options and Python give it: ``eplb:32``."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
