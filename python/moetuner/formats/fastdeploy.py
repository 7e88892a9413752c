"""Read FastDeploy's tokens per expert, answers of ``POST /get_per_expert_tokens_stats``.

An answer is ``{"code": 0, "msg": "ok", "data": [ranks][hidden layers][experts]}``. It has counts of
logical experts, and each rank of a server counts its own tokens (``engine_client.py``; the balancer
adds up all servers). Each answer is a window, in one file or several: with ``clear_stat`` it counts
the tokens since the previous one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import array_in, shown
from moetuner.files import naming
from moetuner.files.opened import Opened
from moetuner.formats.counts import add_up, add_window, counts_in, stack_windows
from moetuner.formats.hints import Hints
from moetuner.formats.records import MARK, looks_like_json, records
from moetuner.formats.sources import list_files
from moetuner.statistics import RoutingStatistics

BEGIN = re.compile(
    r"\s*\[?\s*\{\s*\"code\"\s*:\s*\d+\s*,\s*\"msg\"\s*:\s*\"[^\"]{0,200}\"\s*(,\s*\"data\"\s*:\s*\[|\})"
)


def recognises(file: Opened) -> bool:
    """Return whether a file begins with an answer, of counts or of an error."""
    start = file.head[: 1 << 12]
    text = start.decode("latin-1").removeprefix(MARK)
    return looks_like_json(start) and BEGIN.match(text) is not None


def read(sources: Sequence[Opened], hints: Hints) -> RoutingStatistics:
    """Read answers as windows."""
    windows: list[NDArray[np.int64]] = []
    files = list_files(sources)
    for file in files:
        with naming(file.path):
            for window in _answers(file.path):
                add_window(windows, window)
    with naming(files[0].path):
        return stack_windows(windows, hints)


def _answers(path: Path) -> Iterator[NDArray[np.int64]]:
    """Read the answers of a file, each added up over ranks [hidden,E]."""
    for where, fields in records(path):
        with naming(where):
            data: Any = fields.get("data")
            if fields.get("code") != 0 or not isinstance(data, list) or not data:
                got = shown(fields.get("msg")) if data is None else shown(data)
                raise ValueError(f"must have code 0 and data by rank, got {got}")
            total: Any = None
            for rank, table in enumerate(data):
                with naming(f"rank {rank}"):
                    counts = counts_in("counts", array_in("counts", table))
                    if counts.ndim != 2 or 0 in counts.shape:
                        raise ValueError(
                            f"counts must be [layers, experts], got {list(counts.shape)}"
                        )
                    total = add_up(total, counts)
            yield total
