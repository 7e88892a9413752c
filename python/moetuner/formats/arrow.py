"""Parquet and Arrow files, read batch by batch with pyarrow, an extra of this package.

A row is a token: a column ``experts`` of lists [L][K], or a column of ids [K] for every layer,
whose name ends in its number (``layer_3``), with ``sequence`` and ``group`` if they are known. Or a
row is one choice, with columns ``token``, ``layer`` and ``expert`` as in CSV.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import id_type, valid
from moetuner.files import naming, size_of
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.records import head
from moetuner.formats.rows import Labels, Rows, as_integers
from moetuner.trace import RoutingTrace

PARQUET, ARROW = b"PAR1", b"ARROW1\0\0"
LAYER = re.compile(r"(?:layers?|experts?|l)[_.]?(\d{1,5})", re.ASCII | re.IGNORECASE)
BATCH = 1 << 16


def recognises(path: Path) -> bool:
    """Whether a file is Parquet or an Arrow file (Feather 2)."""
    start = head(path, len(ARROW))
    return start.startswith(PARQUET) or start == ARROW


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read one table, or several of the same columns one after the other.

    Raises
    ------
    ValueError
        If pyarrow is not installed, a file is damaged, or columns are not those of a trace.
    """
    table: _Tokens | Rows | None = None
    names: list[str] = []
    for path in paths:
        with naming(path), _opened(path) as (found, experts, batches):
            if table is None:
                names = found
                table = _table(names, hints.num_experts or experts)
            if found != names:
                raise ValueError(f"must have columns {names[:8]} like the others, got {found[:8]}")
            for batch in batches:
                if isinstance(table, Rows):
                    table.add({name: _plain(batch.column(name)) for name in table.names})
                else:
                    table.add(batch)
    if table is None:
        raise ValueError("must have a file, got none")
    with naming(paths[0]):
        return table.traffic(hints)


def _table(names: list[str], experts: int | None) -> _Tokens | Rows:
    if "layer" in names and "expert" in names:
        return Rows(names)
    return _Tokens(names, experts)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], int | None, Iterator[Any]]]:
    """Open a file: its columns, the experts that its metadata name, and its batches."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "Parquet and Arrow files need pyarrow: pip install 'moetuner[parquet]'"
        ) from None
    size_of(path)
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == PARQUET
            file.seek(0)
            if is_parquet:
                source = pyarrow.parquet.ParquetFile(file)
                schema = source.schema_arrow
                batches = source.iter_batches(BATCH)
            else:
                source = pyarrow.ipc.open_file(file)
                schema = source.schema
                batches = (source.get_batch(n) for n in range(source.num_record_batches))
            known = (schema.metadata or {}).get(b"num_experts")
            experts = int(known) if known is not None else None
            yield list(schema.names), experts, batches
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"damaged file: {error}") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"damaged file: {error}") from None


def _plain(column: Any) -> Any:
    """Values of a column: an array of integers where it has such, else a list."""
    if column.null_count:
        raise ValueError("columns must have no empty values")
    if str(column.type).startswith(("int", "uint")):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


class _Tokens:
    """Rows that are tokens, validated batch by batch."""

    def __init__(self, names: list[str], experts: int | None) -> None:
        numbered = {
            int(match[1]): name for name in names if (match := LAYER.fullmatch(name)) is not None
        }
        self.columns = [numbered[layer] for layer in sorted(numbered)]
        if "experts" in names:
            self.columns = ["experts"]
        if not self.columns:
            raise ValueError(
                "must have a column 'experts' of ids [layers][top_k], one column of ids for every "
                f"layer (layer_0, ...), or columns token, layer and expert; got {names[:8]}"
            )
        if experts is None:
            raise ValueError("num_experts is needed: the file does not say it")
        self.experts = experts
        self.labels = {name: Labels() for name in ("sequence", "group") if name in names}
        self.numbers: dict[str, list[NDArray[np.int32]]] = {name: [] for name in self.labels}
        self.parts: list[NDArray[Any]] = []
        self.tokens = 0

    def add(self, batch: Any) -> None:
        """Take in rows.

        Raises
        ------
        ValueError
            If lists differ in length, or an id is wrong.
        """
        if not batch.num_rows:
            return
        layers = [_ids(name, batch.column(name)) for name in self.columns]
        ids = layers[0] if self.columns == ["experts"] else np.stack(layers, axis=1)
        if ids.ndim != 3:
            raise ValueError(f"{self.columns[0]} must be ids, got {ids.dtype} {list(ids.shape)}")
        if self.parts and ids.shape[1:] != self.parts[0].shape[1:]:
            raise ValueError(
                f"rows must have {list(self.parts[0].shape[1:])} ids [layers, top_k] like those "
                f"before, got {list(ids.shape[1:])}"
            )
        ids = valid(ids, self.experts, self.tokens)
        self.parts.append(ids.astype(id_type(np.dtype(np.int64), self.experts), copy=False))
        self.tokens += len(ids)
        for name, labels in self.labels.items():
            self.numbers[name].append(labels.of(batch.column(name).to_pylist()))

    def traffic(self, _: Hints) -> RoutingTrace:
        """Return the trace."""
        if not self.parts:
            raise ValueError("must have at least one row, got none")
        numbers = {name: np.concatenate(parts) for name, parts in self.numbers.items()}
        sequence = numbers.get("sequence")
        if sequence is not None:
            sequence = as_integers(self.labels["sequence"], sequence)
        group = numbers.get("group")
        return RoutingTrace.from_arrays(
            np.concatenate(self.parts),
            num_experts=self.experts,
            sequence=sequence,
            group=group,
            group_names=None if group is None else [str(v) for v in self.labels["group"].numbers],
        )


def _ids(name: str, column: Any) -> NDArray[Any]:
    """Ids of a column of lists: [T,K], or [T,L,K] where lists hold lists."""
    sizes = [len(column)]
    while str(column.type).startswith(("list", "large_list", "fixed_size_list")):
        if column.null_count:
            raise ValueError(f"{name} must have no empty lists")
        values = column.flatten()
        size, rest = divmod(len(values), len(column)) if len(column) else (0, 0)
        offsets = None if str(column.type).startswith("fixed") else column.value_lengths()
        if rest or (offsets is not None and (offsets.to_numpy() != size).any()):
            raise ValueError(f"{name} must have lists of one length")
        sizes.append(size)
        column = values
    if column.null_count or not str(column.type).startswith(("int", "uint")):
        raise ValueError(f"{name} must be lists of integers, got {column.type}")
    found: NDArray[Any] = column.to_numpy(zero_copy_only=False).reshape(sizes)
    return found
