"""``moetuner collect``: run texts through a model and record its routing."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TextIO

import click

from moetuner.cli import options
from moetuner.cli.options.traffic import describe, facts
from moetuner.cli.output import Output, working
from moetuner.solver import Progress


@click.command("collect")
@click.argument("model", metavar="MODEL", shell_complete=options.completing(files=True))
@click.option(
    "--dataset",
    type=options.IN_FILE,
    required=True,
    metavar="FILE",
    help='Texts: one per line, or JSON lines with "text" and perhaps "group".',
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
    "--max-tokens",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Tokens after which to stop.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Texts that run at once.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens after which a text is cut.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the weights; auto takes them as they are stored.",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help='Where to run, such as cpu or cuda:1; "auto" spreads the model over all devices. CUDA if '
    "there is any, by default.",
)
@options.json_option
def command(
    model: str,
    dataset: Path,
    out_file: Path,
    max_tokens: int,
    batch_size: int,
    sequence_length: int,
    dtype: str,
    device: str | None,
    json_file: Path | None,
) -> None:
    """Run texts through MODEL and record which experts they visit.

    MODEL is a folder that transformers can load, with its tokenizer, or a name on its hub. Needs
    torch and transformers.
    """
    begin = time.monotonic()
    with working(f"running {model}") as report, warnings.catch_warnings():
        # What was left out, or kept of a recording that was interrupted, is told in a line.
        show = warnings.showwarning

        def told(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is RuntimeWarning:
                click.echo(f"moetuner: warning: {message}", err=True)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = told
        # These take seconds to import, and not everybody has them.
        try:
            from moetuner.torch.collect import collect

            trace = collect(
                model,
                dataset,
                out_file,
                max_tokens=max_tokens,
                batch_size=batch_size,
                sequence_length=sequence_length,
                dtype=dtype,
                device=device,
                progress=lambda tokens: report(
                    Progress(time.monotonic() - begin, f"{tokens:,} of {max_tokens:,} tokens")
                ),
            )
        except (ImportError, RuntimeError) as error:
            # What is missing, or a device that is not there: neither is a bug in moetuner.
            raise click.ClickException(str(error)) from error
    output = Output(json_file)
    output.say(f"wrote {describe([out_file], trace)}")
    output.finish({"model": model, "dataset": str(dataset), "trace": facts([out_file], trace)})
