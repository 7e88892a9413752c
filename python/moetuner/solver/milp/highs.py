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
    """What HiGHS found.

    Parameters
    ----------
    values
        Of all columns [columns], whole where they have to be; None if nothing feasible was found.
    objective
        Of these values; None without them.
    bound
        Proven: no feasible values have a better objective.
    status
        ``"optimal"`` only where objective and bound agree, ``"gap_reached"`` where they agree as
        far as was asked, ``"feasible"`` at the node limit.
    first
        Objective of the first values that HiGHS held: those of the warm start, where one was given.
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
        self._rows: list[Rows] = []
        self._highs: _Highs | None = None

    def add_rows(
        self,
        lower: ArrayLike,
        upper: ArrayLike,
        row: ArrayLike,
        column: ArrayLike,
        value: ArrayLike = 1.0,
    ) -> None:
        """Add ``lower <= A x <= upper`` with A given by its entries; also between two solves.

        Parameters
        ----------
        lower, upper
            Of every new row, broadcast against each other to [rows].
        row, column, value
            Of every entry [entries]; ``row`` counts from the first of the new rows, ``value``
            may be one number. An entry must not be given twice.
        """
        rows = Rows.of(lower, upper, row, column, value, self.columns)
        self._rows.append(rows)
        if self._highs is not None:
            _add(self._highs, rows)

    def make_whole(self, columns: NDArray[np.int64]) -> None:
        """Make some columns [n] whole numbers; also between two solves."""
        self.integer[columns] = 1
        if self._highs is not None:
            kind = np.ones(len(columns), dtype=np.uint8)
            status = self._highs.changeColsIntegrality(len(columns), columns.astype(np.int32), kind)
            _ok(status, "changeColsIntegrality")

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
        first = 0
        for rows in self._rows:
            sums, scale = rows.times(values), 1 + rows.times(values, absolute=True)
            wrong = (sums < rows.lower - slack * scale) | (sums > rows.upper + slack * scale)
            if wrong.any():
                at = int(np.argmax(wrong))
                return f"row {first + at}: {sums[at]} in [{rows.lower[at]}, {rows.upper[at]}]"
            first += len(rows.lower)
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
        """Run HiGHS and return the best values that it found.

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
        if values is not None:
            self._check_start(values, start_objective)
        highs = self._highs = self._highs or self._build()
        _set(
            highs,
            random_seed=seed % 2**31,
            mip_rel_gap=float(gap),
            mip_abs_gap=float(absolute_gap),
            mip_max_nodes=2**31 - 1 if nodes is None else int(nodes),
            time_limit=math.inf if time_limit is None else max(float(time_limit), 0.0),
        )
        # Forget the last solve, or its values and its clock would count in this one.
        _ok(highs.clearSolver(), "clearSolver")
        if values is not None:
            columns = np.arange(self.columns, dtype=np.int32)
            _ok(highs.setSolution(self.columns, columns, values), "setSolution")
        watch = _Watch(highs)
        interrupted = watch.run(progress)
        return self._solution(highs, values, watch, interrupted, max(gap, 0.0), absolute_gap)

    def relax(
        self,
        *,
        time_limit: float | None = None,
        progress: Callable[[float | None, float], None] | None = None,
    ) -> Solution:
        """Solve the linear relaxation, from where the last one ended: cheap after a few new rows.

        Returns
        -------
        Solution
            Its values need not be whole. Without values the bound is infinite and ``status`` says
            why: ``"time_limit"`` or ``"interrupted"``.
        """
        highs = self._highs = self._highs or self._build()
        limit = math.inf if time_limit is None else max(float(time_limit), 0.0)
        _set(highs, solve_relaxation=True, time_limit=limit)
        # The clock must begin anew, the basis need not.
        basis = highs.getBasis()
        _ok(highs.clearSolver(), "clearSolver")
        if basis.valid:
            _ok(highs.setBasis(basis), "setBasis")
        interrupted = _Watch(highs).run(progress)
        _set(highs, solve_relaxation=False)
        return self._relaxed(highs, interrupted)

    def _relaxed(self, highs: _Highs, interrupted: bool) -> Solution:
        from highspy._core import HighsModelStatus as Model

        ended = highs.getModelStatus()
        if ended in (Model.kInfeasible, Model.kUnbounded, Model.kUnboundedOrInfeasible):
            raise ValueError(f"the relaxation is {highs.modelStatusToString(ended).lower()}")
        if ended not in (Model.kOptimal, Model.kModelEmpty):
            status: Status = "interrupted" if interrupted else "time_limit"
            return Solution(None, None, -math.inf, status)
        values = np.array(highs.getSolution().col_value, dtype=np.float64)
        worth = self.objective(values)
        return Solution(values, worth, worth, "interrupted" if interrupted else "optimal")

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

    def _build(self) -> _Highs:
        # The public class `highspy.Highs` prints a banner before it can be told not to; the class
        # beneath it does not.
        from highspy._core import MatrixFormat, ObjSense, _Highs

        highs = _Highs()
        _set(highs, output_flag=False, log_to_console=False, threads=1, parallel="off")
        rows = Rows.all(self._rows)
        status = highs.passModel(
            self.columns,
            len(rows.lower),
            len(rows.index),
            MatrixFormat.kRowwise.value,
            ObjSense.kMinimize.value,
            self.offset,
            self.cost,
            self.lower,
            self.upper,
            rows.lower,
            rows.upper,
            rows.start,
            rows.index,
            rows.value,
            self.integer,
        )
        _ok(status, "passModel")
        return highs

    def _solution(
        self,
        highs: _Highs,
        start: NDArray[np.float64] | None,
        watch: _Watch,
        interrupted: bool,
        gap: float,
        absolute_gap: float,
    ) -> Solution:
        from highspy._core import HighsModelStatus as Model

        ended = highs.getModelStatus()
        if start is None and ended in (
            Model.kInfeasible,
            Model.kUnbounded,
            Model.kUnboundedOrInfeasible,
        ):
            raise ValueError(f"the program is {highs.modelStatusToString(ended).lower()}")
        known: dict[Any, Status] = {
            Model.kOptimal: "gap_reached",
            Model.kModelEmpty: "optimal",
            Model.kSolutionLimit: "feasible",
            Model.kTimeLimit: "time_limit",
            Model.kInterrupt: "interrupted",
        }
        if ended not in known:
            raise RuntimeError(f"HiGHS ended with status {highs.modelStatusToString(ended)!r}")
        values, objective = start, None if start is None else self.objective(start)
        first = watch.first
        if first is not None and objective is not None and _behind(first, objective):
            raise RuntimeError(f"HiGHS began with {first}, not with the start's {objective}")
        info = highs.getInfo()
        if info.primal_solution_status == 2:  # a feasible point
            found = np.array(highs.getSolution().col_value, dtype=np.float64)
            whole = self.integer != 0
            found[whole] = np.rint(found[whole])
            if objective is None or self.objective(found) < objective:
                values, objective = found, self.objective(found)
        bound = float(info.mip_dual_bound)
        if not self.integer.any() or not self.columns:
            proven = ended in (Model.kOptimal, Model.kModelEmpty) and objective is not None
            bound = objective if proven and objective is not None else -math.inf
        status = "interrupted" if interrupted else known[ended]
        if status == "gap_reached" and objective is not None:
            allowed = max(gap * abs(objective), absolute_gap)
            if allowed == 0 or _close(objective, bound):
                status = "optimal"
        return Solution(values, objective, bound, status, first)


