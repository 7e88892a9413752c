"""What a solve takes and reaches at default and at thorough effort, without a time limit.

    python bench/effort.py [NAME ...] [--default-only]

The cases are the scorecard's that search (a part of a name selects some), and the largest that
default effort is to solve within ten seconds on two idle cores. Seconds are of the processor, on
two threads: other work on the machine does not count. The last column is how far the objective at
default effort is behind the one at thorough effort.
"""

from __future__ import annotations

from harness import Table, arguments, timed
from scorecard import FOLLOW, QUICK, SLOW, Row, instance

import moetuner as mt

LARGE: dict[str, Row] = {
    "58x256, joint, crossing": ("58x256", 1, 32, "joint", {**FOLLOW, "sets": False}),
}
SEARCHES = ("joint", "heuristic")


def main() -> None:
    """Print a row for every case."""
    given = arguments(__doc__, {"names": [""]}, default_only=False)
    row = Table(
        *("case <46", "default-s 10.1f", "objective 12.7g"),
        *("thorough-s 11.1f", "objective 12.7g", "behind-% 9.3f"),
    )
    for name, (traffic, nodes, per_node, method, rest) in (QUICK | SLOW | LARGE).items():
        searches = method in SEARCHES and "effort" not in rest
        if not (searches and any(part in name for part in given.names)):
            continue
        how = {key: value for key, value in rest.items() if key != "iterations"}
        problem, moving = instance(traffic, nodes, per_node, **how)
        cells: list[float] = []
        for effort in ("default",) if given.default_only else ("default", "thorough"):
            moving |= {"effort": effort, "threads": 2}
            result, _, seconds = timed(lambda of=problem, by=method: mt.solve(of, by, **moving))
            cells += [seconds, result.objective]
        if not given.default_only:
            cells.append(100 * (cells[1] / cells[3] - 1))
        row(name, *cells)


if __name__ == "__main__":
    main()
