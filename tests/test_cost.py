"""CostModel: the formula, its fit to measurements, and the prices that it gives solvers."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner import cost
from moetuner.cost import busiest_ports
from moetuner.presets import GPUS, MEASURED
from moetuner.report.outcome import find_times
from moetuner.report.words import say

MODEL = mt.CostModel(20, 3, 12, 0.05, token_bytes=1000, combine_bytes=3000)
LINKS = {"intra_node_bandwidth": 100e9, "inter_node_bandwidth": 10e9}
NODES = mt.Topology(4, 2, **LINKS, intra_node_latency=1e-6, inter_node_latency=5e-6)


def fitted(tokens, experts, errors=1.0, *, seed=0, noise=0.03, outliers=0.0, of=MODEL):
    """Fit a cost model to times of another with errors and noise, some three times as long."""
    rng = np.random.default_rng(seed)
    times = of.compute_us(tokens, experts) * np.exp(rng.normal(0, noise, len(tokens))) * errors
    times = np.where(rng.random(len(tokens)) < outliers, 3 * times, times)
    return mt.CostModel.fit(tokens, experts, times, token_bytes=1)


def grid():
    """Batches from one token to many, on few experts and on many."""
    tokens = np.repeat(2.0 ** np.arange(0, 14), 6)
    return tokens, np.minimum(tokens, np.tile([1, 2, 4, 8, 16, 32], 14))


def test_compute_is_the_larger_of_two_lines():
    """Few tokens on many experts read weights; many tokens on few compute."""
    assert MODEL.compute_us([10, 1000], [8, 8]).tolist() == [20 + 3 * 8, 12 + 50]
    assert MODEL.compute_us([1000, 1000], [8, 8], speed=[1, 2]).tolist() == [62, 31]
    assert MODEL.compute_us([0.0]).tolist() == [20]


@given(st.floats(0, 1), st.floats(0, 1e6), st.floats(0, 500), st.floats(0.5, 2))
def test_exposed_computing_adds_to_reading(exposed, tokens, active, speed):
    """The formula, term by term; without a share it is the larger of two lines."""
    model = replace(MODEL, exposed=exposed)
    reading, computing = 20 + 3 * active, 0.05 * tokens
    wanted = max(reading + exposed * computing, 12 + computing) / speed
    actual = model.compute_us([tokens], [active], speed=[speed])
    assert actual == pytest.approx([wanted])
    assert MODEL.compute_us([tokens], [active], speed=[speed]) <= actual


@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.floats(0, 500),
)
def test_no_placement_computes_faster_than_the_least(seed, devices, exposed, are_even, base_us):
    """Wherever single experts are, the slowest device takes at least the least of all."""
    rng = np.random.default_rng(seed)
    model = replace(MODEL, exposed=exposed, base_us=base_us)
    speed = np.ones(devices) if are_even else rng.choice([0.5, 1.0, 2.0], devices)
    load = rng.integers(0, 40, 12) * rng.integers(0, 40, 12).astype(float)
    device_of = rng.integers(0, devices, 12)
    tokens = np.bincount(device_of, load, devices)
    active = np.bincount(device_of, load > 0, devices)
    least = model.least_compute_us(
        (tokens / speed).max(), np.float64(active.sum()), load.sum(), speed, are_single=True
    )
    assert least <= model.compute_us(tokens, active, speed).max() * (1 + 1e-12)


def test_fit_recovers_the_share_that_is_exposed():
    """Of times with a share it is found; of times without one it stays at nothing, see below."""
    actual = fitted(*grid(), of=replace(MODEL, exposed=0.5))
    assert actual.exposed == pytest.approx(0.5, abs=0.1)
    assert actual.token_us == pytest.approx(MODEL.token_us, rel=0.05)


@pytest.mark.parametrize(("seed", "outliers"), [(0, 0.0), (2, 0.05)])
def test_fit_recovers_what_made_the_measurements(seed, outliers):
    """With noise of 3 %, and some wild ones, times are predicted within 5 %; none is exposed."""
    tokens, experts = grid()
    actual = fitted(tokens, experts, seed=seed, outliers=outliers)
    wanted = MODEL.compute_us(tokens, experts)
    assert np.abs(actual.compute_us(tokens, experts) / wanted - 1).max() < 0.05
    assert actual.token_us == pytest.approx(MODEL.token_us, rel=0.04)
    assert actual.expert_us == pytest.approx(MODEL.expert_us, rel=0.1)
    if not outliers:
        assert actual.exposed == 0
        assert actual.residual == pytest.approx(0.03, rel=0.35)


def test_fit_without_noise_is_exact(tmp_path):
    """Two lines that meet in the middle are found again; what is known of a fit is saved."""
    tokens, experts = grid()
    actual = fitted(tokens, experts, noise=0)
    assert actual.residual < 1e-6
    # How many measurements were of each regime is known as well.
    assert sum(actual.measured) == len(tokens)
    assert actual.measured[1] == (12 + 0.05 * tokens > 20 + 3 * experts).sum()
    lines = [actual.base_us, actual.expert_us, actual.start_us, actual.token_us]
    assert lines == pytest.approx([20, 3, 12, 0.05], rel=1e-3)
    for model in (MODEL, actual):
        model.save(tmp_path / "model.json")
        assert mt.CostModel.load(tmp_path / "model.json") == model


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("regime", "tokens"), [("reading weights", (1, 100)), ("computing", (5000, 50_000))]
)
def test_one_regime_is_refused(regime, tokens, seed, noise):
    """What was never measured is not known; the message says what was, and what to add."""
    rng = np.random.default_rng(seed)
    batches = rng.uniform(*tokens, 40), rng.integers(1, 32, 40)
    with pytest.raises(ValueError, match=f"both regimes, got {regime} only: add (few|many) tokens"):
        fitted(*batches, seed=seed, noise=noise)


def test_a_line_through_one_size_is_refused():
    """All batches that compute had the same number of tokens: their slope is not known."""
    tokens, experts = np.r_[np.full(20, 10.0), np.full(5, 9000.0)], np.r_[np.arange(1, 21), [1] * 5]
    with pytest.raises(ValueError, match="at least 3 batches of computing, of two sizes"):
        fitted(tokens, experts, noise=0)


def test_repeats_of_a_batch_are_left_out_together():
    """A batch measured twenty times predicts itself, and only itself: repeats are one."""
    rng = np.random.default_rng(0)
    tokens, experts = (np.repeat(column[::4], 20) for column in grid())
    # Every batch has an error of its own, which all its repeats have.
    own = np.repeat(np.exp(rng.normal(0, 0.2, len(tokens) // 20)), 20)
    actual = fitted(tokens, experts, own, noise=0)
    assert actual.prediction_error > 1.15 * actual.residual


def test_errors_of_a_fit_are_what_they_are():
    """Over four fits the stated errors are near those that were made, of a known model."""
    tokens, experts = (column[::3] for column in grid())
    fits = [fitted(tokens, experts, seed=seed, noise=0.1) for seed in range(4)]
    made = np.std([[f.base_us, f.expert_us, f.start_us, f.token_us] for f in fits], axis=0)
    said = np.median([f.parameter_errors for f in fits], axis=0)[:4]
    assert (said > made / 3).all()
    assert (said < made * 3).all()
    assert np.mean([f.prediction_error for f in fits]) == pytest.approx(0.1, rel=0.4)


@given(st.lists(st.integers(0, 50), min_size=16, max_size=16))
def test_busiest_port_is_the_largest_in_or_out(rows):
    """Every tier has ports of its own; what stays on a device uses none."""
    sent = np.array(rows).reshape(4, 4)
    actual = busiest_ports(sent, NODES)
    assert len(actual) == 2
    for tier, port in enumerate(actual, 1):
        through = np.where(NODES.tier == tier, sent, 0)
        assert port == max(*through.sum(axis=0), *through.sum(axis=1))


def test_exchange_is_latency_and_bytes_of_the_busiest_port():
    """Both tiers count, one after the other; an idle tier has no latency."""
    sent = np.zeros((2, 4, 4))
    sent[0, 0, 1], sent[1, 0, 1], sent[1, 3, 1] = 200, 200, 50
    inside, beyond = 1 + 200 * 1000 / 100e9 * 1e6, 5 + 50 * 1000 / 10e9 * 1e6
    assert MODEL.ports_us(busiest_ports(sent, NODES), NODES) == pytest.approx(
        [inside, inside + beyond]
    )
    back = 1 + 200 * 3000 / 100e9 * 1e6
    ports = busiest_ports(sent[0], NODES)
    assert MODEL.ports_us(ports, NODES, bytes_each=MODEL.bytes_back) == pytest.approx(back)


def test_layer_is_the_sum_less_the_overlap():
    """Without overlap the sum, with full overlap the longer of the two."""
    for overlap, wanted in ((0, 90), (0.5, 75), (1, 60)):
        model = mt.CostModel(1, 1, 1, 1, token_bytes=1, overlap=overlap)
        assert model.layer_us([[10, 60]], [30]).tolist() == [wanted]


def test_a_row_over_a_link_costs_its_part_of_the_busiest_port():
    """One token more costs a D-th of its bytes, there and back or one way."""
    topology = mt.Topology(4, 2, **LINKS)
    actual = MODEL.crossing_us(topology, returns=True)
    assert actual == pytest.approx([0, 4000 / 100e9 * 1e6 / 4, 4000 / 10e9 * 1e6 / 4])
    assert MODEL.crossing_us(topology, returns=False) == pytest.approx(actual / 4)


@pytest.mark.parametrize("gpu", GPUS)
def test_presets_follow_the_roofline(gpu):
    """More tokens per expert than operations per byte make computing the longer part."""
    model = mt.CostModel.preset(gpu, hidden=4096, intermediate=1024, dtype_bytes=2)
    knee = GPUS[gpu].flops_16bit / GPUS[gpu].memory_bandwidth
    assert model.expert_us / model.token_us == pytest.approx(knee)
    assert (model.token_bytes, model.bytes_back) == (8192, 8192)
    assert model.name == f"{gpu}:4096x1024"
    # By default DeepSeek-V3's sizes, sent in 8 bits and returned in 16.
    model = mt.CostModel.preset(gpu, overlap=0.5)
    assert (model.token_bytes, model.combine_bytes, model.overlap) == (7168, 14336, 0.5)


@pytest.mark.parametrize("gpu", MEASURED)
def test_measured_presets_say_so_only_of_what_was_measured(gpu):
    """Experts of other sizes take time by their weights, and are called scaled and predicted."""
    own = mt.CostModel.preset(gpu, hidden=2048, intermediate=768)
    assert (own.name, own.token_bytes) == (f"{gpu}:2048x768", 4096)
    said = say(find_times(own, None))
    assert said.startswith(f"Times of experts are measured ({gpu}:2048x768), weights in 16")
    other = mt.CostModel.preset(gpu, hidden=4096, intermediate=1536, overlap=0.5)
    assert say(find_times(other, None)).startswith("Times are predicted, not measured")
    assert other.name == f"{gpu}:4096x1536 (scaled from 2048x768)"
    assert (other.expert_us, other.token_us) == (4 * own.expert_us, 4 * own.token_us)
    assert (other.base_us, other.exposed, other.overlap) == (own.base_us, own.exposed, 0.5)
    with pytest.raises(ValueError, match="dtype_bytes must be 2, as measured, got 1"):
        mt.CostModel.preset(gpu, dtype_bytes=1)
    with pytest.raises(ValueError, match="weight_bits must be 16, as measured, got 8"):
        mt.CostModel.preset(gpu, weight_bits=8)


@pytest.mark.parametrize("bits", [4.25, 8, 16])
def test_weights_have_bits_of_their_own(bits):
    """Reading takes the time of the weights' bits; tokens are of 8 bits where weights are."""
    peak, dtype_bytes = GPUS["h100"], 1 if bits == 8 else 2
    model = mt.CostModel.preset("h100", hidden=4096, intermediate=1024, weight_bits=bits)
    flops = peak.flops_8bit if bits == 8 else peak.flops_16bit
    expected = (3 * 4096 * 1024 * bits / 8 / peak.memory_bandwidth, 6 * 4096 * 1024 / flops)
    assert (model.expert_us, model.token_us) == pytest.approx(np.array(expected) / 0.6 * 1e6)
    assert (model.token_bytes, model.weight_bits) == (4096 * dtype_bytes, bits)
    assert f"h100:4096x1024, weights in {bits:g} bits" in say(find_times(model, None))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 16),
        ("Qwen/Qwen3-30B-A3B", 16),
        ("Qwen/Qwen3-30B-A3B-FP8", 8),
        ("zai-org/GLM-4.6", 16),
        ("databricks/dbrx-instruct", 16),
        ("deepseek-ai/DeepSeek-V3-0324", 8),
        ("deepseek-ai/DeepSeek-V2-Lite", 16),
        ("unsloth/DeepSeek-R1-BF16", 16),
        ("moonshotai/Kimi-K2-Instruct", 8),
        ("moonshotai/Kimi-K2-Thinking", 4.5),
        ("MiniMaxAI/MiniMax-M2", 8),
        ("openai/gpt-oss-120b", 4.25),
        ("mine", 8),
        (None, 8),
        ("DeepSeek-V3.2-Exp", 8),
        ("moonshotai/Kimi-K2.5", 4.5),
        ("nvidia/DeepSeek-V3-0324-FP4", 4.5),
        ("nvidia/DeepSeek-R1-NVFP4-v2", 4.5),
        ("amd/DeepSeek-R1-MXFP4-Preview", 4.25),
        ("Qwen3-235B-A22B-w8a8", 8),
        ("DeepSeek-R1-w4a8", 4),
        ("RedHatAI/DeepSeek-R1-quantized.w4a16", 4.16),
        ("DeepSeek-R1-Channel-INT8", 8),
        ("Qwen3-30B-A3B-AWQ", 4.16),
        ("Qwen3-30B-A3B-GPTQ-Int4", 4.16),
        ("Qwen3-30B-A3B-GPTQ-Int8", 8),
        ("Qwen3-30B-A3B-AWQ-8bit", 8.5),
        ("mlx-community/Qwen3-30B-A3B-4-bit", 4.5),
        ("unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M", 4.7),
        ("Qwen3-30B-A3B-UD-Q2_K_XL.gguf", 2.9),
        ("Qwen3-30B-A3B-BF16-INT4", 16),
        ("small-int4", 4.16),
    ],
)
def test_models_have_the_bits_they_were_published_in(name, bits):
    """Unless their name says other ones, and but one; times and bytes are of as many bits."""
    public, type_of_weights = cost.public_name(name), cost.type_in_name(name)
    if public and type_of_weights:  # as commands print a model
        assert cost.weight_bits_of(f"{public}-{type_of_weights}") == bits
    traffic = mt.RoutingStatistics.from_load(np.ones((1, 1, 8), int), model=name)
    model = cost.cost_model_of(traffic)
    assert model.weight_bits == bits
    hidden, intermediate = cost.size_of_expert(traffic) or (7168, 2048)
    read = 3 * hidden * intermediate * bits / 8
    assert cost.bytes_of_expert((hidden, intermediate), name) == read
    # No expert is read faster than the memory gives its bytes.
    assert model.expert_us == pytest.approx(read / GPUS["h100"].memory_bandwidth / 0.6 * 1e6)


def test_what_an_assumed_model_says_to_do_ends_the_assumption(make_trace):
    """Traces and statistics do not change, so the sentence has a call that makes another."""
    trace = replace(make_trace(100), model=None)
    for traffic in (trace, mt.RoutingStatistics.from_trace(trace, window=50)):
        sentence = say(find_times(cost.cost_model_of(traffic), traffic))
        call = sentence.partition(": name one by ")[2].removesuffix(".").replace("...", "name")
        values = {"dataclasses": dataclasses, "traffic": traffic, "name": "mixtral-8x7b"}
        named = eval(call, values)
        model = cost.cost_model_of(named)
        assert model.sizes == "published"
        assert find_times(model, named).kind == "predicted times"
