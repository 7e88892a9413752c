"""Make the golden files of the readers from the last runs of the engines: `python golden.py`.

`make engines` leaves what the engines wrote below `.engines/runs/`; this copies what the tests of
the readers need into `tests/formats/golden/` and computes beside it, by transformers, what the
same tokens were routed to. Its README says how every file was made.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tiny_models

PROJECT = Path(__file__).resolve().parents[2]
RUNS = PROJECT / ".engines" / "runs"
MODELS = PROJECT / ".engines" / "models"
GOLDEN = PROJECT / "tests" / "formats" / "golden"


def truth(model: str, run: Path, target: Path) -> None:
    """Write tokens [T], lengths of the sequences and experts [T,L,K] of every routed token."""
    prompts = json.loads((run / "specification.json").read_text())["prompts"]
    generated = json.loads((run / "tokens.json").read_text())
    sequences = [prompt + new[:-1] for prompt, new in zip(prompts, generated, strict=True)]
    ids = np.concatenate(tiny_models.truth(MODELS / model, sequences)).astype(np.uint8)
    np.savez_compressed(
        target,
        tokens=np.concatenate(sequences).astype(np.int32),
        lengths=np.array([len(sequence) for sequence in sequences]),
        ids=ids,
    )


def vllm(target: Path) -> None:
    run = RUNS / "vllm-one-rank-dense"
    for file in sorted(run.glob("routed-*.npy")):
        shutil.copy(file, target)
    for file in (RUNS / "vllm-http").glob("*.json"):
        shutil.copy(file, target)
    shutil.copy(MODELS / "qwen3_moe_dense" / "config.json", target)
    truth("qwen3_moe_dense", run, target / "truth.npz")


def sglang(target: Path) -> None:
    for ranks in ("one-rank", "two-ranks"):
        for mode in ("stat", "per_pass", "per_token"):
            run = RUNS / f"sglang-{ranks}-{mode}"
            for number, file in enumerate(sorted(run.glob("*.pt"))):
                rank = "" if mode == "stat" else f"-{number}"
                shutil.copy(file, target / f"{ranks}-{mode}{rank}.pt")
    run = RUNS / "sglang-two-ranks-per_token"
    shutil.copy(run / "responses.json", target)
    arguments = json.loads((run / "specification.json").read_text())["arguments"]
    shutil.copy(arguments["init_expert_location"], target / "expert_location.json")
    shutil.copy(MODELS / "qwen3_moe" / "config.json", target)
    truth("qwen3_moe", run, target / "truth.npz")


def megatron(target: Path) -> None:
    for pattern in ("router_trace_rank*.jsonl", "replay-*.npz"):
        for file in (RUNS / "megatron").glob(pattern):
            shutil.copy(file, target)


def deepspeed(target: Path) -> None:
    for rank in (0, 1):
        file = RUNS / "deepspeed" / f"counts-mixtral-rank{rank}.npz"
        shutil.copy(file, target / f"counts-{rank}.npz")


def ascend(target: Path) -> None:
    run = RUNS / "ascend"
    shutil.copy(run / "exported.json", target)
    with np.load(run / "problem.npz") as problem:
        table, workload = (problem[name] for name in ("current_expert_table", "expert_workload"))
    first = {"current_expert_table": table[:2], "expert_workload": workload[:, :2]}
    np.savez_compressed(target / "workload.npz", **first)


def main() -> None:
    for engine in sys.argv[1:] or ("vllm", "sglang", "megatron", "deepspeed", "ascend"):
        target = GOLDEN / engine
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        globals()[engine](target)


if __name__ == "__main__":
    main()
