"""A figure of some traffic and of its halves, and its average over orders of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.samples import Folds


class Halved(NamedTuple):
    """A figure of some traffic and of its halves.

    Parameters
    ----------
    value
        The figure of all of the traffic.
    sides
        The figure of both sides of every halving [2,H]; a single fold has no halving.
    folds
        The folds that were halved.
    """

    value: float
    sides: NDArray[np.float64]
    folds: Folds


# Figures by name, of all traffic (None) and of every group.
ByGroup = dict[str | None, dict[str, Halved]]


def average_orders(weights: Sequence[float], by_order: Sequence[ByGroup]) -> ByGroup:
    """Return the averages of figures over orders of arrival, by the weights of the orders."""
    if len(by_order) == 1:
        return by_order[0]
    averages: ByGroup = {}
    for group, figures in by_order[0].items():
        averages[group] = {}
        for name, figure in figures.items():
            halved = [by_group[group][name] for by_group in by_order]
            value = float(np.dot(weights, [in_order.value for in_order in halved]))
            sides = np.tensordot(weights, [in_order.sides for in_order in halved], axes=1)
            averages[group][name] = Halved(value, sides, figure.folds)
    return averages
