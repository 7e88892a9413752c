"""What a placement is computed from and what it is judged on must not be the same traffic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner._validation import instance, is_number, seed_in, shown
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace


def hold_out(
    traffic: RoutingTrace | RoutingStatistics, share: float, *, seed: int = 0
) -> tuple[RoutingTrace | RoutingStatistics, RoutingTrace | RoutingStatistics]:
    """Split traffic into what the solver sees and what it does not.

    Parameters
    ----------
    traffic
        A trace is split by sequence, a load table by window.
    share
        Share of the sequences or windows, chosen at random, that is held out. 0 holds nothing
        out: both parts are the whole.
    seed
        Of the choice.

    Returns
    -------
    tuple
        The seen part and the unseen part.

    Raises
    ------
    ValueError
        If ``share`` is not from 0 to 1 (1 excluded), or counts cannot be split: pairs are summed
        over all windows, and one window is not two.
    """
    instance("traffic", traffic, RoutingTrace, RoutingStatistics)
    if not (is_number(share) and 0 <= share < 1):
        raise ValueError(f"holdout must be at least 0 and below 1, got {shown(share)}")
    seed = seed_in(seed)
    if share == 0:
        return traffic, traffic
    if isinstance(traffic, RoutingTrace):
        if traffic.tokens < 2:
            raise ValueError(
                f"holdout must be 0 for a trace of {traffic.tokens} tokens, got {share}"
            )
        return traffic.split(1 - share, seed=seed)
    if traffic.transitions is not None or traffic.coactivation is not None:
        raise ValueError(
            f"holdout must be 0 for saved statistics, got {share}: pairs are counted over all "
            "windows; give the trace to judge on unseen sequences"
        )
    if traffic.windows < 2:
        raise ValueError(f"holdout must be 0 for a load table of one window, got {share}")
    held = min(max(round(share * traffic.windows), 1), traffic.windows - 1)
    unseen = np.zeros(traffic.windows, dtype=bool)
    unseen[np.random.default_rng(seed).permutation(traffic.windows)[:held]] = True
    return _windows(traffic, ~unseen), _windows(traffic, unseen)


def _windows(statistics: RoutingStatistics, keep: NDArray[np.bool_]) -> RoutingStatistics:
    return replace(
        statistics,
        window_load=statistics.window_load[keep],
        group=None if statistics.group is None else statistics.group[keep],
    )
