"""What generalises to traffic that nobody has seen: chosen inside the traffic seen.

A search that minimises the largest device load of the windows it has seen fits their noise. Three
things make it generalise: a norm over devices instead of the maximum, room for the noise of the
experts that a device holds, and the mean of all windows as one more, for traffic of all kinds at
once. Which of them help depends on the traffic, so it is tried: parts of the windows are held out,
a few layers are placed on the others, and the held-out windows, and their mean, decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.copies import of_layer
from moetuner.placement import EMPTY
from moetuner.solver import effort
from moetuner.solver.result import Clock, Limits, UnseenDetails
from moetuner.solver.search.noise import noise_of

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# With fewer windows there is nothing to hold out. Of so few that have no groups, each is a group:
# they are a table of what differs, not of what repeats.
FEWEST_WINDOWS, FEW_WINDOWS = 4, 16
# Groups with fewer windows on average are held out whole: what comes is another group.
FEW_PER_GROUP = 2
# The first setting stands unless another is better by as many standard errors: the layers
# tried are few. Of one with the mean of all windows, less is asked: it is for safety.
CLEARLY, SAFELY = 3.0, 1.0
# How much the mean of all windows counts, if it does, as a part of what they all count.
MIXED = 1.0


@dataclass(frozen=True)
class SearchSetting:
    """How to search.

    Parameters
    ----------
    norm
        Order of the norm over devices that stands for the maximum; 0 for the maximum itself.
    noise
        What experts do on their own, as the core counts it (``Noise.counted``); None to leave it
        out.
    mixed
        How much the mean of all windows counts besides them.
    """

    norm: int
    noise: tuple[float, float, float] | None = None
    mixed: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in ``details``."""
        norm = f"norm {self.norm}" if self.norm else "maximum"
        return norm + ", noise" * (self.noise is not None) + ", mixed" * (self.mixed > 0)


# What is tried besides the norm that noise suggests; of equals the first is taken.
WITHOUT_NOISE = (SearchSetting(8), SearchSetting(16), SearchSetting(0))


@dataclass(frozen=True)
class Choice:
    """Setting to search with.

    ``details`` has what was chosen, out of what; None where nothing had to be.
    """

    setting: SearchSetting = SearchSetting(0)
    details: UnseenDetails | None = None


