"""``moetuner report``: one page on what a placement does to traffic."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.serving import Serving, serving_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output, working
from moetuner.cli.reporting import load_of, write_pair
from moetuner.evaluation import evaluate
from moetuner.evaluation.auditing import audit, contiguous
from moetuner.files import text


@click.command("report")
@click.argument("placement_file", metavar="PLACEMENT", type=options.IN_FILE)
@traffic_options
@machine_options
@click.option(
    "--baseline",
    "baseline_file",
    type=options.IN_FILE,
    metavar="PLACEMENT",
    help="The placement that runs.  [default: experts in blocks, as engines load them]",
)
@click.option(
    "--out",
    "report_file",
    type=options.OutFile(".html"),
    default="report.html",
    show_default=True,
    callback=options.needs_report,
    metavar="FILE.html",
    help="Page to write.",
)
@serving_options
@options.expert_bytes_option
@options.figures_option
@options.json_option
def command(
    placement_file: Path,
    source: Source,
    machine: Machine,
    baseline_file: Path | None,
    report_file: Path,
    serving: Serving,
    expert_bytes: float | None,
    json_file: Path | None,
) -> None:
    """Write one page on what a placement does to traffic.

    The page opens offline in any browser and sends nothing. Give traffic that the placement was not
    computed from, or it flatters.
    """
    placement = source.load(placement_file)
    topology = machine.topology(placement.devices)
    traffic = source.traffic
    running = contiguous(placement)
    if baseline_file is not None:
        running = source.load(baseline_file, topology)
    names = ("contiguous" if baseline_file is None else "running", text.name(placement_file.stem))
    how = serving.arguments(traffic)
    model = how["cost_model"]
    output = Output(json_file)
    output.say(source.describe())
    if serving.engine is not None:
        output.say(serving.explain())
    with working("replaying"):
        evaluations = tuple(
            evaluate(
                each,
                traffic,
                topology,
                window=source.replayed,
                mixed=False,
                **how,
                threads=source.threads,
            )
            for each in (running, placement)
        )
    found = None
    if traffic.group is not None:
        with working("comparing groups"):
            found = audit(
                placement,
                traffic,
                topology,
                baseline=running,
                window=source.replayed or 1,
                **how,
                threads=source.threads,
            )
    contents = {
        "input": source.facts(),
        "settings": {
            "placement": str(placement_file),
            "baseline": None if baseline_file is None else str(baseline_file),
            "window": source.counted,
            **serving.settings(topology, how),
            "cost_model": model.name,
        },
        "running": evaluations[0].to_dict(),
        "proposed": evaluations[1].to_dict(),
        "audit": None if found is None else found.to_dict(),
    }
    write_pair(
        report_file,
        source,
        topology,
        names=names,
        placements=(running, placement),
        evaluations=(evaluations[0], evaluations[1]),
        contents=contents,
        output=output,
        traffic="All of INPUT; what the placement was computed from flatters it.",
        load=load_of(source, traffic),
        token_bytes=model.token_bytes,
        expert_bytes=expert_bytes,
        audit=found,
    )
    output.finish(contents)
