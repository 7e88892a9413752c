"""``moetuner convert``: recorded routing of any kind into one trace file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.output import Output, working
from moetuner.formats import READERS, read_input, read_map
from moetuner.formats.hints import Hints
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
    sources: tuple[Path, ...] = argument("SOURCE...", options.IN_INPUT, nargs=-1, required=True),
    form: str = option(click.Choice([AUTO, *READERS]), default=AUTO, flag="--from"),
    out_file: Path = options.trace_option(),
    running_file: Path | None = option(options.IN_FILE, "MAP"),
    file_hints: options.FileHints,
    output: Output,
) -> None:
    """Join recordings into one trace.

    A source is a file or a folder: moetuner's own, or as an engine recorded it. They are joined one
    after the other. Sequences of different sources stay different; groups of the same name become
    one. If engines recorded counts, the result is counts too.

    Parameters
    ----------
    form
        Format of the sources; auto detects it from their content.
    running_file
        Map of experts that ran, in any format of export, if a source counts slots (TensorRT-LLM's
        and vllm-ascend's balancers).
    """
    hints = Hints(**file_hints.hints)
    if running_file is not None:
        hints = replace(hints, running=read_map(running_file, hints).experts)
    with working(f"reading {len(sources)} sources"):
        traffic = read_input(sources, hints, None if form == AUTO else form)
    with working(f"writing {out_file}"):
        if isinstance(traffic, RoutingTrace):
            kind = "trace"
            traffic.save(out_file, source=", ".join(source.name for source in sources))
        else:
            kind = "statistics"
            traffic.save(out_file)
    output.say(f"wrote {recording.describe([out_file], traffic)}")
    output.finish(
        {"sources": [str(source) for source in sources], kind: recording.facts([out_file], traffic)}
    )
