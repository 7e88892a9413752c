"""Count recordings on many machines with Ray Data, and add the counts.

Enters: recordings, for instance one per rank and day, in any format that moetuner reads. Leaves:
one counted recording, the INPUT of every command. It is the same bit by bit on any number of
workers, in whatever order they end, also where some of them die. Name the recordings in the order
of time.

    pip install moetuner "ray[data]"
    python examples/count_with_ray.py rank*.safetensors --out counts.safetensors

Runs on worker processes of this machine; with `--cluster ray://host:10001` on those of a cluster,
which must see the files under the same names.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import ray
from ray.data.aggregate import AggregateFn

import moetuner as mt


def count(row: dict[str, Any]) -> dict[str, bytes]:
    """Return the counts of one recording; only they travel, never the recording.

    Its number is its time: sums are in that order, whoever is done first.
    """
    counted = mt.count(mt.open_input(row["path"]), time=row["number"], threads=1)
    return {"counts": pickle.dumps(counted)}


def add(one: bytes, other: bytes) -> bytes:
    """Add two counted recordings; no bytes are none."""
    if not (one and other):
        return one or other
    return pickle.dumps(pickle.loads(one) + pickle.loads(other))


def main() -> None:
    """Count where a worker is free, add the counts of each block and of all blocks, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cluster", metavar="ADDRESS")
    options = parser.parse_args()
    local = {"num_cpus": options.workers, "include_dashboard": False}
    ray.init(options.cluster, **({} if options.cluster else local))
    rows = [
        {"path": str(path.resolve()), "number": number}
        for number, path in enumerate(options.recordings)
    ]
    recordings = ray.data.from_items(rows, override_num_blocks=len(rows))
    total = AggregateFn(
        init=lambda _: b"",
        accumulate_row=lambda counts, row: add(counts, row["counts"]),
        merge=add,
        name="counts",
    )
    counts = pickle.loads(recordings.map(count).aggregate(total)["counts"])
    counts.save(options.out)
    print(f"wrote {options.out}: {counts}")


if __name__ == "__main__":
    main()
