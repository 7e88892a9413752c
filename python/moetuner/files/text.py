"""Read JSON as its standard defines it."""

from __future__ import annotations

import json
from typing import Any

from moetuner._checks import shown


def parse_json(content: bytes | str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Read a JSON object as the standard defines it: every key once, and no NaN.

    Python writes NaN, so files of engines may have it in unused fields: ``allow_nan`` allows it.
    Repeated keys are refused, as readers would differ in the value that they take.
    """
    try:
        refuse = None if allow_nan else _refuse
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        fields = json.loads(text, object_pairs_hook=_refuse_repeated_keys, parse_constant=refuse)
    except RecursionError:
        raise ValueError("must be JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"must be JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {type(fields).__name__}")
    return fields


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"key {shown(twice)} must be there once")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


# Reads a value where others follow it, by the same rules.
DECODER = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse)
