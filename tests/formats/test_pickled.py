"""Files of torch.save: what torch wrote is read without it, and nothing in them is run."""

import contextlib
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from damage import check_line, refused
from targets import HINTS

from moetuner.files.opened import Opened
from moetuner.formats import pickled, read_input

FOUR = {"0": np.arange(4, dtype="<i8").tobytes()}


def archive(path, description, storages=FOUR, byteorder=b"little", method=zipfile.ZIP_STORED):
    """Write an archive as torch.save lays it out."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a/data.pkl", description)
        file.writestr("a/byteorder", byteorder)
        for key, content in storages.items():
            file.writestr(f"a/data/{key}", content)
    return path


def tensor(shape, strides, offset=0, key="0", kind="LongStorage", count=4):
    """Write the description of a tensor, by hand: it may be one that torch would never write."""
    text = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
    text += b"X" + struct.pack("<I", 7) + b"storage"
    text += b"ctorch\n" + kind.encode() + b"\n"
    text += b"X" + struct.pack("<I", len(key)) + key.encode()
    text += b"X\x03\0\0\0cpu" + b"J" + struct.pack("<i", count) + b"tQ"
    text += b"J" + struct.pack("<i", offset)
    for sizes in (shape, strides):
        text += b"(" + b"".join(b"J" + struct.pack("<i", n) for n in sizes) + b"t"
    return text + b"\x89ccollections\nOrderedDict\n)RtR."


def test_what_torch_writes(tmp_path):
    """Containers, numbers, and tensors of all types and layouts, in every protocol."""
    torch = pytest.importorskip("torch")
    x = torch.arange(24).reshape(4, 6)
    tensors = {
        "plain": x,
        "transposed": x.t(),
        "strided": x[1:3, ::2],
        "expanded not": x[:1],
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([0.5, 2.0]).half(),
        "bfloat16": torch.tensor([1.5, -3.0], dtype=torch.bfloat16),
        "int8": torch.tensor([-1, 7], dtype=torch.int8),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    rest = {"n": None, "f": 1.5, "l": [1, 2, -3, 70000, 1 << 40], "t": (1, "é"), "b": True}
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pt"
        others = {"od": OrderedDict(a=1), "size": x.shape, "dev": torch.device("cpu")}
        torch.save(tensors | rest | others, path, pickle_protocol=protocol)
        assert pickled.is_pickled(Opened(path))
        actual = pickled.load(path)
        for name, wanted in tensors.items():
            wanted = wanted.float() if wanted.dtype == torch.bfloat16 else wanted
            array = actual[name].array()
            assert array.dtype == wanted.numpy().dtype
            assert array.shape == wanted.shape
            assert np.array_equal(array, wanted.numpy()), name
        assert {name: actual[name] for name in rest} == rest
        assert (actual["od"], actual["size"], actual["dev"]) == ({"a": 1}, (4, 6), "cpu")


def named(name, rest):
    """Write a description that names something, and goes on with it."""
    return b"\x80\x02c" + name + b"\n" + rest


# A description, or what an archive is made of, and what is said of it.
REFUSED = r"""
named(b"posix\nsystem", b")R.") | asks for posix.system
named(b"builtins\neval", b")R.") | asks for builtins.eval
named(b"torch\nload", b")R.") | asks for torch.load
named(b"torch._utils\n__builtins__", b")R.") | asks for torch._utils.__builtins__
named(b"numpy\nload", b")R.") | asks for numpy.load
named(b"torch\nLongStorage", b")R.") | does not write
named(b"torch\ndevice", b"X\x02\0\0\0abR.") | arguments must be a tuple
named(b"torch\nLongStorage", b"}b.") | asks to change an object
b"\x80\x02ix\nx\n." | pickle instruction
b"\x80\x02ox\nx\n." | pickle instruction
b"\x80\x02\x81x\nx\n." | pickle instruction
b"\x80\x02\x82x\nx\n." | pickle instruction
b"\x80\x02Px\nx\n." | pickle instruction
b"\x80\x02\x98x\nx\n." | pickle instruction
b"\x80\x020x\nx\n." | pickle instruction
b"\x80\x02X\x01\0\0\0aQ." | persistent ids must be storages
tensor((5,), (1,)) | storage 0 must have
tensor((4,), (1,), offset=1) | storage 0 must have
tensor((2,), (4,)) | storage 0 must have
tensor((1 << 30,), (0,)) | storage 0 must have
tensor((2, 2), (1,)) | must fit
tensor((-1,), (1,)) | must be sizes
tensor((2,), (-1,)) | must be sizes
tensor((2,), (1,), offset=-1) | must be sizes
tensor((1,), (1,), key="../0") | with a type and a key
tensor((1,), (1,), kind="BoolStorages") | asks for
tensor((1,), (1,)), {} | must have an entry a/data/0
tensor((1,), (1,)), FOUR, b"little", zipfile.ZIP_DEFLATED | compressed
tensor((1,), (1,)), FOUR, b"big" | byteorder must be
b"\x80\x02]q\0h\0a." | must not hold itself
b"\x80\x02]K\x01K\x02s." | only dicts take keys
b"\x80\x02](K\x01K\x02u." | only dicts take keys
b"\x80\x02}(K\x01u." | only dicts take keys
b"\x80\x02})\x85K\x01s." | keys must be texts or numbers
b"\x80\x02}]K\x01s." | keys must be texts or numbers
b"\x80\x02K\x01K\x02." | must leave one value
b"\x80\x02(K\x01." | must leave one value
b"\x80\x02]r\0\0\0\x7f." | one after the other
b"\x80\x02h\x05." | damaged description
b"\x80\x02]" | damaged description
tensor((1,), (1,))[:-1] + b"}b." | asks to change an object
tensor((1,), (1,))[:-1] + b"K\x01K\x02s." | only dicts take keys
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_no_plain_content_is_refused(tmp_path, case):
    """What would be called is named; tensors stay in their storages."""
    given, _, words = case.rpartition(" | ")
    given = eval(given, globals())
    path = archive(tmp_path / "a.pt", *(given if isinstance(given, tuple) else (given,)))
    refused(words, path, lambda: pickled.load(path))


