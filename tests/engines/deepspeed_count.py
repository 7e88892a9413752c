"""Count the loads of a Mixtral with AutoEP: `python deepspeed_count.py RESULT PORT MODEL...`.

Every model runs on two processes that share its experts; each rank has tokens of its own and
counts those alone. The result is a folder with `counts-<model>-rank<r>.npz`, by layer the buffer
`tokens_per_expert` as DeepSpeed names it, and `logits-<model>-rank<r>.npy`.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

RANKS = 2


def work(rank, result, port, models):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed("gloo")
    for checkpoint in map(Path, models):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
                "expert_parallel": {
                    "enabled": True,
                    "autoep_size": RANKS,
                    "preset_model": "mixtral",
                },
            },
        )
        tokens = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(rank))
        logits = engine(input_ids=tokens).logits
        counts = {
            name: buffer.numpy()
            for name, buffer in engine.module.named_buffers()
            if name.endswith("tokens_per_expert")
        }
        run = f"{checkpoint.name}-rank{rank}"
        np.savez(Path(result) / f"counts-{run}.npz", **counts)
        np.save(Path(result) / f"logits-{run}.npy", logits.detach().numpy())
    torch.distributed.destroy_process_group()  # or a thread of it may end the process with SIGABRT


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2], sys.argv[3:]), nprocs=RANKS)
