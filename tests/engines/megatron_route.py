"""Route with Megatron-Core on two ranks: `python megatron_route.py RESULT PORT [PLACEMENT]`.

Two Mixture-of-Experts layers of four decoder layers, one after the other, with the experts of each
spread over two processes, in the order of the placement if there is one. The result is a folder
with what the router's tracer writes, and by rank `replay-<r>.npz`, the replay's ids by layer, and
`states-<r>.npy`, what comes out of the layers. Every step has other tokens.
"""

import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import moetuner as mt
from moetuner.torch import permute_state_dict

RANKS, EXPERTS, LAYERS, STEPS = 2, 8, (1, 3), 3


class Nothing:
    """A stream or an event of CUDA where there is none."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def without_gpu():
    """Take away the calls to CUDA on the way; none of them does arithmetic."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.Event = cuda.current_stream = cuda.stream = lambda *a, **k: Nothing()
    cuda.is_current_stream_capturing = lambda: False


def layers():
    """Return one module with the layers at the names that a decoder has."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=max(LAYERS) + 1,
        hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_ffn_hidden_size=32,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",  # the other one's splits are tensors of a GPU
        moe_grouped_gemm=False,
        moe_enable_routing_replay=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        expert_model_parallel_size=RANKS,
        params_dtype=torch.float32,
    )
    made = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False).submodules.mlp
    blocks = [torch.nn.Module() for _ in range(config.num_layers)]
    for number in LAYERS:
        blocks[number].mlp = made(
            config=config,
            layer_number=number + 1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList(blocks)
    return model


def place(model, rank, placement):
    """Give the layers weights of their own by expert, in the order of a placement if there is one.

    Each rank has the experts that it holds, so the checkpoint that is renumbered is all ranks'.
    """
    local = {key: of for key, of in model.state_dict().items() if torch.is_tensor(of)}
    per_rank = EXPERTS // RANKS
    everything = {}
    for key, weight in local.items():
        own, *expert = re.split(r"(?<=local_experts\.)(\d+)", key)
        for number in range(EXPERTS) if expert else [0]:
            name = f"{own}{number}{expert[1]}" if expert else key
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            everything[name] = 0.2 * torch.randn(weight.shape, generator=seed)
    if placement is not None:
        everything = permute_state_dict(everything, mt.Placement.load(placement))
    for key, weight in local.items():
        name = re.sub(
            r"(?<=local_experts\.)\d+", lambda actual: str(int(actual[0]) + per_rank * rank), key
        )
        weight.copy_(everything[name])


def work(rank, result, port, placement=None):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    without_gpu()
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import router_trace
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=RANKS)
    torch.manual_seed(0)
    model = layers()
    place(model, rank, placement)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    router_trace.init_moe_router_tracer(result, STEPS, rank, training_mode=True)
    tracer = router_trace.get_moe_router_tracer()
    tracer.register_hooks(model)
    replayed_ids, out = {}, []
    for step in range(STEPS):
        seed = torch.Generator().manual_seed(10 * step + rank)
        states = torch.randn(6, 2, 64, generator=seed)
        for number in LAYERS:
            states = states + model.decoder.layers[number].mlp(states)[0]
        for number, ids in zip(LAYERS, RouterReplay.get_recorded_data(), strict=True):
            replayed_ids[f"step{step}.layer{number}"] = ids.numpy()
        tracer.advance_step()
        out.append(states.detach().numpy())
    tracer.flush()
    np.savez(Path(result) / f"replay-{rank}.npz", **replayed_ids)
    np.save(Path(result) / f"states-{rank}.npy", np.stack(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, tuple(sys.argv[1:]), nprocs=RANKS)
