"""What a rebalancer has observed: decayed counts, one half to place by and one half to judge by.

A placement is best on the counts that it was made from, by chance too. What it gains is therefore
read off others: of every observation a half is held out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# With fewer windows, a half would be of one kind of traffic: tokens are dealt instead.
FEWEST_WINDOWS = 4

Floats = NDArray[np.float64]


class Observed:
    """Tokens per layer and expert [L,E], each worth less with every observation after it.

    Parameters
    ----------
    layers, experts
        Sizes L and E.
    decay
        What a count is worth one observation later.
    seed
        Of how tokens are dealt; with equal counts every rank deals alike.

    Attributes
    ----------
    total, held
        All that was counted, and what of it is held out [L,E].
    steps
        Steps of the model that it was counted in.
    """

    def __init__(self, layers: int, experts: int, decay: float, seed: int) -> None:
        self.decay = decay
        self.total: Floats = np.zeros((layers, experts))
        self.held: Floats = np.zeros((layers, experts))
        self.steps = 0.0
        self._seed, self._number = seed, 0

    def add(self, windows: NDArray[np.generic], steps: float) -> None:
        """Take windows of counts [W,L,E] of so many steps."""
        counts = windows.astype(np.float64)
        load: Floats = counts.sum(axis=0)
        if len(counts) >= FEWEST_WINDOWS:
            held = counts[1::2].sum(axis=0)
        else:
            random = np.random.default_rng([self._seed, self._number])
            held = random.binomial(np.floor(load).astype(np.int64), 0.5).astype(np.float64)
        self._number += 1
        self.total = self.decay * self.total + load
        self.held = self.decay * self.held + held
        self.steps = self.decay * self.steps + steps

    @property
    def per_step(self) -> Floats:
        """All tokens per step [L,E]."""
        every: Floats = self.total / max(self.steps, 1e-9)
        return every

    @property
    def learned(self) -> Floats:
        """Counts to place by [L,E]: those that are not held out."""
        rest: Floats = self.total - self.held
        return rest

    def like_all(self, part: Floats) -> Floats:
        """Give tokens per step of a part of the counts [L,E], as many in a layer as there are."""
        whole = self.per_step.sum(axis=1, keepdims=True)
        own = part.sum(axis=1, keepdims=True)
        scaled: Floats = part * np.divide(whole, own, out=np.zeros_like(own), where=own > 0)
        return scaled
