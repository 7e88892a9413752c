"""Fill a front from few moves upwards, so that a larger budget finds no worse placement.

First come steps down from the running placement, then searches at the price of a move, or at
falling prices where moves have none. The limit of moves decides only where this ends, not what
happens before: a larger one finds every placement that a smaller one finds. A time limit cuts the
search short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetuner.solver import effort
from moetuner.solver.arrays import Slots
from moetuner.solver.budget import Budget
from moetuner.solver.run import Incumbent, Moves, Stage
from moetuner.solver.stages.descent import Path, descend
from moetuner.solver.stages.layers import LayerModel, anneal, has_few_slots
from moetuner.solver.stages.moves.front import Front, list_move_limits


def fill(front: Front, budget: Budget, limit: float) -> None:
    """Add placements to a front, from few moves upwards, until more experts move than a limit."""
    run, start = front.run, front.running
    limit = int(min(limit, run.problem.capacity.sum()))
    prices = effort.JOINED_PRICES if front.mixer is None else effort.MIXED_PRICES
    filling = _Filling(front, LayerModel(run, prices.number), budget, limit)
    front.add(start)
    path = filling.step_down(start, limit)
    if has_few_slots(run) and not front.mixes_exactly:
        filling.use_up_limits(path)
    if budget.seconds_left is not None and budget.seconds_left <= budget.elapsed:
        # A search in less time than the steps took adds nothing.
        run.cut = True
        return
    if front.moves.price:
        # Searches at dearer prices gain nothing ("Budgets that rise").
        filling.search_at_prices([front.moves.price])
    else:
        first_price = max(path.steepest, effort.DEAREST * abs(start.value)) * prices.first
        falling_prices = first_price * prices.ratio ** np.arange(prices.number - 1)
        filling.search_at_prices([*falling_prices, 0.0])


@dataclass(frozen=True)
class _Filling:
    """A front that is filled up to a limit of moves, by a model of its layers, within a budget."""

    front: Front
    model: LayerModel
    budget: Budget
    limit: int

    def step_down(self, start: Incumbent, limit: int, *, is_start: bool = False) -> Path:
        """Return steps down from a placement, within a limit of moves, after adding their ends.

        The front gets the placement after the last step within each of the rising limits of moves.
        """
        front, run = self.front, self.front.run
        # A limit changes only the last two moves before it, so with two more all steps are alike.
        path, interrupted = self._descend(start.slots, limit + 2)
        limits = list_move_limits(front.running.moves, min(limit, int(path.moves.max())))
        for steps in sorted({path.before(moves) for moves in limits if moves >= start.moves}):
            front.add(run.judge(path.after(steps), "moves"), is_start=is_start)
        if interrupted:
            raise KeyboardInterrupt
        return path

    def use_up_limits(self, path: Path) -> None:
        """Go on from the ends of a path that use fewer moves than their limit allows.

        The path's next step needs more moves than are left, but another step may need fewer. Where
        the best mixtures of layers are known, they use up every limit already.
        """
        front, run = self.front, self.front.run
        for moves in list_move_limits(int(path.moves[0]), self.limit):
            steps = path.before(moves)
            if path.moves[steps] < moves and not self.budget.is_over():
                extension, interrupted = self._descend(path.after(steps), moves)
                end = extension.after(extension.best(moves))
                front.add(run.judge(end, "moves"), is_start=False)
                if interrupted:
                    raise KeyboardInterrupt

    def search_at_prices(self, falling_prices: list[float]) -> None:
        """Add the answers of searches at falling prices of a move, until more move than allowed."""
        front, run = self.front, self.front.run
        for number, price in enumerate(falling_prices):
            share = self.budget.within(1 / (len(falling_prices) - number))
            answer = self._search_at_price(price, share)
            front.add(answer)
            self._mix()
            # A smaller limit ends here; a larger one has mixed the same rows by now.
            if answer.moves > self.limit or self.budget.is_over():
                return
            # Not for large layers that survive losses: there every device counts, so that steps
            # are many and gain little (36 devices x 16 slots: three times as long as the steps
            # from what runs, which take most of the time already).
            if run.objective.is_of_windows or has_few_slots(run):
                best = run.judge(front.best_start(price, self.model.weight), "moves")
                self.step_down(best, 2 * best.moves + effort.MORE_MOVES, is_start=True)
        self._mix()

    def _search_at_price(self, price: float, budget: Budget) -> Incumbent:
        """Return the answer of a search from the best start at a price of a move."""
        run, start = self.front.run, self.front.best_start(price, self.model.weight)
        moves = Moves(self.front.moves.initial, cost=price)
        stage = Stage(lambda inner, share: anneal(inner, share, self.model))
        return run.adopt(run.run_inner((stage,), budget, moves=moves, start=start))

    def _mix(self) -> None:
        """Add mixtures within all limits; where they are exact, the front adds them when asked."""
        if not self.front.mixes_exactly:
            limits = list_move_limits(self.front.running.moves, self.limit)
            self.front.mix(limits, self.model.weight)

    def _descend(self, start: Slots, most_moves: int) -> tuple[Path, bool]:
        """Return steps down from slots [L,D,S], and if interrupted."""
        initial, budget = self.front.moves.initial, self.budget.within()
        return descend(self.front.run, self.model, start, initial, most_moves, budget)
