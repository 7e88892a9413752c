"""Integer linear programs from arrays, solved by HiGHS. The only file that knows highspy.

Arrays enter, a `Solution` leaves; nothing is printed, and without a time limit the answer depends
on the arguments alone. It knows neither experts nor devices: formulations live beside it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner.solver.result import Status

if TYPE_CHECKING:
    from highspy._core import _Highs

FEASIBILITY = 1e-6  # HiGHS's own default for rows and for whole numbers
# HiGHS's dual bound may be off by these: reduced costs are right to within its dual feasibility
# tolerance, and nodes this close to the incumbent are dropped.
DUAL_TOLERANCE = 1e-7
CUTOFF_TOLERANCE = 1e-6
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Solution:
    """The best values of a program and what is proven of them.

    Parameters
    ----------
    values
        Of all columns [columns], whole where they have to be; None without feasible ones.
    objective
        Of these values; None without them.
    bound
        Proven: no feasible values have a better objective.
    status
        ``"optimal"`` only where objective and bound agree, ``"gap_reached"`` where they agree as
        far as wanted, ``"feasible"`` at the node limit.
    first
        Objective of the first values of HiGHS: those of the warm start, where one was given.
        None where presolving left nothing to search.
    """

    values: NDArray[np.float64] | None
    objective: float | None
    bound: float
    status: Status
    first: float | None = None


class Ilp:
    """A program ``min cost @ x + offset`` with ``row_lower <= A x <= row_upper``.

    Parameters
    ----------
    cost
        Of every column [columns].
    lower, upper
        Bounds of the columns, a number or [columns].
    integer
        Whether a column must be whole, a truth value or [columns].
    offset
        Added to the objective.
    """

    def __init__(
        self,
        cost: ArrayLike,
        *,
        lower: ArrayLike = 0.0,
        upper: ArrayLike = 1.0,
        integer: ArrayLike = True,
        offset: float = 0.0,
    ) -> None:
        self.cost = np.asarray(cost, dtype=np.float64)
        if self.cost.ndim != 1 or not np.isfinite(self.cost).all():
            raise ValueError(f"cost must be finite numbers [columns], got {list(self.cost.shape)}")
        self.columns = len(self.cost)
        self.lower = _column("lower", lower, self.columns, np.float64)
        self.upper = _column("upper", upper, self.columns, np.float64)
        self.integer = _column("integer", integer, self.columns, np.int32)
        self.offset = float(offset)
        self.rows = 0
        none = np.zeros(0, dtype=np.int64)
        self._bounds = [(np.zeros(0), np.zeros(0))]
        self._entries = [(none, none, np.zeros(0))]

    def add_rows(
        self,
        lower: ArrayLike,
        upper: ArrayLike,
        row: ArrayLike,
        column: ArrayLike,
        value: ArrayLike = 1.0,
    ) -> None:
        """Add ``lower <= A x <= upper`` with A given by its entries.

        Parameters
        ----------
        lower, upper
            Of every new row, broadcast against each other to [rows].
        row, column, value
            Of every entry [entries]; ``row`` counts from the first of the new rows, ``value``
            may be one number. An entry must not be given twice.
        """
        low, high = np.broadcast_arrays(
            np.atleast_1d(np.asarray(lower, dtype=np.float64)), np.asarray(upper, dtype=np.float64)
        )
        entries = np.broadcast_arrays(
            np.asarray(row, dtype=np.int64),
            np.asarray(column, dtype=np.int64),
            np.asarray(value, dtype=np.float64),
        )
        rows, columns, values = (of.ravel() for of in entries)
        for name, ids, n in (("row", rows, len(low)), ("column", columns, self.columns)):
            if ids.size and (ids.min() < 0 or ids.max() >= n):
                raise ValueError(
                    f"{name} must be from 0 to {n - 1}, got {ids.min()} to {ids.max()}"
                )
        if not np.isfinite(values).all() or np.isnan(low).any() or np.isnan(high).any():
            raise ValueError("rows must have finite entries and bounds that are numbers")
        self._bounds.append((low, high))
        self._entries.append((rows + self.rows, columns, values))
        self.rows += len(low)

    def add_deviations(
        self, part: ArrayLike, column: ArrayLike, value: ArrayLike, mean: float, t: ArrayLike
    ) -> None:
        """Add ``t >= +-(A x - mean)`` with A given by its entries, one part a row; t is [parts]."""
        t = np.asarray(t)
        parts = np.r_[np.ravel(part), np.arange(len(t))]
        columns = np.r_[np.ravel(column), t]
        for sign in (1.0, -1.0):
            values = np.r_[-sign * np.ravel(value), np.ones(len(t))]
            self.add_rows(np.full(len(t), -sign * mean), np.inf, parts, columns, values)

    @property
    def row_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper bounds of all rows [rows]."""
        lower, upper = zip(*self._bounds, strict=True)
        return np.concatenate(lower), np.concatenate(upper)

    @property
    def margin(self) -> float:
        """How far a dual bound may be off, for whoever needs a proof; infinite without bounds."""
        return DUAL_TOLERANCE * float((self.upper - self.lower).sum()) + CUTOFF_TOLERANCE

    def proven(self, dual: float, unit: float) -> int:
        """Turn a dual bound of a minimum into a whole one, of costs ``unit`` times as large.

        Less the margin and the rounding of sums, then rounded up, and at least 0.
        """
        if not math.isfinite(dual):
            return 0
        rounding = 1e-12 * (float(np.abs(self.cost).sum()) + abs(self.offset))
        return max(math.ceil((dual - self.margin - rounding) * unit), 0)

    def objective(self, values: NDArray[np.float64]) -> float:
        """Compute the objective of some values [columns]."""
        return float(self.cost @ values) + self.offset

    def broken(self, values: NDArray[np.float64]) -> str | None:
        """Return which bound or row some values [columns] break; None if they are feasible."""
        slack = FEASIBILITY * 10
        wrong = (values < self.lower - slack) | (values > self.upper + slack)
        wrong |= (self.integer != 0) & (np.abs(values - np.rint(values)) > slack)
        if wrong.any():
            at = int(np.argmax(wrong))
            return f"column {at}: {values[at]} in [{self.lower[at]}, {self.upper[at]}]"
        lower, upper = self.row_bounds
        row, column, value = map(np.concatenate, zip(*self._entries, strict=True))
        terms = value * values[column]
        sums = np.bincount(row, terms, minlength=self.rows)
        slacks = slack * (1 + np.bincount(row, np.abs(terms), minlength=self.rows))
        wrong = (sums < lower - slacks) | (sums > upper + slacks)
        if wrong.any():
            at = int(np.argmax(wrong))
            return f"row {at}: {sums[at]} in [{lower[at]}, {upper[at]}]"
        return None

    def solve(
        self,
        *,
        start: ArrayLike | None = None,
        start_objective: float | None = None,
        seed: int = 0,
        gap: float = 0.0,
        absolute_gap: float = 0.0,
        nodes: int | None = None,
        time_limit: float | None = None,
        progress: Callable[[float | None, float], None] | None = None,
    ) -> Solution:
        """Run HiGHS and return its best values.

        Ctrl-C ends the search, not the program: the best values so far come back with status
        ``"interrupted"``.

        Parameters
        ----------
        start
            Feasible values of all columns [columns] to start from.
        start_objective
            Their objective as the caller computes it: checked, a free test of the model.
        seed
            For HiGHS's heuristics.
        gap, absolute_gap
            Stop when |objective - bound| is at most gap * |objective|, or at most absolute_gap.
        nodes
            Nodes of the search tree, at most.
        time_limit
            Seconds. With it the answer depends on the machine.
        progress
            Called now and then, from the calling thread, with objective (None while unknown) and
            bound.

        Raises
        ------
        ValueError
            If nothing is feasible or bounded.
        RuntimeError
            If the start is not feasible or not worth what the caller says, or if HiGHS fails: a
            fault of the formulation.
        """
        values = None if start is None else np.asarray(start, dtype=np.float64)
        highs = self._build(
            random_seed=seed % 2**31,
            mip_rel_gap=float(gap),
            mip_abs_gap=float(absolute_gap),
            mip_max_nodes=2**31 - 1 if nodes is None else int(nodes),
            time_limit=math.inf if time_limit is None else max(float(time_limit), 0.0),
        )
        if values is not None:
            self._check_start(values, start_objective)
            columns = np.arange(self.columns, dtype=np.int32)
            _ok(highs.setSolution(self.columns, columns, values), "setSolution")
        watch = _Watch(highs)
        interrupted = watch.run(progress)
        ended = _ended(highs, interrupted, feasible=start is not None)
        return self._solution(highs, values, watch.first, ended, max(gap, 0.0), absolute_gap)

    def _solution(
        self,
        highs: _Highs,
        values: NDArray[np.float64] | None,
        first: float | None,
        ended: Status,
        gap: float,
        absolute_gap: float,
    ) -> Solution:
        """Read the better of the start and HiGHS's values, and what is proven."""
        best = None if values is None else self.objective(values)
        if first is not None and best is not None and _behind(first, best):
            raise RuntimeError(f"HiGHS began with {first}, not with the start's {best}")
        info = highs.getInfo()
        if info.primal_solution_status == 2:  # a feasible point
            new = np.array(highs.getSolution().col_value, dtype=np.float64)
            new = np.where(self.integer != 0, np.rint(new), new)
            if best is None or self.objective(new) < best:
                values, best = new, self.objective(new)
        bound = float(info.mip_dual_bound)
        if not self.integer.any() or not self.columns:
            bound = best if ended == "optimal" and best is not None else -math.inf
        if ended == "optimal" and best is not None:
            allowed = max(gap * abs(best), absolute_gap)
            ended = "optimal" if allowed == 0 or _close(best, bound) else "gap_reached"
        return Solution(values, best, bound, ended, first)

    def _check_start(self, values: NDArray[np.float64], stated: float | None) -> None:
        if values.shape != (self.columns,):
            raise RuntimeError(f"start must be [{self.columns}], got {list(values.shape)}")
        broken = self.broken(values)
        if broken:
            raise RuntimeError(f"the start is not feasible: {broken}")
        if stated is not None and not _close(self.objective(values), stated):
            raise RuntimeError(
                f"the start is worth {self.objective(values)}, not {stated} as stated"
            )

    def _build(self, **options: bool | float) -> _Highs:
        # The public class `highspy.Highs` prints a banner before it can be asked not to; the class
        # beneath it does not.
        from highspy._core import MatrixFormat, ObjSense, _Highs

        highs = _Highs()
        _set(highs, output_flag=False, log_to_console=False, threads=1, parallel="off", **options)
        row, column, value = map(np.concatenate, zip(*self._entries, strict=True))
        order = np.lexsort((column, row))
        start = np.r_[0, np.cumsum(np.bincount(row, minlength=self.rows))].astype(np.int32)
        status = highs.passModel(
            *(self.columns, self.rows, len(row)),
            *(MatrixFormat.kRowwise.value, ObjSense.kMinimize.value, self.offset),
            *(self.cost, self.lower, self.upper, *self.row_bounds),
            start,
            column[order].astype(np.int32),
            value[order],
            self.integer,
        )
        _ok(status, "passModel")
        return highs


