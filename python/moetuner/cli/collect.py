"""``moetuner collect``: run texts through a model and record its routing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options import argument, kinds, option
from moetuner.cli.output import Output, working
from moetuner.report import recording


@options.command("collect", example="MODEL --dataset texts.jsonl --out trace.safetensors")
def command(
    *,
    model: str = argument("MODEL", kinds.FileText()),
    dataset: Path = option(kinds.IN_FILE, "FILE", required=True),
    out_file: Path = options.trace_option(),
    max_tokens: int = option(kinds.COUNT, "N", 100_000),
    batch_size: int = option(kinds.COUNT, "N", 8),
    sequence_length: int = option(kinds.COUNT, "N", 1024),
    dtype: str = option(click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"),
    device: str | None = option(str, "DEVICE"),
    output: Output,
) -> None:
    """Record to which experts a model routes texts.

    MODEL is a folder that transformers can load, with its tokenizer, or a name on its hub. Needs
    torch and transformers.

    Parameters
    ----------
    dataset
        Texts: one per line, or JSON lines with "text" and optionally "group".
    max_tokens
        Stop after so many tokens.
    batch_size
        Texts in a batch.
    sequence_length
        Longest text, in tokens; longer ones are cut.
    dtype
        Type of the weights; auto keeps the type in which they are stored.
    device
        Device to run on, such as cpu or cuda:1; "auto" spreads the model over all devices.
        [default: cuda, else cpu]
    """
    arguments: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": batch_size, "dtype": dtype}
    arguments |= {"sequence_length": sequence_length, "device": device}

    def count(tokens: int) -> None:
        report.show(f"{tokens:,} of {max_tokens:,} tokens", min(tokens / max_tokens, 1.0))

    with working(f"running {model}") as report, warnings.catch_warnings():
        # Warnings name what was left out, or saved from a recording that was interrupted.
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(
            f"moetuner: warning: {message}", err=True
        )

        # These take seconds to import, and not everybody has them.
        try:
            from moetuner.torch.collect import collect

            trace = collect(model, dataset, out_file, progress=count, **arguments)
        except (ImportError, RuntimeError) as error:
            # A missing library or device is not a bug in moetuner.
            raise click.ClickException(str(error)) from error
    output.say(f"wrote {recording.describe([out_file], trace)}")
    output.finish(
        {"model": model, "dataset": str(dataset), "trace": recording.facts([out_file], trace)}
    )
