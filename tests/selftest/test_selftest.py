"""The table of answers that every machine gives, and what says whether this one does."""

import hashlib
import json
import os
import sys
import threading

import numpy as np
import pytest

from moetuner import selftest
from moetuner.cli import main
from moetuner.selftest import cases


def test_every_case_has_a_stored_answer():
    """Which comes out by the command and, below, on one thread and on two."""
    assert selftest.read_hashes().keys() == cases.CASES.keys()


def test_hashes_are_of_values_and_shapes():
    """The width of a number does not count; a value and a shape do."""
    one = np.arange(6, dtype=np.int32).reshape(2, 3)
    expected = hashlib.sha256(b"(2, 3)" + one.astype("<i8").tobytes()).hexdigest()
    assert expected.startswith(selftest.hash_of([one]))
    assert selftest.hash_of([one]) == selftest.hash_of([one.astype(np.uint64)])
    assert selftest.hash_of([one]) != selftest.hash_of([one.T.copy()])
    assert selftest.hash_of([one]) != selftest.hash_of([one + 1])
    with pytest.raises(TypeError, match="only whole numbers"):
        selftest.hash_of([one / 2])


def test_the_command_says_so_in_one_line(capsys):
    """What it says is one line, with status 0."""
    assert main(["--self-test"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"self-test: all {len(cases.CASES)} answers are right (moetuner ")
    assert said.out.count("\n") == 1


def test_another_answer_is_named(monkeypatch, capsys):
    """A hash that differs gives status 1 and the name of its case."""
    for other in list(cases.CASES)[3:]:
        monkeypatch.delitem(cases.CASES, other)
    stored = {name: selftest.read_hashes()[name] for name in cases.CASES}
    name, other = list(stored)[:2]
    monkeypatch.setattr(selftest, "read_hashes", lambda: stored | {name: stored[other]})
    assert main(["--self-test"]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"self-test: 1 of {len(stored)} answers differ: {name} (moetuner ")
    assert said.count("\n") == 1


def test_eight_threads_get_the_same_answers():
    """Threads that count, solve and replay at once do not disturb others.

    Each has a quarter of the cases, and each quarter is computed with one thread and with two.
    """
    found, answers = [None] * 8, cases.CASES
    start = threading.Barrier(len(found))

    def work(place):
        names = list(answers)[place // 2 :: 4]
        start.wait()
        traffic = cases.Traffic(1 + place % 2)
        found[place] = {name: selftest.hash_of(answers[name](traffic)) for name in names}

    threads = [threading.Thread(target=work, args=[place]) for place in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = selftest.read_hashes()
    assert found[0] | found[2] | found[4] | found[6] == stored
    for hashes in found:
        assert hashes.items() <= stored.items()


def test_the_version_as_json_has_what_a_report_asks_for(capsys):
    """Versions, the processor's sets and what else is installed, and no path or name of a host."""
    assert main(["--version", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["libraries"]["numpy"] == np.__version__
    assert os.uname().nodename not in said.values()
    assert isinstance(said["instruction_sets"], list)


@pytest.mark.parametrize("words", [["--json"], ["--json", "demo"]])
def test_json_before_a_command_is_refused(words, capsys):
    """Alone it asks for nothing."""
    assert main(words) == 2
    expected = "moetuner: error: --json before a command goes with --version.\n"
    assert capsys.readouterr().err == expected
