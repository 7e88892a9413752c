"""pareto(): what more and more moves from a running placement gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from moetuner._checks import instance, one_of, positive, seed_in
from moetuner.frozen import Frozen
from moetuner.placement import Placement, find_holders, keep_slots
from moetuner.problem import Problem
from moetuner.solver.answer import named
from moetuner.solver.bounds.caps import cap_report
from moetuner.solver.budget import Budget, History, Progress
from moetuner.solver.effort import FIRST_REACH, PARETO_PRICES, PARETO_STEPS, REACH_TIMES
from moetuner.solver.methods import METHODS, SEARCHES, Method
from moetuner.solver.run import Incumbent, Moves, Run, Stage
from moetuner.solver.stages.descent import descend
from moetuner.solver.stages.layers import LayerModel
from moetuner.solver.stages.moves import AT_PRICES, from_running, offer_running, require_moves
from moetuner.solver.stages.polish import POLISH


@dataclass(frozen=True, eq=False, repr=False)
class Trade(Frozen):
    """A point on the Pareto front of value and moves.

    Parameters
    ----------
    placement
        What to change to; experts that stay keep their slots.
    objective
        ``Objective.value`` of it.
    gain
        How much lower that is than the initial placement's.
    experts_moved, bytes_moved
        What it takes.
    caps_raised
        Imbalance of layers that exceed the load cap still.

    Examples
    --------
    >>> import moetuner as mt
    >>> placement = mt.Placement([[[0], [1]]])
    >>> trade = mt.Trade(placement, 1.25, gain=0.5, experts_moved=2, bytes_moved=2e6)
    >>> trade.to_dict()["gain"]
    0.5
    """

    placement: Placement
    objective: float
    gain: float
    experts_moved: int
    bytes_moved: float
    caps_raised: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return figures as JSON values."""
        return {
            figure.name: getattr(self, figure.name)
            for figure in fields(self)
            if figure.name != "placement"
        }


def pareto(
    problem: Problem,
    initial: Placement,
    *,
    expert_bytes: float = 1.0,
    method: Method = "heuristic",
    seed: int = 0,
    time_limit: float | None = None,
    iterations: int | None = None,
    effort: str = "default",
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Trade]:
    """Find what more and more moves gain, by steps and by solving at several prices of a move.

    Parameters
    ----------
    problem, method, seed, iterations, effort, threads, progress
        As for ``solve``.
    initial
        The placement that runs.
    expert_bytes
        Bytes of one expert of one layer.
    time_limit
        Seconds for all prices together.

    Returns
    -------
    list
        From no move, the initial placement, to the most, each with a lower objective than those
        before it, or less load above the caps. Where the initial placement breaks a rule, the
        first is one with the fewest moves that keeps all.

    Raises
    ------
    ValueError
        If the initial placement is not one of the problem, or an argument is out of range.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> problem = mt.Problem(statistics, mt.Topology(2), objective="balance")
    >>> trades = mt.pareto(problem, mt.Placement([[[0, 1], [2, 3]]]))
    >>> [(trade.experts_moved, trade.objective) for trade in trades]
    [(0, 1.5), (2, 1.25)]
    """
    instance("problem", problem, Problem, hint=", such as Problem(statistics, topology)")
    positive("expert_bytes", expert_bytes, "number of bytes")
    one_of("method", method, SEARCHES)
    seed = seed_in(seed)
    problem.check_running(initial)
    budget = Budget(time_limit, iterations, None, threads, progress, effort)
    if progress is not None:
        budget = replace(budget, progress=History(progress).add)
    run = Run(problem, seed=seed, budget=budget, moves=Moves(initial, expert_bytes=expert_bytes))
    offer_running(run)
    run.through((Stage(_descend), Stage(lambda run, part: _at_prices(run, METHODS[method], part))))
    return [
        _trade(run, initial, incumbent, run.rank_of_all(incumbent)[1])
        for incumbent in _undominated(run)
    ]


