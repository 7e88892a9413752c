"""Common machines: devices of a node, and the links inside and between nodes.

Bandwidths are bytes per second and direction of one device's port, from vendors' data sheets; half
of what is advertised where both directions were added up. What a transport reaches is less, but all
tiers lose alike, so the ratios that a placement depends on hold. Latencies are those that NCCL
plans with for its fastest protocol (`hwLat` in its tuning code, rounded): what a first byte takes.
Islands of PCIe cards have bandwidths that were measured.
"""

from __future__ import annotations

from typing import NamedTuple

NVLINK_LATENCY = 0.6e-6
PCIE_LATENCY = 1.0e-6
# Measured where the driver lets no card write to another: the pages of the islands below say where.
HOST_LATENCY = 14e-6
NETWORK_LATENCY = 5.0e-6


class MachinePreset(NamedTuple):
    """One kind of node, what connects several of them, and a device's bytes of memory if known."""

    devices_per_node: int
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    intra_node_latency: float = NVLINK_LATENCY
    inter_node_latency: float = NETWORK_LATENCY
    memory: float | None = None


# Memory is of the data sheets, too: of a DGX B200, a DGX B300 and the NVL72 a share of the whole.
MACHINES = {
    # DGX A100 data sheet: NVLink 3, 600 GB/s both ways; one 200 Gbit/s ConnectX-6 per GPU.
    "a100-nvl8-ib200": MachinePreset(8, 300e9, 25e9, memory=80e9),
    # H800: NVLink cut to 400 GB/s both ways, 400 Gbit/s per GPU (DeepSeek-V3 report, section 3.1).
    "h800-nvl8-ib400": MachinePreset(8, 200e9, 50e9, memory=80e9),
    # DGX H100 and H200 data sheets: NVLink 4, 900 GB/s both ways; one 400 Gbit/s ConnectX-7 per
    # GPU. H200 differs in memory only.
    "h100-nvl8-ib400": MachinePreset(8, 450e9, 50e9, memory=80e9),
    "h200-nvl8-ib400": MachinePreset(8, 450e9, 50e9, memory=141e9),
    # DGX B200 data sheet: NVLink 5, 1.8 TB/s both ways; one 400 Gbit/s ConnectX-7 per GPU.
    "b200-nvl8-ib400": MachinePreset(8, 900e9, 50e9, memory=180e9),
    # DGX B300 data sheet: as B200 with one 800 Gbit/s ConnectX-8 per GPU.
    "b300-nvl8-ib800": MachinePreset(8, 900e9, 100e9, memory=288e9),
    # NVL72 data sheets: 72 GPUs on one NVLink 5 switch fabric; ConnectX-7 (GB200) or -8 (GB300).
    "gb200-nvl72": MachinePreset(72, 900e9, 50e9, memory=186e9),
    "gb300-nvl72": MachinePreset(72, 900e9, 100e9, memory=279e9),
    # MI300X data sheet: seven Infinity Fabric links of 128 GB/s both ways make a full mesh of
    # eight, so 448 GB/s leave a GPU if all peers are talked to; one 400 Gbit/s port per GPU.
    "mi300x-if8-roce400": MachinePreset(8, 448e9, 50e9, memory=192e9),
    # Boxes without NVLink: x16 slots after line coding, 31.5 (PCIe 4) and 63 GB/s (PCIe 5) per
    # direction. Four GPUs and 100 Gbit/s Ethernet for each two, eight GPUs and 400 Gbit/s each.
    "pcie4-box4-eth100": MachinePreset(4, 31.5e9, 6.25e9, PCIE_LATENCY),
    "pcie5-box8-ib400": MachinePreset(8, 63e9, 50e9, PCIE_LATENCY),
    # Islands: cards on one PCIe root and no network. The roots of two sockets are two nodes, so
    # "pcie5-island4:2" is eight cards on two roots. Measured by others, in what a card gets when
    # all read from all at once: RTX PRO 6000 on PCIe 5 x16, voipmonitor/rtx6kpro at 070506f,
    # hardware/pcie-bandwidth.md. A pair alone 54 GB/s, across sockets 64 GB/s both ways; four on a
    # root 129.7 GB/s together; eight on one root with switches 191.8. Eight on two roots reach
    # 173.1 together, of which four peers in seven are across: 12.4 a card. Sixteen on two roots
    # nobody has measured: as eight.
    "pcie5-island2": MachinePreset(2, 54e9, 32e9, PCIE_LATENCY, PCIE_LATENCY),
    "pcie5-island4": MachinePreset(4, 32.4e9, 12.4e9, PCIE_LATENCY, PCIE_LATENCY),
    "pcie5-island8": MachinePreset(8, 24e9, 12.4e9, PCIE_LATENCY, PCIE_LATENCY),
    # GeForce cards, whose driver has no peer access: all goes through the host's memory. RTX 4090
    # on PCIe 4 x16, tinygrad/open-gpu-kernel-modules issue 6: 25.8 GB/s both ways of a pair, the
    # same across sockets (NVIDIA/nccl issue 1309 says why); 14 us, as in the page above.
    "pcie4-island2": MachinePreset(2, 12.9e9, 12.9e9, HOST_LATENCY, HOST_LATENCY),
}


