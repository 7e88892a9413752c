"""A load table of what a policy sees: a recording that needs no feature of the engine."""

from __future__ import annotations

import os
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import numbers_in
from moetuner.files import replacing

# Windows of a model that are recorded; beyond them neighbours are added up, two and two.
MOST_WINDOWS = 256
# Tokens of an expert in a window that can be added up for ever.
LARGEST = 2**40


class LoadRecorder:
    """Keeps windows of load in one file per process and model, ``load-PID-LxE.npz`` in a folder.

    Where a file of that name is there already, a number follows.

    A file is a load table, ``load`` [W,L,E], as ``moetuner solve`` and ``RoutingStatistics.load``
    read it. It is written anew, whole or not at all, whenever windows come.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[tuple[int, ...], Path] = {}
        self._windows: dict[tuple[int, ...], NDArray[np.uint64]] = {}
        # Windows of the engine that one window holds by now.
        self._joined: dict[tuple[int, ...], int] = {}
        self._open: dict[tuple[int, ...], tuple[NDArray[np.uint64], int]] = {}

    def add(self, weight: NDArray[np.generic]) -> Path | None:
        """Take windows [L,E] or [W,L,E]; empty ones are left out. Returns the file, if it changed.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        windows = weight[None] if weight.ndim == 2 else weight
        if windows.ndim != 3:
            raise ValueError(f"loads must be [layers, experts], got {list(weight.shape)}")
        numbers = numbers_in("loads", windows)
        if not ((numbers >= 0) & (numbers <= LARGEST)).all():
            raise ValueError(f"loads must be from 0 to {LARGEST}")
        windows = windows[windows.any(axis=(1, 2))].astype(np.uint64)
        if not len(windows):
            return None
        shape = windows.shape[1:]
        for window in windows:
            self._take(shape, window)
        recorded = self._windows.get(shape)
        open_window, joined = self._open[shape]
        parts = [
            part for part in (recorded, open_window[None] if joined else None) if part is not None
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(shape)
        with replacing(path) as temporary, temporary.open("wb") as file:
            load = np.concatenate(parts)
            np.savez(file, load=load.astype(np.min_scalar_type(load.max())))
        return path

    def _file(self, shape: tuple[int, ...]) -> Path:
        """Return the file of a model, not one of another process: containers give the same PID."""
        if shape not in self._files:
            name = f"load-{os.getpid()}-{shape[0]}x{shape[1]}"
            names = chain([name], (f"{name}-{number}" for number in count(2)))
            paths = (self.folder / f"{each}.npz" for each in names)
            self._files[shape] = next(path for path in paths if not path.exists())
        return self._files[shape]

    def _take(self, shape: tuple[int, ...], window: NDArray[np.uint64]) -> None:
        joined = self._joined.setdefault(shape, 1)
        now, number = self._open.get(shape, (np.zeros(shape, np.uint64), 0))
        now, number = now + window, number + 1
        if number < joined:
            self._open[shape] = (now, number)
            return
        recorded = self._windows.get(shape, np.zeros((0, *shape), np.uint64))
        recorded = np.concatenate([recorded, now[None]])
        if len(recorded) == MOST_WINDOWS:
            recorded = recorded[0::2] + recorded[1::2]
            self._joined[shape] = 2 * joined
        self._windows[shape] = recorded
        self._open[shape] = (np.zeros(shape, np.uint64), 0)
