"""TrafficCounters: rows and bytes that a layer really exchanged with every peer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def _zeros() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass
class TrafficCounters:
    """What one rank sent to its peers, and received, in one layer.

    A rank's rows to itself do not travel and are not counted, nor are the headers (32 bytes per
    peer and exchange).

    Parameters
    ----------
    devices
        Ranks of the group, D.

    Attributes
    ----------
    steps
        Forward passes.
    rows_sent, rows_received
        Rows of the dispatch [D]; the combine brings back as many.
    dispatch_bytes_sent, dispatch_bytes_received
        Hidden states, slots and weights [D].
    combine_bytes_sent, combine_bytes_received
        Results [D].
    """

    devices: int
    steps: int = 0
    rows_sent: NDArray[np.int64] = field(default_factory=_zeros)
    rows_received: NDArray[np.int64] = field(default_factory=_zeros)
    dispatch_bytes_sent: NDArray[np.int64] = field(default_factory=_zeros)
    dispatch_bytes_received: NDArray[np.int64] = field(default_factory=_zeros)
    combine_bytes_sent: NDArray[np.int64] = field(default_factory=_zeros)
    combine_bytes_received: NDArray[np.int64] = field(default_factory=_zeros)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.steps = 0
        for name in (
            "rows_sent",
            "rows_received",
            "dispatch_bytes_sent",
            "dispatch_bytes_received",
            "combine_bytes_sent",
            "combine_bytes_received",
        ):
            setattr(self, name, np.zeros(self.devices, dtype=np.int64))

    def count(
        self,
        rank: int,
        sent: list[int],
        received: list[int],
        *,
        dispatch_row: int,
        combine_row: int,
    ) -> None:
        """Count one exchange of rows [D], of so many bytes each, and their way back."""
        out, back = np.array(sent), np.array(received)
        out[rank] = back[rank] = 0
        self.rows_sent += out
        self.rows_received += back
        self.dispatch_bytes_sent += out * dispatch_row
        self.dispatch_bytes_received += back * dispatch_row
        self.combine_bytes_sent += back * combine_row
        self.combine_bytes_received += out * combine_row