class Gpu(NamedTuple):
    """Peak numbers of one device: dense operations and bytes per second; bytes of memory."""

    flops_16bit: float
    flops_8bit: float
    memory_bandwidth: float
    memory: float


# Vendors' data sheets of the SXM (OAM) modules, dense: half of what is quoted with sparsity. A100
# has no 8-bit floats, so it computes at its 16-bit rate.
GPUS = {
    "a100": Gpu(312e12, 312e12, 2.039e12, 80e9),
    "h20": Gpu(148e12, 296e12, 4.0e12, 96e9),
    "h100": Gpu(989e12, 1979e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 1979e12, 4.8e12, 141e9),
    "b200": Gpu(2250e12, 4500e12, 8.0e12, 180e9),
    "gb200": Gpu(2500e12, 5000e12, 8.0e12, 186e9),
    "mi300x": Gpu(1307e12, 2615e12, 5.3e12, 192e9),
}


class Measured(NamedTuple):
    """Cost model fitted to times of one device, of experts of one size in 16 bits."""

    base_us: float
    expert_us: float
    start_us: float
    token_us: float
    exposed: float
    prediction_error: float
    measured: tuple[int, int]
    hidden: int
    intermediate: int
    memory: float


# Qwen3-30B-A3B's experts in bfloat16, timed by others, in files under the MIT licence; what
# `bench/gpu/times.py` fits to them. Errors are root mean squares of batches left out.
MEASURED = {
    # casys-kaist/LLMServingSim at 5daddb2, profiler/perf/RTXPRO6000: 50 batches; on average off by
    # 6.4 % on batches left out.
    "rtx-pro-6000-measured": Measured(
        4.92, 6.704, 54.56, 0.03289, 0.503, 0.093, (39, 11), 2048, 768, 96e9
    ),
    # NetX-lab/Frontier at a4b22df, data/profiling/compute/a800: 2472 batches of tensor-parallel
    # size 1, 32 to 128 experts on the device (vLLM's fused kernel); off by 4.4 %.
    "a800-measured": Measured(
        83.3, 7.465, 192.5, 0.07697, 0.548, 0.092, (2013, 459), 2048, 768, 80e9
    ),
}


class Model(NamedTuple):
    """A published model: its routed experts' sizes and number, experts per token, weight bits."""

    hidden: int
    intermediate: int
    top_k: int
    weight_bits: float
    experts: int


