"""Foreign formats, one file each. Nothing here imports an engine."""

from __future__ import annotations

from pathlib import Path

from moetuner.files.contents import holds_statistics
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace


def read_input(
    path: str | Path, *, window: int | None = None, num_experts: int | None = None
) -> RoutingTrace | RoutingStatistics:
    """Open a trace, saved statistics or a load table.

    Parameters
    ----------
    path
        File to open; its content decides what it is, not its name.
    window
        Tokens per window that the caller wants. A trace can be counted in any windows; statistics
        and load tables have theirs, and must be asked for no others.
    num_experts
        Experts per layer of a trace; needed where its file does not say, and must be that of
        statistics.

    Returns
    -------
    RoutingTrace or RoutingStatistics
        What the file holds. A trace is not counted yet.

    Raises
    ------
    ValueError
        If the file is none of these, is damaged, or does not have the window or experts asked for.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    if not holds_statistics(path):
        return RoutingTrace.load(path, num_experts=num_experts)
    statistics = RoutingStatistics.load(path)
    if window is not None and window != statistics.window:
        theirs = (
            "those of its table" if statistics.window is None else f"{statistics.window} tokens"
        )
        raise ValueError(
            f"{path}: window must be left out: the file holds counts in windows already "
            f"({theirs}), got {window}"
        )
    if num_experts is not None and num_experts != statistics.experts:
        raise ValueError(f"{path}: num_experts must be {statistics.experts}, got {num_experts}")
    return statistics
