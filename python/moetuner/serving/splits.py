"""Splits: how an engine's dispatcher splits an expert's tokens over its copies.

A split is a row of ``RULES``. Whoever replays, expects, searches or bounds asks the row what the
split does, and compares no names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner import _core

Split = Literal["even", "nearest", "round_robin", "lp"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Of slots [L,D,S], loads of experts [W,L,E] and speeds of devices [D]: loads of devices [W,L,D].
Divide = Callable[[NDArray[Any], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Rule:
    """What a split does with the tokens of an expert that has copies.

    Without one of the fields, every copy serves as many tokens of each window.

    Parameters
    ----------
    words
        What it does, for people, of "a token's copy of an expert".
    option_help
        What it does, for the help of its option, of "how tokens are split over copies".
    token_rule
        How the core serves single tokens where they are split so: a name that it knows.
    by_home
        Whether a token's copy depends on the device that it comes from: the nearest serves it.
    in_turns
        Whether it depends on the tokens before: copies take turns.
    is_hashed
        Whether one hash of the token chooses the copies of all its experts, so that two experts
        with equally many copies take the same one.
    divide
        Divides all tokens of a window over copies by their loads; None where each token is served
        by itself. Windows are then counted, and tokens have no order in them.
    dispatch_us
        Time that the dispatcher takes in every layer for that, which no cost model has.
    """

    words: str
    option_help: str
    token_rule: Literal["even", "nearest", "round_robin"] = "even"
    by_home: bool = False
    in_turns: bool = False
    is_hashed: bool = False
    divide: Divide | None = None
    dispatch_us: float = 0.0

    @property
    def needs_windows(self) -> bool:
        """Whether tokens are divided window by window, which must be counted for that."""
        return self.divide is not None

    @property
    def is_even(self) -> bool:
        """Whether copies serve as many tokens of their expert each, in every window."""
        return not self.by_home and self.divide is None


# The split whose copies serve as many tokens each, for what asks no dispatcher.
EVEN: Split = "even"

RULES: dict[str, Rule] = {
    # vLLM.
    "even": Rule("is chosen by a hash", "by hash (even, vLLM)", is_hashed=True),
    # SGLang's static dispatch: the copy on the token's home device, else those of its node, else
    # all, evenly.
    "nearest": Rule("is the nearest", "to the nearest (nearest, SGLang)", "nearest", by_home=True),
    # TensorRT-LLM.
    "round_robin": Rule(
        "takes turns", "in turns (round_robin, TensorRT-LLM)", "round_robin", in_turns=True
    ),
    # LPLB, and SGLang's dispatch of that name: a linear programme, so that the slowest device is
    # done as soon as can be, then the slowest of the others, and so on. Which tokens go where is
    # not known, so visits, rows and pairs are those of ``even``.
    "lp": Rule(
        "is what a linear programme says",
        "so that the slowest device of every window is fastest (lp, SGLang; for counts only)",
        is_hashed=True,
        divide=lambda slots, load, speed: _core.balanced_load(slots, load, speed),
        # LPLB's authors: 100 us and more.
        dispatch_us=100.0,
    ),
}