def choose(
    load: Floats,
    weight: Floats,
    group: Integers | None,
    capacity: Integers,
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
        more than a window each, whole groups are held out, as what comes is another group; else
        windows of every group.
    capacity, node, time
        Slots of every device [L,D], its node [D] and its time per token, as a share of the
        slowest one's [D].
    nearest
        Whether tokens go to the nearest copy.
    seed, threads
        Of the searches. One seed gives one answer on any number of threads.
    time_limit
        Seconds for all searches together.
    """
    clock = Clock(Limits(time_limit))
    used = np.flatnonzero((weight > 0) & load.any(axis=(1, 2)))
    if len(used) < FEWEST_WINDOWS:
        return Choice(details=UnseenDetails(SearchSetting(0).name, "too few windows"))
    fold, whole_groups = _folds(used, len(load), group)
    layers = np.unique(
        np.linspace(0, load.shape[1] - 1, effort.TRIED_LAYERS).round().astype(np.int64)
    )
    trial = _Trial(load[:, layers], weight, fold, capacity[layers], node, time, nearest)
    settings = list(WITHOUT_NOISE)
    noise = noise_of(trial.load[used], repeats=not whole_groups)
    if noise is not None:
        devices, experts = capacity.shape[1], load.shape[2]
        settings.insert(0, SearchSetting(noise.order(devices, experts), noise.counted(devices)))
    tries = len(settings) + 1
    scores: dict[SearchSetting, Floats] = {}

    def judge(setting: SearchSetting) -> Floats:
        within = clock.within(1 / (tries - len(scores)))
        return trial.scores(setting, seed=seed, threads=threads, time_limit=within.time_limit)

    def is_better(setting: SearchSetting, than: SearchSetting, errors: float) -> bool:
        if clock.is_over():
            return False
        scores[setting] = judge(setting)
        gain = scores[than] - scores[setting]
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
        return bool(gain.mean() > errors * error)

    chosen = settings[0]
    scores[chosen] = judge(chosen)
    for setting in settings[1:]:
        chosen = setting if is_better(setting, chosen, CLEARLY) else chosen
    if chosen.norm:
        safe = replace(chosen, mixed=MIXED)
        chosen = safe if is_better(safe, chosen, SAFELY) else chosen
    details = UnseenDetails(
        chosen.name,
        held_out="groups" if whole_groups else "windows",
        folds=int(fold.max()) + 1,
        layers=len(layers),
        scores={setting.name: float(score.mean()) for setting, score in scores.items()},
    )
    return Choice(chosen, details)


def _folds(used: Integers, windows: int, group: Integers | None) -> tuple[Integers, bool]:
    """Assign windows to parts [W], -1 for none, and say whether parts are whole groups."""
    fold = np.full(windows, -1)
    if group is not None:
        of_used = group[used]
    else:
        of_used = used if len(used) <= FEW_WINDOWS else np.zeros_like(used)
    _, label = np.unique(of_used, return_inverse=True)
    groups = int(label.max()) + 1
    if groups >= FEWEST_WINDOWS and len(used) < FEW_PER_GROUP * groups:
        fold[used] = label % effort.MOST_FOLDS
        return fold, True
    # Every part gets a run of each group's windows: neighbours are alike, and of windows in turn
    # all that is held out would have a neighbour seen, or a period in step with it.
    for number in range(groups):
        mine = used[label == number]
        run = np.arange(len(mine)) * effort.WINDOW_FOLDS // len(mine)
        # Small groups do not all begin with the same part.
        fold[mine] = (run + number) % effort.WINDOW_FOLDS
    return fold, False


@dataclass(frozen=True)
class _Trial:
    """A few layers to try settings on; a part of the windows is held out of each copy of them."""

    load: Floats
    weight: Floats
    fold: Integers
    capacity: Integers
    node: Integers
    time: Floats
    nearest: bool

    def scores(
        self, setting: SearchSetting, *, seed: int, threads: int | None, time_limit: float | None
    ) -> Floats:
        """Compute the imbalance on the windows held out [parts * L]."""
        clock = Clock(Limits(time_limit))
        parts = range(int(self.fold.max()) + 1)
        held_out = [(self.fold == part)[:, None, None] for part in parts]
        tables = [np.where(out, 0, self.load) for out in held_out]
        layers = _core.Layers(
            np.concatenate(tables, axis=1),
            self.weight,
            np.tile(self.capacity, (len(parts), 1)),
            self.node.tolist(),
            self.time.tolist(),
            nearest=self.nearest,
            norm=setting.norm,
            noise=setting.noise,
            mixed=setting.mixed,
        )
        start = layers.construct(threads=threads)
        slots, interrupted = layers.place(
            start,
            trials=max(
                effort.TRIED_PER_SLOT * int(self.capacity.sum(axis=1).max()), effort.TRIED_LEAST
            ),
            seed=seed,
            threads=threads,
            time_limit=clock.left,
        )
        if interrupted:
            raise KeyboardInterrupt
        each = np.split(slots, len(parts))
        scores = [self._judge(part, mine) for part, mine in zip(parts, each, strict=True)]
        return np.concatenate(scores)

    def _judge(self, part: int, slots: NDArray[np.int32]) -> Floats:
        """Compute layers' imbalance of slots [L,D,S] on the windows of a part and on their mean."""
        out = self.fold == part
        load, weight = self.load[out], self.weight[out]
        mixed = np.einsum("w,wle->le", weight, load)
        scores = np.ones(len(slots))
        for layer, filled in enumerate(slots):
            held = np.zeros((len(filled), load.shape[2]))
            device, slot = np.nonzero(filled != EMPTY)
            held[device, filled[device, slot]] = 1
            share = of_layer(held, self.node, "nearest" if self.nearest else "even")
            mean = mixed[layer].sum() / (1 / self.time).sum()
            if mean:
                slowest = weight @ (load[:, layer] @ share.T * self.time).max(axis=1)
                together = (share @ mixed[layer] * self.time).max()
                scores[layer] = (slowest + together) / (2 * mean)
        return scores
