"""Reading INPUT, and saying in one line what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetuner.cli.options import WINDOW
from moetuner.cli.progress import working
from moetuner.reading import read_input
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

Traffic = RoutingTrace | RoutingStatistics


def read(path: Path, *, window: int | None = None, num_experts: int | None = None) -> Traffic:
    """Open a trace, saved statistics or a load table."""
    with working(f"reading {path}"):
        return read_input(path, window=window, num_experts=num_experts)


def count(
    traffic: Traffic, window: int | None, threads: int | None, *, sets: bool = False
) -> RoutingStatistics:
    """Count a trace in windows, with its expert sets if wanted; statistics are counted already."""
    if isinstance(traffic, RoutingStatistics):
        return traffic
    with working("counting"):
        return RoutingStatistics.from_trace(
            traffic, window=window or WINDOW, sets=sets, threads=threads
        )


def window_of(traffic: Traffic, window: int | None) -> int | None:
    """Tokens per window that will be counted, as far as they are known."""
    return traffic.window if isinstance(traffic, RoutingStatistics) else window or WINDOW


def facts(path: Path, traffic: Traffic) -> dict[str, Any]:
    """Give kind and sizes, for JSON."""
    common = {"file": str(path), "model": traffic.model, "layers": traffic.layers}
    groups = list(traffic.group_names) if traffic.group is not None else []
    if isinstance(traffic, RoutingStatistics):
        return {
            **common,
            "kind": "load table" if traffic.transitions is None else "statistics",
            "experts": traffic.experts,
            "windows": traffic.windows,
            "groups": groups,
        }
    return {
        **common,
        "kind": "trace",
        "experts": traffic.num_experts,
        "top_k": traffic.top_k,
        "tokens": traffic.tokens,
        "sequences": None if traffic.sequence is None else len(set(traffic.sequence.tolist())),
        "groups": groups,
    }


def describe(path: Path, traffic: Traffic) -> str:
    """Say what a file is."""
    of = facts(path, traffic)
    parts = []
    if "tokens" in of:
        parts.append(f"{of['tokens']:,} tokens")
    if of.get("windows"):
        parts.append(f"{of['windows']:,} windows")
    parts += [f"{of['layers']} layers", f"{of['experts']} experts"]
    if "top_k" in of:
        parts.append(f"top-{of['top_k']}")
    if of.get("sequences"):
        parts.append(f"{of['sequences']:,} sequences")
    if of["groups"]:
        parts.append(f"{len(of['groups'])} groups")
    model = f" of {of['model']}" if of["model"] else ""
    return f"{path.name}: {of['kind']}{model}, {', '.join(parts)}"
