"""The files that the commands of transcripts read, each made when a command first names it.

Traces are parts of the bundled one, and loads are whole numbers from a seed, so that they are the
same on every machine.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import targets
from engines_files import GOLDEN

import moetuner as mt

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
LAYERS, EXPERTS, DEVICES = 2, 8, 4


def bundled(
    tokens: int, first: int = 0, *, labelled: bool = True, model: str | None = "small-moe"
) -> mt.RoutingTrace:
    """Return tokens of the bundled trace in two layers of sixteen experts."""
    trace = mt.RoutingTrace.load(BUNDLED)
    rows = np.arange(first, first + tokens)
    labels = {"sequence": trace.sequence[rows], "group": trace.group[rows]}
    labels["group_names"] = trace.group_names
    return mt.RoutingTrace.from_arrays(
        np.asarray(trace.expert_ids)[rows, :LAYERS],
        num_experts=trace.num_experts,
        model=model,
        **(labels if labelled else {}),
    )


def mixed(seed: int, sequences: int) -> mt.RoutingTrace:
    """Return some sequences of the bundled trace, drawn by chance, in the order of the draw."""
    trace = bundled(61_440)
    drawn = np.random.default_rng(seed).permutation(trace.sequences)[:sequences]
    return trace.select(sequences=sorted(np.unique(trace.sequence)[drawn]))


def loads(windows: int, seed: int = 0) -> np.ndarray:
    """Return a load table [W,L,E]: some experts are busy, and every window differs by half."""
    rng = np.random.default_rng(seed)
    busy = np.stack([rng.permutation(4000 // np.arange(4, 4 + EXPERTS)) for _ in range(LAYERS)])
    return busy * rng.integers(50, 150, (windows, LAYERS, EXPERTS)) // 100


def grouped(path: Path) -> None:
    load = np.concatenate([loads(20), loads(20, seed=2)])
    np.savez(path, load=load, group=np.repeat([0, 1], 20), group_names=["code", "chat"])


def rows_of_loads(path: Path) -> None:
    rows = ["window,layer,expert,count,group"]
    for (window, layer, expert), tokens in np.ndenumerate(loads(12)):
        rows.append(f"{window},{layer},{expert},{tokens},{('code', 'chat')[window % 2]}")
    path.write_text("\n".join(rows) + "\n")


def placement(devices: int = DEVICES, experts: int = 16) -> mt.Placement:
    """Return experts in the order of their numbers, in turns over the devices."""
    device_of = np.tile(np.arange(experts) % devices, (LAYERS, 1))
    return mt.Placement.from_assignment(device_of, devices)


def copies() -> mt.Placement:
    """Return six experts on each of four devices, so that eight have a copy."""
    slots = [[4 * device + slot for slot in range(4)] for device in range(4)]
    slots = [row + [(row[0] + 4) % 16, (row[1] + 8) % 16] for row in slots]
    return mt.Placement([slots] * LAYERS)


def damaged(path: Path) -> None:
    bundled(2_000).save(path)
    path.write_bytes(path.read_bytes()[:5_000])


def golden(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(GOLDEN / name, path)


def target(name: str) -> Callable[[Path], None]:
    """Return a function that writes a valid sample of a kind of file."""
    return lambda path: targets.write(name, path)


MACHINE = {"devices": 4, "devices_per_node": 2, "speed": [1, 1, 1, 2]}
TIMES = ["tokens,active,microseconds"] + [
    f"{tokens},{active},{10 + 3 * active + tokens // 4}"
    for tokens in (16, 64, 256, 1024)
    for active in (4, 8, 16)
]

INPUTS: dict[str, Callable[[Path], object]] = {
    "trace.safetensors": lambda path: mixed(0, 48).save(path),
    "newer.safetensors": lambda path: mixed(1, 48).save(path),
    "other.safetensors": lambda path: mixed(2, 200).select(groups=["japanese"]).save(path),
    "short.safetensors": lambda path: bundled(600).save(path),
    "unlabelled.safetensors": lambda path: bundled(8_000, labelled=False).save(path),
    "counts.safetensors": lambda path: mt.RoutingStatistics.from_trace(
        mixed(0, 48), sets=True, by_group=True
    ).save(path),
    "loads.npz": lambda path: np.savez(path, load=loads(40)),
    "newer-loads.npz": lambda path: np.savez(path, load=loads(40, seed=1)),
    "grouped-loads.npz": grouped,
    "one-window.npz": lambda path: np.savez(path, load=loads(1)),
    "mixtral-loads.npz": lambda path: np.savez(path, load=loads(40), model="mixtral-8x7b"),
    "loads.csv": rows_of_loads,
    "running.json": lambda path: placement().save(path),
    "copies.json": lambda path: copies().save(path),
    "running-8.json": lambda path: placement(experts=EXPERTS).save(path),
    "damaged.safetensors": damaged,
    "empty.npz": Path.touch,
    "machine.json": lambda path: path.write_text(json.dumps(MACHINE)),
    "wrong-machine.json": lambda path: path.write_text(json.dumps({"devices": "eight"})),
    "times.csv": lambda path: path.write_text("\n".join(TIMES) + "\n"),
}


def make_inputs(line: str) -> None:
    """Make the files that a command line names and that are not there."""
    for word in re.split(r"[\s:=]+", line):
        if word in INPUTS and not Path(word).exists():
            INPUTS[word](Path(word))
