"""``moetuner fit``: fit a cost model to measured times of one MoE layer."""

from __future__ import annotations

import csv
import io
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from moetuner._texts import name, suggestion
from moetuner.cli import options
from moetuner.cli.options import kinds, option
from moetuner.cli.options.kinds import SIZE
from moetuner.cli.output import Output, show_shares, working
from moetuner.cli.recipes import recipe
from moetuner.cost import CostModel, public_name
from moetuner.files import naming, read_whole
from moetuner.files.cells import number, percent, signed
from moetuner.presets import MODELS

COLUMNS = "tokens,experts,microseconds"
# Bytes of a number in bfloat16.
BYTES = 2
# Most bytes of a file of times, ten times as many as a quarter of a million batches take.
LONGEST = 1 << 26


@options.command("fit", example="--model qwen3-30b-a3b --out gpu.json")
def command(
    *,
    model: str | None = option(kinds.Text(words=MODELS), "NAME"),
    hidden: int | None = option(SIZE, "H"),
    intermediate: int | None = option(SIZE, "I"),
    experts: int = option(SIZE, "E", 32),
    top_k: int = option(SIZE, "K", 8),
    device: str | None = option(str, "DEVICE"),
    times_file: Path | None = option(kinds.IN_FILE, "FILE.csv"),
    out_file: Path = option(kinds.OutFile(".json"), "FILE.json", required=True),
    output: Output,
) -> None:
    """Measure one MoE layer, and write its cost model.

    Times the experts of a layer at a dozen batch sizes on this machine (needs torch), or reads
    times that were measured elsewhere, and fits the cost model for --cost-model.

    Parameters
    ----------
    model
        Model whose expert sizes are used, such as qwen3-30b-a3b.
    hidden, intermediate
        Hidden and intermediate size of an expert, instead of --model.
    experts
        Experts of the layer on one device.
    top_k
        Experts that a token visits.
    device
        Device to run on, such as cpu or cuda:1. [default: cuda, else cpu]
    times_file
        Measured times, one batch per line: tokens (each counted once per expert), active experts,
        microseconds.
    out_file
        Write the cost model to this file.
    """
    hidden, intermediate = _sizes(model, hidden, intermediate, needs_both=times_file is None)
    if times_file is not None:
        times, whose = read_times(times_file), f"of {name(times_file.name)}"
    else:
        batch = {"experts": experts, "top_k": top_k, "device": device}
        times, whose = _time_experts(hidden, intermediate or 0, batch)
    tokens, active, measured = np.array(times, dtype=float).reshape(-1, 3).T
    sizes = {"token_bytes": BYTES * hidden, "name": f"fit {whose}"}
    try:
        # An error names the file of times, if there is one.
        with nullcontext() if times_file is None else naming(times_file):
            fitted = CostModel.fit(tokens, active, measured, **sizes)
    except ValueError as error:
        if times_file is not None or "one core" not in whose:
            raise
        hint = "a CPU reads weights and computes in turn, so fit on a GPU or pass --times"
        raise ValueError(f"{error}; {hint}") from None
    predicted = fitted.compute_us(tokens, active)
    rows = [
        (
            number(count, 0),
            number(experts_read, 0),
            number(us, 1),
            number(model_us, 1),
            signed(model_us / us - 1),
        )
        for count, experts_read, us, model_us in zip(
            tokens, active, measured, predicted, strict=True
        )
    ]
    output.table(("tokens", "active experts", "measured us", "model us", "off"), rows)
    output.say(
        "",
        f"A device takes {fitted.formula}.",
        f"Error on batches that the fit has not seen: {percent(fitted.prediction_error)}.",
    )
    fitted.save(out_file)
    output.say(f"wrote {out_file}")
    served = {"devices": 8, "cost_model": out_file}
    output.next_commands([recipe("advise", ["INPUT"], served)])
    output.finish({"times": times, "cost_model": asdict(fitted)})


def _sizes(
    model: str | None, hidden: int | None, intermediate: int | None, *, needs_both: bool
) -> tuple[int, int | None]:
    """Return hidden and intermediate size of an expert, from options or of a public model."""
    if model is not None:
        public = public_name(model)
        if public is None:
            raise click.BadParameter(
                f"must be a model whose sizes are known, got '{model:.60}'; give --hidden and "
                f"--intermediate{suggestion(model, MODELS)}",
                param_hint="'--model'",
            )
        sizes = MODELS[public][:2]
        hidden, intermediate = hidden or sizes[0], intermediate or sizes[1]
    if hidden is None or (needs_both and intermediate is None):
        missing = "'--hidden' and '--intermediate'" if needs_both else "'--hidden'"
        raise click.UsageError(f"Missing option '--model' (or {missing}).")
    return hidden, intermediate


def _time_experts(hidden: int, intermediate: int, batch: dict[str, Any]) -> tuple[Any, str]:
    """Time the experts on this machine; return the times and the name of the device."""
    try:
        from moetuner.torch.timing import default_device, time_experts

        batch["device"] = batch["device"] or default_device()
        if batch["device"] == "cpu":
            click.echo(
                "moetuner: warning: these will be times of one core of a CPU, not of a GPU",
                err=True,
            )
        with working("timing the experts") as report:
            times, where = time_experts(
                hidden,
                intermediate,
                **batch,
                progress=show_shares(report, "of the batches", then="fitting"),
            )
    except (ImportError, RuntimeError) as error:
        # A missing library or device is not a bug in moetuner.
        raise click.ClickException(str(error)) from error
    return times, f"on {where}"


def read_times(path: Path) -> list[tuple[float, ...]]:
    """Read tokens, active experts and microseconds, a batch per line; a header may come first."""
    times: list[tuple[float, ...]] = []
    with naming(path):
        text = read_whole(path, LONGEST).decode("utf-8-sig")
        try:
            rows = [*csv.reader(io.StringIO(text, newline=""))]
        except csv.Error as error:
            raise ValueError(f"must be {COLUMNS} in numbers: {error}") from None
        for number, row in enumerate(rows, 1):
            try:
                tokens, experts, us = map(float, row)
                times.append((tokens, experts, us))
            except ValueError:
                if row and number > 1:
                    raise ValueError(
                        f"line {number}: must be {COLUMNS} in numbers, got '{','.join(row):.60}'"
                    ) from None
    return times
