"""Convert what small tools log of routers to a CSV that moetuner reads.

Enters: memra's log (MEMRA_MOE_TRACE or MEMRA_MOE_WEIGHT_TRACE), or choices of llama.cpp's routers:
llama-moe-trace's rows `pos,layer,id,id,...`, columns `phase,token,layer,rank,expert` of forks of
llama.cpp, or BigMoeOnEdge's `# route_trace v1`. Leaves: columns sequence, token, layer and expert;
no sequence where there is only one, such as in memra's log, which names no requests. Tokens without
experts in all layers are left out: llama.cpp computes its last layer for those tokens of a prompt
alone whose logits are asked for, so little of prefill is in such a trace.

    python examples/convert_router_logs.py trace.txt --out trace.csv
    moetuner solve trace.csv --num-experts 16 --devices 2 --for memra
"""

import argparse
import csv
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

# Sequence, token, layer and expert; the experts of a token and layer come best first.
Choice = tuple[int, int, int, int]
# memra's number of the layer of a draft head.
DRAFT_HEAD = 65535
TOKEN = itemgetter(0, 1)


def read_memra(lines: Iterable[str]) -> Iterator[Choice]:
    """Read lines `<layer> <tokens> <id,id,...>` or `id:weight`, one for every layer of a pass."""
    first, tokens, last = 0, 0, -1
    for line in lines:
        layer, count, choices = line.split()
        if int(layer) == DRAFT_HEAD:
            continue
        if int(layer) <= last:  # another pass begins
            first += tokens
        last, tokens = int(layer), int(count)
        ids = [int(choice.partition(":")[0]) for choice in choices.split(",")]
        for at, expert in enumerate(ids):
            yield 0, first + at * tokens // len(ids), last, expert


def read_rows(lines: Iterable[str]) -> Iterator[Choice]:
    """Read rows `pos,layer,id,id,...`; positions below zero are of a prompt, which begins one."""
    rows = (map(int, row) for row in csv.reader(lines))
    sequence, was_prompt = 0, True
    for position, layer, *ids in rows:
        sequence += position < 0 and not was_prompt
        was_prompt = position < 0
        for expert in ids:
            yield sequence, position, layer, expert


def read_columns(lines: Iterable[str]) -> Iterator[Choice]:
    """Read a row for every choice, by the names of columns."""
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        token = row["step"] if "step" in row else row["token"]
        yield int(row.get("turn", 0)), int(token), int(row["layer"]), int(row["expert"])


def read(path: Path) -> list[Choice]:
    """Read a file, by what its first line is."""
    lines = path.read_text().split("\n")[:-1]  # the last one may have been cut off
    if lines[0].startswith(("#", "phase")):
        return [*read_columns(lines)]
    return [*(read_memra(lines) if " " in lines[0] else read_rows(lines))]


def keep_complete(choices: list[Choice]) -> Iterator[Choice]:
    """Return the choices of those tokens that have experts in all layers, numbered anew."""
    tokens = [[*token] for _, token in groupby(sorted(choices, key=itemgetter(0, 1, 2)), TOKEN)]
    complete = [token for token in tokens if len(token) == max(map(len, tokens))]
    for number, token in enumerate(complete):
        for sequence, _, layer, expert in token:
            yield sequence, number, layer, expert


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    choices = [*keep_complete(read(options.log))]
    skipped = 0 if len({sequence for sequence, *_ in choices}) > 1 else 1
    with options.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sequence", "token", "layer", "expert"][skipped:])
        rows.writerows(choice[skipped:] for choice in choices)


if __name__ == "__main__":
    main()
