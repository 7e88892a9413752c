"""``moetuner advise``: whether to turn placement on here, with how many copies, at what cost."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options import JUDGING, RUNNING, SEARCH, option
from moetuner.cli.options.groups import FILES
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import initial_option, is_start
from moetuner.cli.options.pages import Pages, origin_of
from moetuner.cli.options.serving import JudgedOptions, setting_option
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, steps, working
from moetuner.evaluation.comparison import PRICE, Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.files.cells import counted, in_bytes, signed, span, with_values
from moetuner.formats import reader_of, serving_commands, way_back
from moetuner.problem.objective import Goal
from moetuner.recording import Recording
from moetuner.report import advice as advising
from moetuner.report.advice.conclusion import write_order
from moetuner.report.advice.request import slots_of_running
from moetuner.report.advice.values import Advice, write_windows_of
from moetuner.report.findings import TERMINAL, Voice
from moetuner.report.page.data import data_of_advice
from moetuner.report.words.parts import name_running
from moetuner.serving.engines import ENGINES, engine_of
from moetuner.serving.phases import WINDOWS
from moetuner.serving.settings import read_count

COPIES = options.Text(
    lambda text: tuple(read_count(part.strip()) for part in text.split(",")),
    "numbers as in 0,1,2,4",
)
DEFAULT_COPIES = ",".join(map(str, advising.COPIES))
# Share that is held out, as of ``advise``.
HOLDOUT = 0.5
# Where the commands write what runs, unless a file has it.
RUNNING_FILE = "running.json"


@options.command("advise", begin_with="--devices --devices-per-node --for --report")
def command(
    *,
    source: Source,
    machine: Machine,
    unseen: tuple[Path, ...] = option(options.IN_INPUT, "FUTURE", (), multiple=True, group=JUDGING),
    copies: tuple[int, ...] = option(COPIES, "N,N,...", DEFAULT_COPIES, group=RUNNING),
    initial: str = initial_option(default="contiguous"),
    expert_bytes: float | None = options.expert_bytes_option(),
    price: float = option(options.Number(0, 1), "SHARE", PRICE, group=JUDGING),
    prefill_share: float | None = option(options.Number(0, 1), "SHARE", group=JUDGING),
    splits: int = option(click.IntRange(1, 100), "N", advising.SPLITS, group=JUDGING),
    by_group: bool = option(group=JUDGING, is_flag=True, default=False),
    any_order: bool = option(group=JUDGING, is_flag=True, default=False),
    objective: Goal | None = setting_option("objective"),
    seed: int = options.seed_option(),
    time_limit: float | None = option(
        options.Number(min=0, infinite=True), "SECONDS", group=SEARCH
    ),
    serving: JudgedOptions,
    pages: Pages,
    output: Output,
) -> None:
    """Advise whether a better placement is worth a trial.

    A placement is computed from half of INPUT and judged on the other half, in windows of 512
    tokens (decode) and 8,192 (prefill; fewer of a short INPUT) unless --window chooses; other
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
        Extra slots per device and layer to try; those between the next and the largest only where
        one of these gains.
    expert_bytes
        Bytes of one expert of one layer. [default: of INPUT's model, if known]
    price
        Smallest gain, as a share of the predicted time, that is worth a change.
    prefill_share
        Share of the serving time that is prefill: placements are computed for it, and the gain is
        one figure for both. [default: 0.2, and a gain for each]
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
    running = initial if is_start(initial) else source.load(Path(initial), topology)
    future = _future(source, unseen)
    output.say(source.describe())
    if future is not None:
        output.say(f"Judged on {future.describe()}")
    weights = _weigh_steps(source.traffic, len(copies), splits)
    with working("advising") as report:
        advice = advising.advise(
            source.traffic,
            served,
            unseen=None if future is None else future.traffic,
            initial=running,
            copies=copies,
            window=source.window,
            price=price,
            prefill_share=prefill_share,
            splits=splits,
            by_group=by_group,
            in_order=not any_order,
            objective=objective,
            expert_bytes=expert_bytes,
            time_limit=time_limit,
            seed=seed,
            threads=source.threads,
            progress=steps(report, weights),
        )
    voice = TERMINAL._replace(audit=_audit_command(source, advice, unseen))
    commands = next_commands(source, advice, unseen)
    _show(output, advice, voice)
    output.next_commands(commands)
    go_back = _go_back(advice)
    if go_back is not None:
        output.say(f"  # to go back: {go_back}")
    contents = {"input": source.facts(), **advice.to_dict(voice), "commands": commands}
    contents["go_back"] = go_back
    # A page has room for the command that the terminal names in a remark.
    full = {"commands": next_commands(source, advice, unseen, from_all=True)}
    pages.write(output, lambda: data_of_advice(advice, origin_of(source), contents | full, voice))
    output.finish(contents)


def _future(source: Source, unseen: tuple[Path, ...]) -> Source | None:
    """Return the traffic to judge on, if it is given, which must be of the same model."""
    if not unseen:
        return None
    # Names in a file are those of INPUT's windows or sequences.
    names = source.group_by if source.group_by == FILES else None
    future = replace(source, input_files=unseen, group_by=names)
    advising.check_unseen(source.traffic, future.traffic)  # before anything is said
    return future


def _weigh_steps(traffic: Recording, searches: int, splits: int) -> list[float]:
    """Return about what steps of advice take, in their order, by a short search of a small trace.

    Measured of 9 and 400 million choices of experts; the longer a recording, the more is reading.
    """
    choices = traffic.choices / 1e8 if traffic.ordered else 0.0
    counting, replaying, judging = 0.15 + choices / 4, 0.3 + choices / 8, 0.3 + choices / 2
    searching, solving, moving = 1 + choices / 4, 2.5 + choices / 3, 0.1 + choices / 20
    steps_of_splits = [replaying, *(splits * [solving]), judging]
    # Halves, which are compared, are solved and judged where they differ.
    of_halves, fewer_moves = [0.1, *(2 * [solving + 1])], 3 + choices
    first = [counting, *(searches * [searching]), *steps_of_splits]
    return [*first, *of_halves, moving, fewer_moves]


def _show(output: Output, advice: Advice, voice: Voice) -> None:
    """Print the answer, why, the figures it rests on, and copies where they pay."""
    output.say("")
    output.verdict(advice.findings[0], advice.say_answer(voice))
    output.say(*(f"- {reason}" for reason in advice.say("reason", "cost", voice=voice)))
    output.say(*(f"! {warning}" for warning in advice.say("warning", voice=voice)))
    _show_figures(output, advice)
    if advice.by_group:
        windows = [write_windows_of(judged) for judged in advice.judged]
        head = ["group, unseen", *(column for name in windows for column in (name, "95 %"))]
        rows = [
            (group, *(cell for gain in gains.values() for cell in _cells(gain)))
            for group, gains in advice.by_group.items()
        ]
        output.say("")
        output.table(*with_values(head, rows))
    if len(advice.copies) > 1 and (advice.knee or advice.more is not None):
        output.say("")
        _show_copies(output, advice)


def _show_copies(output: Output, advice: Advice) -> None:
    """Print what numbers of slots for copies gain, each in every layer."""
    names = [f"windows of {tokens:,}" if tokens else "gain" for tokens in advice.copies[0].gains]
    # Buffers of low-latency kernels grow with the slots.
    head = ["slots for copies", *names, "per device", "DeepEP tokens", ""]
    notes = {advice.knee: " <- proposed", advice.more: " <- with more memory"}
    rows = [
        (
            str(row.per_device),
            *(signed(row.mean(window)) for window in row.gains),
            "-" if row.bytes_per_device is None else in_bytes(row.bytes_per_device),
            "-" if row.tokens_per_rank is None else f"{row.tokens_per_rank:,}",
            notes.get(row.per_device, ""),
        )
        for row in advice.copies
    ]
    output.table(*with_values(head, rows))


def _cells(gain: Comparison) -> tuple[str, str]:
    return signed(gain.gain), span(gain.low, gain.high)


def _show_figures(output: Output, advice: Advice) -> None:
    """Print figures of what runs, of EPLB's placement and of the proposed one, by window."""
    rows: dict[tuple[str, ...], list[str]] = {}
    order = [*advice.judged[0].gains]
    for judged in advice.judged:
        over_eplb = advice.over_eplb.get(judged.window)
        for measure, gain in judged.gains.items():
            figure = FIGURES[measure]
            if figure.regime not in (None, advice.settings["regime"]):
                continue
            values = [
                gain.before,
                *([] if over_eplb is None else [over_eplb.whole[measure].before]),
            ]
            texts = map(figure.text, [*values, gain.after])
            # What a token visits is the same in windows of all sizes.
            cells = (str(order.index(measure)), figure.column, *texts, *_cells(gain))
            rows.setdefault(cells, []).append(f"{judged.window:,}" if judged.window else "-")
    running = advice.settings["initial"].partition(":")[0].replace("_", "-")
    columns = ["running" if running == "given" else running]
    columns += ["EPLB"] * bool(advice.over_eplb) + ["proposed", "gain", "95 %"]
    head = ["figure", "window", *columns]
    table = [
        (column, "all" if len(windows) > 1 else windows[0], *cells)
        for (_, column, *cells), windows in sorted(rows.items(), key=lambda row: int(row[0][0]))
    ]
    output.say(f"{_name_unseen(advice)}:")
    output.table(*with_values(head, table))


def _name_unseen(advice: Advice) -> str:
    """Write on how much traffic the figures are, and in which order it comes."""
    replayed, kind = advice.main.after.replayed, "unseen " * advice.settings["held_out"]
    assert replayed is not None
    traffic, units = replayed.traffic, advice.units
    if units.name == "window" and units.kinds is not None:  # steps of the counters' windows
        drawn = f"{kind}steps drawn from {advice.main.gain.units} of {units.number} windows"
        return f"On {traffic.length:,} {drawn} of INPUT"
    order = ""
    if traffic.ordered:
        order = write_order(advice.settings["arrival"], advice.settings["engine"])
    return f"On {counted(traffic.length, kind + traffic.unit)}{order}"


def next_commands(
    source: Source, advice: Advice, unseen: Collection[Path] = (), *, from_all: bool = False
) -> list[str]:
    """Return the commands that come next, each with every option that changes its answer.

    With ``from_all`` the placement to serve, from all of INPUT, has a command of its own.
    """
    typed, line = options.typed(), options.next_command
    for name in ("threads", "report_file", "figures", "json_file", "unseen"):
        typed.pop(name, None)

    file = shlex.join(map(str, source.input_files))
    if advice.answer == "not now":
        reading = {field.name: typed.get(field.name) for field in fields(Source)}
        again = "again, when traffic, engine or the number of devices has changed"
        return [
            line("inspect", file, reading, "what there is to win, layer by layer"),
            line("advise", "NEWER", _of_other(typed, "NEWER"), again),
        ]
    if advice.answer != "worth a trial":
        return _recording(source, advice, typed)
    judging = _judging(source, advice, typed, unseen, from_all=from_all)
    return [*judging, *_serving(source, advice)]


def _recording(source: Source, advice: Advice, typed: dict[str, Any]) -> list[str]:
    """Return the commands that record more: by INPUT's engine, each kind of traffic by itself."""
    line = options.next_command
    engine = advice.settings["engine"] or engine_of(reader_of(source.input_files[0]))
    if engine is not None and ENGINES[engine].record:
        command = ENGINES[engine].record.format(devices=advice.problem.devices)
        page = f"docs/engines/{engine.replace('-', '_')}.md"
        return [
            f"{command}  # record into MORE, a file for each kind of traffic: {page}",
            # Groups are then called as the files are.
            line("advise", "MORE", {**typed, "group_by": FILES, "only": None}),
        ]
    typed = _of_other(typed, "MORE")
    if advice.main.window is None:
        return [line("advise", "MORE", typed, "MORE: more windows, of all kinds of traffic")]
    return [
        "moetuner collect MODEL --dataset FILE --out MORE  # more sequences, of all kinds; or "
        "as the engine records them, see docs/engines",
        line("advise", "MORE", typed),
    ]


def _of_other(typed: dict[str, Any], name: str) -> dict[str, Any]:
    """Return options of another recording, which a file of INPUT's names does not fit."""
    names = typed.get("group_by")
    if names is None or names == FILES:
        return typed
    # The names of other requests, windows or sequences, as NEWER.csv:kind for mine.csv:kind.
    ending = re.search(r"(\.\w+(:.*)?)?$", str(names))
    return {**typed, "group_by": f"{name}{ending[0] if ending else ''}"}


def _judging(
    source: Source,
    advice: Advice,
    typed: dict[str, Any],
    unseen: Collection[Path],
    *,
    from_all: bool,
) -> list[str]:
    """Return the commands that compute the placement, and show the figure that it was judged by."""
    file, future = (shlex.join(map(str, each)) for each in (source.input_files, unseen))
    problem, main, settings = advice.problem, advice.main, advice.settings
    initial, window, traffic = settings["initial"], settings["windows"][0], source.traffic
    why = "the placement that was judged"
    solving = {**typed, "expert_bytes": None, "seed": settings["seed"]}
    # The windows that were searched for, which INPUT's own would not all be.
    if window is None:  # windows are given
        solving |= {"window": None, "arrival": None}
    elif {*problem.shares} == {window}:
        solving["window"] = window
    else:
        solving |= {"window": None, "phases": f"{problem.shares.get(WINDOWS[1], 0.0):g}"}
    if traffic.has_pairs:
        why = "from all of INPUT with its pairs, which cannot be held out"
    elif not unseen:
        why += "" if from_all else "; leave out --holdout to use all of INPUT for serving"
        solving["holdout"] = HOLDOUT

    def solve(slots: int, why: str, **others: Any) -> str:
        is_default = slots * problem.devices == problem.experts
        is_default &= problem.topology.slots_per_device is None
        solving["slots_per_device"] = None if is_default else slots
        return options.next_command("solve", file, {**solving, **others}, why)

    commands = []
    baseline, placed = _running_file(advice), _proposed_file(advice)
    if initial not in ("given", "contiguous"):
        slots = slots_of_running(initial, problem.experts, problem.devices)
        method_and_file = {
            "method": initial.partition(":")[0],
            "out_file": (baseline := RUNNING_FILE),
        }
        commands.append(solve(slots, f"what runs: {name_running(initial)}", **method_and_file))
    if problem.has_slots_for(advice.placements[0]):
        solving["initial_file"] = initial if baseline is None else baseline
    commands.append(solve(problem.slots, why, out_file=placed))
    values = {field.name: typed.get(field.name) for field in fields(Source)}
    values |= {"expert_bytes": typed.get("expert_bytes"), "baseline": baseline}
    values |= {"window": None if main.window == window else main.window}
    values |= {"report_file": "report.html"}
    report = options.next_command("report", f"{placed} {future or file}", values)
    commands.append(report)
    if advice.more is not None:
        slots = problem.slots + advice.more - advice.knee
        more = options.apart_from(_running_file(advice), "more.json")
        commands.append(solve(slots, "the one with more memory", out_file=more))
    if from_all and "holdout" in solving:
        to_serve = {"holdout": None, "out_file": placed}
        commands.append(
            solve(problem.slots, "the placement to serve: from all of INPUT", **to_serve)
        )
    return commands


def _audit_command(source: Source, advice: Advice, unseen: Collection[Path]) -> str:
    """Return the command that shows which groups the proposed placement serves worse."""
    files, initial = unseen or source.input_files, advice.settings["initial"]
    values: dict[str, Any] = {"window": advice.main.window, "baseline": None}
    if initial != "contiguous":
        values["baseline"] = _running_file(advice) or RUNNING_FILE
    judged = f"{_proposed_file(advice)} {shlex.join(map(str, files))}"
    return options.next_command("audit", judged, values)


def _running_file(advice: Advice) -> str | None:
    """Return the file of what runs, if --initial names one."""
    return options.typed()["initial"] if advice.settings["initial"] == "given" else None


def _proposed_file(advice: Advice) -> str:
    """Return where the next commands write the proposed placement: not over what runs."""
    return options.apart_from(_running_file(advice), "placement.json")


def _go_back(advice: Advice) -> str | None:
    """Return what takes the placement away again; None where none is proposed."""
    return way_back(advice.settings["engine"]) if advice.answer == "worth a trial" else None


def _serving(source: Source, advice: Advice) -> list[str]:
    """Return the commands that export the placement, and serve it."""
    problem, why = advice.problem, ""
    hidden, dense = source.layer_words()
    if (hidden, dense) == ("N", "A-B"):
        hidden, dense = str(problem.layers), "none"
        why = "  # if all layers of the model have experts"
    redundant = problem.devices * problem.slots - problem.experts
    return serving_commands(
        advice.settings["engine"],
        devices=problem.devices,
        redundant=redundant,
        nodes=problem.topology.nodes,
        split=problem.split,
        placement=_proposed_file(advice),
        hidden_layers=hidden,
        dense_layers=dense,
        note=why,
    )
