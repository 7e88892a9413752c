"""Engines: what each does with a placement, and the settings of ``Problem`` that follow from it.

The facts were read from released code: vLLM 0.33, SGLang 0.5.23, TensorRT-LLM 1.2, vllm-ascend
0.26, Megatron-Core 0.19, DeepSpeed 0.19, transformers 5.23. In all of them slots are contiguous
blocks of one size: slot p of a layer is on device ``p // (P / D)``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moetuner import router_groups as whole_groups
from moetuner._checks import ArgumentError, instance, one_of, per_device, whole_number
from moetuner.serving.recipes import Recipe
from moetuner.serving.splits import RULES, Split
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology


@dataclass(frozen=True)
class Engine:
    """What an engine does with placements and tokens.

    Parameters
    ----------
    title
        Its name, for people.
    split
        Rule by which it splits tokens over an expert's copies.
    how_split
        The split in words; empty if it has no copies.
    arrival
        Order of its traffic: mixed for engines that serve requests, bursts for training.
    may_copy
        True if an expert may have several slots in a layer.
    renumbers
        True if a placement renumbers the experts of the checkpoint, because the engine reads no
        placement. The router's groups must then stay whole.
    devices
        The only number of devices that it runs on; None for any.
    repeated
        Its way with two copies on one device, to follow its name; empty if it serves both.
    has_low_latency
        True if it may exchange tokens by DeepEP's low-latency kernels, see ``tokens_per_rank``.
    serve
        The command that serves ``placement``, or its map ``experts.json``, of a ``model`` with
        ``redundant`` redundant slots; empty if only the engine's page has it.
    tensor_ranks, data_ranks
        What its command has in place of ``{ranks}``: options by which ranks divide the heads of
        attention, and by which each has all heads.
    on_nodes
        Its options to serve on ``nodes`` nodes, by the same command on each; empty if another
        program starts the nodes.
    nodes_note
        A remark on what every node needs of its own.
    serve_note
        A remark on what else that command needs; empty if nothing.
    bits_notes
        Remarks on weights of so many bits.
    splits_by
        Its options for splits that are not its default, if experts have copies.
    go_back
        Steps that remove the placement again.
    records_by
        Its option that records the experts of every token; empty if it has none.
    record
        The command that records into ``MORE`` on ``devices`` devices; empty if it has none.
    """

    title: str
    split: Split = "even"
    how_split: str = ""
    arrival: Literal["bursts", "mixed"] = "mixed"
    may_copy: bool = True
    renumbers: bool = False
    devices: int | None = None
    repeated: str = ""
    has_low_latency: bool = False
    serve: str = ""
    tensor_ranks: str = "--tensor-parallel-size {devices}"
    data_ranks: str = "--data-parallel-size {devices}"
    on_nodes: str = ""
    nodes_note: str = "on every node, each with its own rank"
    serve_note: str = ""
    bits_notes: Mapping[float, str] = field(default_factory=dict)
    splits_by: Mapping[Split, str] = field(default_factory=dict)
    go_back: str = "serve MODEL, whose files stay as they were"
    records_by: str = ""
    record: str = ""

    @property
    def window_split(self) -> tuple[Split, str] | None:
        """The engine's split of whole windows, and its options; None if it has no such split."""
        pairs = self.splits_by.items()
        return next((pair for pair in pairs if RULES[pair[0]].needs_windows), None)

    def make_serve_recipe(
        self,
        devices: int,
        redundant: int,
        *,
        placement: str = "placement.json",
        model: str = "MODEL",
        nodes: int = 1,
        split: str | None = None,
        bits: float | None = None,
    ) -> Recipe:
        """Return the command that serves a placement's file on devices with redundant slots.

        It tells the engine to split tokens over copies by ``split``, if the engine can. ``bits``
        are those of a weight, None if unknown.
        """
        # Tensor parallelism needs a number of devices that divides the heads of attention. They are
        # not known here, but powers of two divide those of nearly all models, and 7 or 9 do not.
        is_power_of_two = devices & (devices - 1) == 0
        ranks = self.tensor_ranks if is_power_of_two else self.data_ranks
        lines = [self.serve]
        if redundant:
            lines += [options for name, options in self.splits_by.items() if name == split]
        remarks = [self.serve_note, "" if bits is None else self.bits_notes.get(bits, "")]
        if nodes > 1 and self.on_nodes:
            lines.append(self.on_nodes)
            remarks.append(self.nodes_note)
        words: list[str] = []
        for word in shlex.split(" ".join(lines)):
            words += shlex.split(ranks) if word == "{ranks}" else [word]
        return Recipe.fill(
            words,
            "; ".join(filter(None, remarks)),
            devices=devices,
            redundant=redundant,
            placement=placement,
            model=model,
            nodes=nodes,
        )

    def make_record_recipe(self, devices: int, why: str) -> Recipe:
        """Return the command that records into ``MORE`` on devices."""
        return Recipe.fill(shlex.split(self.record), why, devices=devices)


