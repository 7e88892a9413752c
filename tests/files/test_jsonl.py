"""JSON lines: both forms mean what JSON says, and errors name the line."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import random_ids

import moetuner as mt
from moetuner.files import lines

TOKEN = {"experts": [[0, 1], [2, 3]]}


def load(folder, *lines, **arguments):
    path = folder / "a.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return mt.RoutingTrace.load(path, **arguments)


def test_token_lines(tmp_path):
    """One token per line; blank lines and unknown keys do not matter, nor a byte-order mark."""
    actual = load(
        tmp_path,
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
    assert load(tmp_path, TOKEN, num_experts=4).sequence is None
    assert load(tmp_path, {"num_experts": 4}, TOKEN, num_experts=9).num_experts == 9


scalars = st.none() | st.booleans() | st.integers(-3, 70000) | st.floats() | st.text(max_size=3)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner)
)
shapes = st.sampled_from([(1, 2), (2, 2), (1, 3)])


@st.composite
def texts_of_lines(draw):
    """Draw a header and lines, mostly of one form, written in one of several ways."""
    form = draw(st.sampled_from(["experts", "tokens"]))
    layers, top_k = draw(shapes)
    keys = draw(st.sets(st.sampled_from(["sequence", "group", "other"])))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    experts = draw(st.sampled_from([6, 300]))
    texts = [json.dumps({"num_experts": experts})]
    for _ in range(draw(st.integers(1, 8))):
        tokens = 1 if form == "experts" else int(rng.integers(1, 4))
        ids = random_ids(tokens, layers, top_k, experts, seed=int(rng.integers(99)))
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
    """Read lines one by one as Python does, runs without a number counted; None if one is wrong."""
    ids, sequence, group, forms = [], [], [], set()
    header, *rest = content.split(b"\n")
    experts = json.loads(header)["num_experts"]
    for number, line in enumerate(line for line in rest if line.strip()):
        try:
            fields = json.loads(line)
            (form,) = fields.keys() & {"experts", "tokens"}
            array = np.asarray(fields[form])
            assert not any(isinstance(one, bool) for one in np.asarray(fields[form], object).flat)
            array = array if form == "tokens" else array[None]
            assert array.ndim == 3
            assert array.size
            assert array.dtype == np.int64
            assert (np.diff(np.sort(array.clip(-1, experts))) > 0).all()
            assert ((array >= 0) & (array < experts)).all()
            label = fields.get("sequence", number)
            assert type(label) is int
            assert isinstance(fields.get("group", ""), str)
        except (ValueError, AssertionError, AttributeError):
            return None
        forms.add((form, array.shape[1:], "sequence" in fields, "group" in fields))
        ids += array.tolist()
        labelled = form == "tokens" or "sequence" in fields
        sequence += [label if labelled else None] * len(array)
        group += [fields.get("group")] * len(array)
    return (ids, sequence, group) if len(forms) == 1 else None


@settings(max_examples=settings().max_examples * 2)
@given(texts_of_lines(), st.integers(1, 60), st.booleans())
def test_lines_mean_what_json_says(tmp_path_factory, texts, block, cut):
    """What is read is what Python's JSON says, whatever the blocks; all else is refused."""
    content = "\n".join(texts).encode("utf-8", "surrogatepass")
    content = content[:-3] if cut else content
    path = tmp_path_factory.getbasetemp() / "a.jsonl"
    path.write_bytes(content)
    expected = plain(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        if expected is None:
            with pytest.raises(ValueError, match=r"^[^\n]+$"):
                mt.RoutingTrace.load(path)
            return
        trace = mt.RoutingTrace.load(path)
    ids, sequence, group = expected
    assert trace.expert_ids.tolist() == ids
    given_none = [None] * len(ids)
    assert sequence == (given_none if trace.sequence is None else trace.sequence.tolist())
    if group[0] is not None:
        assert [trace.group_names[at] for at in trace.group] == group


def test_long_lines_are_refused(tmp_path, monkeypatch):
    """A line beyond the limit is not gathered in memory."""
    monkeypatch.setattr(lines, "LINE_LIMIT", 100)
    monkeypatch.setattr(lines, "BLOCK", 64)
    with pytest.raises(ValueError, match="line 3: must have at most 100 bytes"):
        load(tmp_path, {"num_experts": 4}, TOKEN, TOKEN | {"text": "x" * 200})
