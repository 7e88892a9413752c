"""Integer programs: exact answers, honest statuses, and not a byte of output."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetuner.solver.milp.highs import Ilp


def knapsack(
    seed: int = 0, n: int = 12, rows: int = 3
) -> tuple[Ilp, np.ndarray, np.ndarray, np.ndarray]:
    """Make a small knapsack of several rows: program, value [n], weight [rows, n], room [rows]."""
    rng = np.random.default_rng(seed)
    value, weight = rng.integers(10, 60, n), rng.integers(5, 40, (rows, n))
    room = weight.sum(axis=1) // 2
    ilp = Ilp(-value)
    row, column = np.indices(weight.shape)
    ilp.add_rows(-np.inf, room, row, column, weight)
    return ilp, value, weight, room


def hard(n: int = 60) -> Ilp:
    """Make a market split (Cornuejols and Dawande): tiny, and out of reach for branch and bound."""
    rng = np.random.default_rng(1)
    rows, columns = 6, n
    weight = rng.integers(0, 100, (rows, columns))
    # The rows hold up to a surplus and a shortage, which are to be small.
    ilp = Ilp(
        np.r_[np.zeros(columns), np.ones(2 * rows)],
        upper=np.r_[np.ones(columns), np.full(2 * rows, np.inf)],
        integer=np.r_[np.ones(columns), np.zeros(2 * rows)],
    )
    row, column = np.indices(weight.shape)
    half = weight.sum(axis=1) // 2
    each = np.arange(rows)
    ilp.add_rows(
        half,
        half,
        np.r_[row.ravel(), each, each],
        np.r_[column.ravel(), columns + each, columns + rows + each],
        np.r_[weight.ravel(), np.ones(rows), -np.ones(rows)],
    )
    return ilp


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), rows=st.integers(1, 3))
def test_agrees_with_brute_force(seed: int, n: int, rows: int) -> None:
    """The optimum is that of trying every choice; the bound proves it."""
    ilp, value, weight, room = knapsack(seed, n, rows)
    solution = ilp.solve()
    choices = np.array(list(itertools.product((0, 1), repeat=n)))
    best = (choices @ value)[(choices @ weight.T <= room).all(axis=1)].max()
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(-best)
    assert solution.bound == pytest.approx(-best)
    assert ilp.broken(solution.values) is None


def test_rows_added_later_count() -> None:
    """A row added between two solves cuts the first optimum off."""
    ilp = Ilp([-1.0, -2.0, -3.0])
    assert ilp.solve().objective == -6
    ilp.add_rows(-np.inf, 1, [0, 0, 0], [0, 1, 2])
    assert ilp.solve().objective == -3
    ilp.add_rows(0, 0, [0], [2])
    solution = ilp.solve(start=[1, 0, 0], start_objective=-1.0)
    assert solution.objective == -2
    assert solution.values.tolist() == [0, 1, 0]


def test_linear_programs_have_a_bound() -> None:
    """Without integer columns the optimum is its own bound."""
    ilp = Ilp([-1.0, -1.0], upper=np.inf, integer=False)
    ilp.add_rows(-np.inf, [3, 4], [0, 0, 1], [0, 1, 0], [2, 1, 1])
    solution = ilp.solve()
    assert (solution.objective, solution.bound, solution.status) == (-3, -3, "optimal")


def test_the_first_incumbent_is_the_start() -> None:
    """HiGHS begins with the warm start, at the objective that the caller computed."""
    ilp = hard()
    values = np.zeros(ilp.columns)
    half = ilp.row_bounds[0]
    values[60:66] = half
    solution = ilp.solve(start=values, start_objective=float(half.sum()), nodes=1)
    assert solution.first == pytest.approx(half.sum())
    assert solution.objective <= half.sum()
    assert solution.status == "feasible"


def test_a_wrong_start_is_a_fault() -> None:
    """An objective or a row that does not fit shows that model and caller disagree."""
    ilp, value, _, _ = knapsack()
    with pytest.raises(RuntimeError, match=r"is worth 0\.0, not 7"):
        ilp.solve(start=np.zeros(12), start_objective=7.0)
    with pytest.raises(RuntimeError, match="not feasible: row 0"):
        ilp.solve(start=np.ones(12), start_objective=-float(value.sum()))
    with pytest.raises(RuntimeError, match="not feasible: column 3"):
        ilp.solve(start=np.eye(12)[3] * 0.5)


def test_nothing_feasible_is_an_error() -> None:
    """An infeasible program raises instead of returning values."""
    ilp = Ilp([1.0])
    ilp.add_rows(2, 3, [0], [0])
    with pytest.raises(ValueError, match="infeasible"):
        ilp.solve()


def test_same_arguments_same_answer() -> None:
    """Two solves to a node limit agree in every value."""
    a, b = hard().solve(nodes=50, seed=3), hard().solve(nodes=50, seed=3)
    assert a.objective == b.objective
    assert np.array_equal(a.values, b.values)
    assert a.bound == b.bound


def test_reaches_a_gap() -> None:
    """A wide gap ends the search with a status that says so."""
    solution = hard().solve(absolute_gap=1e6, nodes=1000)
    assert solution.status == "gap_reached"
    assert solution.bound <= solution.objective


def test_a_time_limit_is_a_status() -> None:
    """Running out of time is no error, and the start survives it."""
    ilp = hard()
    values = np.r_[np.zeros(60), ilp.row_bounds[0], np.zeros(6)]
    solution = ilp.solve(start=values, time_limit=0.0)
    assert solution.status == "time_limit"
    assert solution.objective <= ilp.objective(values)


def test_progress_is_called_here_and_may_stop_it() -> None:
    """Progress arrives on the calling thread; what it raises ends the search and comes out."""
    seen = []

    def progress(objective: float | None, bound: float) -> None:
        seen.append((threading.get_ident(), objective, bound))
        if len(seen) == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        hard().solve(progress=progress)
    assert {thread for thread, _, _ in seen} == {threading.get_ident()}
    assert math.isfinite(seen[-1][1])


@pytest.mark.skipif(not hasattr(os, "kill") or os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_returns_the_incumbent() -> None:
    """Ctrl-C during a long search gives the best values so far."""
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    solution = hard().solve()
    timer.join()
    assert solution.status == "interrupted"
    assert solution.values is not None
    assert hard().broken(solution.values) is None


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even a banner reaches file descriptors 1 and 2, in this process or in a new one."""
    knapsack()[0].solve()
    code = "import test_ilp; test_ilp.knapsack()[0].solve()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Ilp([[1.0]]), "cost must be finite numbers"),
        (lambda: Ilp([1.0], upper=[1, 2]), r"upper must be a number or \[1\], got \[2\]"),
        (lambda: Ilp([1.0]).add_rows(0, 1, [0], [1]), "column must be from 0 to 0, got 1 to 1"),
        (lambda: Ilp([1.0]).add_rows(0, 1, [1], [0]), "row must be from 0 to 0, got 1 to 1"),
    ],
)
def test_wrong_arguments_are_named(build, text: str) -> None:
    """A message names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=text):
        build()
