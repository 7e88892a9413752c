"""vLLM: what it wrote is read, in whatever way responses are kept; nonsense is named."""

import json

import numpy as np
import pytest
from engines_files import GOLDEN, truth
from engines_files import vllm_response as response
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids

import moetuner as mt
from moetuner.formats import find_reader
from moetuner.formats.records import records


def same_sets(trace, ids):
    """Whether every token has the same experts in every layer, in any order."""
    return np.array_equal(np.sort(trace.expert_ids, axis=2), np.sort(ids, axis=2))


def routed(tokens, layers=3, dense=(0,), seed=0):
    """Ids of hidden layers [T,L,K] as vLLM writes them, and those of layers with experts."""
    ids = random_ids(tokens, layers, 2, 8, seed=seed).astype(np.uint8)
    ids[:, list(dense)] = 0
    return ids, np.delete(ids, list(dense), axis=1)


def test_what_vllm_wrote():
    """Over HTTP and offline, whole and from a token on: the router's experts, as sets."""
    ids, lengths = truth("vllm")
    folder = GOLDEN / "vllm"
    for paths in ([folder / "completions.json"], [folder / f"routed-{i}.npy" for i in range(3)]):
        assert {find_reader(path) for path in paths} == {"vllm"}
        trace = mt.open_input(paths, num_experts=16)
        assert np.bincount(trace.sequence).tolist() == lengths.tolist()
        assert same_sets(trace, ids)
    part = mt.open_input(folder / "completion-from-3.json", num_experts=16)
    assert same_sets(part, ids[3 : lengths[0]])
    assert mt.open_input(folder / "chat.json", num_experts=16).tokens == 37


# Texts that hold objects one after the other; joined is as curl leaves them.
WAYS = {
    "list": lambda objects: " " + json.dumps(objects),
    "indented": lambda objects: json.dumps(objects, indent=1),
    "lines": lambda objects: "\ufeff" + "\n\n".join(map(json.dumps, objects)),
    "events": lambda objects: (
        "".join(f"data: {json.dumps(one)}\n\n" for one in objects) + "data: [DONE]\n"
    ),
    "joined": lambda objects: "".join(
        json.dumps(one, indent=None if at % 2 else 1) for at, one in enumerate(objects)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_keep_responses(tmp_path, way):
    """Choices of one response or of several are sequences in their order; one may have none."""
    arrays = [routed(tokens, seed=tokens) for tokens in (5, 1, 30)]
    (a, b, c), path = (ids for ids, _ in arrays), tmp_path / "r"
    for responses in ([response(a, b, c)], [response(a, b), response(), response(c)]):
        path.write_text(WAYS[way](responses).replace("\\u00e9", "é"), encoding="utf-8")
        assert find_reader(path) == "vllm"
        trace = mt.open_input(path, num_experts=8)
        assert np.array_equal(trace.expert_ids, np.concatenate([moe for _, moe in arrays]))
        assert np.bincount(trace.sequence).tolist() == [5, 1, 30]


def test_arrays(tmp_path):
    """Archives of sequences; .npy in either order; text that JSON writes with escapes."""
    arrays = [routed(tokens, seed=tokens) for tokens in (4, 9, 2)]
    np.savez(tmp_path / "a.npz", *(a for a, _ in arrays))
    trace = mt.open_input(tmp_path / "a.npz", num_experts=8)
    assert np.array_equal(trace.expert_ids, np.concatenate([moe for _, moe in arrays]))
    assert np.bincount(trace.sequence).tolist() == [4, 9, 2]
    np.save(tmp_path / "f.npy", np.asfortranarray(arrays[1][0]))
    trace = mt.open_input(tmp_path / "f.npy", num_experts=8)
    assert np.array_equal(trace.expert_ids, arrays[1][1])
    text = json.dumps(response(arrays[1][0])).replace("/", "\\/")
    (tmp_path / "escaped.json").write_text(text)
    trace = mt.open_input(tmp_path / "escaped.json", num_experts=8)
    assert np.array_equal(trace.expert_ids, arrays[1][1])


@pytest.mark.parametrize(
    ("served", "model", "experts"),
    [
        (["openai/gpt-oss-20b"], "openai/gpt-oss-20b", 32),
        # The name of an adapter, or none, says nothing.
        (["openai/gpt-oss-20b", "my-lora", None], "openai/gpt-oss-20b", 32),
        (["default"], None, None),
        # An alias: the published model of this name has 8 experts a token.
        (["Qwen/Qwen3-30B-A3B"], None, None),
    ],
)
def test_a_served_model_is_known_by_its_published_name(tmp_path, served, model, experts):
    """Responses name their model; where it is a published one, that says its number of experts."""
    ids = random_ids(9, 2, 4, 16)
    answers = [response(ids) | ({} if name is None else {"model": name}) for name in served]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, answers)))
    if experts is None:
        with pytest.raises(ValueError, match="num_experts is needed"):
            mt.open_input(tmp_path / "r.jsonl")
        experts = 16
        assert mt.open_input(tmp_path / "r.jsonl", num_experts=experts).model is None
        return
    trace = mt.open_input(tmp_path / "r.jsonl")
    assert (trace.model, trace.num_experts) == (model, experts)
    assert mt.open_input(tmp_path / "r.jsonl", num_experts=16).model is None


def test_dense_layers(tmp_path):
    """With one expert a token, zeros may be expert 0: only rows of nothing else are dense."""
    ids = np.array([[[0], [0], [3]], [[0], [1], [0]]], dtype=np.uint8)
    (tmp_path / "r.json").write_text(json.dumps(response(ids)))
    assert np.array_equal(mt.open_input(tmp_path / "r.json", num_experts=4).expert_ids, ids[:, 1:])
    none = mt.open_input(tmp_path / "r.json", num_experts=4, dense_layers=[])
    assert np.array_equal(none.expert_ids, ids)
    with pytest.raises(ValueError, match="dense_layers must be below 3"):
        mt.open_input(tmp_path / "r.json", num_experts=4, dense_layers=[3])
    with pytest.raises(ValueError, match="must leave a layer"):
        mt.open_input(tmp_path / "r.json", num_experts=4, dense_layers=range(3))
    # The wrong layers are found when they are read: a token has an expert twice.
    (tmp_path / "k.json").write_text(json.dumps(response(routed(3)[0])))
    with pytest.raises(ValueError, match=r"k\.json: .*layer 0"):
        mt.open_input(tmp_path / "k.json", num_experts=8, dense_layers=[2]).expert_ids.sum()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), min_size=1, max_size=5),
    st.sampled_from([2, 7, 100, 1 << 22]),
)
def test_records_are_those_of_json(tmp_path_factory, objects, chunk):
    """Objects come out as they were, however they are written and in what parts they are read."""
    path = tmp_path_factory.mktemp("records") / "r"
    for written in WAYS.values():
        path.write_text(written(objects), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moetuner.formats.records.CHUNK", chunk)
            assert [fields for _, fields in records(path)] == objects