# Programs that do not place whole experts on devices, and why there is nothing to place.
NOTHING_TO_PLACE = "it splits layers or weights over devices, not experts, so nothing is to place"
ONE_GPU = (
    "it divides experts between one GPU and the CPU, so no devices are to balance; which ones the "
    "GPU holds, export --to ktransformers chooses"
)
NO_ENGINES = dict.fromkeys(("llama.cpp", "ollama", "lmstudio"), NOTHING_TO_PLACE)
NO_ENGINES |= dict.fromkeys(("ktransformers", "sglang-kt"), ONE_GPU)

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM",
        "even",
        "by a hash of the token",
        has_low_latency=True,
        serve="MOETUNER_PLACEMENT={placement} vllm serve {model} {ranks} "
        "--enable-expert-parallel --enable-eplb "
        """--eplb-config '{{"num_redundant_experts": {redundant}}}'""",
        on_nodes="--nnodes {nodes} --node-rank 0 --master-addr HOST",
        nodes_note="on every node, each with its own rank, and with --headless on all but the "
        "first",
        bits_notes={4.25: "MXFP4 by Marlin does not start with --enable-eplb, vLLM issue 51567"},
        go_back="start vLLM without MOETUNER_PLACEMENT",
        records_by="--enable-return-routed-experts",
        record="vllm serve MODEL --tensor-parallel-size {devices} --enable-expert-parallel "
        "--enable-return-routed-experts",
    ),
    "sglang": Engine(
        "SGLang",
        "nearest",
        "the nearest, as static dispatch with --moe-a2a-backend does",
        repeated="loads one of them and sends tokens to both",
        has_low_latency=True,
        serve="python -m sglang.launch_server --model {model} {ranks} --ep-size {devices} "
        "--init-expert-location experts.json --ep-num-redundant-experts {redundant}",
        tensor_ranks="--tp-size {devices}",
        data_ranks="--tp-size {devices} --dp-size {devices} --enable-dp-attention",
        on_nodes="--nnodes {nodes} --node-rank 0 --dist-init-addr HOST:PORT",
        serve_note="leave out --enable-eplb, which would replace the map",
        # Without a back end every rank has all tokens, and SGLang takes an expert's copies in turns
        # (dynamic dispatch), which split even is; it refuses the others. Any back end will do.
        splits_by={
            "nearest": "--moe-a2a-backend deepep",
            "lp": "--ep-dispatch-algorithm lp --moe-a2a-backend deepep",
        },
        go_back="start SGLang without --init-expert-location, and with --enable-eplb if it had it",
        records_by="--expert-distribution-recorder-mode per_token",
        record="SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=MORE python -m sglang.launch_server "
        "--model MODEL --tp-size {devices} --ep-size {devices} "
        "--expert-distribution-recorder-mode per_token "
        "--expert-distribution-recorder-buffer-size -1",
    ),
    "tensorrt-llm": Engine(
        "TensorRT-LLM",
        "round_robin",
        "in turns",
        serve="trtllm-serve {model} --tp_size {devices} --ep_size {devices} "
        "--extra_llm_api_options options.yaml",
        serve_note='options.yaml has "moe_config: {load_balancer: experts.yaml}" and '
        '"enable_attention_dp: true"',
        go_back="start TensorRT-LLM without load_balancer",
        record="EXPERT_STATISTIC_ITER_RANGE=100-200 EXPERT_STATISTIC_PATH=MORE trtllm-serve MODEL",
    ),
    "vllm-ascend": Engine(
        "vllm-ascend",
        "even",
        "one for each device, in turns over devices",
        repeated="refuses it",
        serve="vllm serve {model} {ranks} --enable-expert-parallel "
        """--additional-config '{{"eplb_config": {{"expert_map_path": "experts.json"}}}}'""",
        go_back="start vLLM without expert_map_path",
    ),
    "memra": Engine(
        "memra",
        may_copy=False,
        devices=2,
        serve="MEMRA_EP_MAP=experts.json memra ...",
        go_back="start memra without MEMRA_EP_MAP",
        records_by="MEMRA_MOE_TRACE",
    ),
    "megatron": Engine(
        "Megatron-Core",
        arrival="bursts",
        may_copy=False,
        renumbers=True,
        records_by="--moe-routing-trace-path",
        record="torchrun pretrain_gpt.py ... --moe-routing-trace-path MORE",
    ),
    "deepspeed": Engine("DeepSpeed", arrival="bursts", may_copy=False, renumbers=True),
    "transformers": Engine("transformers", arrival="bursts", may_copy=False, renumbers=True),
}


