"""``moetuner show``: what a placement is, and what it was computed for and from."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from moetuner.cli import options
from moetuner.cli.options import argument
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.placed import made_of, read_any
from moetuner.cli.output import Output
from moetuner.files import text
from moetuner.files.cells import counted, listed, percent
from moetuner.placement import EMPTY, Placement
from moetuner.problem.made import Made
from moetuner.problem.objective import decimals_of

# Files of INPUT that a line names.
NAMED = 3
SIZES = ("layers", "num_experts", "devices", "slots_per_device")


@options.command("show")
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    machine: Machine,
    layer_hints: options.LayerHints,
    output: Output,
) -> None:
    """Show what a placement is, and what it was computed for.

    PLACEMENT is moetuner's own, or a map in any format of "moetuner export".
    """
    placement = read_any(placement_file, machine, layer_hints)
    made = made_of(placement_file, placement)
    sizes = {name: int(getattr(placement, name)) for name in SIZES}
    sizes["empty_slots"] = int((placement.slots == EMPTY).sum())
    sizes["copies"] = int((placement.replicas - 1).sum())
    date = datetime.fromtimestamp(placement_file.stat().st_mtime).astimezone()
    moment = date.isoformat(" ", "minutes")
    output.say(
        f"{text.name(placement_file.name)}: {counted(placement.layers, 'layer')}, "
        f"{counted(placement.num_experts, 'expert')}, {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}; {sizes['copies']:,} copies beyond one of "
        f"each expert, {counted(sizes['empty_slots'], 'empty slot')}",
        *_lines(placement, made, moment),
    )
    names = ("model", "topology", "fingerprint", "objective", "bound", "bound_scope")
    contents: dict[str, Any] = {"placement": str(placement_file), "file_date": date.isoformat()}
    contents |= sizes | {name: getattr(placement, name) for name in names}
    output.finish(contents | {"settings": placement.settings})


def _lines(placement: Placement, made: Made, moment: str) -> Iterator[str]:
    """Write who made it and when, for what, from what, and what it is worth."""
    if made.plan is not None:
        by = f"by plan from {text.name(str(made.plan.get('running')))}, {made.plan.get('change')}"
        yield f"Made {by}; file of {moment}"
    elif made.method is not None:
        yield (
            f"Made by moetuner {made.version}, method {made.method}, seed {made.seed}, effort "
            f"{made.effort}; file of {moment}"
        )
    else:
        yield (
            f"File of {moment}, which does not say what it was computed for: it is of an engine, "
            "or older."
        )
        return
    yield f"{'Served' if made.plan else 'Computed'} for {made.describe()}"
    if "cost_model" in made.serving:
        yield f"Times are of {made.serving['cost_model'].name or 'an unnamed cost model'}"
    if made.plan is not None:
        return
    recorded = made.input
    source = listed(list(recorded.files or ["traffic of no name"]), NAMED)
    sizes = [
        counted(size, unit)
        for size, unit in ((recorded.tokens, "token"), (recorded.windows, "window"))
        if size is not None
    ]
    if recorded.only:
        sizes.append(f"of {listed(list(recorded.only), NAMED)} alone")
    if made.holdout:
        sizes.append(f"{percent(made.holdout)} of it held out")
    model = "" if placement.model is None else f" of {text.name(placement.model)}"
    yield ", ".join([f"From {source}{model}", *sizes, f"fingerprint {placement.fingerprint}"])
    if placement.objective is not None:
        places = decimals_of(made.wanted.get("objective"))
        bound = "" if placement.bound is None else f"; lower bound {placement.bound:,.{places}f}"
        scope = f" of {placement.bound_scope}" if bound and placement.bound_scope else ""
        value = f"{placement.objective:,.{places}f} {made.unit or ''}"
        yield f"Objective {value}{bound}{scope}"
