"""List the files of a recording; those of ranks in the order of ranks, with none missing."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from moetuner.files import naming
from moetuner.files.opened import Opened

T = TypeVar("T")

# A file of the plugins' recorder: process, layers and experts, and a number that may follow.
RECORDER = re.compile(r"load-\d+-(\d+x\d+)(-\d+)?\.npz", re.ASCII)
# "rank3" anywhere in a name, else a number at the end, as in "counts-3".
NUMBERS = (re.compile(r"rank[_-]?(\d{1,6})", re.ASCII), re.compile(r"[_-](\d{1,6})$", re.ASCII))


def list_files(sources: Iterable[Opened], pattern: str = "*") -> list[Opened]:
    """List files, and those of folders that match a pattern; raise if a folder has none.

    Hidden files are left out: files have hidden names while they are written. So are those of a
    plugin's recorder that equal another one, as ``find_equal`` lists them.
    """
    files: list[Opened] = []
    for source in sources:
        if not source.path.is_dir():
            files.append(source)
            continue
        shown = _list_shown(source.path, pattern)
        if not shown:
            wanted = "the files of a recording" if pattern == "*" else pattern
            raise ValueError(f"{source.path}: folder must hold {wanted}, got none")
        equal = find_equal(shown)
        known = source.members
        files += [known.get(path) or Opened(path) for path in shown if path not in equal]
    return files


def read_each(
    sources: Iterable[Opened], read: Callable[[Opened], T], pattern: str = "*"
) -> list[T]:
    """Read each file that ``list_files`` lists with a function, whose errors name the file."""
    parts = []
    for file in list_files(sources, pattern):
        with naming(file.path):
            parts.append(read(file))
    return parts


def _list_shown(folder: Path, pattern: str) -> list[Path]:
    """List files of a folder that match a pattern, by name, without those that are hidden."""
    matching = (file for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in matching if not file.name.startswith("."))


def find_equal(files: Iterable[Path]) -> dict[Path, Path]:
    """Find files of a plugin's recorder that equal an earlier one; return that one by the file.

    Where every rank of an engine decides by itself, each may have recorded the same loads.
    """
    equal: dict[Path, Path] = {}
    first: list[tuple[str, Path]] = []
    for file in files:
        if (name := RECORDER.fullmatch(file.name)) is None:
            continue
        with suppress(OSError):
            others = (other for sizes, other in first if sizes == name[1])
            same = next(
                (other for other in others if filecmp.cmp(file, other, shallow=False)), None
            )
            if same is None:
                first.append((name[1], file))
            else:
                equal[file] = same
    return equal


def require_one_model(files: Iterable[Path]) -> None:
    """Raise if a plugin's recorder wrote some of the files for models of several sizes.

    An engine with a draft model has two: each gets a placement of its own.
    """
    files_by_size = {
        name[1]: file for file in files if (name := RECORDER.fullmatch(file.name)) is not None
    }
    if len(files_by_size) > 1:
        # The main model has the most layers.
        sizes = sorted(files_by_size, key=lambda size: int(size.split("x")[0]))
        raise ValueError(
            f"{files_by_size[sizes[-1]].parent}: the plugin recorded models of {len(sizes)} sizes, "
            f"layers x experts {', '.join(sizes)}, as a draft model is one: give the files of "
            f"each by themselves, such as load-*-{sizes[-1]}*.npz"
        )


def list_equal(paths: Iterable[Path]) -> list[str]:
    """Return a line for each folder with files that are taken once, as they are equal."""
    lines = []
    for path in paths:
        equal = find_equal(sorted(path.glob("*"))) if path.is_dir() else {}
        if equal:
            first = {*equal.values()}
            lines.append(
                f"{path.name}: of {len(equal) + len(first)} equal files, as ranks of one engine "
                f"record them, {len(first)} counts."
            )
    return lines


def first_file(file: Opened, pattern: str = "*") -> Opened:
    """Return a file itself, or the first file of a folder that matches; else the folder."""
    if not file.path.is_dir():
        return file
    # The first is no file that equals an earlier one, so none need be compared.
    first = next(iter(_list_shown(file.path, pattern)), None)
    return file if first is None else file.members.setdefault(first, Opened(first))


def find_rank(path: Path) -> int | None:
    """Find the rank in the name of a file; None if there is none."""
    for pattern in NUMBERS:
        if number := pattern.search(path.stem):
            return int(number[1])
    return None


def list_by_rank(sources: Iterable[Opened], pattern: str) -> list[Opened]:
    """List files, and those of folders that match a pattern, in the order of their ranks."""
    files: list[Opened] = []
    for source in sources:
        path = source.path
        files_of_ranks = sorted(
            list_files([source], pattern),
            key=lambda file: (find_rank(file.path) or 0, file.path.name),
        )
        if path.is_dir():
            ranks = [rank for file in files_of_ranks if (rank := find_rank(file.path)) is not None]
            for expected, rank in enumerate(ranks):
                if rank != expected:
                    got = f"none of rank {expected}" if rank > expected else f"two of rank {rank}"
                    raise ValueError(
                        f"{path}: must hold files of ranks 0 to {ranks[-1]}, one of each, got "
                        f"{got}: give the files of one recording"
                    )
        files += files_of_ranks
    return files
