"""Measure whether traffic changes beyond chance, within a recording or since an earlier one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import callable_or_none, instance, seed_in
from moetuner.evaluation.comparison import PRICE
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.reading import (
    Progress,
    count_loads_by_label,
    scale_progress,
    split_progress,
)
from moetuner.evaluation.samples import Samples, find_samples
from moetuner.evaluation.samples.autocorrelation import measure_autocorrelation
from moetuner.frozen import Frozen
from moetuner.recording import AnyRecording, Recording, labelling
from moetuner.report.findings import Finding
from moetuner.statistics import (
    LEAST_DRIFT,
    WINDOW,
    RoutingStatistics,
    count_loads,
    measure_distance,
)
from moetuner.trace import RoutingTrace, as_trace

# Blocks of a recording, with equal numbers of sequences, that the permutation test permutes.
BLOCKS = 32
# Permutations of the test.
PERMUTATIONS = 400
# Level of significance of the test.
SIGNIFICANCE = 0.01
# Permutations that are computed at once.
BATCH = 16
# Fewest blocks with more different halves than the test has permutations.
FEWEST_BLOCKS = 12
# Correlation lengths of windows in the shortest block that may change sides: the ends of
# neighbouring blocks are alike.
LENGTHS_PER_BLOCK = 3
# Passes over two recordings: two of each to find independent samples, then one of each.
PASSES = 6
# Largest number of blocks of two recordings together.
MOST_BLOCKS = 128


@dataclass(frozen=True, eq=False, repr=False)
class Drift(Frozen):
    """Distance between two parts of some traffic, beside the distance that chance gives.

    The parts are a profile and later traffic for ``drift``, and the halves of a recording for
    ``advise``.

    Parameters
    ----------
    distance
        Total variation distance of the parts' expert shares, averaged over layers: the share of the
        tokens that would have to go to other experts to make the parts alike.
    expected
        Mean distance of parts that are chosen at random.
    chance
        Share of the random choices whose parts differ as much: the p-value of the distance.
    is_of_groups
        True if the halves differ because they hold different groups, each of which stays as it is.
    worst_layer, worst_distance
        Layer that differs most, and its distance.
    blocks, independent
        Number of blocks of a recording in the order of time, and of independent ones that they are
        worth by their autocorrelation; None between two recordings.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.random.default_rng(0).poisson([900, 100, 100, 100], (40, 1, 4))
    >>> table, reverse = (mt.RoutingStatistics.from_load(one) for one in (load, load[..., ::-1]))
    >>> drift = mt.drift(table, reverse)
    >>> drift.is_beyond_chance, round(drift.distance, 2)
    (True, 0.67)
    """

    distance: float
    expected: float
    chance: float
    is_of_groups: bool = False
    worst_layer: int = 0
    worst_distance: float = 0.0
    blocks: int | None = None
    independent: int | None = None

    _also_shown = ("is_beyond_chance",)

    @property
    def is_beyond_chance(self) -> bool:
        """True if the parts differ beyond chance, and by enough to matter."""
        is_significant = self.chance <= SIGNIFICANCE
        return is_significant and self.distance - self.expected >= LEAST_DRIFT

    def to_dict(self) -> dict[str, Any]:
        """Return fields and properties as JSON values."""
        return {**super().to_dict(), "is_beyond_chance": self.is_beyond_chance}


def drift(
    profile: Recording, traffic: Recording, *, seed: int = 0, progress: Progress | None = None
) -> Drift:
    """Compute how far traffic has drifted from a profile, such as that of a placement.

    Both are cut into blocks with about as many tokens: of sequences, or of windows where a block is
    longer than the windows are alike. The distance by chance is that of random choices of blocks.

    Parameters
    ----------
    profile, traffic
        Traces, statistics or load tables of one model.
    seed
        Seed of the random sides.
    progress
        Called now and then with the share of the readings of both that is done.

    Raises
    ------
    ValueError
        If the two are of different models, or have too few independent sequences or windows.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.random.default_rng(0).poisson(100, (80, 1, 4))
    >>> seen, later = (mt.RoutingStatistics.from_load(one) for one in (load[:40], load[40:]))
    >>> mt.drift(seen, later).is_beyond_chance
    False
    """
    callable_or_none("progress", progress)
    sides = {"profile": profile, "traffic": traffic}
    for name, side in sides.items():
        instance(name, side, RoutingTrace, RoutingStatistics)
    shapes = [[side.layers, side.num_experts] for side in sides.values()]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"traffic must be {shapes[0]} [layers, experts] as profile, got {shapes[1]}"
        )
    sizes = [max(side.choices, 1) for side in sides.values()]
    units = [
        find_samples(
            side,
            window=WINDOW,
            progress=scale_progress(progress, first / PASSES, (first + 2) / PASSES),
        )
        for first, side in zip((0, 2), sides.values(), strict=True)
    ]
    samples = [
        _count_exchangeable(side, unit) for side, unit in zip(sides.values(), units, strict=True)
    ]
    counts = _choose_block_counts(dict(zip(sides, samples, strict=True)), sizes)
    seed = seed_in(seed)
    loads = []
    for first, side, count, unit in zip((4, 5), sides.values(), counts, units, strict=True):
        folds = unit.deal(side, np.arange(side.length), WINDOW, folds=count)
        report = split_progress(progress, first, PASSES)
        loads.append(_count_block_loads(side, folds.fold, folds.number, report))
    return _compare_blocks(np.concatenate(loads), len(loads[0]), seed)


def _choose_block_counts(samples: dict[str, int], sizes: list[int]) -> list[int]:
    """Return the number of blocks of both sides, given their independent samples and choices.

    Both have as many blocks per token, and no more blocks than samples. Raise ValueError where a
    permutation test of so few blocks cannot be significant.
    """
    rate = MOST_BLOCKS / sum(sizes)
    for number, size in zip(samples.values(), sizes, strict=True):
        rate = min(rate, number / size)
    counts = [max(round(rate * size), 1) for size in sizes]
    if math.comb(sum(counts), counts[0]) * SIGNIFICANCE < 1:
        (fewest, scarce), (largest, ample) = sorted(
            (number, name) for name, number in samples.items()
        )
        raise ValueError(
            f"drift needs more sequences or windows: {scarce} has {fewest} independent, "
            f"{ample} {largest}; record {FEWEST_BLOCKS} or more of both"
        )
    return counts


def conclude_drift(
    drift: Drift, worst: dict[str, Any], *, limit: float | None = None, is_seen: bool = False
) -> Finding:
    """Return the headline: whether a placement still serves traffic, by the figure that got worst.

    ``worst`` has the ``measure``, its ``window`` and its relative ``change``. A change above
    ``limit`` asks for another placement, drifted or not; without a limit only drift does. On a
    profile that ``is_seen`` a placement is better than on any other traffic, so that a change
    without drift says nothing.
    """
    numbers = {"change": worst["change"], "window": worst["window"]}
    numbers["label"] = FIGURES[worst["measure"]].label
    is_worse = worst["change"] > (PRICE if limit is None else limit)
    if not drift.is_beyond_chance:
        if is_worse and limit is not None:
            return Finding("profile not left, placement serves worse", numbers, "headline", "worse")
        numbers["is_worse"] = is_worse and not is_seen
        return Finding("profile not left", numbers, "headline", "not left")
    if is_worse:
        return Finding("profile left, placement serves worse", numbers, "headline", "worse")
    return Finding("profile left, placement serves", numbers, "headline", "served")


def _count_exchangeable(traffic: Recording, units: Samples) -> int:
    """Return the number of blocks of traffic that a permutation may exchange.

    Blocks of windows have several correlation lengths, as the ends of neighbouring blocks are
    alike.
    """
    if units.autocorrelation.correlation_length == 1:
        return max(units.number, 1)
    rows = LENGTHS_PER_BLOCK * traffic.rows_in(WINDOW) * units.autocorrelation.correlation_length
    return max(traffic.length // rows, 1)


def measure_drift(traffic: Recording, units: Samples, *, seed: int = 0) -> Drift | None:
    """Compute how far the halves of a recording differ; None where it has too few blocks.

    If the halves of a recording with groups differ, they are compared again with every group spread
    evenly over the recording: where they are alike then, only the order of the groups differs.
    """
    blocks = BLOCKS
    if units.kinds is not None and units.sequences is None:  # kinds of windows
        length = measure_autocorrelation(
            count_loads(traffic).window_load, traffic.group
        ).correlation_length
        blocks = min(BLOCKS, units.number, traffic.length // length)
    elif units.name == "window":
        blocks = min(BLOCKS, _count_exchangeable(traffic, units))

    def compare_halves(*, by_group: bool) -> Drift | None:
        item, place = _find_places(traffic, by_group=by_group)
        block_of_item = (place * blocks // len(place)).astype(np.min_scalar_type(blocks))
        loads = _count_block_loads(traffic, block_of_item[item], blocks)
        if len(loads) < FEWEST_BLOCKS or not loads.sum():
            return None
        drift, number = _compare_blocks(loads, len(loads) // 2, seed), len(loads)
        independent = measure_autocorrelation(loads.astype(np.uint64)).number(number)
        return replace(drift, blocks=number, independent=max(independent, 1))

    as_recorded = compare_halves(by_group=False)
    if as_recorded is None or not as_recorded.is_beyond_chance or traffic.group is None:
        return as_recorded
    spread = compare_halves(by_group=True)
    if spread is None:
        return as_recorded
    return replace(as_recorded, is_of_groups=not spread.is_beyond_chance)


def _count_block_loads(
    traffic: Recording,
    block: NDArray[np.integer[Any]],
    blocks: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Count the load [B,L,E] of every block that has a token or a window; ``block`` is theirs."""
    if traffic.ordered:
        loads = count_loads_by_label(as_trace(traffic), block, blocks, progress=progress)
    else:
        loads = np.zeros((blocks, traffic.layers, traffic.num_experts))
        np.add.at(loads, block, count_loads(traffic).window_load.astype(np.float64))
    return loads[np.unique(block)]


