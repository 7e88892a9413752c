"""Integer programmes by plain sums: whether values are feasible."""

from __future__ import annotations

import numpy as np

from moetuner.solver.milp.highs import Ilp

# HiGHS's own tolerance for rows and for whole numbers, tenfold.
SLACK = 1e-5


def broken(ilp: Ilp, values: np.ndarray) -> str | None:
    """Return which bound or row some values [columns] break; None if they are feasible."""
    whole = (ilp.integer == 0) | (np.abs(values - np.rint(values)) <= SLACK)
    inside = whole & (values >= -SLACK) & (values <= ilp.upper + SLACK)
    if not inside.all():
        return f"column {int(np.argmin(inside))}"
    lower, upper, row, column, value = ilp.arrays()
    terms = value * values[column]
    sums = np.bincount(row, terms, minlength=ilp.rows)
    slack = SLACK * (1 + np.bincount(row, np.abs(terms), minlength=ilp.rows))
    satisfied = (sums >= lower - slack) & (sums <= upper + slack)
    return None if satisfied.all() else f"row {int(np.argmin(satisfied))}"
