"""Options for the running placement, and tables of the moves from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from moetuner._texts import suggestion
from moetuner.cli.options import RUNNING, expert_bytes_option, option
from moetuner.cli.options.kinds import FileText, Number
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.evaluation.replay import check_model
from moetuner.files import naming
from moetuner.files.cells import counted, in_bytes, percent
from moetuner.files.opened import Opened, opened
from moetuner.formats import find_form, read_placement
from moetuner.placement import Placement, PlacementDiff, blocks
from moetuner.problem import Problem
from moetuner.report.outcome import find_moves
from moetuner.serving.running import STARTS, Running
from moetuner.solver import Method, Result, Trade, pareto, solve
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

# Most devices for which moves per pair are a table; JSON always has them.
MOST_DEVICES = 16

start_option = partial(option, FileText(words=STARTS), "PLACEMENT|contiguous|round_robin|eplb[:N]")


def is_start(initial: str, flag: str = "--initial") -> bool:
    """Return whether a text names a start placement; raise if it names no file either."""
    if Running.is_name(initial):
        return True
    if not Path(initial).is_file():
        raise click.BadParameter(
            f"must be a file, contiguous, round_robin, eplb or eplb:N, got '{initial:.60}'"
            + suggestion(initial, STARTS),
            param_hint=f"'{flag}'",
        )
    return False


def start_placement(
    name: str, statistics: RoutingStatistics, topology: Topology, *, seed: int, threads: int | None
) -> Placement:
    """Return the start placement of a name; EPLB's is computed from the statistics."""
    sizes = statistics.layers, statistics.num_experts, topology.devices
    if name == "contiguous":
        return blocks(*sizes)
    running = Running.parse(name)
    problem = Problem(statistics, topology, slots_per_device=running.count_slots(*sizes[1:]))
    return solve(problem, cast(Method, running.method), seed=seed, threads=threads).placement


def load_placement(
    path: Path | Opened,
    source: Source,
    topology: Topology | None = None,
    *,
    devices: int | None = None,
) -> Placement:
    """Read a placement, or a map of an engine; raise unless it fits INPUT's model and the machine.

    Without a topology, ``devices`` is the number of devices of a map that does not say it.
    """
    traffic, file = source.traffic, opened(path)
    _, dense = traffic.left_out or (None, None)
    placement = read_placement(
        file,
        devices=devices if topology is None else topology.devices,
        num_experts=traffic.num_experts,
        dense_layers=dense if source.dense_layers is None else source.dense_layers,
    )
    with naming(file.path):
        surplus = placement.layers - traffic.layers
        if surplus > 0 and find_form(file) != "json":
            raise ValueError(
                f"placement must have {traffic.layers} layers like INPUT, got "
                f"{placement.layers}: if {surplus} of them are not in INPUT, as they have no "
                f"experts or predict further tokens, --dense-layers names them"
            )
        check_model(placement, traffic, topology or Topology(placement.devices))
    return placement


