"""``moetuner plan``: plan the moves of copies when devices are lost, removed or added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from moetuner._checks import DEVICE_LIMIT
from moetuner.cli import options
from moetuner.cli.options import argument, kinds, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import load_placement
from moetuner.cli.options.placed import read_made
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, show_shares, working, write_json
from moetuner.cli.recipes import list_recipes_to_serve
from moetuner.cli.work import count
from moetuner.cost import bytes_of_expert
from moetuner.evaluation.arrival import list_orders
from moetuner.evaluation.losses import DOMAINS, Domain
from moetuner.formats.hints import Traffic
from moetuner.placement import Placement
from moetuner.problem.made import Made
from moetuner.report.findings import TERMINAL, Finding
from moetuner.report.words import write
from moetuner.report.words.traffic import write_change
from moetuner.solver import Plan, plan, plan_losses
from moetuner.statistics import RoutingStatistics, count_loads
from moetuner.topology import Topology

# Most losses in a table: the worst ones.
SHOWN = 5


@dataclass(frozen=True)
class Change:
    """The change of the devices: some are lost, removed or added.

    Parameters
    ----------
    without
        Devices that are lost, such as 3,17: nothing can be read from them any more.
    retire
        Devices to remove, such as 28-31: copies are read from them before.
    fewer
        Number of devices to remove; those whose removal moves the fewest copies are chosen.
    join
        Number of devices to add.
    slots_per_device
        Slots of a device in a layer from now on, where those that are left have too few for all
        experts. [default: as many as now]
    every_loss
        Plan the loss of every device, or node, instead, and write all plans to --table.
    """

    without: tuple[int, ...] = option(kinds.DEVICE_LIST, "LIST", (), group=options.BEGIN)
    retire: tuple[int, ...] = option(kinds.DEVICE_LIST, "LIST", (), group=options.BEGIN)
    fewer: int = option(click.IntRange(0, DEVICE_LIMIT), "N", 0, group=options.BEGIN)
    join: int = option(click.IntRange(0, DEVICE_LIMIT), "N", 0, group=options.BEGIN, flag="--with")
    slots_per_device: int | None = option(click.IntRange(1), "N", group=options.BEGIN)
    every_loss: Domain | None = option(
        click.Choice(DOMAINS), group=options.BEGIN, flag="--every-loss"
    )

    def check(self, table_file: Path | None) -> None:
        """Raise if options are missing, or exclude each other."""
        changes = bool(self.without or self.retire or self.fewer or self.join)
        if self.every_loss is None and not changes:
            raise click.UsageError(
                "Missing option '--without' (or '--retire', '--fewer', '--with', '--every-loss')."
            )
        if self.every_loss is not None and (changes or self.slots_per_device is not None):
            raise click.UsageError(
                "'--every-loss' plans each loss by itself: leave out '--without', '--retire', "
                "'--fewer', '--with' and '--slots-per-device'."
            )
        if (self.every_loss is None) != (table_file is None):
            raise click.UsageError("Give '--every-loss' and '--table' together.")

    @property
    def arguments(self) -> dict[str, Any]:
        """The change, as arguments of ``plan`` and of ``write_change``."""
        names = ("without", "retire", "fewer", "join", "slots_per_device")
        return {name: getattr(self, name) for name in names}


@options.command(
    "plan",
    example="placement.json trace.safetensors --with 2 --out more.json --steps steps.json",
    begin_with="--without --retire --fewer --with --every-loss --slots-per-device --out --steps "
    "--table",
)
def command(
    *,
    running_file: Path = argument("RUNNING", kinds.IN_FILE),
    source: Source,
    machine: Machine,
    change: Change,
    more_copies: int | None = option(click.IntRange(0), "N", group=options.RUNNING),
    expert_bytes: float | None = options.expert_bytes_option(),
    out_file: Path = option(kinds.OutFile(), "FILE", Path("plan.json")),
    steps_file: Path | None = option(kinds.OutFile(), "FILE"),
    table_file: Path | None = option(kinds.OutFile(), "FILE"),
    output: Output,
) -> None:
    """Plan which copies move when devices are lost, removed or added.

    RUNNING is the placement that serves: moetuner's own, or a map in any format of "moetuner
    export". Copies go where they balance the loads of INPUT best. The file of --out has
    a placement on the devices that serve, numbered anew, for "moetuner export". The file of --steps
    has the map by the numbers that devices have now, and the steps, in an order in which no served
    expert loses its last copy.

    Parameters
    ----------
    more_copies
        Most copies to move beyond those that must move. [default: none; with --with as many as gain
        something]
    expert_bytes
        Bytes of one expert of one layer. [default: of the model's experts, if known]
    out_file
        Write the placement to this file, as JSON.
    steps_file
        Write the map and the steps to this file, as JSON.
    table_file
        Write the plans of --every-loss to this file, as JSON.
    """
    change.check(table_file)
    running = load_placement(running_file, source, devices=machine.given)
    made = read_made(running_file, running)
    topology = machine.topology(running.devices, made.machine)
    expert_bytes = expert_bytes or _find_expert_bytes(source, running, made)
    contents: dict[str, Any] = {"input": source.facts, "running": str(running_file)}
    contents |= {"expert_bytes": expert_bytes, "topology": topology.to_dict()}
    traffic = _count_loads(source, made)
    if table_file is not None:
        window = source.replay_window
        contents |= _plan_losses(output, running, traffic, window, topology, change, table_file)
        output.finish(contents)
        return
    with working("planning"):
        planned = plan(
            running,
            traffic,
            **change.arguments,
            more_copies=more_copies,
            topology=topology,
            window=source.replay_window,
        )
    not_serving = sorted({*range(running.devices)} - {*planned.devices.tolist()})
    left = topology.without(not_serving, change.join)
    summary = {"running": running_file.name, "change": write_change(**change.arguments)}
    settings = replace(made.on(left), plan=summary).to_settings()
    placement = planned.placement.with_names(
        model=running.model, topology=topology.name, settings=settings
    ).with_load(traffic.total_load)
    placement.save(out_file)
    if topology.has_nested_nodes and (not_serving or change.join):
        output.tell(Finding("slow links"))
    _show(output, planned, running, change, expert_bytes, source.replay_window)
    output.say(f"wrote {out_file}")
    contents |= {"out": str(out_file), "without": list(change.without)} | planned.to_dict()
    if steps_file is not None:
        write_json(steps_file, {"running": running_file.name} | planned.to_dict())
        output.say(f"wrote {steps_file}")
    following = list_recipes_to_serve(source, placement, out_file, made.serving, nodes=left.nodes)
    output.say("")
    output.next_commands(following)
    contents["commands"] = [*map(str, following)]
    output.finish(contents)


def _find_expert_bytes(source: Source, running: Placement, made: Made) -> float | None:
    """Return the bytes of one expert of the placement; None where its size is not known."""
    size = made.expert_size or source.traffic.expert_size
    # INPUT may be counts alone: what is moved is the placement's.
    bits = source.weight_bits or made.input.weight_bits
    return bytes_of_expert(size, source.traffic.model or running.model, bits)


def _count_loads(source: Source, made: Made) -> RoutingStatistics:
    """Count the loads of INPUT in the order in which the placement serves it most of the time."""
    traffic, arrival = source.traffic, made.serving.get("arrival", "bursts")
    _, order = max(list_orders(traffic, arrival), key=lambda weighted: weighted[0])
    if order is not None:
        traffic = traffic.take(order)
    # Windows of all tokens, whatever their groups, as they are evaluated.
    return count(traffic, count_loads, window=source.replay_window, by_group=False)


def _show(
    output: Output,
    planned: Plan,
    running: Placement,
    change: Change,
    expert_bytes: float | None,
    window: int | None,
) -> None:
    """Print the moves, and the load of the busiest device before and after."""
    machine = _machine(running)
    served = {"machine": machine, "change": change.arguments, "serving": len(planned.devices)}
    output.tell(Finding("devices that serve", served))
    if change.fewer:
        known = {*planned.devices.tolist(), *change.without, *change.retire}
        output.tell(
            Finding("devices that leave", {"devices": sorted({*range(running.devices)} - known)})
        )
    copies = len(planned.steps)
    moved = {
        "experts": copies,
        "moved_bytes": None if expert_bytes is None else copies * expert_bytes,
        "from_disk": int(planned.lost.sum()),
    }
    busiest = {"before": planned.imbalance_before, "after": planned.imbalance_after}
    output.tell(Finding("experts that move", moved, "cost"))
    # In small letters: scripts look for a line that begins so.
    output.say(write(Finding("busiest device", {**busiest, "window": window}), TERMINAL))


def _machine(running: Placement) -> dict[str, int]:
    """Return layers, devices and slots of the running placement, for a finding."""
    slots = running.slots_per_device
    return {"layers": running.layers, "devices": running.devices, "slots": slots}


def _plan_losses(
    output: Output,
    running: Placement,
    traffic: Traffic,
    window: int | None,
    topology: Topology,
    change: Change,
    table_file: Path,
) -> dict[str, Any]:
    """Plan every loss, write the table and print the worst losses; return the table for JSON."""
    domain = change.every_loss
    assert domain is not None
    with working("planning") as report:
        progress = show_shares(report, "of the losses", then="table")
        plans = plan_losses(
            running, traffic, domain, topology=topology, window=window, progress=progress
        )
    number = topology.devices if domain == "device" else topology.nodes
    if not plans:
        raise click.ClickException(
            f"no loss of a {domain} leaves a slot for each of {running.num_experts} experts"
        )
    fatal = sum(1 for planned in plans.values() if planned.lost.any())
    worst = sorted(plans.items(), key=lambda item: -item[1].imbalance_after)[:SHOWN]
    numbers = {"domain": domain, "planned": len(plans), "number": number, "fatal": fatal}
    output.tell(Finding("planned losses", {"machine": _machine(running), **numbers}))
    output.say("")
    rows = []
    for lost, planned in worst:
        numbers_of_loss = (f"{planned.lost.sum():,}", f"{len(planned.steps):,}")
        rows.append((f"{domain} {lost}", *numbers_of_loss, f"{planned.imbalance_after:.3f}"))
    output.table(("the worst", "from disk", "copies moved", "busiest / mean then"), rows)
    table = {str(lost): _without_map(planned) for lost, planned in plans.items()}
    write_json(table_file, {"domain": domain, "losses": table})
    output.say(f"wrote {table_file}")
    return {"domain": domain, "losses": table, "table": str(table_file)}


def _without_map(planned: Plan) -> dict[str, Any]:
    """Return a plan as JSON values without its map, which follows from the steps."""
    values = planned.to_dict()
    del values["physical_to_logical_map"]
    return values
