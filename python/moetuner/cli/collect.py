"""``moetuner collect``: run texts through a model and record its routing."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options.traffic import describe, facts
from moetuner.cli.output import Output, working
from moetuner.solver import Progress

POSITIVE = click.IntRange(min=1)


def _number(flag: str, text: str, default: int) -> options.Decorator:
    """Return an option of a number from 1."""
    return options.option(flag, POSITIVE, "N", text, default=default, show_default=True)


@click.command("collect")
@click.argument("model", metavar="MODEL", shell_complete=options.completing(files=True))
@options.option(
    "--dataset",
    options.IN_FILE,
    "FILE",
    'Texts: one per line, or JSON lines with "text" and optionally "group".',
    required=True,
)
@options.trace_option
@_number("--max-tokens", "Tokens after which recording ends.", 100_000)
@_number("--batch-size", "Texts that run at once.", 8)
@_number("--sequence-length", "Tokens after which a text is cut.", 1024)
@options.option(
    "--dtype",
    click.Choice(["auto", "float32", "bfloat16", "float16"]),
    None,
    "Type of the weights; auto keeps the type in which they are stored.",
    default="auto",
    show_default=True,
)
@options.option(
    "--device",
    str,
    "DEVICE",
    'Device to run on, such as cpu or cuda:1; "auto" spreads the model over all devices.  '
    "[default: cuda, else cpu]",
)
@options.json_option
def command(model: str, dataset: Path, out_file: Path, json_file: Path | None, **how: Any) -> None:
    """Record which experts texts visit in a model.

    MODEL is a folder that transformers can load, with its tokenizer, or a name on its hub. Needs
    torch and transformers.
    """
    begin, most = time.monotonic(), how["max_tokens"]
    with working(f"running {model}") as report, warnings.catch_warnings():
        # What was left out, or saved of a recording that was interrupted, is said in a line.
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *others: Any) -> None:
            if category is RuntimeWarning:
                click.echo(f"moetuner: warning: {message}", err=True)
            else:
                show(message, category, *others)

        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = say  # type: ignore[assignment]

        def count(tokens: int) -> None:
            report(Progress(time.monotonic() - begin, f"{tokens:,} of {most:,} tokens"))

        # These take seconds to import, and not everybody has them.
        try:
            from moetuner.torch.collect import collect

            trace = collect(model, dataset, out_file, progress=count, **how)
        except (ImportError, RuntimeError) as error:
            # A missing library or device is not a bug in moetuner.
            raise click.ClickException(str(error)) from error
    output = Output(json_file)
    output.say(f"wrote {describe([out_file], trace)}")
    output.finish({"model": model, "dataset": str(dataset), "trace": facts([out_file], trace)})
