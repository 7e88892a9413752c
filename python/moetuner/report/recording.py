"""What a recording is, and what makes it worthless or good for one kind of traffic, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.cost import top_k_of
from moetuner.files.cells import counted, layer_list
from moetuner.files.text import name
from moetuner.recording import Recording
from moetuner.statistics import RoutingStatistics, measure_distance
from moetuner.trace import as_trace

# Of a trace the first tokens tell.
SAMPLE_BYTES = 1 << 24
# Choices per expert and layer below which counts say little: chance alone moves them by a third.
FEWEST_CHOICES = 10
# Shares of the choices of the median layer, beyond which prompts must have been alike: of one
# expert in sixteen, and of as many as a token chooses.
FEW_TAKE, SAME_TAKE = 0.45, 0.9
PHASES = ("prefill", "decode")
# Share of its tokens that a window sends to other experts than the rest, below which it is of their
# kind. Prompt lengths differ by 5 to 17 % in docs/mixing.md. Chance counts as a difference: windows
# too small to tell are never called alike.
ALIKE = 0.05
# Windows that are compared; of more, evenly spaced ones are.
COMPARED = 256


def facts(paths: Sequence[Path], recording: Recording) -> dict[str, Any]:
    """Return files, kind and sizes, for JSON."""
    return {"files": [*map(str, paths)], **recording.facts()}


def describe(paths: Sequence[Path], recording: Recording) -> str:
    """Describe files in a line; in another one the layers that they leave out, if any."""
    described = recording.facts()
    sizes = {**described, "groups": len(described["group_names"])}
    sizes["experts"] = described["num_experts"]
    names_of_sizes = ("tokens", "windows", "layers", "experts", "top_k", "sequences", "groups")
    parts = [
        f"top-{sizes[size]}" if size == "top_k" else counted(sizes[size], size[:-1])
        for size in names_of_sizes
        if sizes.get(size)
    ]
    model = f" of {name(described['model'])}" if described["model"] else ""
    more = f" and {counted(len(paths) - 1, 'more file')}" if len(paths) > 1 else ""
    lines = [f"{name(paths[0].name)}{more}: {described['kind']}{model}, {', '.join(parts)}"]
    if recording.left_out is not None:
        hidden, dense = recording.left_out
        lines.append(
            "Layers without experts are left out; as options of export: "
            f"--hidden-layers {hidden} --dense-layers {layer_list(dense)}"
        )
    return "\n".join(lines)


def describe_steps(recording: Recording, step: int | None, top_k: int | None) -> list[str]:
    """Write how many tokens a window of a load table is taken to have; nothing of others.

    ``step`` has the tokens of a step, where windows were scaled to such.
    """
    top_k = top_k or top_k_of(recording)
    many = ""
    if top_k is None:
        many = " (a token counts once for every expert it chose; --top-k K counts it once)"
    if not isinstance(recording, RoutingStatistics):
        return []
    if step is not None:
        each = f"of {step:,} tokens{many}"
        if recording.windows == 1:
            return [f"The window is scaled to a step {each}."]
        steps = counted(recording.windows, "single step")
        return [f"Windows are taken as {steps} {each}, drawn by chance from their loads."]
    if recording.window is not None:
        return []
    sums = recording.window_load.sum(axis=2, dtype=np.int64).max(axis=1)
    size = counted(int(np.median(sums)) // (top_k or 1), "token")
    window = "A window" if sums.max() == sums.min() else "The median window"
    return [
        f"{window} is {size}{many} and is taken as one step; pass --tokens-per-step N if "
        "the counters sum over many steps."
    ]


def list_warnings(traffic: Recording) -> list[str]:
    """Return warnings about a recording from which nothing good can be computed."""
    experts = traffic.num_experts
    layers: list[NDArray[Any]]
    if isinstance(traffic, RoutingStatistics):
        load = traffic.total_load.astype(np.int64)
        choices = int(load.sum(axis=1).max())
        layers = [*traffic.window_load.swapaxes(0, 1)]
        empty = traffic.windows - int(np.count_nonzero(traffic.window_load.any(axis=(1, 2))))
    else:
        trace, empty = as_trace(traffic), 0
        ids = next(trace.shards(SAMPLE_BYTES), np.empty((0, trace.layers, trace.top_k), int))
        layers = [ids[:, layer].ravel() for layer in range(trace.layers)]
        load = np.stack([np.bincount(layer, minlength=experts) for layer in layers])
        choices = trace.tokens * trace.top_k
    if not choices:
        return ["Warning: every count is zero, so nothing was recorded: record again under load."]
    if choices < FEWEST_CHOICES * experts:
        return [
            f"Warning: {choices / experts:.1f} choices per expert and layer are too few to tell "
            f"busy experts from chance: record at least {FEWEST_CHOICES}, better hundreds."
        ]
    lines: list[str] = []
    busiest = -np.sort(-load, axis=1) / np.maximum(load.sum(axis=1, keepdims=True), 1)
    for number, limit in ((max(1, experts // 16), FEW_TAKE), (top_k_of(traffic) or 2, SAME_TAKE)):
        share = float(np.median(busiest[:, :number].sum(axis=1)))
        if share > limit and number < experts and not lines:
            lines = [
                f"Warning: {number} of {experts} experts take {share:.0%} of the choices of the "
                "median layer, as prompts do that are alike: record the prompts of real users."
            ]
    texts = [each.tobytes() for each in layers]
    copied = [layer for layer, text in enumerate(texts) if texts.index(text) < layer]
    for layer in copied[:1]:
        more = f", and {len(copied) - 1} more repeat others" if len(copied) > 1 else ""
        lines.append(
            f"Warning: layer {layer} has exactly what layer {texts.index(texts[layer])} has{more}: "
            "record every layer by itself."
        )
    if empty:
        lines.append(
            f"Warning: empty windows, {empty:,} of {traffic.length:,}, count as steps of even "
            "load: leave out windows in which nothing was served."
        )
    return lines


def find_one_kind(traffic: Recording, unseen: Recording | None = None) -> str | None:
    """Return what shows that a recording is of one kind of traffic, in words.

    Labels tell: one group, or one phase. Without labels the windows of counts do: a single one, or
    windows that are all alike, of one kind or of a mix that stays the same. None where there are
    several kinds, or nothing is known. ``unseen`` is traffic to judge on, of kinds of its own.
    """
    parts = [traffic] if unseen is None else [traffic, unseen]
    # What has no labels may be of any group.
    labels = {label for part in parts for label in (part.group_rows().keys() - {None} or {""})}
    if labels != {""}:
        label = labels.pop() or ""
        kind = label if label in PHASES else f"of one group, {name(label)}"
        return None if labels else f"all traffic is {kind}"
    counts = [part.window_load for part in parts if isinstance(part, RoutingStatistics)]
    load = np.concatenate(counts) if counts else np.empty(0)
    if len(load) == 1:
        return "there is one window"
    if len(load) and (apart := _measure_largest_distance(load)) <= ALIKE:
        return f"all windows are alike, within {max(100 * apart, 0.1):.1f} % of their tokens"
    return None


def _measure_largest_distance(load: NDArray[Any]) -> float:
    """Compute the largest share of a window's tokens [W,L,E] that go where the rest's do not."""
    total, furthest = load.sum(axis=0, dtype=np.float64), 0.0
    for window in np.unique(np.linspace(0, len(load) - 1, min(len(load), COMPARED)).round()):
        own = load[int(window)].astype(np.float64)
        furthest = max(furthest, float(measure_distance(own, total - own).mean()))
    return furthest
