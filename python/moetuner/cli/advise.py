"""``moetuner advise``: whether to turn placement on here, with how many copies, at what cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from moetuner._checks import suggestion
from moetuner.cli import options
from moetuner.cli.options import JUDGING, RUNNING, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.pages import Pages, origin_of
from moetuner.cli.options.serving import Serving
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, steps, working
from moetuner.evaluation.comparison import PRICE
from moetuner.evaluation.figures import FIGURES
from moetuner.formats import WRITERS
from moetuner.formats.engines import ENGINES
from moetuner.placement import Placement
from moetuner.problem.settings import read_count
from moetuner.report import advice as advising
from moetuner.report.advice.values import Advice
from moetuner.report.cells import counted, in_bytes, signed, span
from moetuner.report.page.data import of_advice

BASELINES = ("contiguous", "round_robin")
INITIAL = options.FileText(words=BASELINES)
COPIES = options.Text(
    lambda text: tuple(read_count(part.strip()) for part in text.split(",")),
    "numbers as in 0,1,2,4",
)
DEFAULT_COPIES = ",".join(map(str, advising.COPIES))


@options.command("advise", begin_with="--devices --devices-per-node --for --report")
def command(
    *,
    source: Source,
    machine: Machine,
    copies: tuple[int, ...] = option(COPIES, "N,N,...", DEFAULT_COPIES, group=RUNNING),
    initial: str = option(INITIAL, "PLACEMENT|contiguous|round_robin", "contiguous", group=RUNNING),
    expert_bytes: float | None = options.expert_bytes_option(),
    price: float = option(options.Number(0, 1), "SHARE", PRICE, group=JUDGING),
    splits: int = option(click.IntRange(1, 100), "N", advising.SPLITS, group=JUDGING),
    any_order: bool = option(group=JUDGING, is_flag=True, default=False),
    seed: int = options.seed_option(),
    serving: Serving,
    pages: Pages,
    output: Output,
) -> None:
    """Advise whether a better placement is worth a trial.

    Placements are computed from half of INPUT and judged on the other, over several splits. The
    answer is "worth a trial", "not now" or "not enough evidence", with reasons, what copies of
    experts would bring, what moving costs, and the commands that come next.

    Parameters
    ----------
    initial
        The placement that runs.
    copies
        Extra slots per device and layer to try.
    expert_bytes
        Bytes of one expert of one layer. [default: of INPUT's model in 8 bits, if known]
    price
        Share of the predicted time that a change must save to be worth the trouble.
    splits
        Ways to choose the half that placements are computed from.
    any_order
        The order of INPUT is not that of serving: its kinds were recorded one after the other.
    """
    topology = machine.topology()
    how: dict[str, Any] = {"copies": copies, "expert_bytes": expert_bytes, "price": price}
    how |= {"splits": splits, "in_order": not any_order, "seed": seed, "initial": initial}
    if initial not in BASELINES:
        if not Path(initial).is_file():
            raise click.BadParameter(
                f"must be a file, contiguous or round_robin, got '{initial:.60}'"
                + suggestion(initial, BASELINES),
                param_hint="'--initial'",
            )
        how["initial"] = Placement.load(initial)
    how |= {"engine": serving.engine, "window": source.window, "threads": source.threads}
    output.say(source.describe())
    # Each split counts, searches with every number of copies and judges; then all is compared.
    tried = splits * (2 + len(copies)) + 6
    with working("advising") as report:
        how |= serving.arguments(source.traffic) | {"report": steps(report, tried)}
        advice = advising.advise(source.traffic, topology, **how)
    commands = next_commands(source, machine, advice, initial, serving.engine)
    _show(output, advice)
    output.say("Next:", *(f"  {line}" for line in commands))
    contents = {"input": source.facts(), **advice.to_dict(), "commands": commands}
    pages.write(output, lambda: of_advice(advice, origin_of(source), contents))
    output.finish(contents)


def _show(output: Output, advice: Advice) -> None:
    """Print the answer, what it rests on, and what copies and moving cost."""
    output.say("")
    output.verdict(advice.answer, advice.sentence)
    output.say(*(f"- {reason}" for reason in advice.reasons[1:]))
    output.say(*(f"! {warning}" for warning in advice.warnings), "")
    seen = "unseen" if advice.settings["held_out"] else "all"
    for judged in advice.judged:
        where = f"{seen} windows" if judged.window is None else f"windows of {judged.window:,}"
        rows: list[tuple[str, ...]] = [
            (
                FIGURES[name].column,
                FIGURES[name].text(gain.before),
                FIGURES[name].text(gain.after),
                signed(gain.mean),
                span(min(gain.splits), max(gain.splits)) if len(gain.splits) > 1 else "-",
                span(gain.low, gain.high),
            )
            for name, gain in judged.gains.items()
        ]
        output.table((where, "running", "proposed", "gain", "splits", "95 %"), rows)
        output.say("")
    # Buffers of low-latency kernels grow with the slots.
    is_limited = all(row.tokens_per_rank is not None for row in advice.copies)
    windows = [f"windows of {of:,}" if of else "gain" for of in advice.copies[0].gains]
    head = ("slots for copies", *windows, "per device", *["DeepEP tokens"] * is_limited, "")
    rows = [
        (
            row.label,
            *(signed(row.mean(window)) for window in row.gains),
            "-" if row.bytes_per_device is None else in_bytes(row.bytes_per_device),
            *([f"{row.tokens_per_rank:,}"] if is_limited else []),
            " <- knee" if row.per_device == advice.knee and not row.shared else "",
        )
        for row in advice.copies
    ]
    output.table(head, rows)
    output.say("", _moving(advice))


def _moving(advice: Advice) -> str:
    """Write what moving there costs, and after how long it pays."""
    moving = advice.moving
    text = f"Moving there: {counted(moving.experts, 'expert')}"
    if moving.bytes is None or moving.seconds is None:
        return f"{text}. Pass --expert-bytes to see bytes and seconds."
    text += f", {in_bytes(moving.bytes)}, {moving.seconds:.3g} s at the links' bandwidth"
    if moving.steps is None:
        return f"{text}, which does not pay."
    return f"{text}; paid back after {moving.steps:,.0f} steps, if serving stops for it."


def next_commands(
    source: Source, machine: Machine, advice: Advice, initial: str, engine: str | None
) -> list[str]:
    """Return the commands that come next."""
    file, words = shlex.join(map(str, source.input_files)), source.words()
    where = f"{machine.words()}{words}" + ("" if engine is None else f" --for {engine}")
    if advice.answer == "not now":
        return [
            f"moetuner inspect {file}{words}  # what there is to win, layer by layer",
            f"moetuner advise NEWER {where}  # again, when traffic, engine or the number of "
            "devices has changed",
        ]
    if advice.answer != "worth a trial":
        return [
            "moetuner collect MODEL --dataset FILE --out MORE  # record more, of all kinds; or as "
            "the engine does, see docs/engines",
            f"moetuner advise MORE {where}",
        ]
    if advice.knee:
        where += f" --slots-per-device {advice.problem.slots + advice.knee}"
    if initial not in BASELINES:
        where += f" --initial {shlex.quote(initial)}"
    export = "moetuner export placement.json --to"
    commands = [
        f"moetuner solve {file} {where} --out placement.json",
        f"moetuner report placement.json {file}{words} --out report.html",
    ]
    if engine is None:
        return [*commands, f"{export} eplb --out experts.npz"]
    layers = dict(zip(("hidden_layers", "dense_layers"), source.layer_words(), strict=True))
    for name, writer in WRITERS.items():
        if writer.engine == engine:
            hints = "".join(f" --{hint.replace('_', '-')} {layers[hint]}" for hint in writer.hints)
            commands.append(f"{export} {name}{hints} --out experts{writer.suffixes[0]}")
    of, problem = ENGINES[engine], advice.problem
    redundant = problem.devices * (problem.slots + advice.knee) - problem.experts
    if of.serve:
        commands.append(of.serve.format(devices=problem.devices, redundant=redundant))
    if not of.may_copy:
        commands.append(f"{export} {engine} --checkpoint MODEL --out MODEL-placed")
    return commands
