"""Read moetuner's own files: a trace, saved statistics or a load table, in four containers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetuner._checks import MissingArgumentError
from moetuner.files import Kind, kind_of, naming
from moetuner.files.contents import holds_statistics, is_own
from moetuner.formats.counts import drop_dense_layers
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout
from moetuner.formats.sources import first_file, list_files, require_one_model
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

KINDS: tuple[Kind, ...] = ("safetensors", "npz", "npy", "jsonl")


def recognises(kind: Kind, path: Path) -> bool:
    """Return whether a file, or the first one of a folder, is of a kind."""
    path = first_file(path)
    return path.is_file() and kind_of(path) == kind


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read files one after the other: traces, or counts."""
    files = list_files(paths)
    require_one_model(files)
    return join([_traffic(path, hints) for path in files], files)


def _traffic(path: Path, hints: Hints) -> Traffic:
    """Read a file; raise if it has another number of experts than the user says."""
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


def join(recordings: Sequence[Traffic], paths: Sequence[Path]) -> Traffic:
    """Join traces one after the other, or counts; errors name ``paths``."""
    if len(recordings) == 1:
        return recordings[0]
    traces = [recording for recording in recordings if isinstance(recording, RoutingTrace)]
    counts = [recording for recording in recordings if isinstance(recording, RoutingStatistics)]
    with naming(", ".join(map(str, paths))):
        if traces and counts:
            raise ValueError(
                f"sources must all be traces or all be counts, got {len(traces)} and "
                f"{len(counts)}: tokens cannot be got back from counts"
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