def find_few_moves(
    problem: Problem,
    initial: Placement,
    better: Placement,
    share: float,
    *,
    time_limit: float | None = None,
    threads: int | None = None,
) -> Placement | None:
    """Return the fewest steps from what runs that gain a share of what a better placement does.

    Of all steps those are taken that gain most for a move. None where they end before that.
    """
    budget = Budget(time_limit, threads=threads)
    run = Run(problem, budget=budget, moves=Moves(initial))
    start = offer_running(run)
    wanted = start.value - share * (start.value - run.judge(better.slots).value)
    model, reach = LayerModel(run), start.moves + FIRST_REACH

    def is_enough(steps: int) -> bool:
        return run.judge(path.after(steps)).value <= wanted

    while True:
        path, interrupted = descend(run, model, start.slots, initial, reach, budget)
        if interrupted:
            raise KeyboardInterrupt
        # Steps are the same to any limit that is farther, but for the last two moves before it.
        last = path.before(reach - 2)
        if reach >= problem.capacity.sum() or path.moves[-1] < reach - 2:
            last = len(path.value) - 1
        # Steps that bring layers within their caps come first.
        fewest = int(path.excess.argmin())
        if fewest <= last and is_enough(last):
            break
        if last == len(path.value) - 1:
            return None
        reach *= REACH_TIMES
    while fewest < last:
        middle = (fewest + last) // 2
        if is_enough(middle):
            last = middle
        else:
            fewest = middle + 1
    slots = keep_slots(initial.slots, run.judge(path.after(last)).slots, problem.capacity)
    return Placement(slots, num_experts=problem.experts)


def _descend(run: Run, budget: Budget) -> None:
    """Offer the ends of some of the steps that gain most for a move."""
    start, running = run.incumbents[0].slots, require_moves(run).initial
    path, interrupted = descend(run, LayerModel(run), start, running, np.inf, budget)
    for steps in path.spread(PARETO_STEPS):
        run.offer(path.after(steps), "moves")
    if interrupted:
        raise KeyboardInterrupt


def _at_prices(run: Run, stages: Sequence[Stage], budget: Budget) -> None:
    """Offer what a method solves at several prices of a move, beginning with none."""
    initial, left = require_moves(run).initial, len(PARETO_PRICES)

    def at(price: float, left: int) -> Incumbent:
        moves = Moves(initial, cost=price)
        ways, start = from_running(stages), None
        if price:
            # The steps from what runs are known: only those that are worth the price are taken.
            ways = (AT_PRICES, POLISH)
            start = min(
                run.incumbents,
                key=lambda incumbent: (incumbent.excess, incumbent.value + price * incumbent.moves),
            ).slots
        inner = run.inner(ways, budget.within(1 / left), moves=moves, start=start)
        return run.offer(inner.answer().slots, "prices", interrupted=inner.interrupted)

    free = at(0.0, left + 1)
    gain = run.incumbents[0].value - free.value
    if free.moves and gain > 0:
        for number, part in enumerate(PARETO_PRICES):
            at(part * gain / free.moves, left - number)


def _undominated(run: Run) -> list[Incumbent]:
    """Return incumbents that none equals or betters in moves, and in excess and objective."""
    ranks = [run.rank_of_all(incumbent) for incumbent in run.incumbents]
    front: list[int] = []
    for at in sorted(range(len(ranks)), key=lambda at: (run.incumbents[at].moves, *ranks[at])):
        if not front or ranks[at] < ranks[front[-1]]:
            front.append(at)
    return [run.incumbents[at] for at in front]


def _trade(run: Run, initial: Placement, incumbent: Incumbent, objective: float) -> Trade:
    """Build the trade of an incumbent; experts that stay keep their slots."""
    problem, placement = run.problem, initial
    if incumbent.moves or (find_holders(incumbent.slots, problem.experts) != initial.held).any():
        slots = keep_slots(initial.slots, incumbent.slots, problem.capacity)
        placement = Placement(slots, num_experts=problem.experts)
    return Trade(
        named(run, placement, "pareto", objective=objective),
        objective,
        gain=problem.value(initial) - objective,
        experts_moved=incumbent.moves,
        bytes_moved=incumbent.moves * require_moves(run).expert_bytes,
        caps_raised=dict(cap_report(problem, placement.slots).raised),
    )
