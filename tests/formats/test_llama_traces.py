"""Traces of llama.cpp's routers: whole tokens are read, whatever the tool, and no count is made."""

import numpy as np
import pytest
from engines_files import GOLDEN, truth

import moetuner as mt
from moetuner.formats import find_reader

FOLDER = GOLDEN / "llama_traces"


def answered():
    """Give ids of the tokens that all layers computed, by prompt: its last one, and the answer."""
    ids, lengths = truth("llama_traces")
    starts = np.cumsum([0, *lengths.sum(axis=1)])
    return [
        ids[start + prompt - 1 : start + prompt + answer]
        for start, (prompt, answer) in zip(starts, lengths, strict=False)
    ]


@pytest.mark.parametrize(("name", "prompts"), [("route_trace", 2), ("rank", 1)])
def test_rows_of_choices(name, prompts):
    """Tokens are those that all layers recorded, best expert first, a sequence for each prompt."""
    path = FOLDER / f"{name}.csv"
    assert find_reader(path) == "llama-traces"
    trace = mt.open_input(path, num_experts=8)
    expected = answered()[:prompts]
    assert np.array_equal(trace.expert_ids, np.concatenate(expected))
    assert np.bincount(trace.sequence).tolist() == [len(ids) for ids in expected]


def test_rows_of_tokens():
    """Joined traces are sequences; of a prompt the last token of each batch is whole."""
    path = FOLDER / "moe-trace.csv"
    assert find_reader(path) == "llama-traces"
    trace = mt.open_input(path, num_experts=8)
    for label, (ids, batches) in enumerate(zip(answered(), (2, 1), strict=True)):
        actual = trace.select(sequences=[label]).expert_ids
        assert len(actual) == len(ids) - 1 + batches
        assert np.array_equal(actual[batches:], ids[1:])
        assert ids[0].tolist() in actual[:batches].tolist()


def test_what_the_preamble_says_is_taken(tmp_path):
    """The number of experts needs no option, and another one is refused."""
    path = FOLDER / "route_trace.csv"
    assert mt.open_input(path).num_experts == 8
    with pytest.raises(ValueError, match="num_experts must be 8, got 9"):
        mt.open_input(path, num_experts=9)
    with pytest.raises(ValueError, match="num_experts is needed"):
        mt.open_input(FOLDER / "rank.csv")


def test_columns_are_found_by_their_names(tmp_path):
    """Columns may be in another order, and more of them may be there."""
    lines = (FOLDER / "route_trace.csv").read_text().splitlines()
    rows = [line if line.startswith("#") else ",".join(line.split(",")[::-1]) for line in lines]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(rows))
    expected = mt.open_input(FOLDER / "route_trace.csv").expert_ids
    assert np.array_equal(mt.open_input(path).expert_ids, expected)


def test_files_are_sequences_of_their_own():
    """Two recordings of one prompt each do not become one sequence."""
    path = FOLDER / "moe-trace.csv"
    both = mt.open_input([path, FOLDER / "rank.csv"], num_experts=8)
    assert len(set(both.sequence.tolist())) == 3
    assert both.tokens == 13 + 5


def test_tables_of_others_are_not_taken_for_traces(tmp_path):
    """A column of EP ranks, or counts without a header, are read as before."""
    path = tmp_path / "a.csv"
    path.write_text("token,layer,rank,expert\n0,0,1,2\n1,0,0,1\n")
    assert find_reader(path) == "csv"
    path.write_text("4,1,3\n2,2,4\n")
    assert find_reader(path) == "loads"
