"""The files that the commands of transcripts read, each made when a command first names it.

Traces are parts of the bundled one, and loads are whole numbers from a seed, so that they are the
same on every machine.
"""

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import given
import numpy as np
import targets
from engines_files import GOLDEN, vllm_response, write_tensorrt, write_tensorrt_about

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


def small() -> mt.RoutingTrace:
    """Return a dozen sequences of each of two groups, in turns."""
    trace = mixed(3, 240)
    sequences = [
        np.unique(trace.sequence[trace.group == trace.group_names.index(name)])[:12]
        for name in ("python", "japanese")
    ]
    chosen = trace.select(sequences=sorted(np.concatenate(sequences)))
    names, group = np.unique(chosen.group, return_inverse=True)
    return replace(
        chosen,
        group=group.astype(np.int16),
        group_names=tuple(trace.group_names[number] for number in names),
    )


def by_group(trace: mt.RoutingTrace) -> mt.RoutingTrace:
    """Return sequences of one group after the other, as a file for each would have them."""
    whole, *others = [trace.select(groups=[name]) for name in trace.group_names]
    for group in others:
        whole = whole.concat(group)
    return whole


def in_phases(trace: mt.RoutingTrace) -> mt.RoutingTrace:
    """Return the first half of every sequence as prefill, and the second as decode."""
    group = (np.arange(trace.tokens) % 256 >= 128).astype(np.int16)
    return replace(trace, group=group, group_names=("prefill", "decode"))


