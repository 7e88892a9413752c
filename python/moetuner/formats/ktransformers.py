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

import struct
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import MissingArgumentError, whole_number
from moetuner.files import naming, replacing
from moetuner.formats import pickled
from moetuner.formats.hints import Hints
from moetuner.formats.sglang import CHOSEN, COUNTS
from moetuner.statistics import choose_hottest

SUFFIX, MEANING = ".pt", "2 for experts on the GPU, 1 for others"


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
    _save(path, counts)


def _save(path: Path, counts: NDArray[np.int64]) -> None:
    """Write a dict of counts [1,H,E], and of a text on them, as ``torch.save`` does."""
    storage = b"(" + _pickled("storage") + b"ctorch\nLongStorage\n" + _pickled("0", "cpu")
    storage += _pickled(counts.size) + b"tQ"
    sizes = b"(" + _pickled(*counts.shape) + b"t(" + _pickled(counts.size, counts.shape[2], 1)
    # The dict, its key, the tensor's maker with its arguments, and the text.
    text = b"\x80\x02}" + _pickled(COUNTS) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    text += _pickled(0) + sizes + b"t\x89ccollections\nOrderedDict\n)RtRs"
    text += _pickled(CHOSEN, MEANING) + b"s."
    content = {pickled.DESCRIPTION: text, "byteorder": b"little"}
    content |= {"data/0": counts.astype("<i8").tobytes(), "version": b"3\n"}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for entry, data in content.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{entry}"), data)


def _pickled(*values: str | int) -> bytes:
    """Return texts and integers as instructions of a description."""
    return b"".join(
        b"X" + struct.pack("<I", len(value)) + value.encode("ascii")
        if isinstance(value, str)
        else b"\x8a\x08" + struct.pack("<q", value)
        for value in values
    )
