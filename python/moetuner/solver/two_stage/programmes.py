"""The two integer programs of the paper, as printed, in the paper's symbols.

Loads, sizes and traffic enter with a feasible start; the choice, its objective and a bound leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.solver import effort
from moetuner.solver.milp.highs import Ilp
from moetuner.solver.result import Status

OnProgress = Callable[[float | None, float], None]


@dataclass(frozen=True)
class Solved:
    """The cluster of every expert [E] or the device of every cluster [L,D], and its worth."""

    chosen: NDArray[np.int64]
    objective: float
    bound: float
    status: Status


def cluster(
    load: NDArray[np.uint64],
    start: NDArray[np.int64],
    sizes: tuple[int, int],
    clusters: int,
    deviation: float,
    bound: float,
    *,
    tolerance: float,
    seed: int,
    time_limit: float | None,
    progress: OnProgress | None,
) -> Solved:
    """Minimise sum_c t_c with t_c >= +-(load_c - mean), in units of the mean: stage 1 of a layer.

    Parameters
    ----------
    load
        Of every expert [E].
    start
        Cluster of every expert [E].
    sizes
        Experts of a cluster: at least, at most.
    deviation, bound
        Objective of the start, and a proven lower bound.
    """
    experts = len(load)
    # Clusters have no names: the i-th heaviest expert goes to one of the first i + 1, which is all
    # that distinguishes them.
    order = np.argsort(load, kind="stable")[::-1]
    weight = load[order].astype(np.float64)
    weight *= clusters / weight.sum()
    e, c = np.indices((experts, clusters))
    x = np.arange(experts * clusters).reshape(experts, clusters)
    t = experts * clusters + np.arange(clusters)
    ilp = Ilp(
        np.r_[np.zeros(x.size), np.ones(clusters)],
        upper=np.r_[(c <= e).ravel(), np.full(clusters, np.inf)],
        integer=np.r_[np.ones(x.size), np.zeros(clusters)],
    )
    ilp.add_rows(np.ones(experts), 1, e, x)
    ilp.add_rows(np.full(clusters, sizes[0]), sizes[1], c, x)
    in_rows = np.r_[c.ravel(), np.arange(clusters)]
    entries = np.r_[x.ravel(), t]
    load_of = np.repeat(weight, clusters)
    for sign in (1.0, -1.0):
        # t_c >= sign * (load_c - mean)
        value = np.r_[-sign * load_of, np.ones(clusters)]
        ilp.add_rows(np.full(clusters, -sign), np.inf, in_rows, entries, value)
    ilp.add_rows(bound, np.inf, np.zeros(clusters, dtype=np.int64), t)

    named = _by_first_member(start[order], clusters)
    values = np.zeros(ilp.columns)
    values[x[np.arange(experts), named]] = 1
    values[t] = np.abs(np.bincount(named, weight, minlength=clusters) - 1)
    solution = ilp.solve(
        start=values,
        start_objective=deviation,
        seed=seed,
        absolute_gap=tolerance,
        nodes=effort.CLUSTER_NODES,
        time_limit=time_limit,
        progress=progress,
    )
    assert solution.values is not None
    assert solution.objective is not None
    chosen = np.empty(experts, dtype=np.int64)
    chosen[order] = solution.values[x].argmax(axis=1)
    # HiGHS proves in floating point: keep what it proves a hair smaller.
    proven = max(bound, solution.bound - 1e-6)
    if solution.objective >= deviation:
        chosen, objective = start.copy(), deviation
    else:
        objective = solution.objective
    return Solved(chosen, objective, min(proven, objective), solution.status)


def level(
    sizes: NDArray[np.uint64], start: NDArray[np.int64], *, seed: int, time_limit: float | None
) -> NDArray[np.int64]:
    """Place clusters for totals of experts per device as equal as can be, whatever the traffic.

    Takes the experts of every cluster [L,D] and a start; returns the device of every cluster [L,D].
    """
    layers, n = sizes.shape
    y = np.arange(layers * n * n).reshape(layers, n, n)
    t = y.size + np.arange(n)
    ilp = Ilp(
        np.r_[np.zeros(y.size), np.ones(n)],
        upper=np.r_[np.ones(y.size), np.full(n, np.inf)],
        integer=np.r_[np.ones(y.size), np.zeros(n)],
    )
    layer, c, d = np.indices(y.shape)
    ilp.add_rows(np.ones(layers * n), 1, layer * n + c, y)
    ilp.add_rows(np.ones(layers * n), 1, layer * n + d, y)
    count = np.broadcast_to(sizes.astype(np.float64)[:, :, None], y.shape).ravel()
    mean = count.sum() / n / n
    for sign in (1.0, -1.0):
        # t_d >= +-(experts on d - mean)
        entries = (np.r_[d.ravel(), np.arange(n)], np.r_[y.ravel(), t])
        ilp.add_rows(np.full(n, -sign * mean), np.inf, *entries, np.r_[-sign * count, np.ones(n)])
    # Whole totals: below this sum of differences no placement is.
    rest = round(mean * n) % n
    least = 2 * rest * (n - rest) / n
    ilp.add_rows(least, np.inf, np.zeros(n, dtype=np.int64), t)
    held = np.bincount(start.ravel(), sizes.ravel().astype(np.float64), minlength=n)
    placed = (start[:, :, None] == np.arange(n)).astype(np.float64)
    solution = ilp.solve(
        start=np.r_[placed.ravel(), np.abs(held - mean)],
        seed=seed,
        nodes=effort.LEVEL_NODES,
        time_limit=time_limit,
    )
    assert solution.values is not None
    chosen: NDArray[np.int64] = solution.values[y].argmax(axis=2)
    return chosen


def place(
    traffic: NDArray[np.uint64],
    cost: NDArray[np.int64],
    start: NDArray[np.int64],
    sizes: NDArray[np.uint64] | None,
    bottleneck: int,
    bound: int,
    *,
    tolerance: float,
    seed: int,
    time_limit: float | None,
    progress: OnProgress | None,
) -> Solved:
    """Minimise sum_l t_l with t_l >= traffic_l(d,d') / bandwidth(d,d') for all d != d': stage 2.

    A product w[l,c,c',d,d'] = y[l,c,d] * y[l+1,c',d'] is continuous and adds up to its two factors
    over d' and over d.

    Parameters
    ----------
    traffic
        Tokens from cluster to cluster of the next layer [L-1,D,D].
    cost
        Of a token from device to device [D,D]: 1 / bandwidth.
    start
        Device of every cluster [L,D].
    sizes
        Experts of every cluster [L,D]; devices keep totals as level as the start's. None if equal.
    bottleneck, bound
        Objective of the start, and a proven lower bound.
    """
    scale = float(max(bottleneck, 1))
    ilp, y = _placement(traffic, cost, start, sizes, bound / scale, scale)
    values = _placement_values(traffic, cost, start, scale)
    solution = ilp.solve(
        start=values,
        start_objective=bottleneck / scale,
        seed=seed,
        gap=tolerance,
        nodes=effort.PLACE_NODES,
        time_limit=time_limit,
        progress=progress,
    )
    assert solution.values is not None
    assert solution.objective is not None
    chosen = solution.values[y].argmax(axis=2)
    # HiGHS proves in floating point: keep what it proves a hair smaller.
    proven = max(float(bound), (solution.bound - 1e-6) * scale)
    return Solved(chosen, solution.objective * scale, proven, solution.status)


def _placement(
    traffic: NDArray[np.uint64],
    cost: NDArray[np.int64],
    start: NDArray[np.int64],
    sizes: NDArray[np.uint64] | None,
    bound: float,
    scale: float,
) -> tuple[Ilp, NDArray[np.int64]]:
    """Build stage 2; also the columns of y [L,D,D]. The others are w [L-1,D,D,D,D] and t [L-1]."""
    boundaries, n = len(traffic), len(cost)
    layers = boundaries + 1
    y = np.arange(layers * n * n).reshape(layers, n, n)
    w = y.size + np.arange(boundaries * n**4).reshape(boundaries, n, n, n, n)
    t = y.size + w.size + np.arange(boundaries)
    columns = y.size + w.size + boundaries
    objective, integer, lower, upper = np.zeros((4, columns))
    objective[t] = 1
    integer[y] = 1
    upper[:] = 1
    upper[t] = np.inf
    off_diagonal = cost[~np.eye(n, dtype=bool)]
    if sizes is None and (off_diagonal == off_diagonal[:1]).all():
        # Links all alike: devices have no names until the first layer gives them some.
        lower[y[0, np.arange(n), start[0]]] = 1
    ilp = Ilp(objective, lower=lower, upper=upper, integer=integer)

    layer, c, d = np.indices(y.shape)
    ilp.add_rows(np.ones(layers * n), 1, layer * n + c, y)
    ilp.add_rows(np.ones(layers * n), 1, layer * n + d, y)
    if sizes is not None:
        held = np.bincount(start.ravel(), sizes.ravel().astype(np.float64), minlength=n)
        count = np.broadcast_to(sizes.astype(np.float64)[:, :, None], y.shape)
        ilp.add_rows(np.full(n, held.min()), held.max(), d, y, count)
    if not boundaries:
        return ilp, y

    l, c, c2, d, d2 = (index.ravel() for index in np.indices(w.shape))  # noqa: E741
    # sum_d' w[l,c,c',d,d'] = y[l,c,d] and sum_d w[l,c,c',d,d'] = y[l+1,c',d'].
    for factor, of in ((y[l, c, d], d), (y[l + 1, c2, d2], d2)):
        row = ((l * n + c) * n + c2) * n + of
        rows, at = np.unique(row, return_index=True)
        ilp.add_rows(
            np.zeros(len(rows)),
            0,
            np.r_[row, rows],
            np.r_[w.ravel(), factor[at]],
            np.r_[np.ones(w.size), -np.ones(len(rows))],
        )
    # t_l >= sum_cc' traffic_l(c,c') w[l,c,c',d,d'] / bandwidth(d,d')
    time = traffic.astype(np.float64)[l, c, c2] * cost[d, d2] / scale
    pair, moved = (l * n + d) * n + d2, time > 0
    rows = np.arange(boundaries * n * n)
    ilp.add_rows(
        np.zeros(len(rows)),
        np.inf,
        np.r_[pair[moved], rows],
        np.r_[w.ravel()[moved], np.repeat(t, n * n)],
        np.r_[-time[moved], np.ones(len(rows))],
    )
    ilp.add_rows(bound, np.inf, np.zeros(boundaries, dtype=np.int64), t)
    return ilp, y


def _placement_values(
    traffic: NDArray[np.uint64], cost: NDArray[np.int64], device: NDArray[np.int64], scale: float
) -> NDArray[np.float64]:
    """Return the values of `_placement`'s columns at the device of every cluster [L,D]."""
    y = (device[:, :, None] == np.arange(len(cost))).astype(np.float64)
    w = y[:-1, :, None, :, None] * y[1:, None, :, None, :]
    times = [
        (table * cost[np.ix_(here, later)]).max() / scale
        for table, here, later in zip(
            traffic.astype(np.float64), device[:-1], device[1:], strict=True
        )
    ]
    return np.concatenate([y.ravel(), w.ravel(), times])


def _by_first_member(cluster: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Rename clusters in the order in which they first appear."""
    names, first = np.unique(cluster, return_index=True)
    new = np.zeros(clusters, dtype=np.int64)
    new[names[np.argsort(first)]] = np.arange(len(names))
    return new[cluster]
