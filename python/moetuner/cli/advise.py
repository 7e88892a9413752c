"""``moetuner advise``: whether a placement is worth a trial, with how many copies, at what cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options import JUDGING, RUNNING, SEARCH, kinds, option
from moetuner.cli.options.groups import FILES
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import is_start, load_placement, start_option
from moetuner.cli.options.pages import Pages, make_origin
from moetuner.cli.options.serving import JudgedOptions, setting_option
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, show_steps, working
from moetuner.cli.recipes import Following
from moetuner.evaluation.comparison import PRICE, Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.files.cells import counted, in_bytes, percent, signed, span, with_values
from moetuner.problem.goals import Goal
from moetuner.recording import Recording
from moetuner.report import advice as advising
from moetuner.report.advice.conclusion import write_order
from moetuner.report.advice.request import check_unseen
from moetuner.report.advice.values import Advice, write_windows
from moetuner.report.findings import TERMINAL, Voice
from moetuner.report.page.data import PageData
from moetuner.report.page.making import make_advice_data
from moetuner.serving.engines import find_recorder
from moetuner.serving.running import Running
from moetuner.serving.settings import read_count

COPIES = kinds.Text(
    lambda text: tuple(read_count(number.strip()) for number in text.split(",")),
    "numbers as in 0,1,2,4",
)
STEP_MS = kinds.Text(
    lambda text: tuple(float(number) for number in text.split(",")),
    "milliseconds as in 30 or 30,400",
)
DEFAULT_COPIES = ",".join(map(str, advising.COPIES))


@options.command(
    "advise",
    example="trace.safetensors --devices 8 --for vllm --report page.html",
    begin_with="--devices --devices-per-node --for --report",
)
def command(
    *,
    source: Source,
    machine: Machine,
    unseen: tuple[Path, ...] = option(kinds.IN_INPUT, "FUTURE", (), multiple=True, group=JUDGING),
    copies: tuple[int, ...] = option(COPIES, "N,N,...", DEFAULT_COPIES, group=RUNNING),
    initial: str = start_option("contiguous", group=RUNNING),
    expert_bytes: float | None = options.expert_bytes_option(),
    kv_bytes: float | None = options.expert_bytes_option(),
    device_memory: float | None = options.expert_bytes_option(),
    step_ms: tuple[float, ...] | None = option(STEP_MS, "DECODE[,PREFILL]", group=JUDGING),
    price: float = option(kinds.Number(0, 1), "SHARE", PRICE, group=JUDGING),
    prefill_share: float | None = option(kinds.Number(0, 1), "SHARE", group=JUDGING),
    splits: int = option(click.IntRange(1, 100), "N", advising.SPLITS, group=JUDGING),
    by_group: bool = option(group=JUDGING, is_flag=True, default=False),
    any_order: bool = option(group=JUDGING, is_flag=True, default=False),
    objective: Goal | None = setting_option("objective"),
    seed: int = options.seed_option(),
    time_limit: float | None = option(kinds.Number(min=0, infinite=True), "SECONDS", group=SEARCH),
    serving: JudgedOptions,
    pages: Pages,
    output: Output,
) -> None:
    """Advise whether a better placement is worth a trial.

    A placement is computed from half of INPUT and judged on the other half, in windows of 512
    tokens (decode) and 8,192 (prefill; 4,096 or 2,048 if INPUT is short), or of --window. Other
    splits show how far the gain varies. The answer is "worth a trial", "not now" or "not enough
    evidence", with reasons, what copies of experts would gain, what moving costs, and the next
    commands.

    Parameters
    ----------
    unseen
        Traffic to judge on, instead of half of INPUT; may be repeated for several files.
    initial
        The placement that runs; eplb:32 is EPLB's with 32 redundant experts over all devices.
    copies
        Extra slots per device and layer to try, as long as each gains. The number that pays for its
        memory is proposed; a single one always is.
    expert_bytes
        Bytes of one expert of one layer. [default: of INPUT's model, if known]
    kv_bytes
        Bytes of KV cache of a token. [default: of INPUT's model in 16 bits, if known]
    device_memory
        Bytes of memory of a device. [default: of the machine, else of the cost model's GPU]
    step_ms
        Milliseconds of a step of your engine, in decode and in prefill, as its log or benchmark
        has them: the gain is then of a step.
    price
        Smallest gain that is worth a change, as a share of a step's time if --step-ms says it,
        else of the MoE layers'.
    prefill_share
        Share of the serving time that is prefill: placements are computed for it, and the gain is
        one figure for both. [default: neither phase is to lose much, and a gain for each]
    splits
        Number of splits of INPUT into a seen and an unseen half.
    by_group
        Also evaluate, on each group of INPUT, a placement computed from all other groups.
    any_order
        The order of INPUT is not the order of serving, as when groups were recorded one after
        another.
    time_limit
        Time limit per solve, in seconds. Results then depend on the machine.
    """
    topology = machine.topology()
    source, served = serving.resolve(source, topology)
    expert_bytes = serving.expert_bytes(source, expert_bytes)
    running = initial if is_start(initial) else load_placement(Path(initial), source, topology)
    future = _future(source, unseen)
    output.say(*source.lines)
    if future is not None:
        line, *notes = future.lines
        output.say(f"Judged on {line}", *notes)
    weights = _weigh_steps(source.traffic, len(copies), splits)
    with working("advising") as report:
        advice = advising.advise(
            source.traffic,
            served,
            unseen=None if future is None else future.traffic,
            initial=running,
            copies=copies,
            window=source.window,
            kv_bytes=kv_bytes,
            device_memory=device_memory,
            step_ms=step_ms,
            price=price,
            prefill_share=prefill_share,
            recorded_by=next(map(find_recorder, source.readers), None),
            splits=splits,
            by_group=by_group,
            in_order=not any_order,
            objective=objective,
            expert_bytes=expert_bytes,
            time_limit=time_limit,
            seed=seed,
            threads=source.threads,
            progress=show_steps(report, weights),
        )
    _show_all(output, pages, Following(source, advice, unseen))


def _future(source: Source, unseen: tuple[Path, ...]) -> Source | None:
    """Return the traffic to judge on; None if no option names any. It must be of INPUT's model."""
    if not unseen:
        return None
    # Names in a file are those of INPUT's windows or sequences.
    names = source.group_by if source.group_by == FILES else None
    future = replace(source, input_files=unseen, group_by=names)
    check_unseen(source.traffic, future.traffic)  # before anything is said
    return future


def _weigh_steps(traffic: Recording, searches: int, splits: int) -> list[float]:
    """Return the approximate times of the steps of advice, in units of a search on a small trace.

    They were measured on 9 and 400 million choices of experts.
    """
    choices = traffic.choices / 1e8 if traffic.ordered else 0.0
    counting, replaying, judging = 0.15 + choices / 4, 0.3 + choices / 8, 0.3 + choices / 2
    searching, solving, moving = 1 + choices / 4, 2.5 + choices / 3, 0.1 + choices / 20
    steps_of_splits = [replaying, *(splits * [solving]), judging]
    # Halves, which are compared, are solved and judged where they differ.
    of_halves, fewer_moves = [0.1, *(2 * [solving + 1])], 3 + choices
    first = [counting, *(searches * [searching]), *steps_of_splits]
    return [*first, *of_halves, moving, fewer_moves]


def _show_all(output: Output, pages: Pages, following: Following) -> None:
    """Print an advice and the commands that follow it; write its page and its JSON."""
    source, advice = following.source, following.advice
    voice = TERMINAL._replace(audit=following.audit.command)
    _show(output, advice, voice)
    output.next_commands(following.commands)
    if following.go_back is not None:
        output.say(f"  # to go back: {following.go_back}")
    contents: dict[str, Any] = {"input": source.facts, **advice.to_dict(voice)}
    contents |= {"commands": [*map(str, following.commands)], "go_back": following.go_back}

    def page() -> PageData:
        on_page = contents | {"commands": [*map(str, following.on_page)]}
        return make_advice_data(advice, make_origin(source), on_page, following.on_page, voice)

    pages.write(output, page)
    output.finish(contents)


def _show(output: Output, advice: Advice, voice: Voice) -> None:
    """Print the answer, its reasons, its figures, and the gains of copies where they pay."""
    output.say("")
    output.verdict(advice.findings[0], advice.say_answer(voice))
    # The gain of few moves stands above their command.
    others = tuple(finding for finding in advice.findings if finding.kind != "few moves")
    shown = replace(advice, findings=others)
    reasons, warnings = shown.say("reason", "cost", voice=voice), shown.say("warning", voice=voice)
    output.say(*(f"- {reason}" for reason in reasons), *(f"! {warning}" for warning in warnings))
    _show_figures(output, advice)
    if advice.by_group:
        windows = [write_windows(judged) for judged in advice.judged]
        head = ["group, unseen", *(column for name in windows for column in (name, "95 %"))]
        rows = [
            (group, *(cell for gain in gains.values() for cell in _cells(gain)))
            for group, gains in advice.by_group.items()
        ]
        output.say("")
        output.table(*with_values(head, rows))
    if len(advice.copies) > 1 and (advice.chosen_copies or advice.larger_copies is not None):
        output.say("")
        _show_copies(output, advice)


def _show_copies(output: Output, advice: Advice) -> None:
    """Print the gain of each number of slots for copies."""
    names = [f"windows of {tokens:,}" if tokens else "gain" for tokens in advice.copies[0].gains]
    # Buffers of low-latency kernels grow with the slots.
    head = ["slots for copies", *names, "per device", "of KV cache", "DeepEP tokens", ""]
    notes = {
        advice.fewer_copies: " <- without more memory",
        advice.larger_copies: " <- your choice",
        advice.chosen_copies: " <- proposed",
    }
    rows = [
        (
            str(row.per_device),
            *(signed(row.mean(window)) for window in row.gains),
            "-" if row.bytes_per_device is None else in_bytes(row.bytes_per_device),
            "-" if row.cache_share is None else percent(row.cache_share),
            "-" if row.tokens_per_rank is None else f"{row.tokens_per_rank:,}",
            notes.get(row.per_device, ""),
        )
        for row in advice.copies
    ]
    output.table(*with_values(head, rows))


def _cells(gain: Comparison) -> tuple[str, str]:
    return signed(gain.gain), span(gain.low, gain.high)


def _show_figures(output: Output, advice: Advice) -> None:
    """Print the figures of the running, EPLB's and the proposed placement, by window."""
    rows: dict[tuple[str, ...], list[str]] = {}
    measures = [*advice.judged[0].gains]
    for judged in advice.judged:
        over_eplb = advice.over_eplb.get(judged.window)
        for measure, gain in judged.gains.items():
            figure = FIGURES[measure]
            if not figure.matters_in(advice.settings["regime"]):
                continue
            values = [gain.before]
            if over_eplb is not None:
                values.append(over_eplb.whole[measure].before)
            texts = map(figure.text, [*values, gain.after])
            # The visits of a token are the same in windows of all sizes.
            cells = (str(measures.index(measure)), figure.column, *texts, *_cells(gain))
            rows.setdefault(cells, []).append(f"{judged.window:,}" if judged.window else "-")
    running = Running.parse(advice.settings["initial"]).method.replace("_", "-")
    columns = ["running" if running in ("given", "eplb") else running]
    if advice.over_eplb:
        columns.append("EPLB")
    columns += ["proposed", "gain", "95 %"]
    head = ["figure", "window", *columns]
    table = [
        (column, "all" if len(windows) > 1 else windows[0], *cells)
        for (_, column, *cells), windows in sorted(rows.items(), key=lambda row: int(row[0][0]))
    ]
    output.say(f"{_name_unseen(advice)}:")
    output.table(*with_values(head, table))


def _name_unseen(advice: Advice) -> str:
    """Write how much unseen traffic the figures are of, and the order of its tokens."""
    replayed, kind = advice.main.after.replayed, "unseen " if advice.settings["held_out"] else ""
    assert replayed is not None
    traffic, units = replayed.traffic, advice.units
    if units.name == "window" and units.kinds is not None:  # steps of the counters' windows
        drawn = f"{kind}steps drawn from {advice.main.gain.units} of {units.number} windows"
        return f"On {traffic.length:,} {drawn} of INPUT"
    order = ""
    if traffic.ordered:
        order = write_order(advice.settings["arrival"], advice.settings["engine"])
    return f"On {counted(traffic.length, kind + traffic.unit)}{order}"
