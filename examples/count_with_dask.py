"""Count many traces on many machines, and merge the counts.

Enters: trace files, for instance one per rank and day. Leaves: one file of statistics, the same as
a single process would count file by file. Statistics add up, so the order of merging does not
matter to the pairs; the windows of load follow one another in the order of the files.

    pip install moetuner "dask[bag]"
    python examples/merge_shards.py trace-*.safetensors --out statistics.safetensors

Runs on the cores of this machine; with `--cluster tcp://host:8786` (needs `dask[distributed]`) on
the workers of a cluster, which must see the files under the same names.
"""

import argparse
import contextlib
import operator
from pathlib import Path

import dask.bag

import moetuner as mt


def count(path: Path, window: int) -> mt.RoutingStatistics:
    """Return the statistics of one trace; only they travel, never the trace."""
    return mt.RoutingStatistics.from_trace(mt.RoutingTrace.load(path), window=window, threads=1)


def merge(paths: list[Path], window: int, cluster: str | None) -> mt.RoutingStatistics:
    """Count each trace where a worker is free, and add the counts up in a tree."""
    with contextlib.ExitStack() as stack:
        if cluster is not None:
            from dask.distributed import Client

            stack.enter_context(Client(cluster))  # computes what follows
            scheduler = None
        else:
            scheduler = "processes"
        shards = dask.bag.from_sequence(paths, partition_size=1).map(count, window=window)
        return shards.fold(operator.add, split_every=4).compute(scheduler=scheduler)


def main() -> None:
    """Count, merge and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--cluster", metavar="ADDRESS")
    options = parser.parse_args()
    statistics = merge(options.traces, options.window, options.cluster)
    statistics.save(options.out)
    print(f"wrote {options.out}: {statistics}")


# Workers import this file; only the process that was started runs it.
if __name__ == "__main__":
    main()
