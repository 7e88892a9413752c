"""``moetuner drift``: whether traffic still fits the profile that a placement was computed from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moetuner import _texts
from moetuner.cli import options
from moetuner.cli.options import argument, kinds, option
from moetuner.cli.options.groups import FILES
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import ServingOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, show_shares, working
from moetuner.cli.recipes import make_recipe_to_solve
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import Progress, split_progress
from moetuner.files.opened import Opened
from moetuner.problem.made import Made
from moetuner.report.advice import drift as measuring
from moetuner.report.findings import Finding
from moetuner.report.outcome import find_times_of
from moetuner.serving.phases import WINDOWS

# Exit status where the traffic has drifted, or the placement serves it worse than was allowed.
DRIFTED = 3
SHOWN = ("imbalance", "predicted_layer_us")
# Windows of prefill are compared too if both sides fill so many of them, and if they are so many
# times as long as the others.
LEAST_WINDOWS = 4
FLATTERED = (
    "'--fail-if-worse': the placement was computed from all of its profile, where it is better "
    "than on any other traffic of that kind; name traffic that it was not computed from with "
    '--profile, solve with "--holdout 0.5", or use --fail-if-drift.'
)


@options.command("drift", example="placement.json newer.safetensors")
def command(
    *,
    placement_file: Path = argument("PLACEMENT", kinds.IN_FILE),
    source: Source,
    profile_files: tuple[Path, ...] = option(
        kinds.IN_INPUT, "FILE", (), flag="--profile", multiple=True
    ),
    machine: Machine,
    serving: ServingOptions,
    fail_if_drift: bool = option(is_flag=True, default=False),
    fail_if_worse: float | None = option(kinds.Number(min=0), "PCT"),
    seed: int = options.seed_option(),
    output: Output,
) -> int:
    """Check whether traffic has drifted from a placement's profile.

    INPUT is recent traffic. The loads of its experts are compared with those of the profile, and
    the difference with what chance alone would give; then the placement is replayed on both.

    Parameters
    ----------
    profile_files
        Traffic that PLACEMENT was computed from: a trace, statistics or a load table; may be
        repeated. [default: the files in its settings]
    fail_if_drift
        Exit with status 3 if the traffic has drifted from the profile.
    fail_if_worse
        Exit with status 3 if the placement serves INPUT worse than the profile by more than so many
        percent, drifted or not. It has to have a part of the profile that it was not computed from.
    """
    placed = Placed.read(Opened(placement_file), source, machine, serving)
    source = placed.typed
    profile = _make_profile(placed, placement_file, profile_files)
    on_profile = replace(placed, source=profile)
    if fail_if_drift or fail_if_worse is not None:
        on_profile.check_gate()
    # The part that was held out does not flatter the placement, as the rest of its profile does.
    is_seen = on_profile.parts.facts["is_seen"]
    if is_seen and fail_if_worse is not None:
        raise click.UsageError(FLATTERED)
    with working("comparing the expert shares") as report:
        # Counts as recorded: fewer of them would be less evidence.
        recorded = (profile.recorded, source.recorded)
        drifted = measuring.drift(
            *recorded, seed=seed, progress=show_shares(report, "", then="shares")
        )
    with working("replaying") as report:
        progress = show_shares(report, "of the tokens", then="figures")
        rows = _replay(on_profile, placed, progress)
    worst = max(rows, key=lambda row: row["change"])
    _introduce(output, on_profile, placed)
    _show(output, placement_file, drifted, rows)
    output.tell(*find_times_of(placed.serving, source.traffic))
    output.say("")
    limit = None if fail_if_worse is None else fail_if_worse / 100
    headline = measuring.conclude_drift(drifted, worst, limit=limit, is_seen=is_seen is True)
    answer = headline.forces
    output.verdict(headline)
    again = make_recipe_to_solve(placement_file, placed, machine, worst["window"]).command
    if answer == "worse":
        output.say(f"  {again}")
    is_worse = limit is not None and answer == "worse"
    failed = is_worse or (fail_if_drift and drifted.is_beyond_chance)
    contents: dict[str, Any] = {"input": source.facts, "profile": profile.facts}
    served = placed.serving.facts()
    contents |= {"placement": str(placement_file), "settings": served}
    contents |= {"answer": answer, "drift": drifted.to_dict(), "figures": rows}
    output.finish(contents | {"command": again, "failed": failed})
    return DRIFTED if failed else 0


def _make_profile(placed: Placed, placement_file: Path, files: tuple[Path, ...]) -> Source:
    """Return the traffic that the placement was computed from, of ``files`` if there are some."""
    source = placed.typed
    # The profile has the groups of the placement; --only chooses among those of INPUT.
    only = placed.made.input.only or ()
    if files and not source.only:  # a file of these groups alone, perhaps
        only = ()
    # --group-by names groups of INPUT; the placement remembers those of the profile.
    names = FILES if source.group_by == FILES else None
    files = files or _find_profile(placed.made, placement_file, *source.input_files)
    profile = placed.source.like(input_files=files, only=only, group_by=names)
    return profile.as_placed(placed.made, placement_file)


def _introduce(output: Output, on_profile: Placed, placed: Placed) -> None:
    """Print what the profile and INPUT are, and whether the placement has seen the profile."""
    for name, source in (("profile", on_profile.source), ("now", placed.source)):
        line, *notes = source.lines
        output.say(f"{name}: {line}", *notes)
    output.say(*placed.differences())
    if on_profile.source.missing_names is not None:
        output.say(f"Warning: {on_profile.names_warning}")
    facts = on_profile.parts.facts
    if facts["is_seen"] is False and "holdout" not in facts:
        output.tell(Finding("another profile", role="warning"))
    if facts["is_seen"]:
        output.tell(Finding("seen profile"))


def _show(
    output: Output, placement_file: Path, drifted: measuring.Drift, rows: list[dict[str, Any]]
) -> None:
    """Print how far the traffic is from the profile, and the placement's figures on both."""
    fields = ("distance", "expected", "worst_layer", "worst_distance")
    shares = {name: getattr(drifted, name) for name in fields}
    output.tell(Finding("shares of experts", shares))
    output.say("")
    cells = [
        (
            f"{name}, windows of {row['window']:,}" if row["window"] else f"{name}, its windows",
            *(FIGURES[measure].text(row[name][measure]) for measure in SHOWN),
        )
        for row in rows
        for name in ("profile", "now")
    ]
    head = (_texts.name(placement_file.name), *(FIGURES[name].column for name in SHOWN))
    output.table(head, cells)


