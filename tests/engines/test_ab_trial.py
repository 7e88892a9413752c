"""The trial of `examples/ab_vllm.py` in vLLM itself: one server, whose map alternates.

Times on a CPU that others use say nothing, so that the figures are not looked at: only that both
arms served the maps that they should, on both ranks.
"""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import tiny_models
from serving import (
    EXPERTS,
    HERE,
    PATH,
    RANKS,
    SLOTS,
    VLLM,
    Served,
    by_rank,
    experts_on_ranks,
    folder_of,
    model,
    program,
)

import moetuner as mt

CLIENT = "--dataset-name random --random-input-len 24 --random-output-len 8 --num-prompts 8"
SERVER = "--tensor-parallel-size 2 --enable-expert-parallel"
SENTENCE = (
    r"Tokens per second: [+-]\d+\.\d % \(95 % interval [+-]\d+\.\d to [+-]\d+\.\d %, 2 pairs\): "
    r"no certain change \(5 pairs or more say more\)\."
)


def test_the_map_of_one_server_alternates():
    """Each arm serves its own map on both ranks, in the order ABBA, and the sentence says so."""
    folder = folder_of("vllm-ab-trial")
    placed, answer = folder / "placed.json", folder / "trial.json"
    # The first map has all hot experts but one on rank 0; here every second one is there.
    rows = np.array([[*range(0, EXPERTS, 2), 1], [*range(1, EXPERTS, 2), 0]])
    assert rows.shape == (2, SLOTS)
    mt.Placement([rows] * tiny_models.LAYERS, num_experts=EXPERTS).save(placed)
    arguments = [model("qwen3_moe_hot"), placed, "--server", SERVER, "--client", CLIENT]
    arguments += ["--rounds", 2, "--steps", 8, "--warm-up", 4, "--patience", 600]
    environment = {
        **VLLM,
        **RANKS,
        "PATH": f"{HERE / 'bin'}:{PATH}",
        "ENGINES_PYTHON": sys.executable,
        "ENGINES_MAPS": str(folder / "maps"),
        "ENGINES_PLAIN": "1",
    }
    arguments += ["--folder", folder, "--json", answer]
    printed = program("../../examples/ab_vllm.py", arguments, environment, folder)
    content = json.loads(answer.read_text())
    assert re.fullmatch(SENTENCE, content["sentence"])
    assert content["sentence"] in printed.splitlines()
    assert set(content["change"]) == {"throughput", "tpot"}
    runs = content["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [
        *(("own", 0), ("ours", 0)),
        *(("ours", 1), ("own", 1)),
    ]
    assert all(run["requests"] == 8 and run["throughput"] > 0 for run in runs)
    first = (np.arange(2 * SLOTS) % EXPERTS).tolist()
    expected = {"own": by_rank([first] * tiny_models.LAYERS, 2), "ours": experts_on_ranks(placed)}
    log = (folder / "server.log").read_text(errors="replace")
    maps = Served(folder, log, [], [], []).common_maps()
    assert [by_rank(in_force, 2) for in_force in maps] == [
        expected[arm] for arm in ("own", "ours", "own")
    ]
    # The plugin's log: the exchanges are of these maps, by the loads that were counted.
    pattern = r"\((\w{8})\): balancedness (\S+) -> (\S+), 4 layers change"
    exchanges = re.findall(pattern, log)
    assert [checksum for checksum, *_ in exchanges] == [runs[1]["map"], runs[3]["map"]]
    assert runs[0]["map"] == runs[3]["map"] != runs[1]["map"] == runs[2]["map"]
    (_, before, after), _ = exchanges
    assert float(before) < float(after)  # the hot experts are on both ranks now
