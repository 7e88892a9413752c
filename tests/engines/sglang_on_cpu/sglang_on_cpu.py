"""Let SGLang's expert parallelism, recorder and EPLB run on a CPU (sglang 0.5.23).

A plugin of SGLang's own kind, hooked in by its registry, which logs "Failed to apply hooks" for a
name that is gone: the tests look for that. It takes away what only a GPU has; recording, placing
and the move of weights are SGLang's own. `ENGINES_MAPS=folder` writes the maps in force, one file a
rank; `ENGINES_KEEP_WEIGHTS=1` breaks EPLB on purpose: its maps change and no weight moves.
"""

import json
import os
from pathlib import Path

import broken_rank  # noqa: F401
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

SRT = "sglang.srt."


def nothing(*args, **kwargs):
    """Do nothing, in place of what only a GPU can do."""


def register():
    """Register the hooks; the engine applies them once all plugins have registered."""
    if not torch.cuda.is_available():  # EPLB waits for the device before it looks at the clock
        torch.cuda.synchronize = torch.cuda.empty_cache = nothing
        torch.cuda.is_current_stream_capturing = nothing  # asked while the recorder does not run
    pinned = SRT + "mem_cache.pool_host.common._cuda_host_register"
    HookRegistry.register(pinned, nothing, HookType.REPLACE)
    experts = SRT + "layers.moe.fused_moe_native.moe_forward_native"
    HookRegistry.register(experts, experts_of_this_rank, HookType.AROUND)
    placed = SRT + "eplb.expert_location.set_global_expert_location_metadata"
    HookRegistry.register(placed, map_in_force, HookType.AFTER)
    updater = SRT + "eplb.expert_location_updater."
    HookRegistry.register(updater + "ExpertLocationUpdater.update", map_in_force, HookType.AFTER)
    if os.environ.get("ENGINES_KEEP_WEIGHTS"):
        moved = updater + "_update_expert_weights_raw"
        HookRegistry.register(moved, lambda *args, **kwargs: {}, HookType.REPLACE)


def experts_of_this_rank(original, layer, x, topk_output, *args, **kwargs):
    """Compute this rank's experts alone: the plain CPU code would index by the ids of all ranks.

    What other ranks compute has id -1 here and is added by the all-reduce that follows.
    """
    weights, ids = topk_output.topk_weights, topk_output.topk_ids
    local = layer.w13_weight.shape[0]
    if local == layer.num_experts:
        return original(layer, x, topk_output, *args, **kwargs)
    total = torch.zeros_like(x)
    for expert in range(local):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ layer.w13_weight[expert].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ layer.w2_weight[expert].T
        total.index_add_(0, token, out * weights[token, choice, None].to(x.dtype))
    return total


def map_in_force(result, *args, **kwargs):
    """Append [number, map] to `rank<r>.jsonl` if the map in force is another one."""
    folder = os.environ.get("ENGINES_MAPS")
    if folder is None:
        return
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None:  # SGLang knows no places of experts for this model
        return
    now = metadata.physical_to_logical_map_cpu.tolist()
    file = Path(folder) / f"rank{torch.distributed.get_rank()}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines or json.loads(lines[-1])[1] != now:
        with file.open("a") as out:
            print(json.dumps([len(lines), now]), file=out)
