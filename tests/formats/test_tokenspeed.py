"""TokenSpeed's records: all ranks are needed, and what all of them counted is counted once."""

import numpy as np
import pytest
from engines_files import GOLDEN, save_torch, truth

import moetuner as mt
from moetuner.formats import find_reader

FOLDER = GOLDEN / "tokenspeed"
FILES = sorted(FOLDER.glob("*.pt"))
COUNTS = np.arange(24).reshape(2, 3, 4)  # ranks, layers, experts


def write(folder, counts, profile="1", size=None):
    """Write the records of some ranks."""
    for rank, count in enumerate(counts):
        fields = {"logical_count": count, "ep_rank": rank, "ep_size": size or len(counts)}
        save_torch(folder / f"{profile}-TP{rank}.expert-load.pt", fields)
    return folder


def test_what_tokenspeed_wrote():
    """Its own sum over ranks, by folder and by files, without the row of the dense layer."""
    expected = truth("tokenspeed", "logical_count")[1:]
    for source in (FOLDER, FILES, FILES[::-1]):
        statistics = mt.open_input(source)
        assert np.array_equal(statistics.window_load, expected[None])
        assert statistics.left_out == (4, (0,))
    assert {find_reader(path) for path in (FOLDER, *FILES)} == {"tokenspeed"}


def test_a_rank_is_not_taken_for_all():
    """A record of one rank of two is refused, in words that say what is missing."""
    with pytest.raises(ValueError, match="got 1 of rank 0 and 0 of rank 1: give the folder"):
        mt.open_input(FILES[0])
    with pytest.raises(ValueError, match="got 1 of rank 1 and 0 of rank 0"):
        mt.open_input(FILES[1])


def test_tokens_that_all_ranks_counted_are_counted_once(tmp_path):
    """Equal records, as where every rank routes every token, are one."""
    write(tmp_path, [COUNTS[1]] * 3)
    assert np.array_equal(mt.open_input(tmp_path).window_load, COUNTS[1][None])


def test_profiles_are_windows(tmp_path):
    """Records of two profiles in one folder are two windows, each the sum of its ranks."""
    write(tmp_path, COUNTS, "1")
    write(tmp_path, 10 * COUNTS, "2")
    expected = np.stack([COUNTS.sum(axis=0), 10 * COUNTS.sum(axis=0)])
    assert np.array_equal(mt.open_input(tmp_path).window_load, expected)
