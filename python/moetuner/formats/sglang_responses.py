"""Read the routed experts of SGLang's responses.

Responses (``--enable-return-routed-experts``) have logical ids as raw int32 in base64, [tokens,
hidden layers, top-k], on SGLang's own route or on OpenAI's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetuner._checks import MissingArgumentError
from moetuner.files import naming
from moetuner.files.opened import Opened
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.records import looks_like_json, records
from moetuner.formats.responses import Routed, decode, join_arrays, read_routed

ON = "start SGLang with --enable-return-routed-experts and ask for return_routed_experts"
INT32 = np.dtype("<i4")


def recognises(file: Opened) -> bool:
    """Return whether a file holds responses with routed experts."""
    start = file.head
    is_ours = b'"meta_info"' in start or b'"sglext"' in start
    return looks_like_json(start) and is_ours and b'"routed_experts"' in start


def read(files: Sequence[Opened], hints: Hints) -> Traffic:
    """Read routed experts of responses; each response is a sequence."""
    routed = read_routed(files, lambda file: _responses(file.path, hints), ON)
    return join_arrays(files, routed, hints)


def _responses(path: Path, hints: Hints) -> Iterator[Routed]:
    """Read the arrays of responses, of SGLang's own route or of OpenAI's."""
    for response, fields in records(path):
        usage = fields.get("usage")
        choices = fields.get("choices")
        places = [(fields.get("meta_info"), fields.get("meta_info")), (fields.get("sglext"), usage)]
        for choice in choices if isinstance(choices, list) else []:
            places.append((choice.get("sglext") if isinstance(choice, dict) else None, usage))
        for number, (place, sizes) in enumerate(places):
            text = place.get("routed_experts") if isinstance(place, dict) else None
            if text is not None:
                where = response if number < 2 else f"{response}, choice {number - 2}"
                data = decode(text, where)
                with naming(where):
                    shape = _shape(len(data), sizes if isinstance(sizes, dict) else {}, hints)
                meta = fields.get("meta_info")
                named = meta if isinstance(meta, dict) else fields
                ids = np.frombuffer(data, INT32).reshape(shape)
                yield Routed(path, ids, str(named.get("id", "")), str(fields.get("model", "")))


def _shape(size: int, usage: dict[str, Any], hints: Hints) -> tuple[int, int, int]:
    """Return tokens, hidden layers and top-k of ids with so many bytes."""
    count, rest = divmod(size, INT32.itemsize)
    if rest:
        raise ValueError(f"routed_experts must be 32-bit integers, got {size} bytes")
    if hints.top_k is None:
        raise MissingArgumentError("top_k is needed: responses hold bytes without a shape", "top_k")
    rows, rest = divmod(count, hints.top_k)
    layers = hints.hidden_layers
    if layers is None:
        prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(answer, int) or min(prompt, answer) < 0:
            raise MissingArgumentError(
                "hidden_layers is needed: the response does not say its tokens", "hidden_layers"
            )
        layers = rows // max(prompt + answer - 1, 1)
    if rest or not rows or not layers or rows % layers:
        raise MissingArgumentError(
            f"routed_experts must fill tokens x layers x top-k, got {count} numbers "
            f"for top-k {hints.top_k} and {layers} layers; with a start in the request, "
            "hidden_layers must be given",
            "hidden_layers",
        )
    return rows // layers, layers, hints.top_k
