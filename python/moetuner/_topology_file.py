"""Topology files: JSON or TOML, told apart by content."""

from __future__ import annotations

import json
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(content: bytes) -> dict[str, Any]:
    """Tell JSON and TOML apart by the first character: no TOML file begins with a brace."""
    try:
        text = content.decode()
        found = json.loads(text) if text.lstrip()[:1] == "{" else tomllib.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"must be a JSON object or TOML: {error}") from None
    assert isinstance(found, dict)
    return found
