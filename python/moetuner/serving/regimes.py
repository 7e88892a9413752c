"""Regimes: where tokens go after a layer, and so which traffic costs.

A regime is a row of ``WAYS``. Objectives, replays, searches and bounds use the fields of the row;
none of them compares the names of regimes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Way:
    """Where the tokens of a regime go after a layer.

    Parameters
    ----------
    words
        The way in words, to follow "after a layer, tokens".
    pairs, pairs_name
        Table of counts of the pairs of experts that cost traffic, and its name in a sentence.
    times_counted
        How often that table counts a pair.
    joins_layers
        True if a pair is of two layers and costs the link between its devices, so that layers are
        not placed one by one.
    visits_devices
        True if a token goes to every device of its experts once, and back: expert sets tell visits.
    """

    words: str
    pairs: Literal["transitions", "coactivation"]
    pairs_name: str
    times_counted: int = 1
    joins_layers: bool = False
    visits_devices: bool = False


WAYS: dict[str, Way] = {
    # As in engines.
    "dispatch": Way(
        "go home", "coactivation", "co-activation", times_counted=2, visits_devices=True
    ),
    # As in the paper.
    "follow": Way("go on to the next expert", "transitions", "transitions", joins_layers=True),
}
