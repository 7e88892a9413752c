"""Damaged files and nonsense: a reader gives a valid object, or says in one line what is wrong."""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from damage import check_line, check_reading, damaged, survives
from engines_files import write_tensorrt_about
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import (
    ARCHIVES,
    BYTES,
    DUMPS,
    EXPERTS,
    HINTS,
    IDS,
    PLACEMENT,
    TOP_K,
    TRACE_LINES,
    WRITTEN,
    write,
)

import moetuner as mt
from moetuner.formats import READERS, WRITERS, pickled, read_input, sglang
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout, faults

# Many more examples than elsewhere: most take a millisecond.
MORE = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    write_tensorrt_about(folder, EXPERTS, TOP_K)
    return folder


def check(path, content, reader=None):
    return check_reading(path, content, lambda path: read_input([path], HINTS, reader))


NAMED = {"replay": "megatron", "parquet": "arrow", "ascend map": "vllm-ascend"}
LINE_FORMS = ("lines per token", "lines per sequence")
GIVEN = ("tensorrt-llm", "deepspeed", "vllm-ascend", "arrow")


@pytest.mark.parametrize("name", [*ARCHIVES, *BYTES, *WRITTEN, "parquet", "arrow", *DUMPS])
def test_damaged_files(folder, name):
    """Bits flipped, bytes set, inserted, deleted and copied, files cut."""
    path = folder / "rank0.file"
    write(name, path)
    content = path.read_bytes()
    reader = NAMED.get(name, name if name in GIVEN else None)
    assert check(path, content, reader) or name == "ascend map"
    if name in (*BYTES, "replay", "npz", "trace", *LINE_FORMS, "parquet", "arrow"):
        trace = read_input([path], HINTS, reader)
        ids = np.concatenate([IDS] * (trace.tokens // len(IDS)))
        assert np.array_equal(np.sort(trace.expert_ids), np.sort(ids))
    check(path, damaged(content, [("delete", 0.5, b"\0")]), reader)
    survives(content, lambda content: check(path, content, reader), times=MORE)


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\1\0", b'{"']))
def test_random_bytes(folder, content, start):
    """Bytes that only begin like a format."""
    check(folder / "file", start + content)


scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
scalars |= st.integers() | st.sampled_from(["AAAA", "=", "k05VTVBZAQB2AHsn"])
# Of every form of JSON: its keys, and lines that they are put into.
KEYS = {
    None: "experts tokens sequence group num_experts model group_names",
    "megatron": "step stage block layer rank num_tokens topk top_indices",
    "vllm": "choices routed_experts usage prompt_tokens",
    "sglang-responses": "choices meta_info sglext routed_experts usage prompt_tokens "
    "completion_tokens",
    "maps": "num_slots initial_global_assignments layer_updates_per_iter 0 1 "
    "physical_to_logical_map layer_list moe_layer_count device_list",
}
LINES = {
    None: [{"num_experts": 8}, *({"experts": [[n, 2], [3, 4]]} for n in (0, 1))],
    "megatron": [json.loads(line) for line in TRACE_LINES] * 2,
}


@st.composite
def nonsense(draw, form):
    """Draw JSON of the right keys and any values."""
    keys = st.sampled_from(KEYS[form].split())
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )
    changes = draw(st.lists(st.dictionaries(keys, values, max_size=5), min_size=1, max_size=4))
    lines = LINES.get(form, [{}])
    return "\n".join(json.dumps(line | c) for line, c in zip(lines, changes, strict=False))


# Maps that are text; their readers name the file themselves.
TEXTS = ("sglang", "tensorrt-llm", "vllm-ascend")


def check_map(path, content, name):
    """Read a map: it has a layout, of which something may be wrong, or one line says what is."""
    path.write_bytes(content)
    writer, within = WRITERS[name], path if name in TEXTS else ""
    try:
        writer.module.recognises_map(path)
        layout = writer.module.read_map(path, Hints())
        assert isinstance(layout, Layout)
        assert layout.experts.dtype == np.int64
        hints = Hints(devices=2, hidden_layers=3, dense_layers=(0,))
        assert all("\n" not in fault for fault in faults(layout, writer.engine, hints))
        within = ""
        layout.placement(Hints(num_experts=6, devices=2))
        assert mt.read_placement(path, devices=2).slots.dtype == np.int32
    except ValueError as error:
        check_line(error, within)


@pytest.mark.parametrize("form", KEYS)
def test_nonsense(folder, form):
    """Well-formed lines and maps that make no sense."""
    path = folder / "rank0.file"

    @settings(max_examples=settings().max_examples * MORE)
    @given(nonsense(form))
    def run(text):
        if form != "maps":
            check(path, text.encode(), form)
            return
        for name in TEXTS:
            check_map(path, text.encode(), name)

    run()


def tensors(path):
    """Tensors of small sizes and any types, whose numbers are where the file begins."""
    sizes = st.lists(st.integers(0, 4), max_size=4).map(tuple)

    def make(dtype, shape):
        steps = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
        return pickled.Tensor(path, dtype, shape, steps, 0)

    return st.builds(make, st.sampled_from(sorted(pickled.STORAGES.values())), sizes)


def test_nonsense_of_dumps(tmp_path, monkeypatch):
    """Dumps of SGLang with the right keys and any values."""
    path = tmp_path / "d.pt"
    value = scalars | tensors(path) | st.lists(st.integers(-1, 5), max_size=4)
    keys = ["forward_pass_id", "rank", "gatherer_key", "global_physical_count", "positions"]
    keys += ["input_ids", "extend_seq_lens", "topk_ids_of_layer"]
    record = st.dictionaries(st.sampled_from(keys), value, max_size=8).map(
        lambda fields: {"forward_pass_id": 0, "rank": 0, **fields}
    )
    records = st.lists(record, max_size=3) | value
    fields = {"logical_count": value, "records": records, sglang.LAST_MAP: value}

    @settings(max_examples=settings().max_examples * 5)
    @given(st.fixed_dictionaries({}, optional=fields) | value)
    def run(content):
        monkeypatch.setattr(pickled, "load", lambda _: content)
        check_reading(path, bytes(4096), lambda path: sglang.read([path], HINTS))

    run()


sizes = st.one_of(
    st.integers(-2, 12), st.sampled_from([1 << 31, 1 << 63, 1 << 64, 1 << 200, 2.5, None])
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "U16", "I64", "F32", "BF16", "", 3]),
        "shape": st.one_of(st.lists(sizes, max_size=4), st.none()),
        "data_offsets": st.one_of(st.lists(sizes, max_size=3), st.just([0, 24]), st.none()),
    },
)
about = st.dictionaries(
    st.sampled_from(["format", "version", "num_experts", "group_names", "window"]),
    st.sampled_from(["moetuner.trace", "moetuner.statistics", "1", "8", "[]", "null", "-1"]),
)
headers = st.dictionaries(
    st.sampled_from(["expert_ids", "load", "sequence", "group", "transitions", "__metadata__"]),
    st.one_of(entries, about, st.none()),
)


