"""What generalises to traffic that nobody has seen: chosen inside the traffic seen.

A search that minimises the largest device load of the windows it has seen fits their noise. Two
things make it generalise: a norm over devices instead of the maximum, and a cost of what is likely
in windows that did not happen but could have. Which of them help depends on the traffic, so it is
tried: parts of the windows are held out, a few layers are placed on the others, and the held-out
windows decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._split import of_layer
from moetuner.placement import EMPTY

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# With fewer windows there is nothing to hold out.
FEWEST_WINDOWS = 4
# Groups with fewer windows on average are held out whole: what comes is another group.
FEW_PER_GROUP = 2
MOST_FOLDS, WINDOW_FOLDS = 8, 4
# Layers that are tried, at even distances, and trials for each of their slots.
TRIED_LAYERS, TRIALS_PER_SLOT = 6, 100
# A move changes layers of few slots so much that they need more heat, and many trials for a slot.
SMALL, SMALL_HOT, SMALL_COLD, LEAST_TRIALS = 64, 0.1, 1e-3, 10_000
# The first setting stands unless another is better by as many standard errors: the layers
# tried are few.
CLEARLY = 2.0
# Trials for each slot, and temperatures as shares of the cost. Where few windows say what a layer
# costs, most moves change little: it takes more of them, which cost less (bench/RESULTS.md).
PER_SLOT, HOT, COLD = 600, 3e-4, 3e-6
FEW_WINDOWS, FEW_PER_SLOT, FEW_HOT, FEW_COLD = 16, 5000, 2e-3, 4e-6


@dataclass(frozen=True)
class Setting:
    """How to search.

    Parameters
    ----------
    norm
        Order of the norm over devices that stands for the maximum; 0 for the maximum itself.
    likely
        Share of the cost that what other windows may bring has: every device's mean load and two
        standard deviations of it (``rust/layer/likely.rs``).
    """

    norm: int
    likely: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in ``details``."""
        norm = f"norm {self.norm}" if self.norm else "maximum"
        return f"{norm}, likely windows" if self.likely else norm


# Of equals the first is taken.
FOR_WINDOWS = (Setting(8, 0.5), Setting(8), Setting(16), Setting(0))
FOR_GROUPS = (Setting(16, 0.5), Setting(8, 0.5), Setting(16), Setting(0))


@dataclass(frozen=True)
class Choice:
    """Setting to search with, trials for each slot of a layer, first and last temperature.

    ``details`` says what was chosen, out of what, and each one's score: the mean of max / mean
    device load on the windows held out.
    """

    setting: Setting = Setting(0)
    per_slot: int = PER_SLOT
    hot: float = HOT
    cold: float = COLD
    details: dict[str, Any] = field(default_factory=dict)


def choose(
    load: Floats,
    weight: Floats,
    group: Integers | None,
    room: Integers,
    node: Integers,
    time: Floats,
    *,
    nearest: bool,
    seed: int,
    threads: int | None,
    time_limit: float | None = None,
) -> Choice:
    """Choose how to search by cross-validation.

    Parameters
    ----------
    load, weight, group
        Tokens [W,L,E], how much a window counts [W] and its group [W]. Where groups have hardly
        more than a window each, whole groups are held out, else windows of every group.
    room, node, time
        Slots of every device [L,D], its node [D] and its time per token, as a share of the
        slowest one's [D].
    nearest
        Whether tokens go to the nearest copy.
    seed, threads
        Of the searches. One seed gives one answer on any number of threads.
    time_limit
        Seconds for all searches together.
    """
    used = np.flatnonzero((weight > 0) & load.any(axis=(1, 2)))
    if len(used) < FEWEST_WINDOWS:
        details: dict[str, Any] = {"chosen": Setting(0).name, "reason": "too few windows"}
        return Choice(details=details)
    fold, whole_groups = _folds(used, len(load), group)
    layers = np.unique(np.linspace(0, load.shape[1] - 1, TRIED_LAYERS).round().astype(np.int64))
    trial = _Trial(load[:, layers], weight, fold, room[layers], node, time, nearest)
    settings = FOR_GROUPS if whole_groups else FOR_WINDOWS
    each = None if time_limit is None else time_limit / len(settings)
    scores = [
        trial.scores(setting, seed=seed, threads=threads, time_limit=each) for setting in settings
    ]
    best = 0
    for number, score in enumerate(scores):
        gain = scores[best] - score
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
        if gain.mean() > CLEARLY * error:
            best = number
    chosen = settings[best]
    details = {
        "chosen": chosen.name,
        "held_out": "groups" if whole_groups else "windows",
        "folds": int(fold.max()) + 1,
        "layers": len(layers),
        "scores": {s.name: float(score.mean()) for s, score in zip(settings, scores, strict=True)},
    }
    return Choice(chosen, *effort(room, len(used)), details)


