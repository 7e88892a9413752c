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
        kinds = np.array([self.kind(rng) for _ in range(topics)])
        return draw_table(rng, np.repeat(kinds, windows, axis=0), tokens=tokens)

    def _shares(self, liking: Floats) -> Floats:
        """Return expert shares of likings [W,L,E], to which the skew of all text is added."""
        share = np.exp(liking + np.linspace(self.skew, 0, EXPERTS))
        liked: Floats = share / share.sum(axis=2, keepdims=True)
        return liked

    def waves(
        self, rng: np.random.Generator, windows: int, periods: tuple[float, float], parts: int = 4
    ) -> Floats:
        """Draw shares of windows [W,L,E] that go up and down by sines of so many windows."""
        period = rng.uniform(*periods, (parts, 1, LAYERS, EXPERTS))
        turn = np.arange(windows)[:, None, None] / period + rng.random(period.shape)
        waves = np.sin(2 * np.pi * turn).sum(axis=0) * np.sqrt(2 / parts)
        return self._shares(0.7 * waves)

    def walk(self, rng: np.random.Generator, windows: int, memory: float) -> Floats:
        """Draw shares of windows [W,L,E] whose likings keep so much from one to the next."""
        liking = rng.normal(size=(windows, LAYERS, EXPERTS))
        for window in range(1, windows):
            fresh = np.sqrt(1 - memory**2) * liking[window]
            liking[window] = memory * liking[window - 1] + fresh
        return self._shares(0.7 * liking)

    def overlaps(self, rng: np.random.Generator, windows: int, lasting: float) -> Floats:
        """Draw shares of windows [W,L,E] of four topics at a time, each lasting so many windows."""
        topics, shares = np.array([self.kind(rng) for _ in range(4)]), []
        for _ in range(windows):
            shares.append(np.tensordot(rng.dirichlet(np.full(4, 2.0)), topics, axes=1))
            for place in np.flatnonzero(rng.random(4) < 1 / lasting):
                topics[place] = self.kind(rng)
        return np.array(shares)

    def documents(
        self, rng: np.random.Generator, number: int, questions: int, size: int, *, before: int = 0
    ) -> mt.RoutingTrace:
        """Draw requests: so many questions on each of some documents of so many tokens.

        With ``before`` all of them begin with one system prompt of so many tokens, which is the
        same in all recordings.
        """
        system = np.random.default_rng(before)
        prompt, ids = _tokens(system, self.kind(system), before), []
        for _ in range(number):
            document = _tokens(rng, self.kind(rng), size)
            for length in rng.integers(60, 300, questions):
                ids.append(np.concatenate([prompt, document, _tokens(rng, self.kind(rng), length)]))
        ids = [ids[place] for place in rng.permutation(len(ids))]
        return mt.RoutingTrace.from_arrays(
            np.concatenate(ids),
            num_experts=EXPERTS,
            sequence=np.repeat(np.arange(len(ids)), [*map(len, ids)]),
        )

    def counters(self, rng: np.random.Generator, number: int) -> mt.RoutingStatistics:
        """Draw steps of counters of so many kinds, each with a name: one counter of each."""
        kinds = np.array([self.kind(rng) for _ in range(number)])
        counted = draw_table(rng, kinds, np.arange(number), tokens=1_000_000)
        return counted.per_step(WINDOW, top_k=TOP_K)

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
            ids.append(_tokens(rng, share, length))
        return mt.RoutingTrace.from_arrays(
            np.concatenate(ids),
            num_experts=EXPERTS,
            sequence=np.repeat(np.arange(number), lengths) if labels else None,
            group=np.repeat(group, lengths) if groups else None,
        )

    def fresh(self, rng: np.random.Generator, number: int, **sizes: int) -> mt.RoutingTrace:
        """Draw many short sequences of kinds of their own."""
        return self.trace(rng, prompts(rng, number), **sizes)


def _tokens(rng: np.random.Generator, share: Floats, number: int) -> NDArray[np.uint8]:
    """Draw experts [T,L,K] of tokens by shares [L,E]."""
    noise = rng.gumbel(size=(number, LAYERS, EXPERTS))
    return np.argpartition(-(np.log(share) + noise), TOP_K, axis=2)[..., :TOP_K].astype(np.uint8)


def draw_table(
    rng: np.random.Generator,
    shares: Floats,
    group: NDArray[np.int64] | None = None,
    *,
    tokens: int = 512,
) -> mt.RoutingStatistics:
    """Draw a load table of windows of such shares [W,L,E], of groups [W]."""
    load = [[rng.multinomial(tokens * TOP_K, layer) for layer in window] for window in shares]
    names = None if group is None else [f"group {number}" for number in range(group.max() + 1)]
    return mt.RoutingStatistics.from_load(
        np.array(load).astype(np.uint64), group=group, group_names=names or ()
    )


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
