"""Damaged files of engines: a reader gives a valid object, or says in one line what is wrong."""

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import random_ids
from damage import check_line, check_reading, damaged, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import moetuner as mt
from moetuner.formats import READERS, WRITERS, read_input
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout

# Many more examples than elsewhere: most take a millisecond.
MORE = 3
EXPERTS, LAYERS, TOP_K = 16, 2, 2
IDS = random_ids(12, LAYERS, TOP_K, 6)
PLACEMENT = mt.Placement([[[0, 1, 2], [3, 4, 5]], [[5, 1, 2], [3, 4, 0]]], num_experts=6)
GOLDEN = Path(__file__).parent / "golden"
HINTS = Hints(num_experts=EXPERTS, top_k=4)


def trace_lines():
    for layer in range(LAYERS):
        top = IDS[:, layer].tolist()
        about = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
        yield json.dumps(about | {"num_tokens": 12, "topk": TOP_K, "top_indices": top})


def csv_lines():
    yield "token,layer,expert,sequence,group"
    for token, layer, k in np.ndindex(*IDS.shape):
        yield f"{token},{layer},{IDS[token, layer, k]},{token // 4},{'ab'[token // 8]}"


def response():
    file = io.BytesIO()
    np.save(file, IDS)
    return json.dumps({"choices": [{"routed_experts": base64.b64encode(file.getvalue()).decode()}]})


def write(name, path):
    """Write a small valid file; meta_info.json is beside it."""
    arrays = {
        "replay": dict(zip(["arr_0", "arr_1"], np.moveaxis(IDS, 1, 0).astype(int), strict=True)),
        "deepspeed": {f"layers.{n}.tokens_per_expert": np.arange(16.0) for n in range(2)},
        "vllm-ascend": {
            "expert_workload": np.arange(64).reshape(2, 2, 16),
            "current_expert_table": np.arange(64).reshape(2, 2, 16) % EXPERTS,
        },
    }
    texts = {
        "megatron": lambda: "\n".join(trace_lines()) + "\n",
        "csv": lambda: "\n".join(csv_lines()) + "\n",
        "vllm": lambda: f"{response()}\n{response()}",
    }
    if name in arrays:
        with path.open("wb") as file:
            np.savez(file, **arrays[name])
    elif name in texts:
        path.write_text(texts[name]())
    elif name == "tensorrt-llm":
        save_file({f"3_{layer}": np.arange(EXPERTS) for layer in range(LAYERS)}, path)
    elif name == "ascend map":
        WRITERS["vllm-ascend"].of.write_map(PLACEMENT, path, Hints())
    elif name == "arrow":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"experts": IDS.tolist(), "sequence": range(12)}), path)
    else:
        path.write_bytes((GOLDEN / name).read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    about = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
    (folder / "meta_info.json").write_text(json.dumps(about))
    return folder


def check(path, content, reader):
    return check_reading(path, content, lambda path: read_input([path], HINTS, reader))


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("megatron", None),
        ("replay", "megatron"),
        ("tensorrt-llm", "tensorrt-llm"),
        ("deepspeed", "deepspeed"),
        ("vllm", None),
        ("vllm-ascend", "vllm-ascend"),
        ("ascend map", "vllm-ascend"),
        ("csv", None),
        ("arrow", "arrow"),
        ("sglang/one-rank-per_token-0.pt", "sglang"),
        ("sglang/responses.json", "sglang-responses"),
    ],
)
def test_damaged_files(folder, name, reader):
    """Bits flipped, bytes set, inserted, deleted and copied, files cut."""
    path = folder / "rank0.file"
    write(name, path)
    content = path.read_bytes()
    assert check(path, content, reader) or name == "ascend map"
    check(path, damaged(content, [("delete", 0.5, b"\0")]), reader)
    survives(content, lambda content: check(path, content, reader), times=MORE)


scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
keys = ["step", "stage", "block", "layer", "rank", "num_tokens", "topk", "top_indices"]


@settings(max_examples=settings().max_examples * MORE)
@given(st.lists(st.dictionaries(st.sampled_from(keys), values, max_size=3), max_size=4))
def test_router_trace_of_anything(folder, changes):
    """Well-formed lines that make no sense."""
    lines = [json.loads(line) for line in trace_lines()] * 2
    content = "\n".join(json.dumps(line | c) for line, c in zip(lines, changes, strict=False))
    check(folder / "rank0.file", content.encode() or b"\n", "megatron")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_damaged_maps(folder, name):
    """A map as it stands, or one line that says what is wrong with it."""
    path, of = folder / "map", WRITERS[name].of
    of.write_map(PLACEMENT, path, Hints(dense_layers=()))

    def attempt(content):
        path.write_bytes(content)
        try:
            of.recognises_map(path)
            layout = of.read_map(path, Hints())
            assert isinstance(layout, Layout)
            assert layout.experts.dtype == np.int64
            layout.placement(Hints(num_experts=6, devices=2))
            assert mt.read_placement(path, devices=2).slots.dtype == np.int32
        except ValueError as error:
            check_line(error)

    survives(path.read_bytes(), attempt, times=MORE)


@pytest.mark.parametrize("reader", sorted(READERS))
def test_readers_refuse_what_is_no_file(tmp_path, reader):
    """An empty folder, an empty file, a file that is not there: one line names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").touch()
    for path in (tmp_path / "empty", tmp_path / "nothing", tmp_path / "absent"):
        with pytest.raises((ValueError, OSError), match=r"^[^\n]+$") as caught:
            read_input([path], HINTS, reader)
        assert str(tmp_path) in str(caught.value)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("reader", [None, "megatron", "deepspeed", "vllm-ascend"])
def test_pickles_that_run_code_are_refused(tmp_path, reader):
    """Neither telling a file's format nor reading it runs what is in it."""
    path, mark = tmp_path / "counts_rank0.pt", tmp_path / "ran"
    for content in (Evil(mark), {"layers.0.tokens_per_expert": Evil(mark)}, [Evil(mark)]):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("archive/version", "3\n")
        for source in (path, tmp_path):
            with pytest.raises((ValueError, IsADirectoryError), match=r"^[^\n]+$"):
                read_input([source], HINTS, reader)
        assert not mark.exists()
