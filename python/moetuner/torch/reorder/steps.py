"""Exchange rows in place, all of them or none."""

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
        """Return both rows, copied unless they are modules."""
        rows: Any = self.rows
        pair = rows[self.first], rows[self.second]
        return pair if isinstance(rows, nn.ModuleList) else (pair[0].clone(), pair[1].clone())

    def write(self, first: Any, second: Any) -> None:
        """Write both rows."""
        for place, value in ((self.first, first), (self.second, second)):
            if isinstance(self.rows, nn.ModuleList):
                self.rows[place] = value
            else:
                self.rows[place].copy_(value)


def list_exchanges(rows: Rows, order: Order) -> Iterator[Exchange]:
    """Yield the exchanges that bring rows into an order: the old row at every place [E]."""
    places = order.tolist()
    for place, source in enumerate(places):
        # An earlier exchange moved this row to the place from which the earlier place got its own.
        while source < place:
            source = places[source]
        if source != place:
            yield Exchange(rows, place, source)


def exchange_all(steps: Sequence[Exchange]) -> None:
    """Exchange all rows, with memory for two of them; undo the exchanges if one fails.

    An operation that fails, or that Ctrl-C interrupts, may have written before it did.
    """
    # The number of steps done, and the rows that the next one overwrites.
    state: tuple[int, tuple[Any, Any] | None] = (0, None)
    try:
        for number, step in enumerate(steps):
            pair = step.read()
            state = (number, pair)
            step.write(*reversed(pair))
            state = (number + 1, None)
    except BaseException as error:
        done, old_rows = state
        errors = [] if old_rows is None else _undo(steps[done], old_rows)
        for step in reversed(steps[:done]):
            errors += _undo(step)
        if errors:
            raise RuntimeError("the model is damaged and must be loaded anew") from error
        raise


def _undo(step: Exchange, old_rows: tuple[Any, Any] | None = None) -> list[Exception]:
    """Undo a step, by its old rows or, if it is done, by a second exchange; return errors."""
    try:
        step.write(*(reversed(step.read()) if old_rows is None else old_rows))
    except Exception as error:
        return [error]
    return []
