"""``moetuner convert``: recorded routing of any kind into one trace file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options.traffic import describe, facts
from moetuner.cli.output import Output, working
from moetuner.formats import READERS, read_input, read_map
from moetuner.formats.hints import Hints
from moetuner.trace import RoutingTrace

AUTO = "auto"
FORMATS = "".join(f"\n\n{name}: {reader.title}." for name, reader in READERS.items())


@click.command("convert", epilog=f"Formats of sources:{FORMATS}")
@click.argument("sources", metavar="SOURCE...", type=options.IN_INPUT, nargs=-1, required=True)
@click.option(
    "--from",
    "form",
    type=click.Choice([AUTO, *READERS]),
    default=AUTO,
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
@click.option(
    "--running",
    "running_file",
    type=options.IN_FILE,
    metavar="MAP",
    help="Map of experts that ran, in any format of export, where a source counts slots "
    "(TensorRT-LLM's and vllm-ascend's balancers).",
)
@options.top_k_option
@options.hidden_layers_option
@options.dense_layers_option
@options.json_option
def command(
    sources: tuple[Path, ...],
    form: str,
    out_file: Path,
    num_experts: int | None,
    running_file: Path | None,
    top_k: int | None,
    hidden_layers: int | None,
    dense_layers: tuple[int, ...] | None,
    json_file: Path | None,
) -> None:
    """Join sources, one after the other, into one trace; or counts, where engines recorded those.

    A source is a file or a folder, of moetuner's own or as an engine recorded it. Sequences of
    different sources stay different; groups of the same name become one.
    """
    hints = Hints(num_experts, top_k, hidden_layers, dense_layers)
    if running_file is not None:
        hints = replace(hints, running=read_map(running_file, hints).experts)
    with working(f"reading {len(sources)} sources"):
        traffic = read_input(sources, hints, None if form == AUTO else form)
    with working(f"writing {out_file}"):
        if isinstance(traffic, RoutingTrace):
            traffic.save(out_file, source=", ".join(source.name for source in sources))
        else:
            traffic.save(out_file)
    output = Output(json_file)
    output.say(f"wrote {describe([out_file], traffic)}")
    kind = "trace" if isinstance(traffic, RoutingTrace) else "statistics"
    output.finish(
        {"sources": [str(source) for source in sources], kind: facts([out_file], traffic)}
    )
