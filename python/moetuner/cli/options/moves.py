"""Options for a placement that runs already, and what is said of the moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.output import Output, working
from moetuner.placement import Placement, PlacementDiff
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.cells import in_bytes, percent
from moetuner.solver import Trade, pareto
from moetuner.topology import Topology

# Devices up to which moves per pair are a table; with more, JSON has them.
MOST_DEVICES = 16
PARETO = ("experts moved", "bytes", "objective", "gain")


@dataclass(frozen=True)
class Moving:
    """Where a solve starts from, and what moving may cost."""

    initial_file: Path | None = None
    move_budget: float | None = None
    move_cost: float = 0.0
    expert_bytes: float | None = None
    wants_pareto: bool = False

    def __post_init__(self) -> None:
        if self.initial_file is None:
            given = {
                "--move-budget": self.move_budget is not None,
                "--move-cost": self.move_cost > 0,
                "--expert-bytes": self.expert_bytes is not None,
                "--pareto": self.wants_pareto,
            }
            for name, is_given in given.items():
                if is_given:
                    raise click.UsageError(
                        f"'{name}' needs '--initial', the placement to move from."
                    )

    @property
    def each(self) -> float:
        """Bytes of an expert; 1 where they are not known, so that bytes are experts."""
        return 1.0 if self.expert_bytes is None else self.expert_bytes

    def initial(self) -> Placement | None:
        """Read the placement that runs."""
        return None if self.initial_file is None else Placement.load(self.initial_file)

    def arguments(self, initial: Placement | None) -> dict[str, Any]:
        """Return arguments of ``solve``."""
        if initial is None:
            return {}
        return {
            "initial": initial,
            "move_budget": self.move_budget,
            "move_cost": self.move_cost,
            "expert_bytes": self.each,
        }

    def settings(self) -> dict[str, Any]:
        """Return what was asked for, for JSON."""
        return {
            "initial": None if self.initial_file is None else str(self.initial_file),
            "move_budget": self.move_budget,
            "move_cost": self.move_cost,
            "expert_bytes": self.expert_bytes,
        }

    def bytes(self, experts: float) -> str:
        """Write the bytes of so many experts, if those of one are known."""
        return "-" if self.expert_bytes is None else in_bytes(experts * self.each)


def sentences(diff: PlacementDiff, topology: Topology, moving: Moving) -> list[str]:
    """Write how many experts move, and how far."""
    text = f"Moves {diff.experts_moved} expert{'' if diff.experts_moved == 1 else 's'}"
    if moving.expert_bytes is not None:
        text += f", {moving.bytes(diff.experts_moved)}"
    if topology.nodes > 1:
        node = topology.node_of_device
        between = int(diff.pairs[node[:, None] != node[None, :]].sum())
        text += f": {diff.experts_moved - between} inside nodes, {between} between nodes"
    return [text + "."]


def show_pairs(output: Output, diff: PlacementDiff) -> None:
    """Print how many experts go from a device to a device."""
    devices = len(diff.pairs)
    if not diff.experts_moved or devices > MOST_DEVICES:
        return
    rows = [
        (f"device {source}", *(str(n) if n else "-" for n in row))
        for source, row in enumerate(diff.pairs.tolist())
    ]
    output.table(("from \\ to", *map(str, range(devices))), rows)


def show_pareto(
    output: Output,
    problem: Problem,
    initial: Placement,
    moving: Moving,
    **how: Any,
) -> list[Trade]:
    """Solve at several prices of a move, and print and return what is not dominated."""
    with working("weighing moves"):
        trades = pareto(problem, initial, expert_bytes=moving.each, **how)
    before, worth = trades[0].objective, Objective(problem)
    # Times by counts would stand beside the replayed one; gains say what moves bring.
    is_time = worth.is_predicted_time
    output.table(
        [name for name in PARETO if not (is_time and name == "objective")],
        [
            (
                str(trade.experts_moved),
                moving.bytes(trade.experts_moved),
                *(() if is_time else (worth.text(trade.objective),)),
                percent(trade.gain / before if before else 0.0),
            )
            for trade in trades
        ],
    )
    return trades


def told(trades: list[Trade], moving: Moving) -> list[dict[str, Any]]:
    """Return trades for JSON; without the size of an expert there are no bytes to tell."""
    known = moving.expert_bytes is not None
    return [trade.to_dict() | ({} if known else {"bytes_moved": None}) for trade in trades]


moving_options = options.gathered(
    "moving",
    Moving,
    [
        click.option(
            "--initial",
            "initial_file",
            type=options.IN_FILE,
            metavar="PLACEMENT",
            help="The placement that runs, to be improved by few moves.",
        ),
        click.option(
            "--move-budget",
            type=options.Number(min=0, infinite=True),
            metavar="BYTES",
            help="Bytes that may move between devices; experts without --expert-bytes.",
        ),
        click.option(
            "--move-cost",
            type=options.Number(min=0),
            default=0.0,
            metavar="COST",
            help="What a moved byte costs, in units of the objective.",
        ),
        options.expert_bytes_option,
        click.option(
            "--pareto",
            "wants_pareto",
            is_flag=True,
            help="Also show what fewer or more moves would gain.",
        ),
    ],
)
