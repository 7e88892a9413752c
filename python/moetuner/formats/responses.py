"""Join ids of many responses or forward passes to a trace without rows of dense layers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.cost import experts_of_served, public_name
from moetuner.files import naming
from moetuner.files.contents import TraceInParts
from moetuner.files.opened import Opened
from moetuner.formats.hints import Hints
from moetuner.formats.sources import list_files
from moetuner.trace import RoutingTrace

# Prefixes of OpenAI's routes before the name that a client gave its request.
PREFIXES = ("chatcmpl-", "cmpl-")


class Routed(NamedTuple):
    """Ids [t,R,K] of a response or forward pass, their file, and names of request and model."""

    path: Path
    ids: NDArray[Any]
    request: str = ""
    model: str = ""


def decode(text: object, where: str) -> bytes:
    """Decode base64."""
    try:
        return base64.b64decode(cast(str, text), validate=True)
    except (ValueError, TypeError):
        got = f"{len(text)} letters" if isinstance(text, str) else shown(text)
        raise ValueError(f"{where}: routed_experts must be base64, got {got}") from None


def read_routed(
    files: Sequence[Opened], read: Callable[[Opened], Iterable[Routed]], remedy: str
) -> Iterator[Routed]:
    """Read the ids of files and folders with a function; ``remedy`` is for the error of none."""
    for file in list_files(files):
        with naming(file.path):
            count = 0
            for routed in read(file):
                count += 1
                yield routed
            if not count:
                raise ValueError(f"holds no routed experts: {remedy}")


def join_arrays(
    files: Sequence[Opened],
    arrays: Iterable[Routed],
    hints: Hints,
    *,
    source: str = "responses",
    sequence: Sequence[int] | NDArray[Any] | None = None,
) -> RoutingTrace:
    """Join ids [t,R,K] of files to a trace, without the rows of dense layers.

    Engines fill the rows of layers without experts with zeros. A token never has the same expert
    twice in a layer, so with top-k above 1 a single token shows such rows; with top-1 they must be
    zero for all tokens. ``source`` names the arrays in messages. By default an array is a sequence;
    ``sequence`` has that of every token, and may be filled while arrays are read. ``hints`` have
    the groups of requests by name. If all responses name one published model, the trace gets its
    name and number of experts.
    """
    trace: TraceInParts | None = None
    count = 0
    groups: dict[str, int] = {}
    models: dict[str, str] = {}
    are_named = False
    for path, ids, request, model in arrays:
        if not len(ids):
            continue
        with naming(path):
            if trace is None:
                experts = hints.num_experts or experts_of_served(model, ids.shape[2])
                trace = TraceInParts(experts or hints.experts_needed())
                sizes, rows = ids.shape[1:], _rows(ids, hints, source)
                are_named = bool(request)
            if ids.shape[1:] != sizes:
                both = f"{list(sizes)} and {list(ids.shape[1:])}"
                raise ValueError(f"{source} must all have the same layers and top-k, got {both}")
            labels = {"sequence": np.full(len(ids), count, np.int32)}
            if hints.groups is not None and are_named:
                group = groups.setdefault(_find_group(request, hints.groups), len(groups))
                labels["group"] = np.full(len(ids), group, np.int32)
            trace.add(ids[:, rows], **labels)
            if experts_of_served(model, sizes[1], trace.num_experts) is not None:
                models[public_name(model) or ""] = model
            count += 1
    with naming(files[0].path):
        if trace is None:
            raise ValueError(f"{source} must have at least one token with routed experts, got none")
        contents = trace.contents()
        joined = contents.ids
        if hints.dense_layers is None and sizes[1] == 1:
            rows = _with_experts(joined.array(), source)
            joined = joined.select(None, np.asarray(rows))
        dense = tuple(sorted(set(range(sizes[0])) - set(rows)))
        return RoutingTrace(
            replace(joined, left_out=(sizes[0], dense) if dense else None),
            trace.num_experts,
            sequence=contents.sequence if sequence is None else np.asarray(sequence, np.int32),
            group=contents.group,
            group_names=tuple(groups),
            model=next(iter(models.values())) if len(models) == 1 else None,
        )


def _find_group(request: str, groups: Mapping[str, str]) -> str:
    """Return the group of a request by its name, with or without a prefix of the server."""
    names = [request, *(request.removeprefix(prefix) for prefix in PREFIXES)]
    for name in names:
        if name in groups:
            return groups[name]
    raise ValueError(
        f"request {shown(request)} is not among the {len(groups):,} requests that have a group: "
        "name its group too, or leave it out"
    )


def _rows(ids: NDArray[Any], hints: Hints, source: str) -> list[int]:
    """Return the rows with experts, by hints or the first token; with top-1 all rows."""
    moe = hints.moe_layers(ids.shape[1])
    if moe is None:
        moe = list(range(ids.shape[1])) if ids.shape[2] == 1 else _with_experts(ids[:1], source)
    return moe


def _with_experts(ids: NDArray[Any], source: str) -> list[int]:
    """Return the rows that are not zero for every token."""
    rows: list[int] = np.flatnonzero(ids.any(axis=(0, 2))).tolist()
    if not rows:
        raise ValueError(f"{source} must have a layer with experts, got only rows of zeros")
    return rows
