"""The placement that neither phase regrets, where nobody says which share of the time is prefill.

The regret of a phase is how much longer its steps take than with what a search for that phase alone
finds. Layers are independent, so all contents of a layer that searches came by are a pool: for each
share, the best of the pool is chosen layer by layer. A walk along the share finds the smallest
largest regret (a minimax regret, Savage, 1951). Where a placement is ahead of DeepSeek's balancer
in both phases, one that is not must be better by more than ``AHEAD``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.serving.phases import make_phases
from moetuner.solver.arrays import Bools, Floats, Slots
from moetuner.solver.budget import Budget
from moetuner.solver.run import ROUNDING, Role, Run, Stage
from moetuner.solver.stages.floor import balanced
from moetuner.solver.stages.layers import cost_of_layers

# Shares of prefill that are tried on the pool.
SHARES = np.linspace(0.02, 0.98, 49)
# Regret that being ahead of DeepSeek's balancer in both phases may cost.
AHEAD = 0.02
# A share this near to that of the search before is not searched again.
NEAR = 0.1


@dataclass(frozen=True)
class Limit:
    """The most that a placement may be worth by the problem's own shares.

    Parameters
    ----------
    weight
        What a microsecond of decode and of prefill is worth [2].
    value
        The most.
    """

    weight: Floats
    value: float

    def keeps(self, times: Floats) -> Bools:
        """Return whether times [S,2] keep the limit; all do if none does."""
        keeps: Bools = times @ self.weight <= self.value * (1 + ROUNDING)
        return keeps if keeps.any() else np.ones_like(keeps)


class _Pool:
    """Contents of layers, with their costs in decode and in prefill [N,L,2]."""

    def __init__(self, problem: Problem) -> None:
        self.phases = [problem_at(problem, share).objective_searched for share in (0.0, 1.0)]
        self.num_experts = problem.num_experts
        self.slots: list[Slots] = []
        self.costs: list[Floats] = []
        self._known: set[bytes] = set()

    def add(self, run: Run) -> None:
        """Add the placements of a run that keep all rules."""
        for incumbent in run.incumbents:
            key = incumbent.slots.tobytes()
            if incumbent.excess == 0 and key not in self._known:
                self._known.add(key)
                self.slots.append(incumbent.slots)
                self.costs.append(self.measure(incumbent.slots))

    def measure(self, slots: Slots) -> Floats:
        """Compute the microseconds [L,2] of slots [L,D,S] in decode and in prefill."""
        placement = Placement(slots, num_experts=self.num_experts)
        return np.stack([cost_of_layers(phase, placement) for phase in self.phases], axis=1)

    def choose(self, peer: Floats, limit: Limit) -> tuple[float, Slots]:
        """Return the share whose best placement of the pool has the least regret, and that one.

        It keeps the limit. One that is ahead of DeepSeek's balancer in both phases, where ``peer``
        [2] are its microseconds, comes first, unless it costs ``AHEAD`` more regret.
        """
        costs = np.array(self.costs)
        least = costs.min(axis=0).sum(axis=0)
        # As in the objective, each phase counts by its time: its share is of that.
        weight = np.stack([1 - SHARES, SHARES], axis=1) / least
        layers = np.arange(costs.shape[1])
        numbers = np.einsum("sp,nlp->snl", weight, costs).argmin(axis=1)
        times = costs[numbers, layers].sum(axis=1)
        regret = (times / least - 1).max(axis=1)
        ahead = (times <= peer).all(axis=1)
        kept = np.where(limit.keeps(times), regret, np.inf)
        is_ahead = ahead & (kept <= kept.min() + AHEAD)
        best = int(np.where(is_ahead if is_ahead.any() else True, kept, np.inf).argmin())
        return float(SHARES[best]), np.stack(self.slots)[numbers[best], layers]


def _limit_of_fewer_slots(run: Run, pool: _Pool) -> Limit:
    """Return the limit that one slot more on every device is not worse by the problem's shares."""
    (_, decode), (_, prefill) = sorted(run.problem.shares.items(), key=lambda item: item[0] or 0)
    blocks_of_phase = [phase.cost_in_blocks for phase in pool.phases]
    weight = np.array([decode, prefill]) / blocks_of_phase
    starts = run.with_role(Role.SINGLE)
    values = [float(pool.measure(start.slots).sum(axis=0) @ weight) for start in starts]
    return Limit(weight, min(values, default=np.inf))


def problem_at(problem: Problem, share: float) -> Problem:
    """Return the problem with a share of prefill."""
    return replace(problem, phases=make_phases(share))


def balance_regret(run: Run, budget: Budget, searches: Sequence[Stage]) -> None:
    """Offer the placement of least regret as the answer; ``searches`` improve on a start."""
    pool = _Pool(run.problem)
    pool.add(run)
    eplb = pool.measure(balanced(run.problem, trials=0)).sum(axis=0)
    limit = _limit_of_fewer_slots(run, pool)
    shares = run.problem.shares
    tried = [shares[max(shares, key=lambda size: size or 0)]]
    # Both ends say what a phase alone can have; then the walk goes to where the regrets meet.
    for share in (0.0, 1.0, None):
        if share is None:
            share, start = pool.choose(eplb, limit)
            if min(abs(share - other) for other in tried) <= NEAR:
                break
        else:
            start = run.best.slots
        part = replace(budget.within(0.5).muted(), effort="brief")
        inner = run.run_inner(searches, part, problem=problem_at(run.problem, share), start=start)
        pool.add(inner)
        if inner.interrupted:
            raise KeyboardInterrupt
    run.offer(pool.choose(eplb, limit)[1], "phases", role=Role.ANSWER, is_start=True)
