"""``moetuner demo``: the whole flow on the bundled trace."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options import option
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.evaluation.units import hold_out
from moetuner.files import same_file
from moetuner.formats import eplb
from moetuner.formats.hints import Hints
from moetuner.problem import TRAFFIC_CAP, Problem
from moetuner.report.cells import percent
from moetuner.report.outcome import Outcome, head, remarks
from moetuner.report.structure import Structure, structure
from moetuner.statistics import WINDOW
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
    with resources.as_file(resources.files("moetuner") / "data" / SAMPLE) as bundled:
        shutil.copyfile(bundled, files[0])
    source = Source(input_files=(files[0],), threads=threads)
    trace = RoutingTrace.load(files[0])
    with working("looking for structure"):
        measured = structure(trace, DEVICES, max_imbalance=TRAFFIC_CAP, threads=threads)
    output.say(_introduction(trace, measured))

    seen, unseen = hold_out(trace, 0.5)
    # The paper's regime, as its method is among those shown.
    problem = Problem(
        source.count(seen), Topology(DEVICES), regime="follow", max_imbalance=TRAFFIC_CAP
    )
    results = [source.solve(method, problem, seed=0).uninterrupted() for method in METHODS]
    outcomes = dict(zip(METHODS, source.judge(results, problem, unseen), strict=True))
    output.say(
        f"Placements on {DEVICES} devices, computed from half of the texts, judged on the other.\n"
        "imbalance: max / mean device load in windows (total: of all), 1 is perfect; crossing:\n"
        "share of steps between devices; fanout: devices that a token visits in a layer.\n"
    )
    output.table(head(problem), [outcome.row() for outcome in outcomes.values()])
    output.say(*remarks(list(outcomes.values()), problem), _gain(outcomes))

    best = outcomes["joint"].result.placement
    best.save(files[1])
    eplb.write_map(best, files[2], Hints())
    output.say(
        f"Wrote placement.json, eplb.npz and trace.safetensors into {directory}/\n"
        "\n"
        "Next, on this trace or your own (safetensors, .npz, .npy or JSON lines):\n"
        f"  moetuner inspect {files[0]}\n"
        f"  moetuner compare {files[0]} --devices 8 --devices-per-node 4\n"
        f"  moetuner solve   {files[0]} --devices 8 --out placement.json"
    )
    methods = {method: outcome.to_dict() for method, outcome in outcomes.items()}
    output.finish({"input": source.facts(), "structure": asdict(measured), "methods": methods})


def _introduction(trace: RoutingTrace, of: Structure) -> str:
    """Write what the trace is, and what is in it."""
    far = max(of.group_distance, key=lambda name: of.group_distance[name])
    assert of.crossing is not None
    assert of.crossing_independent is not None
    return (
        f"A small Mixture-of-Experts language model ({trace.layers} MoE layers, "
        f"{trace.num_experts} experts, top-{trace.top_k}) read {trace.tokens:,}\n"
        f"tokens of {', '.join(trace.group_names)}; its routing was recorded.\n"
        "\n"
        f"Skew       a layer's busiest expert gets up to {max(of.skew):.1f} x the mean load\n"
        f"Groups     {far} sends {percent(of.group_distance[far])} of its tokens to other experts "
        "than the mix\n"
        f"Structure  a placement reaches crossing {of.crossing:.3f}; it would be "
        f"{of.crossing_independent:.3f} if layers routed independently\n"
    )


def _gain(outcomes: dict[str, Outcome]) -> str:
    """Write what the best method gains, and what it costs."""
    old, new = outcomes["contiguous"].evaluation, outcomes["joint"].evaluation
    assert old.crossing is not None
    assert new.crossing is not None
    return (
        "\n"
        f"Won:  with experts in blocks, as engines load them, {percent(old.crossing)} of the steps "
        "from layer to\n"
        f"      layer cross devices; with moetuner's joint placement {percent(new.crossing)} do: "
        f"{percent(1 - new.crossing / old.crossing)} less.\n"
        f"Load: the busiest device has {new.imbalance_total:.2f} x the mean load over all unseen "
        f"traffic ({old.imbalance_total:.2f} before), and\n"
        f"      {new.imbalance:.2f} x in a window of {WINDOW} consecutive tokens "
        f"({old.imbalance:.2f} before)."
        + "\n      Experts that fire together now share a device: bursts of one kind of text pay."
        * (new.imbalance > old.imbalance)
        + "\n"
    )
