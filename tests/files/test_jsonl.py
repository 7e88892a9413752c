"""JSON lines: both forms, round trips, and errors that name the line."""

import json
import re

import numpy as np
import pytest
from test_trace import IDS, same

import moetuner as mt
from moetuner.files import jsonl

TOKEN = {"experts": [[0, 1], [2, 3]]}


def load(path, *lines, **arguments):
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return mt.RoutingTrace.load(path, **arguments)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("experts", [8, 300])
def test_round_trip(make_trace, path, per, experts):
    """What is written is read, in both forms."""
    trace = make_trace(experts=experts, dtype=np.uint8 if experts == 8 else np.uint16)
    jsonl.write(trace.contents, path, per=per)
    assert len(path.read_text().splitlines()) == 1 + (200 if per == "token" else 20)
    assert same(mt.RoutingTrace.load(path), trace)
    assert mt.RoutingTrace.load(path, num_experts=999).num_experts == 999


def test_round_trip_without_labels(make_trace, path):
    """A bare trace stays bare."""
    trace = make_trace(labelled=False)
    jsonl.write(trace.contents, path)
    assert same(mt.RoutingTrace.load(path), trace)


def test_token_lines(path):
    """One token per line; blank lines and unknown keys do not matter, nor a byte-order mark."""
    found = load(
        path,
        "\ufeff" + json.dumps({"num_experts": 4, "model": "m", "group_names": ["b"]}),
        TOKEN | {"sequence": 9, "group": "a", "text": "x"},
        "",
        TOKEN | {"sequence": -1, "group": "b"},
    )
    assert found.expert_ids.tolist() == [TOKEN["experts"]] * 2
    assert found.sequence.tolist() == [9, -1]
    assert found.group_names == ("b", "a")
    assert found.group.tolist() == [1, 0]
    assert found.model == "m"
    assert load(path, TOKEN, num_experts=4).sequence is None


def test_sequence_lines(path):
    """One sequence per line; those without a number are counted."""
    lines = [
        {"tokens": IDS[:20].tolist(), "group": "a"},
        {"tokens": IDS[20:].tolist(), "group": "b"},
    ]
    found = load(path, {"num_experts": 8}, *lines)
    assert np.array_equal(found.expert_ids, IDS)
    assert found.sequence.tolist() == [0] * 20 + [1] * 30
    assert found.group.tolist() == [0] * 20 + [1] * 30


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([TOKEN], "line 1: num_experts is needed"),
        ([{"num_experts": 4}], "must have at least one line with 'experts' or 'tokens', got none"),
        ([{"num_experts": 0}, TOKEN], "line 1: num_experts must be from 1 to 65536, got 0"),
        ([{"num_experts": 4.0}, TOKEN], "line 1: num_experts must be an integer, got 4.0"),
        ([{"a": 1}, TOKEN], "line 1: must have 'experts', 'tokens' or 'num_experts', got"),
        ([{"num_experts": 4}, TOKEN, {"a": 1}], "line 3: must have 'experts' or 'tokens', got"),
        ([{"num_experts": 4}, TOKEN, "[1]"], "line 3: must be a JSON object, got list"),
        ([{"num_experts": 4}, TOKEN, '{"experts": [[0,'], "line 3: must be JSON: "),
        ([{"num_experts": 4}, '{"a":' * 100000], "line 2: must be JSON: "),
        (
            [{"num_experts": 4}, {"experts": [[0, 4], [1, 2]]}],
            "line 2: expert_ids: token 0, layer 0",
        ),
        ([{"num_experts": 4}, TOKEN, {"experts": [[0, 1], [2, 2]]}], "line 3: expert_ids: token 1"),
        ([{"num_experts": 4}, {"experts": [[0, -1], [1, 2]]}], "expert id -1 is negative"),
        ([{"num_experts": 4}, {"experts": [[0, 1.5]]}], "[layers, top_k], got float64 [1, 2]"),
        ([{"num_experts": 4}, '{"experts": [[0, NaN]]}'], "[layers, top_k], got float64 [1, 2]"),
        ([{"num_experts": 4}, {"experts": [[0, 10**30]]}], "[layers, top_k], got object [1, 2]"),
        ([{"num_experts": 4}, {"experts": [0, 1]}], "[layers, top_k], got int64 [2]"),
        ([{"num_experts": 4}, {"experts": [[0, 1], [2]]}], "got lists of different lengths"),
        ([{"num_experts": 4}, {"experts": []}], "[layers, top_k], got float64 [0]"),
        ([{"num_experts": 4}, {"tokens": [[0, 1]]}], "[tokens, layers, top_k], got int64 [1, 2]"),
        ([{"num_experts": 4}, TOKEN, {"experts": [[0, 1]]}], "line 3: experts must have 2 layers"),
        ([{"num_experts": 4}, {"experts": [[0, 1, 2, 3, 3]]}], "top-k from 1 to num_experts (4)"),
        ([{"num_experts": 4}, TOKEN, TOKEN | {"group": "a"}], "line 3: must have keys ['experts']"),
        ([{"num_experts": 4}, TOKEN, {"tokens": [[[0, 1]]]}], "line 3: must have keys ['experts']"),
        ([{"num_experts": 4}, TOKEN | {"sequence": 1 << 31}], "sequence must be an integer of 32"),
        ([{"num_experts": 4}, TOKEN | {"sequence": True}], "sequence must be an integer of 32"),
        ([{"num_experts": 4}, TOKEN | {"group": 3}], "line 2: group must be a text, got 3"),
        (
            [{"num_experts": 4, "group_names": [1]}, TOKEN],
            "line 1: group_names must be texts, got 1",
        ),
        ([{"num_experts": 4, "group_names": 1}, TOKEN], "line 1: group_names must be a list"),
        ([{"num_experts": 4, "model": 1}, TOKEN], "line 1: model must be a text, got 1"),
    ],
)
def test_bad_lines(path, lines, text):
    """The message has file, line and rule, in one line."""
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        load(path, *lines)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_other_encodings(path):
    """Bytes that are not UTF-8 are refused."""
    path.write_bytes(json.dumps({"num_experts": 4}).encode() + b'\n{"experts": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: must be JSON: 'utf-8' codec"):
        mt.RoutingTrace.load(path)


def test_what_does_not_fit_on_lines(make_trace, path):
    """Nothing is written then."""
    trace = make_trace()
    mixed = mt.RoutingTrace.from_arrays(IDS, num_experts=8, sequence=np.arange(50) % 2)
    torn = mt.RoutingTrace.from_arrays(IDS, num_experts=8, sequence=[1] * 50, group=[0, 1] * 25)
    for wrong, text in (
        (trace.select(groups="empty"), "trace must have at least one token"),
        (make_trace(labelled=False), "trace must have sequences"),
        (mixed, "each sequence's tokens must be one run"),
        (torn, "each sequence must have one group"),
    ):
        with pytest.raises(ValueError, match=text):
            jsonl.write(wrong.contents, path, per="sequence")
        assert not list(path.parent.iterdir())
