"""CSV, Parquet and Arrow: traces and counts, whatever the order of rows and columns."""

import sys
from functools import partial

import numpy as np
import pytest
from damage import refused
from engines_files import save_table as as_arrow
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of

import moetuner as mt
from moetuner.formats import arrow, csv, find_reader

LAYERS = (2, 5, 7)


def rows_of(ids):
    """One row for every choice of ids [T,L,K]."""
    return [
        {"token": t, "layer": LAYERS[layer], "expert": int(expert), "sequence": t // 3}
        for t, of in enumerate(ids)
        for layer, experts in enumerate(of)
        for expert in experts
    ]


def write(path, rows, names=None, separator=","):
    names = names or list(rows[0])
    lines = [separator.join(names), *(separator.join(str(r[n]) for n in names) for r in rows)]
    path.write_text("\n".join(lines) + "\n")


@given(st.integers(0, 1 << 30), st.permutations(["token", "layer", "expert", "sequence"]))
def test_rows_in_any_order(tmp_path_factory, seed, names):
    """Columns may stand in any order, and rows of different tokens and layers may be mixed."""
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    ids = random_ids(10, 3, 2, 8, seed=seed % 1000)
    rows = rows_of(ids)
    order = np.random.default_rng(seed).permutation(len(rows))
    write(path, [rows[at] for at in order], names, ",;\t"[seed % 3])
    assert find_reader(path) == "csv"
    actual = mt.open_input(path, num_experts=8)
    first = list(dict.fromkeys(rows[at]["token"] for at in order))
    assert np.array_equal(np.sort(actual.expert_ids), np.sort(ids[first]))
    assert actual.sequence.tolist() == [token // 3 for token in first]


def test_tokens_of_sequences(tmp_path, monkeypatch):
    """Tokens may be counted anew in every sequence; batches of lines do not show."""
    monkeypatch.setattr(csv, "BLOCK", 50)
    path = tmp_path / "rows.csv"
    ids = random_ids(9, 3, 2, 8)
    rows = [row | {"token": row["token"] % 3} for row in rows_of(ids)]
    write(path, [row | {"group": "a b" if row["sequence"] else "c"} for row in rows])
    actual = mt.open_input(path, num_experts=8)
    assert np.array_equal(actual.expert_ids, ids)
    assert actual.group_names == ("c", "a b")
    assert actual.group.tolist() == [0] * 3 + [1] * 6


def test_counts(tmp_path):
    """Without tokens rows are counts, with a weight or of one, in windows by group."""
    path = tmp_path / "rows.csv"
    path.write_text("layer,expert\n3,0\n3,0\n4,1\n")
    assert mt.open_input(path).window_load.tolist() == [[[2, 0], [0, 1]]]
    path.write_text("\tlayer\texpert\n0\t3\t0\n1\t4\t1\n")  # with pandas' index, without a name
    assert mt.open_input(path).window_load.tolist() == [[[1, 0], [0, 1]]]
    path.write_text('group,"layer",weight,expert\na,3,5,0\nb,3,2,1\na,4,0,1\n')
    actual = mt.open_input(path, num_experts=3)
    assert actual.window_load.tolist() == [[[5, 0, 0], [0, 0, 0]], [[0, 2, 0], [0, 0, 0]]]
    assert actual.group_names == ("a", "b")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("form", ["experts", "fixed", "rows"])
def test_arrow(tmp_path, suffix, form):
    """Tokens as lists, as lists of a fixed size, or row by row."""
    pyarrow = pytest.importorskip("pyarrow")
    ids = random_ids(10, 3, 2, 8)
    labels = {
        "sequence": [t // 3 for t in range(10)],
        "group": ["a" if t < 6 else "b" for t in range(10)],
    }
    if form == "rows":
        rows = [row | {"group": labels["group"][row["token"]]} for row in rows_of(ids)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
    else:
        lists = ids.tolist()
        if form == "fixed":
            kind = pyarrow.list_(pyarrow.list_(pyarrow.int16(), 2), 3)
            lists = pyarrow.array(lists, kind)
        columns = {"experts": lists, **labels}
    path = tmp_path / f"t.{suffix}"
    as_arrow(path, columns)
    assert find_reader(path) == "arrow"
    actual = mt.open_input(path, num_experts=8)
    assert np.array_equal(actual.expert_ids, ids)
    assert actual.sequence.tolist() == labels["sequence"]
    assert [actual.group_names[g] for g in actual.group] == labels["group"]


def test_arrow_may_say_how_many_experts(tmp_path):
    """Metadata of the schema name the experts; without, they must be given."""
    path = tmp_path / "t.parquet"
    as_arrow(path, {"experts": [[[0, 1]], [[2, 3]]]}, {"num_experts": "5"})
    assert mt.open_input(path).num_experts == 5
    as_arrow(path, {"experts": [[[0, 1]], [[2, 3]]]})
    with pytest.raises(ValueError, match="num_experts is needed: the file does not say it"):
        mt.open_input(path)


def test_offsets_that_point_outside(tmp_path):
    """A corrupt offset of a text column is an error, not a read outside of the file."""
    path = tmp_path / "t.arrow"
    columns = {"experts": [[[1, 2]]] * 40, "sequence": range(40), "group": ["a", "b"] * 20}
    pytest.importorskip("pyarrow.feather").write_feather(
        pytest.importorskip("pyarrow").table(columns), path, compression="uncompressed"
    )
    content = bytearray(path.read_bytes())
    at = content.rfind(np.arange(5, dtype="<i4").tobytes())
    content[at + 60 : at + 64] = (2949127).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.arrow: damaged file: "):
        mt.open_input(path, num_experts=8)


@pytest.mark.parametrize("form", ["parquet", "lz4", "zstd", "texts"])
def test_bombs(tmp_path, form):
    """What would unpack to far more than routing does is refused before it is unpacked."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, zeros = tmp_path / "t.arrow", pyarrow.array(np.zeros(1 << 21, "i8"))
    table = pyarrow.table({"layer": zeros, "expert": zeros, "weight": zeros, "group": zeros})
    if form == "parquet":
        parquet.write_table(table, path, compression="zstd")
    elif form == "texts":
        # Few bytes, since a dictionary holds the one text, and not too many rows.
        long = pyarrow.DictionaryArray.from_arrays(np.zeros(1 << 15, "i4"), ["x" * (1 << 20)])
        few = zeros[: 1 << 15]
        table = pyarrow.table({"layer": few, "expert": few, "group": long})
        parquet.write_table(table, path, compression="zstd", store_schema=False)
    else:
        pytest.importorskip("pyarrow.feather").write_feather(
            pyarrow.concat_tables([table] * 3), path, compression=form, chunksize=1 << 20
        )
    before = pyarrow.total_allocated_bytes()
    pool = pyarrow.default_memory_pool()
    if form == "texts":
        actual = mt.open_input(path, num_experts=8)
        assert actual.group_names == ("x" * (1 << 20),)
    else:
        with pytest.raises(ValueError, match="write it without compression"):
            mt.open_input(path, num_experts=8)
    del table, zeros
    assert pyarrow.total_allocated_bytes() <= before
    assert pool.max_memory() < 1 << 30


def varint(number):
    """Write an integer of at least 0 as Thrift's compact protocol does."""
    number, written = number << 1, b""
    while number > 127:
        written, number = written + bytes([number & 127 | 128]), number >> 7
    return written + bytes([number])


def one_in(length):
    """Write 1 so in as many bytes as a larger integer has."""
    return bytes([0x82] + [0x80] * (length - 2) + [0])


def with_footer(path, old, new):
    """Replace bytes in the footer of a Parquet file, as often as they occur, by as many others."""
    data = path.read_bytes()
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert len(old) == len(new)
    assert old in data[at:]
    path.write_bytes(data[:at] + data[at:].replace(old, new))


@pytest.mark.parametrize("lie", ["name", "values", "size"])
def test_a_footer_that_lies(tmp_path, lie):
    """What the pages unpack to counts: lists of any name, and sizes that the footer hides."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, number = tmp_path / "t.parquet", 1 << 25
    if lie == "size":
        texts = [letter * (1 << 22) for letter in "abcdefghijklmnopqrstuvwxyz"]
        table = pyarrow.table({"experts": [[[0, 1]]] * len(texts), "group": texts})
        how = {"use_dictionary": False, "write_statistics": False}
        parquet.write_table(table, path, compression="zstd", **how)
        size = parquet.read_metadata(path).row_group(0).column(1).total_uncompressed_size
        with_footer(path, varint(size), one_in(len(varint(size))))
    else:
        # One token with a list of many equal experts.
        column = pyarrow.array(np.zeros(number, np.int32))
        for length in (number, 1):
            ends = pyarrow.array([0, length], pyarrow.int32())
            column = pyarrow.ListArray.from_arrays(ends, column)
        parquet.write_table(pyarrow.table({"experts": column}), path, compression="zstd")
        del column
        if lie == "name":
            with_footer(path, b"\x04list", b"\x04bags")
        else:
            with_footer(path, varint(number), one_in(len(varint(number))))
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match="write it without compression"):
        mt.open_input(path, num_experts=16)
    assert pyarrow.default_memory_pool().max_memory() <= max(before, 1 << 28)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_have_what_an_honest_footer_says(tmp_path, version):
    """Of every column: as many values, and as many bytes but for the headers."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids = random_ids(5000, 3, 2, 8)
    columns = {"experts": ids.tolist(), "group": [f"g{n % 7}" for n in range(5000)]}
    columns["sequence"] = np.arange(5000) // 10
    path = tmp_path / "t.parquet"
    how = {"data_page_version": version, "data_page_size": 4096, "row_group_size": 2000}
    parquet.write_table(pyarrow.table(columns), path, compression="zstd", **how)
    about, size = parquet.read_metadata(path), path.stat().st_size
    with path.open("rb") as file:
        for group in map(about.row_group, range(about.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                pages = [*arrow._pages(file, column, size)]
                assert sum(page.values for page in pages) == column.num_values
                unpacked = sum(page.unpacked for page in pages)
                assert 0 < column.total_uncompressed_size - unpacked < 200 * len(pages)
    assert np.array_equal(mt.open_input(path, num_experts=8).expert_ids, ids)


def test_texts_that_repeat_the_one_before(tmp_path):
    """They unpack to any length from few bytes, so they are refused by name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"experts": [[[0, 1]]] * 4, "group": ["x" * 99] * 4})
    how = {"use_dictionary": False, "column_encoding": {"group": "DELTA_BYTE_ARRAY"}}
    parquet.write_table(table, path, **how)
    with pytest.raises(ValueError, match="column group must have another encoding than DELTA_BYTE"):
        mt.open_input(path, num_experts=8)


def test_without_pyarrow(tmp_path, monkeypatch):
    """The message names the extra to install."""
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 20 + b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow: pip install 'moetuner\[parquet\]'"):
        mt.open_input(path, num_experts=8)


def test_saved_statistics_and_load_tables(make_trace, tmp_path):
    """They are told by their content, with the windows and experts that they have."""
    counted = mt.RoutingStatistics.from_trace(make_trace(), window=20)
    saved, table = tmp_path / "s", tmp_path / "table"
    counted.save(saved)
    with table.open("wb") as file:
        np.savez(file, load=counted.window_load)
    for path in (saved, table):
        actual = mt.open_input(path, num_experts=8)
        assert isinstance(actual, mt.RoutingStatistics)
        assert np.array_equal(actual.window_load, counted.window_load)
    assert mt.open_input(saved, window=20).window == 20
    assert mt.open_input(table).transitions is None
    for path, option, words in (
        (saved, {"window": 50}, "in windows already (20 tokens), got 50"),
        (table, {"window": 20}, "in windows already (those of its table), got 20"),
        (saved, {"num_experts": 9}, "num_experts must be 8, got 9"),
    ):
        refused(words, path, partial(mt.open_input, path, **option))


def test_real_files(data):
    """The recorded files are read as what they are, with the sizes that they have."""
    kinds = {path.stem: type(mt.open_input(path)) for path in data.glob("*.npz")}
    assert kinds["mixtral-8x7b-mmlu"] is mt.RoutingStatistics
    trace = mt.open_input(data / "gpt-oss-20b-mini.npz")
    assert (trace.tokens, trace.layers, trace.top_k, trace.num_experts) == (4096, 24, 4, 32)
    assert len(trace.group_names) == 7
    assert mt.open_input(data / "switch-base-8.npz").top_k == 1
    with pytest.raises(ValueError, match="holds a load table"):
        mt.RoutingTrace.load(data / "mixtral-8x7b-mmlu.npz")


def test_recordings_of_few_tokens_are_read(tmp_path):
    """A trace of moetuner's own has named axes, however many layers there are to a token."""
    path = tmp_path / "t.safetensors"
    for tokens in (0, 1, 3, 5):
        trace_of(random_ids(tokens, 4, 3, 12), 12).save(path)
        assert mt.open_input(path).tokens == tokens
    np.save(tmp_path / "t.npy", random_ids(3, 4, 3, 12))
    with pytest.raises(ValueError, match="axes must be"):
        mt.open_input(tmp_path / "t.npy", num_experts=12)
