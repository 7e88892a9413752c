"""Numbers as they stand in tables and sentences, and as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def number(value: float | None, decimals: int) -> str:
    """Write a number, or a dash for what is not known."""
    return "-" if value is None else f"{value:,.{decimals}f}"


def distinct(value: float, other: float, decimals: int) -> tuple[str, str]:
    """Write two numbers with so many decimals, or as many more as tell them apart."""
    while decimals < 12 and value != other:
        texts = number(value, decimals), number(other, decimals)
        if texts[0] != texts[1]:
            return texts
        decimals += 1
    return number(value, decimals), number(other, decimals)


def digits(value: float | None) -> str:
    """Write a number with three significant digits, and never as a power of ten."""
    if value is None or not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.3g}") + 0.0
    places = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(places, 0)}f}"


def unit_of_time(us: float) -> tuple[str, float]:
    """Return the unit in which a time is short, and its microseconds."""
    for unit, size in (("us", 1.0), ("ms", 1e3)):
        if us < 1e3 * size:
            return unit, size
    return "s", 1e6


def duration(us: float) -> str:
    """Write a time that is known in microseconds."""
    unit, size = unit_of_time(us)
    return f"{digits(us / size)} {unit}"


def percent(value: float | None) -> str:
    """Write a share; no minus before nothing."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f} %"


def signed(value: float | None) -> str:
    """Write a share with its sign."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f} %"


def span(low: float | None, high: float | None, *, with_signs: bool = True) -> str:
    """Write an interval of shares; a dash where an end is not known."""
    if low is None or high is None:
        return "-"
    write = signed if with_signs else percent
    return f"{write(low).removesuffix(' %')} to {write(high)}"


def counted(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_bytes(count: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        # A number that rounds to 1,000 in three digits is 1 of the next unit.
        if float(f"{count:.3g}") < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{float(f'{count:.3g}'):,g} TB"


def capitalised(clause: str) -> str:
    """Write a clause with a large letter first; a name such as vLLM keeps its small one."""
    return clause if clause[1:2].isupper() else clause[:1].upper() + clause[1:]


def sentence(clause: str) -> str:
    """Write a clause as a sentence."""
    end = "" if clause.endswith(":") else "."
    return f"{capitalised(clause).rstrip('.')}{end}"


def and_more(count: int) -> str:
    """Write how many cases there are besides the one that was named."""
    return f", and {count - 1} more" if count > 1 else ""


def listed(names: list[str], limit: int) -> str:
    """Write the first of several names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{rest}"


def with_values(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, unlike: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns in which every row has a dash or nothing.

    With ``unlike`` columns in which several rows are all alike are left out too.
    """
    columns = [0]
    for column in range(1, len(head)):
        texts = {row[column] for row in rows}
        if texts - {"-", ""} and not (unlike and len(rows) > 1 and len(texts) == 1):
            columns.append(column)
    return [head[column] for column in columns], [
        [row[column] for column in columns] for row in rows
    ]


def finite(value: Any) -> Any:
    """Return contents as JSON takes them: null for infinite numbers and NaN, text for keys."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def layer_list(layers: Sequence[int]) -> str:
    """Write numbers of layers as ``--dense-layers`` takes them."""
    return ",".join(map(str, layers)) or "none"
