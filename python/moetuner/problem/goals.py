"""Goals: what an objective counts, and the words of its values.

A goal is a row of ``AIMS``. Objectives, searches and bounds use the fields of the row; none of them
compares the names of goals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Goal = Literal["time", "balance", "traffic"]

# Without a cap, unused experts would fill some devices, and the busiest experts would share one.
TRAFFIC_CAP = 1.05


class Words(NamedTuple):
    """Unit, text of a value, and nearest figure of an evaluation."""

    unit: str
    text: str
    figure: str


@dataclass(frozen=True)
class Aim:
    """What counts for a goal.

    Parameters
    ----------
    label
        What is minimised, on a page.
    words
        Words of values; None where they depend on the table that tells the traffic.
    decimals
        Decimals of a value in a table.
    costs_loads
        True if the loads of windows cost something, so that windows have values.
    costs_traffic
        True if it costs something where tokens go, so that copies may harm.
    predicts_time
        True if values are of the cost model: the weights of an expert, and rows, take time.
    cap
        Load cap of the command line and of advice where none is given; None for no cap.
    """

    label: str
    words: Words | None = None
    decimals: int = 4
    costs_loads: bool = False
    costs_traffic: bool = False
    predicts_time: bool = False
    cap: float | None = None


AIMS: dict[str, Aim] = {
    "time": Aim(
        "predicted time of a layer",
        Words("us per layer", "{:,.1f} us per layer", "predicted_layer_us"),
        decimals=1,
        costs_loads=True,
        costs_traffic=True,
        predicts_time=True,
    ),
    "balance": Aim(
        "imbalance", Words("max / mean load", "imbalance {:.4f}", "imbalance"), costs_loads=True
    ),
    "traffic": Aim("traffic between devices", costs_traffic=True, cap=TRAFFIC_CAP),
}

# Words of traffic, by the table that tells it.
TRAFFIC_WORDS = {
    "sets": Words("fanout", "fanout {:.4f}", "fanout"),
    "transitions": Words("share of the traffic", "crossing {:.4f}", "crossing"),
    "coactivation": Words("share of the traffic", "{:.4f} of the co-activations apart", "fanout"),
}