class _Watch:
    """Runs HiGHS on a thread of its own, so that this one can take Ctrl-C and report progress."""

    def __init__(self, highs: _Highs) -> None:
        self.highs = highs
        self.first: float | None = None
        self.best: float | None = None
        self.bound = -math.inf
        self.stop = False
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
                self.stop = interrupted = True
            except BaseException as raised:
                self.stop, error = True, raised
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
        if into is not None and self.stop:
            into.user_interrupt = True


def _add(highs: _Highs, rows: Rows) -> None:
    count, entries = len(rows.lower), len(rows.index)
    bounds = rows.lower, rows.upper
    if count:
        start, index, value = rows.start[:-1], rows.index, rows.value
        _ok(highs.addRows(count, *bounds, entries, start, index, value), "addRows")


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


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix, one after the other (CSR)."""

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    start: NDArray[np.int32]
    index: NDArray[np.int32]
    value: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        lower: ArrayLike,
        upper: ArrayLike,
        row: ArrayLike,
        column: ArrayLike,
        value: ArrayLike,
        columns: int,
    ) -> Rows:
        """Sort entries (row, column, value) into rows; arguments broadcast, see `Ilp.add_rows`."""
        low, high = np.broadcast_arrays(
            np.atleast_1d(np.asarray(lower, dtype=np.float64)), np.asarray(upper, dtype=np.float64)
        )
        row_of, column_of, entry = np.broadcast_arrays(
            np.asarray(row, dtype=np.int64),
            np.asarray(column, dtype=np.int64),
            np.asarray(value, dtype=np.float64),
        )
        for name, ids, n in (("row", row_of, len(low)), ("column", column_of, columns)):
            if ids.size and (ids.min() < 0 or ids.max() >= n):
                found = f"{ids.min()} to {ids.max()}"
                raise ValueError(f"{name} must be from 0 to {n - 1}, got {found}")
        if not np.isfinite(entry).all() or np.isnan(low).any() or np.isnan(high).any():
            raise ValueError("rows must have finite entries and bounds that are numbers")
        row_of, column_of, entry = row_of.ravel(), column_of.ravel(), entry.ravel()
        order = np.lexsort((column_of, row_of))
        start = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(low)))])
        return cls(
            np.ascontiguousarray(low),
            np.ascontiguousarray(high),
            start.astype(np.int32),
            column_of[order].astype(np.int32),
            np.ascontiguousarray(entry[order]),
        )

    @classmethod
    def all(cls, parts: list[Rows]) -> Rows:
        """Put rows below each other."""
        none, no_index = np.zeros(0), np.zeros(0, np.int32)
        empty = cls(none, none, np.zeros(1, np.int32), no_index, none)
        parts = [empty, *parts]
        first = np.cumsum([0, *(len(part.index) for part in parts[:-1])])
        starts = [part.start[:-1] + at for part, at in zip(parts, first, strict=True)]
        entries = sum(len(part.index) for part in parts)
        return cls(
            np.concatenate([part.lower for part in parts]),
            np.concatenate([part.upper for part in parts]),
            np.concatenate([*starts, [entries]]).astype(np.int32),
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.value for part in parts]),
        )

    def times(self, values: NDArray[np.float64], *, absolute: bool = False) -> NDArray[np.float64]:
        """Multiply with some values [columns]; or sum up the sizes of the terms."""
        terms = self.value * values[self.index]
        row = np.repeat(np.arange(len(self.lower)), np.diff(self.start))
        sums: NDArray[np.float64] = np.zeros(len(self.lower))
        np.add.at(sums, row, np.abs(terms) if absolute else terms)
        return sums
