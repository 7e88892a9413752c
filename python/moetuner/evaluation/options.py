"""Options of a replay, whatever is replayed and however the model is served."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from numpy.typing import ArrayLike

from moetuner._checks import flag, seed_in, threads_in
from moetuner.frozen import Frozen
from moetuner.serving.settings import OTHER, check_settings, setting


@dataclass(frozen=True, eq=False, repr=False)
class ReplayOptions(Frozen):
    """Settings of a replay and of the figures computed, however the model is served.

    A figure with an argument has it here, declared as a setting: that gives its check, the option
    of ``moetuner evaluate`` with its help, and its key in JSON.

    Parameters
    ----------
    home
        Device that each token of a trace comes from [T], or ``"blocks"``; None spreads homes
        evenly.
    mixed
        If True, count loads in windows of mixed arrival, too.
    mixed_seed
        Seed of the order in which sequences, or windows of statistics, are mixed.
    threads
        Threads to use; None for all cores.
    """

    home: ArrayLike | Literal["blocks"] | None = None
    mixed: bool = True
    mixed_seed: int = setting(
        0,
        OTHER,
        metavar="N",
        within=(0, (1 << 63) - 1),
        check=lambda name, value: seed_in(value, name),
    )
    threads: int | None = None

    def __post_init__(self) -> None:
        vars(self)["threads"] = threads_in(self.threads)
        flag("mixed", self.mixed)
        check_settings(self)

    def facts(self) -> dict[str, Any]:
        """Return the settings that options give, for JSON."""
        return {
            option.name: getattr(self, option.name) for option in fields(self) if option.metadata
        }
