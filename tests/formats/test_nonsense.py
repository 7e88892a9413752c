"""Content of the right form that makes no sense: one line says so, and nothing else happens."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moetuner as mt
from moetuner.formats import READERS, WRITERS, pickled, sglang
from moetuner.formats.hints import Hints
from moetuner.formats.layout import faults

KEYS = st.sampled_from(
    (
        *("choices", "routed_experts", "meta_info", "sglext", "usage", "prompt_tokens", "0", "1"),
        *("completion_tokens", "version", "num_slots"),
        *("initial_global_assignments", "num_redundant_experts", "physical_to_logical_map"),
    )
)
scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
scalars |= st.integers() | st.sampled_from(["AAAA", "=", "k05VTVBZAQB2AHsn"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
HINTS = Hints(num_experts=8, top_k=2)


def attempt(path, act):
    """Run something that may refuse in one line."""
    try:
        return act()
    except ValueError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 700
        assert str(path) in text
        return None


@pytest.mark.parametrize("reader", ["vllm", "sglang-responses"])
def test_responses(tmp_path, reader):
    """JSON of the right keys and any values."""
    path = tmp_path / "r"

    @settings(max_examples=settings().max_examples * 3)
    @given(st.dictionaries(KEYS, values, max_size=5) | values)
    def run(content):
        path.write_text(json.dumps(content))
        actual = attempt(path, lambda: READERS[reader].read([path], HINTS))
        if isinstance(actual, mt.RoutingTrace):
            attempt(path, lambda: actual.expert_ids.sum())

    run()


def test_maps(tmp_path):
    """Maps of any values: read as they stand and found faulty, or refused."""
    path, writer = tmp_path / "m", WRITERS["sglang"]

    @settings(max_examples=settings().max_examples * 3)
    @given(st.dictionaries(KEYS, values, max_size=4) | values)
    def run(content):
        path.write_text(json.dumps(content))
        layout = attempt(path, lambda: writer.of.read_map(path, HINTS))
        if layout is not None:
            hints = Hints(devices=2, hidden_layers=3, dense_layers=(0,))
            actual = faults(layout, writer.engine, hints)
            assert all("\n" not in fault for fault in actual)

    run()


def tensors(path):
    """Tensors of small sizes and any types, whose numbers are where the file begins."""
    sizes = st.lists(st.integers(0, 4), max_size=4).map(tuple)

    def make(dtype, shape):
        steps = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
        return pickled.Tensor(path, dtype, shape, steps, 0)

    return st.builds(make, st.sampled_from(sorted(pickled.DTYPES)), sizes)


def test_dumps(tmp_path, monkeypatch):
    """Dumps of the right keys and any values."""
    path = tmp_path / "d.pt"
    path.write_bytes(bytes(4096))
    any_value = scalars | tensors(path) | st.lists(st.integers(-1, 5), max_size=4)
    keys = ["forward_pass_id", "rank", "gatherer_key", "global_physical_count", "positions"]
    keys += ["input_ids", "extend_seq_lens", "topk_ids_of_layer"]
    record = st.dictionaries(st.sampled_from(keys), any_value, max_size=8).map(
        lambda fields: {"forward_pass_id": 0, "rank": 0, **fields}
    )
    dump = st.fixed_dictionaries(
        {},
        optional={
            "logical_count": any_value,
            "records": st.lists(record, max_size=3) | any_value,
            "last_physical_to_logical_map": any_value,
        },
    )

    @settings(max_examples=settings().max_examples * 5)
    @given(dump | any_value)
    def run(content):
        monkeypatch.setattr(pickled, "load", lambda _: content)
        actual = attempt(path, lambda: sglang.read([path], HINTS))
        if isinstance(actual, mt.RoutingTrace):
            attempt(path, lambda: actual.expert_ids.sum())

    run()
