"""``moetuner report``: one page on what a placement does to traffic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.pages import FOLDER, Pages, needs_report, origin_of, page_option
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import Serving
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.evaluation.auditing import audit_of
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

    The page opens offline in any browser and sends nothing. A placement of "moetuner solve
    --holdout" is judged on the part of INPUT that was held out.

    Parameters
    ----------
    baseline_file
        The placement that runs. [default: contiguous, as engines load experts]
    report_file
        Page to write.
    expert_bytes
        Bytes of one expert of one layer. [default: of INPUT's model, if known]
    figures
        Write the charts of the page as SVG and PNG; needs Chrome or Chromium.
    """
    placed = Placed.read(placement_file, source, machine, serving)
    running, _ = placed.baseline(baseline_file)
    names = "contiguous" if baseline_file is None else "running", text.name(placement_file.stem)
    model, (traffic, judged_on, _) = placed.arguments["cost_model"], placed.judged
    output.say(*placed.lines())
    before, after = placed.replayed(running, mixed=False)
    gains = [replace(gain, names=names) for gain in placed.gains(before, after, "")]
    audited, measures = None, placed.measures()
    if traffic.group is not None:
        with working("comparing groups"):
            audited = audit_of(before, after, source.units, measures)
    output.say(*(f"Gain: {gain.sentence}" for gain in gains))
    contents = placed.contents(
        placement=str(placement_file),
        baseline=None if baseline_file is None else str(baseline_file),
        cost_model=model.name,
    )
    contents |= as_json({"running": before, "proposed": after, "audit": audited})
    contents["gain"] = gains[0].to_dict()
    Pages(report_file, figures).write(
        output,
        lambda: of_evaluations(
            names,
            (before, after),
            origin_of(source),
            contents,
            traffic=judged_on,
            judged=gains[0],
            token_bytes=model.token_bytes,
            expert_bytes=placed.expert_bytes if expert_bytes is None else expert_bytes,
            audit=audited,
        ),
    )
    output.finish(contents)
