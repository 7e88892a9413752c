"""Traffic of known laws: what bench/chance.py and tests/report/test_simulated.py judge advice on.

Experts are alike before kinds of text are drawn, but for a skew that all text shares: without it no
placement is better than another on text that it has not seen. Every recording and the fresh traffic
that tells the truth are drawn from one law, with kinds of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import moetuner as mt

Floats = NDArray[np.float64]

LAYERS, EXPERTS, TOP_K, DEVICES, WINDOW = 2, 16, 2, 4, 256
TOPOLOGY = mt.Topology(DEVICES)
MODEL = mt.CostModel(0, 0, 5, 1.0, token_bytes=1000.0, name="simulated")


@dataclass(frozen=True)
class Law:
    """How traffic routes.

    Parameters
    ----------
    skew
        How much the first experts are liked by all text, as the range of their scores.
    evenness
        Shape of the gamma variates by which kinds of text differ: the smaller, the more.
    """

    skew: float = 0.0
    evenness: float = 2.0

    def kind(self, rng: np.random.Generator) -> Floats:
        """Draw expert shares of a kind of text [L,E]."""
        share = rng.standard_gamma(np.full((LAYERS, EXPERTS), self.evenness)) + 1e-6
        share *= np.exp(np.linspace(self.skew, 0, EXPERTS))
        drawn: Floats = share / share.sum(axis=1, keepdims=True)
        return drawn

    def table(
        self, rng: np.random.Generator, topics: int, windows: int, *, tokens: int = 512
    ) -> mt.RoutingStatistics:
        """Draw a load table of topics of so many windows each."""
        load = [
            [[rng.multinomial(tokens * TOP_K, shares) for shares in kind] for _ in range(windows)]
            for kind in (self.kind(rng) for _ in range(topics))
        ]
        return mt.RoutingStatistics.from_load(np.concatenate(load).astype(np.uint64))

    def trace(
        self,
        rng: np.random.Generator,
        lengths: NDArray[np.int64],
        *,
        kinds: int | None = None,
        labels: bool = True,
        groups: int = 0,
    ) -> mt.RoutingTrace:
        """Draw sequences of such lengths: each of a kind of its own, or of one of so many kinds.

        With groups each of them has its own skew, and they follow one another.
        """
        number = len(lengths)
        laws = [self.kind(rng) for _ in range(number if kinds is None else kinds)]
        which = np.arange(number) if kinds is None else rng.integers(0, kinds, number)
        group = np.arange(number) * max(groups, 1) // number
        ids = []
        for sequence, length in enumerate(lengths):
            share = np.roll(laws[which[sequence]], group[sequence] * EXPERTS // max(groups, 1), 1)
            noise = rng.gumbel(size=(length, LAYERS, EXPERTS))
            ids.append(np.argpartition(-(np.log(share) + noise), TOP_K, axis=2)[..., :TOP_K])
        return mt.RoutingTrace.from_arrays(
            np.concatenate(ids).astype(np.uint8),
            num_experts=EXPERTS,
            sequence=np.repeat(np.arange(number), lengths) if labels else None,
            group=np.repeat(group, lengths) if groups else None,
        )

    def fresh(self, rng: np.random.Generator, number: int, **sizes: int) -> mt.RoutingTrace:
        """Draw many short sequences of kinds of their own."""
        return self.trace(rng, prompts(rng, number), **sizes)


def prompts(rng: np.random.Generator, number: int) -> NDArray[np.int64]:
    """Draw lengths of prompts, as they are: most of them short, a few long."""
    return np.clip(rng.lognormal(5.0, 0.7, number), 20, 3000).astype(np.int64)


def advised(
    traffic: mt.RoutingTrace | mt.RoutingStatistics, seed: int, **options: int
) -> mt.Advice:
    """Advise without copies."""
    window = {} if isinstance(traffic, mt.RoutingStatistics) else {"window": WINDOW}
    return mt.advise(
        traffic,
        TOPOLOGY,
        copies=[0],
        cost_model=MODEL,
        iterations=300,
        threads=1,
        seed=seed,
        **window,
        **options,
    )


def placed(rng: np.random.Generator) -> mt.Placement:
    """Draw a placement of the experts, as many on each device."""
    device = np.repeat(np.arange(DEVICES), EXPERTS // DEVICES)
    return mt.Placement.from_assignment([rng.permutation(device) for _ in range(LAYERS)], DEVICES)


def true_gain(
    placements: tuple[mt.Placement, mt.Placement], fresh: mt.RoutingTrace | mt.RoutingStatistics
) -> float:
    """Compute what the second placement saves of the first one's time on fresh traffic."""
    before, after = (
        mt.evaluate(
            each, fresh, TOPOLOGY, window=WINDOW, cost_model=MODEL, mixed=False, threads=1
        ).predicted_layer_us
        for each in placements
    )
    assert before is not None
    assert after is not None
    return 1 - after / before
