"""Route with Megatron-Core on two ranks: `python megatron_route.py RESULT`.

Two Mixture-of-Experts layers of four decoder layers, one after the other, with the experts of each
spread over two processes. The result is a folder with what the router's tracer writes, and by rank
`replay-<r>.npz`: the replay's ids by layer, inputs and outputs. Every step has other tokens.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, LAYERS, STEPS = 2, (1, 3), 3


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
        num_moe_experts=8,
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
    made = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False).submodules.mlp
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


def work(rank, result, port):
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
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    router_trace.init_moe_router_tracer(result, STEPS, rank, training_mode=True)
    tracer = router_trace.get_moe_router_tracer()
    tracer.register_hooks(model)
    kept = {}
    for step in range(STEPS):
        seed = torch.Generator().manual_seed(10 * step + rank)
        states = torch.randn(6, 2, 64, generator=seed)
        for number in LAYERS:
            states = states + model.decoder.layers[number].mlp(states)[0]
        for number, ids in zip(LAYERS, RouterReplay.get_recorded_data(), strict=True):
            kept[f"step{step}.layer{number}"] = ids.numpy()
        tracer.advance_step()
    tracer.flush()
    np.savez(Path(result) / f"replay-{rank}.npz", **kept)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=RANKS)
