"""``moetuner plan``: what a running placement becomes when devices are lost, leave or come."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from moetuner._checks import DEVICE_LIMIT
from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import load_placement
from moetuner.cli.options.placed import made_of
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.cli.recipes import to_serve
from moetuner.cost import bytes_of_expert
from moetuner.evaluation.losses import DOMAINS, Domain
from moetuner.files import replacing
from moetuner.files.cells import counted, in_bytes
from moetuner.placement import Placement
from moetuner.solver import Plan, plan, plan_losses
from moetuner.topology import Topology

# Losses that a table on the screen names: the worst ones.
SHOWN = 5


@dataclass(frozen=True)
class Change:
    """What happens to the devices.

    Parameters
    ----------
    without
        Devices that are lost, such as 3,17: nothing can be read from them any more.
    retire
        Number of devices to remove; those whose removal moves the fewest copies are chosen.
    join
        Number of devices to add.
    every_loss
        Plan the loss of every device, or node, instead, and write all plans to --table.
    """

    without: tuple[int, ...] = option(options.DEVICE_LIST, "LIST", (), group=options.BEGIN)
    retire: int = option(click.IntRange(0, DEVICE_LIMIT), "N", 0, group=options.BEGIN)
    join: int = option(click.IntRange(0, DEVICE_LIMIT), "N", 0, group=options.BEGIN, flag="--with")
    every_loss: Domain | None = option(
        click.Choice(DOMAINS), group=options.BEGIN, flag="--every-loss"
    )

    def check(self, table_file: Path | None) -> None:
        """Refuse what cannot be meant."""
        changes = bool(self.without or self.retire or self.join)
        if self.every_loss is None and not changes:
            raise click.UsageError(
                "Missing option '--without' (or '--retire', '--with', '--every-loss')."
            )
        if self.every_loss is not None and changes:
            raise click.UsageError(
                "'--every-loss' plans each loss by itself: leave out '--without', '--retire' and "
                "'--with'."
            )
        if (self.every_loss is None) != (table_file is None):
            raise click.UsageError("Give '--every-loss' and '--table' together.")

    @property
    def words(self) -> str:
        """What happens, in words."""
        parts = []
        if self.without:
            named = ", ".join(map(str, self.without))
            parts.append(f"{'device' if len(self.without) == 1 else 'devices'} {named} lost")
        if self.retire:
            parts.append(f"{counted(self.retire, 'device')} to leave")
        if self.join:
            parts.append(f"{counted(self.join, 'device')} more")
        return ", ".join(parts)


@options.command("plan", begin_with="--without --retire --with --every-loss --out --steps --table")
def command(
    *,
    running_file: Path = argument("RUNNING", options.IN_FILE),
    source: Source,
    machine: Machine,
    change: Change,
    more_copies: int | None = option(click.IntRange(0), "N", group=options.RUNNING),
    expert_bytes: float | None = options.expert_bytes_option(),
    out_file: Path = option(options.OutFile(), "FILE", Path("plan.json")),
    steps_file: Path | None = option(options.OutFile(), "FILE"),
    table_file: Path | None = option(options.OutFile(), "FILE"),
    output: Output,
) -> None:
    """Plan which copies move when devices are lost, removed or added.

    RUNNING is the placement that serves: moetuner's own, or a map in any format of "moetuner
    export". Copies go where they balance the loads of INPUT best. What is written to --out is a
    placement on the devices that serve, numbered anew, for "moetuner export"; --steps has the map
    by the numbers that devices have now, and the steps in an order in which no expert that is
    served loses its last copy.

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
    made = made_of(running_file, running)
    topology = machine.topology(running.devices, made.machine)
    if expert_bytes is None:
        size = made.expert_size or source.traffic.expert_size
        # INPUT may be counts alone: what is moved is the placement's.
        bits = source.weight_bits or made.input.weight_bits
        expert_bytes = bytes_of_expert(size, source.traffic.model or running.model, bits)
    contents: dict[str, Any] = {"input": source.facts(), "running": str(running_file)}
    contents |= {"expert_bytes": expert_bytes, "topology": topology.to_dict()}
    if table_file is not None:
        contents |= _plan_losses(output, running, source, topology, change, table_file)
        output.finish(contents)
        return
    with working("planning"):
        planned = plan(
            running,
            source.traffic,
            without=change.without,
            retire=change.retire,
            join=change.join,
            more_copies=more_copies,
            topology=topology,
            window=source.replayed,
        )
    gone = sorted({*range(running.devices)} - {*planned.devices.tolist()})
    served = replace(
        made.on(topology.without(gone, change.join)),
        plan={"running": running_file.name, "change": change.words},
    )
    placement = planned.placement.with_names(
        model=running.model, topology=topology.name, settings=served.to_settings()
    )
    placement.save(out_file)
    _show(output, planned, running, change, expert_bytes, source.replayed)
    output.say(f"wrote {out_file}")
    contents |= {"out": str(out_file), "without": list(change.without)} | planned.to_dict()
    if steps_file is not None:
        _write(steps_file, {"running": running_file.name} | planned.to_dict())
        output.say(f"wrote {steps_file}")
    following = to_serve(
        source,
        placement,
        out_file,
        engine=made.serving.get("engine"),
        split=made.serving.get("split"),
        nodes=topology.nodes,
    )
    output.say("")
    output.next_commands(following)
    contents["commands"] = [*map(str, following)]
    output.finish(contents)


