"""FastDeploy's answers: ranks are added up, answers are windows."""

import json

import numpy as np
import pytest
from engines_files import GOLDEN, truth

import moetuner as mt
from moetuner.formats import find_reader

PATH = GOLDEN / "fastdeploy" / "stats.jsonl"


def test_answers_are_windows():
    """Each the sum over its ranks; the dense layer is left out and said."""
    assert find_reader(PATH) == "fastdeploy"
    statistics = mt.open_input(PATH)
    assert np.array_equal(statistics.window_load, truth("fastdeploy", "load"))
    assert statistics.left_out == (4, (0,))


def test_answers_in_files_of_their_own(tmp_path):
    """As many windows as there are files, however they are laid out."""
    files = []
    for number, line in enumerate(PATH.read_text().splitlines()):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(json.loads(line), indent=1))
    assert {find_reader(file) for file in files} == {"fastdeploy"}
    assert np.array_equal(mt.open_input(files).window_load, truth("fastdeploy", "load"))


def test_what_the_server_refused_is_said(tmp_path):
    """Its own words stand in the message."""
    path = tmp_path / "a.json"
    path.write_text('{"code":1,"msg":"redundant expert is disabled"}')
    assert find_reader(path) == "fastdeploy"
    with pytest.raises(ValueError, match="redundant expert is disabled"):
        mt.open_input(path)
