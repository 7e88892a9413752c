"""Read tokens per expert of llama.cpp's importance matrices, with gguf, an extra of this package.

``llama-imatrix`` adds up the inputs of every weight (``save_imatrix`` of
``tools/imatrix/imatrix.cpp``). For experts' weights it also writes how many tokens each expert got,
as ``blk.N.ffn_down_exps.weight.counts`` [1, E] in 32-bit floats; one of the three or four tensors
of a layer is enough. ``--save-frequency`` writes the sums so far several times: files of one text
become windows, with the counts between two files. Files of several texts become groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, size_of
from moetuner.files.opened import Opened
from moetuner.formats.counts import counts_in, make_statistics
from moetuner.formats.hints import Hints
from moetuner.formats.sources import first_file, read_each
from moetuner.statistics import RoutingStatistics

MAGIC = b"GGUF"
PATTERN = "*.gguf*"
COUNTS = re.compile(
    r"blk\.(?P<layer>\d{1,5})\.ffn_(?P<weight>down|up|gate|gate_up)_exps\.weight\.counts", re.ASCII
)
CAUTION = (
    "Counted on the text of an importance matrix, which is nobody's traffic: it tells which "
    "experts that text keeps busy, but not whether yours does, and nothing of which experts are "
    "chosen together or one after the other. Record your own traffic before you decide."
)
# Errors of gguf for a damaged file.
DAMAGE = (ValueError, LookupError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True, eq=False)
class _Matrix:
    """An importance matrix: its file and texts, chunks so far, and tokens by layer and expert.

    It has no layers if it was saved before any expert was counted.
    """

    path: Path
    texts: tuple[str, ...]
    chunks: int
    layers: tuple[int, ...]
    load: NDArray[np.int64]


def recognises(file: Opened) -> bool:
    """Return whether a file, or the first one of a folder, is GGUF."""
    return first_file(file, PATTERN).head.startswith(MAGIC)


def read(sources: Sequence[Opened], hints: Hints) -> RoutingStatistics:
    """Read matrices: files of one text are windows by difference, several texts are groups."""
    matrices = _with_counts(read_each(sources, _read, PATTERN))
    first = matrices[0]
    for matrix in matrices:
        if (matrix.layers, matrix.load.shape) != (first.layers, first.load.shape):
            raise ValueError(
                f"{matrix.path}: must have layers and experts of {first.path.name}, "
                f"{list(first.load.shape)}, got {list(matrix.load.shape)}"
            )
    with naming(first.path):
        hints.check_have_experts(first.layers)
        texts = [*dict.fromkeys(matrix.texts for matrix in matrices)]
        windows = [_windows([m for m in matrices if m.texts == text]) for text in texts]
        statistics = make_statistics(np.concatenate(windows), hints)
        if len(texts) == 1:
            return statistics
        names = [", ".join(text) or f"text {number}" for number, text in enumerate(texts)]
        group = np.repeat(np.arange(len(texts)), [len(load) for load in windows])
        fields = {"group": group, "group_names": tuple(names)}
        return RoutingStatistics.from_load(statistics.window_load, **fields)


def _with_counts(matrices: Sequence[_Matrix]) -> list[_Matrix]:
    """Return the matrices that have counts, without files from the very beginning of a run.

    llama-imatrix saves while it counts the first tensor of a chunk, which is no expert's, so the
    first file of ``--save-frequency`` may have no experts.
    """
    counted = [matrix for matrix in matrices if matrix.layers]
    first_chunks: dict[tuple[str, ...], int] = {}
    for matrix in counted:
        chunks = first_chunks.get(matrix.texts, matrix.chunks)
        first_chunks[matrix.texts] = min(matrix.chunks, chunks)
    for matrix in matrices:
        if not matrix.layers and matrix.chunks > first_chunks.get(matrix.texts, -1):
            raise ValueError(
                f"{matrix.path}: must hold blk.N.ffn_down_exps.weight.counts, tokens by expert, "
                "got none: of a model without experts, or converted from the older .dat, which has "
                "none"
            )
    return counted


def _windows(matrices: Sequence[_Matrix]) -> NDArray[np.int64]:
    """Return the counts between the files of one text [W,L,E]."""
    rising = sorted(matrices, key=lambda matrix: (matrix.chunks, int(matrix.load.sum())))
    windows = [rising[0].load]
    for before, after in pairwise(rising):
        window = after.load - before.load
        if window.min() < 0:
            raise ValueError(
                f"counts must grow from {before.path.name} to {after.path.name}, which are of the "
                "same text, as --save-frequency writes them: give files of one run, or one of them"
            )
        windows.append(window)
    return np.stack([window for window in windows if window.any()] or windows[:1])


def _read(file: Opened) -> _Matrix:
    """Read the counts of a file."""
    reader = _open(file.path)
    kind = _read_texts(reader, "general.type")
    if kind != ["imatrix"]:
        got = f"a file of type {kind[0]!r:.40}" if kind else "none"
        raise ValueError(f"must be an importance matrix of llama-imatrix, got {got}")
    tensors: dict[int, dict[str, Any]] = {}
    for tensor in reader.tensors:
        if match := COUNTS.fullmatch(tensor.name):
            tensors.setdefault(int(match["layer"]), {})[match["weight"]] = tensor
    rows: list[NDArray[np.int64]] = []
    for layer, weights in sorted(tensors.items()):
        tensor = weights.get("down", next(iter(weights.values())))
        with naming(tensor.name):
            counts = counts_in("counts", np.asarray(tensor.data).ravel())
            if counts.size < 2 or (rows and counts.size != rows[0].size):
                like = f"{rows[0].size} experts like the layers before" if rows else "experts"
                raise ValueError(f"must have counts of {like}, got {counts.size}")
        rows.append(counts)
        if not counts.any():
            raise ValueError(f"layer {layer} must have tokens, got counts of zero")
    field = reader.fields.get("imatrix.chunk_count")
    chunks = int(field.parts[-1][0]) if field is not None else 0
    texts = tuple(_read_texts(reader, "imatrix.datasets"))
    load = np.stack(rows) if rows else np.zeros((0, 0), np.int64)
    return _Matrix(file.path, texts, chunks, tuple(sorted(tensors)), load)


def _open(path: Path) -> Any:
    """Open a file with gguf."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "importance matrices of llama.cpp need gguf: pip install 'moetuner[gguf]'"
        ) from None
    size_of(path)

    def get(self: Any, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
        # gguf itself returns fewer values at the end of a file, and may loop there forever.
        values = gguf.GGUFReader._get(self, offset, dtype, count, *order, **named)
        if not 0 <= int(count) == len(values):
            raise ValueError(f"the file ends within {count} values at byte {offset}")
        return values

    reader: Any = type("Reader", (gguf.GGUFReader,), {"_get": get})
    try:
        with np.errstate(all="ignore"):
            return reader(path)
    except DAMAGE as error:
        raise ValueError(f"damaged GGUF: {str(error) or type(error).__name__:.200}") from None


def _read_texts(reader: Any, name: str) -> list[str]:
    """Return the texts of a field; none if there is no such field."""
    field = reader.fields.get(name)
    if field is None:
        return []
    texts = [bytes(field.parts[at]).decode("utf-8", "replace") for at in field.data]
    return ["".join(c if c.isprintable() else "?" for c in text)[:80] for text in texts]
