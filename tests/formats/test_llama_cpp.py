"""llama.cpp's importance matrices: counts by layer and expert, as windows and as groups."""

import numpy as np
import pytest
from engines_files import GOLDEN, truth, write_imatrix

import moetuner as mt
from moetuner.formats import find_reader, find_readers, list_cautions

pytest.importorskip("gguf")
FOLDER = GOLDEN / "llama_cpp"
LOAD = np.arange(1, 9).reshape(2, 4)


def counted(name):
    return truth("llama_cpp", name)


def test_counts_of_a_matrix():
    """A layer's experts are counted once, though three of its tensors have the counts."""
    path = FOLDER / "imatrix.gguf"
    assert find_reader(path) == "llama-cpp"
    assert np.array_equal(mt.open_input(path).window_load, counted("at_4")[None])
    assert mt.open_input(path).window_load.sum(axis=2).tolist() == [[4 * 16 * 2] * 3]


def test_saves_of_one_run_are_windows():
    """What was counted between two saves is a window, in whatever order the files come."""
    files = [FOLDER / f"imatrix.gguf{end}" for end in (".at_4", ".at_2", "")]
    actual = mt.open_input(files).window_load
    expected = np.stack([counted("at_2"), counted("at_4") - counted("at_2")])
    assert np.array_equal(actual, expected)


def test_a_save_before_the_first_expert_is_left_out(tmp_path):
    """llama-imatrix saves within a chunk's first tensor: the first of a run's files has no experts.

    One that comes later than counts of its run, or is of another text, is of another model.
    """
    names = [f"imatrix.gguf{end}" for end in (".at_4", ".at_8", "")]
    for chunks, (name, load) in enumerate(zip(names, ([], LOAD, 2 * LOAD), strict=True)):
        write_imatrix(tmp_path / name, load, chunks=chunks)
    assert find_reader(tmp_path) == "llama-cpp"
    assert np.array_equal(mt.open_input(tmp_path).window_load, [LOAD, LOAD])
    for wrong in ({"chunks": 3}, {"texts": ("b.txt",)}):
        write_imatrix(tmp_path / names[0], [], **wrong)
        with pytest.raises(ValueError, match=r"at_4: must hold blk\.N\.ffn_down_exps"):
            mt.open_input(tmp_path)


def test_texts_are_groups():
    """Matrices of several texts are groups by the names of these."""
    statistics = mt.open_input(FOLDER)
    assert statistics.group_names == ("code.txt", "wiki.train.raw")
    assert statistics.group.tolist() == [0, 1, 1]
    assert np.array_equal(statistics.window_load[0], counted("code"))


def test_the_weight_that_is_there_counts(tmp_path):
    """Without the counts of the down projection, those of another one are taken."""
    path = write_imatrix(
        tmp_path / "m", LOAD, named=lambda counts: {k: v for k, v in counts.items() if "up" in k}
    )
    assert np.array_equal(mt.open_input(path).window_load, LOAD[None])


def test_dense_layers_and_experts_of_the_user_are_checked(tmp_path):
    """A layer with counts is not dense, and the experts are as many as the file has."""
    path = write_imatrix(tmp_path / "m.gguf", LOAD)
    assert mt.open_input(path, num_experts=4, dense_layers=[0]).layers == 2
    with pytest.raises(ValueError, match="layer 1 must be dense"):
        mt.open_input(path, dense_layers=[1])
    with pytest.raises(ValueError, match="num_experts must be 4, got 5"):
        mt.open_input(path, num_experts=5)


def test_it_is_said_that_the_text_is_nobodys_traffic():
    """Once, however many files there are, and of importance matrices alone."""
    assert find_readers([FOLDER, FOLDER / "code.gguf"]) == ("llama-cpp",)
    assert list_cautions(["llama-cpp"]) != []
    assert list_cautions(find_readers([GOLDEN / "deepspeed", GOLDEN / "absent"])) == []
