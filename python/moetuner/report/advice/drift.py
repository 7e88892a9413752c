"""Whether traffic changes its kind, while it is recorded or since, beyond chance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import instance, seed_in
from moetuner.evaluation.comparison import PRICE
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.kinds import loads_by
from moetuner.evaluation.reading import Progress, part_of
from moetuner.evaluation.units import Units, blocks_of, units_of
from moetuner.frozen import Frozen
from moetuner.recording import AnyRecording, Recording
from moetuner.report.findings import Finding
from moetuner.statistics import RoutingStatistics, count_loads, measure_distance
from moetuner.trace import RoutingTrace, as_trace

# Parts of equal numbers of sequences, in the order of the recording, that are permuted.
BLOCKS = 32
# Ways to halve the blocks that say how far halves of one kind differ, and the most of these that
# may differ as much as the first half does from the second; so many are looked at together.
HALVES, CHANCE, TOGETHER = 400, 0.01, 16
# Share of the tokens that go to other experts, beyond chance, from which a change is told.
LEAST = 0.05
# Fewest blocks that can be halved in so many ways.
FEWEST = 12
# Times that windows are alike over, in the shortest block that may change sides: the ends of
# neighbouring ones are alike.
LASTING = 3
# Readings of two recordings: two of each for what is independent, then one of each.
PASSES = 6
# Most blocks of two recordings together, and tokens of a window of a trace without sequences.
MOST, WINDOW = 128, 512


@dataclass(frozen=True, eq=False, repr=False)
class Drift(Frozen):
    """How far one part of some traffic differs from another.

    Of ``drift`` these are the traffic and its profile, of ``advise`` the halves of a recording.

    Parameters
    ----------
    distance
        Total variation distance of the parts' expert shares, averaged over layers: the share of the
        tokens that would have to go to other experts.
    expected
        The same of parts that are chosen at random.
    chance
        How many of the random parts differ as much.
    is_of_groups
        Whether the halves differ as they hold different groups, and each group stays as it is.
    worst_layer, worst_distance
        Layer that differs most, and its distance.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.random.default_rng(0).poisson([900, 100, 100, 100], (40, 1, 4))
    >>> table, reverse = (mt.RoutingStatistics.from_load(each) for each in (load, load[..., ::-1]))
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

    _also_shown = ("is_beyond_chance",)

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the parts differ beyond chance, and by more than would not matter."""
        return self.chance <= CHANCE and self.distance - self.expected >= LEAST

    def to_dict(self) -> dict[str, Any]:
        """Return fields and properties as JSON values."""
        return {**super().to_dict(), "is_beyond_chance": self.is_beyond_chance}


def drift(
    profile: Recording,
    traffic: Recording,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Drift:
    """Compute how far traffic has left a profile, such as that of a placement.

    Both are cut into blocks of about as many tokens, of sequences, or of windows, longer than these
    are alike. What differs by chance is what remains when blocks change sides at random.

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
        If the two are of different models, or have too few sequences or windows to tell.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.random.default_rng(0).poisson(100, (80, 1, 4))
    >>> seen, later = (mt.RoutingStatistics.from_load(each) for each in (load[:40], load[40:]))
    >>> mt.drift(seen, later).is_beyond_chance
    False
    """
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
        _units_of(side, part_of(progress, at / PASSES, (at + 2) / PASSES))
        for at, side in zip((0, 2), sides.values(), strict=True)
    ]
    numbers = [_exchangeable(*each) for each in zip(sides.values(), units, strict=True)]
    rate = min(MOST / sum(sizes), *(n / size for n, size in zip(numbers, sizes, strict=True)))
    counts = [max(round(rate * size), 1) for size in sizes]
    if math.comb(sum(counts), counts[0]) * CHANCE < 1:
        fewer, more = sorted(zip(numbers, sides, strict=True))
        raise ValueError(
            f"drift needs more sequences or windows: {fewer[1]} has {fewer[0]} independent, "
            f"{more[1]} {more[0]}; record {FEWEST} or more of both"
        )
    seed = seed_in(seed)
    parts = []
    for at, side, count, own in zip((4, 5), sides.values(), counts, units, strict=True):
        folds = own.deal(side, np.arange(side.length), WINDOW, folds=count)
        own_progress = part_of(progress, at / PASSES, (at + 1) / PASSES)
        parts.append(_loads(side, folds.fold, folds.number, own_progress))
    return _drift_of(np.concatenate(parts), len(parts[0]), seed)


def conclude_drift(drifted: Drift, worst: dict[str, Any]) -> Finding:
    """Return whether a placement still serves traffic, by its figure that got worst.

    ``worst`` has the ``measure``, its ``window`` and its relative ``change``.
    """
    numbers = {"change": worst["change"], "window": worst["window"]}
    numbers["label"] = FIGURES[worst["measure"]].label
    is_worse = worst["change"] > PRICE
    if not drifted.is_beyond_chance:
        numbers["is_worse"] = is_worse
        return Finding("profile not left", numbers, "headline", "not left")
    if is_worse:
        return Finding("profile left, placement serves worse", numbers, "headline", "worse")
    return Finding("profile left, placement serves", numbers, "headline", "served")


def _units_of(traffic: Recording, progress: Progress | None = None) -> Units:
    """Return what is independent, as ``advise`` counts it."""
    return units_of(traffic, window=WINDOW, progress=progress)


def _exchangeable(traffic: Recording, units: Units) -> int:
    """Return how many parts of traffic may change places: none is shorter than what is alike.

    Windows that are worth an independent one are not enough: ends of neighbouring parts are alike.
    """
    if units.blocks.length == 1:
        return max(units.number, 1)
    longest = LASTING * traffic.rows_in(WINDOW) * units.blocks.length
    return max(traffic.length // longest, 1)


def drift_of(traffic: Recording, units: Units, *, seed: int = 0) -> Drift | None:
    """Compute how far the halves of a recording differ; None where there is too little to tell."""
    blocks = BLOCKS
    if units.kinds is not None and units.sequences is None:  # kinds of windows
        alike = blocks_of(count_loads(traffic).window_load, traffic.group).length
        blocks = min(BLOCKS, units.number, traffic.length // alike)
    elif units.name == "window":
        blocks = min(BLOCKS, _exchangeable(traffic, units))
    first = None
    for by_group in (False, True):
        item, place = _in_order(traffic, by_group=by_group)
        loads = _loads(traffic, (place * blocks // len(place))[item], blocks)
        if len(loads) < FEWEST or not loads.sum():
            return first
        one = _drift_of(loads, len(loads) // 2, seed)
        if first is not None:
            return replace(first, is_of_groups=not one.is_beyond_chance)
        first = one
        if not one.is_beyond_chance or traffic.group is None:
            break
    return first


def _loads(
    traffic: Recording,
    block: NDArray[np.integer[Any]],
    blocks: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Count load [B,L,E] of the blocks that tokens, or windows, are in; those that have some."""
    if traffic.ordered:
        loads = loads_by(as_trace(traffic), block, blocks, progress=progress)
    else:
        loads = np.zeros((blocks, traffic.layers, traffic.num_experts))
        np.add.at(loads, block, count_loads(traffic).window_load.astype(np.float64))
    return loads[np.unique(block)]