def _replay(on_profile: Placed, placed: Placed, progress: Progress) -> list[dict[str, Any]]:
    """Return a placement's figures on its profile and on INPUT, and their change, by window."""
    sides = {
        "profile": (on_profile.source, on_profile.parts.judged_on),
        "now": (placed.source, placed.source.traffic),
    }
    tokens = [traffic.length for _, traffic in sides.values() if traffic.ordered]
    first, windows = placed.source.replay_window, list[int | None]([None])
    if len(tokens) == 2 and first is not None:
        # Both sides have windows of one size: a short recording is one window.
        windows = [min(first, *tokens)]
        # Without --window, windows of prefill are compared too, if both sides have four of them.
        longer = min(WINDOWS[-1], min(tokens) // LEAST_WINDOWS)
        if placed.typed.window is None and longer >= LEAST_WINDOWS * first:
            windows.append(longer)
    # Recorded windows of different sizes have different times, so only their imbalance is compared.
    sizes = {source.counting_window for source, _ in sides.values()}
    have_one_size = len(sizes) == 1 and None not in sizes
    measure = "predicted_layer_us" if have_one_size else "imbalance"
    rows, done, passes = [], 0, 2 * len(windows)
    for window in windows:
        row: dict[str, Any] = {"window": window, "measure": measure}
        for name, (source, traffic) in sides.items():
            replayed = window if window is not None else source.replay_window
            served = replace(placed.serving, window=replayed)
            options = ReplayOptions(threads=source.threads)
            report = split_progress(progress, done, passes)
            [[figures]] = evaluate_each(
                [placed.placement], traffic, [served], options, progress=report
            )
            done += 1
            row[name] = {shown: getattr(figures, shown) for shown in SHOWN}
        old, new = row["profile"][measure], row["now"][measure]
        rows.append(row | {"change": new / old - 1 if old else 0.0})
    return rows


def _find_profile(made: Made, *neighbours: Path) -> tuple[Path, ...]:
    """Find the files that a placement names as its input, here or in the folders of neighbours."""
    names = made.input.files or ()
    for folder in (Path(), *(path.parent for path in neighbours)):
        for paths in (names, [Path(name).name for name in names]):
            files = tuple(folder / path for path in paths)
            if files and all(path.exists() for path in files):
                return files
    where = f" ({', '.join(names)} is not here)" if names else ""
    raise click.UsageError(
        f"Missing option '--profile', what PLACEMENT was computed from{where}: a trace, statistics "
        "or a load table."
    )
