"""Findings: statements on results, as values before they are text.

A finding has a kind and numbers. ``report.words`` has the sentence of every kind, and a voice has
the names that a reader knows: of options, of arguments, or of parts of a page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from moetuner.frozen import Frozen

# A headline stands alone with the answer, a reason explains it, a warning limits how far one may
# rely on it, and a cost says what a change takes.
Role = Literal["headline", "reason", "warning", "cost"]


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Frozen):
    """A statement on results: its kind, and the numbers of its sentence.

    Parameters
    ----------
    kind
        Key of the sentence in ``report.words``.
    numbers
        Values that the sentence is filled with: numbers, names, and objects such as a
        ``Comparison``.
    role
        Place of the sentence: headline, reason, warning or cost.
    forces
        The answer that the finding decides; None where it decides nothing.
    about
        Method that the finding is about, where several are shown; the sentence begins with it.
    """

    kind: str
    numbers: dict[str, Any] = field(default_factory=dict)
    role: Role = "reason"
    forces: str | None = None
    about: str = ""


class Voice(NamedTuple):
    """Names that sentences use for inputs and options, by who reads them.

    Parameters
    ----------
    recording
        Name of the traffic.
    any_order
        Option or argument that says that the order of a recording does not matter.
    name_groups, name_model
        Option or argument that names the groups of a recording, and how to name its model.
    expert_size
        Options or argument that give the size of an expert.
    engine
        Option or argument that names the engine.
    audit
        The command that shows which groups are served worse; None for the call of Python.
    is_page
        True if the headline stands above tiles, which show its times and intervals.
    """

    recording: str
    any_order: str
    name_groups: str
    name_model: str
    expert_size: str
    engine: str
    audit: str | None = None
    is_page: bool = False


TERMINAL = Voice(
    "INPUT",
    "--any-order",
    "--group-by FILE",
    "pass --model",
    "--model or --cost-model h100:HIDDENxINTERMEDIATE",
    "--for",
)
PYTHON = Voice(
    "traffic",
    "in_order=False",
    "group and group_names",
    "name one by dataclasses.replace(traffic, model=...)",
    "expert_bytes",
    "engine",
)
