"""RoutingCounters: the numbers of the core, counted in torch."""

import contextlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of
from moe_models import build, prompts, refused, torch

import moetuner as mt
from moetuner.torch import RoutingCounters, capture
from moetuner.torch.record import counters as counters_

MODES = (
    contextlib.nullcontext,
    torch.inference_mode,
    # Counts beyond what bfloat16 can say stay exact.
    lambda: torch.autocast("cpu", torch.bfloat16),
)


@given(data=st.data())
def test_same_numbers_as_the_core(data):
    """Any sizes, windows, cuts into updates, masks, types and modes give what the core counts."""
    draw = data.draw
    experts = draw(st.integers(1, 40), "experts")
    top_k = draw(st.integers(1, min(experts, 5)), "top_k")
    layers = draw(st.integers(1, 4), "layers")
    tokens = draw(st.integers(0, 60) | st.just(3000), "tokens")
    window = draw(st.none() | st.integers(max(1, tokens // 60), 25 + tokens), "window")
    wanted = {name: draw(st.booleans(), name) for name in ("transitions", "coactivation")}
    dtype = draw(st.sampled_from([torch.uint8, torch.uint16, torch.int32, torch.int64]))
    ids = random_ids(tokens, layers, top_k, experts, seed=draw(st.integers(0, 1000), "seed"))
    keep = None
    if draw(st.booleans(), "padding"):
        keep = np.random.default_rng(tokens).random(tokens) < 0.6
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=3), "cuts"))
    counters = RoutingCounters(layers, experts, top_k, window=window, **wanted)
    for first, last in zip([0, *cuts], [*cuts, tokens], strict=True):
        mask = None if keep is None else torch.from_numpy(keep[first:last])
        chunk = draw(st.sampled_from([1 << 14, counters_.CHUNK_BYTES]))
        with draw(st.sampled_from(MODES))(), mock.patch.object(counters_, "CHUNK_BYTES", chunk):
            counters.update(torch.from_numpy(ids[first:last]).to(dtype), mask)
    trace = trace_of(ids if keep is None else ids[keep], experts)
    expected = mt.RoutingStatistics.from_trace(trace, window=window, **wanted, sets=False)
    counted = counters.statistics()
    assert (counted.fingerprint, counted.window) == (expected.fingerprint, window)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "offloaded"])
def test_attached_to_a_model(name):
    """Counters of forward passes equal the statistics of the trace, wherever weights are."""
    model, tokens = build(name.replace("offloaded", "mixtral")), prompts()
    if name == "offloaded":
        accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    counters = RoutingCounters.attach(model, window=5)
    with torch.inference_mode(), capture(model) as recorder, counters:
        model(input_ids=tokens, attention_mask=mask)
        model.generate(tokens, attention_mask=mask, max_new_tokens=4)
    with torch.no_grad():
        model(input_ids=tokens)  # neither listens any more
    expected = mt.RoutingStatistics.from_trace(recorder.trace(), window=5, sets=False)
    counted = counters.statistics(model="m")
    assert (counted.fingerprint, counted.window) == (expected.fingerprint, 5)
    assert (counted.model, counters.dropped, recorder.dropped) == ("m", 0, 0)
    counters.reset()
    assert counters.statistics().total_load.sum() == 0


def test_an_expert_named_twice_is_no_pair():
    """A router may do that; statistics have no pairs of an expert with itself."""
    counters = RoutingCounters(1, 4, 3)
    counters.update(torch.tensor([[[1, 1, 2]]]))
    pairs = counters.statistics().coactivation[0]
    assert (pairs[1, 2], pairs[2, 1], pairs[1, 1]) == (2, 2, 0)


def test_bad_input():
    """Sizes, types, devices, ids and windows are checked with a message."""
    refused("top_k must be from 1 to 4, got 5", RoutingCounters, 2, 4, 5)
    counters = RoutingCounters(2, 4, 1)
    ids = torch.zeros(3, 2, 1, dtype=torch.int64)
    for text, arguments in (
        ("expert_ids must be integers [tokens, 2, 1], got torch.int64 [3, 1, 1]", (ids[:, :1],)),
        ("got torch.float32 [3, 2, 1]", (ids.float(),)),
        ("got torch.bool [3, 2, 1]", (ids.bool(),)),
        ("mask must be [3], got [2]", (ids, torch.ones(2))),
        ("expert_ids must be on cpu, got meta", (ids.to("meta"),)),
    ):
        refused(text, counters.update, *arguments)
    for wrong in (4, -1):
        counters.reset()
        counters.update(torch.full((1, 2, 1), wrong), torch.zeros(1))
        assert counters.statistics().total_load.sum() == 0  # of padding nothing is asked
        counters.update(torch.full((1, 2, 1), wrong))
        refused("expert_ids must be from 0 to 3, some were not", counters.statistics)
    counters = RoutingCounters(100, 1 << 16, 1, window=1, transitions=False, coactivation=False)
    ids = torch.zeros(1, 100, 1, dtype=torch.uint16).expand(400, 100, 1)
    refused("windows must fit 16 GiB, got 20 GiB for 400 windows", counters.update, ids)