def _compare_blocks(loads: NDArray[np.float64], number: int, seed: int) -> Drift:
    """Compare the first ``number`` of blocks [B,L,E] with the rest, by a permutation test."""
    is_first, rng = np.arange(len(loads)) < number, np.random.default_rng(seed)
    by_layer = _measure_distances(loads, is_first[None])[0]
    distance, worst = float(by_layer.mean()), int(by_layer.argmax())
    permutations = np.stack([rng.permutation(is_first) for _ in range(PERMUTATIONS)])
    batches = np.split(permutations, range(BATCH, PERMUTATIONS, BATCH))
    by_chance = np.concatenate([_measure_distances(loads, batch).mean(axis=1) for batch in batches])
    p_value = (1 + int((by_chance >= distance - 1e-12).sum())) / (1 + PERMUTATIONS)
    return Drift(
        distance,
        expected=float(by_chance.mean()),
        chance=p_value,
        worst_layer=worst,
        worst_distance=float(by_layer[worst]),
    )


def cut_in_half(traffic: AnyRecording) -> tuple[AnyRecording, AnyRecording]:
    """Return the halves of a recording by its sequences, or its windows or tokens without them."""
    item, place = _find_places(traffic, by_group=False)
    is_early = (place < len(place) // 2)[item]
    return traffic.take(is_early), traffic.take(~is_early)


def _find_places(
    traffic: Recording, *, by_group: bool
) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
    """Return the item of every token or window, and the place of every item in the recording.

    Items are sequences; where there are none, windows or tokens. With ``by_group`` the items of
    every group are spread evenly over the recording, in their order.
    """
    if traffic.sequence is None:
        item = first = np.arange(traffic.length)
    else:
        _, item, first, _ = labelling.by_label(traffic.sequence)
    order = np.argsort(first)
    if by_group and traffic.group is not None:
        # Item r of the n of a group belongs where a share (r + 0.5) / n of the recording is over.
        group = traffic.group[first][order]
        sizes = np.bincount(group)
        grouped = np.argsort(group, kind="stable")
        rank = np.empty(len(group))
        rank[grouped] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[np.argsort((rank + 0.5) / sizes[group], kind="stable")]
    place = np.empty(len(first), dtype=np.int64)
    place[order] = np.arange(len(first))
    return item, place


def _measure_distances(
    loads: NDArray[np.float64], is_first: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Compute the distances [N,L] of the first blocks [N,B] from the rest, of loads [B,L,E]."""
    load = np.tensordot(is_first.astype(np.float64), loads, axes=1)
    return measure_distance(load, loads.sum(axis=0) - load)
