"""Count recordings on many machines with Dask, and add the counts.

Enters: recordings, for instance one per rank and day, in any format that moetuner reads. Leaves:
one counted recording, the INPUT of every command. It is the same bit by bit on any number of
workers, in whatever order they end, also where some of them die. Name the recordings in the order
of time: Dask adds them in this order.

    pip install moetuner "dask[distributed]"
    python examples/count_with_dask.py rank*.safetensors --out counts.safetensors

Runs on worker processes of this machine; with `--cluster tcp://host:8786` on those of a cluster,
which must see the files under the same names.
"""

import argparse
import operator
from pathlib import Path

from dask import bag
from dask.distributed import Client

import moetuner as mt


def count(path: Path) -> mt.RoutingTrace | mt.RoutingStatistics:
    """Return the counts of one recording; only they travel, never the recording."""
    return mt.count(mt.open_input(path), threads=1)


def main() -> None:
    """Count where a worker is free, add in a tree, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cluster", metavar="ADDRESS")
    options = parser.parse_args()
    workers = {"n_workers": options.workers, "threads_per_worker": 1, "dashboard_address": None}
    with Client(options.cluster) if options.cluster else Client(**workers):
        recordings = bag.from_sequence(options.recordings, partition_size=1)
        counts = recordings.map(count).fold(operator.add, split_every=4).compute()
    counts.save(options.out)
    print(f"wrote {options.out}: {counts}")


# Workers import this file; only the process that was started runs it.
if __name__ == "__main__":
    main()