def test_a_key_that_takes_for_ever_to_hash_is_refused(tmp_path):
    """Tuples of the same tuple twice, forty deep, are no key, although they take few bytes."""
    text = b"".join(b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(40))
    path = archive(tmp_path / "a.pt", b"\x80\x02]()q\0" + text + b"e}h\x28K\x01s\x86.")
    refused("keys must be texts or numbers", path, lambda: pickled.load(path))


def test_attributes_of_ordered_dicts_are_dropped(tmp_path):
    """A state dict's versions, which are attributes of it, are no content."""
    torch = pytest.importorskip("torch")
    saved = tmp_path / "a.pt"
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), saved)
    actual = pickled.load(saved)
    assert list(actual) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert actual["weight"].array().tolist() == [1, 1]


def test_every_instruction_is_known_or_refused(tmp_path):
    """No instruction of pickle's machine leads to anything but a value or one line."""
    for code in pickletools.opcodes:
        path = archive(tmp_path / "a.pt", b"\x80\x02(}]K\x01" + code.code.encode("latin-1") + b".")
        try:
            assert list(pickled.load(path)) == [{}, [], 1], code.name
        except ValueError as error:
            check_line(error)


def test_layouts_and_depths(tmp_path):
    """A tensor in any order; a part that is there a billion times; one in 20,000 others."""
    good = archive(tmp_path / "a.pt", tensor((2, 2), (1, 2)))
    assert pickled.load(good).array().tolist() == [[0, 2], [1, 3]]
    text = b"".join(b"]q%c(h%ch%ce" % (level + 1, level, level) for level in range(40))
    # The stack must end with one value: those below it are taken into a tuple.
    often = archive(tmp_path / "b.pt", b"\x80\x02(]q\0" + text + b"t.")
    refused("too often", often, lambda: pickled.load(often))
    deep = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    pickled.load(archive(tmp_path / "c.pt", deep))


@pytest.mark.parametrize(
    "code", [b"}", b"]", b")", b"N", b"(", b"N\x94", b"]\x94", b"M\0\x80", b"h\0"]
)
def test_memory_is_bounded_by_the_description(tmp_path, code):
    """Many short instructions that make large objects take at most 18 times the file."""
    text = b"\x80\x02]q\x00(" + code * (100_000 // len(code)) + b"tt."
    path = archive(tmp_path / "a.pt", text)
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        pickled.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 18 * path.stat().st_size + (1 << 22)


def test_long_lists_of_numbers_are_plain_content(tmp_path):
    """Ids of three bytes each, the most memory for honest content, are read."""
    ids = [{"input_ids": [*range(300, 60_000)]} for _ in range(5)]
    path = archive(tmp_path / "a.pt", pickle.dumps(ids, protocol=2))
    assert pickled.load(path) == ids


def test_other_files(tmp_path):
    """No archive, no description, two of them."""
    (tmp_path / "text").write_text("hello")
    np.savez(tmp_path / "a.npz", a=[1])
    for name, words in (
        ("text", "archive of torch.save: File is not a zip"),
        ("a.npz", "one data.pkl"),
    ):
        path = tmp_path / name
        assert not pickled.is_pickled(Opened(path))
        refused(words, path, lambda path=path: pickled.load(path))


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
