"""``moetuner evaluate``: replay a placement on traffic."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner import _checks
from moetuner.cli import options
from moetuner.cli.options import argument, option
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
from moetuner.report.findings import Finding
from moetuner.report.outcome import find_gain, find_times_of, on_one_device

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
    mixed_seed: int = option(click.IntRange(0, 2**63 - 1), "N", default=0),
    output: Output,
) -> None:
    """Replay a placement, and print its figures.

    Parameters
    ----------
    baseline
        The placement that runs. [default: contiguous]
    lost
        Devices that are lost, such as 3,17; the placement is replayed on those that are left.
    mixed_seed
        Seed of the order in which sequences, or windows of statistics, are mixed.
    """
    placed = Placed.read(placement_file, source, machine, serving)
    placed = placed.without(lost)
    placement, (traffic, *_) = placed.placement, placed.judged
    window = placed.source.counted
    running, against = placed.baseline(baseline)
    judgement = placed.judge(running, (against, placed.name), mixed_seed=mixed_seed)
    evaluation = judgement.after
    output.say(*placed.lines())
    windows = f", windows of {window:,} tokens" if window else ""
    missing = f" (without {', '.join(map(str, lost))})" if lost else ""
    output.say(
        f"{text.name(placement_file.name)}: {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}{missing}{windows}",
    )
    output.tell(*(find_gain(gain) for gain in placed.gains(judgement)))
    output.say("")
    _table(output, "traffic", OTHERS, evaluation)
    together = on_one_device(evaluation, placement.devices)
    if together is not None:
        output.tell(Finding("tokens together", {"tokens": together}))
    output.tell(_find_mixed(traffic, mixed_seed))
    output.say("")
    _table(output, "layer, us", TIMES, evaluation)
    output.tell(*find_times_of(placed.serving, traffic))
    last = [Finding("losses", {"losses": each}) for each in evaluation.losses.values()]
    for regime, ports in evaluation.busiest_port.items():
        last.append(Finding("busiest ports", {"regime": regime, **ports}))
    output.say(*[""] * bool(last))
    output.tell(*last)
    contents = placed.contents(
        mixed_seed=mixed_seed, waterfill=placed.serving.waterfill, without=list(lost)
    )
    contents["placement"] = str(placement_file)
    contents["baseline"] = baseline
    output.finish(contents | evaluation.to_dict() | {"gain": judgement.gain.to_dict()})


def _find_mixed(traffic: Recording, seed: int) -> Finding:
    """Return what a mixed window is made of: other numbers of sequences are other figures."""
    if not traffic.ordered:
        windows = min(traffic.length, WINDOWS_MIXED)
        return Finding("mixed windows", {"windows": windows, "seed": seed})
    if traffic.sequence is None:
        return Finding("mixed tokens", {"seed": seed})
    sequences = _checks.distinct(traffic.sequence).size
    running = min(at_once(sequences), sequences)
    return Finding("mixed sequences", {"running": running, "of": sequences, "seed": seed})


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
