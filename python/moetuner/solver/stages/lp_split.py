"""Search for split "lp", where a dispatcher divides every window's tokens over copies optimally.

Then it matters which devices share copies. The start joins all devices by copies of the heaviest
experts, with equally many copies on each. The search stays near this start and adapts it to the
windows. Wider searches overfit: on DeepSeek-V3's loads (288 slots on 32 devices) those on 32
profiles drawn around one are 0.2 to 1.4 % behind their start on others.
"""

from __future__ import annotations

import numpy as np

from moetuner.placement import find_holders
from moetuner.recording.labelling import evenly_spaced
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.run import Run, Stage
from moetuner.solver.stages.floor import search_quickly
from moetuner.solver.terms import Terms, core_layers, make_site

# Least gain of moving a copy from its device in the start, as a part of a device's mean load.
ANCHOR = 2e-4
# Most windows of the search; beyond that, windows at even distances represent all.
MOST_WINDOWS = 32


def has_lp_split(run: Run) -> bool:
    """Return whether a dispatcher divides tokens by split lp, and there may be copies."""
    return run.problem.serving.rule.is_linear_programme and run.problem.may_copy


def _search(run: Run, budget: Budget) -> None:
    """Offer the start, in which copies join all devices, and the answer of a search near it."""
    problem, windows = run.problem, run.objective.windows
    used = np.flatnonzero(windows.weight > 0)
    chosen = used[evenly_spaced(len(used), MOST_WINDOWS)]
    load, weight = windows.load[chosen], windows.weight[chosen]
    # Without caps: the core keeps those for an even split, but the answer is judged by this one.
    site = make_site(problem)
    start = core_layers(windows.load, windows.weight, site, terms=Terms(lp_split=True)).construct(
        threads=budget.threads
    )
    run.offer(start, "partners", is_start=True)
    if budget.is_over():
        return
    mean = (weight[:, None] * load.sum(axis=2)).sum(axis=0) / problem.devices
    away = ~find_holders(start, problem.num_experts).transpose(0, 2, 1)
    price = away * (ANCHOR * mean)[:, None, None]
    layers = core_layers(load, weight, site, terms=Terms(copies=price, lp_split=True))
    trials = budget.iterations
    if trials is None:
        trials = effort.lp_split_trials(run.slots_of_layer, len(chosen))
    slots, interrupted = search_quickly(run, budget, layers, start, trials)
    run.offer(slots, "layers", interrupted=interrupted)


LP_SPLIT = Stage(_search, applies=has_lp_split, share=lambda _: effort.SEARCH_SHARE)
