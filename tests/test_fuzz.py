"""Every reader and solve, fed with damage: a result, or one line; bench/faults.py goes on for long.

Seeds are fixed, so that the same files and problems come every time.
"""

import json
import random
import struct

import numpy as np
import pytest
from damage import check_reading
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import HINTS, IDS, check_solve, complaint, damaged, folder_for_targets, targets

from moetuner.formats import read_input

TARGETS = targets()
CASES, PROBLEMS = 80, 10


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Name for files in a folder, and the content of a valid one of every kind."""
    path = folder_for_targets(tmp_path_factory.mktemp("fuzz"))
    content = {}
    for name, target in TARGETS.items():
        target.make(path)
        content[name] = path.read_bytes()
    return path, content


@pytest.mark.parametrize("name", TARGETS)
def test_readers_survive(valid, name):
    """What is valid is read; what is damaged is read as something valid, or refused in a line."""
    path, content = valid
    rng, others = random.Random(name), [*content.values()]
    path.write_bytes(content[name])
    if name != "ascend map":  # which is no recording
        TARGETS[name].read(path)
    for _ in range(CASES // 10 if name == "times" else CASES):  # a fit takes a tenth of a second
        case = damaged(content[name], rng, others)
        path.write_bytes(case)
        found = complaint(TARGETS[name], path)
        assert found is None, (found, case[:2000])


RECORDINGS = ("megatron", "csv", "vllm", "npy", "npy wide", "npy columns", "replay", "npz", "trace")


@pytest.mark.parametrize("name", [*RECORDINGS, "lines per token", "lines per sequence"])
def test_what_is_valid_has_its_ids(valid, name):
    """Every form of a recording has the same ids, whatever order a token's experts are in."""
    path, content = valid
    path.write_bytes(content[name])
    trace = read_input([path], HINTS, "megatron" if name == "replay" else None)
    ids = np.concatenate([IDS] * (trace.tokens // len(IDS)))
    assert np.array_equal(np.sort(trace.expert_ids), np.sort(ids))


@settings(max_examples=settings().max_examples * 2)
@given(
    st.sampled_from(["|u1", "<u2", ">i4", "<f8", "|b1", "<U3", "|O", "|V8", "<c16", "|S3", "<m8"]),
    st.booleans(),
    st.lists(st.integers(0, 6) | st.sampled_from([1 << 40, 1 << 62, 10**30]), max_size=5),
    st.integers(0, 300),
)
def test_headers_of_arrays_that_make_no_sense(valid, descr, fortran, shape, size):
    """Any element type and shape over any number of bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}".encode()
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text))
    path, content = valid[0], start + text + bytes(i % 7 for i in range(size))
    check_reading(path, content, lambda path: read_input([path], HINTS))


def header_of(shape, kind="<i4"):
    """Give an .npy file of this shape, with the bytes of a small one."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(96)


# What once ended in another error, by target.
FOUND = [
    ("npy", lambda _: header_of((12, 2**31, 2))),
    ("npy", lambda _: header_of((12, 2**31, 2**31))),
    ("npy", lambda _: header_of((2**31 - 1, 2, 0), "<i8")[:-96]),
    ("times", lambda valid: valid + b"1" * (1 << 18) + b",1,1\n"),
    ("certificate", lambda valid: of_metadata(valid, "fingerprint", "a\nb")),
    ("certificate", lambda valid: of_metadata(valid, "regime", "a\nb")),
]


def of_metadata(valid, key, value):
    """Give a safetensors file with another text in its metadata."""
    length = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + length])
    header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + valid[8 + length :]


@pytest.mark.parametrize(("name", "case"), FOUND)
def test_what_was_found_is_refused(valid, name, case):
    """In one line, and without the memory that a file only says it needs."""
    path, content = valid
    path.write_bytes(case(content[name]))
    assert complaint(TARGETS[name], path) is None
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        TARGETS[name].read(path)


@pytest.mark.parametrize("seed", range(8))
def test_solve_survives(seed):
    """Problems from the corners are solved truly, or refused in a line."""
    rng = random.Random(seed)
    for _ in range(PROBLEMS):
        found = check_solve(rng)
        assert found is None
