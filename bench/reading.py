"""Speed of reading text: JSON lines of moetuner and of Megatron-Core, and CSV.

    python bench/reading.py [MB]

Files of so many megabytes (64) are made in a temporary folder. Times are CPU seconds of the whole
process, the best of three; beside them those of Python's JSON for the same lines, thrown away.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import timed

import moetuner as mt

TOKENS, LAYERS, TOP_K, EXPERTS = 4096, 24, 8, 64


def best_of_three(work):
    """Smallest CPU time of three calls."""
    return min(timed(work)[2] for _ in range(3))


def megatron(ids):
    """Lines of Megatron's router trace."""
    for layer in range(LAYERS):
        about = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
        about |= {"num_tokens": len(ids), "topk": TOP_K, "top_indices": ids[:, layer].tolist()}
        yield json.dumps(about) + "\n"


def json_lines(ids, per):
    """Lines of moetuner's own, of a token or of 64."""
    for at, token in enumerate(ids):
        about = {"sequence": at // 64, "group": "ab"[at // 64 % 2]}
        if per == "token":
            yield json.dumps({"experts": token.tolist(), **about}, separators=(",", ":")) + "\n"
        elif at % 64 == 0:
            tokens = ids[at : at + 64].tolist()
            yield json.dumps({"tokens": tokens, **about}, separators=(",", ":")) + "\n"


def rows(ids):
    """Lines of CSV."""
    for token, layer in np.ndindex(ids.shape[:2]):
        for expert in ids[token, layer]:
            yield f"{token},{layer},{expert},{token // 64}\n"


def repeated(path, lines, size, header=""):
    """Write lines again and again, up to a size."""
    text = "".join(lines)
    path.write_text(header + text * max(1, size // len(text)))


def main():
    """Make the files, and time them."""
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 64) * 1e6)
    scores = np.random.default_rng(0).random((TOKENS, LAYERS, EXPERTS))
    ids = np.argsort(scores, axis=2)[:, :, :TOP_K].astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for per in ("token", "sequence"):
            path = files[f"JSON lines per {per}"] = Path(folder) / f"{per}.jsonl"
            repeated(path, json_lines(ids, per), size, f'{{"num_experts": {EXPERTS}}}\n')
        path = files["router trace"] = Path(folder) / "router_trace_rank0.jsonl"
        repeated(path, megatron(ids), size)
        path = files["CSV"] = Path(folder) / "rows.csv"
        names = "token,layer,expert,sequence\n"
        path.write_text(names + "".join(rows(ids[: size // 9000 + 1])))
        for name, path in files.items():
            megabytes = path.stat().st_size / 1e6
            took = best_of_three(lambda path=path: mt.open_input(path, num_experts=EXPERTS))
            text = f"{name:24} {megabytes:6.0f} MB  {megabytes / took:6.0f} MB/s"
            if path.suffix == ".jsonl":
                lines = path.read_bytes().splitlines()
                python = best_of_three(lambda lines=lines: [json.loads(line) for line in lines])
                text += f"  (Python's json alone {megabytes / python:.0f} MB/s)"
            print(text)


if __name__ == "__main__":
    main()
