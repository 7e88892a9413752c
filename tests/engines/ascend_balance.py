"""Ask vllm-ascend's own policies and checks: `python ascend_balance.py PACKAGE RESULT`.

Its policies run on any CPU once a module stands in for the one of Huawei's devices; its packages
are entered without their `__init__`, which patch vLLM. RESULT holds `problem.npz` (a table of
experts [L,D,S], workloads [W,L,D,S]), `ours.npy`, another table, and `map.json`. Written are

- `<policy>.npy` of their policies, and `plugin.npy` of our plugin in their factory;
- `ours-checked.npy` and `plugin-checked.npy`, what the worker's checks leave of these tables;
- `read.npy`, what they read of the map, and `exported.json`, what they write of two layers.
"""

import importlib
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import torch

from moetuner.plugins.vllm_ascend import register

POLICIES = {"default": 1, "swift": 2, "flashlb": 3}


def enter(package):
    """Make the package's modules importable one by one, and a device that is not there."""
    for name in ("", ".distributed", ".eplb", ".eplb.adaptor", ".eplb.core", ".eplb.core.policy"):
        module = types.ModuleType(f"vllm_ascend{name}")
        module.__path__ = [str(package / module.__name__.replace(".", "/"))]
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        sys.modules[module.__name__] = module
    device = types.ModuleType("torch_npu")
    device.__spec__ = ModuleSpec("torch_npu", None)
    device.npu = torch.npu = types.SimpleNamespace(
        device_count=lambda: 16, is_available=lambda: False, Event=object, Stream=object
    )
    sys.modules["torch_npu"] = device


def main():
    package, result = Path(sys.argv[1]), Path(sys.argv[2])
    enter(package)
    core = "vllm_ascend.eplb.core"
    factory = importlib.import_module(f"{core}.policy.policy_factory").PolicyFactory
    worker = importlib.import_module(f"{core}.eplb_worker").EplbWorker
    utils = importlib.import_module(f"{core}.eplb_utils")
    with np.load(result / "problem.npz") as problem:
        table = torch.from_numpy(problem["current_expert_table"])
        workload = torch.from_numpy(problem["expert_workload"])
    for name, number in POLICIES.items():
        windows = workload if name == "flashlb" else workload.sum(0)
        _, _, new = factory.generate_policy(number).rebalance_experts(table.clone(), windows)
        np.save(result / f"{name}.npy", np.asarray(new))
    os.environ["MOETUNER_REBALANCE"] = "1"
    register()
    policy = factory.generate_policy(POLICIES["swift"])
    _, _, new = policy.rebalance_experts(table.clone(), workload)
    np.save(result / "plugin.npy", np.asarray(new))
    for name in ("ours", "plugin"):
        table_of_slots = torch.from_numpy(np.load(result / f"{name}.npy"))
        worker.check_expert_placement(None, table, table_of_slots)  # puts back what breaks a rule
        np.save(result / f"{name}-checked.npy", table_of_slots.numpy())
    ours = torch.from_numpy(np.load(result / "ours.npy"))
    read = [
        utils.expert_file_to_tensor(result / "map.json", layer)[0].numpy()
        for layer in range(len(table))
    ]
    np.save(result / "read.npy", np.stack(read))
    adaptor = importlib.import_module("vllm_ascend.eplb.adaptor.vllm_adaptor").VllmEplbAdaptor
    adaptor._export_tensor_to_file(
        types.SimpleNamespace(rank_id=0),
        worker.local2global(None, ours[:2]),
        result / "exported.json",
    )


if __name__ == "__main__":
    main()
