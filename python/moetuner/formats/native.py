"""Read moetuner's own files: a trace, saved statistics or a load table, in four containers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetuner._checks import MissingArgumentError
from moetuner.files import naming
from moetuner.files.contents import holds_statistics, is_own
from moetuner.files.opened import Kind, Opened
from moetuner.formats.counts import drop_dense_layers
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout
from moetuner.formats.sources import list_files, read_each, require_one_model
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

KINDS: tuple[Kind, ...] = ("safetensors", "npz", "npy", "jsonl")


def read(files: Sequence[Opened], hints: Hints) -> Traffic:
    """Read files one after the other: traces, or counts."""
    members = list_files(files)
    paths = [member.path for member in members]
    require_one_model(paths)
    return join(read_each(members, lambda member: _traffic(member, hints)), paths)


def _traffic(file: Opened, hints: Hints) -> Traffic:
    """Read a file; raise if it has another number of experts than the user says."""
    traffic: Traffic
    try:
        traffic = (RoutingStatistics if holds_statistics(file) else RoutingTrace).load(file)
    except MissingArgumentError:
        if hints.num_experts is None:
            raise
        traffic = RoutingTrace.load(file, num_experts=hints.num_experts)
    hints.check_experts(traffic.num_experts)
    if isinstance(traffic, RoutingStatistics) and file.kind == "npz":
        traffic = drop_dense_layers(traffic)
    if not is_own(file):
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


def recognises_map(file: Opened) -> bool:
    """Return whether a file is a placement of moetuner."""
    return b"moetuner.placement/" in file.head[:200]


def read_map(file: Opened, _: Hints) -> Layout:
    """Read moetuner's JSON."""
    return Layout.from_placement(Placement.load(file))
