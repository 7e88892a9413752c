"""Follow the traffic of a model: how far it is from its profile, and what the map in force saves.

The profile is the loads that the placement was computed from: those in its file, or those of the
decision that took the map. ``moetuner drift`` compares windows of two recordings. Of the profile an
engine has the sum alone, so how far it differs by chance is told by the windows of live loads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import compute_checksum
from moetuner.plugins.decision import Case, Slots
from moetuner.plugins.files import Stored
from moetuner.plugins.metrics import NAN, Figures, find_quantiles
from moetuner.statistics import LEAST_DRIFT, measure_distance

Load = NDArray[np.float64]
# Windows of live loads, each of one decision, that are compared with the profile: fewer say
# nothing, and of more the last ones count.
FEWEST_WINDOWS, MOST_WINDOWS = 8, 16
# Random halves of these windows, whose distances are those by chance.
HALVES = 16


@dataclass
class LiveTraffic:
    """The traffic of one model since its map was taken.

    ``own`` is the map of the engine that ran last, ``taken`` the checksum of the map that ranks
    took last, and ``own_tokens`` and ``tokens`` are the slowest ranks' tokens under both.
    """

    stored: Stored | None = None
    profile: Load | None = None
    windows: deque[Load] = field(default_factory=lambda: deque(maxlen=MOST_WINDOWS))
    own: Slots | None = None
    taken: str = ""
    own_tokens: float = 0.0
    tokens: float = 0.0

    def follow(
        self, case: Case, slots: Slots, stored: Stored | None, balancedness: float | None
    ) -> Figures:
        """Return what is seen up to a decision that takes ``slots``, with its loads.

        ``balancedness`` is that of the case under the map that runs. The traffic's distance from
        the profile is that of this decision's loads.
        """
        gain = self._add_tokens(case, balancedness)
        if stored is not None and stored is not self.stored:
            self._take_profile(find_profile(case, stored))
        self.stored = stored
        load, distances, has_drifted = case.load, np.empty(0), NAN
        if self.profile is not None and load.any():
            self.windows.append(load)
            distances = measure_distances(load, self.profile)
            has_drifted = decide_drift(list(self.windows), self.profile)
        taken = compute_checksum(slots)
        if taken != self.taken:
            self.taken = taken
            self.own_tokens = self.tokens = 0.0
            if stored is None:
                self._take_profile(load if load.any() else None)
        return Figures(
            seen_gain=gain,
            traffic_distance=find_quantiles(distances),
            traffic_has_drifted=has_drifted,
        )

    def _take_profile(self, profile: Load | None) -> None:
        self.profile = profile
        self.windows.clear()

    def _add_tokens(self, case: Case, ours: float | None) -> float:
        """Add the slowest ranks' tokens of a decision's loads; return the gain of the map."""
        running = case.slots
        if not self.taken or compute_checksum(running) != self.taken:
            self.own = running
            if not case.runs:
                in_order = np.arange(running[0].size, dtype=np.int32) % case.experts
                self.own = np.tile(in_order, len(running)).reshape(running.shape)
            self.own_tokens = self.tokens = 0.0
            return NAN
        assert self.own is not None
        own = case.balancedness(self.own)
        if own and ours:
            mean = float(case.load.sum()) / running.shape[1]
            self.own_tokens += mean / own
            self.tokens += mean / ours
        return 1 - self.tokens / self.own_tokens if self.own_tokens else NAN


def find_profile(case: Case, stored: Stored) -> Load | None:
    """Return the loads [L,E] of a placement's file in the engine's layers; None without any."""
    load = stored.load
    if load is None:
        return None
    profile = np.zeros_like(case.load)
    profile[case.find_rows(len(load), str(stored.path))] = load
    return profile


def measure_distances(load: Load, profile: Load) -> Load:
    """Compute the distance of loads [L,E] from a profile, of every layer with load in both."""
    used = load.any(axis=1) & profile.any(axis=1)
    return measure_distance(load[used], profile[used])


def decide_drift(windows: list[Load], profile: Load) -> float:
    """Return 1 if windows [W] of loads [L,E] have drifted from a profile, 0 if not, or NaN.

    Random halves of the windows, of n tokens together, tell the distance by chance: it falls with
    the root of the tokens, so windows of n and a profile of m tokens have ``sqrt(1 + n / m) / 2``
    of it. As in ``moetuner drift`` traffic has drifted if it is farther than that by
    ``LEAST_DRIFT``, mean of layers; here, and farther than all of the halves.
    """
    if len(windows) < FEWEST_WINDOWS:
        return NAN
    loads = np.stack(windows)
    load = loads.sum(axis=0)
    distances = measure_distances(load, profile)
    if not distances.size:
        return NAN
    distance = float(distances.mean())
    if distance < LEAST_DRIFT:
        return 0.0
    rng = np.random.default_rng(0)
    is_first = np.arange(len(loads)) < len(loads) // 2
    sides = np.stack([rng.permutation(is_first) for _ in range(HALVES)]).astype(np.float64)
    loads = loads[:, load.any(axis=1) & profile.any(axis=1)]
    halves = np.tensordot(sides, loads, axes=1)
    by_chance = measure_distance(halves, loads.sum(axis=0) - halves).mean(axis=1)
    by_chance *= np.sqrt(1 + load.sum() / profile.sum()) / 2
    is_far = distance - by_chance.mean() >= LEAST_DRIFT and distance > by_chance.max()
    return float(is_far)