def _ended(highs: _Highs, interrupted: bool, *, feasible: bool) -> Status:
    """Return why HiGHS ended; ``feasible`` if values are known, whatever HiGHS says."""
    from highspy._core import HighsModelStatus as Model

    ended, text = highs.getModelStatus(), highs.modelStatusToString
    none = Model.kInfeasible, Model.kUnbounded, Model.kUnboundedOrInfeasible
    if ended in none and not feasible:
        raise ValueError(f"the program is {text(ended).lower()}")
    statuses: dict[Any, Status] = {
        Model.kOptimal: "optimal",
        Model.kModelEmpty: "optimal",
        Model.kSolutionLimit: "feasible",
        Model.kTimeLimit: "time_limit",
        Model.kInterrupt: "interrupted",
    }
    if ended not in statuses:
        raise RuntimeError(f"HiGHS ended with status {text(ended)!r}")
    return "interrupted" if interrupted else statuses[ended]


class _Watch:
    """Runs HiGHS on a thread of its own, so that this one can take Ctrl-C and report progress."""

    def __init__(self, highs: _Highs) -> None:
        self.highs = highs
        self.first: float | None = None
        self.best: float | None = None
        self.bound = -math.inf
        self.cancelled = False
        self.done = threading.Event()
        self.failed: BaseException | None = None

    def run(self, progress: Callable[[float | None, float], None] | None) -> bool:
        """Run to the end; true if Ctrl-C ended it. An error raised by ``progress`` ends it too."""
        from highspy._core import cb

        _ok(self.highs.setCallback(self._called, None), "setCallback")
        for kind in (
            cb.HighsCallbackType.kCallbackMipImprovingSolution,
            cb.HighsCallbackType.kCallbackMipInterrupt,
            cb.HighsCallbackType.kCallbackSimplexInterrupt,
        ):
            _ok(self.highs.startCallback(kind), "startCallback")
        worker = threading.Thread(target=self._work, name="moetuner-highs", daemon=True)
        interrupted = False
        error: BaseException | None = None
        worker.start()
        reported = time.monotonic()
        # Not `join`: interrupted, it may take the thread for ended.
        while not self.done.is_set():
            try:
                self.done.wait(POLL_SECONDS)
                due = time.monotonic() - reported > 4 * POLL_SECONDS
                if progress is not None and error is None and due:
                    reported = time.monotonic()
                    progress(self.best, self.bound)
            except KeyboardInterrupt:
                self.cancelled = interrupted = True
            except BaseException as raised:
                self.cancelled, error = True, raised
        worker.join()
        _ok(self.highs.setCallback(None, None), "setCallback")
        if error or self.failed:
            raise error or self.failed or RuntimeError
        return interrupted

    def _work(self) -> None:
        try:
            _ok(self.highs.run(), "run")
        except BaseException as raised:
            self.failed = raised
        finally:
            self.done.set()

    def _called(self, kind: Any, _message: str, out: Any, into: Any, _data: Any) -> None:
        from highspy._core import cb

        if kind == cb.HighsCallbackType.kCallbackMipImprovingSolution:
            self.best = float(out.objective_function_value)
            self.first = self.best if self.first is None else self.first
        elif kind == cb.HighsCallbackType.kCallbackMipInterrupt:
            self.bound = float(out.mip_dual_bound)
        if into is not None and self.cancelled:
            into.user_interrupt = True


def _ok(status: Any, call: str) -> None:
    """Raise if HiGHS says that a call failed: raw calls never raise. A warning is no failure."""
    from highspy._core import HighsStatus

    if status == HighsStatus.kError:
        raise RuntimeError(f"HiGHS: {call} failed")


def _set(highs: _Highs, **options: bool | int | float | str) -> None:
    for name, value in options.items():
        _ok(highs.setOptionValue(name, value), f"setOptionValue({name!r}, {value!r})")


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)


def _behind(a: float, b: float) -> bool:
    return a > b and not _close(a, b)


def _column(name: str, value: ArrayLike, columns: int, dtype: Any) -> NDArray[Any]:
    array = np.asarray(value, dtype=dtype)
    if array.ndim and array.shape != (columns,):
        raise ValueError(f"{name} must be a number or [{columns}], got {list(array.shape)}")
    return np.array(np.broadcast_to(array, (columns,)))
