"""Choose the windows that count: as counted, longer ones, and those of mixed arrival."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError, is_number, shown
from moetuner._texts import suggestion
from moetuner.evaluation.arrival import WINDOWS_MIXED, mix_windows
from moetuner.problem.windows import MOST, Risk, Windows
from moetuner.recording import compute_once
from moetuner.serving.arrival import Arrival, share_mixed
from moetuner.statistics import WINDOW, RoutingStatistics
from moetuner.statistics.tables import Loads, narrow

Floats = NDArray[np.float64]

# Tokens of an expert in windows of mixed arrival are drawn with this seed.
SEED = 1
# So many tokens are not drawn: their standard deviation is a millionth of them.
CERTAIN = 1e12
# A longer window of mixed arrival is the mean of so many times as many windows as a short one.
LONGER = 4
# Smallest number of longer windows of mixed arrival. On halves of gpt-oss-20b's prompts (8, 16 and
# 32 devices, three splits) 8 of them leave the goal of the answer 0.6 to 3.5 % below what is
# evaluated on the same traffic, and 32 leave it within 1.6 %; unseen prefill takes 0.2 to 1 % less.
FEWEST = 32
# Variance that unseen traffic adds to a mean, in variances of a window over the number of windows
# ("Mixed windows" in docs/experiments.md).
UNSEEN = 3
# The same for counted windows that are longer than those of decode: a sequence is in few of them,
# so that less of their variance is that of single sequences.
UNSEEN_LONGER = 1
# The same for windows shorter than those of decode, as a short trace is counted in: more of their
# variance is that of single tokens ("Short recordings" in docs/experiments.md).
UNSEEN_SHORTER = 2
# Windows in which a trace is counted, at least, down to the shortest of so many tokens: few windows
# do not show how loads vary, so that a search puts experts together that are used together
# ("Short recordings" in docs/experiments.md).
FEWEST_COUNTED = 16
SHORTEST = 32
# Longer windows that a group must fill to be searched on them as recorded; for a group that fills
# fewer, shorter runs are scaled ("Short recordings" in docs/experiments.md).
FILLED = 2


def choose_counted_window(tokens: int, step: int) -> int:
    """Return the tokens of windows in which to count a trace for a search.

    They are the tokens of a step, halved as often as a short trace needs to fill enough of them.
    """
    window = step
    while tokens < FEWEST_COUNTED * window and window % 2 == 0 and window > SHORTEST:
        window //= 2
    return window


def choose_windows(
    statistics: RoutingStatistics,
    arrival: Arrival,
    risk: Risk,
    groups: Mapping[str, float] | Literal["minimax"] | None,
    tokens: int | None = None,
) -> Windows:
    """Return the windows that count, with their weights: as counted, or longer ones of ``tokens``.

    Mixed windows follow the recorded ones; there are at most ``MOST`` of them.
    """
    if not (isinstance(risk, str) and risk == "mean") and not (is_number(risk) and 0 <= risk < 1):
        raise ArgumentError(
            f"risk must be 'mean', or a level from 0 to below 1, got {shown(risk)}", "risk"
        )
    share = share_mixed(arrival)
    weights = tuple(groups.items()) if isinstance(groups, Mapping) else groups
    return compute_once(
        statistics,
        ("windows", share, risk, weights, tokens),
        lambda: _compute_windows(statistics, share, risk, groups, tokens),
    )


def _compute_windows(
    statistics: RoutingStatistics,
    share: float,
    risk: Risk,
    groups: Mapping[str, float] | Literal["minimax"] | None,
    tokens: int | None,
) -> Windows:
    """Compute what ``choose_windows`` returns; ``share`` is the weight of mixed windows."""
    by_group = None if groups is None else _weigh_groups(statistics, groups)
    rules = (risk, groups == "minimax")
    times = 1  # counted windows in one
    load: NDArray[Any] = statistics.window_load
    group, weight = statistics.group, _weigh_windows(statistics, by_group)
    if tokens is not None and statistics.window is not None and tokens != statistics.window:
        times = tokens // statistics.window
        load, group, weight = _join_windows(statistics, tokens, by_group)
    are_many = len(load) > MOST
    load = load if are_many else load.astype(np.float64)
    if share == 0 or statistics.windows < 2:
        return Windows(load, weight, group, *rules)
    mixed = _mix_windows(
        statistics, _weigh_windows(statistics, by_group), min(len(load), MOST), times
    )
    mixed_weight = np.full(len(mixed), share * weight.sum() / len(mixed))
    weights = np.concatenate([weight * (1 - share), mixed_weight])
    if group is not None:
        # Mixed windows have no group; where groups compete, they are one more group.
        group = np.concatenate([group, np.full(len(mixed), len(statistics.group_names))])
    if are_many and share < 1:
        return Windows(load, weights, group, *rules, mixed)
    # Windows without weight are left out; at a share of one the recorded ones are not even copied.
    used = weights > 0
    load = mixed if share == 1 else np.concatenate([load, mixed])[used]
    return Windows(load, weights[used], None if group is None else group[used], *rules)


def _weigh_windows(statistics: RoutingStatistics, by_group: Floats | None) -> Floats:
    """Return the weights of windows [W]: those of their groups, 0 for a window that is no step."""
    weight = statistics.is_full_window.astype(np.float64)
    return weight if by_group is None else weight * by_group[statistics.group]


def _weigh_groups(
    statistics: RoutingStatistics, groups: Mapping[str, float] | Literal["minimax"]
) -> Floats:
    """Return the weight of every group [G], checked."""
    if statistics.group is None:
        raise ArgumentError(
            "groups needs windows with groups; these statistics have none", "groups"
        )
    names = list(statistics.group_names)
    weight = np.ones(len(names))
    if isinstance(groups, str):
        if groups != "minimax":
            raise ArgumentError(
                f"groups must be 'minimax' or weights by name, got {shown(groups)}", "groups"
            )
        return weight
    for name, value in groups.items():
        if name not in names:
            rule = f"groups names {shown(name)}, which is none of {', '.join(names)}"
            raise ArgumentError(rule + suggestion(name, names), "groups")
        number = names.index(name)
        if not statistics.window_load[statistics.group == number].any():
            raise ArgumentError(f"groups names {shown(name)}, which has no tokens", "groups")
        weight[number] = value
    if not weight[statistics.group].any():
        raise ArgumentError("groups leaves no window with a weight above 0", "groups")
    return weight


def _join_windows(
    statistics: RoutingStatistics, length: int, by_group: Floats | None
) -> tuple[Loads, NDArray[np.int64] | None, Floats]:
    """Return windows of ``length`` tokens [M,L,E], their groups [M] and weights [M].

    Each is the sum of a run of windows of one group. If a group fills fewer than ``FILLED`` of
    them, shorter runs of all of its tokens are scaled up, with the weight of their tokens: a search
    needs the mean and the variance of steps, which shorter runs have as well.
    """
    tokens = statistics.window_load.sum(axis=(1, 2), dtype=np.float64)
    label = np.zeros(statistics.windows, np.int64) if statistics.group is None else statistics.group
    filled = statistics.runs(length)
    times = filled.shape[1]
    loads, places, groups, weights = [], [], [], []
    for number in np.unique(label):
        runs = list(filled[label[filled[:, 0]] == number])
        scale = np.ones(len(runs))
        if len(runs) < FILLED:
            steps = int((statistics.is_full_window & (label == number)).sum())
            count = steps // choose_mean_size(times, steps, _choose_unseen(statistics))
            runs = np.array_split(np.flatnonzero(label == number), count)
            totals = np.array([tokens[run].sum() for run in runs])
            scale = times * max(tokens.max(), 1) / np.maximum(totals, 1)
        for run, factor in zip(runs, scale.tolist(), strict=True):
            total = statistics.window_load[run].sum(axis=0, dtype=np.uint64)
            loads.append(np.rint(total * factor).astype(np.uint64))
            places.append(run[0])
            groups.append(number)
            weights.append(1 / factor)
    order = np.argsort(places, kind="stable")
    group, weight = np.array(groups, np.int64)[order], np.array(weights)[order]
    if by_group is not None:
        weight *= by_group[group]
    return narrow(np.stack(loads)[order]), None if statistics.group is None else group, weight


def _choose_unseen(statistics: RoutingStatistics) -> float:
    """Return the variance that unseen traffic adds to a mean, for windows of decode or shorter."""
    return UNSEEN if statistics.window is None or statistics.window >= WINDOW else UNSEEN_SHORTER


def choose_mean_size(size: int, windows: int, unseen: float) -> int:
    """Return how many seen windows to average, so that means vary like those of unseen windows.

    Means of ``size`` unseen windows vary more around the mean of the seen ones than means of seen
    windows do. Chance adds twice a window's variance over the number of windows; similar neighbours
    add more, ``unseen`` in all. So fewer seen windows are averaged.
    """
    return max(int(1 / (1 / size + unseen / windows)), 1)


def _mix_windows(statistics: RoutingStatistics, weight: Floats, count: int, times: int) -> Floats:
    """Return windows of mixed arrival [M,L,E], each as long as ``times`` counted ones.

    A longer step has tokens of more sequences. Each window is a mean of few counted ones
    (``choose_mean_size``), so that a search separates experts whose loads rise together from
    prompt to prompt.
    """
    steps = slice(None) if statistics.is_full_window.all() else statistics.is_full_window
    load, weight, size = statistics.window_load[steps], weight[steps], WINDOWS_MIXED
    is_counted_longer = statistics.window is not None and statistics.window > WINDOW
    if times > 1 or is_counted_longer:
        count, size = max(count, FEWEST), LONGER * WINDOWS_MIXED
    unseen = UNSEEN_LONGER if is_counted_longer else _choose_unseen(statistics)
    drawn = mix_windows(load, weight, count, size=choose_mean_size(size, len(load), unseen))
    mean = np.concatenate([load for _, load in drawn]) * times
    return _draw_tokens(mean, float(weight.mean()))


def _draw_tokens(mean: Floats, weight: float) -> Floats:
    """Draw the tokens of windows of mixed arrival [M,L,E] around their means.

    The tokens of a step come from many sequences, so they are nearly independent, and their numbers
    have a Poisson distribution. The means alone would be more even than any step, and leave no
    expert without a token.
    """
    tokens = mean / max(weight, 1e-300)
    drawn = np.random.default_rng(SEED).poisson(np.minimum(tokens, CERTAIN))
    mixed: Floats = np.where(tokens < CERTAIN, drawn, tokens) * weight
    return mixed
