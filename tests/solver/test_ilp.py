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
from programs import broken

from moetuner.solver.milp.highs import Ilp


def knapsack(seed: int = 0, n: int = 12, rows: int = 3) -> tuple[Ilp, np.ndarray, np.ndarray]:
    """Make a knapsack of several rows: program, and all choices [2**n,n] that keep them."""
    rng = np.random.default_rng(seed)
    value, weight = rng.integers(10, 60, n), rng.integers(5, 40, (rows, n))
    ilp = Ilp(-value)
    row, column = np.indices(weight.shape)
    ilp.add_rows(-np.inf, weight.sum(axis=1) // 2, row, column, weight)
    choices = np.array(list(itertools.product((0, 1), repeat=n)))
    return ilp, value, choices[(choices @ weight.T <= weight.sum(axis=1) // 2).all(axis=1)]


def hard(n: int = 60) -> tuple[Ilp, np.ndarray]:
    """Make a market split (Cornuejols and Dawande): tiny, and out of reach; and a start."""
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
    half, own = weight.sum(axis=1) // 2, np.arange(rows)
    ilp.add_rows(
        half,
        half,
        np.r_[row.ravel(), own, own],
        np.r_[column.ravel(), columns + own, columns + rows + own],
        np.r_[weight.ravel(), np.ones(rows), -np.ones(rows)],
    )
    return ilp, np.r_[np.zeros(columns), half, np.zeros(rows)]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), rows=st.integers(1, 3))
def test_agrees_with_brute_force(seed: int, n: int, rows: int) -> None:
    """From any start the optimum is that of trying every choice; the bound proves it."""
    ilp, value, choices = knapsack(seed, n, rows)
    solution = ilp.solve(choices[seed % len(choices)])
    best = (choices @ value).max()
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(-best)
    assert solution.bound == pytest.approx(-best)
    assert broken(ilp, solution.values) is None


def test_limits_are_statuses() -> None:
    """A wide gap, no time and few nodes end the search, and the status says so."""
    ilp, start = hard()
    near, late = ilp.solve(start, absolute_gap=1e6, nodes=100), ilp.solve(start, time_limit=0.0)
    few = ilp.solve(start, nodes=1)
    assert [of.status for of in (near, late, few)] == ["gap_reached", "time_limit", "feasible"]
    assert near.bound <= near.objective
    assert max(late.objective, few.objective) <= start.sum()
    one, two = (hard()[0].solve(start, nodes=50, seed=3) for _ in range(2))
    assert (one.objective, one.bound) == (two.objective, two.bound)
    assert np.array_equal(one.values, two.values)


def test_progress_is_called_here_and_may_stop_it() -> None:
    """Progress arrives on the calling thread; what it raises ends the search and comes out."""
    seen = []

    def progress(objective: float | None, bound: float) -> None:
        seen.append((threading.get_ident(), objective, bound))
        if objective is not None:  # on a busy machine the start is not yet taken
            raise RuntimeError("enough")

    ilp, start = hard()
    with pytest.raises(RuntimeError, match="enough"):
        ilp.solve(start, progress=progress)
    assert {thread for thread, _, _ in seen} == {threading.get_ident()}
    assert math.isfinite(seen[-1][1])


@pytest.mark.skipif(not hasattr(os, "kill") or os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_returns_the_incumbent() -> None:
    """Ctrl-C during a search gives the best values so far."""
    ilp, start = hard()
    solution = ilp.solve(start, progress=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert solution.status == "interrupted"
    assert broken(ilp, solution.values) is None


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even a banner reaches file descriptors 1 and 2, in this process or in a new one."""
    knapsack()[0].solve(np.zeros(12))
    code = "import numpy as np, test_ilp; test_ilp.knapsack()[0].solve(np.zeros(12))"
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env=paths)
    assert capfd.readouterr() == ("", "")
