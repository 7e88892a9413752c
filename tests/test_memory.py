"""Memory of a device: KV cache of a token, and what is left for it beside the weights."""

import pytest

from moetuner.cost import bytes_of_expert, public_name
from moetuner.cost.memory import compute_memory, kv_bytes_of, memory_of
from moetuner.presets import BESIDE_EXPERTS, MODELS

# Layers, KV heads and the size of a head; with MLA layers, and the rank with the rotated part.
BY_HAND = {
    "Qwen/Qwen3-30B-A3B": 48 * 2 * 4 * 128 * 2,
    "Qwen3-235B-A22B-FP8": 94 * 2 * 4 * 128 * 2,
    "deepseek-ai/DeepSeek-V3": 61 * (512 + 64) * 2,
    "openai/gpt-oss-20b": 24 * 2 * 8 * 64 * 2,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 32 * 2 * 8 * 128 * 2,
}


@pytest.mark.parametrize("model", BY_HAND)
def test_kv_cache_of_a_token_is_as_by_hand(model):
    """Layers times keys and values of all heads, in two bytes."""
    assert kv_bytes_of(model) == BY_HAND[model]


def test_a_slot_is_worth_the_tokens_that_were_measured():
    """Others measured 4,712 and 9,316 tokens of cache less with a slot more; the formula's differ.

    vLLM rounds to blocks and holds buffers; 2 % and 1 % are left.
    """
    for model, layers, measured in (
        ("qwen3-30b-a3b", 48, 4712),
        ("qwen3-235b-a22b-fp8", 94, 9316),
    ):
        size = bytes_of_expert(None, model)
        memory = compute_memory(model, layers=layers, slots=4, expert_bytes=size, device_bytes=8e10)
        assert memory.cache_tokens(1) == pytest.approx(measured, rel=0.025)


def test_what_is_left_is_the_memory_less_the_weights():
    """Nine tenths of the memory, less experts and the rest, of which 8 bits are half of 16."""
    size = 3 * 7168 * 2048
    memory = compute_memory(
        "deepseek-v3", layers=58, slots=8, expert_bytes=size, device_bytes=141e9
    )
    assert memory.cache == pytest.approx(0.9 * 141e9 - 17e9 - 8 * 58 * size)
    assert memory.cache_share(2) == pytest.approx(2 * 58 * size / memory.cache)
    assert memory.cache_share(1000) == 1
    none = compute_memory("deepseek-v3", layers=58, slots=64, expert_bytes=size, device_bytes=80e9)
    assert none.cache < 0
    assert none.cache_share(0) == none.cache_share(1) == 1
    unknown = compute_memory(None, layers=2, slots=1, expert_bytes=1e6, device_bytes=1e9)
    assert (unknown.cache, unknown.token) == (0.9e9 - 2e6, None)
    assert unknown.cache_tokens(1) is None
    given = compute_memory(
        "gpt-oss-20b", layers=2, slots=1, expert_bytes=1e6, device_bytes=1e10, kv_bytes=500.0
    )
    assert given.cache_tokens(3) == 12_000


def test_presets_are_of_models_and_devices_that_are_known():
    """Names are public ones; parameters are less than the experts'; GPUs have gigabytes."""
    assert BESIDE_EXPERTS.keys() <= MODELS.keys()
    assert all(public_name(name) == name for name in BESIDE_EXPERTS)
    assert all(0 < beside.parameters < 22e9 for beside in BESIDE_EXPERTS.values())
    assert memory_of(None, "h100:2880x2880") == memory_of("mine", "h100") == 80e9
    assert memory_of("h200-nvl8-ib400:2", "h100") == 141e9
    assert memory_of("pcie4-box4-eth100", "a800-measured") == 80e9
    assert memory_of(None, None) is memory_of("mine", "mine") is None
