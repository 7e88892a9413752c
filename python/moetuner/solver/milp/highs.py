"""Integer linear programs from arrays, solved by HiGHS. The only file that knows highspy.

Arrays and feasible values to begin from enter, a `Solution` leaves; nothing is printed, and without
a time limit the answer depends on the arguments alone. It knows neither experts nor devices:
formulations live beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner.solver.arrays import Floats
from moetuner.solver.result import Status

if TYPE_CHECKING:
    from highspy._core import _Highs


POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Solution:
    """The best values [columns] of a program and what is proven of them.

    The status is ``"optimal"`` only where objective and bound agree, ``"gap_reached"`` where they
    agree within the requested gap, ``"feasible"`` at the node limit.
    """

    values: Floats
    objective: float
    bound: float
    status: Status


class Ilp:
    """A program ``min cost @ x`` with ``0 <= x <= upper`` and ``row_lower <= A x <= row_upper``.

    ``upper``, and ``integer``, whether a column must be whole, are one value or [columns].
    """

    def __init__(
        self, cost: ArrayLike, *, upper: ArrayLike = 1.0, integer: ArrayLike = True
    ) -> None:
        self.cost = np.asarray(cost, dtype=np.float64)
        self.columns = len(self.cost)
        self.upper = np.array(np.broadcast_to(upper, self.columns), dtype=np.float64)
        self.integer = np.array(np.broadcast_to(integer, self.columns), dtype=np.int32)
        self.rows = 0
        self._bounds: list[tuple[Floats, Floats]] = []
        self._entries: list[tuple[NDArray[Any], ...]] = []

    def add_rows(
        self,
        lower: ArrayLike,
        upper: ArrayLike,
        row: ArrayLike,
        column: ArrayLike,
        value: ArrayLike = 1.0,
    ) -> None:
        """Add ``lower <= A x <= upper`` [rows]; A has the given entries, none of them twice.

        A ``row`` counts from the first new one. All arguments broadcast, to [rows] or [entries].
        """
        low, high = np.broadcast_arrays(np.atleast_1d(lower), upper)
        rows, columns, values = (array.ravel() for array in np.broadcast_arrays(row, column, value))
        self._bounds.append((low, high))
        self._entries.append((rows + self.rows, columns, values))
        self.rows += len(low)

    def add_deviations(
        self, row: ArrayLike, column: ArrayLike, value: ArrayLike, mean: float, t: ArrayLike
    ) -> None:
        """Add the rows of ``t >= +-(A x - mean)`` [R]; A has the given entries."""
        t = np.asarray(t)
        rows = np.r_[np.ravel(row), np.arange(len(t))]
        columns = np.r_[np.ravel(column), t]
        for sign in (1.0, -1.0):
            values = np.r_[-sign * np.ravel(value), np.ones(len(t))]
            self.add_rows(np.full(len(t), -sign * mean), np.inf, rows, columns, values)

    def arrays(self) -> tuple[Floats, Floats, NDArray[Any], NDArray[Any], Floats]:
        """Return lower and upper bounds of all rows, and row, column and value of all entries."""
        lower, upper = map(np.concatenate, zip(*self._bounds, strict=True))
        row, column, value = map(np.concatenate, zip(*self._entries, strict=True))
        return lower.astype(np.float64), upper.astype(np.float64), row, column, value

    def solve(
        self,
        start: ArrayLike,
        *,
        seed: int = 0,
        gap: float = 0.0,
        absolute_gap: float = 0.0,
        nodes: int | None = None,
        time_limit: float | None = None,
        progress: Callable[[float | None, float], None] | None = None,
    ) -> Solution:
        """Run HiGHS from a start and return its best values.

        Ctrl-C ends the search, not the program: the best values so far are returned with status
        ``"interrupted"``. The start [columns] must be feasible. The search stops when |objective -
        bound| is at most gap * |objective|, or at most absolute_gap, or after so many nodes.
        ``progress`` is called now and then, from the calling thread, with objective (None while
        unknown) and bound.
        """
        begin = time.monotonic()
        values = np.asarray(start, dtype=np.float64)
        best = float(self.cost @ values)
        highs = self._build(
            random_seed=seed % 2**31,
            mip_rel_gap=float(gap),
            mip_abs_gap=float(absolute_gap),
            mip_max_nodes=2**31 - 1 if nodes is None else int(nodes),
        )
        columns = np.arange(self.columns, dtype=np.int32)
        _check(highs.setSolution(self.columns, columns, values), "setSolution")
        if time_limit is not None:
            _set_options(highs, time_limit=max(time_limit - (time.monotonic() - begin), 0.0))
        interrupted = _Watch(highs).run(progress)
        info = highs.getInfo()
        if info.primal_solution_status == 2:  # a feasible point
            new = np.array(highs.getSolution().col_value, dtype=np.float64)
            new = np.where(self.integer != 0, np.rint(new), new)
            if self.cost @ new < best:
                values, best = new, float(self.cost @ new)
        bound, status = float(info.mip_dual_bound), _read_status(highs, interrupted)
        is_met = math.isclose(best, bound, rel_tol=1e-6, abs_tol=1e-6)
        if status == "optimal" and max(gap, absolute_gap) > 0 and not is_met:
            status = "gap_reached"
        return Solution(values, best, bound, status)

    def _build(self, **options: bool | float) -> _Highs:
        # The public class `highspy.Highs` prints a banner before it can be asked not to; the class
        # beneath it does not.
        from highspy._core import MatrixFormat, ObjSense, _Highs

        highs = _Highs()
        _set_options(
            highs, output_flag=False, log_to_console=False, threads=1, parallel="off", **options
        )
        lower, upper, row, column, value = self.arrays()
        order = np.lexsort((column, row))
        start = np.r_[0, np.cumsum(np.bincount(row, minlength=self.rows))].astype(np.int32)
        status = highs.passModel(
            self.columns,
            self.rows,
            len(row),
            MatrixFormat.kRowwise.value,
            ObjSense.kMinimize.value,
            0.0,
            self.cost,
            np.zeros(self.columns),
            self.upper,
            lower,
            upper,
            start,
            column[order].astype(np.int32),
            value[order].astype(np.float64),
            self.integer,
        )
        _check(status, "passModel")
        return highs


def _read_status(highs: _Highs, interrupted: bool) -> Status:
    """Return the status that tells why HiGHS ended."""
    from highspy._core import HighsModelStatus as Model

    statuses: dict[Any, Status] = {
        Model.kOptimal: "optimal",
        Model.kSolutionLimit: "feasible",
        Model.kTimeLimit: "time_limit",
        Model.kInterrupt: "interrupted",
    }
    status = highs.getModelStatus()
    if status not in statuses:
        raise RuntimeError(f"HiGHS ended with status {highs.modelStatusToString(status)!r}")
    return "interrupted" if interrupted else statuses[status]


class _Watch:
    """A run of HiGHS on a second thread, while this one takes Ctrl-C and reports progress."""

    def __init__(self, highs: _Highs) -> None:
        self.highs = highs
        self.best: float | None = None
        self.bound = -math.inf
        self.cancelled = False

    def run(self, progress: Callable[[float | None, float], None] | None) -> bool:
        """Run to the end; return whether Ctrl-C ended it. Errors of ``progress`` end it, too."""
        from concurrent.futures import ThreadPoolExecutor, wait  # late, as it makes a logger

        from highspy._core.cb import HighsCallbackType as Kind

        _check(self.highs.setCallback(self._on_callback, None), "setCallback")
        for kind in (
            Kind.kCallbackMipImprovingSolution,
            Kind.kCallbackMipInterrupt,
            Kind.kCallbackSimplexInterrupt,
        ):
            _check(self.highs.startCallback(kind), "startCallback")
        interrupted, error = False, None
        with ThreadPoolExecutor(1, "moetuner-highs") as executor:
            future = executor.submit(self.highs.run)
            last_report = time.monotonic()
            while not future.done():
                try:
                    wait([future], POLL_SECONDS)
                    due = time.monotonic() - last_report > 4 * POLL_SECONDS
                    if progress is not None and error is None and due:
                        last_report = time.monotonic()
                        progress(self.best, self.bound)
                except KeyboardInterrupt:
                    self.cancelled = interrupted = True
                except BaseException as raised:
                    self.cancelled, error = True, raised
        _check(self.highs.setCallback(None, None), "setCallback")
        if error is not None:
            raise error
        _check(future.result(), "run")
        return interrupted

    def _on_callback(self, kind: Any, _message: str, data: Any, reply: Any, _data: Any) -> None:
        from highspy._core.cb import HighsCallbackType as Kind

        if kind == Kind.kCallbackMipImprovingSolution:
            self.best = float(data.objective_function_value)
        elif kind == Kind.kCallbackMipInterrupt:
            self.bound = float(data.mip_dual_bound)
        if reply is not None and self.cancelled:
            reply.user_interrupt = True


def _check(status: Any, call: str) -> None:
    """Raise if a call of HiGHS failed: raw calls never raise. A warning is no failure."""
    from highspy._core import HighsStatus

    if status == HighsStatus.kError:
        raise RuntimeError(f"HiGHS: {call} failed")


def _set_options(highs: _Highs, **options: bool | int | float | str) -> None:
    for name, value in options.items():
        _check(highs.setOptionValue(name, value), f"setOptionValue({name!r}, {value!r})")
