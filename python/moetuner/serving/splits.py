"""Splits: how an engine's dispatcher splits an expert's tokens over its copies.

A split is a row of ``RULES``. Replays, searches and bounds use the fields of the row; none of them
compares the names of splits.
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

# A function from slots [L,D,S], loads of experts [W,L,E] and speeds of devices [D] to loads of
# devices [W,L,D].
Divide = Callable[[NDArray[Any], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Rule:
    """What a split does with the tokens of an expert that has copies.

    By default, the copies of an expert serve equally many tokens of each window.

    Parameters
    ----------
    words
        The split in words, to follow "a token's copy of an expert".
    option_help
        The split in the help of its option, to follow "how tokens are split over copies".
    token_rule
        The core's name of the rule by which it serves single tokens.
    by_home
        True if a token's copy depends on the token's home device: the nearest copy serves it.
    in_turns
        True if a token's copy depends on the tokens before: copies take turns.
    is_hashed
        True if one hash of the token chooses the copies of all its experts, so that two experts
        with equally many copies take the same one.
    divide
        Function that divides the tokens of a whole window over copies; None if each token is
        served by itself. With it, windows must be counted, and their tokens have no order.
    is_linear_programme
        True if that function returns the optimum of the linear programme, which the core searches
        placements for.
    dispatch_us
        Time of the dispatcher in every layer, in microseconds, which no cost model contains.
    """

    words: str
    option_help: str
    token_rule: Literal["even", "nearest", "round_robin"] = "even"
    by_home: bool = False
    in_turns: bool = False
    is_hashed: bool = False
    divide: Divide | None = None
    is_linear_programme: bool = False
    dispatch_us: float = 0.0

    @property
    def needs_windows(self) -> bool:
        """True if tokens are divided window by window, so that windows must be counted."""
        return self.divide is not None

    @property
    def is_even(self) -> bool:
        """True if the copies of an expert serve equally many tokens in every window."""
        return not self.by_home and self.divide is None


# The split whose copies serve equally many tokens, for figures that do not depend on a dispatcher.
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
    # LPLB, and SGLang's dispatch of that name: a linear programme minimises the load over speed of
    # the slowest device, then of the slowest of the others, and so on. It does not say which tokens
    # go where, so visits, rows and pairs are those of ``even``.
    "lp": Rule(
        "is what a linear programme says",
        "so that the slowest device of every window is fastest (lp, SGLang; for counts only)",
        is_hashed=True,
        divide=lambda slots, load, speed: _core.balanced_load(slots, load, speed),
        is_linear_programme=True,
        # LPLB's authors: 100 us and more.
        dispatch_us=100.0,
    ),
}
