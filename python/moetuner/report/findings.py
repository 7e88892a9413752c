"""Findings: what is said of results, before it is text.

A finding has a kind and numbers. ``report.words`` has the sentence of every kind, and a voice says
in whose words it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from moetuner.frozen import Frozen

# A headline stands alone with the answer, a reason says why, a warning what to know before relying
# on it, and a cost what a change takes.
Role = Literal["headline", "reason", "warning", "cost"]


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Frozen):
    """Something that was found out about results.

    Parameters
    ----------
    kind
        What was found; ``report.words`` has a sentence for it.
    numbers
        What the sentence is about: numbers, names, and values such as a ``Comparison``.
    role
        Where it is said.
    forces
        The answer that it decides; None where it decides nothing.
    about
        The method that it is about, where several are shown; its name is written in front.
    """

    kind: str
    numbers: dict[str, Any] = field(default_factory=dict)
    role: Role = "reason"
    forces: str | None = None
    about: str = ""


class Voice(NamedTuple):
    """How sentences name what a reader can do, and where they stand.

    Parameters
    ----------
    recording
        What the traffic is called.
    any_order
        What says that the order of a recording does not matter.
    name_groups, name_model
        What names the groups of a recording, and what to do to name its model.
    expert_size
        What gives the size of an expert.
    audit
        The command that shows which groups are served worse; None for the call of Python.
    is_page
        Whether a headline stands above tiles, which have its times and intervals.
    """

    recording: str
    any_order: str
    name_groups: str
    name_model: str
    expert_size: str
    audit: str | None = None
    is_page: bool = False


TERMINAL = Voice(
    "INPUT",
    "--any-order",
    "--group-by FILE",
    "pass --model",
    "--model or --cost-model h100:HIDDENxINTERMEDIATE",
)
PYTHON = Voice(
    "traffic",
    "in_order=False",
    "group and group_names",
    "name one by dataclasses.replace(traffic, model=...)",
    "expert_bytes",
)
