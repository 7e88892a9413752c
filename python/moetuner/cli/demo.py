"""``moetuner demo``: the whole flow on the bundled trace."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from moetuner.cli import options, work
from moetuner.cli.options import option
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.cli.recipes import HOLDOUT, recipe
from moetuner.cli.split import TrafficSplit
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.files import replacing, same_file
from moetuner.files.cells import percent
from moetuner.formats import write_placement
from moetuner.problem import Problem
from moetuner.problem.goals import TRAFFIC_CAP
from moetuner.report.outcome import Outcome
from moetuner.report.structure import Structure, structure
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

FOLDER = click.Path(file_okay=False, path_type=Path)
SAMPLE = "small-moe.safetensors"
DEVICES = 4
WRITTEN = ("trace.safetensors", "placement.json", "eplb.npz")
METHODS = ("contiguous", "lpt", "eplb", "paper", "joint")


@options.command("demo")
def command(
    *,
    directory: Path = option(FOLDER, "DIR", Path("demo-output"), flag="--out"),
    threads: int | None = options.threads_option(),
    output: Output,
) -> None:
    """Run the whole flow on the bundled trace.

    Parameters
    ----------
    directory
        Directory to write to; made if it is missing.
    """
    files = [directory / name for name in WRITTEN]
    for path in files:
        if output.json_file is not None and same_file(output.json_file, path):
            raise click.BadParameter(
                f"must be another file than the demo's {path.name}.", param_hint="'--json'"
            )
    directory.mkdir(parents=True, exist_ok=True)
    bundled = (resources.files("moetuner") / "data" / SAMPLE).read_bytes()
    with replacing(files[0]) as temporary:
        temporary.write_bytes(bundled)
    source = Source(input_files=(files[0],), threads=threads)
    trace = RoutingTrace.load(files[0])
    with working("looking for structure"):
        measured = structure(trace, DEVICES, max_imbalance=TRAFFIC_CAP, threads=threads)
    output.say(_introduce(trace, measured))

    outcomes = _compare_methods(source, trace, output)
    best = outcomes["joint"].result.placement
    best.save(files[1])
    write_placement(best, "eplb", files[2])
    output.say(
        "",
        f"Wrote placement.json, eplb.npz and trace.safetensors into {directory}/",
        "",
        "Today's engines send every token back after each layer (regime dispatch). Is a better",
        "placement worth it there? For this trace, or a recording of your own model:",
        "",
        f"  {recipe('advise', files[:1], {'devices': DEVICES}).command}",
    )
    methods = {method: outcome.to_dict() for method, outcome in outcomes.items()}
    output.finish({"input": source.facts, "structure": measured.to_dict(), "methods": methods})
    if not output.is_json:
        _advise(files[0], threads, output)


def _compare_methods(source: Source, trace: RoutingTrace, output: Output) -> dict[str, Outcome]:
    """Solve with all methods on half of a trace; print and return the outcomes on the other."""
    seen, unseen = hold_out(trace, HOLDOUT)
    # The paper's regime, as its method is among those shown.
    problem = Problem(
        source.count(seen), Topology(DEVICES), regime="follow", max_imbalance=TRAFFIC_CAP
    )
    results = [
        work.solve(problem, method, seed=0, threads=source.threads).uninterrupted()
        for method in METHODS
    ]
    split = TrafficSplit(source, HOLDOUT, problem, unseen, problem.serving)
    outcomes = dict(zip(METHODS, split.replay(results), strict=True))
    output.say(
        f"Placements on {DEVICES} devices, computed from half of the texts, judged on the other.",
        "crossing: share of steps from layer to layer between devices, if tokens move on to their",
        "next expert (regime follow); imbalance: max / mean device load of all unseen traffic.",
        "",
    )
    output.table(
        ("method", "crossing", "imbalance"),
        [
            (
                name,
                percent(outcome.evaluation.crossing),
                f"{outcome.evaluation.imbalance_total:.2f}",
            )
            for name, outcome in outcomes.items()
        ],
    )
    return outcomes


def _advise(trace_file: Path, threads: int | None, output: Output) -> None:
    """Run "moetuner advise" on a trace."""
    arguments = [str(trace_file), "--devices", str(DEVICES)]
    arguments += [] if threads is None else ["--threads", str(threads)]
    arguments += ["--quiet"] if output.quiet else []
    menu = click.get_current_context().find_root().command
    menu.main(["advise", *arguments], standalone_mode=False)


def _introduce(trace: RoutingTrace, measured: Structure) -> str:
    """Write the trace's sizes, skew, groups and structure."""
    farthest = max(measured.group_distance, key=lambda name: measured.group_distance[name])
    assert measured.crossing is not None
    assert measured.crossing_independent is not None
    return (
        f"A small Mixture-of-Experts language model ({trace.layers} MoE layers, "
        f"{trace.num_experts} experts, top-{trace.top_k}) read {trace.tokens:,}\n"
        f"tokens of {', '.join(trace.group_names)}; its routing was recorded.\n"
        "\n"
        f"Skew       a layer's busiest expert gets up to {max(measured.skew):.1f} x the mean load\n"
        f"Groups     {farthest} sends {percent(measured.group_distance[farthest])} of its "
        "tokens to other experts than the mix\n"
        f"Structure  a placement reaches crossing {measured.crossing:.3f}; it would be "
        f"{measured.crossing_independent:.3f} if layers routed independently\n"
    )
