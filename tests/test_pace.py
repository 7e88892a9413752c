"""As many trials as there is time for."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moetuner.solver.pace import QUICK, paced
from moetuner.solver.result import Limits

START = np.zeros((1, 2, 2), np.int32)


class Annealer:
    """Takes a microsecond a trial, and notes what it was asked for."""

    def __init__(self, *, interrupted: bool = False) -> None:
        self.asked: list[tuple[int, int]] = []
        self.interrupted = interrupted

    def __call__(
        self, slots: np.ndarray, trials: int, restarts: int, limits: Limits
    ) -> tuple[np.ndarray, bool]:
        self.asked.append((trials, restarts))
        time.sleep(trials * restarts * 1e-6)
        return slots + 1, self.interrupted


@pytest.mark.parametrize("limits", [Limits(), Limits(time_limit=9, iterations=1000)])
def test_what_is_given_is_done(limits: Limits) -> None:
    anneal = Annealer()
    slots, interrupted = paced(anneal, START, trials=1000, restarts=3, limits=limits)
    assert anneal.asked == [(1000, 3)]
    assert (slots == 1).all()
    assert not interrupted


def test_enough_time_is_enough() -> None:
    anneal = Annealer()
    slots, _ = paced(anneal, START, trials=1000, restarts=3, limits=Limits(time_limit=60))
    assert anneal.asked == [(1000 // QUICK, 1), (1000, 3)]
    assert (slots == 2).all(), "the second begins where the first ended"


def test_with_less_time_there_are_fewer_restarts_then_trials() -> None:
    anneal, trials = Annealer(), 1_000_000
    paced(anneal, START, trials=trials, restarts=8, limits=Limits(time_limit=0.2))
    quick, (left, restarts) = anneal.asked
    assert quick == (trials // QUICK, 1)
    assert restarts == 1
    assert 0 < left < trials


def test_an_interrupt_ends_it() -> None:
    anneal = Annealer(interrupted=True)
    slots, interrupted = paced(anneal, START, trials=1000, restarts=3, limits=Limits(time_limit=60))
    assert len(anneal.asked) == 1
    assert interrupted
    assert (slots == 1).all()