@dataclass(frozen=True)
class MoveOptions:
    """The placement that a solve starts from, and limits and costs of moves.

    Parameters
    ----------
    initial_file
        The running placement, to be improved by few moves; eplb:32 is EPLB's with 32 redundant
        experts over all devices.
    move_budget
        Bytes that may move between devices; experts, if the bytes of one are not known.
    move_cost
        Cost of moving a byte, in units of the objective.
    expert_bytes
        Bytes of one expert of one layer. [default: of INPUT's model, if known]
    pareto
        Also show what fewer or more moves would gain.
    """

    initial_file: str | None = start_option(group=RUNNING)
    move_budget: float | None = option(Number(min=0, infinite=True), "BYTES", group=RUNNING)
    move_cost: float = option(Number(min=0), "COST", 0.0, group=RUNNING)
    expert_bytes: float | None = expert_bytes_option()
    pareto: bool = option(group=RUNNING, is_flag=True, default=False)

    def __post_init__(self) -> None:
        typed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if self.initial_file is None and typed:
            flag = "--" + typed[0].replace("_", "-")
            raise click.UsageError(f"'{flag}' needs '--initial', the placement to move from.")

    def running(self, source: Source, devices: int | None) -> Placement | None:
        """Return the placement in the file that --initial names; None if it names no file."""
        if self.initial_file is None or is_start(self.initial_file):
            return None
        return load_placement(Path(self.initial_file), source, devices=devices)

    def initial(
        self, source: Source, problem: Problem, running: Placement | None, seed: int
    ) -> Placement | None:
        """Return the running placement: that of the file, or a start; raise unless it fits."""
        initial, topology = self.initial_file, problem.topology
        if initial is None:
            return None
        if running is not None:
            with naming(Path(initial)):
                check_model(running, source.traffic, topology)
        else:
            running = start_placement(
                initial, problem.statistics, topology, seed=seed, threads=source.threads
            )
        problem.check_running(running)  # before anything is said
        return running

    @property
    def unit_bytes(self) -> float:
        """Bytes of an expert; 1 if unknown, so that the move budget is in experts."""
        return 1.0 if self.expert_bytes is None else self.expert_bytes

    def arguments(self, initial: Placement | None) -> dict[str, Any]:
        """Return arguments of ``solve``."""
        if initial is None:
            return {}
        moves = {"move_budget": self.move_budget, "move_cost": self.move_cost}
        return {"initial": initial, "expert_bytes": self.unit_bytes, **moves}

    def explain(self) -> list[str]:
        """Write a line on the move budget, in bytes and in experts."""
        budget, size = self.move_budget, self.expert_bytes
        if budget is None or math.isinf(budget):
            return []
        if size is None:
            experts = counted(math.floor(budget), "expert")
            return [f"Move budget: {experts}, as the bytes of one are not known (--expert-bytes)."]
        number, expert_size = math.floor(budget / size), in_bytes(size)
        experts = f"{counted(number, 'expert')} of {expert_size}"
        if not number:
            experts = f"less than one expert ({expert_size}), so none may move"
        return [f"Move budget: {in_bytes(budget)}, {experts}."]

    def settings(self) -> dict[str, Any]:
        """Return the options for JSON."""
        initial = None if self.initial_file is None else str(self.initial_file)
        names = ("move_budget", "move_cost", "expert_bytes")
        return {"initial": initial, **{name: getattr(self, name) for name in names}}

    def show(
        self,
        output: Output,
        problem: Problem,
        initial: Placement | None,
        result: Result,
        **arguments: Any,
    ) -> tuple[dict[str, Any], tuple[Trade, ...]]:
        """Print the moves to a result, and trades with --pareto; return their JSON, and trades."""
        if initial is None:
            return {}, ()
        size = self.expert_bytes
        diff = initial.diff(result.placement, topology=problem.topology, expert_bytes=size)
        show_moves(output, diff, problem.topology)
        contents: dict[str, Any] = {"moves": diff.to_dict()}
        if not self.pareto or result.status == "interrupted":
            return contents, ()
        with working("searching for fewer moves"):
            trades = pareto(problem, initial, expert_bytes=self.unit_bytes, **arguments)
        before, objective = trades[0].objective, problem.objective_function
        columns = {
            "experts moved": [str(trade.experts_moved) for trade in trades],
            "bytes": [
                "-" if size is None else in_bytes(trade.experts_moved * size) for trade in trades
            ],
            "objective": [objective.text(trade.objective) for trade in trades],
            "gain, seen": [percent(trade.gain / before if before else 0.0) for trade in trades],
        }
        if objective.is_predicted_time:
            # Times by counts differ from replayed ones, so the table has gains only.
            del columns["objective"]
        output.say("Gains of more and fewer moves, on the traffic that they were computed from:")
        output.table([*columns], zip(*columns.values(), strict=True))
        no_bytes = {"bytes_moved": None} if size is None else {}
        return contents | {"pareto": [trade.to_dict() | no_bytes for trade in trades]}, (*trades,)


def show_moves(output: Output, diff: PlacementDiff, topology: Topology) -> None:
    """Print how many experts move, and from each device to each other one."""
    output.tell(find_moves(diff, topology))
    devices = len(diff.pairs)
    if diff.experts_moved and devices <= MOST_DEVICES:
        rows = [
            (f"device {source}", *(str(count or "-") for count in row))
            for source, row in enumerate(diff.pairs.tolist())
        ]
        output.table(("from \\ to", *map(str, range(devices))), rows)
