"""Damaged files: a reader gives a valid object, or says in one line what is wrong. Nothing else."""

import io
import json
import struct

import numpy as np
import pytest
from conftest import random_ids
from damage import check_reading, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from recorded import write_lines

import moetuner as mt
from moetuner.formats import open_input

# Many more examples than elsewhere: each takes about a millisecond.
MORE = 10


def check(path, content, **arguments):
    check_reading(path, content, lambda path: open_input(path, **arguments))


def samples(tmp_path):
    """Small valid files of every format."""
    ids = random_ids(12, 2, 2, 6)
    labels = {
        "sequence": np.arange(12) // 4,
        "group": np.arange(12) // 8,
        "group_names": ["a", "b"],
    }
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=6, model="m", **labels)
    path = tmp_path / "sample.safetensors"
    trace.save(path)
    actual = {"trace": path.read_bytes()}
    counted = mt.RoutingStatistics.from_trace(trace, window=5)
    counted.save(path)
    actual["statistics"] = path.read_bytes()
    for per in ("token", "sequence"):
        write_lines(trace, path, per)
        actual[f"lines per {per}"] = path.read_bytes()
    for name, save, arrays in (
        ("npz", np.savez, {"expert_ids": ids, "num_experts": 6, "model": "m", **labels}),
        ("npz deflated", np.savez_compressed, {"expert_ids": ids, "num_experts": 6, **labels}),
        (
            "table",
            np.savez,
            {"load": counted.window_load, "group": [0, 1, 0], "group_names": ["a", "b"]},
        ),
    ):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        actual[name] = buffer.getvalue()
    for name, array in (
        ("npy", ids),
        ("npy wide", ids.astype(">i4")),
        ("npy columns", np.asfortranarray(ids)),
    ):
        buffer = io.BytesIO()
        np.save(buffer, array)
        actual[name] = buffer.getvalue()
    return actual


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder / "file", samples(folder)


LINES = ("lines per token", "lines per sequence")
ARRAYS = ("npz", "npz deflated", "npy", "npy wide", "npy columns")


@pytest.mark.parametrize("name", ["trace", "statistics", "table", *LINES, *ARRAYS])
def test_damaged_files(files, name):
    """Bits flipped, bytes set, inserted, deleted and copied, files cut."""
    path, contents = files
    given_too = {"num_experts": 6} if name.startswith("npy") else {}
    check(path, contents[name], **given_too)
    survives(contents[name], lambda content: check(path, content, **given_too), times=MORE / 2)


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\1\0", b'{"']))
def test_random_bytes(files, content, start):
    """Bytes that only begin like a format."""
    check(files[0], start + content, num_experts=8)


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
headers = st.dictionaries(
    st.sampled_from(["expert_ids", "load", "sequence", "group", "transitions", "__metadata__"]),
    st.one_of(
        entries,
        st.dictionaries(
            st.sampled_from(["format", "version", "num_experts", "group_names", "window"]),
            st.sampled_from(
                ["moetuner.trace", "moetuner.statistics", "1", "8", "[]", "null", "-1"]
            ),
        ),
        st.none(),
    ),
)


@settings(max_examples=settings().max_examples * MORE)
@given(headers, st.integers(0, 40), st.none() | st.integers(0, 1 << 64))
def test_random_safetensors_headers(files, header, size, length):
    """Well-formed headers that make no sense."""
    text = json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length % (1 << 64))
    check(files[0], start + text + bytes(range(size)))


@settings(max_examples=settings().max_examples * MORE)
@given(
    st.sampled_from(["|u1", "<u2", ">i4", "<f8", "|b1", "<U3", "|O", "|V8", "<c16", "|S3", "<m8"]),
    st.booleans(),
    st.lists(st.integers(0, 6) | st.sampled_from([1 << 40, 1 << 62, 10**30]), max_size=5),
    st.integers(0, 300),
)
def test_random_npy_headers(files, descr, fortran, shape, size):
    """Any element type and shape over any number of bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}".encode()
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text))
    check(files[0], start + text + bytes(i % 7 for i in range(size)), num_experts=7)


scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
keys = ["experts", "tokens", "sequence", "group", "num_experts", "model", "group_names"]


@settings(max_examples=settings().max_examples * MORE)
@given(st.lists(st.dictionaries(st.sampled_from(keys), values, max_size=4), max_size=4))
def test_random_lines(files, lines):
    """Well-formed lines that make no sense."""
    check(files[0], "\n".join(json.dumps(line) for line in lines).encode() or b"\n")


@settings(max_examples=settings().max_examples * MORE)
@given(
    hnp.arrays(
        hnp.integer_dtypes(endianness="?") | hnp.unsigned_integer_dtypes(endianness="?"),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    ),
    st.integers(-1, 300),
)
def test_from_arrays_agrees_with_numpy(ids, experts):
    """The validator accepts exactly the arrays that follow the rules."""
    right = (
        ids.ndim == 3
        and ids.shape[1] > 0
        and 1 <= ids.shape[2] <= experts
        and bool(((ids >= 0) & (ids < experts)).all())
        and bool((np.diff(np.sort(ids, axis=2)) != 0).all())
    )
    if right:
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
        assert np.array_equal(trace.expert_ids, ids)
    else:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            mt.RoutingTrace.from_arrays(ids, num_experts=experts)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 1 << 20), st.data())
def test_validator_finds_the_first_fault(experts, top_k, seed, data):
    """One fault in a long shard, at any place and top-k, is the one that is named."""
    top_k = min(top_k, experts)
    ids = random_ids(300, 2, top_k, experts, seed=seed, dtype=np.uint16)
    token, layer = data.draw(st.integers(0, 299)), data.draw(st.integers(0, 1))
    k = data.draw(st.integers(0, top_k - 1))
    twice = top_k > 1 and data.draw(st.booleans())
    ids[token, layer, k] = ids[token, layer, k - 1] if twice else experts
    ids[token + 1 :, 1, 0] = 65535
    with pytest.raises(ValueError, match=f"^expert_ids: token {token}, layer {layer}: ") as caught:
        mt.RoutingTrace.from_arrays(ids, num_experts=experts)
    assert ("appears twice" if twice else f"id {experts} is not below") in str(caught.value)
