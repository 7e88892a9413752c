"""``moetuner report``: one page on what a placement does to traffic."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.serving import Serving, serving_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output, shares, working
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.auditing import audit, contiguous
from moetuner.files import text
from moetuner.report.page import write_page
from moetuner.report.page.data import Origin, PageData, of_placements
from moetuner.report.page.figures import write_figures


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
    with working("replaying") as report:
        before, after = evaluate_each(
            [running, placement],
            traffic,
            topology,
            window=source.replayed,
            mixed=False,
            **how,
            threads=source.threads,
            progress=shares(report, "of the tokens"),
        )
    audited = None
    if traffic.group is not None:
        how |= {"window": source.replayed or 1, "threads": source.threads}
        with working("comparing groups"):
            audited = audit(placement, traffic, topology, baseline=running, **how)
    contents = {
        "input": source.facts(),
        "settings": {
            "placement": str(placement_file),
            "baseline": None if baseline_file is None else str(baseline_file),
            "window": source.counted,
            **serving.settings(topology, serving.arguments(traffic)),
            "cost_model": model.name,
        },
        "running": before.to_dict(),
        "proposed": after.to_dict(),
        "audit": None if audited is None else audited.to_dict(),
    }
    write_pages(
        report_file,
        lambda: of_placements(
            *(names, (running, placement), (before, after), traffic, topology),
            *(origin_of(source), contents),
            traffic="All of INPUT; what the placement was computed from flatters it.",
            token_bytes=model.token_bytes,
            expert_bytes=expert_bytes,
            audit=audited,
        ),
        output,
    )
    output.finish(contents)


def origin_of(source: Source) -> Origin:
    """Return where the numbers of a page come from."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if words[0] in ("__main__.py", "-c"):
        words[0] = "moetuner"
    return Origin(
        *(source.describe(), source.input_files, shlex.join(words)),
        window=source.replayed,
        threads=source.threads,
    )


def write_pages(path: Path | None, make: Callable[[], PageData], output: Output) -> None:
    """Write the page and the figures that are wanted; without any, make no data."""
    if not options.has_page(path):
        return
    folder = options.figures_folder()
    with working("making the report"):
        data = make()
        if path is not None:
            write_page(path, data)
    if path is not None:
        output.say(f"wrote {path}")
    if folder is not None:
        with working("drawing figures"):
            number = write_figures(folder, data)
        output.say(f"wrote {number} figures into {folder}/")
