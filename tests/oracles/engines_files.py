"""Files as engines write them, from arrays."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"


def truth(engine, *names):
    """Return arrays that an engine counted, by default ids [T,L,K] and lengths of sequences."""
    with np.load(GOLDEN / engine / "truth.npz") as arrays:
        values = [arrays[name] for name in names or ("ids", "lengths")]
    return values if len(values) > 1 else values[0]


def save_arrays(path, arrays):
    """Write named arrays as the name's ending says."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    else:
        save_torch(path, arrays)
    return path


def save_torch(path, content):
    """Write by torch.save, with tensors for arrays."""
    torch = pytest.importorskip("torch")

    def tensors(value):
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        if isinstance(value, list):
            return [tensors(item) for item in value]
        return torch.tensor(value) if isinstance(value, np.ndarray) else value

    torch.save(tensors(content), path)
    return path


def save_table(path, columns, metadata=None):
    """Write columns as Parquet or Arrow, in several groups of rows."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=4)
        return
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    with pyarrow.ipc.new_file(str(path), table.schema, options=options) as to:
        to.write_table(table, 4)


def write_imatrix(path, load, chunks=1, texts=("a.txt",), kind="imatrix", named=None):
    """Write an importance matrix with counts [L,E] of layers from 1, as llama-imatrix does.

    ``named`` changes the counts of experts by their names.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # llama-imatrix says no architecture
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", list(texts))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    counts = {
        f"blk.{layer}.ffn_{weight}_exps.weight.counts": np.float32(row).reshape(-1, 1)
        for layer, row in enumerate(load, 1)
        for weight in ("down", "gate", "up")
    }
    for name, tensor in (counts if named is None else named(counts)).items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def npy(array):
    """Give the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def vllm_response(*arrays, **fields):
    """Give a response of vLLM with routed experts of every choice."""
    texts = [base64.b64encode(npy(array)).decode() for array in arrays]
    choices = [{"index": i, "text": "é", "routed_experts": of} for i, of in enumerate(texts)]
    return {"id": "x", "object": "text_completion", **fields, "choices": choices}


def megatron_lines(ids, step, rank, layers, block="decoder"):
    """Give the lines of one microbatch, ids [T,L,K], as Megatron's tracer writes them."""
    sizes = {"num_tokens": len(ids), "topk": ids.shape[2]}
    about = {"step": step, "stage": "pre_dispatch", "block": block, "rank": rank, **sizes}
    return [
        about | {"layer": layer, "top_indices": ids[:, at].tolist()}
        for at, layer in enumerate(layers)
    ]


def write_megatron(folder, rank, lines):
    """Write the file of a rank."""
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_tensorrt(folder, rank, entries, raw=False):
    """Write the dump of a rank: arrays by iteration and layer."""
    name = f"rank{rank}{'_raw' if raw else ''}.safetensors"
    save_arrays(folder / name, {f"{i}_{layer}": array for (i, layer), array in entries.items()})


def write_tensorrt_about(folder, experts, top_k=2):
    """Write what stands beside the dumps."""
    about = {"num_experts": experts, "num_experts_per_token": top_k}
    (folder / "meta_info.json").write_text(json.dumps(about))


def deepspeed_counts(counts, layers=(1, 2, 10)):
    """Give counts [L,E] by the names of buffers; layer 10 comes after layer 2."""
    names = [f"model.layers.{layer}.mlp.tokens_per_expert" for layer in layers]
    return dict(zip(names, counts, strict=True))


SGLANG_MAP = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])


def sglang_pass(number, rank, slots, positions, lengths):
    """Give what SGLang's recorder has of a pass in mode per_token; layer 0 is dense."""
    padded = np.full((*slots.shape[:2], 8), -1, dtype=np.int32)
    padded[:, :, : slots.shape[2]] = slots
    padded[0] = -1
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(range(len(positions))),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": 1,
        "topk_ids_of_layer": padded,
        "misc_objects": [],
    }


def write_sglang(path, records, slots=SGLANG_MAP):
    """Write a dump of SGLang's recorder."""
    return save_torch(path, {"records": records, "last_physical_to_logical_map": slots})
