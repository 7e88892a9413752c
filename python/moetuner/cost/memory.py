"""Memory of a device: what weights take, and what is left for KV cache.

A slot more holds an expert of every layer, in memory that the KV cache would have. A smaller cache
holds fewer tokens: fewer requests at once, and shorter prefixes that need not be read again.
"""

from __future__ import annotations

from typing import NamedTuple

from moetuner.cost.presets import public_name, weight_bits_of
from moetuner.presets import BESIDE_EXPERTS, GPUS, MACHINES, MEASURED

# Share of a device's memory that an engine uses: the default of vLLM's --gpu-memory-utilization;
# SGLang's --mem-fraction-static comes out about as large. The rest is for activations and graphs.
USED = 0.9
# Bytes of a number in the KV cache, in 16 bits: the engines' default.
KV_VALUE_BYTES = 2


class Memory(NamedTuple):
    """Memory of a device, in bytes.

    Parameters
    ----------
    device
        All of it.
    cache
        What is left for KV cache beside weights; 0 or less where the weights do not fit.
    slot
        What a slot more takes: an expert of every layer.
    token
        KV cache of a token; None where the model's attention is unknown.
    """

    device: float
    cache: float
    slot: float
    token: float | None

    def cache_share(self, slots: int) -> float:
        """Return the share of the KV cache that further slots take; 1 where they do not fit."""
        return min(slots * self.slot / self.cache, 1.0) if self.cache > 0 else 1.0

    def cache_tokens(self, slots: int) -> int | None:
        """Return the tokens of KV cache whose room further slots take; None if unknown."""
        return None if self.token is None else round(slots * self.slot / self.token)


def memory_of(machine: str | None, gpu: str | None) -> float | None:
    """Return the bytes of memory of a device; None if neither its machine nor its GPU is known.

    Both are texts of presets, such as "h100-nvl8-ib400:2" and "h100:2880x2880".
    """
    machine, gpu = ((text or "").partition(":")[0] for text in (machine, gpu))
    if machine in MACHINES and MACHINES[machine].memory is not None:
        return MACHINES[machine].memory
    known = GPUS.get(gpu) or MEASURED.get(gpu)
    return None if known is None else known.memory


def kv_bytes_of(model: str | None) -> float | None:
    """Return the bytes of KV cache of a token of a published model; None if it is not known."""
    beside = BESIDE_EXPERTS.get(public_name(model) or "")
    return None if beside is None else float(beside.kv_values * KV_VALUE_BYTES)


def compute_memory(
    model: str | None,
    *,
    layers: int,
    slots: int,
    expert_bytes: float,
    device_bytes: float,
    kv_bytes: float | None = None,
) -> Memory:
    """Compute what is left for KV cache on a device beside its weights.

    Attention is taken as data parallel: every device holds all weights that are not of routed
    experts, and the KV cache of its own requests. Where these weights are unknown they count
    nothing.

    Parameters
    ----------
    model
        Name of the model; None if unknown.
    layers, slots
        Layers with experts, and slots of a device in each.
    expert_bytes
        Bytes of an expert of one layer.
    device_bytes
        Memory of the device.
    kv_bytes
        Bytes of KV cache of a token; by default the model's, in 16 bits.
    """
    beside = BESIDE_EXPERTS.get(public_name(model) or "")
    others = 0.0
    if beside is not None:
        # Models in blocks of 8 bits have all large matrices so; in others only experts are smaller.
        others = beside.parameters * (1 if weight_bits_of(model) == 8 else 2)
    slot = layers * expert_bytes
    cache = USED * device_bytes - others - slots * slot
    return Memory(device_bytes, cache, slot, kv_bytes or kv_bytes_of(model))
