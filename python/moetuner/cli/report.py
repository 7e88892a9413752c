"""``moetuner report``: one page on what a placement does to traffic."""

from __future__ import annotations

from pathlib import Path

from moetuner.cli import options
from moetuner.cli.options import argument
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import baseline_option, is_start
from moetuner.cli.options.pages import Pages, figures_option, origin_of, page_option
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import ServingOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.evaluation.options import ReplayOptions
from moetuner.files import text
from moetuner.frozen import as_json
from moetuner.report.page.data import make_data


@options.command("report")
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    source: Source,
    machine: Machine,
    baseline: str | None = baseline_option(),
    report_file: Path = page_option(Path("report.html"), flag="--out"),
    serving: ServingOptions,
    expert_bytes: float | None = options.expert_bytes_option(),
    figures: Path | None = figures_option(),
    output: Output,
) -> None:
    """Write one page on what a placement does to traffic.

    The page opens offline in any browser and sends nothing. A placement of "moetuner solve
    --holdout" is judged on the part of INPUT that was held out.

    Parameters
    ----------
    baseline
        The placement that runs. [default: contiguous, as engines load experts]
    report_file
        Page to write.
    expert_bytes
        Bytes of one expert of one layer. [default: of INPUT's model, if known]
    figures
        Write the charts of the page as SVG and PNG; needs Chrome or Chromium.
    """
    placed = Placed.read(placement_file, source, machine, serving)
    running, against = placed.baseline(baseline)
    is_named = baseline is not None and not is_start(baseline, "--baseline")
    names = "running" if is_named else against, text.name(placement_file.stem)
    model, (traffic, judged_on, _) = placed.serving.cost_model, placed.judged
    assert model is not None
    output.say(*placed.lines())
    replayed = ReplayOptions(mixed=False, threads=source.threads)
    judgement = placed.judge(running, names, replayed, by_group=traffic.group is not None)
    output.say(*(f"Gain: {gain.sentence}" for gain in placed.gains(judgement)))
    contents = placed.contents(
        placement=str(placement_file),
        baseline=baseline,
        cost_model=model.name,
    )
    contents |= as_json({"running": judgement.before, "proposed": judgement.after})
    contents["audit"] = judgement.to_dict() if judgement.groups else None
    contents["gain"] = judgement.gain.to_dict()
    Pages(report_file, figures).write(
        output,
        lambda: make_data(
            judgement,
            origin_of(source),
            contents,
            traffic=judged_on,
            token_bytes=model.token_bytes,
            expert_bytes=placed.expert_bytes if expert_bytes is None else expert_bytes,
        ),
    )
    output.finish(contents)
