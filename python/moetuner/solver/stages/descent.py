"""Greedy descent from a placement: the step that gains most per moved copy, again and again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetuner.placement import Placement, moves_from
from moetuner.problem.capacity import pad_slots
from moetuner.solver import effort
from moetuner.solver.arrays import Floats, Integers, Slots
from moetuner.solver.budget import Budget
from moetuner.solver.run import Run, Stage
from moetuner.solver.stages.layers import (
    LayerModel,
    charges_copies,
    has_few_slots,
    is_searched_anew,
)

# Steps end after this share of what they could gain: the last ones fit noise of the windows seen
# ("The default and cheaper methods").
SETTLED = 0.5
# With fewer windows than this all steps fit noise, so none is taken.
SETTLED_WINDOWS = 4


@dataclass(frozen=True)
class Path:
    """Steps from one placement to better ones.

    Parameters
    ----------
    start
        Slots [L,D,S].
    places, experts
        The two flat slots that a step writes, and the experts that it writes there [N,2].
    moves
        Copies that have moved in all, at the start and after every step [N+1].
    excess
        Part by which layers exceed their caps [N+1].
    value
        The objective of the search, less that of the start [N+1].
    """

    start: Slots
    places: Integers
    experts: Slots
    moves: Integers
    excess: Floats
    value: Floats

    def after(self, steps: int) -> Slots:
        """Return slots [L,D,S] after so many steps."""
        slots = self.start.copy()
        slots.reshape(-1)[self.places[:steps].ravel()] = self.experts[:steps].ravel()
        return slots

    def before(self, moves: int) -> int:
        """Return the number of steps before the first one that exceeds a number of moves."""
        return int(np.argmax(np.append(self.moves, np.inf) > moves)) - 1

    @property
    def steepest(self) -> float:
        """Gain per copy of the first step that moves any."""
        moving = np.flatnonzero(self.moves > self.moves[0])
        if not moving.size:
            return 0.0
        first = int(moving[0])
        return float(self.value[0] - self.value[first]) / int(self.moves[first] - self.moves[0])

    def best(self, most_moves: float) -> int:
        """Return the best number of steps with at most so many moves."""
        allowed = np.flatnonzero(self.moves <= most_moves)
        return int(allowed[np.lexsort((self.value[allowed], self.excess[allowed]))[0]])


def descend(
    run: Run, model: LayerModel, start: Slots, running: Placement, most_moves: float, budget: Budget
) -> tuple[Path, bool]:
    """Return the steps down from slots [L,D,S] that gain most per move, and if interrupted.

    Moves are counted from the ``running`` placement, up to ``most_moves``.
    """
    problem, (layers, links) = run.problem, model.core()
    places, experts, figures, interrupted = layers.descend(
        np.ascontiguousarray(start),
        pad_slots(running.slots, problem.capacity),
        max_moves=int(most_moves) if most_moves < problem.capacity.sum() else None,
        links=links,
        time_limit=budget.seconds_left,
        threads=budget.threads,
    )
    excess = problem.caps.excess(Placement(start, num_experts=problem.num_experts)).sum()
    moves = int(moves_from(running.held, start).sum())
    begin = [[moves, excess, 0.0]]
    moved, over, value = np.concatenate([begin, figures / [1.0, 1.0, model.unit]]).T
    return Path(start, places, experts, moved.astype(np.int64), over, value), interrupted


def _settle(run: Run, budget: Budget) -> None:
    """Offer the best placement after steps down from it: for balance, half of their gain.

    A search that generalises ends a little behind one that fits the windows seen. For balance, the
    first steps lose nothing on other traffic, but the last ones do; for time none does.
    """
    start = run.best.slots
    running = Placement(start, num_experts=run.problem.num_experts)
    path, interrupted = descend(run, LayerModel(run), start, running, np.inf, budget.within())
    if len(path.value) > 1:
        share = 1.0 if run.problem.aim.predicts_time else SETTLED
        enough = np.flatnonzero(path.value <= share * path.value[-1])[0]
        run.offer(path.after(int(enough)), "layers", is_start=True)
    if interrupted:
        raise KeyboardInterrupt


def _may_settle(run: Run) -> bool:
    """Return whether steps down are worth their time: in small layers, and with some windows.

    In large layers all exchanges take longer than the search (24 s after 8 s for 58 x 256).
    """
    used = int(np.count_nonzero(run.objective.windows.weight))
    is_small = has_few_slots(run) or (
        charges_copies(run) and run.slots_of_layer <= effort.STEP_SLOTS
    )
    return is_searched_anew(run) and is_small and used >= SETTLED_WINDOWS


SETTLE = Stage(_settle, applies=_may_settle)