# Hidden and intermediate size of a routed expert, and experts per token: `hidden_size`,
# `moe_intermediate_size` (where that is missing `intermediate_size`, of dbrx `d_model` and
# `ffn_hidden_size`) and `num_experts_per_tok` of the config.json that models were published with.
# A name stands for itself and whatever comes after it and "-" or ".", such as "-instruct".
SIZES = {
    (7168, 4864, 2): "snowflake-arctic",
    (6144, 10752, 4): "dbrx",
    (5120, 1536, 6): "deepseek-coder-v2 deepseek-v2",
    (2048, 1408, 6): "deepseek-coder-v2-lite deepseek-moe-16b deepseek-v2-lite moonlight-16b-a3b",
    (7168, 2048, 8): "deepseek-r1 deepseek-v3 kimi-k2 kimi-k2-thinking kimi-k2.5 kimi-k2.6",
    (4096, 1408, 6): "dots.llm1",
    (2560, 1536, 6): "ernie-4.5-21b-a3b",
    (8192, 3584, 8): "ernie-4.5-300b-a47b",
    # As read by deepseek-ai/DeepSeek-V4-Flash's loaders in NeMo AutoModel (top-6 of 256).
    (4096, 2048, 6): "deepseek-v4-flash",
    # zai-org/GLM-5.2, as GLM-5 in THUDM/slime's scripts/models and jd-opensource/xllm's glm5.h.
    (6144, 2048, 8): "glm-5.2",
    (5120, 1536, 8): "glm-4.5 glm-4.6",
    (4096, 1408, 8): "glm-4.5-air",
    (2880, 2880, 4): "gpt-oss-120b gpt-oss-20b",
    (6144, 32768, 2): "grok-1",
    (5120, 8192, 1): "llama-4-maverick llama-4-scout",
    (3072, 1536, 8): "minimax-m2",
    (6144, 9216, 2): "minimax-text-01",
    (6144, 16384, 2): "mixtral-8x22b",
    (4096, 14336, 2): "mixtral-8x7b",
    (2048, 1024, 8): "olmoe-1b-7b",
    (4096, 6400, 2): "phi-3.5-moe",
    (2048, 1408, 4): "qwen1.5-moe-a2.7b",
    (3584, 2560, 8): "qwen2-57b-a14b",
    (4096, 1536, 8): "qwen3-235b-a22b qwen3-vl-235b-a22b",
    (2048, 768, 8): "qwen3-30b-a3b qwen3-coder-30b-a3b qwen3-vl-30b-a3b",
    (6144, 2560, 8): "qwen3-coder-480b-a35b",
    (2048, 512, 10): "qwen3-next-80b-a3b",
    # THUDM/slime, scripts/models/qwen3.5-35B-A3B.sh, qwen36-35B-A3B.sh, qwen3.5-397B-A17B.sh.
    (2048, 512, 8): "qwen3.5-35b-a3b qwen3.6-35b-a3b",
    (4096, 1024, 10): "qwen3.5-397b-a17b",
}

# Routed experts of a layer: `n_routed_experts`, `num_experts` or `num_local_experts` there.
EXPERTS = {
    8: "grok-1 mixtral-8x22b mixtral-8x7b",
    16: "dbrx llama-4-scout phi-3.5-moe",
    32: "gpt-oss-20b minimax-text-01",
    60: "qwen1.5-moe-a2.7b",
    64: "deepseek-coder-v2-lite deepseek-moe-16b deepseek-v2-lite moonlight-16b-a3b olmoe-1b-7b "
    "ernie-4.5-21b-a3b ernie-4.5-300b-a47b qwen2-57b-a14b",
    128: "snowflake-arctic dots.llm1 glm-4.5-air gpt-oss-120b llama-4-maverick qwen3-235b-a22b "
    "qwen3-vl-235b-a22b qwen3-30b-a3b qwen3-coder-30b-a3b qwen3-vl-30b-a3b",
    160: "deepseek-coder-v2 deepseek-v2 glm-4.5 glm-4.6 qwen3-coder-480b-a35b",
    256: "deepseek-r1 deepseek-v3 deepseek-v4-flash glm-5.2 minimax-m2 qwen3.5-35b-a3b "
    "qwen3.6-35b-a3b",
    384: "kimi-k2 kimi-k2-thinking kimi-k2.5 kimi-k2.6",
    512: "qwen3-next-80b-a3b qwen3.5-397b-a17b",
}
_EXPERTS = {name: number for number, names in EXPERTS.items() for name in names.split()}

