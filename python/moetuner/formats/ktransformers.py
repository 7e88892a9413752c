"""Write for KTransformers which experts are on the GPU; the CPU computes the others.

KTransformers keeps ``--kt-num-gpu-experts`` times the layers with experts on the GPU: with
``--kt-expert-placement-strategy frequency`` those with the highest counts of all layers in the
``.pt`` of ``--init-expert-location`` (``kt_ep_wrapper.py`` of sglang-kt 0.7.2 and
``generate_gpu_experts_masks`` of kt-kernel). That has ``logical_count`` [buffer, hidden layers, E],
dense layers too, and is summed over the buffer. So that exactly a chosen set is served, its experts
count 2 and the others 1; rows of dense layers are zero, as they take part in the choice. A text
beside it says that this is no recording.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import MissingArgumentError, whole_number
from moetuner.files import naming
from moetuner.formats import pickled
from moetuner.formats.hints import Hints
from moetuner.formats.sglang import CHOSEN, COUNTS
from moetuner.statistics import choose_hottest

SUFFIX = ".pt"


def choose_gpu_experts(
    load: NDArray[np.integer], gpu_experts: int, *, each_layer: bool
) -> NDArray[np.bool_]:
    """Return which experts have the highest loads [L,E], on average ``gpu_experts`` per layer.

    With ``each_layer``, every layer has that many.
    """
    layers, experts = load.shape
    whole_number("gpu_experts", gpu_experts, highest=experts)
    number = gpu_experts if each_layer else gpu_experts * layers
    return choose_hottest(load, number, each_layer=each_layer)


def write_chosen(chosen: NDArray[np.bool_], path: Path, hints: Hints) -> None:
    """Write which experts [L,E] of the layers with experts are chosen."""
    layers, experts = chosen.shape
    if path.suffix != SUFFIX:
        with naming(path):
            raise ValueError(f"path must end in {SUFFIX} for KTransformers, got {path.suffix!r}")
    if hints.dense_layers is None and hints.hidden_layers != layers:
        raise MissingArgumentError(
            "dense_layers is needed: KTransformers' file has a row for every hidden layer, and "
            f"INPUT has {layers} layers with experts; where there are no others, dense_layers none",
            "dense_layers",
        )
    moe = hints.moe_numbers(layers)
    hidden = hints.hidden_layers or layers + len(hints.dense_layers or ())
    counts = np.zeros((1, hidden, experts), dtype=np.int64)
    counts[0, moe] = 1 + chosen
    pickled.save(path, COUNTS, counts, **{CHOSEN: "2 for experts on the GPU, 1 for others"})
