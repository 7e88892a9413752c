"""``moetuner drift``: whether traffic has left the profile that a placement was computed from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moetuner import _texts
from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.groups import FILES
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.placed import Placed, read_hints
from moetuner.cli.options.serving import ServingOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, shares, working
from moetuner.cli.recipes import to_solve_again
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.reading import Progress, scale_progress
from moetuner.placement import Placement
from moetuner.problem.made import Made
from moetuner.recording import Recording
from moetuner.report.advice import drift as measuring
from moetuner.report.findings import Finding
from moetuner.report.outcome import find_times_of
from moetuner.serving import Serving
from moetuner.serving.phases import WINDOWS
from moetuner.trace import RoutingTrace

# Exit status where the traffic has drifted, or the placement serves it worse than was allowed.
DRIFTED = 3
SHOWN = ("imbalance", "predicted_layer_us")
# Windows of prefill that both sides have, and how many times as long as others they must be.
LEAST_WINDOWS = 4


@options.command("drift", example="placement.json newer.safetensors")
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    source: Source,
    profile_files: tuple[Path, ...] = option(
        options.IN_INPUT, "FILE", (), flag="--profile", multiple=True
    ),
    machine: Machine,
    serving: ServingOptions,
    fail_if_drift: bool = option(is_flag=True, default=False),
    fail_if_worse: float | None = option(options.Number(min=0), "PCT"),
    seed: int = options.seed_option(),
    output: Output,
) -> int:
    """Check whether traffic has drifted from a placement's profile.

    INPUT is recent traffic. The loads of its experts are compared with those of the profile, and
    the difference with what chance alone would give; then the placement is replayed on both.

    Parameters
    ----------
    profile_files
        What PLACEMENT was computed from: a trace, statistics or a load table; may be repeated.
        [default: the files in its settings]
    fail_if_drift
        Exit with status 3 if the traffic has drifted from the profile.
    fail_if_worse
        Exit with status 3 if the placement serves INPUT worse than the profile by more than so many
        percent, drifted or not.
    """
    source = source.with_hints(read_hints(placement_file))
    placed = Placed.read(placement_file, source, machine, serving)
    files = profile_files or _named(placed.made, placement_file, *source.input_files)
    # Groups that were placed for are the profile's; an option chooses among those of INPUT alone.
    only = placed.made.input.only or ()
    if profile_files and not source.only:  # a file of these groups alone, perhaps
        only = ()
    # The groups of INPUT are no groups of the profile, whose own the placement remembers.
    names = FILES if source.group_by == FILES else None
    profile = replace(placed.source, input_files=files, only=only, group_by=names)
    profile = profile.as_placed(placed.made, placement_file)
    on_profile = replace(placed, source=profile)
    if fail_if_drift or fail_if_worse is not None:
        on_profile.check_gate()
    with working("comparing the expert shares") as report:
        # Counts as recorded: fewer of them would be less evidence.
        recorded = (profile.recorded, source.recorded)
        drifted = measuring.drift(*recorded, seed=seed, progress=shares(report, "", then="shares"))
    # A placement is flattered by what it was computed from: what was held out is not that.
    unseen, _, part = on_profile.judged
    placement = placed.placement
    with working("replaying") as report:
        now = placed.source, placed.source.traffic
        progress = shares(report, "of the tokens", then="figures")
        rows = _replayed(placement, placed.serving, source.window, (profile, unseen), now, progress)
    worst = max(rows, key=lambda row: row["change"])
    output.say(
        f"profile: {profile.describe()}", f"now: {placed.source.describe()}", *placed.differences()
    )
    if profile.missing_names is not None:
        output.say(f"Warning: {on_profile.names_warning}")
    if part["is_seen"] is False and "holdout" not in part:
        output.tell(Finding("another profile", role="warning"))
    _show(output, placement_file, drifted, rows)
    output.tell(*find_times_of(placed.serving, source.traffic))
    output.say("")
    headline = measuring.conclude_drift(drifted, worst)
    answer = headline.forces
    output.verdict(headline)
    again = to_solve_again(placement_file, placed, machine, worst["window"]).command
    if answer == "worse":
        output.say(f"  {again}")
    is_worse = fail_if_worse is not None and 100 * worst["change"] > fail_if_worse
    failed = is_worse or (fail_if_drift and answer != "not left")
    contents: dict[str, Any] = {"input": source.facts(), "profile": profile.facts()}
    served = placed.serving.facts()
    contents |= {"placement": str(placement_file), "settings": served}
    contents |= {"answer": answer, "drift": drifted.to_dict(), "figures": rows}
    output.finish(contents | {"command": again, "failed": failed})
    return DRIFTED if failed else 0


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


def _replayed(
    placement: Placement,
    serving: Serving,
    window: int | None,
    before: tuple[Source, Recording],
    after: tuple[Source, Recording],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return figures of a placement on two recordings, by window, and how much worse they got."""
    tokens = [part.tokens for _, part in (before, after) if isinstance(part, RoutingTrace)]
    first, windows = after[0].replayed, list[int | None]([None])
    if len(tokens) == 2 and first is not None:
        # Windows are of as many tokens on both sides: a short recording is one window by itself.
        windows = [min(first, *tokens)]
        # If no window is given, those of prefill too, as long as both sides have four.
        longer = min(WINDOWS[-1], min(tokens) // LEAST_WINDOWS)
        if window is None and longer >= LEAST_WINDOWS * first:
            windows.append(longer)
    # Windows of counts may be as long as they were recorded, and so are their times.
    measure = SHOWN[before[0].counted == after[0].counted is not None]
    rows, done, passes = [], 0, 2 * len(windows)
    for window in windows:
        row: dict[str, Any] = {"window": window, "measure": measure}
        for name, (source, part) in (("profile", before), ("now", after)):
            replayed = window if window is not None else source.replayed
            served = replace(serving, window=replayed)
            options = ReplayOptions(threads=source.threads)
            own_progress = scale_progress(progress, done / passes, (done + 1) / passes)
            [[figures]] = evaluate_each([placement], part, [served], options, progress=own_progress)
            done += 1
            row[name] = {measure: getattr(figures, measure) for measure in SHOWN}
        old, new = row["profile"][measure], row["now"][measure]
        rows.append(row | {"change": new / old - 1 if old else 0.0})
    return rows


def _named(made: Made, *beside: Path) -> tuple[Path, ...]:
    """Return the files that a placement names as its input, here or beside others."""
    names = made.input.files or ()
    for folder in (Path(), *(path.parent for path in beside)):
        for places in (names, [Path(name).name for name in names]):
            files = tuple(folder / place for place in places)
            if files and all(path.exists() for path in files):
                return files
    where = f" ({', '.join(names)} is not here)" if names else ""
    raise click.UsageError(
        f"Missing option '--profile', what PLACEMENT was computed from{where}: a trace, statistics "
        "or a load table."
    )
