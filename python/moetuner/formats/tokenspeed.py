"""Read TokenSpeed's records of expert load, one file of ``torch.save`` per rank.

A profile with activity EXPERT_LOAD writes ``*.expert-load.pt`` (``load_record`` of
``runtime/moe/expert_location.py``, 0.1.1): ``logical_count`` [hidden layers, E] and
``physical_count`` of the rank's own router, ``physical_to_logical_map``, ``ep_rank`` and
``ep_size``. Where every rank routes its own tokens the sum over ranks is the load, and a single
file is a part of it; where all ranks route all tokens, their records are equal and one of them is
the load. Several profiles in a folder are windows.

``--init-expert-location`` takes SGLang's JSON, see ``formats/sglang.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import naming
from moetuner.files.opened import Opened
from moetuner.formats import pickled
from moetuner.formats.counts import add_up, counts_in, stack_windows
from moetuner.formats.hints import Hints
from moetuner.formats.sources import first_file, read_each
from moetuner.statistics import RoutingStatistics

PATTERN = "*.expert-load.pt"
COUNT, RANK, RANKS = "logical_count", "ep_rank", "ep_size"
MOST_RANKS = 1 << 16


def recognises(file: Opened) -> bool:
    """Return whether a file, or the first one of a folder, is a record of a rank."""
    file = first_file(file, PATTERN)
    start = file.head[: 1 << 16]
    is_ours = all(name.encode() in start for name in (COUNT, RANK, RANKS))
    return is_ours and pickled.is_pickled(file)


def read(sources: Sequence[Opened], hints: Hints) -> RoutingStatistics:
    """Read and add the records of all ranks, profile by profile."""
    by_rank: dict[int, list[NDArray[np.int64]]] = {}
    sizes: set[int] = set()
    for rank, size, count in read_each(sources, _record, PATTERN):
        sizes.add(size)
        by_rank.setdefault(rank, []).append(count)
    with naming(sources[0].path):
        if len(sizes) > 1:
            raise ValueError(
                f"{RANKS} must be the same in all, got {min(sizes)} and {max(sizes)}: give the "
                "records of one server"
            )
        rank_count, first = sizes.pop(), min(by_rank)
        for rank in range(rank_count):
            if len(by_rank.get(rank, ())) != len(by_rank[first]):
                got = f"{len(by_rank[first])} of rank {first} and {len(by_rank.get(rank, ()))}"
                raise ValueError(
                    f"must have as many records of each of {rank_count} ranks, which have counted "
                    f"their own tokens, got {got} of rank {rank}: give the folder that TokenSpeed "
                    "wrote"
                )
        return stack_windows(
            [_sum(counts) for counts in zip(*by_rank.values(), strict=True)], hints
        )


def _record(file: Opened) -> tuple[int, int, NDArray[np.int64]]:
    """Read the record of a rank: its number, the number of ranks, and its counts [hidden,E]."""
    content = pickled.load(file.path)
    if not isinstance(content, dict) or not {COUNT, RANK, RANKS} <= content.keys():
        raise ValueError(f"must be a record with {COUNT}, {RANK} and {RANKS}, got {shown(content)}")
    rank, size, count = (content[name] for name in (RANK, RANKS, COUNT))
    if type(rank) is not int or type(size) is not int or not 0 <= rank < size <= MOST_RANKS:
        raise ValueError(
            f"{RANK} must be an integer below {RANKS}, got {shown(rank)} and {shown(size)}"
        )
    if not isinstance(count, pickled.Tensor) or len(count.shape) != 2:
        raise ValueError(f"{COUNT} must be a tensor [layers, experts], got {shown(count)}")
    return rank, size, counts_in(COUNT, count.array())


def _sum(counts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the sum of the ranks' counts; if all are equal, every rank counted all tokens: one."""
    first, *others = counts
    total = first
    for count in others:
        total = add_up(total, count)
    are_equal = all(np.array_equal(first, count) for count in others)
    return first if are_equal else total
