"""``moetuner advise``: whether to turn placement on here, with how many copies, at what cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.moves import in_bytes
from moetuner.cli.options.serving import Serving, serving_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output, steps
from moetuner.cli.reporting import write_advice
from moetuner.evaluation.verdicts import PRICE
from moetuner.formats import WRITERS
from moetuner.formats.engines import ENGINES
from moetuner.placement import Placement
from moetuner.report import advice as advising
from moetuner.report.advice.values import Advice
from moetuner.report.cells import counted, number, signed

NAMES = {
    "predicted_layer_us": "predicted layer us",
    "imbalance": "imbalance",
    "crossing": "crossing",
    "fanout": "fanout",
    "node_fanout": "node fanout",
}


def parse_copies(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Split a list of numbers."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 5 for part in parts):
        raise click.BadParameter(f"must be numbers as in 0,1,2,4, got '{value:.60}'")
    return tuple(map(int, parts))


@click.command(
    "advise", cls=options.Grouped, begin_with="--devices --devices-per-node --for --report"
)
@traffic_options
@machine_options
@click.option(
    "--initial",
    cls=options.Option,
    group=options.RUNNING,
    default="contiguous",
    show_default=True,
    metavar="PLACEMENT|contiguous|round_robin",
    shell_complete=options.completing("contiguous", "round_robin", files=True),
    help="The placement that runs.",
)
@click.option(
    "--copies",
    cls=options.Option,
    group=options.RUNNING,
    default=",".join(map(str, advising.COPIES)),
    show_default=True,
    callback=parse_copies,
    metavar="N,N,...",
    help="Slots for copies of a device in a layer that are tried.",
)
@click.option(
    "--expert-bytes",
    cls=options.Option,
    group=options.RUNNING,
    type=options.Number(min=0, min_open=True),
    metavar="BYTES",
    help="Bytes of one expert of one layer.  [default: of INPUT's model in 8 bits, if known]",
)
@click.option(
    "--price",
    cls=options.Option,
    group=options.JUDGING,
    type=options.Number(0, 1),
    default=PRICE,
    show_default=True,
    metavar="SHARE",
    help="Share of the predicted time that a change must save to be worth the trouble.",
)
@click.option(
    "--splits",
    cls=options.Option,
    group=options.JUDGING,
    type=click.IntRange(1, 100),
    default=advising.SPLITS,
    show_default=True,
    metavar="N",
    help="Ways to choose the half that placements are computed from.",
)
@click.option(
    "--any-order",
    cls=options.Option,
    group=options.JUDGING,
    is_flag=True,
    help="The order of INPUT is not that of serving: its kinds were recorded one after the other.",
)
@serving_options
@options.seed_option
@options.report_option
@options.figures_option
@options.json_option
def command(
    source: Source,
    machine: Machine,
    initial: str,
    copies: tuple[int, ...],
    expert_bytes: float | None,
    price: float,
    splits: int,
    any_order: bool,
    serving: Serving,
    seed: int,
    report_file: Path | None,
    json_file: Path | None,
) -> None:
    """Advise whether a better placement is worth a trial.

    Placements are computed from half of INPUT and judged on the other, over several splits. The
    answer is "worth a trial", "not now" or "not enough evidence", with reasons, what copies of
    experts would bring, what moving costs, and the commands that come next.
    """
    topology = machine.topology()
    running: Any = initial
    if initial not in ("contiguous", "round_robin"):
        if not Path(initial).is_file():
            raise click.BadParameter(
                f"must be a file, contiguous or round_robin, got '{initial:.60}'",
                param_hint="'--initial'",
            )
        running = Placement.load(initial)
    traffic = source.traffic
    output = Output(json_file)
    output.say(source.describe())
    with steps("advising") as report:
        advice = advising.advise(
            traffic,
            topology,
            initial=running,
            engine=serving.engine,
            copies=copies,
            window=source.window,
            splits=splits,
            price=price,
            expert_bytes=expert_bytes,
            **serving.arguments(traffic),
            in_order=not any_order,
            seed=seed,
            threads=source.threads,
            report=report,
        )
    commands = next_commands(source, machine, advice, initial, serving.engine)
    _show(output, advice, commands)
    contents = {"input": source.facts(), **advice.to_dict(), "commands": commands}
    if report_file is not None or options.figures_folder() is not None:
        write_advice(report_file, source, advice, contents, output)
    output.finish(contents)


def _show(output: Output, advice: Advice, commands: list[str]) -> None:
    output.say()
    output.say(advice.sentence)
    for reason in advice.reasons[1:]:
        output.say(f"- {reason}")
    for warning in advice.warnings:
        output.say(f"! {warning}")
    seen = "unseen" if advice.settings["held_out"] else "all"
    for judged in advice.judged:
        output.say()
        where = "" if judged.window is None else f"windows of {judged.window:,}"
        rows = []
        for measure, gain in judged.gains.items():
            low, high = gain.interval or (None, None)
            ends = "-" if low is None else f"{signed(low).removesuffix(' %')} to {signed(high)}"
            found = (judged.before[measure], judged.after[measure])
            span = f"{signed(gain.low).removesuffix(' %')} to {signed(gain.high)}"
            rows.append(
                (
                    NAMES[measure],
                    *(number(each, 1 if measure == "predicted_layer_us" else 3) for each in found),
                    signed(gain.mean),
                    span if len(gain.splits) > 1 else "-",
                    ends,
                )
            )
        head = (where or f"{seen} windows", "running", "proposed", "gain", "splits", "95 %")
        output.table(head, rows)
    output.say()
    rows = []
    limited = all(each.tokens_per_rank is not None for each in advice.copies)
    for copies in advice.copies:
        label = f"{copies.per_device}{' on average' if copies.shared else ''}"
        mark = " <- knee" if copies.per_device == advice.knee and not copies.shared else ""
        size = copies.bytes_per_device
        means = [sum(each) / len(each) for each in copies.gains.values()]
        limit = () if not limited else (f"{copies.tokens_per_rank:,}",)
        size_told = "-" if size is None else in_bytes(size)
        rows.append((label, *map(signed, means), size_told, *limit, mark))
    windows = [f"windows of {each:,}" if each else "gain" for each in advice.copies[0].gains]
    # Of low-latency kernels, whose buffers grow with the slots.
    limit = ("DeepEP tokens",) if limited else ()
    output.table(("slots for copies", *windows, "per device", *limit, ""), rows)
    output.say()
    output.say(_moving(advice))
    known = [each for each in advice.exponents["running"] if each is not None]
    after = [each for each in advice.exponents["proposed"] if each is not None]
    if known and after:
        output.say(
            "Power law with the same busiest device (AIConfigurator's alpha), mean of layers: "
            f"{sum(known) / len(known):.2f} running, {sum(after) / len(after):.2f} proposed."
        )
    output.say("Next:")
    for line in commands:
        output.say(f"  {line}")


def _moving(advice: Advice) -> str:
    moving = advice.moving
    text = f"Moving there: {counted(moving.experts, 'expert')}"
    if moving.bytes is None or moving.seconds is None:
        return f"{text}; --expert-bytes tells bytes and seconds."
    text += f", {in_bytes(moving.bytes)}, {moving.seconds:.3g} s at the links' bandwidth"
    if moving.steps is None:
        return f"{text}, which does not pay."
    return f"{text}; paid back after {moving.steps:,.0f} steps, if serving stops for it."


def _later(advice: Advice, file: str, where: str, words: str) -> list[str]:
    """Return what to do where nothing is to be turned on yet."""
    if advice.answer == "not now":
        return [
            f"moetuner inspect {file}{words}  # what there is to win, layer by layer",
            f"moetuner advise NEWER {where}  # again, when traffic, engine or the number of "
            "devices has changed",
        ]
    return [
        "moetuner collect MODEL --dataset FILE --out MORE  # record more, of all kinds; or as the "
        "engine does, see docs/engines",
        f"moetuner advise MORE {where}",
    ]


def next_commands(
    source: Source, machine: Machine, advice: Advice, initial: str, engine: str | None
) -> list[str]:
    """Return the commands that come next."""
    file = source.files()
    where = f"{machine.words()}{source.words()}"
    slots = "" if engine is None else f" --for {engine}"
    if advice.answer != "worth a trial":
        return _later(advice, file, f"{where}{slots}", source.words())
    found = []
    if advice.knee:
        slots += f" --slots-per-device {advice.problem.slots + advice.knee}"
    start = "" if initial in ("contiguous", "round_robin") else f" --initial {shlex.quote(initial)}"
    found += [
        f"moetuner solve {file} {where}{slots}{start} --out placement.json",
        f"moetuner report placement.json {file}{source.words()} --out report.html",
    ]
    hidden, dense = source.layer_words()
    layers = {
        "hidden": f" --hidden-layers {hidden} --dense-layers {dense}",
        "numbered": f" --dense-layers {dense}",
    }
    for name, writer in WRITERS.items():
        if engine is not None and writer.engine == engine:
            to = f"{name}{layers.get(writer.rows, '')}"
            found.append(
                f"moetuner export placement.json --to {to} --out experts{writer.suffixes[0]}"
            )
    problem = advice.problem
    devices = problem.topology.devices
    more = devices * (problem.slots + advice.knee) - problem.experts
    if engine is not None and ENGINES[engine].serve:
        found.append(ENGINES[engine].serve.format(devices=devices, redundant=more))
    if engine is None:
        found.append("moetuner export placement.json --to eplb --out experts.npz")
    elif not ENGINES[engine].may_copy:
        found.append(
            f"moetuner export placement.json --to {engine} --checkpoint MODEL --out MODEL-placed"
        )
    return found
