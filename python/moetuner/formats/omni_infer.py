"""omni-infer's placement patterns: whether a device holds an expert, 0 or 1 [D,L,E], as ``.npy``.

``omni_placement`` names them ``pattern_path``; layers are those with experts. The file is a bare
array of three dimensions, as recorded expert ids [T,L,K] are, so its content decides: more
than two entries of 0 and 1 in a row are no expert ids, which differ from one another.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from moetuner._checks import shown
from moetuner.files import naming, npz, replacing
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout
from moetuner.formats.records import head
from moetuner.placement import EMPTY, Placement

# Bytes of a pattern at most: 320 devices, 94 layers and 512 experts in 64 bits have half as many.
LARGEST = 1 << 28


def write_map(placement: Placement, path: Path, _: Hints) -> None:
    """Write the pattern; a device holds an expert once, whatever its slots are."""
    content = io.BytesIO()  # numpy does not say that a disk is full where it writes a file itself
    np.save(content, placement.held.transpose(1, 0, 2).astype(np.int64))
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def recognises_map(path: Path) -> bool:
    """Whether a file is a pattern."""
    if head(path, 6) != npz.MAGIC:
        return False
    with naming(path), path.open("rb") as file:
        place, fortran = npz.read_npy_header(file)
        shape, size = place.shape, place.nbytes
        if fortran or len(shape) != 3 or place.dtype.kind not in "iub" or not 0 < size <= LARGEST:
            return False
        # The first entries show a recording, so that nothing more of it is read.
        first = np.frombuffer(file.read(shape[2] * place.dtype.itemsize), place.dtype)
        if shape[2] < 3 or first.size < shape[2] or not ((first == 0) | (first == 1)).all():
            return False
        pattern = npz.read_npy(path)
    return bool(((pattern == 0) | (pattern == 1)).all() and pattern.any(axis=0).all())


def read_map(path: Path, _: Hints) -> Layout:
    """Read a pattern: experts in rising order, -1 in slots that a device has less than others."""
    pattern = npz.read_npy(path)
    if pattern.ndim != 3 or 0 in pattern.shape:
        raise ValueError(f"must be a pattern [devices, layers, experts], got {shown(pattern)}")
    has = pattern.astype(bool).transpose(1, 0, 2)
    layers, devices, experts = has.shape
    width = int(has.sum(axis=2).max())
    # Stable: experts that a device has come first, in rising order.
    slots = np.argsort(~has, axis=2, kind="stable")[:, :, :width]
    slots[np.arange(width) >= has.sum(axis=2, keepdims=True)] = EMPTY
    return Layout.of(slots.reshape(layers, -1), devices=devices, num_experts=experts)
