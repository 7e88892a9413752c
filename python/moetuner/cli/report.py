"""``moetuner report``: one page on what a placement does to traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.pages import FOLDER, Pages, needs_report, origin_of, page_option
from moetuner.cli.options.serving import Serving
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, shares, working
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.auditing import audit_of, contiguous
from moetuner.files import text
from moetuner.frozen import as_json
from moetuner.report.page.data import of_evaluations


@options.command("report")
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    source: Source,
    machine: Machine,
    baseline_file: Path | None = option(options.IN_FILE, "PLACEMENT"),
    report_file: Path = page_option(Path("report.html"), flag="--out"),
    serving: Serving,
    expert_bytes: float | None = options.expert_bytes_option(),
    figures: Path | None = option(FOLDER, "DIR", callback=needs_report),
    output: Output,
) -> None:
    """Write one page on what a placement does to traffic.

    The page opens offline in any browser and sends nothing. Give traffic that the placement was not
    computed from, or it flatters.

    Parameters
    ----------
    baseline_file
        The placement that runs. [default: experts in blocks, as engines load them]
    report_file
        Page to write.
    expert_bytes
        Bytes of one expert of one layer.
    figures
        Write the charts of the page as SVG and PNG; needs Chrome or Chromium.
    """
    placement = source.load(placement_file)
    topology = machine.topology(placement.devices)
    traffic = source.traffic
    running, name = contiguous(placement), "contiguous"
    if baseline_file is not None:
        running, name = source.load(baseline_file, topology), "running"
    how = serving.arguments(traffic)
    model = how["cost_model"]
    output.say(source.describe(), *serving.explain())
    with working("replaying") as report:
        replay: Any = {"window": source.replayed, "threads": source.threads, **how}
        replay["progress"] = shares(report, "of the tokens")
        before, after = evaluate_each(
            [running, placement], traffic, topology, mixed=False, **replay
        )
    with working("comparing groups"):
        audited = None if traffic.group is None else audit_of(before, after)
    settings = {
        "placement": str(placement_file),
        "baseline": None if baseline_file is None else str(baseline_file),
        "window": source.counted,
        **serving.settings(topology, how),
        "cost_model": model.name,
    }
    contents = {"input": source.facts(), "settings": settings}
    contents |= as_json({"running": before, "proposed": after, "audit": audited})
    Pages(report_file, figures).write(
        output,
        lambda: of_evaluations(
            (name, text.name(placement_file.stem)),
            *((before, after), origin_of(source), contents),
            traffic="All of INPUT; what the placement was computed from flatters it.",
            token_bytes=model.token_bytes,
            expert_bytes=expert_bytes,
            audit=audited,
        ),
    )
    output.finish(contents)
