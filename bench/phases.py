"""Copies in two phases: decode and prefill of the default answer, on machines of many sizes.

    python bench/phases.py --data FOLDER [--record]

Every recording of tokens in FOLDER is placed on H100s from one half of its sequences, which are
served together; gains are those of the other half, in windows of 512 tokens (decode) and 8,192 (or
what the recording fills), over EPLB in the same slots and over blocks without copies. *Regret* is
how much longer a phase takes, on what was seen, than with what a search for that phase alone finds.
*Answer* is what somebody gets who says nothing; seconds are of the processor. Wanted: no phase
behind EPLB by more than a per cent where one node does not force a choice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, benchmark

import moetuner as mt
from moetuner.cost import cost_model_of
from moetuner.placement import blocks
from moetuner.serving.phases import WINDOWS, choose_judged_windows, make_phases

# Devices and devices of a node.
MACHINES = ((4, 4), (8, 8), (8, 4), (16, 8), (16, 4), (32, 16), (32, 8))
SPARE = (0, 1, 2)
LEAST_TOKENS = 4 * WINDOWS[1]


def is_trace(path: Path) -> bool:
    """Return whether a file has choices of experts for single tokens, in enough of them."""
    with np.load(path) as arrays:
        return "expert_ids" in arrays and len(arrays["expert_ids"]) >= LEAST_TOKENS


def judge(trace: mt.RoutingTrace, report: Report, name: str) -> list[Any]:
    """Add the table of a recording, and return its rows of gains over EPLB and regrets [4]."""
    seen, unseen = mt.hold_out(trace)
    model = cost_model_of(trace)
    sizes = choose_judged_windows(min(seen.length, unseen.length))
    table = report.table(
        f"{name}: {seen.layers} x {seen.num_experts}",
        "devices 7d",
        "a node 6d",
        "more slots 10d",
        "decode over EPLB 16.1%",
        "prefill over EPLB 17.1%",
        "decode over blocks 18.1%",
        "prefill over blocks 19.1%",
        "regret of decode 16.1%",
        "regret of prefill 17.1%",
        "seconds 7.1f",
    )
    rows = []
    for devices, per_node in MACHINES:
        if devices > seen.num_experts:
            continue
        machine = mt.Topology(devices=devices, devices_per_node=per_node)

        def measure(
            placement: mt.Placement, traffic: mt.RoutingTrace, machine: mt.Topology = machine
        ) -> Any:
            return np.array(
                [
                    mt.evaluate(
                        placement,
                        traffic,
                        machine,
                        window=window,
                        cost_model=model,
                        arrival="mixed",
                    ).predicted_layer_us
                    for window in sizes
                ]
            )

        plain = blocks(seen.layers, seen.num_experts, devices)
        for spare in SPARE:
            slots = -(-seen.num_experts // devices) + spare
            settings = {"arrival": "mixed", "cost_model": model, "slots_per_device": slots}
            problem = mt.Problem(seen, machine, **settings)
            begin = time.process_time()
            answer = mt.solve(problem).placement
            seconds = time.process_time() - begin
            alone = []
            for share in (0.0, 1.0):
                phases = mt.Problem(seen, machine, phases=make_phases(share), **settings)
                best = min(phases.value(mt.solve(phases).placement), phases.value(answer))
                alone.append(phases.value(answer) / best - 1)
            ours, eplb = (
                measure(placement, unseen)
                for placement in (answer, mt.solve(problem, "eplb").placement)
            )
            over_eplb, over_blocks = 1 - ours / eplb, 1 - ours / measure(plain, unseen)
            names = (devices, per_node, spare)
            table(*names, *over_eplb, *over_blocks, *alone, seconds)
            rows.append([*over_eplb, *alone])
    return rows


def main() -> None:
    """Print all tables."""
    options: dict[str, Any] = {"data": Path("../shared/data")}
    with benchmark(__doc__, **options) as (asked, report):
        rows: list[Any] = []
        for path in sorted(asked.data.glob("*.npz")):
            if is_trace(path):
                rows += judge(mt.open_input(path), report, path.stem)
        decode, prefill, *regrets = 100 * np.array(rows).T
        report.say(
            f"Of {len(rows)} machines and numbers of slots EPLB is ahead by more than a per cent "
            f"in decode {(decode < -1).sum()} times, by {max(-decode.min(), 0):.1f} % at most, in "
            f"prefill {(prefill < -1).sum()} times, by {max(-prefill.min(), 0):.1f} % at most; the "
            f"largest regret of a phase is {np.max(regrets):.1f} %."
        )
        path = asked.data / "gpt-oss-20b.npz"
        if path.exists():
            trace = mt.open_input(path)
            gains = list[float]()
            for devices, slots in ((8, "no slot"), (32, "a slot")):
                machine = mt.Topology(devices=devices, devices_per_node=8)
                advice = mt.advise(trace, machine, engine="vllm", in_order=False)
                assert advice.chosen_copies == (slots == "a slot"), "README says how many"
                gains += [100 * judgement.gain.gain for judgement in advice.judged]
            report.say(
                f"gpt-oss-20b gains {gains[0]:.1f} % of MoE layer time in decode and "
                f"{gains[1]:.1f} % in prefill on 8 H100, {gains[2]:.1f} % and {gains[3]:.1f} % on "
                "32 with a slot more each, on sequences not seen."
            )


if __name__ == "__main__":
    main()
