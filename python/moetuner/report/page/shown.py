"""What a page shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from moetuner.evaluation import Evaluation
from moetuner.evaluation.auditing import Audit
from moetuner.placement import Placement, PlacementDiff
from moetuner.report.advice.values import Advice
from moetuner.solver import Trade
from moetuner.solver.result import Result
from moetuner.topology import Topology


@dataclass(frozen=True)
class Shown:
    """Results that a page is made of, and words around them.

    Parameters
    ----------
    title, subtitle
        What the page is about, and of what traffic and machine.
    sentence, reasons, warnings
        The verdict, which stands alone; what it rests on; what to know first.
    answer
        Which colour the verdict has: ``"good"``, ``"bad"`` or ``"unsure"``.
    numbers
        Three numbers of the first screen: name, value and a note.
    names
        Of the running and the proposed placement.
    placements, running, proposed
        Both, and what they do to the same traffic.
    topology
        The machine.
    traffic
        A sentence on what traffic the evaluations are of.
    load
        Tokens of every expert in that traffic [L,E]; None where not counted.
    token_bytes, expert_bytes
        Bytes of a row and of an expert; None where not known.
    result, audit, advice, trades, moves
        What else is known.
    timed
        Whether the search had a time limit, so that its answer depends on the clock anyway.
    commands
        What comes next.
    facts
        Where it comes from: name and value.
    contents
        The JSON that the page carries.
    """

    title: str
    subtitle: str
    sentence: str
    answer: str
    names: tuple[str, str]
    placements: tuple[Placement, Placement]
    running: Evaluation
    proposed: Evaluation
    topology: Topology
    traffic: str
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    numbers: tuple[tuple[str, str, str], ...] = ()
    load: NDArray[Any] | None = None
    token_bytes: float | None = None
    expert_bytes: float | None = None
    result: Result | None = None
    audit: Audit | None = None
    advice: Advice | None = None
    trades: tuple[Trade, ...] = ()
    moves: PlacementDiff | None = None
    timed: bool = False
    commands: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    contents: dict[str, Any] = field(default_factory=dict)