# Bits of a routed expert's weight, as published: `torch_dtype` is bfloat16 but where a
# `quantization_config` says fp8 (blocks of 128 x 128 have one scale, which is nothing), mxfp4 (a
# scale of 8 bits for 32 weights) or int4 in groups of 32 (a scale of 16 bits); grok-1's own
# checkpoint has weights in int8.
PUBLISHED_BITS = {
    8: "deepseek-r1 deepseek-v3 kimi-k2 minimax-m2 grok-1",
    4.25: "gpt-oss-120b gpt-oss-20b deepseek-v4-flash",
    4.5: "kimi-k2-thinking kimi-k2.5 kimi-k2.6",
}
_BITS = {name: bits for bits, names in PUBLISHED_BITS.items() for name in names.split()}
MODELS = {
    name: Model(*size, _BITS.get(name, 16.0), _EXPERTS[name])
    for size, names in SIZES.items()
    for name in names.split()
}


class Beside(NamedTuple):
    """What a model has beside its routed experts.

    Parameters
    ----------
    kv_values
        Numbers that a token keeps in the KV cache, of all layers: twice the KV heads times their
        size for a layer with attention, or with MLA the rank and the part that is rotated.
    parameters
        Parameters outside the routed experts, which every device holds where attention is data
        parallel.
    """

    kv_values: int
    parameters: float


# `num_hidden_layers`, `num_key_value_heads` and `head_dim` (with MLA `kv_lora_rank` plus
# `qk_rope_head_dim`) of the config.json that models were published with; layers with linear
# attention keep nothing per token, and windows of attention are taken as long as the context.
# Parameters are the published total less the routed experts, rounded.
BESIDE_EXPERTS = {
    "dbrx": Beside(40 * 2 * 8 * 128, 4.8e9),
    **dict.fromkeys(["deepseek-coder-v2", "deepseek-v2"], Beside(60 * 576, 13e9)),
    **dict.fromkeys(["deepseek-coder-v2-lite", "deepseek-v2-lite"], Beside(27 * 576, 1.3e9)),
    "deepseek-moe-16b": Beside(28 * 2 * 16 * 128, 1.4e9),
    "moonlight-16b-a3b": Beside(27 * 576, 1.6e9),
    **dict.fromkeys(["deepseek-r1", "deepseek-v3"], Beside(61 * 576, 17e9)),
    **dict.fromkeys(
        ["kimi-k2", "kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6"], Beside(61 * 576, 11.6e9)
    ),
    "dots.llm1": Beside(62 * 2 * 32 * 128, 7.7e9),
    "ernie-4.5-21b-a3b": Beside(28 * 2 * 4 * 128, 1.5e9),
    "ernie-4.5-300b-a47b": Beside(54 * 2 * 8 * 128, 12e9),
    **dict.fromkeys(["glm-4.5", "glm-4.6"], Beside(92 * 2 * 8 * 128, 17e9)),
    "glm-4.5-air": Beside(46 * 2 * 8 * 128, 7e9),
    "gpt-oss-120b": Beside(36 * 2 * 8 * 64, 2.1e9),
    "gpt-oss-20b": Beside(24 * 2 * 8 * 64, 1.8e9),
    "grok-1": Beside(64 * 2 * 8 * 128, 4.9e9),
    "llama-4-maverick": Beside(48 * 2 * 8 * 128, 14.2e9),
    "llama-4-scout": Beside(48 * 2 * 8 * 128, 12e9),
    "minimax-m2": Beside(62 * 2 * 8 * 128, 4e9),
    "minimax-text-01": Beside(10 * 2 * 8 * 128, 21e9),
    "mixtral-8x22b": Beside(56 * 2 * 8 * 128, 5.3e9),
    "mixtral-8x7b": Beside(32 * 2 * 8 * 128, 1.6e9),
    "olmoe-1b-7b": Beside(16 * 2 * 16 * 128, 0.5e9),
    "phi-3.5-moe": Beside(32 * 2 * 8 * 128, 1.6e9),
    "qwen1.5-moe-a2.7b": Beside(24 * 2 * 16 * 128, 1.9e9),
    "qwen2-57b-a14b": Beside(28 * 2 * 4 * 128, 8.1e9),
    **dict.fromkeys(["qwen3-235b-a22b", "qwen3-vl-235b-a22b"], Beside(94 * 2 * 4 * 128, 8e9)),
    **dict.fromkeys(
        ["qwen3-30b-a3b", "qwen3-coder-30b-a3b", "qwen3-vl-30b-a3b"],
        Beside(48 * 2 * 4 * 128, 1.5e9),
    ),
    "qwen3-coder-480b-a35b": Beside(62 * 2 * 8 * 128, 12.1e9),
    "qwen3-next-80b-a3b": Beside(12 * 2 * 2 * 256, 2.4e9),
    "snowflake-arctic": Beside(35 * 2 * 8 * 128, 11e9),
}