def find_engine(reader: str) -> str | None:
    """Return the engine whose recordings a reader of ``formats`` reads; None for other readers."""
    fitting = [engine for engine in ENGINES if f"{reader}-".startswith(f"{engine}-")]
    return max(fitting, key=len, default=None)


# Readers of recordings from programs that place no experts on devices.
_READS_NO_ENGINE = {"llama-cpp": "llama.cpp"}


def find_recorder(reader: str) -> str | None:
    """Return the program whose recordings a reader reads, which may place no experts."""
    return _READS_NO_ENGINE.get(reader) or find_engine(reader)


# Limit of a buffer of DeepEP's low-latency kernels, in bytes: a signed number of 32 bits counts its
# pieces of 16 bytes.
BUFFER = 16 * (2**31 - 1)


def tokens_per_rank(hidden: int, slots: int) -> int:
    """Compute the tokens that a rank may send at once by DeepEP's low-latency kernels.

    Each of two buffers sends and receives a message for every token and slot of all ranks (copies
    too): a row of size ``hidden`` in 16 bits, and the scales of its blocks of 128
    (``LowLatencyLayout`` of DeepEP 1.2; vLLM's ``max_num_batched_tokens`` and SGLang's
    ``SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK`` have to stay within it).
    """
    message = 2 * hidden + 4 * (hidden // 128)
    signals = -(-4 * slots // 128) * 128
    return int(max((BUFFER - 1 - 2 * signals) // (4 * slots * message), 0))


def engine_settings(
    engine: str,
    statistics: RoutingStatistics,
    topology: Topology,
    *,
    slots_per_device: int | None = None,
    extra_slots: int | None = None,
    router_groups: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of ``Problem`` that say what an engine does.

    Parameters
    ----------
    engine
        ``vllm``, ``sglang``, ``tensorrt-llm``, ``vllm-ascend``, ``memra``, ``megatron``,
        ``deepspeed`` or ``transformers``.
    statistics, topology
        Those of the problem.
    slots_per_device
        Slots of a device in a layer; just enough by default.
    extra_slots
        Instead: slots beyond one for each expert, over all layers.
    router_groups
        Groups that the router chooses among first (``n_group`` of DeepSeek-V3), for engines that
        take a placement as a renumbered checkpoint. No more than there are devices.

    Raises
    ------
    ValueError
        If the engine could not load a placement with these slots, or keep the groups whole; the
        message says what would do.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> settings = mt.engine_settings("vllm", statistics, mt.Topology(2), slots_per_device=3)
    >>> problem = mt.Problem(statistics, mt.Topology(2), **settings)
    >>> problem.split, problem.slots, problem.fill_slots
    ('even', 3, True)
    """
    one_of("engine", engine, ENGINES)
    instance("statistics", statistics, RoutingStatistics)
    instance("topology", topology, Topology)
    capabilities = ENGINES[engine]
    if capabilities.devices not in (None, topology.devices):
        raise ArgumentError(
            f"devices must be {capabilities.devices} for {capabilities.title}, "
            f"got {topology.devices}",
            "devices",
        )
    settings: dict[str, Any] = {
        "regime": "dispatch",  # tokens fan out from their home device and come back, in all of them
        "split": capabilities.split,
        "arrival": capabilities.arrival,
        "slots_per_device": _check_slots(
            capabilities, statistics, topology, slots_per_device, extra_slots
        ),
        "fill_slots": capabilities.may_copy,
    }
    if router_groups is not None and capabilities.renumbers:
        if topology.devices % whole_number("router_groups", router_groups):
            raise ArgumentError(
                f"router_groups must divide {topology.devices} devices, got {router_groups}: with "
                "fewer devices than groups, place the groups themselves, in Python "
                "(moetuner.router_groups.merge and expand)",
                "router_groups",
            )
        settings["forbidden"] = whole_groups.forbid(
            statistics.num_experts, router_groups, topology.devices
        )
    return settings


def _check_slots(
    engine: Engine,
    statistics: RoutingStatistics,
    topology: Topology,
    slots_per_device: Any,
    extra_slots: int | None,
) -> int:
    """Return the slots of a device in a layer, checked against what the engine can load."""
    experts, devices = statistics.num_experts, topology.devices
    fewest = -(-experts // devices)
    limit = experts if engine.may_copy else fewest
    if not engine.may_copy and experts % devices:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        larger = [n for n in divisors if n > devices]
        alternatives = [max(n for n in divisors if n < devices), *larger]
        raise ArgumentError(
            f"devices must divide {experts} experts, as {engine.title} has no copies of experts, "
            f"got {devices}: {' or '.join(map(str, alternatives[:2]))} would",
            "devices",
        )
    if extra_slots is not None:
        if slots_per_device is not None:
            raise ArgumentError(
                "slots_per_device and extra_slots cannot both be given",
                "slots_per_device",
                "extra_slots",
            )
        step, needed = statistics.layers * devices, statistics.layers * experts
        slots_per_device, rest = divmod(
            needed + whole_number("extra_slots", extra_slots, lowest=0), step
        )
        if rest:
            fit = [n * step - needed for n in (slots_per_device, slots_per_device + 1)]
            raise ArgumentError(
                f"extra_slots must give every device as many slots in every layer, as "
                f"{engine.title} has them, got {extra_slots}: "
                f"{' or '.join(str(n) for n in fit if n >= 0)} would",
                "extra_slots",
            )
    if slots_per_device is None:
        slots_per_device = topology.slots_per_device or fewest
    if isinstance(slots_per_device, tuple | list | np.ndarray):
        slots_per_device, *others = sorted(
            per_device("slots_per_device", slots_per_device, devices)
        )
        if others and others[-1] != slots_per_device:
            raise ArgumentError(
                f"slots_per_device must be the same on every device, as {engine.title} has them, "
                f"got {slots_per_device} to {others[-1]}: {others[-1]} on every device would do",
                "slots_per_device",
            )
    slots = whole_number("slots_per_device", slots_per_device)
    if not fewest <= slots <= limit:
        raise ArgumentError(
            f"slots_per_device must be from {fewest} to {limit} for {experts} experts on {devices} "
            f"devices of {engine.title}, got {slots}",
            "slots_per_device",
        )
    return slots
