"""Experts on one GPU: a cost model fitted to grouped matrix products, and what moetuner adds.

    python bench/gpu/experts.py [--hidden 4096] [--inner 1536] [--experts 32] [--out FILE]
    python bench/gpu/experts.py --device cpu --quick     (that it runs, not how fast)

Times gated experts in bfloat16 over a grid of tokens and active experts, each shape with cold
caches and tokens spread evenly; fits a ``CostModel`` to them and says how far it is off. Then, for
batches of decode and prefill, the share of a layer's time that ``RoutingCounters`` and the
bookkeeping of ``ExpertParallelMoE`` (one rank, nothing to exchange with) take. Writes Markdown for
RESULTS.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import moetuner as mt
from moetuner.torch import ExpertParallelMoE, GroupedExperts
from moetuner.torch.timing import Stopwatch


def grid(
    experts: GroupedExperts, hidden: int, watch: Stopwatch, tokens: list[int]
) -> list[tuple[int, int, float]]:
    """Microseconds of tokens on active experts: (tokens, active, time)."""
    slots = len(experts.up)
    active_counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= slots]
    answer = []
    for count in tokens:
        rows = torch.randn(count, hidden, device=experts.up.device).to(experts.up.dtype)
        for active in active_counts:
            if active > count:
                continue
            shares = torch.zeros(slots, dtype=torch.int64)
            shares[:active] = count // active
            shares[: count % active] += 1
            counts = shares.to(rows.device)
            answer.append((count, active, watch(lambda: experts(rows, counts))))
    return answer


def model_of(
    measured: list[tuple[int, int, float]], token_bytes: int, name: str, out: Path | None
) -> list[str]:
    """Fit a cost model; say its numbers, and where it is furthest off."""
    if not hasattr(mt, "CostModel"):
        return ["No `CostModel` in this version: nothing fitted."]
    tokens, active, taken = (
        np.array(column, dtype=float) for column in zip(*measured, strict=True)
    )
    try:
        model = mt.CostModel.fit(tokens, active, taken, token_bytes=token_bytes, name=name)
    except ValueError as error:
        return [f"Nothing fitted: {error}."]
    predicted = model.compute_us(tokens, active)
    if out is not None:
        model.save(out)
    off = np.abs(predicted / taken - 1)
    worst = int(off.argmax())
    return [
        f"`{model.formula}`; off by "
        f"{100 * float(np.median(off)):.0f} % in the median, by {100 * off[worst]:.0f} % at most "
        f"({measured[worst][0]} tokens, {measured[worst][1]} active).",
    ]


def overheads(
    experts: GroupedExperts, hidden: int, top_k: int, watch: Stopwatch, tokens: list[int]
) -> list[str]:
    """Say what the counters and the layer's bookkeeping add, one row per batch."""
    try:
        from moetuner.torch import RoutingCounters
    except ImportError:
        RoutingCounters = None
    slots, device, dtype = len(experts.up), experts.up.device, experts.up.dtype
    placement = mt.Placement(np.arange(slots).reshape(1, 1, slots))
    layer = ExpertParallelMoE(experts, placement, 0)
    router = torch.randn(slots, hidden, device=device).to(dtype)
    depth = 8  # layers that one update of the counters takes together
    lines = [
        "| tokens | router and experts | counters | share | ExpertParallelMoE adds |",
        "|---|---|---|---|---|",
    ]
    for count in tokens:
        x = torch.randn(count, hidden, device=device).to(dtype)
        scores = (x @ router.T).float()
        weights, index = scores.softmax(dim=1).topk(top_k, dim=1)

        def routed(x: torch.Tensor = x) -> torch.Tensor:
            return (x @ router.T).float().softmax(dim=1).topk(top_k, dim=1).indices

        def grouped(x: torch.Tensor = x, index: torch.Tensor = index) -> torch.Tensor:
            flat = index.reshape(-1)
            order = flat.argsort(stable=True)
            counts = torch.bincount(flat, minlength=slots)
            return experts(x[order // top_k], counts)

        plain = watch(routed) + watch(grouped)
        layer_us = watch(lambda x=x, i=index, w=weights: layer(x, i, w))
        counted = float("nan")
        if RoutingCounters is not None:
            counters = RoutingCounters(depth, slots, top_k, device=device)
            ids = index[:, None].expand(-1, depth, -1).contiguous()
            counted = watch(lambda c=counters, i=ids: c.update(i)) / depth
        lines.append(
            f"| {count} | {plain:.1f} us | {counted:.1f} us | {100 * counted / plain:.2f} % "
            f"| {layer_us - watch(grouped):.1f} us |"
        )
    if RoutingCounters is None:
        lines.append("\nNo `RoutingCounters` in this version: nothing counted.")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=32, help="slots of the device")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the table there as well")
    parser.add_argument("--model", type=Path, help="write the fitted cost model there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repetitions")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.inner, options.experts, options.top_k = 32, 16, 8, 2
        options.repeat = 2
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; try --device cpu --quick")
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU"
    watch = Stopwatch(device, options.repeat)

    torch.manual_seed(0)
    shape = (options.experts, 2 * options.inner, options.hidden)
    up = (torch.randn(shape, device=device) / options.hidden**0.5).to(torch.bfloat16)
    shape = (options.experts, options.hidden, options.inner)
    down = (torch.randn(shape, device=device) / options.inner**0.5).to(torch.bfloat16)
    experts = GroupedExperts(up, down).requires_grad_(False)
    tokens = [1, 4, 16, 64] if options.quick else [4**n for n in range(8)]
    batches = [8, 64] if options.quick else [16, 64, 256, 1024, 4096]

    measured = grid(experts, options.hidden, watch, tokens)
    actives = sorted({active for _, active, _ in measured})
    table = {(count, active): taken for count, active, taken in measured}
    lines = [
        f"## Experts on one {card} (`python bench/gpu/experts.py`)",
        "",
        f"torch {torch.__version__}, bfloat16, {options.experts} experts of "
        f"{options.hidden} x {options.inner}, median of {options.repeat}, caches cold. "
        "Microseconds of tokens on active experts:",
        "",
        "| tokens \\ active | " + " | ".join(map(str, actives)) + " |",
        "|---" * (len(actives) + 1) + "|",
    ]
    for count in tokens:
        cells = [table.get((count, active)) for active in actives]
        row = " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells)
        lines.append(f"| {count} | {row} |")
    lines += ["", *model_of(measured, 2 * options.hidden, card, options.model), ""]
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if cuda else "gloo"
        where = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=where, rank=0, world_size=1)
        lines += overheads(experts, options.hidden, options.top_k, watch, batches)
        dist.destroy_process_group()
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
