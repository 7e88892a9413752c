"""What is wrong with a file of an engine, a table or a map: one line names file, place and rule."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from damage import refused
from engines_files import (
    SGLANG_MAP,
    deepspeed_counts,
    megatron_lines,
    save_arrays,
    save_table,
    save_torch,
    sglang_pass,
    write_imatrix,
    write_megatron,
    write_sglang,
    write_tensorrt,
    write_tensorrt_about,
)
from engines_files import vllm_response as answer  # noqa: F401 - for the table
from make import random_ids
from safetensors.numpy import save_file
from targets import HINTS

import moetuner as mt
from moetuner.formats import READERS, read_input, read_map, vllm_ascend
from moetuner.formats.hints import Hints
from moetuner.formats.native import KINDS

COUNTS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # ranks, layers, experts
TABLE = np.array([[[0, 1], [2, 0]], [[2, 1], [0, 1]]])
LOAD = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
STEPS = [(10 + step, layer) for step in range(3) for layer in (3, 4)]
LABELLED = "layer,expert,sequence\n"
TOKEN = "token,layer,expert\n"
HEAD, LINE = {"num_experts": 4}, {"experts": [[0, 1], [2, 3]]}
PIVOT = "layer,e0,e1\n"
W2 = "blk.2.ffn_down_exps.weight.counts"
HUGE = np.full((1, (1 << 14) + 1), (1 << 48) - 1)
PASS = {"forward_pass_id": 0, "gatherer_key": "primary", "global_physical_count": HUGE}
MAP = "num_slots: 2\ninitial_global_assignments:\n"


def ids(tokens=3, layers=3):
    """Give ids of hidden layers of which the first is dense, as vLLM has them."""
    array = random_ids(tokens, layers, 2, 8).astype(np.uint8)
    array[:, 0] = 0
    return array


def choice(experts):
    return {"choices": [{"routed_experts": experts}]}


def layer(fields, at=0):
    return fields["layer_list"][at]


def deepspeed(folder, change):
    for rank, counts in enumerate(COUNTS):
        arrays = deepspeed_counts(counts)
        save_arrays(folder / f"c_rank{rank}.npz", change(arrays) if rank else arrays)
    return mt.open_input(folder)


def ranks(folder, *names):
    for name in names:
        save_arrays(folder / name, deepspeed_counts(COUNTS[0]))
    return mt.open_input(folder)


def megatron(folder, change):
    for rank in range(2):
        of_steps = (random_ids(3, 3, 2, 8, seed=step) for step in (0, 0, 1, 1, 2, 2))
        numbered = enumerate(of_steps)
        lines = [
            line for at, of in numbered for line in megatron_lines(of, at // 2, rank, (1, 2, 4))
        ]
        write_megatron(folder, rank, change(lines) if rank else lines)
    return mt.open_input(folder, num_experts=8)


def tensorrt(folder, change):
    for rank in range(2):
        write_tensorrt(folder, rank, dict.fromkeys(STEPS, np.arange(6)))
    write_tensorrt_about(folder, 6)
    change(folder)
    return mt.open_input(folder)


def yaml(folder, text):
    (folder / "map.yaml").write_text(text)
    return read_map(folder / "map.yaml", Hints(), "tensorrt-llm")


def csv(folder, text, experts=8):
    (folder / "rows.csv").write_text(text)
    return mt.open_input(folder / "rows.csv", num_experts=experts)


def loads(folder, *contents, **hints):
    paths = [folder / f"loads-{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return mt.open_input(paths, **hints)


def counter(layer=0, expert=0, value="1", more=""):
    return f'tokens{{layer="{layer}",expert="{expert}"{more}}} {value}\n'


def record(load, slots):
    fields = {"record_type": "eplb_load_stats", "expert_load": load, "p2l_map": slots}
    return json.dumps(fields) + "\n"


def other(folder, content):
    path = save_arrays(folder / "a.npz", content if isinstance(content, dict) else {})
    if isinstance(content, bytes):
        path.write_bytes(content)
    return mt.open_input(path)


def own(folder, **metadata):
    about = {"format": "moetuner.statistics", "version": "1", **metadata}
    save_file({"load": LOAD}, folder / "load.safetensors", metadata=about)
    return mt.open_input(folder / "load.safetensors")


def mixed(folder, *contents):
    for number, arrays in enumerate(contents):
        np.savez(folder / f"{number}.npz", **arrays)
    return mt.open_input(folder)


def jsonl(folder, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    text = "\n".join(texts) + "\n"
    (folder / "a.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    return mt.RoutingTrace.load(folder / "a.jsonl")


def columns(folder, table):
    save_table(folder / "t.parquet", table)
    return mt.open_input(folder / "t.parquet", num_experts=8)


def vllm(folder, content):
    (folder / "r.json").write_text(json.dumps(content))
    return mt.open_input(folder / "r.json", num_experts=8, reader="vllm")


def sglang(folder, change):
    slots = np.array([[[0, 5], [4, 3], [1, 2]]] * 3)
    record = sglang_pass(0, 0, slots, [0, 1, 0], [2, 1])
    fields = {"records": [record | change], "slots": SGLANG_MAP}
    fields |= {key: change[key] for key in fields if key in change}
    write_sglang(folder / "a.pt", **fields)
    return mt.open_input(folder / "a.pt", reader="sglang")


def ascend(folder, load, table=TABLE):
    np.savez(folder / "load.npz", expert_workload=load, current_expert_table=table)
    return mt.open_input(folder / "load.npz")


def ascend_map(folder, change):
    path = folder / "map.json"
    vllm_ascend.write_map(mt.Placement(TABLE, num_experts=3), path, Hints())
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    return read_map(path, Hints(), "vllm-ascend")


def sglang_responses(folder, experts):
    path = folder / "responses.json"
    path.write_text(json.dumps({"meta_info": {"routed_experts": experts}}))
    return mt.open_input(path, num_experts=8, top_k=2, reader="sglang-responses")


def tokenspeed(folder, *changes):
    for rank, change in enumerate(changes):
        fields = {"logical_count": np.ones((2, 4), int), "ep_rank": rank, "ep_size": len(changes)}
        save_torch(folder / f"1-TP{rank}.expert-load.pt", fields | change)
    return mt.open_input(folder, reader="tokenspeed")


def fastdeploy(folder, *answers):
    good = {"code": 0, "msg": "ok", "data": [[[1, 2]]]}
    (folder / "a.json").write_text("\n".join(json.dumps(good | fields) for fields in answers))
    return mt.open_input(folder / "a.json", reader="fastdeploy")


def memra_map(folder, change):
    path = folder / "map.json"
    mt.write_placement(mt.Placement([[[0, 1], [2, 3]]] * 2), "memra", path, dense_layers=())
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    return mt.read_placement(path, form="memra")


def imatrix(folder, *changes):
    load = np.arange(8).reshape(2, 4)
    for number, change in enumerate(changes):
        fields = {"load": load, "chunks": number} | change
        write_imatrix(folder / f"imatrix.gguf.at_{number}", **fields)
    return mt.open_input(folder)


def gguf_bytes(folder, change):
    path = write_imatrix(folder / "imatrix.gguf", np.arange(8).reshape(2, 4))
    path.write_bytes(change(path.read_bytes()))
    return mt.open_input(path)


def sglang_map(folder, content):
    (folder / "map.json").write_text(json.dumps(content))
    return mt.read_placement(folder / "map.json", devices=2)


# Who reads, what is changed of good files or what is in one, and what the error says.
CASES = r"""
deepspeed | lambda a: {k: v[:3] for k, v in a.items()} | counts must be [1, 3, 4] like those before
deepspeed | lambda a: dict(list(a.items())[1:]) | must have the steps and layers of
deepspeed | lambda a: {k: v + 0.5 for k, v in a.items()} | counts must be whole numbers
deepspeed | lambda a: {k.replace("10", "11"): v for k, v in a.items()} | differs in step 0, layer 10
deepspeed | lambda a: {k: v[: 2 + ("10" in k)] for k, v in a.items()} | layer 10 must be counts [
ranks | "a_rank0.npz", "b_rank0.npz" | ranks 0 to 0, one of each, got two of rank 0
ranks | "a_rank0.npz", "a_rank999999.npz" | ranks 0 to 999999, one of each, got none of rank 1
deepspeed | lambda a: {**a, "layer2.tokens_per_expert": np.ones(4)} | layer 2 must be there once
deepspeed | lambda a: {"tokens_per_expert": np.ones(4)} | arrays must be named as model.layers.0.mlp
megatron | lambda lines: lines[:-1] | step 2, rank 1: must have ids of each of layers [1, 2, 4]
megatron | lambda lines: lines[:-6] | rank 1 must have steps to 2 like rank 0, got 1 as its last
megatron | lambda lines: [lines[0] | {"num_tokens": 1}] | line 1: top_indices must be integers [1,
megatron | lambda lines: [lines[0], lines[1] | {"topk": 3}] | line 2: top_indices must be integers
megatron | lambda lines: [lines[0], lines[1] | {"step": -1}] | line 2: step must be an integer
megatron | lambda lines: [lines[0], {**lines[1], "rank": None}] | line 2: rank must be an integer
megatron | lambda lines: [lines[0], {"x": 1}] | line 2: must have 'top_indices', got keys ['x']
megatron | lambda lines: [lines[0] | {"top_indices": [[0, 9]] * 3}] | expert id 9 is not below
megatron | lambda lines: [line | {"block": "mtp"} for line in lines] | must hold lines of block
megatron | lambda lines: [line | {"rank": 0} for line in lines] | rank 0 is in another file too
tensorrt | lambda f: (f / "rank0.safetensors").unlink() | got none of rank 0
tensorrt | lambda f: (f / "meta_info.json").unlink() | must be beside rank0.safetensors
tensorrt | lambda f: write_tensorrt_about(f, 7) | must be counts [7] as meta_info
tensorrt | lambda f: write_tensorrt_about(f, 6, 7) | num_experts_per_token must be from 1 to 6, got
tensorrt | lambda f: write_tensorrt_about(f, "7") | num_experts must be an integer, got '7'
tensorrt | lambda f: write_tensorrt(f, 1, {(0, 3): np.zeros(6, int)}) | must have the steps and
tensorrt | lambda f: write_tensorrt(f, 0, {(0, 3): LOAD[0, 0], (1, 4): LOAD[0, 0]}) | step 0 must
tensorrt | lambda f: (p := f / "rank0.safetensors").write_bytes(p.read_bytes()[:-9]) | must have
yaml | "num_slots: 4\n" | must have 'initial_global_assignments'
yaml | "num_slots: 4\nep_size: 2\n" | got 'ep_size'
yaml | "num_slots: x\n" | must be num_slots: N and
yaml | MAP + "  3: [0]\n" | layer 3 must have num_slots 2 experts, got 1
yaml | MAP + "  3: [0, a]\n" | must be num_slots: N and
yaml | MAP + "  3: [0, 1]\n  3: [0, 1]\n" | there once
yaml | MAP + "  3: [0,\n" | must be num_slots: N and
yaml | MAP + "  3:\n  - 0\n  4: [0 1]\n" | must be num_slots: N and
yaml | MAP[:-1] + " !!python/object/apply:os.system [x]\n" | must be num_slots: N and
csv | TOKEN | must have at least one row
csv | TOKEN + "0,0,1\n1,0,x\n" | line 3: must have 3 values, integers but for sequence
csv | TOKEN + "0,0,1\n1,0\n" | line 3: must have 3 values
csv | TOKEN + "0,0,1\n1,0,-1\n" | line 3: expert must be from 0 to 65535, got -1
csv | TOKEN + "0,0,1.5\n" | could not convert string '1.5'
csv | TOKEN + "0,0,1\n0,0,2\n1,0,1\n" | token 1 must have 2 experts in layer 0
csv | TOKEN + "0,0,1\n0,1,1\n1,0,1\n" | token 1 must have 1 experts in layer 1
csv | TOKEN + "0,0,9\n" | expert id 9 is not below num_experts 8
csv | TOKEN + "0,0,1\n0,0,1\n" | expert id 1 appears twice
csv | TOKEN + '0,0,"1\n' | must be CSV
csv | TOKEN[:-1] + ",expert\n0,0,1,2\n" | line 1: must have one column expert, got expert and expert
csv | "window,step,layer,expert\n0,0,0,1\n" | must have one column sequence, got window and step
csv | "layer,expert,load,weight\n0,0,1,1\n" | must have one column weight, got load and weight
csv | LABELLED + "0,1,a\n0,1,\n" | line 3: sequence and group must have a name in every row
csv | "token,layer,expert,group\n0,0,1,a\n0,0,2,b\n" | token 0 must be of one group, not two
csv | "layer,expert\n0,8\n" | expert 8 must be below num_experts 8
csv | "layer,expert,weight\n0,1,0.5\n" | could not convert string '0.5'
csv | f"layer,expert\n0,{10**30}\n" | line 2: must have 2 values, integers
csv | "layer,expert,weight\n" + f"0,0,{(1 << 48) - 1}\n" * (1 << 16) | weight must add up to
csv | LABELLED + "".join(f"0,{n % 2 * 65535},{n}\n" for n in range(1024)), None | must fill
loads | PIVOT + "0,1,2\n1,3\n" | loads-0: line 3: must have 3 numbers, got 2
loads | PIVOT + "0,1\n1,3,4\n" | loads-0: line 2: must have 3 numbers, got 2
loads | PIVOT + "0,1,2\n1,3,4,5\n" | line 3: must have 3 numbers, got 4
loads | PIVOT + "0,1\n" | line 2: must have 3 numbers, got 2
loads | PIVOT + "0,1,2,3\n" | line 2: must have 3 numbers, got 4
loads | PIVOT + "0,1,2\n\n1,x,4\n" | line 4, column 'e0': must be a number, got 'x'
loads | PIVOT + "0,1,2\n1,,4\n" | line 3, column 'e0': must be a number, got ''
loads | PIVOT + "0,1,2\nnan,3,4\n" | line 3, column 'layer': must be a layer from 0 to 65535
loads | PIVOT + "nan,1,2\n0,3,4\n" | line 2, column 'layer': must be a layer from 0 to 65535
loads | PIVOT + "0,1,2\n-1,3,4\n" | line 3, column 'layer': must be a layer from 0 to
loads | PIVOT + "0,1,2\n0.5,3,4\n" | line 3, column 'layer': must be a layer
loads | PIVOT + "0,1,2\n1,3,-4\n" | line 3, column 'e1': must be a count from 0 to 2**48, got -4
loads | PIVOT + "0,1,2\n1,inf,4\n" | line 3, column 'e0': must be a count from 0 to 2**48, got inf
loads | PIVOT + "0,1,2\n1,0.5,4\n" | line 3, column 'e0': must be a count from 0 to 2**48, got 0.5
loads | PIVOT + "0,1,2\n1,281474976710656,4\n" | column 'e0': must be a count from 0 to 2**48
loads | "step," + PIVOT + "0,0,1,2\nnan,0,3,4\n" | line 3, column 'step': must be a time, got nan
loads | "step," + PIVOT + "0,0,1,2\n0,0,3,4\n" | line 3: window 0 must have layer 0 once
loads | "step," + PIVOT + "0,0,1,2\n0,1,1,2\n1,1,3,4\n" | got none of window 1, layer 0
loads | "step," + PIVOT + "".join(f"{n},{n},1,2\n" for n in range(9000)) | of window 0, layer 1
loads | PIVOT | must have rows of counts, got none
loads | "layer,layer_id,e0\n0,0,1\n" | line 1: must have one column of the layer, got layer and
loads | f"[[{'1,' * 65536}1]]" | must have at most 65536 layers and 65536 experts, got 1 and 65537
loads | counter() + counter(1)[:20] | must end with a whole line, got 'tokens{layer="1",exp': the
loads | "layer,e0,e0\n0,1,2\n" | line 1: expert 0 must have one column, got e0 and e0
loads | "layer,e0,x0\n0,1,2\n" | line 1: expert 0 must have one column, got e0 and x0
loads | "layer,e1,e3\n0,1,2\n" | numbered from 0, or from 1 without a gap, got [1, 3]
loads | "layer,e2,e3\n0,1,2\n" | numbered from 0, or from 1 without a gap, got [2, 3]
loads | "layer,e0,e1000000\n0,1,2\n" | at most 65536 layers and 65536 experts, got 1 and 1000001
loads | "layer,e0,e65535\n" + "".join(f"{n},1,2\n" for n in range(500)) | counts must fill
loads | "1,2\n3\n" | line 2: must have 2 numbers, got 1
loads | "1,2\n3,-4\n" | line 2, column 2: must be a count from 0 to 2**48, got -4
loads | "[[1, 2], [3]]" | must be lists [layers][experts] or
loads | "[[1, 2], [3, NaN]]" | counts must be whole numbers of tokens, got nan at [1, 1]
loads | "[[[1, 2], [3, -4]]]" | counts must be counts from 0 to 2**48, got -4 at [0, 1, 1]
loads | "[[1, 2], [3," | must be JSON
loads | counter() + counter() | line 2: layer 0 and expert 0 must have a counter once, got it twice
loads | counter() + counter(layer=-1) | line 2: layer must be from 0 to 65535, got '-1'
loads | counter() + counter(layer="a") | line 2: layer must be from 0 to 65535, got 'a'
loads | counter() + counter(expert=10**6) | line 2: expert must be from 0 to 65535, got '1000000'
loads | counter() + counter(1, value="NaN") | line 2: a counter must be from 0 to 2**48, got NaN
loads | counter() + counter(1, value="-1") | line 2: a counter must be from 0 to 2**48, got -1
loads | counter() + counter(1, value="x") | line 2: could not convert string to float: 'x'
loads | "".join(counter(n, 0 if n else 65535) for n in range(500)) | counts must fill
loads | counter(value="4"), counter(value="3") | of layer 0 and expert 0 falls in loads-1: did
loads | record([[1, 2]], [[0, 1]]) + record([[1]], [[0]]) | line 2: must have layers and experts
loads | record([[1, 2]], [[0, 1]]) + record([[1, 2]], [[0, 10**6]]) | line 2: slots must hold every
loads | record([[1, 2]], [[0, 1]]) + record([[1, -2]], [[0, 1]]) | line 2: expert_load must be
jsonl | LINE | line 1: num_experts is needed
jsonl | HEAD | must have at least one line with 'experts' or 'tokens', got none
jsonl | {"num_experts": 0}, LINE | line 1: num_experts must be from 1 to 65536, got 0
jsonl | {"num_experts": 4.0}, LINE | line 1: num_experts must be an integer, got 4.0
jsonl | {"a": 1}, LINE | line 1: must have 'experts', 'tokens' or 'num_experts', got
jsonl | HEAD, LINE, {"a": 1} | line 3: must have 'experts' or 'tokens', got
jsonl | HEAD, LINE, "[1]" | line 3: must be a JSON object, got list
jsonl | HEAD, LINE, '{"experts": [[0,' | line 3: must be JSON
jsonl | HEAD, '{"experts": "\udcff"}' | line 2: must be JSON: 'utf-8' codec
jsonl | HEAD, '{"a":' * 100000 | line 2: must be JSON
jsonl | HEAD, {"experts": [[0, 4], [1, 2]]} | line 2: expert_ids: token 0, layer 0
jsonl | HEAD, LINE, {"experts": [[0, 1], [2, 2]]} | line 3: expert_ids: token 1
jsonl | HEAD, {"experts": [[-1]]} | line 2: experts must be integers from
jsonl | HEAD, {"experts": [[0, 1.5]]} | line 2: experts must be integers from
jsonl | HEAD, {"experts": [[10**30]]} | line 2: experts must be integers from
jsonl | HEAD, {"experts": [0]} | line 2: experts must be integers from
jsonl | HEAD, {"experts": [[0], []]} | line 2: experts must be integers from
jsonl | HEAD, {"experts": []} | must have at least one token, layer and expert
jsonl | HEAD, {"tokens": [[0, 1]]} | line 2: tokens must be integers from
jsonl | HEAD, LINE, {"experts": [[0, 1]]} | got experts with 1 layers of 2 ids
jsonl | HEAD, {"experts": [[0, 1, 2, 3, 3]]} | top-k from 1 to num_experts (4)
jsonl | HEAD, LINE, LINE | {"group": "a"} | line 3: must have experts with
jsonl | HEAD, LINE, {"tokens": [[[0, 1]]]} | got tokens with 1 layers of 2
jsonl | HEAD, LINE | {"sequence": 1 << 31} | sequence must be an integer of 32
jsonl | HEAD, LINE | {"sequence": True} | sequence must be an integer of 64
jsonl | HEAD, LINE | {"group": 3} | line 2: group must be a text
jsonl | HEAD | {"group_names": [1]}, LINE | line 1: group_names must be texts, got 1
jsonl | HEAD | {"group_names": 1}, LINE | line 1: group_names must be a list
jsonl | HEAD | {"model": 1}, LINE | line 1: model must be a text, got 1
other | b'{"schema": "moetuner.placement/1"}' | line 1: must be a trace, got a file of schema 'moet
own | window="abc" | window must be an integer, got 'abc'
own | set_tokens="nan" | set_tokens must be an integer, got 'nan'
own | top_k="3" | top_k must be from 1 to 2, got 3
own | group_names="[" | group_names must be JSON
mixed | {"load": LOAD}, {"expert_ids": LOAD[:, :, :1], "num_experts": 9} | 1.npz: sources must all
mixed | {"load": LOAD}, {"load": LOAD[:, :1]} | 1.npz: statistics must have the same layers
other | {"weights": [1]} | must hold an array 'expert_ids' (or 'load', a load table)
other | b"PK\x03\x04 and no more" | damaged .npz:
other | {"load": LOAD, "model": np.array([1 << 21], "u4").view("U1")} | model.npy: texts must
columns | {"experts": [[[0, 1], [2]]]} | row 0: experts must have lists of one length
columns | {"experts": [[[0, 1]], [[2]]]} | row 1: rows must have [1, 2] ids
columns | {"experts": [[[0, 1]]] * 6 + [[[0, 9]]]} | row 6: expert_ids: token 6
columns | {"experts": [[[0, 1]]] * 2, "group": ["a", ""]} | row 1: sequence and group must
columns | {"layer": [0, 0], "expert": [0, 1], "weight": [1, np.inf]} | row 1: weight must be
columns | {"layer": [0, 0], "expert": [0, np.nan]} | row 1: expert must be integers, got nan
columns | {"experts": [[[0, 1]], None]} | experts must have no empty lists
columns | {"experts": [[[0, 1]], [[2, None]]]} | experts must have no empty values
columns | {"experts": [[[0, 1.5]]]} | experts must be integers, got double
columns | {"experts": [[0, 1]]} | experts must be ids [layers][top_k], got int64 [1, 2]
columns | {"experts": [[[0, 9]]]} | expert id 9 is not below num_experts 8
columns | {"x": [0]} | must have a column 'experts'
columns | {"layer": [0], "expert": ["a"]} | expert must be integers, got string
columns | {"layer": [0], "expert": [None]} | expert must have no empty values
vllm | answer() | no routed experts: start vLLM with --enable-return-routed-experts
vllm | choice("hello") | must be base64, got 5 letters
vllm | choice("AAAA") | must be an array as .npy
vllm | choice([1]) | must be base64, got [1]
vllm | answer(np.zeros((2, 2, 2))) | must be integers [tokens
vllm | answer(np.zeros((2, 2), int)) | must be integers [tokens
vllm | choice(answer(ids(9))["choices"][0]["routed_experts"][:-8]) | 54 bytes, got 49
vllm | answer(ids() + 9) | expert id 9
vllm | answer(ids(), ids(layers=4)) | same layers and top-k
vllm | answer(np.zeros((3, 2, 2), np.uint8)) | got only rows of zeros
vllm | answer(np.zeros((0, 2, 2), np.uint8)) | at least one token
vllm | {"routed_experts": 1, "choices": 1} | must be a response with 'choices'
sglang | {"records": 1} | records must be a list
sglang | {"records": [1]} | record 0 must be a dict
sglang | {"records": [{}]} | forward_pass_id and a rank
sglang | {"slots": 1} | must be a tensor of integers in 2 dimensions
sglang | {"slots": SGLANG_MAP[:2]} | must have 2 layers like the map
sglang | {"slots": SGLANG_MAP.astype(float)} | must be a tensor of integers
sglang | {"positions": [1]} | must have positions and ids of 3 tokens
sglang | {"positions": "x"} | positions must be a list of numbers
sglang | {"extend_seq_lens": [1]} | must add up to 3 tokens
sglang | {"records": [PASS | {"rank": r} for r in (0, 1)], "slots": 0 * HUGE} | than 2**63
sglang | {"topk_ids_of_layer": 1} | topk_ids_of_layer must be a tensor
ascend | LOAD, TABLE[:, :1] | table must be [2, 2, 2] like the workload, got [2, 1, 2]
ascend | LOAD, TABLE - 2 | slots must hold experts from 0 to 0, got -2 to 0
ascend | LOAD, TABLE * 0.5 | table must be integers, got float64
ascend | LOAD, np.where(TABLE == 2, 1 << 20, TABLE) | slots must hold every expert of a layer, got 4
ascend | np.full_like(LOAD, 1 << 62) | workload must be counts from 0 to 2**48
ascend | np.full((1, 1, 1 << 16), (1 << 48) - 1), np.zeros((1, 1, 1 << 16), int) | than 2**63, got
ascend | -LOAD | workload must be counts from 0 to 2**48
ascend | LOAD * np.nan | workload must be whole numbers of tokens
ascend | LOAD[0, 0] | workload must be [layers, experts], [layers, ranks, slots]
ascend_map | lambda f: f.pop("layer_list") | layer_list must be a list, got None
ascend_map | lambda f: f.update(moe_layer_count=3) | moe_layer_count must be 2
ascend_map | lambda f: layer(f, 1).update(device_count=3) | layer 1: device_count must be 2
ascend_map | lambda f: layer(f)["device_list"][1]["device_expert"].pop() | layer 0: must have 2
ascend_map | lambda f: layer(f)["device_list"].clear() | layer 0: device_count must be 0
tokenspeed | {"ep_rank": 1} | ep_rank must be an integer below ep_size, got 1 and 1
tokenspeed | {"ep_size": 10**9} | ep_rank must be an integer below ep_size, got 0 and 1000000000
tokenspeed | {"ep_rank": True} | ep_rank must be an integer below ep_size, got True and 1
tokenspeed | {"ep_size": 2} | got 1 of rank 0 and 0 of rank 1
tokenspeed | {}, {"ep_rank": 0} | got 2 of rank 0 and 0 of rank 1
tokenspeed | {}, {"ep_size": 3} | ep_size must be the same in all, got 2 and 3
tokenspeed | {"logical_count": 7} | logical_count must be a tensor [layers, experts], got 7
tokenspeed | {"logical_count": np.ones(4)} | logical_count must be a tensor [layers, experts]
tokenspeed | {"logical_count": np.full((2, 4), 0.5)} | must be whole numbers of tokens
tokenspeed | {"logical_count": -np.ones((2, 4))} | must be counts from 0 to 2**48
tokenspeed | {}, {"logical_count": np.ones((3, 4))} | must be [2, 4] like those before, got [3, 4]
fastdeploy | {"data": []} | response 0: must have code 0 and data by rank, got []
fastdeploy | {"data": [[1, 2]]} | rank 0: counts must be [layers, experts], got [2]
fastdeploy | {"data": [[[1, 2], [3]]]} | response 0: rank 0: counts must
fastdeploy | {"data": [[[1, 0.5]]]} | must be whole numbers of tokens
fastdeploy | {"data": [[[1, -1]]]} | must be counts from 0 to 2**48
fastdeploy | {"data": [[["a", "b"]]]} | response 0: rank 0: counts must be
fastdeploy | {"data": [[[1, 2]], [[1, 2, 3]]]} | rank 1: counts must be [1, 2] like those before
fastdeploy | {}, {"data": [[[1, 2]] * 2]} | must have layers and experts of the windows before
fastdeploy | {}, {"code": 1, "data": None, "msg": "no"} | response 1: must have code 0 and data by
memra_map | lambda f: f.update(ranks=9) | ranks must be from 1 to 4, got 9
memra_map | lambda f: f.update(ranks=1) | layer 0: ranks must be below 1, got 1
memra_map | lambda f: f.update(format="x") | format must be memra-ep-map-v1
memra_map | lambda f: f.update(layers=[]) | layers must be a list of layers
memra_map | lambda f: f.update(layers=f["layers"][:1] * 2) | layers must be there once each
memra_map | lambda f: f["layers"][1].update(assignment=[0]) | layer 1: assignment must have 4 ranks
memra_map | lambda f: f["layers"][1].update(assignment=[0, 1, 0, 0.5]) | layer 1: ranks must be
imatrix | {"kind": "model"} | must be an importance matrix of llama-imatrix, got a file of type 'mod
imatrix | {"load": []} | got none: of a model without experts
imatrix | {"load": [[1], [2]]} | must have counts of experts, got 1
imatrix | {"load": [[1, 2], [0, 0]]} | layer 2 must have tokens, got counts of zero
imatrix | {"load": [[1, 0.5]]} | must be whole numbers of tokens
imatrix | {"load": [[1, -1]]} | must be counts from 0 to 2**48
imatrix | {"load": [[1, np.nan]]} | must be whole numbers of tokens
imatrix | {"named": lambda c: dict([*c.items()][:3]) | {W2: np.ones((3, 1), "f4")}} | 4 experts like
imatrix | {}, {"load": [[1, 2], [3, 4]]} | must have layers and experts of imatrix.gguf.at_0, [2, 4]
imatrix | {}, {"load": [[9, 0, 9, 9]] * 2} | must grow from imatrix.gguf.at_0 to imatrix.gguf.at_1
gguf_bytes | lambda b: b[:40] | damaged GGUF: the file ends within
gguf_bytes | lambda b: b[:-20] | damaged GGUF: the file ends within
gguf_bytes | lambda b: b[:4] + bytes([9]) + b[5:] | damaged GGUF: Sorry, file appears
gguf_bytes | lambda b: b[:8] + bytes(7) + b"\x80" + b[16:] | damaged GGUF: the file ends
sglang_map | [] | none of
sglang_map | {"physical_to_logical_map": [[0, 1], [0]]} | row 1 must have 2 slots like row 0, got 1
sglang_map | {"physical_to_logical_map": [[0, 1 << 70]]} | must be integers
sglang_map | {"physical_to_logical_map": [[0, 1]], "b": 1} | single key
sglang_map | {"physical_to_logical_map": [[0, 1, 2]]} | must have a multiple of 2 slots
sglang_map | {"hello": 1} | none of
sglang_map | {"physical_to_logical_map": [[(1 << 64) - 1, 1 << 63]]} | must be integers below 2
sglang_responses | [1] | response 0: routed_experts must be base64, got [1]
sglang_responses | "AAAA" | response 0: routed_experts must be 32-bit integers, got 3 bytes
sglang_responses | "hello" | response 0: routed_experts must be base64, got 5 letters
"""


LINES = [line.partition(" | ")[::2] for line in CASES.strip().splitlines()]


def check_line_of(reader, case, folder):
    """Make the file of a row, read it, and assert that it is refused in the row's words."""
    given, _, words = case.rpartition(" | ")
    called = eval(f"lambda folder: {reader}(folder, {given})", globals())
    refused(words, folder, lambda: called(folder))


@pytest.mark.parametrize(("reader", "case"), LINES)
def test_what_is_wrong_is_said(tmp_path, reader, case):
    """The message is one line that begins with a path of the recording."""
    check_line_of(reader, case, tmp_path)


def test_every_reader_has_a_row(tmp_path, monkeypatch):
    """Rows of each kind of file together ask all readers but those of moetuner's own files."""
    asked = set()

    def listen(name, reader):
        def read(*arguments, **others):
            asked.add(name)
            return reader.module.read(*arguments, **others)

        return reader._replace(module=SimpleNamespace(read=read))

    for name, reader in READERS.items():
        monkeypatch.setitem(READERS, name, listen(name, reader))
    ends = [*dict(LINES).items(), *dict(reversed(LINES)).items()]
    for number, (kind, case) in enumerate(ends):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_line_of(kind, case, folder)
    assert READERS.keys() - {*KINDS} <= asked


def test_hidden_files_of_a_folder_are_left_out(tmp_path):
    """Another process may be writing one, or have been killed while it did."""
    ranks(tmp_path, "a_rank0.npz", "a_rank1.npz")
    expected = mt.open_input(tmp_path)
    (tmp_path / ".a_rank1.npz.0123abcd.moetuner").write_bytes(b"PK\x03\x04 and half")
    (tmp_path / ".a_rank2.npz").write_bytes(b"PK\x03\x04 and half")
    assert mt.open_input(tmp_path) == expected


@pytest.mark.parametrize("reader", [None, *sorted(READERS)])
def test_readers_refuse_what_is_no_file(tmp_path, reader):
    """An empty folder, an empty file, a file that is not there: one line names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").touch()
    for path in (tmp_path / "empty", tmp_path / "nothing", tmp_path / "absent"):
        with pytest.raises((ValueError, OSError), match=r"^[^\n]+$") as caught:
            read_input([path], HINTS, reader)
        assert str(tmp_path) in str(caught.value)