def _show(
    output: Output,
    planned: Plan,
    running: Placement,
    change: Change,
    expert_bytes: float | None,
    window: int | None,
) -> None:
    """Print what moves, and what the busiest device has to do."""
    serving = len(planned.devices)
    output.say(
        f"{counted(running.layers, 'layer')}, {counted(running.devices, 'device')} x "
        f"{counted(running.slots_per_device, 'slot')}; {change.words}: "
        f"{counted(serving, 'device')} serve"
    )
    if change.retire:
        kept = {*planned.devices.tolist()}
        gone = [d for d in range(running.devices) if d not in kept and d not in change.without]
        noun = "device" if len(gone) == 1 else "devices"
        output.say(f"to leave: {noun} {', '.join(map(str, gone))}")
    where = "in the windows of INPUT" if window is None else f"in windows of {window:,} tokens"
    copies, lost = len(planned.steps), int(planned.lost.sum())
    size = "" if expert_bytes is None else f" ({in_bytes(copies * expert_bytes)})"
    disk = f", {lost:,} of them from disk, as no device has them any more" if lost else ""
    output.say(
        f"to move: {counted(copies, 'expert')}{size}{disk}",
        f"busiest device: {planned.imbalance_before:.3f} x the mean before, "
        f"{planned.imbalance_after:.3f} x after, {where}",
    )


def _plan_losses(
    output: Output,
    running: Placement,
    source: Source,
    topology: Topology,
    change: Change,
    table_file: Path,
) -> dict[str, Any]:
    """Plan every loss, write the table, and print the worst; return it for JSON."""
    domain = change.every_loss
    assert domain is not None
    with working("planning"):
        plans = plan_losses(
            running, source.traffic, domain, topology=topology, window=source.replayed
        )
    number = topology.devices if domain == "device" else topology.nodes
    if not plans:
        raise click.ClickException(
            f"no loss of a {domain} leaves a slot for each of {running.num_experts} experts"
        )
    fatal = sum(1 for planned in plans.values() if planned.lost.any())
    worst = sorted(plans.items(), key=lambda item: -item[1].imbalance_after)[:SHOWN]
    output.say(
        f"{counted(running.layers, 'layer')}, {counted(running.devices, 'device')} x "
        f"{counted(running.slots_per_device, 'slot')}; losses of a {domain}: {len(plans)} of "
        f"{number} planned, {fatal} lose an expert",
        "",
    )
    rows = [
        (f"{domain} {lost}", f"{planned.lost.sum():,}", f"{len(planned.steps):,}",
         f"{planned.imbalance_after:.3f}")
        for lost, planned in worst
    ]  # fmt: skip
    output.table(("the worst", "from disk", "copies moved", "busiest / mean then"), rows)
    table = {str(lost): _without_map(planned) for lost, planned in plans.items()}
    _write(table_file, {"domain": domain, "losses": table})
    output.say(f"wrote {table_file}")
    return {"domain": domain, "losses": table, "table": str(table_file)}


def _without_map(planned: Plan) -> dict[str, Any]:
    """Return a plan as JSON values without its map, which the steps make of the running one."""
    values = planned.to_dict()
    del values["physical_to_logical_map"]
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values) + "\n")
