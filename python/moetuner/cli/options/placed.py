"""A placement to judge: its settings are defaults of options, its unseen traffic is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from moetuner import _texts
from moetuner._checks import nth_seed
from moetuner.cli.options import LayerHints, list_typed
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import is_start, load_placement, start_placement
from moetuner.cli.options.serving import ServingOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import show_shares, working
from moetuner.cost import bytes_of_expert
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES, WITH_ARGUMENT
from moetuner.evaluation.judgement import MEASURES, Judgement, judge
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.replay import check_model
from moetuner.evaluation.samples import find_samples
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.files import naming
from moetuner.files.cells import counted, listed
from moetuner.files.opened import Opened, opened
from moetuner.formats import WRITERS, find_form, read_placement
from moetuner.placement import Placement, contiguous
from moetuner.problem.made import Made
from moetuner.problem.reading import Reading
from moetuner.recording import Recording
from moetuner.report.outcome import write_left_out
from moetuner.serving import Serving, find_choices, phases
from moetuner.statistics import COUNTED, as_counts
from moetuner.topology import Topology

# Sentences on the traffic that a placement is judged on, depending on its fingerprint.
SEEN = (
    "The placement was computed from this very input, which flatters it: "
    '"moetuner solve --holdout 0.5" leaves a part to judge on.'
)
OTHER = "Judged on all of INPUT; the placement was computed from other traffic, or a part of it."
# Most groups that a sentence names.
NAMED = 3
ALL = "Judged on all of INPUT; the placement does not say what it was computed from."


def read_made(path: Path, placement: Placement) -> Made:
    """Read from a placement's settings how it was made; errors name its file."""
    with naming(path):
        return Made.read(placement)


def add_windows(sentence: str, source: Source, judged_on: Recording, groups: str = "") -> str:
    """Add to a sentence the size of windows, the traffic that is in none, and ``groups``."""
    if not source.counting_window:
        return sentence
    rest = write_left_out(judged_on, source.replay_window)
    windows = [f"Windows have {source.counting_window:,} tokens", rest, groups]
    return f"{sentence} {'; '.join(filter(None, windows))}."


def name_short_groups(traffic: Recording, window: int | None) -> str:
    """Write which groups of a trace have fewer tokens than a window; "" if there are none."""
    if window is None or not traffic.ordered or traffic.group is None:
        return ""
    sizes = np.bincount(traffic.group, minlength=len(traffic.group_names)).tolist()
    short = [
        f"{_texts.name(group)} ({size:,})"
        for group, size in zip(traffic.group_names, sizes, strict=True)
        if 0 < size < window
    ]
    return f"a group of fewer tokens is one window: {listed(short, NAMED)}" if short else ""


def write_held_out(part: dict[str, int], recorded: dict[str, int]) -> str:
    """Write how much of INPUT was held out when a placement was computed, given both sizes."""
    (name, judged), (_, total) = (*part.items(), *recorded.items())
    return (
        f"Judged on {judged:,} of {total:,} {name}, which were held out when the placement was "
        "computed."
    )


def read_any(path: Path | Opened, machine: Machine, hints: LayerHints) -> tuple[Placement, Made]:
    """Read a placement or an engine's map, by sizes that options give, and how it was made."""
    file = opened(path)
    sizes = {name: hints.hints[name] for name in ("num_experts", "dense_layers")}
    placement = read_placement(file, devices=machine.given, **sizes)
    return placement, read_made(file.path, placement)


def with_input(placement: Placement, source: Source, holdout: float) -> Placement:
    """Return a placement with INPUT, and the held-out share of it, in its settings."""
    reading = Reading.from_options(source, source.traffic)
    # The values of these options do not tell how they were typed.
    names, typed = {"topology": "machine", "cost_model": "cost_model"}, list_typed()
    spelled = {name: typed[option] for name, option in names.items() if typed.get(option)}
    made = replace(Made.read(placement), holdout=holdout, input=reading, spelled=spelled)
    return placement.with_names(settings={**placement.settings, **made.to_settings()})


