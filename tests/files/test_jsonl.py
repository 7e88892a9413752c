"""JSON lines: both forms, round trips, and errors that name the line."""

import json

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import write_lines
from test_trace import IDS, same

import moetuner as mt
from moetuner.files import lines

TOKEN = {"experts": [[0, 1], [2, 3]]}


def load(path, *lines, **arguments):
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return mt.RoutingTrace.load(path, **arguments)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


@pytest.fixture(scope="module")
def path_of_lines(tmp_path_factory):
    return tmp_path_factory.mktemp("lines") / "a.jsonl"


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("experts", [8, 300])
def test_round_trip(make_trace, path, per, experts):
    """What is written is read, in both forms."""
    trace = make_trace(experts=experts, dtype=np.uint8 if experts == 8 else np.uint16)
    write_lines(trace, path, per)
    assert len(path.read_text().splitlines()) == 1 + (200 if per == "token" else 20)
    assert same(mt.RoutingTrace.load(path), trace)
    assert mt.RoutingTrace.load(path, num_experts=999).num_experts == 999


def test_token_lines(path):
    """One token per line; blank lines and unknown keys do not matter, nor a byte-order mark."""
    actual = load(
        path,
        "\ufeff" + json.dumps({"num_experts": 4, "model": "m", "group_names": ["b"]}),
        TOKEN | {"sequence": 9, "group": "a", "text": "x"},
        "",
        TOKEN | {"sequence": -1, "group": "b"},
    )
    assert actual.expert_ids.tolist() == [TOKEN["experts"]] * 2
    assert actual.sequence.tolist() == [9, -1]
    assert actual.group_names == ("b", "a")
    assert actual.group.tolist() == [1, 0]
    assert actual.model == "m"
    assert load(path, TOKEN, num_experts=4).sequence is None


def test_sequence_lines(path):
    """One sequence per line; those without a number are counted."""
    lines = [
        {"tokens": IDS[:20].tolist(), "group": "a"},
        {"tokens": IDS[20:].tolist(), "group": "b"},
    ]
    actual = load(path, {"num_experts": 8}, *lines)
    assert np.array_equal(actual.expert_ids, IDS)
    assert actual.sequence.tolist() == [0] * 20 + [1] * 30
    assert actual.group.tolist() == [0] * 20 + [1] * 30


def test_other_encodings(path):
    """Bytes that are not UTF-8 are refused."""
    path.write_bytes(json.dumps({"num_experts": 4}).encode() + b'\n{"experts": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: must be JSON: 'utf-8' codec"):
        mt.RoutingTrace.load(path)


scalars = st.none() | st.booleans() | st.integers(-3, 70000) | st.floats() | st.text(max_size=3)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner)
)
shapes = st.sampled_from([(1, 2), (2, 2), (1, 3)])


@st.composite
def texts_of_lines(draw):
    """Lines that are mostly of one form, written in one of several ways."""
    form = draw(st.sampled_from(["experts", "tokens"]))
    layers, top_k = draw(shapes)
    keys = draw(st.sets(st.sampled_from(["sequence", "group", "other"])))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    texts = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = 1 if form == "experts" else int(rng.integers(1, 4))
        ids = random_ids(tokens, layers, top_k, 6, seed=int(rng.integers(99)))
        line = {form: ids[0].tolist() if form == "experts" else ids.tolist()}
        if "sequence" in keys:
            line["sequence"] = int(rng.integers(-5, 5))
        if "group" in keys:
            line["group"] = draw(st.sampled_from(["a", "é", '"', "b\\"]))
        if "other" in keys:
            line["other"] = draw(anything)
        if draw(st.integers(0, 9)) == 0:
            line[draw(st.sampled_from([form, "sequence", "group", "tokens"]))] = draw(anything)
        text = json.dumps(
            line,
            ensure_ascii=draw(st.booleans()),
            separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :")])),
        )
        texts.append(text + draw(st.sampled_from(["", "", "", "\r", " ", "\n", "\n \n", "x"])))
    return texts


def plain(content):
    """Read lines one by one as Python does; None where one is wrong."""
    ids, sequence, group, forms = [], [], [], set()
    for number, line in enumerate(content.split(b"\n")[1:]):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            (form,) = fields.keys() & {"experts", "tokens"}
            array = np.asarray(fields[form])
            assert not any(isinstance(one, bool) for one in np.asarray(fields[form], object).flat)
            array = array if form == "tokens" else array[None]
            assert array.ndim == 3
            assert array.size
            assert array.dtype == np.int64
            assert (np.diff(np.sort(array.clip(-1, 6))) > 0).all()
            assert ((array >= 0) & (array < 6)).all()
            label = fields.get("sequence", len(forms) and number)
            assert type(label) is int
            assert isinstance(fields.get("group", ""), str)
        except (ValueError, AssertionError, AttributeError):
            return None
        forms.add((form, array.shape[1:], "sequence" in fields, "group" in fields))
        ids += array.tolist()
        sequence += [fields.get("sequence")] * len(array)
        group += [fields.get("group")] * len(array)
    return (ids, sequence, group) if len(forms) == 1 else None


@settings(max_examples=settings().max_examples * 5)
@given(texts_of_lines(), st.integers(1, 60), st.booleans())
def test_lines_mean_what_json_says(path_of_lines, texts, block, cut):
    """What is read is what Python's JSON says, whatever the blocks; all else is refused."""
    content = "\n".join(['{"num_experts": 6}', *texts]).encode("utf-8", "surrogatepass")
    content = content[:-3] if cut else content
    path_of_lines.write_bytes(content)
    expected = plain(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        if expected is None:
            with pytest.raises(ValueError, match=r"^[^\n]+$"):
                mt.RoutingTrace.load(path_of_lines)
            return
        trace = mt.RoutingTrace.load(path_of_lines)
    ids, sequence, group = expected
    assert trace.expert_ids.tolist() == ids
    if sequence[0] is not None:
        assert trace.sequence.tolist() == sequence
    if group[0] is not None:
        assert [trace.group_names[at] for at in trace.group] == group


def test_long_lines_are_refused(path, monkeypatch):
    """A line beyond the limit is not gathered in memory."""
    monkeypatch.setattr(lines, "LINE_LIMIT", 100)
    monkeypatch.setattr(lines, "BLOCK", 64)
    with pytest.raises(ValueError, match="line 3: must have at most 100 bytes"):
        load(path, {"num_experts": 4}, TOKEN, TOKEN | {"text": "x" * 200})
