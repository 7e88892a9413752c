"""What benchmarks share: arguments, clocks, tables, and skewed loads."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def arguments(doc: str, positional: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Parse the command line by defaults.

    Parameters
    ----------
    doc
        What ``--help`` prints.
    positional, options
        By name. A type is that of a value without a default, a tuple the choices, a list the
        default of several values, False a flag; any other value is a default.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = [(name, kind, {}) for name, kind in (positional or {}).items()]
    named += [(f"--{name.replace('_', '-')}", kind, {}) for name, kind in options.items()]
    for name, kind, how in named:
        if isinstance(kind, type):
            how |= {"type": kind}
        elif isinstance(kind, tuple):
            how |= {"choices": kind}
        elif isinstance(kind, list):
            how |= {"nargs": "*", "default": kind, "type": type(kind[0]) if kind else str}
        elif isinstance(kind, bool):
            how |= {"action": "store_true"}
        else:
            how |= {"default": kind, "type": type(kind) if not isinstance(kind, Path) else Path}
        parser.add_argument(name, **how)
    return parser.parse_args()


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """Return the result of some work, its seconds by the clock, and those of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def in_turns(
    works: Mapping[str, Callable[[], object]], repeat: int, *, processor: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of works that take turns, so that a slow machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            seconds[name].append(timed(work)[1 + processor])
    return seconds


class Table:
    """Rows of aligned columns, printed as they come.

    Parameters
    ----------
    columns
        Each a name and a format, such as ``"imbalance 9.4f"``: numbers stand on the right, and a
        format that begins with ``<`` is of words.
    """

    def __init__(self, *columns: str) -> None:
        names, self.formats = zip(*(column.rsplit(" ", 1) for column in columns), strict=True)
        self(*names)

    def __call__(self, *values: Any) -> None:
        """Print a row; words may stand in columns of numbers."""
        cells = []
        for value, spec in zip(values, self.formats, strict=False):
            width = spec.lstrip("<").split(".")[0].rstrip("dfs%")
            words = f"{'<' if spec.startswith('<') else '>'}{width}"
            cells.append(format(value, words if isinstance(value, str) else spec))
        print(*cells, flush=True)


def skewed_loads(layers: int, experts: int, seed: int) -> NDArray[np.float64]:
    """Return log-normal loads [L,E], drawn anew for every layer: the heaviest tenth has a third."""
    popularity = np.random.default_rng(seed).lognormal(0, 0.8, (layers, experts))
    return np.floor(1e6 * popularity / popularity.sum(axis=1, keepdims=True))


def imbalance(load: NDArray[Any], slots: NDArray[Any]) -> NDArray[np.float64]:
    """Return max / mean load of devices [W,L], of windows [W,L,E] and slots [L,D,S]; -1 is empty.

    Copies take equal parts, also several on a device, as some peers place them.
    """
    ratios = []
    for layer, rows in enumerate(slots):
        copies = np.stack([np.bincount(row[row >= 0], minlength=load.shape[2]) for row in rows])
        assert copies.sum(axis=0).min() > 0
        device = load[:, layer] @ (copies / copies.sum(axis=0)).T
        ratios.append(device.max(axis=1) / device.mean(axis=1))
    return np.stack(ratios, axis=1)
