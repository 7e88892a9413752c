"""The cost model against times of real GPUs.

    python bench/gpu/times.py FOLDER     (a800-qwen3-30b-a3b.csv and rtx-pro-6000-qwen3-30b-a3b.csv)

Times of Qwen3-30B-A3B's experts in bfloat16, measured by others: on an RTX PRO 6000 by
casys-kaist/LLMServingSim, on an A800 by NetX-lab/Frontier. "Two lines" is the larger of reading
weights and computing; in "exposed" a share of the computing stands beside reading. Errors are means
of |predicted / measured - 1| on batches left out, ten folds of batches at random, on the RTX
averaged over several divisions. Tensor-parallel size and experts on a device change weights and
kernels: each such group has a model of its own, and is counted by its measurements. Wanted: 6.5 %
on the RTX PRO 6000, 9 % on the A800.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moetuner as mt
from moetuner.cost.fit import cross_validate
from moetuner.presets import MEASURED

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import benchmark

Columns = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

RTX, A800 = "rtx-pro-6000-qwen3-30b-a3b.csv", "a800-qwen3-30b-a3b.csv"
WANTED = {RTX: 6.5, A800: 9.0}
TOP_K = 8


def read(path: Path) -> NDArray[Any]:
    """Read a table with a line of names."""
    return np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")


def of_rtx(path: Path) -> Columns:
    """Return tokens, each counted once per expert, active experts, and microseconds."""
    table = read(path)
    return TOP_K * table["tokens"].astype(float), table["activated_experts"] * 1.0, table["time_us"]


def of_a800(path: Path) -> dict[tuple[str, int], Columns]:
    """Return the same by experts on the device and tensor-parallel size, and of all of size 1."""
    table = read(path)
    held, parallel = table["num_experts_per_device"], table["num_tensor_parallel_workers"]
    active = np.round(table["expert_utilization"] * held)
    columns = (table["total_routed_tokens"].astype(float), active, 1e3 * table["grouped_gemm_ms"])
    groups = {
        (str(experts_held), int(size)): (held == experts_held) & (parallel == size)
        for experts_held, size in sorted(set(zip(held.tolist(), parallel.tolist(), strict=True)))
    }
    groups["any", 1] = parallel == 1
    tokens, experts, times = columns
    return {name: (tokens[rows], experts[rows], times[rows]) for name, rows in groups.items()}


def errors(columns: Columns, folds: int, seeds: int = 1) -> list[float]:
    """Return the mean error on batches left out of both forms, in per cent."""
    means = []
    for exposes in (False, True):
        off = [
            np.abs(
                np.concatenate(cross_validate(*columns, exposes=exposes, folds=folds, seed=n)[0])
            )
            for n in range(seeds)
        ]
        means.append(100 * float(np.mean(off)))
    return means


def fitted(columns: Columns) -> tuple[str, float]:
    """Return the formula that `CostModel.fit` finds, and its error on the same batches."""
    try:
        model = mt.CostModel.fit(*columns, token_bytes=1)
    except ValueError as error:
        return f"refused: {error}", float("nan")
    return model.formula, 100 * float(
        np.abs(model.compute_us(*columns[:2]) / columns[2] - 1).mean()
    )


def main() -> None:
    """Print the errors of both forms, what `fit` makes of each group, and the presets."""
    with benchmark(__doc__, {"folder": Path}, folds=10, seeds=5) as (asked, report):
        there = [name for name in WANTED if (asked.folder / name).exists()]
        for name in WANTED:
            if name not in there:
                print(f"{asked.folder / name} is missing", file=sys.stderr)
        if not there:
            sys.exit(2)
        reached, fits = {}, {}
        if RTX in there:
            columns = of_rtx(asked.folder / RTX)
            reached[RTX] = errors(columns, asked.folds, asked.seeds)
            fits["rtx-pro-6000-measured"] = fitted(columns)
        if A800 in there:
            table = report.table(
                "A800: error on batches left out [%]",
                "experts <8",
                "tensor-parallel 4d",
                "measurements 5d",
                "two lines .2f",
                "exposed .2f",
            )
            rows = []
            for (held, size), columns in of_a800(asked.folder / A800).items():
                rows.append((len(columns[0]), *errors(columns, asked.folds)))
                table(held, size, *rows[-1])
            fits["a800-measured"] = fitted(columns)
            # The last row is of all of tensor-parallel size 1 again.
            count, *both = np.array(rows[:-1]).T
            reached[A800] = [float(np.average(errors, weights=count)) for errors in both]
        table = report.table(
            "Mean error on batches left out [%]",
            "times <30",
            "two lines .2f",
            "exposed .2f",
            "wanted .1f",
        )
        for name, both in reached.items():
            table(name, *both, WANTED[name])
        for name, (formula, off) in fits.items():
            measured = MEASURED[name]
            report.say(f"CostModel.fit, off by {off:.1f} % on what it was fitted to: {formula}.")
            shape = {"hidden": measured.hidden, "intermediate": measured.intermediate}
            report.say(f"Preset {name}: {mt.CostModel.preset(name, **shape).formula}.")


if __name__ == "__main__":
    main()