@settings(max_examples=settings().max_examples * 2 * MORE)
@given(headers, st.integers(0, 40), st.none() | st.integers(0, 1 << 64))
def test_random_safetensors_headers(folder, header, size, length):
    """Well-formed headers that make no sense."""
    text = json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length % (1 << 64))
    check(folder / "file", start + text + bytes(range(size)))


@settings(max_examples=settings().max_examples * 2 * MORE)
@given(
    st.sampled_from(["|u1", "<u2", ">i4", "<f8", "|b1", "<U3", "|O", "|V8", "<c16", "|S3", "<m8"]),
    st.booleans(),
    st.lists(st.integers(0, 6) | st.sampled_from([1 << 40, 1 << 62, 10**30]), max_size=5),
    st.integers(0, 300),
)
def test_random_npy_headers(folder, descr, fortran, shape, size):
    """Any element type and shape over any number of bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}".encode()
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text))
    check(folder / "file", start + text + bytes(i % 7 for i in range(size)))


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_damaged_maps(folder, name):
    """A map as it stands, or one line that says what is wrong with it."""
    path = folder / "map"
    WRITERS[name].module.write_map(PLACEMENT, path, Hints(dense_layers=()))
    survives(path.read_bytes(), lambda content: check_map(path, content, name), times=MORE)


@pytest.mark.parametrize("reader", [None, *sorted(READERS)])
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