# Words that follow the name of a model in that of another one: small models that were taught by
# it, drafts of its tokens, and what experts were taken out of.
OTHER_MODELS = {
    *("distill", "distilled", "lite", "mini", "small", "nano", "tiny"),
    *("draft", "drafter", "speculator", "speculators", "eagle", "eagle2", "eagle3", "nextn"),
    *("reap", "pruned", "embed", "embedding", "reranker"),
}
# So does a number of parameters, as in R1-0528-Qwen3-8B, but for these, which are of all of the
# model (DeepSeek-R1-671B) or of what a token uses (Llama-4-Scout-17B-16E).
OWN_SIZES = {"17b", "236b", "671b", "685b"}

# Bits of a weight that a word in the name of a checkpoint says, whatever its model was published
# in; with the scales of groups of 32 (MXFP4), 16 (NVFP4, which NVIDIA calls FP4) and 128 weights
# (int4, with a zero, too), of 64 (as MLX writes 4bit), and of llama.cpp's types, whose mixtures of
# one number (Q4_0, Q4_K_S, Q4_K_M) are at most half a bit apart.
BITS_IN_NAMES = {
    **dict.fromkeys(("fp32", "f32", "float32"), 32.0),
    **dict.fromkeys(("bf16", "fp16", "f16", "bfloat16", "float16"), 16.0),
    **dict.fromkeys(("fp8", "float8", "int8"), 8.0),
    "mxfp8": 8.25,
    "mxfp6": 6.25,
    "mxfp4": 4.25,
    **dict.fromkeys(("nvfp4", "fp4", "nf4"), 4.5),
    "int4": 4.16,
    **{f"{bits}bit": bits + 0.5 for bits in (2, 3, 4, 5, 6, 8)},
    **dict(zip(("q8", "q6", "q5", "q4", "q3", "q2"), (8.5, 6.56, 5.6, 4.7, 3.7, 2.9), strict=True)),
    **dict(zip(("iq4", "iq3", "iq2", "iq1"), (4.35, 3.4, 2.4, 1.65), strict=True)),
    # Weights and what they are multiplied with; the first number is that of the weights.
    **dict.fromkeys(("w8a8", "w8a16", "w8afp8"), 8.0),
    **dict.fromkeys(("w4a4", "w4a8", "w4afp8"), 4.0),
    "w4a16": 4.16,
}
# Ways to quantise, which have 4 bits where no other word says how many.
FOUR_BIT_WAYS = ("awq", "gptq")
BITS_IN_NAMES |= dict.fromkeys(FOUR_BIT_WAYS, 4.16)
