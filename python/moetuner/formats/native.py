"""Moetuner's own files: a trace, saved statistics or a load table, in one of four containers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetuner._checks import MissingArgumentError
from moetuner.files import Kind, kind_of, naming
from moetuner.files.contents import holds_statistics, is_own
from moetuner.formats.counts import drop_dense_layers
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout
from moetuner.formats.sources import first_file, list_files
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

KINDS: tuple[Kind, ...] = ("safetensors", "npz", "npy", "jsonl")


def recognises(kind: Kind, path: Path) -> bool:
    """Return whether a file, or a folder's first one, is of a kind."""
    path = first_file(path)
    return path.is_file() and kind_of(path) == kind


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read files one after the other: traces, or counts."""
    files = list_files(paths)
    return join([_traffic(path, hints) for path in files], files)


def _traffic(path: Path, hints: Hints) -> Traffic:
    """Read a file; experts that the user gives must be those of a file that says them."""
    traffic: Traffic
    try:
        traffic = (RoutingStatistics if holds_statistics(path) else RoutingTrace).load(path)
    except MissingArgumentError:
        if hints.num_experts is None:
            raise
        traffic = RoutingTrace.load(path, num_experts=hints.num_experts)
    with naming(path):
        hints.check_experts(traffic.num_experts)
        if isinstance(traffic, RoutingStatistics) and kind_of(path) == "npz":
            traffic = drop_dense_layers(traffic)
        if not is_own(path):
            hints.check_axes(traffic)
    return traffic


def join(parts: Sequence[Traffic], paths: Sequence[Path]) -> Traffic:
    """Join traces, one after the other, or add counts; ``paths`` are where they come from."""
    if len(parts) == 1:
        return parts[0]
    with naming(", ".join(map(str, paths))):
        return _joined(parts)


def _joined(parts: Sequence[Traffic]) -> Traffic:
    traces = [part for part in parts if isinstance(part, RoutingTrace)]
    counts = [part for part in parts if isinstance(part, RoutingStatistics)]
    if traces and counts:
        raise ValueError(
            f"sources must all be traces or all be counts, got {len(traces)} and {len(counts)}: "
            "tokens cannot be got back from counts"
        )
    return RoutingTrace.concat(traces) if traces else RoutingStatistics.sum(counts)


def write_map(placement: Placement, path: Path, _: Hints) -> None:
    """Write a placement as moetuner's JSON."""
    placement.save(path)


def recognises_map(path: Path) -> bool:
    """Return whether a file is a placement of moetuner."""
    with path.open("rb") as file:
        return b"moetuner.placement/" in file.read(200)


def read_map(path: Path, _: Hints) -> Layout:
    """Read moetuner's JSON."""
    return Layout.from_placement(Placement.load(path))