def loads(windows: int, seed: int = 0, experts: int = EXPERTS) -> np.ndarray:
    """Return a load table [W,L,E]: some experts are busy, and every window differs by half."""
    rng = np.random.default_rng(seed)
    busy = np.stack([rng.permutation(4000 // np.arange(4, 4 + experts)) for _ in range(LAYERS)])
    return busy * rng.integers(50, 150, (windows, LAYERS, experts)) // 100


def grouped(path: Path) -> None:
    load = np.concatenate([loads(20), loads(20, seed=2)])
    np.savez(path, load=load, group=np.repeat([0, 1], 20), group_names=["code", "chat"])


def two_kinds() -> mt.RoutingTrace:
    """Return English sequences, then Japanese ones, which go to other experts."""
    return by_group(mixed(4, 240).select(groups=["english", "japanese"]))


def independent() -> mt.RoutingTrace:
    """Return a trace whose second layer has its tokens in another order than the first."""
    trace = mixed(0, 48)
    ids = np.array(trace.expert_ids)
    ids[:, 1] = np.random.default_rng(0).permutation(ids[:, 1])
    return mt.RoutingTrace.from_arrays(ids, num_experts=16, sequence=trace.sequence)


def one_prompt() -> mt.RoutingTrace:
    """Return the same sequence two dozen times."""
    ids = np.tile(np.asarray(bundled(128).expert_ids), (24, 1, 1))
    return mt.RoutingTrace.from_arrays(ids, num_experts=16, sequence=np.arange(len(ids)) // 128)


def idle_loads() -> np.ndarray:
    """Return a load table whose layers are alike, with windows that nothing was served in."""
    load = np.repeat(loads(20)[:, :1], LAYERS, axis=1)
    load[::4] = 0
    return load


def times(path: Path) -> None:
    """Write times of a layer in whole microseconds: few tokens read weights, many compute."""
    few, many = (1, 2, 4, 8, 16, 24, 32), (4096, 6144, 8192, 12288, 16384, 24576)
    off = (3, -2, 1, -3, 2, -1)
    rows = [(n, min(n, 16), 80 + 12 * min(n, 16)) for n in few]
    rows += [(n, 16, 40 + n // 12) for n in many]
    lines = [f"{n},{used},{us + off[at % len(off)]}" for at, (n, used, us) in enumerate(rows)]
    path.write_text("\n".join(["tokens,experts,microseconds", *lines]) + "\n")


def edited(path: Path) -> None:
    """Write a placement whose settings were edited by hand."""
    placement().save(path)
    contents = json.loads(path.read_text())
    path.write_text(json.dumps(contents | {"settings": {"holdout": 2}}))


def slow_loads(windows: int) -> np.ndarray:
    """Return means of eight neighbouring windows [W,L,E], so that neighbours are alike."""
    load = loads(windows + 7)
    return np.stack([load[first : first + 8].sum(axis=0) // 8 for first in range(windows)])


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
    slots = [[*row, (row[0] + 4) % 16, (row[1] + 8) % 16] for row in slots]
    return mt.Placement([slots] * LAYERS)


def damaged(path: Path) -> None:
    bundled(2_000).save(path)
    path.write_bytes(path.read_bytes()[:5_000])


def golden(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(GOLDEN / name, path)


def target(name: str) -> Callable[[Path], object]:
    """Return a function that writes a valid sample of a kind of file."""
    if name in targets.TOPOLOGIES:
        return lambda path: path.write_text(targets.TOPOLOGIES[name])
    return lambda path: targets.write(name, path)


def in_folder(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a function that makes the folder that a path is, and what is in it."""

    def write(path: Path) -> None:
        path.mkdir()
        make(path)

    return write


def copy_all(pattern: str) -> Callable[[Path], object]:
    """Return a function that copies golden files into a new folder."""
    return in_folder(
        lambda folder: [shutil.copy(file, folder) for file in sorted(GOLDEN.glob(pattern))]
    )


def of_tensorrt_llm(counted: np.ndarray) -> Callable[[Path], None]:
    """Return a function that writes counts [W,L,N] of experts or slots as a rank dumps them."""

    def write(folder: Path) -> None:
        counts = {
            (step, 1 + layer): np.ascontiguousarray(counts_of_layer)
            for step, window in enumerate(counted)
            for layer, counts_of_layer in enumerate(window)
        }
        write_tensorrt(folder, 0, counts)
        write_tensorrt_about(folder, counted.shape[2])

    return in_folder(write)


def slot_loads() -> np.ndarray:
    """Return what every slot of ``copies`` serves [W,L,slots]; copies serve half each."""
    return loads(6, experts=16)[:, :, copies().slots[0].ravel()] // 2


def texts(path: Path) -> None:
    given.words(path.parent)
    Path("FILE").rename(path)


def bundled_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    shutil.copy(BUNDLED, path)


def requests(path: Path) -> None:
    """Write a row for every sequence of the trace, in their order: languages, and lengths."""
    trace = mixed(0, 48)
    _, first = np.unique(trace.sequence, return_index=True)
    rows = ["number,kind"]
    for number, token in enumerate(sorted(first)):
        name = trace.group_names[trace.group[token]]
        rows.append(f"{number},{'code' if name in ('python', 'c++') else 'text'}")
    path.write_text("\n".join(rows) + "\n")


def shuffled() -> mt.Placement:
    """Return a placement of the eight experts of MODEL that differs from their order."""
    return mt.Placement.from_assignment(np.tile(np.arange(8) % 4, (3, 1)), 4)


def of_two_devices() -> mt.RoutingTrace:
    """Return a trace of two groups that have no expert in common: each is served by one device."""
    rng, group = np.random.default_rng(0), np.arange(4000) // 20 % 2
    ids = (group + 2 * (rng.random(4000) < 0.4))[:, None, None]
    labels = {"group": group, "group_names": ["code", "chat"]}
    return mt.RoutingTrace.from_arrays(ids, num_experts=4, sequence=np.arange(4000) // 20, **labels)


def of_a_minority() -> mt.RoutingTrace:
    """Return a trace of two groups, of which the smaller is even on experts in blocks."""
    rng, group = np.random.default_rng(0), (np.arange(6000) // 50 % 5 == 4).astype(int)
    liked = np.stack([np.linspace(2, 0, 8), np.tile([2.0, 0.0], 4)])
    ids = np.argsort(-(liked[group][:, None] + rng.gumbel(size=(6000, 2, 8))), axis=2)[..., :2]
    labels = {"group": group, "group_names": ["many", "few"]}
    return mt.RoutingTrace.from_arrays(ids, num_experts=8, sequence=np.arange(6000) // 50, **labels)


def hot_loads() -> np.ndarray:
    """Return a load table whose first layer has an expert with half of the tokens."""
    load = loads(40)
    load[:, 0, 1] = load[:, 0].sum(axis=1) - load[:, 0, 1]
    return load


def with_hot_expert() -> mt.RoutingTrace:
    """Return a trace in which one expert of each layer takes most tokens, at random."""
    liking = np.zeros(EXPERTS)
    liking[1] = 3
    noise = np.random.default_rng(0).gumbel(size=(12_288, LAYERS, EXPERTS))
    ids = np.argsort(-(liking + noise), axis=2)[..., :2]
    return mt.RoutingTrace.from_arrays(ids, num_experts=EXPERTS, sequence=np.arange(12_288) // 64)


def of_plugin(folder: Path) -> None:
    """Write load tables as two processes of the plugin record them."""
    for process, part in ((7, loads(3)), (8, loads(3, seed=1))):
        np.savez(folder / f"load-{process}-{LAYERS}x{EXPERTS}.npz", load=part)


def wide(shifted: int) -> mt.Placement:
    """Return 1,024 experts in blocks; every other one is as many devices further on."""
    device_of = np.tile(np.arange(1024) // 256, (LAYERS, 1))
    device_of[:, ::2] = (device_of[:, ::2] + shifted) % DEVICES
    return mt.Placement.from_assignment(device_of, DEVICES)


def named_responses(path: Path) -> None:
    """Write responses of vLLM to the requests r0 and r1."""
    ids = np.random.default_rng(0).random((2, 2, LAYERS, EXPERTS)).argsort(axis=3)[..., :2]
    lines = [vllm_response(ids[n].astype(np.uint8), id=f"cmpl-r{n}") for n in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def uneven_memra(path: Path) -> None:
    """Write a map of memra with three experts on one card, and an entry rank of the other."""
    fields = {"format": "memra-ep-map-v1", "ranks": 2, "entry_rank": 1, "expert_count": 4}
    fields["layers"] = [{"layer": 3, "assignment": [0, 0, 0, 1]}]
    path.write_text(json.dumps(fields))


def reversed_ascend(path: Path) -> None:
    """Write a map of vllm-ascend whose layers and devices stand in reverse order."""
    mt.write_placement(placement(2), "vllm-ascend", path)
    fields = json.loads(path.read_text())
    fields["layer_list"].reverse()
    fields["layer_list"][1]["device_list"].reverse()
    path.write_text(json.dumps(fields))


MACHINE = {"devices": 4, "devices_per_node": 2, "speed": [1, 1, 1, 2]}
GOLDEN_FILES = {
    "ascend": ["workload.npz"],
    "deepspeed": ["counts-0.npz", "counts-1.npz"],
    "fastdeploy": ["stats.jsonl"],
    "llama_cpp": ["imatrix.gguf"],
    "megatron": ["router_trace_rank0.jsonl", "router_trace_rank1.jsonl", "replay-0.npz"],
    "sglang": [
        "two-ranks-per_token-0.pt",
        "two-ranks-per_token-1.pt",
        "two-ranks-per_pass-0.pt",
        "one-rank-stat.pt",
        "responses.json",
        "expert_location.json",
    ],
    "vllm": ["completions.json", "routed-0.npy", "routed-1.npy"],
}
TARGETS = {
    "ids.npy": "npy",
    "ids.csv": "csv",
    "ids.parquet": "parquet",
    "tokens.jsonl": "lines per token",
    "sequences.jsonl": "lines per sequence",
    "scrape.txt": "table, scrape",
    "nested.json": "table, json",
    "deepspeed.pt": "torch, deepspeed",
    "wide.csv": "table, layers",
    "machine.toml": "topology, toml",
}
INPUTS: dict[str, Callable[[Path], object]] = {
    "trace.safetensors": lambda path: mixed(0, 48).save(path),
    "newer.safetensors": lambda path: mixed(1, 48).save(path),
    "other.safetensors": lambda path: mixed(2, 200).select(groups=["japanese"]).save(path),
    "small.safetensors": lambda path: small().save(path),
    "ordered.safetensors": lambda path: by_group(mixed(0, 96)).save(path),
    "small-ordered.safetensors": lambda path: by_group(small()).save(path),
    "changing.safetensors": lambda path: replace(by_group(mixed(0, 96)), group=None).save(path),
    "phases.safetensors": lambda path: in_phases(mixed(0, 240)).save(path),
    "short.safetensors": lambda path: bundled(600).save(path),
    "unlabelled.safetensors": lambda path: bundled(8_000, labelled=False).save(path),
    "counts.safetensors": lambda path: mt.RoutingStatistics.from_trace(
        mixed(0, 48), sets=True, by_group=True
    ).save(path),
    "loads.npz": lambda path: np.savez(path, load=loads(40)),
    "loads-16.npz": lambda path: np.savez(path, load=loads(40, experts=16)),
    "newer-loads.npz": lambda path: np.savez(path, load=loads(40, seed=1)),
    "grouped-loads.npz": grouped,
    "small-loads.npz": lambda path: np.savez(
        path, load=loads(12), group=np.arange(12) % 2, group_names=["code", "chat"]
    ),
    "few-loads.npz": lambda path: np.savez(path, load=loads(6)),
    "repeated-loads.npz": lambda path: np.savez(path, load=np.repeat(loads(24), 8, axis=0)),
    "slow-loads.npz": lambda path: np.savez(path, load=slow_loads(96)),
    "two-kinds.safetensors": lambda path: two_kinds().save(path),
    "independent.safetensors": lambda path: independent().save(path),
    "one-prompt.safetensors": lambda path: one_prompt().save(path),
    "idle-loads.npz": lambda path: np.savez(path, load=idle_loads()),
    "alike-loads.npz": lambda path: np.savez(path, load=np.repeat(loads(1), 12, axis=0)),
    "busy-loads.npz": lambda path: np.savez(path, load=loads(12) ** 4 // 10**8),
    "many-loads.npz": lambda path: np.savez(path, load=loads(600)),
    "edited.json": edited,
    "kinds.txt": lambda path: path.write_text("code\nchat\n"),
    "unnamed.txt": lambda path: path.write_text("code\n\n"),
    "torn.csv": lambda path: path.write_text("number,kind\n0,code\n1\n"),
    "long-map.json": lambda path: path.write_text(
        json.dumps({"physical_to_logical_map": [[*range(16)]] * 3})
    ),
    "two-devices.safetensors": lambda path: of_two_devices().save(path),
    "paired.json": lambda path: mt.Placement([[[0, 2], [1, 3]]]).save(path),
    "minority.safetensors": lambda path: of_a_minority().save(path),
    "six-windows.txt": lambda path: path.write_text("code\nchat\n" * 3),
    "one-token.npy": lambda path: np.save(path, [[[0, 1]]]),
    "recorded": in_folder(of_plugin),
    "wide.json": lambda path: wide(0).save(path),
    "wide-moved.json": lambda path: wide(1).save(path),
    "named.jsonl": named_responses,
    "of-others.csv": lambda path: path.write_text("id,kind\nr0,code\nr2,chat\n"),
    "of-both.csv": lambda path: path.write_text("id,kind\nr0,code\nr0,chat\nr1,code\n"),
    "hot-loads.npz": lambda path: np.savez(path, load=hot_loads()),
    "hot.safetensors": lambda path: with_hot_expert().save(path),
    "uneven-memra.json": uneven_memra,
    "reversed-ascend.json": reversed_ascend,
    "one-window.npz": lambda path: np.savez(path, load=loads(1)),
    "mixtral-loads.npz": lambda path: np.savez(path, load=loads(40), model="mixtral-8x7b"),
    "loads.csv": rows_of_loads,
    "running.json": lambda path: placement().save(path),
    "copies.json": lambda path: copies().save(path),
    "running-8.json": lambda path: placement(experts=EXPERTS).save(path),
    "contiguous-8.json": lambda path: mt.Placement.from_assignment(
        np.tile(np.arange(EXPERTS) // 2, (LAYERS, 1)), DEVICES
    ).save(path),
    "copies-8.json": lambda path: mt.Placement(
        [[[0, 1, 2, 3], [4, 5, 6, 7], [2, 3, 4, 5], [6, 7, 0, 1]]] * LAYERS
    ).save(path),
    "damaged.safetensors": damaged,
    "empty.npz": Path.touch,
    "machine.json": lambda path: path.write_text(json.dumps(MACHINE)),
    "wrong-machine.json": lambda path: path.write_text(json.dumps({"devices": "eight"})),
    **{
        name: golden(f"{folder}/{name}") for folder in GOLDEN_FILES for name in GOLDEN_FILES[folder]
    },
    **{name: target(kind) for name, kind in TARGETS.items()},
    "tokenspeed": copy_all("tokenspeed/*.pt"),
    "demo-output/trace.safetensors": bundled_file,
    "code.txt": lambda path: path.write_text("\n".join(["code", "chat"] * 20)),
    "windows.txt": lambda path: path.write_text("code\nchat\n" * 8),
    "subjects.txt": lambda path: path.write_text("".join(f"subject {n}\n" for n in range(40))),
    "requests.csv": requests,
    "junk.txt": lambda path: path.write_text("junk"),
    "junk.csv": lambda path: path.write_text("a,b\n1,2\n"),
    "packed.gz": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00"),
    "answers.json": lambda path: path.write_text('{"choices": [{"text": "a"}]}'),
    "eplb.log": lambda path: path.write_text("EPLB step: 7 avg_tokens=4 max_tokens=5\n"),
    "zeros.json": lambda path: path.write_text(json.dumps({"logical_count": [[0] * 8] * 2})),
    "turned.npy": lambda path: np.save(path, loads(1)[0].T),
    "no-balance.json": lambda path: path.write_text(
        json.dumps({"physical_to_logical_map": [[0] * 16] * LAYERS})
    ),
    "routed.jsonl": lambda path: given.responses(path, given.trace(4, 128, 256)),
    "answers.jsonl": lambda path: given.answers(path, given.trace(4, 256, 64)),
    "dumps": lambda path: given.recorder(path, given.trace(4, 256, 64), dense=3),
    "traces": copy_all("megatron/router_trace_rank*.jsonl"),
    "island.json": lambda path: path.write_text(json.dumps({"devices": 2, "devices_per_node": 2})),
    "expert_statistic": of_tensorrt_llm(loads(6, experts=16)),
    "slot_statistic": of_tensorrt_llm(slot_loads()),
    "running-slots.yaml": lambda path: mt.write_placement(
        copies(), "tensorrt-llm", path, dense_layers=[0]
    ),
    "MODEL": lambda path: given.checkpoint(path),
    "texts.jsonl": texts,
    "single-of-model.json": lambda path: shuffled().save(path),
    "times.csv": times,
}


def make_inputs(line: str) -> None:
    """Make the files that a command line names and that are not there."""
    for word in re.split(r"[\s:=]+", line):
        if word in INPUTS and not Path(word).exists():
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                INPUTS[word](Path(word))
