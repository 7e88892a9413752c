"""Record the loads that a policy gets as load tables, without any feature of the engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import numbers_in
from moetuner.files import delete_left_behind, replacing

# Most windows of a model; with more, pairs of neighbours are added up.
MOST_WINDOWS = 256
# Most tokens of an expert in a window, so that sums cannot overflow.
LARGEST = 2**40


class LoadRecorder:
    """Writes windows of load to one file per process and model, ``load-PID-LxE.npz`` in a folder.

    If there is a file of that name already, a number follows.

    A file is a load table, ``load`` [W,L,E], as ``moetuner solve`` and ``RoutingStatistics.load``
    read it. It is replaced as a whole whenever windows come. If it was moved away or deleted, a new
    recording begins with the windows that come next.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._recordings: dict[tuple[int, ...], LoadFile] = {}

    def add(self, weight: NDArray[np.generic]) -> Path | None:
        """Add windows [L,E] or [W,L,E], without empty ones; return the file if it changed."""
        windows = weight[None] if weight.ndim == 2 else weight
        if windows.ndim != 3:
            raise ValueError(f"loads must be [layers, experts], got {list(weight.shape)}")
        numbers = numbers_in("loads", windows)
        if not ((numbers >= 0) & (numbers <= LARGEST)).all():
            raise ValueError(f"loads must be from 0 to {LARGEST}")
        windows = windows[windows.any(axis=(1, 2))].astype(np.uint64)
        if not len(windows):
            return None
        recording = self._recordings.get(windows.shape[1:])
        if recording is None or (recording.is_written and not recording.path.exists()):
            name = f"load-{os.getpid()}-{windows.shape[1]}x{windows.shape[2]}"
            # A file may be another process's: containers give the same PID.
            names = chain([name], (f"{name}-{number}" for number in count(2)))
            paths = (self.folder / f"{name}.npz" for name in names)
            recording = LoadFile(next(path for path in paths if not path.exists()))
            self._recordings[windows.shape[1:]] = recording
            # Temporary files of a process that was killed while it wrote are never reused.
            delete_left_behind(self.folder, "load-*.npz")
        for window in windows:
            recording.add(window)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(recording.path) as temporary, temporary.open("wb") as file:
            load = np.stack(recording.windows)
            np.savez(file, load=load.astype(np.min_scalar_type(load.max())))
        recording.is_written = True
        return recording.path


@dataclass
class LoadFile:
    """Windows [L,E] of a model: sums of ``size`` windows of the engine, the last of ``last``."""

    path: Path
    windows: list[NDArray[np.uint64]] = field(default_factory=list)
    size: int = 1
    last: int = 1
    is_written: bool = False

    def add(self, window: NDArray[np.uint64]) -> None:
        """Add a window; if there are too many, join neighbours."""
        if self.last < self.size:
            self.windows[-1], self.last = self.windows[-1] + window, self.last + 1
            return
        if len(self.windows) == MOST_WINDOWS:
            pairs = zip(self.windows[::2], self.windows[1::2], strict=True)
            self.windows, self.size = [first + second for first, second in pairs], 2 * self.size
        self.windows.append(window)
        self.last = 1
