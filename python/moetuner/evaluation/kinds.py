"""Whether sequences repeat few prompts: kinds of sequences that route alike, as far as tokens tell.

Two sequences of one kind differ by the noise of their tokens alone. Kinds are looked for among
sequences that differ by much more than that: where all do, each is of its own kind, and where none
does, all traffic routes alike and nothing tells prompts apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Cells of counts [S,L,E] that are held; of more, fewer layers are looked at, and none of too many.
CELLS = 1 << 24
LAYERS = 8
# Kinds from which nobody asks how many there are.
MOST = 256
# Standard deviations of its noise by which a sequence may be from its kind.
NEAR = 4.0
# How much kinds must differ, in terms of the noise of a sequence, for anything to be said.
APART = 3.0
# Kinds are few if there is one for so many sequences or more.
EACH = 2


def kinds_of(trace: RoutingTrace, labels: NDArray[np.int32]) -> tuple[Integers | None, bool]:
    """Find the kinds of the sequences in ``labels`` [S], numbered; None where kinds are not few.

    Also return whether no group has sequences that differ by more than the noise of their tokens.
    Groups are kinds that are known, so each is looked at by itself.
    """
    number = len(labels)
    layers = min(LAYERS, trace.layers, CELLS // max(number * trace.num_experts, 1))
    if number < 2 * EACH or layers < 1:
        return None, False
    assert trace.sequence is not None
    label, of_sequence = np.searchsorted(labels, trace.sequence), np.zeros(number, dtype=np.int64)
    count = loads_by(trace, label, number, layers)
    if trace.group is not None:
        of_sequence[label] = trace.group
    kind, total, all_alike = np.arange(number), 0, True
    for group in np.unique(of_sequence):
        mine = np.flatnonzero(of_sequence == group)
        mine_of = _few_kinds(count[mine])
        all_alike = all_alike and mine_of is not None and not mine_of.any()
        if mine_of is None or not mine_of.any():
            mine_of = np.arange(len(mine))
        kind[mine] = total + mine_of
        total = int(kind[mine].max()) + 1
    return (kind if total * EACH <= number else None), all_alike


def _few_kinds(count: Floats) -> Integers | None:
    """Return the kind of sequences with counts [S,L,E], all 0 if alike; None if kinds are not few.

    Longest first, a sequence joins the kind whose mean its expert shares are nearest to, or begins
    one if they are further from all than noise explains.
    """
    number, layers, experts = count.shape
    tokens = count[:, 0].sum(axis=1)
    share = (count / tokens[:, None, None]).reshape(number, -1)
    # Tokens choose distinct experts, so their counts vary less than a multinomial's.
    spread = 1 - (share.reshape(count.shape) ** 2).sum(axis=2)
    noise = spread.sum(axis=1) / np.maximum(tokens, 1)
    far = 1 + NEAR * np.sqrt(2 / max(layers * (experts - 1), 1))
    means, weight = np.empty((MOST, share.shape[1])), np.zeros(MOST)
    kind, used = np.empty(number, dtype=np.int64), 0
    for one in np.argsort(-tokens, kind="stable"):
        distance = ((means[:used] - share[one]) ** 2).sum(axis=1)
        # A kind's mean has noise too, that of all its tokens.
        ratio = distance / (noise[one] * (1 + tokens[one] / weight[:used]))
        nearest = int(ratio.argmin()) if used else 0
        if not used or ratio[nearest] > far:
            if used == min(MOST, number // EACH):
                return None
            nearest, used = used, used + 1
            means[nearest] = share[one]
        weight[nearest] += tokens[one]
        means[nearest] += (share[one] - means[nearest]) * (tokens[one] / weight[nearest])
        kind[one] = nearest
    if used < 2:
        return np.zeros(number, dtype=np.int64)
    between = ((means[:used, None] - means[None, :used]) ** 2).sum(axis=2)
    typical = float(between[~np.eye(used, dtype=bool)].mean())
    return kind if typical >= APART * 2 * float(np.median(noise)) else None


def loads_by(
    trace: RoutingTrace, label: NDArray[Any], number: int, layers: int | None = None
) -> Floats:
    """Count load of experts by labels [T] of tokens [N,L,E], in all or so many layers."""
    layers = trace.layers if layers is None else layers
    chosen = np.unique(np.linspace(0, trace.layers - 1, layers).round().astype(np.int64))
    counter = _core.LabelledReplay(
        np.tile(np.arange(trace.num_experts, dtype=np.int32)[:, None], (len(chosen), 1, 1)),
        *(trace.num_experts, trace.top_k, [0] * trace.num_experts),
        rows=number,
        most=int(np.bincount(label).max(initial=1)),
        visits=False,
    )
    first = 0
    for shard in trace.shards():
        of = label[first : first + len(shard)].astype(np.uint32)
        counter.push(shard.take(chosen, axis=1), of)
        first += len(shard)
    return counter.finish()[0].transpose(1, 0, 2).astype(np.float64)
