"""``moetuner diff``: what has to move from one placement to another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options import argument
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import moves_sentence, show_pairs
from moetuner.cli.options.placed import made_of, read_any
from moetuner.cli.output import Output
from moetuner.cost import bytes_of_expert
from moetuner.files import text
from moetuner.files.cells import counted


@options.command("diff")
def command(
    *,
    before_file: Path = argument("BEFORE", options.IN_FILE),
    after_file: Path = argument("AFTER", options.IN_FILE),
    machine: Machine,
    layer_hints: options.LayerHints,
    expert_bytes: float | None = options.expert_bytes_option(),
    output: Output,
) -> None:
    """Show what has to move from one placement to another.

    BEFORE and AFTER are moetuner's own placements, or maps in any format of "moetuner export". A
    copy comes from the nearest device that holds the expert, on the machine of AFTER if no option
    gives another.

    Parameters
    ----------
    expert_bytes
        Bytes of one expert of one layer. [default: of the model's experts, if known]
    """
    before, after = (read_any(path, machine, layer_hints) for path in (before_file, after_file))
    made = [made_of(path, each) for path, each in ((after_file, after), (before_file, before))]
    ours, theirs = (
        (placed.layers, placed.devices, placed.num_experts) for placed in (before, after)
    )
    if ours != theirs:
        # The same model on other devices.
        is_moved = ours[::2] == theirs[::2]
        raise click.UsageError(
            f"{text.name(after_file.name)} must be a placement of the same model and machine: "
            f"{_sizes(ours)} as {text.name(before_file.name)}, got {_sizes(theirs)}"
            + ('; "moetuner plan --steps" lists the moves to other devices.' * is_moved or ".")
        )
    topology = machine.topology(after.devices, _first(each.machine for each in made))
    if expert_bytes is None:
        model, bits = (
            after.model or before.model,
            _first(each.input.weight_bits for each in made),
        )
        expert_bytes = bytes_of_expert(_first(each.expert_size for each in made), model, bits)
    diff = before.diff(after, expert_bytes=expert_bytes, topology=topology)
    output.say(moves_sentence(diff, topology))
    if expert_bytes is None and diff.experts_moved:
        output.say("Pass --expert-bytes to see bytes.")
    show_pairs(output, diff)
    contents: dict[str, Any] = {"before": str(before_file), "after": str(after_file)}
    contents |= {"expert_bytes": expert_bytes, "topology": topology.to_dict()}
    output.finish(contents | diff.to_dict())


def _first(values: Iterable[Any]) -> Any:
    """Return the first value that is known; None if none is."""
    return next((value for value in values if value is not None), None)


def _sizes(sizes: tuple[int, int, int]) -> str:
    """Write layers, devices and experts."""
    return ", ".join(map(counted, sizes, ("layer", "device", "expert")))
