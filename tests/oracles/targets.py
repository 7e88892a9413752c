"""What is read from outside: small valid files of every kind, damage, and what must come of it.

Tests and ``bench/faults.py`` try the same targets: a reader returns what is valid, or raises a
ValueError or an OSError of one line; nothing else, and soon.
"""

from __future__ import annotations

import io
import json
import random
import re
import string
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from damage import check_line, check_trace
from engines_files import (
    GOLDEN,
    SGLANG_MAP,
    deepspeed_counts,
    megatron_lines,
    npy,
    save_table,
    save_torch,
    sglang_pass,
    vllm_response,
    write_tensorrt_about,
)
from make import trace_of
from recorded import write_lines
from safetensors.numpy import save_file

import moetuner as mt
from moetuner.cli.fit import read_times
from moetuner.formats import WRITERS, read_input
from moetuner.formats.hints import Hints
from moetuner.plugins.files import Files
from moetuner.plugins.settings import Settings

EXPERTS, LAYERS, TOP_K = 16, 2, 2
_SCORES = np.random.default_rng(0).gumbel(size=(12, LAYERS, 6))
IDS = np.argsort(-_SCORES, axis=2)[:, :, :TOP_K].astype(np.uint8)
LABELS = {"sequence": np.arange(12) // 4, "group": np.arange(12) // 8, "group_names": ["a", "b"]}
TRACE = trace_of(IDS, EXPERTS, model="m", **LABELS)
COUNTED = mt.RoutingStatistics.from_trace(TRACE, window=5)
PLACEMENT = mt.Placement([[[0, 1, 2], [3, 4, 5]], [[5, 1, 2], [3, 4, 0]]], num_experts=6)
HINTS = Hints(num_experts=EXPERTS, top_k=4)

TRACE_LINES = [json.dumps(line) for line in megatron_lines(IDS, 0, 0, range(LAYERS))]
RESPONSE = json.dumps(vllm_response(IDS))
LOAD = np.random.default_rng(0).integers(0, 99, (2, 3, 8))
NAMES = ",".join(f"expert_{expert}" for expert in range(8))


def csv_lines():
    yield "token,layer,expert,sequence,group"
    for token, layer, k in np.ndindex(*IDS.shape):
        yield f"{token},{layer},{IDS[token, layer, k]},{token // 4},{'ab'[token // 8]}"


def rows_of(load):
    return "\n".join(",".join(map(str, row)) for row in load)


ARCHIVES = {
    "replay": dict(zip(["arr_0", "arr_1"], np.moveaxis(IDS, 1, 0).astype(int), strict=True)),
    "deepspeed": {f"layers.{n}.tokens_per_expert": np.arange(16.0) for n in range(2)},
    "vllm-ascend": {
        "expert_workload": np.arange(64).reshape(2, 2, 16),
        "current_expert_table": np.arange(64).reshape(2, 2, 16) % EXPERTS,
    },
    "npz": {"expert_ids": IDS, "num_experts": EXPERTS, "model": "m", **LABELS},
    "load table": {"load": COUNTED.window_load, "group": [0, 1, 0], "group_names": ["a", "b"]},
}
BYTES = {
    "megatron": lambda: "\n".join(TRACE_LINES).encode(),
    "csv": lambda: "\n".join(csv_lines()).encode(),
    "vllm": lambda: f"{RESPONSE}\n{RESPONSE}".encode(),
    "npy": lambda: npy(IDS),
    "npy wide": lambda: npy(IDS.astype(">i4")),
    "npy columns": lambda: npy(np.asfortranarray(IDS)),
}
WRITTEN = {
    "trace": TRACE.save,
    "statistics": COUNTED.save,
    "lines per token": lambda path: write_lines(TRACE, path),
    "lines per sequence": lambda path: write_lines(TRACE, path, "sequence"),
    "tensorrt-llm": lambda path: save_file(
        {f"3_{layer}": np.arange(EXPERTS) for layer in range(LAYERS)}, path
    ),
}
# Load tables, as text.
TABLES = {
    "table, rows": "\n\n".join(map(rows_of, LOAD)),
    "table, layers": f"layer,{NAMES}\n"
    + "\n".join(f"{at},{rows_of([row])}" for at, row in enumerate(LOAD[0])),
    "table, long": "window,layer,expert,count\n"
    + "\n".join(f"{w},{at},{e},{LOAD[w, at, e]}" for w, at, e in np.ndindex(LOAD.shape)),
    "table, json": json.dumps(LOAD.tolist()),
    "table, sglang": json.dumps({"logical_count": LOAD.tolist()}),
    "table, vllm": json.dumps(
        {
            "record_type": "eplb_load_stats",
            "expert_load": LOAD[0].tolist(),
            "p2l_map": [[*range(8)]] * 3,
        }
    ),
    "table, fastdeploy": json.dumps({"code": 0, "msg": "ok", "data": LOAD.tolist()}),
    "table, scrape": "# TYPE moe_tokens counter\n"
    + "\n".join(
        f'moe_tokens{{layer="{at}",expert="{e}"}} {LOAD[0, at, e]}'
        for at, e in np.ndindex(LOAD.shape[1:])
    ),
}
DUMPS = ("sglang/one-rank-per_token-0.pt", "sglang/responses.json")
GGUF = ("llama_cpp/imatrix.gguf",)
TORCH = {
    "torch, megatron": lambda path: save_torch(path, list(np.moveaxis(IDS, 1, 0).astype(int))),
    "torch, deepspeed": lambda path: save_torch(path, deepspeed_counts(np.ones((3, 4), "f4"))),
    "torch, sglang": lambda path: save_torch(
        path,
        {
            "records": [sglang_pass(0, 0, SGLANG_MAP[:, None, :2], [0], [1]) | {"forward_mode": 1}],
            "last_physical_to_logical_map": SGLANG_MAP,
        },
    ),
    "torch, tokenspeed": lambda path: save_torch(
        path, {"logical_count": LOAD[0], "ep_rank": 0, "ep_size": 1}
    ),
    "torch, counts": lambda path: save_torch(path, {"logical_count": LOAD}),
}
TOPOLOGIES = {
    "topology, json": json.dumps(mt.Topology(8, devices_per_node=4).to_dict()),
    "topology, toml": "devices = 8\ndevices_per_node = 4\nspeed = [1, 1, 1, 1, 1, 1, 2, 2]\n",
}


def write(name, path):
    """Write a small valid file; meta_info.json is beside it."""
    if name in ARCHIVES:
        save = np.savez_compressed if name == "npz" else np.savez
        with path.open("wb") as file:
            save(file, **ARCHIVES[name])
    elif name in BYTES:
        path.write_bytes(BYTES[name]())
    elif name in TABLES:
        path.write_text(TABLES[name])
    elif name in WRITTEN:
        WRITTEN[name](path)
    elif name in ("parquet", "arrow"):
        saved = path.with_name(f"t.{name}")
        save_table(saved, {"experts": IDS.tolist(), "sequence": range(12)})
        saved.rename(path)
    elif name in TORCH:
        TORCH[name](path)
    else:
        path.write_bytes((GOLDEN / name).read_bytes())


class Target(NamedTuple):
    """A kind of file: how a valid one is made, and how files of it are read."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]


def read_traffic(reader=None, hints=HINTS):
    """Return a function that reads all of a recording."""

    def read(path):
        traffic = read_input([path], hints, reader)
        if isinstance(traffic, mt.RoutingTrace):
            check_trace(traffic)
        else:
            assert len(traffic.fingerprint) == 16
            assert traffic.window_load.dtype == np.uint64

    return read


def read_form(form):
    """Return a function that reads a map of experts."""

    def read(path):
        placement = mt.read_placement(path, devices=2, form=form)
        assert placement.slots.dtype == np.int32
        assert placement.slots.max() < placement.num_experts

    return read


def problem_of_certificate():
    """Return the problem whose bound the certificate proves."""
    trace = trace_of(IDS, 6)
    statistics = mt.RoutingStatistics.from_trace(trace, window=None, sets=True)
    return mt.Problem(statistics, mt.Topology(2), regime="follow", max_imbalance=1.5)


def write_certificate(path):
    mt.solve(problem_of_certificate(), threads=1).certificate.save(path)


def read_plugin_files(path):
    """Read a placement as plugins do, which never raise: what is wrong is a line."""
    files = Files.read(Settings.from_environment({"MOETUNER_PLACEMENT": str(path)}))
    assert files.placements or files.error
    assert "\n" not in files.error


def write_placement(path):
    """Write the placement of a solve, with its settings."""
    mt.solve(problem_of_certificate(), "lpt").placement.save(path)


def fit_times(path):
    """Fit a cost model to times of a file; numbers of any size may overflow on the way."""
    with np.errstate(all="ignore"):
        columns = np.reshape(read_times(path), (-1, 3)).T
        mt.CostModel.fit(*columns, token_bytes=1.0)


CHECKPOINT = ("model.safetensors", "model.safetensors.index.json", "config.json")


def write_checkpoint(path, name="model.safetensors"):
    """Write the weights of two small layers, their index or their configuration."""
    tensors = {
        f"model.layers.{layer}.mlp.{of}": np.zeros((4, 3), np.float32)
        for layer in range(2)
        for of in ("gate.weight", *(f"experts.{e}.up_proj.weight" for e in range(4)))
    }
    if name == "model.safetensors":
        save_file(tensors, path)
    elif name == "config.json":
        path.write_text(json.dumps({"num_hidden_layers": 2, "n_group": 1, "topk_group": 1}))
    else:
        path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))


def read_checkpoint(path, name):
    """Read a checkpoint of which this file is one; the others are whole."""
    from moetuner.torch.reorder.checkpoint import permute_state_dict

    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        folder = Path(made) / "in"
        folder.mkdir()
        write_checkpoint(folder / "model.safetensors")
        (folder / name).write_bytes(path.read_bytes())
        permute_state_dict(folder, mt.Placement([[[1, 0], [3, 2]]] * 2), Path(made) / "out")


def targets() -> dict[str, Target]:
    """Return every target that the packages here allow, by name."""
    named = {"replay": "megatron", "parquet": "arrow"}
    given = ("tensorrt-llm", "deepspeed", "vllm-ascend", "arrow")
    found = {}
    here = [*ARCHIVES, *BYTES, *TABLES, *WRITTEN, *DUMPS]
    here += ["parquet", "arrow"] if find_spec("pyarrow") else []
    here += TORCH if find_spec("torch") else []
    here += GGUF if find_spec("gguf") else []
    for name in here:
        reader = named.get(name, name if name in given else None)
        hints = Hints() if name in (*TABLES, *GGUF, *(*TORCH,)[1:]) else HINTS
        found[name] = Target(lambda path, name=name: write(name, path), read_traffic(reader, hints))
    for name, writer in WRITERS.items():
        hints = Hints(dense_layers=())
        found[f"map, {name}"] = Target(
            lambda path, module=writer.module, hints=hints: module.write_map(
                PLACEMENT, path, hints
            ),
            read_form(name),
        )
    problem = problem_of_certificate()
    found |= {
        "map, of any form": Target(write_placement, read_form(None)),
        "placement": Target(write_placement, mt.Placement.load),
        "placement of a plugin": Target(write_placement, read_plugin_files),
        "certificate": Target(
            write_certificate, lambda path: mt.verify(mt.Certificate.load(path), problem)
        ),
        "cost model": Target(mt.CostModel.preset("h100").save, mt.CostModel.load),
        "times": Target(
            lambda path: path.write_text(
                "tokens,experts,us\n"
                + "".join(f"{n},{min(n, 16)},{20 + min(n, 16)}\n" for n in (1, 2, 4, 8, 16, 32))
                + "".join(f"{n},16,{n / 64:g}\n" for n in (4096, 8192, 16384, 32768))
            ),
            fit_times,
        ),
        "statistics of sets": Target(
            mt.RoutingStatistics.from_trace(TRACE, window=5, sets=True).save,
            mt.RoutingStatistics.load,
        ),
    }
    for name, text in TOPOLOGIES.items():
        found[name] = Target(lambda path, text=text: path.write_text(text), mt.Topology.load)
    if find_spec("torch"):
        from moetuner.torch.collect import read_texts

        lines = '{"text": "one", "group": "a"}\n{"text": "two"}\n'
        found["texts"] = Target(
            lambda path: path.write_text(lines), lambda path: [*read_texts(path)]
        )
        for name in CHECKPOINT:
            found[f"checkpoint, {name}"] = Target(
                lambda path, name=name: write_checkpoint(path, name),
                lambda path, name=name: read_checkpoint(path, name),
            )
    return found


# --- damage

NUMBERS = ("0", "-1", "1", "7", "255", "65536", "1e308", "NaN", "-0.5", "9" * 30, "1e-320")
NUMBERS += tuple(str(2**bits + by) for bits in (16, 31, 32, 53, 63, 64) for by in (-1, 0, 1))
VALUES = (None, True, -1, 0, 2**31, 2**63, 2**64, 0.5, 1e308, "", "a\nb", [], [[]], {}, [0], "-1")


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, set, insert, delete, copy or cut bytes; most near the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        length = len(changed) if rng.random() < 0.5 else min(len(changed), 300)
        at, kind = rng.randrange(length + 1), rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            del changed[at : at + rng.randint(1, 16)]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
        else:
            del changed[at:]
    return bytes(changed)


def of_splice(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Go on with the end of another file."""
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def of_numbers(content: bytes, rng: random.Random) -> bytes:
    """Write other numbers where some stand in a text."""
    places = list(re.finditer(rb"-?\d+(?:\.\d+)?", content))
    for place in sorted(
        rng.sample(places, min(len(places), rng.randint(1, 3))), key=lambda m: -m.start()
    ):
        content = content[: place.start()] + rng.choice(NUMBERS).encode() + content[place.end() :]
    return content


def other_value(value: Any, rng: random.Random) -> Any:
    """Return JSON with another value, one more or one less at some place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        if rng.random() < 0.1:
            return {name: of for name, of in value.items() if name != key}
        if rng.random() < 0.05:
            return value | {rng.choice(string.ascii_letters): value[key]}
        return value | {key: other_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:at] + value[at + 1 :]
        if rng.random() < 0.05:
            return value + value
        return [*value[:at], other_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def of_json(content: bytes, rng: random.Random) -> bytes:
    """Change a value of the JSON that a file or one of its lines is."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    for parts, number in (([content], 0), (lines, at)):
        try:
            value = json.loads(parts[number])
        except (ValueError, RecursionError):
            continue
        parts = [*parts]
        parts[number] = json.dumps(other_value(value, rng)).encode()
        return b"\n".join(parts)
    return of_numbers(content, rng)


def of_header(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, whose length is right again."""
    length = int.from_bytes(content[:8], "little")
    header = of_json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def of_members(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Change a member of an archive, whose checksums are right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            member = old.read(name)
            if name == chosen:
                member = damaged(member, rng, others)
            if name != chosen or rng.random() < 0.95:
                new.writestr(name, member)
    return out.getvalue()


def damaged(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Return a file after some damage."""
    kind = rng.random()
    try:
        if content.startswith(b"PK") and kind < 0.6:
            return of_members(content, rng, others)
        if content[8:9] == b"{" and kind < 0.5:
            return of_header(content, rng)
    except (ValueError, zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
        pass
    if kind < 0.35 and content[:1] in (b"{", b"["):
        return of_json(content, rng)
    if kind < 0.5:
        return of_numbers(content, rng)
    return of_splice(content, rng, others) if kind < 0.6 else of_bytes(content, rng)


def complaint(target: Target, path: Path) -> str | None:
    """Read a file; return what is wrong with how that ended, None if nothing is."""
    try:
        target.read(path)
    except (ValueError, OSError) as error:
        try:
            check_line(error)
        except AssertionError:
            return f"{type(error).__name__} of {len(str(error))} characters: {str(error)[:300]!r}"
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        at = "" if where is None else f" at {where.tb_frame.f_code.co_filename}:{where.tb_lineno}"
        return f"{type(error).__name__}: {str(error)[:300]}{at}"
    return None


# --- solve


def drawn(rng: random.Random, corners: list[Any]) -> Any:
    """Return one of some corners."""
    return rng.choice(corners)


def random_statistics(rng: random.Random) -> mt.RoutingStatistics:
    """Return counts of few tokens or of very many, of any skew, with and without pairs and sets."""
    random_ = np.random.default_rng(rng.randrange(2**32))
    layers, experts = drawn(rng, [1, 1, 2, 3, 7]), drawn(rng, [1, 2, 3, 5, 8, 13, 16, 33])
    if rng.random() < 0.5:
        top_k = min(experts, drawn(rng, [1, 2, 3, experts]))
        tokens = drawn(rng, [0, 1, 2, 30, 200])
        score = random_.random((tokens, layers, experts)) + random_.random((layers, experts))
        ids = score.argsort(axis=2)[..., :top_k].astype(np.uint16)
        sequence = np.arange(tokens) // drawn(rng, [1, 5, 50])
        labels: dict[str, Any] = {"sequence": sequence, "group": sequence % 2}
        labels |= {"group_names": ["a", "b", "none"]}
        trace = trace_of(ids, experts, **labels)
        how = {name: rng.random() < 0.5 for name in ("sets", "transitions", "coactivation")}
        window = drawn(rng, [None, 1, 10, 1000])
        by_group = rng.random() < 0.3 and window is not None
        return mt.RoutingStatistics.from_trace(trace, window=window, by_group=by_group, **how)
    windows = drawn(rng, [1, 2, 5, 60])
    load = random_.lognormal(3, drawn(rng, [0, 1, 3]), (windows, layers, experts)).astype(np.uint64)
    largest = max(int(load.sum()), 1)
    load *= np.uint64(drawn(rng, [1, 1, 1, 2**62 // largest, 2**40 // largest + 1]))
    if rng.random() < 0.3:
        load[rng.randrange(windows)] = 0
    if rng.random() < 0.2:
        load[:, rng.randrange(layers)] = 0
    if rng.random() < 0.2:
        load[:, :, 0] *= np.uint64(0)
    return mt.RoutingStatistics.from_load(load)


def random_problem(rng: random.Random) -> mt.Problem:
    """Return a problem with rules from the corners; ValueError where they make no sense."""
    statistics = random_statistics(rng)
    layers, experts = statistics.layers, statistics.num_experts
    devices = drawn(rng, [1, 2, 3, 4, 6, 8, experts, experts + 1])
    fits = [size for size in range(1, devices + 1) if devices % size == 0]
    speed = [drawn(rng, [1.0, 1.02, 2.0]) for _ in range(devices)]
    topology = mt.Topology(
        devices,
        devices_per_node=rng.choice(fits) if rng.random() < 0.5 else None,
        speed=speed if rng.random() < 0.2 else None,
    )
    fewest = -(-experts // devices)
    unequal = [rng.randint(0, experts) for _ in range(devices)]
    slots = [{}, {}, {"slots_per_device": fewest}, {"slots_per_device": fewest + rng.randint(0, 3)}]
    slots += [{"slots_per_device": unequal}, {"extra_slots": rng.randint(0, 2 * layers * devices)}]

    def rules() -> list[Any]:
        return [
            (
                drawn(rng, [None, rng.randrange(layers)]),
                rng.randrange(experts),
                rng.randrange(devices),
            )
            for _ in range(drawn(rng, [0, 0, 1, 3]))
        ]

    return mt.Problem(
        statistics,
        topology,
        objective=drawn(rng, ["time", "balance", "traffic", None]),
        regime=drawn(rng, ["dispatch", "follow"]),
        split=drawn(rng, ["even", "nearest", "round_robin"]),
        max_imbalance=drawn(rng, [None, None, 1.0, 1.0 + 1e-9, 1.05, 2.0, np.inf, 1e300]),
        risk=drawn(rng, ["mean", "mean", 0.0, 0.5, 0.9, 0.999]),
        arrival=drawn(rng, ["bursts", "bursts", "mixed", 0.3]),
        groups=drawn(rng, [None, None, None, "minimax", {"a": 3.0}]),
        fill_slots=rng.random() < 0.2,
        pinned=rules(),
        forbidden=rules(),
        **drawn(rng, slots),
    )


def check_solve(rng: random.Random, *, timed: bool = False) -> str | None:
    """Solve a random problem; return what is wrong with the answer, None if nothing is.

    Where it is ``timed``, an answer long after its limit is wrong as well.
    """
    try:
        problem = random_problem(rng)
        method = drawn(rng, ["joint", "joint", "joint", "heuristic", *mt.solver.METHODS])
        given: dict[str, Any] = {"seed": rng.randrange(3), "threads": rng.randint(1, 2)}
        limit = drawn(rng, [None, None, 0, 0.02, 0.2])
        given |= {"iterations": drawn(rng, [0, 1, 50, 200])} if limit is None else {}
        given |= {"time_limit": limit, "gap": drawn(rng, [None, None, 0.0, 0.5])}
        if method in ("joint", "heuristic") and rng.random() < 0.3:
            given["initial"] = mt.solve(problem, "random").placement
            given["move_budget"] = drawn(rng, [None, 0, 1, 3.5, 1e9, np.inf])
            given["move_cost"] = drawn(rng, [0.0, 0.1, 1e9])
        begin = time.process_time()
        result = mt.solve(problem, method, **given)
    except ValueError as error:
        text = str(error)
        return f"ValueError: {text!r}" if not text or "\n" in text or len(text) > 600 else None
    seconds = time.process_time() - begin
    what = f"{method}, {given}, {problem}"
    broken = [line for line in problem.violations(result.placement) if "max_imbalance" not in line]
    searched = method in ("joint", "heuristic")
    if broken and searched and "initial" not in given:
        return f"{broken[0]}: {what}"
    if not np.isfinite(result.objective):
        return f"objective {result.objective}: {what}"
    is_above = result.bound is not None and result.bound > result.objective * (1 + 1e-9) + 1e-9
    if is_above and not result.details.caps.raised:
        return f"bound {result.bound} above {result.objective}: {what}"
    if result.certificate is not None:
        mt.verify(result.certificate, problem)
    json.dumps(result.to_dict(), allow_nan=False)
    if timed and limit is not None and seconds > 2 * limit + 2:  # of two threads, and of imports
        return f"{seconds:.1f} s of the processor for a limit of {limit}: {what}"
    return None


def folder_for_targets(folder: Path) -> Path:
    """Prepare a folder for files of all targets, and return the name that they take in turns."""
    write_tensorrt_about(folder, EXPERTS, TOP_K)
    return folder / "rank0.file"