def _drift_of(loads: NDArray[np.float64], number: int, seed: int) -> Drift:
    """Compare the first blocks [B,L,E] with the rest, and with as many at random."""
    first, rng = np.arange(len(loads)) < number, np.random.default_rng(seed)
    by_layer = _distances(loads, first[None])[0]
    distance, worst = float(by_layer.mean()), int(by_layer.argmax())
    halvings = np.stack([rng.permutation(first) for _ in range(HALVES)])
    runs = np.split(halvings, range(TOGETHER, HALVES, TOGETHER))
    others = np.concatenate([_distances(loads, run).mean(axis=1) for run in runs])
    chance = (1 + int((others >= distance - 1e-12).sum())) / (1 + HALVES)
    furthest = float(by_layer[worst])
    return Drift(distance, float(others.mean()), chance, worst_layer=worst, worst_distance=furthest)


def halves(traffic: AnyRecording) -> tuple[AnyRecording, AnyRecording]:
    """Cut a recording in the middle of its sequences, or of its windows or tokens without them."""
    item, place = _in_order(traffic, by_group=False)
    is_early = place[item] < len(place) // 2
    return traffic.take(is_early), traffic.take(~is_early)


def _in_order(traffic: Recording, *, by_group: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the item of every token or window, and each item's place in the order of recording.

    Items are sequences, or windows or tokens without them. With ``by_group`` those of every group
    are spread over the whole, in their order.
    """
    item = first = np.arange(traffic.length)
    if traffic.sequence is not None:
        _, first, item = np.unique(traffic.sequence, return_index=True, return_inverse=True)
    order = np.argsort(first)
    if by_group and traffic.group is not None:
        group = traffic.group[first][order]
        sizes = np.bincount(group)
        grouped = np.argsort(group, kind="stable")
        rank = np.empty(len(group))
        rank[grouped] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[np.argsort((rank + 0.5) / sizes[group], kind="stable")]
    place = np.empty(len(first), dtype=np.int64)
    place[order] = np.arange(len(first))
    return item, place


def _distances(loads: NDArray[np.float64], first: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute how far shares of the first blocks [N,B] are from those of the rest [N,L]."""
    one = np.tensordot(first.astype(np.float64), loads, axes=1)
    return measure_distance(one, loads.sum(axis=0) - one)
