"""Exchanges of rows in place that are done all, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from moetuner.torch.reorder.plan import Order

Rows = Tensor | list[Tensor] | nn.ModuleList


class Exchange(NamedTuple):
    """Two rows of a tensor, two tensors, or two experts of a list, that change places."""

    rows: Rows
    first: int
    second: int

    def read(self) -> tuple[Any, Any]:
        """Return what both are, copied if they are memory."""
        rows: Any = self.rows
        pair = rows[self.first], rows[self.second]
        return pair if isinstance(rows, nn.ModuleList) else (pair[0].clone(), pair[1].clone())

    def write(self, first: Any, second: Any) -> None:
        """Write both."""
        for place, value in ((self.first, first), (self.second, second)):
            if isinstance(self.rows, nn.ModuleList):
                self.rows[place] = value
            else:
                self.rows[place].copy_(value)


def exchanges(rows: Rows, order: Order) -> Iterator[Exchange]:
    """Yield the exchanges that bring rows into an order, which has the old one at every place."""
    places = order.tolist()
    for place, source in enumerate(places):
        # What was at an earlier place has gone where that one's own row came from.
        while source < place:
            source = places[source]
        if source != place:
            yield Exchange(rows, place, source)


def carry_out(steps: Sequence[Exchange]) -> None:
    """Do all exchanges with memory for two rows; undo those that are done if anything fails.

    An operation that fails, or that Ctrl-C interrupts, may have written before it did.
    """
    # How many are done, and what the next one is about to overwrite: always known together.
    state: tuple[int, tuple[Any, Any] | None] = (0, None)
    try:
        for number, step in enumerate(steps):
            pair = step.read()
            state = (number, pair)
            step.write(*reversed(pair))
            state = (number + 1, None)
    except BaseException as error:
        done, before = state
        failed = [] if before is None else _failures(steps[done], before)
        for step in reversed(steps[:done]):
            failed += _failures(step)
        if failed:
            raise RuntimeError("the model is damaged and must be loaded anew") from error
        raise


def _failures(step: Exchange, before: tuple[Any, Any] | None = None) -> list[Exception]:
    """Write what was before a step, by exchanging again if it is done; returns what fails."""
    try:
        step.write(*(reversed(step.read()) if before is None else before))
    except Exception as error:
        return [error]
    return []
