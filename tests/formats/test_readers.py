"""Every reader has what a new one needs: a file of its engine, a sample to damage, and a page.

Its rows of bad files are asked for in ``test_bad_files.py``.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from engines_files import GOLDEN
from targets import ARCHIVES, BYTES, DUMPS, GGUF, TABLES, TORCH, WRITTEN, write

import moetuner as mt
from moetuner.formats import READERS, find_reader
from moetuner.formats.native import KINDS
from moetuner.formats.sources import list_equal

DOCS = Path(__file__).parents[2] / "docs"
# No engine writes these; TensorRT-LLM has run on no machine of this project, as it wants a GPU.
WITHOUT_GOLDEN = {*KINDS, "csv", "arrow", "loads", "tensorrt-llm"}


def readers_of_files(paths):
    """Return the readers that take files for their own."""
    found = set()
    for path in paths:
        try:
            found.add(find_reader(path))
        except ValueError:  # a map of experts, or what explains the files
            continue
    return found


def test_every_engine_has_a_golden_file():
    """Something that the engine itself wrote is recognised."""
    files = (path for path in GOLDEN.rglob("*") if path.is_file() and path.suffix != ".md")
    assert READERS.keys() - WITHOUT_GOLDEN <= readers_of_files(files)


def test_every_reader_has_a_sample_to_damage(tmp_path):
    """A target of the fuzz tests is of its format, where the packages that write it are there."""
    for package in ("torch", "gguf", "pyarrow"):
        pytest.importorskip(package)
    names = (*ARCHIVES, *BYTES, *WRITTEN, *TABLES, *DUMPS, *TORCH, *GGUF, "parquet")
    paths = [tmp_path / str(number) for number, _ in enumerate(names)]
    for name, path in zip(names, paths, strict=True):
        write(name, path)
    assert readers_of_files(paths) == READERS.keys()


@pytest.mark.parametrize("name", sorted(READERS.keys() - {*KINDS}))
def test_every_reader_has_a_page(name):
    """A page has the name of its module, or names it, however that is spelled."""
    module = READERS[name].module.__name__.rpartition(".")[2]
    pages = {path.stem: path.read_text().lower() for path in DOCS.rglob("*.md")}
    del pages["architecture"]  # its example is no page
    spelled = re.compile(r"[-_ .]?".join(module.split("_")))
    assert module in pages or any(spelled.search(text) for text in pages.values())


def test_recordings_of_a_draft_model_are_read_by_themselves(tmp_path):
    """Its loads have other layers: the error says how to give those of one model."""
    for layers in (1, 10, 9):
        np.savez(tmp_path / f"load-7-{layers}x8.npz", load=np.ones((2, layers, 8), dtype=int))
    with pytest.raises(ValueError, match=r"3 sizes.* 1x8, 9x8, 10x8,.*load-\*-10x8\*.npz") as error:
        mt.open_input(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
    main = sorted(tmp_path.glob("load-*-10x8*.npz"))
    assert (mt.open_input(main).layers, mt.open_input(tmp_path / "load-7-1x8.npz").layers) == (
        10,
        1,
    )


def test_recordings_of_ranks_that_are_equal_count_once(tmp_path):
    """Those of the plugins' recorder alone, by their content; a line says so of a folder."""
    random = np.random.default_rng(5)
    load, other = random.integers(1, 99, (2, 6, 3, 8))
    names = {"load-11-3x8": load, "load-12-3x8": load, "load-13-3x8-2": load, "load-14-3x8": other}
    for name, table in names.items():
        np.savez(tmp_path / f"{name}.npz", load=table)
    read = mt.open_input(tmp_path)
    assert np.array_equal(read.window_load, np.concatenate([load, other]))
    assert list_equal([tmp_path]) == [
        f"{tmp_path.name}: of 3 equal files, as ranks of one engine record them, 1 counts."
    ]
    for path in tmp_path.iterdir():
        path.rename(path.with_name(path.name.replace("load", "day")))
    assert mt.open_input(tmp_path).windows == 4 * 6
    assert list_equal([tmp_path]) == []
