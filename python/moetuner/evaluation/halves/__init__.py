"""Figures of the halves of a recording: their differences give a figure's standard error.

Independent samples are dealt into folds, and folds into two halves, in as many ways as there are
folds. Both placements of a comparison have the same halves, so what they have in common cancels.

A half has some of the tokens of a window. Its counts are those of its folds, scaled to all tokens
of the window, and the functions that compute the figures of all traffic compute its figures from
these. A window counts in a half's mean by the share of its tokens that the half has.

Every module is a step: ``halvings`` says which folds are on which side; ``cells`` counts the tokens
of every window and fold; ``sides`` adds cells up to counts of sides; ``means`` averages figures of
these counts over windows; ``halved`` averages over orders of arrival; ``answers`` keeps the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moetuner.evaluation.arrival import Order, find_places, list_orders
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.halves.answers import HalvesRequest, find_answer, list_answers
from moetuner.evaluation.halves.cells import Dealt
from moetuner.evaluation.halves.halved import ByGroup, average_orders
from moetuner.evaluation.halves.means import halve_figures
from moetuner.evaluation.reading import Integers, Progress, scale_progress, split_progress
from moetuner.evaluation.replay import Setting, count_each, drop_groups
from moetuner.evaluation.samples import Folds, Samples
from moetuner.recording import Recording

# Share of the time that counting all of the traffic takes, before its halves.
COUNTING_SHARE = 0.3


def halve(
    traffic: Recording,
    setting: Setting,
    samples: Samples,
    *,
    by_group: bool = True,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> ByGroup:
    """Compute figures of all traffic (None), of every group that has some, and of their halves."""
    [figures] = halve_each(
        traffic, [setting], samples, by_group=by_group, names=names, progress=progress
    )
    return figures


def halve_each(
    traffic: Recording,
    settings: Sequence[Setting],
    samples: Samples,
    *,
    by_group: bool = True,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[ByGroup]:
    """Compute what ``halve`` does under settings that differ in their placements and windows alone.

    Each window is as long as the shortest one, or several times as long. The tokens of a trace are
    read a few times for all settings together; settings whose halves are known need no reading.
    ``names`` are the figures to compute, by default all that have halves. ``progress`` gets the
    share of the work that is done.
    """
    with_halves = {name for name, figure in FIGURES.items() if figure.windows is not None}
    chosen = frozenset(with_halves if names is None else with_halves & set(names))
    # Halves have no windows of mixed arrival, and the homes of their tokens are spread evenly.
    requests = [
        HalvesRequest(setting.with_options(mixed=False, home=None), samples, by_group, chosen)
        for setting in settings
    ]
    answers = list_answers(traffic)
    new = [request for request in requests if find_answer(answers, request) is None]
    # Without sequence labels, folds are runs of windows, which differ with the window's size.
    windows = {request.setting.window for request in new}
    has_common_folds = traffic.sequence is not None or len(windows) == 1
    batches = [new] if new and has_common_folds else [[request] for request in new]
    for number, batch in enumerate(batches):
        report = split_progress(progress, number, len(batches))
        answers += zip(batch, _answer(traffic, batch, report), strict=True)
    return [figures for request in requests if (figures := find_answer(answers, request))]


def _answer(
    traffic: Recording, requests: Sequence[HalvesRequest], progress: Progress | None
) -> list[ByGroup]:
    """Compute the answers to requests whose settings differ in placements and windows alone."""
    setting, samples, by_group, names = requests[0]
    settings = [request.setting for request in requests]
    traffic = traffic if by_group else drop_groups(traffic)
    folds = {
        group: (rows, samples.deal(traffic, rows, setting.window))
        for group, rows in traffic.group_rows().items()
        if by_group or group is None
    }
    orders = list_orders(traffic, setting.serving.arrival, seed=setting.options.mixed_seed)
    by_order = []
    for number, (_, order) in enumerate(orders):
        report = split_progress(progress, number, len(orders))
        by_order.append(_halve_in_order(traffic, order, folds, settings, names, report))
    weights = [weight for weight, _ in orders]
    return [average_orders(weights, figures) for figures in zip(*by_order, strict=True)]


def _halve_in_order(
    traffic: Recording,
    order: Order | None,
    folds: Mapping[str | None, tuple[Integers, Folds]],
    settings: Sequence[Setting],
    names: Collection[str],
    progress: Progress | None,
) -> list[ByGroup]:
    """Compute figures of all traffic and of its halves under every setting, in one order.

    ``folds`` has the rows of every group, and the fold of each.
    """
    counting = scale_progress(progress, 0, COUNTING_SHARE)
    halving = scale_progress(progress, COUNTING_SHARE, 1)
    counts_by_setting = [*count_each(traffic, settings, counting, order)]
    figures_by_setting: list[ByGroup] = [{} for _ in settings]
    for number, (group, (rows, fold)) in enumerate(folds.items()):
        halved = halve_figures(
            Dealt(traffic, rows, find_places(order, rows), fold),
            settings,
            [counts[group] for counts in counts_by_setting],
            names,
            split_progress(halving, number, len(folds)),
        )
        for by_group, figures in zip(figures_by_setting, halved, strict=True):
            by_group[group] = figures
    return figures_by_setting
