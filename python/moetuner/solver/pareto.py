"""pareto(): the gain of more and more moves from a running placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from moetuner._checks import instance, one_of, positive, seed_in
from moetuner.frozen import Frozen
from moetuner.placement import Placement, find_holders
from moetuner.problem import Problem
from moetuner.solver.answer import make_placement, with_origin
from moetuner.solver.bounds.caps import cap_report
from moetuner.solver.budget import Budget, History, Progress
from moetuner.solver.methods import METHODS, METHODS_WITH_INITIAL, Method
from moetuner.solver.run import Incumbent, Moves, Run, Stage
from moetuner.solver.stages.moves import from_running
from moetuner.solver.stages.moves.fewest import find_fewest_moves
from moetuner.solver.stages.moves.filling import fill
from moetuner.solver.stages.moves.front import Front, undominated
from moetuner.solver.stages.repair import offer_running

# Most trades that are listed, at about even distances of the logarithm of their moves.
TRADES = 24


@dataclass(frozen=True, eq=False, repr=False)
class Trade(Frozen):
    """A point on the Pareto front of the objective and the number of moves.

    Parameters
    ----------
    placement
        The placement to move to; experts that stay keep their slots.
    objective
        Its ``Objective.value``.
    gain
        Reduction of that value from the one of the initial placement.
    experts_moved, bytes_moved
        Experts that have to move, and their bytes.
    caps_raised
        Imbalance of layers that still exceed the load cap.

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
    """Compute the gain of more and more moves, by steps and by solving at falling prices of a move.

    Parameters
    ----------
    problem, method, seed, iterations, effort, threads, progress
        As for ``solve``.
    initial
        The placement that runs.
    expert_bytes
        Bytes of one expert of one layer.
    time_limit
        Seconds for the whole front.

    Returns
    -------
    list
        Trades from no move, the initial placement, to the most moves. Each has a lower objective
        than those before it, or less load above the caps. Where the initial placement breaks a
        rule, the first trade keeps all rules with the fewest moves.

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
    one_of("method", method, METHODS_WITH_INITIAL)
    seed = seed_in(seed)
    problem.check_running(initial)
    budget = Budget(time_limit, iterations, None, threads, progress, effort)
    if progress is not None:
        budget = replace(budget, progress=History(progress).add)
    run = Run(problem, seed=seed, budget=budget, moves=Moves(initial, expert_bytes=expert_bytes))
    offer_running(run)
    front = Front(run)

    def at_no_price(run: Run, budget: Budget) -> None:
        inner = run.run_inner(from_running(METHODS[method]), budget, moves=Moves(initial))
        run.offer(inner.answer().slots, "free", interrupted=inner.interrupted)

    # Under a time limit half of it is left for the solve with free moves (not measured).
    few_moves = Stage(lambda _, share: fill(front, share, np.inf), share=lambda _: 0.5)
    run.run_stages((few_moves, Stage(at_no_price)))
    for incumbent in run.incumbents:
        front.add(incumbent)
    return [
        _make_trade(run, initial, point, run.final_rank(point)[1])
        for point in _list_points(run, front)
    ]


def search_fewest_moves(
    problem: Problem,
    initial: Placement,
    enough: float,
    *,
    most_moves: int,
    time_limit: float | None = None,
    threads: int | None = None,
) -> Placement | None:
    """Return the point of the front with the fewest moves whose objective is ``enough`` or less.

    None if no point with at most ``most_moves`` moves has it.
    """
    budget = Budget(time_limit, threads=threads)
    run = Run(problem, budget=budget, moves=Moves(initial))
    offer_running(run)
    point = find_fewest_moves(Front(run), budget, most_moves, enough)
    return None if point is None else make_placement(run, point)


def _list_points(run: Run, front: Front) -> list[Incumbent]:
    """Return undominated points by all windows, up to about two dozen, fewest moves first."""
    points = front.undominated()
    moves = np.array([point.moves for point in points])
    spread = np.geomspace(1, max(moves[-1] - moves[0], 1), TRADES) + moves[0]
    last = {int(np.flatnonzero(moves <= limit)[-1]) for limit in spread}
    chosen = [points[at] for at in sorted(last | {0, len(points) - 1})]
    return undominated((point, run.final_rank(point)) for point in chosen)


def _make_trade(run: Run, initial: Placement, incumbent: Incumbent, objective: float) -> Trade:
    """Build the trade of an incumbent; experts that stay keep their slots."""
    problem, placement = run.problem, initial
    if (
        incumbent.moves
        or (find_holders(incumbent.slots, problem.num_experts) != initial.held).any()
    ):
        placement = make_placement(run, incumbent)
    return Trade(
        with_origin(run, placement, "pareto", objective=objective),
        objective,
        gain=problem.value(initial) - objective,
        experts_moved=incumbent.moves,
        bytes_moved=incumbent.moves * run.require_moves().expert_bytes,
        caps_raised=dict(cap_report(problem, placement.slots).raised),
    )
