"""What generalises to traffic that nobody has seen: chosen inside the traffic seen.

A search that minimises the largest device load of the windows it has seen fits their noise. Two
things make it generalise: a norm over devices instead of the maximum, and windows that did not
happen but could have. Which of them help depends on the traffic, so it is tried: parts of the
windows are held out, a few layers are placed on the others, and the held-out windows decide.
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
# Windows invented, and how much further than those seen they are from the mean.
INVENTED, REACH = 120, 2.0


@dataclass(frozen=True)
class Setting:
    """How to search.

    Parameters
    ----------
    norm
        Order of the norm over devices that stands for the maximum; 0 for the maximum itself.
    invented
        Weight of all invented windows, as a share of the weight of those seen.
    """

    norm: int
    invented: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in ``details``."""
        norm = f"norm {self.norm}" if self.norm else "maximum"
        return f"{norm}, invented windows" if self.invented else norm


# Of equals the first is taken.
FOR_WINDOWS = (Setting(8), Setting(16), Setting(8, 1.0), Setting(0))
FOR_GROUPS = (Setting(8, 1.0), Setting(4, 1.0), Setting(8), Setting(0))


@dataclass(frozen=True)
class Choice:
    """Windows to search on [W,L,E], their weights [W], norm and temperatures.

    ``details`` says what was chosen, out of what, and each one's score: the mean of max / mean
    device load on the windows held out.
    """

    load: Floats
    weight: Floats
    norm: int = 0
    hot: float = 3e-4
    cold: float = 3e-6
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
    """Choose norm and windows by cross-validation.

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
        return Choice(load, weight, details=details)
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
    wide, weights = extended(load, weight, chosen.invented, seed=seed)
    return Choice(wide, weights, chosen.norm, *temperatures(room), details)


def temperatures(room: Integers) -> tuple[float, float]:
    """First and last temperature for layers with such slots on devices [L,D]."""
    if room.sum(axis=1).max() <= SMALL:
        return SMALL_HOT, SMALL_COLD
    return Choice.hot, Choice.cold


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
        tables = [
            extended(np.where(out, 0, self.load), self.weight, setting.invented, seed=seed)
            for out in held_out
        ]
        layers = _core.Layers(
            np.concatenate([load for load, _ in tables], axis=1),
            tables[0][1],
            np.tile(self.room, (len(parts), 1)),
            self.node.tolist(),
            self.time.tolist(),
            nearest=self.nearest,
            norm=setting.norm,
        )
        hot, cold = temperatures(self.room)
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


def extended(
    load: Floats, weight: Floats, invented: float, *, seed: int = 0
) -> tuple[Floats, Floats]:
    """Add windows that did not happen, but vary as those that did.

    An invented window is the mean plus a random combination of what sets the windows seen apart
    from it, so that experts whose loads rise together still do; and the same taken from the mean.
    They have the mean of the windows seen and, but for ``REACH`` squared, their covariance.

    Parameters
    ----------
    load, weight
        Tokens [W,L,E] and weights [W] of the windows seen.
    invented
        Weight of all invented windows, as a share of the weight of those seen; 0 for none.

    Returns
    -------
        Load and weight with the invented windows after those seen.
    """
    tokens = load.sum(axis=2, keepdims=True)
    mass = weight * tokens.sum(axis=(1, 2))
    used = np.flatnonzero(mass > 0)
    if invented <= 0 or len(used) < 2:
        return load, weight
    part = mass[used] / mass.sum()
    share = load[used] / np.maximum(tokens[used], 1e-300)
    mean = np.einsum("w,wle->le", part, share)
    # Unbiased: the mean itself was taken from as many windows.
    spread = np.sqrt(part * len(used) / (len(used) - 1))
    factor = REACH * spread * np.random.default_rng(seed).normal(size=(INVENTED // 2, len(used)))
    change = np.einsum("nw,wle->nle", factor, share - mean)
    likely = np.maximum(np.concatenate([mean + change, mean - change]), 0)
    likely /= np.maximum(likely.sum(axis=2, keepdims=True), 1e-300)
    # A layer's weighted tokens, as many as it has in the windows seen.
    total = np.einsum("w,wlx->lx", weight, tokens)
    wide = np.concatenate([load, likely * (invented * total / len(likely))])
    return wide, np.concatenate([weight, np.ones(len(likely))])
