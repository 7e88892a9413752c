"""solve(): one entry, one result, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moetuner._checks import ArgumentError, instance, not_negative, one_of, seed_in
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver.answer import build_result
from moetuner.solver.balancing import balance
from moetuner.solver.bounds.certificate import Certificate
from moetuner.solver.bounds.verification import verify
from moetuner.solver.budget import Budget, History, Progress
from moetuner.solver.effort import EFFORTS
from moetuner.solver.methods import ALIASES, METHODS, METHODS_WITH_INITIAL, Method
from moetuner.solver.pareto import Trade, pareto, search_fewest_moves
from moetuner.solver.planning import Plan, plan, plan_losses
from moetuner.solver.result import Details, Result
from moetuner.solver.run import Moves, Run
from moetuner.solver.stages.floor import balanced
from moetuner.solver.stages.moves import from_running
from moetuner.solver.stages.repair import repair

__all__ = [
    "ALIASES",
    "EFFORTS",
    "METHODS",
    "Certificate",
    "Details",
    "Method",
    "Plan",
    "Progress",
    "Result",
    "Trade",
    "balance",
    "pareto",
    "plan",
    "plan_losses",
    "search_fewest_moves",
    "solve",
    "verify",
]


def solve(
    problem: Problem,
    method: Method = "joint",
    *,
    seed: int = 0,
    time_limit: float | None = None,
    iterations: int | None = None,
    gap: float | None = None,
    cutoff: float | None = None,
    effort: str = "default",
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    initial: Placement | None = None,
    move_budget: float | None = None,
    move_cost: float = 0.0,
    expert_bytes: float = 1.0,
) -> Result:
    """Place the experts.

    Parameters
    ----------
    problem
        The problem to solve.
    method
        ``joint`` (the default), ``paper`` (MoETuner's two stages; ``moetuner`` means it too),
        ``heuristic`` (the search of ``joint`` without proofs), ``quick`` (balance of windows within
        milliseconds, as the plugins decide), or a baseline: ``contiguous``, ``round_robin``,
        ``random``, ``lpt``, ``eplb``, ``exflow``.
    seed
        Random seed.
    time_limit
        Seconds; the best placement so far is returned. Without it, or beyond 30 years, the answer
        is a function of (problem, method, seed) alone, the same on every machine and for any number
        of threads.
    iterations
        Search steps of each start; by default chosen by the problem's size.
    gap
        Stop when (objective - bound) / objective is at most this.
    cutoff
        Objective of a known answer, for callers who try several problems. Where all slots must be
        full, and the answer that may leave some empty is not below it, that answer is filled up,
        and full slots are not searched. It does nothing under a time limit.
    effort
        How much to search without a time limit: ``default``, seconds for most problems; ``brief``,
        a third to two thirds of that, mostly within a quarter of a per cent; or ``thorough``, up to
        minutes for a last half per cent.
    threads
        Threads to use, all cores by default.
    progress
        Called now and then with a ``Progress``, from the calling thread: the phase, and the best
        objective and bound so far. ``Result.history`` keeps what changed, listened to or not.
    initial
        The placement that runs, to be improved by few moves; experts that stay keep their slots.
        The nearest one of equally good answers is returned: devices that are alike exchange what
        they hold, and layers that gain nothing stay. With ``joint`` and ``heuristic``.
    move_budget
        Bytes that may move, from device to device; None, or infinity, for any number.
    move_cost
        Cost of a moved byte, in units of the objective.
    expert_bytes
        Bytes of one expert of one layer; with 1, budget and cost are of experts.

    Returns
    -------
    Result
        An interrupt (Ctrl-C) or an exhausted limit gives the best placement so far, with its
        status.

    Raises
    ------
    ValueError
        If the method is unknown or an argument is out of range.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> result = mt.solve(mt.Problem(statistics, mt.Topology(2), objective="balance"))
    >>> result.objective, result.placement.device_of.tolist()
    (1.25, [[0, 1, 1, 0]])
    """
    instance("problem", problem, Problem, hint=", such as Problem(statistics, topology)")
    name: str = ALIASES.get(method, method) if isinstance(method, str) else method
    one_of("method", name, METHODS)
    seed = seed_in(seed)
    budget = Budget(time_limit, iterations, gap, threads, progress, effort, cutoff)
    stages, searched, moves = METHODS[name], name in METHODS_WITH_INITIAL, None
    not_negative("expert_bytes", expert_bytes, "number of bytes")
    if initial is None:
        if move_cost or (move_budget is not None and move_budget < np.inf):
            raise ArgumentError(
                "move_budget and move_cost need initial, the placement to move from",
                "move_budget",
                "move_cost",
            )
    else:
        moves = Moves(initial, move_budget, move_cost, expert_bytes)
        if not searched:
            raise ArgumentError(f"initial needs method joint or heuristic, got {name!r}", "initial")
        problem.check_running(initial)
        stages = from_running(stages)
    history = History(progress)
    run = Run(problem, seed=seed, budget=replace(budget, progress=history.add), moves=moves)
    result = run.finish(
        stages,
        lambda: balanced(problem) if initial is None else repair(problem, initial),
        lambda: build_result(run, name, searched=searched),
    )
    return replace(result, history=history.finish(result.objective, result.bound))
