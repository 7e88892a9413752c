"""Read the routed experts that vLLM records.

Routed experts (``--enable-return-routed-experts``) are arrays [tokens, hidden layers, top-k] of
logical ids, with rows of zeros for layers without experts; the order of a token's experts says
nothing. Over HTTP they are ``.npy`` in base64, in every choice of a response. No release loads a
map of experts by itself: moetuner's plugin does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from moetuner.files import naming, npz
from moetuner.files.opened import Opened
from moetuner.formats.arrays import list_names, read_arrays
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.pickled import is_pickled
from moetuner.formats.records import looks_like_json, records
from moetuner.formats.responses import Routed, decode, join_arrays, read_routed
from moetuner.formats.sources import first_file

ON = "start vLLM with --enable-return-routed-experts"
# Names of arrays in an archive of sequences: np.savez gives the first ones.
SEQUENCE = re.compile(r"arr_\d+|\d+|.*routed_experts.*")


def recognises(file: Opened) -> bool:
    """Return whether a file holds routed experts: responses, or arrays other than moetuner's."""
    file = first_file(file)
    start = file.head
    if looks_like_json(start):
        # Answers without experts are recognised, too: the error of reading them names the option.
        is_answer = b'"routed_experts"' in start or b'"finish_reason"' in start
        is_openai = is_answer and b'"choices"' in start
        return is_openai and b'"sglext"' not in start and b'"meta_info"' not in start
    if start.startswith(npz.MAGIC):
        return _has_dense_rows(file)
    names = list_names(file) if start.startswith(b"PK\x03\x04") and not is_pickled(file) else []
    if not names or not all(map(SEQUENCE.fullmatch, names)):
        return False
    (first,) = read_arrays(file, names[:1]).values()
    return first.ndim == 3 and first.dtype.kind in "iu"


def _has_dense_rows(file: Opened) -> bool:
    """Return whether a row of zeros shows that an array has layers without experts, too."""
    try:
        ids = _check_ids(npz.read_npy(file.path, 1))
    except ValueError:
        return False  # the reader of moetuner's own says what is wrong
    return ids.size > 0 and ids.shape[2] > 1 and not ids[0].any(axis=1).all()


def read(files: Sequence[Opened], hints: Hints) -> Traffic:
    """Read routed experts: every response or array is a sequence."""
    return join_arrays(files, read_routed(files, _arrays, ON), hints)


def _arrays(file: Opened) -> Iterator[Routed]:
    path = file.path
    names = [] if looks_like_json(file.head[:64]) else list_names(file)
    if names:
        arrays = read_arrays(file, names)
        for name in sorted(names, key=lambda name: (len(name), name)):
            yield Routed(path, _check_ids(arrays[name], name))
        return
    for where, fields in records(path):
        choices = fields.get("choices")
        if not isinstance(choices, list):
            raise ValueError(f"{where}: must be a response with 'choices'")
        for number, choice in enumerate(choices):
            text = choice.get("routed_experts") if isinstance(choice, dict) else None
            if text is not None:
                data = decode(text, f"{where}, choice {number}")
                with naming(f"{where}, choice {number}: routed_experts must be an array as .npy"):
                    array = _check_ids(npz.array_in_npy(data))
                request, model = (str(fields.get(key, "")) for key in ("id", "model"))
                yield Routed(path, array, request, model)


def _check_ids(array: NDArray[Any], name: str = "") -> NDArray[Any]:
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers [tokens, layers, top_k], got {array.dtype} "
            f"{list(array.shape)}".lstrip()
        )
    return array
