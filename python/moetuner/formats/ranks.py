"""Files of which every rank wrote one: in the order of ranks, none missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from moetuner.formats.hints import files_in

# "rank3" wherever it stands, else a number at the end, as in "counts-3".
NUMBERS = (re.compile(r"rank[_-]?(\d{1,6})", re.ASCII), re.compile(r"[_-](\d{1,6})$", re.ASCII))


def rank_of(path: Path) -> int | None:
    """Return the rank in the name of a file; None if there is none."""
    for pattern in NUMBERS:
        if found := pattern.search(path.stem):
            return int(found[1])
    return None


def by_rank(paths: Sequence[Path], pattern: str) -> list[Path]:
    """List files, and those of folders that fit a pattern, in the order of their ranks.

    Raises
    ------
    ValueError
        If a folder has no such file, or lacks that of a rank below its highest.
    """
    found: list[Path] = []
    for path in paths:
        files = sorted(files_in([path], pattern), key=lambda file: (rank_of(file) or 0, file.name))
        if path.is_dir():
            if not files:
                raise ValueError(f"{path}: folder must hold {pattern}, got none")
            check_complete(path, [rank_of(file) for file in files])
        found += files
    return found


def check_complete(path: Path, ranks: Iterable[int | None]) -> None:
    """Check that ranks are 0, 1, 2 and so on.

    Raises
    ------
    ValueError
        Naming the folder and the first rank that is missing.
    """
    known = {rank for rank in ranks if rank is not None}
    missing = sorted(set(range(max(known, default=-1) + 1)) - known)
    if missing:
        raise ValueError(
            f"{path}: must hold files of ranks 0 to {max(known)}, got none of rank {missing[0]}"
        )
