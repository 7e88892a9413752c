"""What documents take for granted: files that a reader would have, made from the bundled trace.

Models have the layers and experts that the documents name; there are few tokens, so that all of a
document takes seconds.
"""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import moetuner as mt
from moetuner.cli import main

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
TOP_K = 8


def trace(layers: int, experts: int, tokens: int) -> mt.RoutingTrace:
    """Return the bundled trace as one of a larger model: a token stands for ``experts / 16``.

    The first choices of consecutive tokens become those of one token, each among 16 experts of its
    own; layers are repeated over other tokens.
    """
    small = mt.RoutingTrace.load(BUNDLED)
    per = experts // small.num_experts
    ids = small.expert_ids[..., 0].reshape(-1, per, small.layers).swapaxes(1, 2).astype(int)
    ids += small.num_experts * np.arange(per)
    keeps = np.random.default_rng(0).permuted(np.tile(np.arange(per), (len(ids), 1)), axis=1)
    ids = np.take_along_axis(ids, np.sort(keeps[:, None, :TOP_K]), axis=2)
    repeated = [np.roll(ids, tokens * part, axis=0) for part in range(-(-layers // small.layers))]
    return mt.RoutingTrace.from_arrays(
        np.concatenate(repeated, axis=1)[:tokens, :layers],
        num_experts=experts,
        sequence=np.arange(tokens) // 16,
    )


def blocks(layers: int, experts: int, devices: int) -> mt.Placement:
    """Return experts in the order of their numbers."""
    return mt.Placement(np.tile(np.arange(experts).reshape(devices, -1), (layers, 1, 1)))


def load_of(recorded: mt.RoutingTrace) -> np.ndarray:
    """Return tokens of every expert in windows of a step [W,L,E]."""
    return mt.RoutingStatistics.from_trace(recorded, window=32).window_load.astype(np.int32)


def responses(path: Path, recorded: mt.RoutingTrace) -> None:
    """Write what vLLM answers with, a response on each line."""
    with path.open("w") as file:
        for label in np.unique(recorded.sequence):
            array = io.BytesIO()
            np.save(array, recorded.select(sequences=[label]).expert_ids.astype(np.uint8))
            choice = {"routed_experts": base64.b64encode(array.getvalue()).decode()}
            file.write(json.dumps({"object": "text_completion", "choices": [choice]}) + "\n")


def answers(path: Path, recorded: mt.RoutingTrace) -> None:
    """Write what SGLang answers with: raw bytes without a shape, a response on each line."""
    with path.open("w") as file:
        for label in np.unique(recorded.sequence):
            ids = recorded.select(sequences=[label]).expert_ids.astype(np.int32)
            about = {"routed_experts": base64.b64encode(ids.tobytes()).decode()}
            # The last token was generated and never routed.
            about |= {"prompt_tokens": len(ids), "completion_tokens": 1}
            file.write(json.dumps({"text": "", "meta_info": about}) + "\n")


def recorder(folder: Path, recorded: mt.RoutingTrace, dense: int) -> None:
    """Write a dump of SGLang's recorder, mode ``stat``; dense layers have rows of zeros."""
    import torch

    load = np.pad(load_of(recorded), ((0, 0), (dense, 0), (0, 0)))
    folder.mkdir()
    torch.save({"rank": 0, "logical_count": torch.from_numpy(load)}, folder / "dump.pt")


def words(folder: Path, *, lines: int = 64) -> None:
    """Write ``FILE``, texts as JSON lines, of a few words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["one", "two", "three"], 16)) for _ in range(lines)]
    (folder / "FILE").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def checkpoint(folder: Path, **sizes: int) -> None:
    """Write a tiny Qwen3-MoE with a tokenizer of one token a word."""
    from moe_models import build, transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    build("qwen3_moe", mlp_only_layers=[], **sizes).save_pretrained(folder)
    there = {word: number for number, word in enumerate(["?", ".", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(there, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="."
    ).save_pretrained(folder)


def readme(folder: Path) -> dict[str, object]:
    """Give the demo's trace, also as one of a server and as its load, a model, and texts."""
    (folder / "demo-output").mkdir()
    shutil.copy(BUNDLED, folder / "demo-output" / "trace.safetensors")
    recorded = mt.RoutingTrace.load(BUNDLED)
    for name in ("TRACE", "NEWER"):
        recorded.save(folder / name)
    np.savez(folder / "loads.npz", load=load_of(recorded))
    checkpoint(folder / "MODEL")
    words(folder)
    return {}


def quickstart(folder: Path) -> dict[str, object]:
    """Give a model and texts; the demo, if any, is the first step of the document."""
    checkpoint(folder / "MODEL")
    words(folder)
    return {}


def survive(folder: Path) -> dict[str, object]:
    """Write the trace of a model that serves."""
    shutil.copy(BUNDLED, folder / "trace.safetensors")
    return {}


def large(folder: Path) -> dict[str, object]:
    """Write a trace, and a newer one of half of its sequences."""
    survive(folder)
    mt.RoutingTrace.load(BUNDLED).split(0.5)[0].save(folder / "newer.safetensors")
    return {}


def memra(folder: Path) -> dict[str, object]:
    """Give what the example makes of memra's log: a row for every choice."""
    recorded = mt.RoutingTrace.load(BUNDLED).expert_ids[:1024]
    rows = (
        f"{token},{layer},{recorded[token, layer, at]}"
        for token, layer, at in np.ndindex(recorded.shape)
    )
    (folder / "trace.csv").write_text("\n".join(["token,layer,expert", *rows]) + "\n")
    return {}


def vllm(folder: Path) -> dict[str, object]:
    """Give responses, and a model with a placement of its own that has no copies."""
    responses(folder / "routed.jsonl", trace(48, 128, 256))
    checkpoint(folder / "MODEL")
    blocks(3, 8, 4).save(folder / "single.json")
    return {}


def sglang(folder: Path) -> dict[str, object]:
    """Give a dump of a model with three dense layers, and responses."""
    recorder(folder / "dumps", trace(58, 256, 64), dense=3)
    answers(folder / "routed.jsonl", trace(58, 256, 64))
    return {}


def tensorrt_llm(folder: Path) -> dict[str, object]:
    """Give counts of experts, and counts of slots with the map that ran."""
    load = load_of(trace(58, 256, 64))
    for name, counted in (
        ("expert_statistic", load),
        ("slot_statistic", np.concatenate([load, load[..., :32]], axis=2)),
    ):
        (folder / name).mkdir()
        counts = {
            f"{100 + step}_{3 + layer}": counts_of
            for step, of in enumerate(counted)
            for layer, counts_of in enumerate(of.astype(np.int64))
        }
        save_file(counts, folder / name / "rank0.safetensors")
        about = {"num_experts": counted.shape[2], "num_experts_per_token": TOP_K}
        (folder / name / "meta_info.json").write_text(json.dumps(about))
    slots = np.tile(np.concatenate([np.arange(256), np.arange(32)]).reshape(32, 9), (58, 1, 1))
    mt.Placement(slots).save(folder / "running.json")
    command = "export running.json --to tensorrt-llm --dense-layers 0-2 --out running.yaml"
    assert main(command.split()) == 0
    return {}


def vllm_ascend(folder: Path) -> dict[str, object]:
    """Give what a policy is handed: the table of experts, and tokens of every slot."""
    del folder
    load = load_of(trace(58, 256, 64))
    table = np.tile(np.concatenate([np.arange(256), np.arange(32)]).reshape(32, 9), (58, 1, 1))
    workload = np.stack([load[:, layer][:, of] for layer, of in enumerate(table)], axis=1)
    return {"np": np, "workload": workload, "table": table}


def megatron(folder: Path) -> dict[str, object]:
    """Give the router's trace of a rank, and the model that it is of."""
    checkpoint(folder / "hf-model", num_experts=128, num_hidden_layers=2)
    recorded = trace(2, 128, 128)
    (folder / "traces").mkdir()
    with (folder / "traces" / "router_trace_rank0.jsonl").open("w") as file:
        for layer in range(recorded.layers):
            line = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer}
            line |= {"rank": 0, "num_tokens": recorded.tokens, "topk": recorded.top_k}
            line["top_indices"] = recorded.expert_ids[:, layer].tolist()
            file.write(json.dumps(line) + "\n")
    return {}


def deepspeed(folder: Path) -> dict[str, object]:
    """Give a model whose routers have counted, on the only rank."""
    import torch

    checkpoint(folder / "hf-model", num_hidden_layers=2)
    model = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for layer, load in zip(
        model, ([9, 1, 4, 4, 2, 2, 8, 2], [1, 9, 4, 4, 2, 2, 2, 8]), strict=True
    ):
        layer.register_buffer("tokens_per_expert", torch.tensor(load), persistent=False)
    (folder / "counts").mkdir()
    return {"torch": torch, "model": model, "rank": 0}


def transformers(folder: Path) -> dict[str, object]:
    """Give a model, also in memory, the same as a trainer has it, its inputs, and texts."""
    from moe_models import build, prompts

    quickstart(folder)
    (folder / "FILE").rename(folder / "texts.jsonl")
    return {
        "model": build("mixtral"),
        "trained": build("mixtral"),
        "batches": [{"input_ids": prompts(seed=n)} for n in range(3)],
    }


# By the document's path; the others take nothing for granted.
GIVEN = {
    "README.md": readme,
    "docs/api.md": readme,
    "docs/step.md": readme,
    "docs/quickstart.md": quickstart,
    "docs/few-cards.md": survive,
    "docs/large.md": large,
    "docs/dispatchers.md": survive,
    "docs/plots.md": survive,
    "docs/survive.md": survive,
    "docs/engines/vllm.md": vllm,
    "docs/engines/sglang.md": sglang,
    "docs/engines/ktransformers.md": survive,
    "docs/engines/memra.md": memra,
    "docs/engines/tensorrt_llm.md": tensorrt_llm,
    "docs/engines/vllm_ascend.md": vllm_ascend,
    "docs/engines/megatron.md": megatron,
    "docs/engines/deepspeed.md": deepspeed,
    "docs/engines/transformers.md": transformers,
}
