"""``moetuner convert``: recorded routing of any kind into one trace file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from moetuner._checks import ArgumentError
from moetuner._texts import name
from moetuner.cli import options
from moetuner.cli.options import argument, kinds, option
from moetuner.cli.output import Output, show_shares, working
from moetuner.counting import count, total
from moetuner.files import naming
from moetuner.files.opened import Opened
from moetuner.formats import READERS, find_reader, native, read_input, read_map
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.sources import list_files
from moetuner.report import recording
from moetuner.trace import RoutingTrace

AUTO = "auto"
FORMATS = "".join(f"\n\n{name}: {reader.title}." for name, reader in READERS.items())


@options.command(
    "convert",
    example="trace.safetensors newer.safetensors --out both.safetensors",
    epilog=f"Formats of sources:{FORMATS}",
)
def command(
    *,
    sources: tuple[Path, ...] = argument("SOURCE...", kinds.IN_INPUT, nargs=-1, required=True),
    form: str = option(click.Choice([AUTO, *READERS]), default=AUTO, flag="--from"),
    out_file: Path = options.trace_option(),
    counts: bool = option(is_flag=True, default=False, flag="--count"),
    sample: int | None = option(kinds.COUNT, "N"),
    skip_unreadable: bool = option(is_flag=True, default=False),
    running_file: Path | None = option(kinds.IN_FILE, "MAP"),
    file_hints: options.FileHints,
    output: Output,
) -> None:
    """Join recordings into one trace, or count recordings of any size.

    A source is a file or a folder: moetuner's own, or as an engine recorded it. They are joined one
    after the other. Sequences of different sources stay different; groups of the same name become
    one. If engines recorded counts, the result is counts too.

    With --count every source is a recording of its own, and read by itself. The result has exact
    loads of all of them, and a sample of their tokens; it is as good an INPUT as a trace. Sources
    may have been counted already, on other machines. Name them in the order of time.

    Parameters
    ----------
    counts
        Count the sources one by one, and keep a sample of them.
    sample
        Most tokens, or windows, that --count keeps. [default: 1048576 tokens, 2048 windows]
    skip_unreadable
        Leave out sources that --count cannot read, and say which.
    form
        Format of the sources; auto detects it from their content.
    running_file
        Map of experts that ran, in any format of export, if a source counts slots (TensorRT-LLM's
        and vllm-ascend's balancers).
    """
    hints = Hints(**file_hints.hints)
    if running_file is not None:
        hints = replace(hints, running=read_map(running_file, hints).experts)
    reader = None if form == AUTO else form
    unreadable: dict[Path, str] = {}
    remarks: list[str] = []
    if counts:
        traffic, unreadable, remarks = _count_sources(
            sources, hints, reader, sample, skip_unreadable=skip_unreadable
        )
    elif sample is not None or skip_unreadable:
        flag = "--sample" if sample is not None else "--skip-unreadable"
        raise click.UsageError(f"'{flag}' needs '--count'.")
    else:
        with working(f"reading {len(sources)} sources"):
            traffic = read_input(sources, hints, reader)
    with working(f"writing {out_file}"):
        if isinstance(traffic, RoutingTrace):
            kind = "trace"
            # Counts are the same bytes wherever they were made.
            names = None if counts else ", ".join(source.name for source in sources)
            traffic.save(out_file, source=names)
        else:
            kind = "statistics"
            traffic.save(out_file)
    output.say(f"wrote {recording.describe([out_file], traffic)}")
    output.say(*(f"! {remark}" for remark in remarks))
    output.finish(
        {
            "sources": [str(source) for source in sources],
            kind: recording.facts([out_file], traffic),
            **({"unreadable": [*map(str, unreadable)]} if skip_unreadable else {}),
        }
    )


def _count_sources(
    sources: Sequence[Path],
    hints: Hints,
    reader: str | None,
    sample: int | None,
    *,
    skip_unreadable: bool,
) -> tuple[Traffic, dict[Path, str], list[str]]:
    """Count recordings one by one, and add them up; an interrupt ends with those counted so far.

    Returns
    -------
    tuple
        The counts, errors by sources that could not be read, and what was left out, in words.
    """
    files = _list_recordings(sources)
    unreadable: dict[Path, str] = {}
    remarks: list[str] = []
    counted: Traffic | None = None
    for number, source in enumerate(files, 1):
        with working(f"counting {source.name}, {number} of {len(files)}") as report:
            progress = show_shares(report, "of the tokens", then="sample")
            try:
                traffic = read_input([source], hints, reader)
                added = count(traffic, sample=sample, progress=progress)
            except KeyboardInterrupt:
                if counted is None:
                    raise
                break
            except ArgumentError:  # of an option, not of the source
                raise
            except (ValueError, OSError) as error:
                if not skip_unreadable:
                    raise
                unreadable[source] = str(error)
                remarks.append(f"{name(source.name)} was left out: {error}")
                continue
            if traffic.has_pairs:
                remarks.append(
                    f"{name(source.name)}: pairs and expert sets were counted over all of its "
                    "windows, and are left out"
                )
        with naming(source), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            counted = added if counted is None else total([counted, added])
        remarks += [f"{name(source.name)}: {warning.message}" for warning in caught]
    if counted is None:
        first = next(iter(unreadable.values()), "they hold no files")
        raise click.UsageError(f"no source could be read: {first}")
    assert counted.population is not None
    failed = counted.population.unreadable + len(unreadable)
    counted = replace(counted, population=replace(counted.population, unreadable=failed))
    return counted, unreadable, remarks


def _list_recordings(sources: Sequence[Path]) -> list[Path]:
    """List what is counted by itself: every source, and every file of a folder of moetuner's own.

    Files of an engine's ranks are one recording together.
    """
    recordings: list[Path] = []
    for source in sources:
        file = Opened(source)
        is_folder = source.is_dir() and find_reader(file) in native.KINDS
        recordings += [each.path for each in list_files([file])] if is_folder else [source]
    return recordings