class Parts(NamedTuple):
    """INPUT in two parts: what a placement may have seen, and what it is judged on.

    That is what was held out, else all of INPUT; a sentence and facts for JSON say which.
    """

    seen: Recording
    judged_on: Recording
    sentence: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Placed:
    """A placement and how it is judged: by options, else by its own settings.

    Parameters
    ----------
    placement, name
        The placement, and its name in sentences.
    made
        Facts of its computation, from its file.
    typed
        INPUT as it was recorded, and as options alone say.
    source, serving
        INPUT in the placement's windows, and how it is served.
    lost
        Lost devices; placement and topology are without them.
    loses_links
        Whether links are taken for slower ones than they are, without the lost devices.
    """

    placement: Placement
    name: str
    made: Made
    typed: Source
    source: Source
    serving: Serving
    lost: tuple[int, ...] = ()
    loses_links: bool = False

    def without(self, devices: tuple[int, ...]) -> Placed:
        """Return the placement without some devices; the others are renumbered."""
        if not devices:
            return self
        serving = replace(self.serving, topology=self.topology.without(devices))
        return replace(
            self,
            placement=self.placement.without(devices),
            serving=serving,
            lost=devices,
            loses_links=self.topology.has_nested_nodes,
        )

    @property
    def topology(self) -> Topology:
        """Topology of the machine."""
        return self.serving.topology

    @classmethod
    def read(
        cls, file: Opened, source: Source, machine: Machine, options: ServingOptions
    ) -> Placed:
        """Read a placement of INPUT's model; its settings replace options that are not given."""
        path, form = file.path, find_form(file)
        if form == "json":
            placement = Placement.load(file)
            made = read_made(path, placement)
            source = source.with_hints(made.input)
            traffic = source.traffic  # its errors name its own file
            with naming(path):
                check_model(placement, traffic, Topology(placement.devices))
        else:
            placement = load_placement(file, source, devices=machine.given)
            made = read_made(path, placement)
            engine = WRITERS[form].engine
            if engine is not None:  # only this engine loads the map
                made = replace(made, serving={**made.serving, "engine": engine})
        typed, source, recorded = source, source.as_placed(made, path), made.input
        topology = machine.topology(placement.devices, made.machine)
        served = dict(made.serving)
        # The placement's cost model is for experts of the same model and bits.
        if (source.model, source.weight_bits) != (recorded.model, recorded.weight_bits):
            served.pop("cost_model", None)
        with naming(path):
            chosen = find_choices(served, is_counted=made.is_counted)
        source, serving = options.resolve(source, topology, chosen)
        return cls(placement, _texts.name(path.name), made, typed, source, serving)

    @cached_property
    def parts(self) -> Parts:
        """The parts of INPUT; one was held out if the rest has the placement's fingerprint."""
        # Parts are held out of the recording, before it is counted.
        source, made = self.source.uncounted or self.source, self.made
        traffic = source.traffic
        share, is_other = made.holdout or 0.0, made.input.contradicts(traffic)
        seen, unseen = traffic, traffic
        with working("finding the traffic that was held out"):
            if share and not is_other:
                try:
                    seen, unseen = hold_out(traffic, share, seed=nth_seed(made.seed, 0))
                except ValueError:  # other traffic, which cannot be divided
                    is_other = True
            fingerprint = "" if is_other else self._fingerprint(seen)
        judged_on, sentence, is_seen = self.source.traffic, ALL, None
        if fingerprint is not None:
            is_seen = fingerprint == self.placement.fingerprint
            sentence = SEEN if is_seen else OTHER
            if not (is_seen or is_other) and self.source.missing_names is not None:
                missing = _texts.name(self.source.missing_names)
                sentence = (
                    f"Judged on all of INPUT: {missing} is not here, so the held-out part is not "
                    "known."
                )
        facts: dict[str, Any] = {"part": "all", "is_seen": is_seen}
        if is_seen and share:
            unseen = source.count_for_lp_split(unseen, self.serving)
            judged_on, sentence = unseen, write_held_out(unseen.size, judged_on.size)
            facts = {"part": "unseen", "is_seen": False, "holdout": share}
        groups = name_short_groups(judged_on, self.source.counting_window)
        return Parts(seen, judged_on, add_windows(sentence, self.source, judged_on, groups), facts)

    def _fingerprint(self, traffic: Recording) -> str | None:
        """Return the fingerprint of traffic, counted as for the placement; None if unknown."""
        if self.placement.fingerprint is None:
            return None
        tables = self.made.counted
        if tables is None and traffic.ordered:
            return None
        tables = tables or {}
        tables_counted: dict[str, Any] = {name: tables.get(name) is True for name in COUNTED}
        tables_counted["by_group"] &= traffic.group is not None
        with working("counting"):
            return as_counts(
                traffic,
                window=tables.get("window", self.made.serving.get("window")),
                threads=self.source.threads,
                **tables_counted,
            ).fingerprint

    def judge(
        self,
        running: Placement,
        names: tuple[str, str],
        options: ReplayOptions,
        *,
        measures: Iterable[str] = (),
        by_group: bool = False,
    ) -> Judgement:
        """Replay the running placement and this one, and judge the change.

        The verdict is on the figure that the placement was computed for.
        """
        with working("replaying") as report:
            [(before, after)] = evaluate_each(
                [running, self.placement],
                self.parts.judged_on,
                [self.serving],
                options,
                progress=show_shares(report, "of the tokens", then="figures"),
            )
        with working("comparing") as report:
            return judge(
                before,
                after,
                figure=self.made.figure,
                measures=self._choose_measures(measures),
                by_group=by_group,
                units=find_samples(self.source.traffic, window=self.source.replay_window),
                names=names,
                progress=show_shares(report, "", then="intervals"),
            )

    def _choose_measures(self, typed: Iterable[str]) -> tuple[str, ...]:
        """Return the measures of groups: those of the regime, and those that options name."""
        regime = self.serving.regime
        return tuple(name for name in MEASURES if name in typed or FIGURES[name].matters_in(regime))

    @property
    def expert_bytes(self) -> float | None:
        """Bytes of an expert of one layer; None where its size is not known."""
        traffic = self.source.traffic
        size = self.made.expert_size or traffic.expert_size
        return bytes_of_expert(size, traffic.model, self.source.weight_bits)

    def gains(self, judgement: Judgement) -> list[Comparison]:
        """Return the gains in the judged figure, in time, and in figures with an argument."""
        figures = dict.fromkeys((judgement.measure, "predicted_layer_us", *WITH_ARGUMENT))
        return [judgement.whole[name] for name in figures if name in judgement.whole]

    def lines(self) -> Iterator[str]:
        """Write INPUT, how it is served, differences to the settings, and what is judged."""
        yield from self.source.lines
        if self.source.missing_names is not None:
            yield f"Warning: {self.names_warning}"
        yield from self.differences()
        yield self.parts.sentence

    @property
    def names_warning(self) -> str:
        """A warning if the file of group names that the placement remembers is gone."""
        names = _texts.name(self.source.missing_names or "")
        return (
            f"{names}, which names the groups of INPUT, is neither here nor beside {self.name}: "
            "without groups, what was held out may not be found; --group-by names them."
        )

    def check_gate(self) -> None:
        """Raise if a gate could judge other traffic than the part that was held out."""
        if self.source.missing_names is not None:
            raise click.UsageError(self.names_warning)

    def differences(self) -> Iterator[str]:
        """Write how traffic is served, and differences between options and settings."""
        yield from self.serving.explain()
        made, now = self.made, self.source.counting_window
        sizes = made.phases
        if now is not None and sizes and now not in sizes:
            where = phases.describe(sizes) or f"windows of {next(iter(sizes)):,} tokens"
            yield f"The placement was computed for {where}; judged in windows of {now:,}."
        others = [size for size in sizes if size != now]
        if now in sizes and others and self.source.traffic.ordered:
            yield (
                f"Judged in windows of {now:,} tokens; the placement is for windows of "
                f"{others[0]:,}, too: --window {others[0]} judges it there."
            )
        pairs = [*self.serving.differences(made.serving)]
        groups, recorded = list(self.source.only), made.input.only
        if recorded is not None and groups != [*recorded]:
            then, today = (
                ", ".join(map(str, names)) or "of all kinds" for names in (recorded, groups)
            )
            pairs.append(("groups", then, today))
        for thing, then, today in pairs:
            yield f"The placement was computed for {thing} {then}; judged with {thing} {today}."

    def baseline(self, running: str | None) -> tuple[Placement, str]:
        """Return the running placement, of a file or a start placement, and its name.

        The default is contiguous. EPLB's is computed from the traffic that this placement has seen.
        """
        if running in (None, "contiguous"):
            return contiguous(self.placement), "contiguous"
        number = self.topology.devices + len({*self.lost})
        if is_start(running, "--baseline"):
            counts = self.source.count(self.parts.seen)
            seed, threads = nth_seed(self.made.seed, 0), self.source.threads
            machine = Topology(number)
            placement = start_placement(running, counts, machine, seed=seed, threads=threads)
            return placement.without(self.lost), running
        path = Path(running)
        placement = load_placement(path, self.source, devices=number)
        if placement.devices != number:
            numbers = f"{counted(placement.devices, 'device')}, {self.name} {number}"
            raise click.UsageError(
                f"'--baseline': {_texts.name(path.name)} has {numbers}; both must be of one "
                'machine. "moetuner evaluate PLACEMENT INPUT --without LIST" shows what a '
                "placement does on the remaining devices."
            )
        return placement.without(self.lost), _texts.name(path.name)

    def contents(self, **settings: Any) -> dict[str, Any]:
        """Return INPUT, settings with further ones, and the traffic judged on, for JSON."""
        current = self.serving.facts() | {"window": self.source.counting_window}
        return {
            "input": self.source.facts,
            "settings": current | settings,
            "judged_on": self.parts.facts | self.parts.judged_on.size,
        }