def effort(room: Integers, windows: int) -> tuple[int, float, float]:
    """Trials for each slot, first and last temperature; layers have such slots on devices [L,D]."""
    if room.sum(axis=1).max() <= SMALL:
        return PER_SLOT, SMALL_HOT, SMALL_COLD
    if windows <= FEW_WINDOWS:
        return FEW_PER_SLOT, FEW_HOT, FEW_COLD
    return PER_SLOT, HOT, COLD


def _folds(used: Integers, windows: int, group: Integers | None) -> tuple[Integers, bool]:
    """Assign windows to parts [W], -1 for none, and say whether parts are whole groups."""
    fold = np.full(windows, -1)
    of_used = np.zeros(len(used)) if group is None else group[used]
    _, label = np.unique(of_used, return_inverse=True)
    groups = int(label.max()) + 1
    if groups >= FEWEST_WINDOWS and len(used) < FEW_PER_GROUP * groups:
        fold[used] = label % MOST_FOLDS
        return fold, True
    # Every part gets windows of every group, if there are enough.
    order = np.argsort(label, kind="stable")
    fold[used[order]] = np.arange(len(used)) % WINDOW_FOLDS
    return fold, False


@dataclass(frozen=True)
class _Trial:
    """A few layers to try settings on; a part of the windows is held out of each copy of them."""

    load: Floats
    weight: Floats
    fold: Integers
    room: Integers
    node: Integers
    time: Floats
    nearest: bool

    def scores(
        self, setting: Setting, *, seed: int, threads: int | None, time_limit: float | None
    ) -> Floats:
        """Imbalance on the windows held out [parts * L]."""
        parts = range(int(self.fold.max()) + 1)
        held_out = [(self.fold == part)[:, None, None] for part in parts]
        tables = [np.where(out, 0, self.load) for out in held_out]
        layers = _core.Layers(
            np.concatenate(tables, axis=1),
            self.weight,
            np.tile(self.room, (len(parts), 1)),
            self.node.tolist(),
            self.time.tolist(),
            nearest=self.nearest,
            norm=setting.norm,
            likely=setting.likely,
        )
        _, hot, cold = effort(self.room, len(self.load))
        slots, interrupted = layers.place(
            layers.construct(),
            trials=max(TRIALS_PER_SLOT * int(self.room.sum(axis=1).max()), LEAST_TRIALS),
            hot=hot,
            cold=cold,
            seed=seed,
            threads=threads,
            time_limit=time_limit,
        )
        if interrupted:
            raise KeyboardInterrupt
        each = np.split(slots, len(parts))
        scores = [self._judge(part, mine) for part, mine in zip(parts, each, strict=True)]
        return np.concatenate(scores)

    def _judge(self, part: int, slots: NDArray[np.int32]) -> Floats:
        """Imbalance of slots [L,D,S] on the windows of a part, for every layer."""
        out = self.fold == part
        load, weight = self.load[out], self.weight[out]
        scores = np.ones(len(slots))
        for layer, filled in enumerate(slots):
            held = np.zeros((len(filled), load.shape[2]))
            device, slot = np.nonzero(filled != EMPTY)
            held[device, filled[device, slot]] = 1
            share = of_layer(held, self.node, "nearest" if self.nearest else "even")
            slowest = (load[:, layer] @ share.T * self.time).max(axis=1)
            mean = load[:, layer].sum(axis=1) / (1 / self.time).sum()
            if mean.any():
                scores[layer] = (weight * slowest).sum() / (weight * mean).sum()
        return scores
