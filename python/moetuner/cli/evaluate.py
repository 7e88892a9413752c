"""``moetuner evaluate``: replay a placement on traffic."""

from __future__ import annotations

from pathlib import Path

from moetuner import _checks
from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.figures import FigureOptions
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import baseline_option
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import JudgedOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.evaluation import Evaluation
from moetuner.evaluation.arrival import WINDOWS_MIXED, at_once
from moetuner.evaluation.figures import FIGURES, US, explain
from moetuner.files import text
from moetuner.files.cells import counted
from moetuner.recording import Recording
from moetuner.report.outcome import on_one_device, whose_times

# Times have a table of their own.
TIMES = [name for name, figure in FIGURES.items() if figure.unit == US]
OTHERS = [name for name in FIGURES if name not in TIMES]
HELP = f"""Replay a placement token by token, with its groups.

{explain(*OTHERS, *TIMES)}.
"""


@options.command("evaluate", help=HELP)
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    source: Source,
    machine: Machine,
    baseline: str | None = baseline_option(),
    lost: tuple[int, ...] = option(options.DEVICE_LIST, "LIST", (), flag="--without"),
    serving: JudgedOptions,
    figures: FigureOptions,
    output: Output,
) -> None:
    """Replay a placement, and print its figures.

    Parameters
    ----------
    baseline
        The placement that runs. [default: contiguous]
    lost
        Devices that are lost, such as 3,17; the placement is replayed on those that are left.
    """
    placed = Placed.read(placement_file, source, machine, serving)
    placed = placed.without(lost)
    placement, (traffic, *_) = placed.placement, placed.judged
    window = placed.source.counted
    running, against = placed.baseline(baseline)
    replayed = figures.replay_options(source)
    judgement = placed.judge(running, (against, placed.name), replayed)
    evaluation = judgement.after
    output.say(*placed.lines())
    windows = f", windows of {window:,} tokens" if window else ""
    missing = f" (without {', '.join(map(str, lost))})" if lost else ""
    output.say(
        f"{text.name(placement_file.name)}: {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}{missing}{windows}",
        *(f"Gain: {gain.sentence}" for gain in placed.gains(judgement)),
        "",
    )
    _table(output, "traffic", OTHERS, evaluation)
    together = on_one_device(evaluation, placement.devices)
    if together is not None:
        output.say(f"{together:.1f} of 100 tokens have all their experts of a layer on one device")
    output.say(_mixed(traffic, replayed.mixed_seed), "")
    _table(output, "layer, us", TIMES, evaluation)
    output.say(whose_times(placed.serving, traffic))
    losses = [f"Losses: {each.sentence}." for each in evaluation.losses.values()]
    last = [*losses, *(_ports(name, ports) for name, ports in evaluation.busiest_port.items())]
    output.say(*[""] * bool(last), *last)
    settings = {"waterfill": placed.serving.waterfill, "without": list(lost)}
    contents = placed.contents(**replayed.facts(), **settings)
    contents["placement"] = str(placement_file)
    contents["baseline"] = baseline
    output.finish(contents | evaluation.to_dict() | {"gain": judgement.gain.to_dict()})


def _mixed(traffic: Recording, seed: int) -> str:
    """Return what a mixed window is made of: other numbers of sequences are other figures."""
    if not traffic.ordered:
        return f"mixed: means of {min(traffic.length, WINDOWS_MIXED)} windows, seed {seed}"
    if traffic.sequence is None:
        return f"mixed: tokens in random order, as INPUT has no sequences, seed {seed}"
    sequences = _checks.distinct(traffic.sequence).size
    running = min(at_once(sequences), sequences)
    return f"mixed: {running} of {sequences:,} sequences at once (fewer in a group), seed {seed}"


def _table(output: Output, title: str, names: list[str], evaluation: Evaluation) -> None:
    """Print figures that are known of all traffic or of a group; times begin with their mean."""
    rows = {"all": evaluation, **evaluation.by_group}
    known = [
        name
        for name in names
        if any(getattr(figures, name) is not None for figures in rows.values())
    ]
    head = ["mean" if name == TIMES[0] else FIGURES[name].column for name in known]
    cells = [
        (group, *(FIGURES[name].text(getattr(figures, name)) for name in known))
        for group, figures in rows.items()
    ]
    output.table((title, *head), cells)


def _ports(regime: str, ports: dict[str, list[float]]) -> str:
    """Write the rows of the busiest port of every tier that carries any."""
    tiers = ["in a node", "between nodes", *(f"tier {n}" for n in range(3, 1 + len(ports["out"])))]
    parts = [
        f"{tier} {out:,.0f} out, {into:,.0f} in"
        for tier, out, into in zip(tiers, ports["out"], ports["in"], strict=False)
        if out or into
    ]
    return f"rows per layer at the busiest port, regime {regime}: {'; '.join(parts) or 'none'}"
