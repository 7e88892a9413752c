"""``moetuner convert``: recorded routing of any kind into one trace file."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options.traffic import describe, facts
from moetuner.cli.output import Output, working
from moetuner.files import kind_of
from moetuner.trace import RoutingTrace

FORMATS = ("auto", "safetensors", "npz", "npy", "jsonl")


@click.command("convert")
@click.argument("sources", metavar="SOURCE...", type=options.IN_FILE, nargs=-1, required=True)
@click.option(
    "--from",
    "form",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="Format of the sources; auto tells by their content.",
)
@click.option(
    "--out",
    "out_file",
    type=options.OutFile(".safetensors"),
    required=True,
    metavar="TRACE",
    help="Trace to write, ending in .safetensors.",
)
@click.option(
    "--num-experts",
    type=click.IntRange(1, 65536),
    metavar="E",
    help="Experts per layer, where a source does not say (.npy).",
)
@options.json_option
def command(
    sources: tuple[Path, ...],
    form: str,
    out_file: Path,
    num_experts: int | None,
    json_file: Path | None,
) -> None:
    """Join sources, one after the other, into one trace.

    Sequences of different sources stay different; groups of the same name become one.
    """
    for source in sources:
        found = kind_of(source)
        if form not in ("auto", found):
            raise ValueError(f"{source}: must be {form} as --from says, got {found}")
    with working(f"reading {len(sources)} sources"):
        trace = RoutingTrace.concat(
            [RoutingTrace.load(source, num_experts=num_experts) for source in sources]
        )
    with working(f"writing {out_file}"):
        trace.save(out_file, source=", ".join(source.name for source in sources))
    output = Output(json_file)
    output.say(f"wrote {describe(out_file, trace)}")
    output.finish({"sources": [str(source) for source in sources], "trace": facts(out_file, trace)})
