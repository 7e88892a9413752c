"""Describe a recording, and warn where it is worthless or of one kind of traffic, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._texts import name
from moetuner.cost import top_k_of
from moetuner.files.cells import counted, layer_list, percent
from moetuner.formats import list_cautions
from moetuner.formats.sources import list_equal
from moetuner.recording import Recording
from moetuner.recording.labelling import evenly_spaced
from moetuner.recording.population import Population
from moetuner.statistics import RoutingStatistics, count_loads, measure_distance
from moetuner.trace import as_trace

# Bytes of the first tokens of a trace, from which warnings are computed.
SAMPLE_BYTES = 1 << 24
# Choices per expert and layer below which chance alone changes a count by a third.
FEWEST_CHOICES = 10
# Prompts must have been alike if the busiest experts take more than these shares of the choices of
# the median layer: one expert in sixteen, and as many experts as a token chooses.
SIXTEENTH_TAKES, TOP_K_TAKE = 0.45, 0.9
PHASES = ("prefill", "decode")
# Largest share of its tokens that a window sends to other experts than the rest, if windows are
# alike. In docs/mixing.md prompts of other lengths differ by 5 to 17 %. Chance is not subtracted:
# windows that are too small to compare are never called alike.
ALIKE = 0.05
# Most recordings that a warning names, which were counted several times.
SHOWN_REPEATED = 3
# Most windows that are compared, evenly spaced.
COMPARED = 256


def introduce(
    paths: Sequence[Path],
    recording: Recording,
    readers: Sequence[str],
    step: int | None,
    top_k: int | None,
) -> tuple[list[str], dict[str, Any]]:
    """Return lines on a recording, its limits, assumptions and warnings, and its facts for JSON.

    ``readers`` are those of its files; ``step`` and ``top_k`` as for ``describe_steps``.
    """
    warnings = [*list_equal(paths), *list_warnings(recording)]
    lines = describe(paths, recording).split("\n")
    lines += [*list_cautions(readers), *describe_steps(recording, step, top_k), *warnings]
    return lines, facts(paths, recording) | {"warnings": warnings}


def facts(paths: Sequence[Path], recording: Recording) -> dict[str, Any]:
    """Return the files, kind and sizes of a recording as JSON values."""
    return {"files": [*map(str, paths)], **recording.facts()}


def describe(paths: Sequence[Path], recording: Recording) -> str:
    """Write a line on a recording and its files, and one on layers that they leave out, if any."""
    sizes = recording.facts()
    sizes |= {"groups": len(sizes["group_names"]), "experts": sizes["num_experts"]}
    names_of_sizes = ("tokens", "windows", "layers", "experts", "top_k", "sequences", "groups")
    texts = [
        f"top-{sizes[size]}" if size == "top_k" else counted(sizes[size], size[:-1])
        for size in names_of_sizes
        if sizes.get(size)
    ]
    model = f" of {name(sizes['model'])}" if sizes["model"] else ""
    files = name(paths[0].name)
    if len(paths) > 1:
        files += f" and {counted(len(paths) - 1, 'more file')}"
    lines = [f"{files}: {sizes['kind']}{model}, {', '.join(texts)}"]
    if recording.left_out is not None:
        hidden, dense = recording.left_out
        lines.append(
            "Layers without experts are left out; as options of export: "
            f"--hidden-layers {hidden} --dense-layers {layer_list(dense)}"
        )
    if recording.population is not None:
        lines.append(_describe_population(recording, recording.population))
    return "\n".join(lines)


def _describe_population(recording: Recording, population: Population) -> str:
    """Write what a counted recording was drawn from, and how near to that its sample is."""
    counts = [counted(population.size, recording.unit)]
    counts += [counted(population.sequences, "sequence")] if population.sequences else []
    text = f"Counted: {counted(population.recordings, 'recording')} with {' and '.join(counts)}"
    if population.is_whole:
        text += ", all of which are here."
    else:
        share = recording.length / population.size
        loads = count_loads(recording, by_group=False).total_load
        distance = float(measure_distance(loads, population.load.sum(axis=0)).mean())
        text += (
            f"; here is a sample of {percent(share)}, whose loads differ from those of all by "
            f"{percent(distance)}."
        )
    if population.unreadable:
        text += f" {counted(population.unreadable, 'recording')} could not be read."
    return text


def describe_steps(recording: Recording, step: int | None, top_k: int | None) -> list[str]:
    """Write how many tokens a window of a load table is taken to have; nothing for a trace.

    ``step`` is the number of tokens of a step, where windows were scaled to steps.
    """
    if not isinstance(recording, RoutingStatistics):
        return []
    top_k = top_k or top_k_of(recording)
    unit = ""
    if top_k is None:
        unit = " (a token counts once for every expert it chose; --top-k K counts it once)"
    if step is not None:
        tokens = f"of {step:,} tokens{unit}"
        if recording.windows == 1:
            return [f"The window is scaled to a step {tokens}."]
        steps = counted(recording.windows, "single step")
        return [f"Windows are taken as {steps} {tokens}, drawn by chance from their loads."]
    if recording.window is not None:
        return []
    sums = recording.window_load.sum(axis=2, dtype=np.int64).max(axis=1)
    size = counted(int(np.median(sums)) // (top_k or 1), "token")
    window = "A window" if sums.max() == sums.min() else "The median window"
    return [
        f"{window} is {size}{unit} and is taken as one step; pass --tokens-per-step N if "
        "the counters sum over many steps."
    ]


def list_warnings(traffic: Recording) -> list[str]:
    """Return warnings about a recording from which no useful placement can be computed."""
    experts = traffic.num_experts
    ids_or_loads: list[NDArray[Any]]  # of every layer
    if isinstance(traffic, RoutingStatistics):
        load = traffic.total_load.astype(np.int64)
        choices = int(load.sum(axis=1).max())
        ids_or_loads = [*traffic.window_load.swapaxes(0, 1)]
        empty = traffic.windows - int(np.count_nonzero(traffic.window_load.any(axis=(1, 2))))
    else:
        trace, empty = as_trace(traffic), 0
        ids = next(trace.shards(SAMPLE_BYTES), np.empty((0, trace.layers, trace.top_k), int))
        ids_or_loads = [ids[:, layer].ravel() for layer in range(trace.layers)]
        load = np.stack([np.bincount(layer_ids, minlength=experts) for layer_ids in ids_or_loads])
        choices = trace.tokens * trace.top_k
    if not choices:
        return ["Warning: every count is zero, so nothing was recorded: record again under load."]
    if choices < FEWEST_CHOICES * experts:
        return [
            f"Warning: {choices / experts:.1f} choices per expert and layer are too few to tell "
            f"busy experts from chance: record at least {FEWEST_CHOICES}, better hundreds."
        ]
    lines = [] if traffic.population is None else _warn_of_repeated(traffic.population)
    lines += _warn_of_alike_prompts(load, top_k_of(traffic) or 2)
    lines += _warn_of_repeated_layers([layer.tobytes() for layer in ids_or_loads])
    if empty:
        lines.append(
            f"Warning: empty windows, {empty:,} of {traffic.length:,}, count as steps of even "
            "load: leave out windows in which nothing was served."
        )
    return lines


def _warn_of_repeated(population: Population) -> list[str]:
    """Return a warning if recordings were counted several times."""
    repeated = population.repeated
    if not repeated:
        return []
    shown = [f"{number} ({times} times)" for number, times in repeated.items()]
    more = f" and {len(shown) - SHOWN_REPEATED} more" if len(shown) > SHOWN_REPEATED else ""
    return [
        f"Warning: recordings were counted more than once: {', '.join(shown[:SHOWN_REPEATED])}"
        f"{more}. Their tokens count as often: add the counts of every recording once."
    ]


def _warn_of_alike_prompts(load: NDArray[np.int64], top_k: int) -> list[str]:
    """Return a warning if few experts take most of the choices, given loads of experts [L,E]."""
    experts = load.shape[1]
    busiest = -np.sort(-load, axis=1) / np.maximum(load.sum(axis=1, keepdims=True), 1)
    for number, limit in ((max(1, experts // 16), SIXTEENTH_TAKES), (top_k, TOP_K_TAKE)):
        share = float(np.median(busiest[:, :number].sum(axis=1)))
        if share > limit and number < experts:
            return [
                f"Warning: {number} of {experts} experts take {100 * share:.0f} % of the choices "
                "of the median layer, as prompts do that are alike: record the prompts of real "
                "users."
            ]
    return []


def _warn_of_repeated_layers(contents: list[bytes]) -> list[str]:
    """Return a warning if layers repeat others, given what was recorded of every layer."""
    repeated = [layer for layer, content in enumerate(contents) if contents.index(content) < layer]
    if not repeated:
        return []
    layer, number = repeated[0], len(repeated) - 1
    others = f", and {number} more repeat others" if number else ""
    original = contents.index(contents[layer])
    return [
        f"Warning: layer {layer} has exactly what layer {original} has{others}: record every "
        "layer by itself."
    ]


def find_one_kind(traffic: Recording, unseen: Recording | None = None) -> str | None:
    """Return the evidence that a recording is of one kind of traffic, in words, or None.

    The evidence is labels of one group or one phase; without labels, counts of a single window, or
    of windows that are all alike, as they are for one kind or a constant mix. ``unseen`` is traffic
    to judge on, which may be of other kinds.
    """
    recordings = [traffic] if unseen is None else [traffic, unseen]
    # A recording without labels may be of any group.
    labels = {
        label
        for recording in recordings
        for label in (recording.group_rows().keys() - {None} or {""})
    }
    if labels != {""}:
        label = labels.pop() or ""
        kind = label if label in PHASES else f"of one group, {name(label)}"
        return None if labels else f"all traffic is {kind}"
    counts = [counts.window_load for counts in recordings if isinstance(counts, RoutingStatistics)]
    load = np.concatenate(counts) if counts else np.empty(0)
    if len(load) == 1:
        return "there is one window"
    if len(load) and (distance := _measure_largest_distance(load)) <= ALIKE:
        return f"all windows are alike, within {max(100 * distance, 0.1):.1f} % of their tokens"
    return None


def _measure_largest_distance(load: NDArray[Any]) -> float:
    """Compute the largest distance of the load of a window [W,L,E] from that of all others."""
    total, largest = load.sum(axis=0, dtype=np.float64), 0.0
    for window in evenly_spaced(len(load), min(len(load), COMPARED)):
        load_in_window = load[window].astype(np.float64)
        distance = float(measure_distance(load_in_window, total - load_in_window).mean())
        largest = max(largest, distance)
    return largest
