"""Read INPUT, and describe it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np

from moetuner._texts import suggestion
from moetuner.cli import work
from moetuner.cli.options import FileHints, argument, option, threads_option
from moetuner.cli.options.groups import FILES, group_input, locate_names
from moetuner.cli.options.kinds import COUNT, IN_INPUT, FileText, Number, Text
from moetuner.cli.output import working
from moetuner.cost import public_name, top_k_of, type_in_name
from moetuner.files import same_file
from moetuner.files.opened import Opened
from moetuner.formats import find_readers, open_input
from moetuner.formats.hints import Traffic as Traffic
from moetuner.presets import MODELS
from moetuner.problem.made import Made
from moetuner.problem.reading import Reading
from moetuner.problem.windows.choice import choose_counted_window
from moetuner.recording import Recording
from moetuner.report.recording import introduce
from moetuner.serving import Serving
from moetuner.serving.settings import ENGINE, GOAL
from moetuner.statistics import WINDOW, RoutingStatistics
from moetuner.trace import RoutingTrace


def read_model(text: str) -> str:
    """Return the published name of a model, with the type of its weights if the text has one."""
    public = public_name(text)
    if public is None:
        raise click.BadParameter(
            f"must be a model whose sizes are known, got '{text:.60}'; for another one: "
            f"--cost-model GPU:HIDDENxINTERMEDIATE{suggestion(text.rsplit('/', 1)[-1], MODELS)}"
        )
    type_of_weights = type_in_name(text)
    return public if type_of_weights is None else f"{public}-{type_of_weights}"


def check_files(
    context: click.Context, parameter: click.Parameter, value: tuple[Path, ...]
) -> tuple[Path, ...]:
    """Raise if a file is given twice: its tokens would count twice."""
    for number, path in enumerate(value):
        if any(same_file(path, other) for other in value[:number]):
            raise click.BadParameter(f"must name every file once, got '{path}' twice.")
    return value


def only_groups(traffic: Recording, names: Sequence[str]) -> RoutingTrace:
    """Return the tokens of some groups of a trace; raise for counts, or if it has no such group."""
    if not isinstance(traffic, RoutingTrace) or traffic.group is None:
        raise click.UsageError("'--only' needs a trace with groups.")
    for group in names:
        if group not in traffic.group_names:
            nearest = suggestion(group, traffic.group_names)
            raise click.UsageError(f"'--only': INPUT has no group '{group:.60}'{nearest}")
    chosen = traffic.select(groups=names)
    assert chosen.group is not None
    present, group_of = np.unique(chosen.group, return_inverse=True)
    labels = tuple(traffic.group_names[number] for number in present)
    return replace(chosen, group=group_of.astype(np.int16), group_names=labels)


@dataclass(frozen=True)
class Source(FileHints):
    """INPUT, and how it is counted.

    Parameters
    ----------
    only
        Use the tokens of this group alone; may be repeated.
    group_by
        Groups of INPUT: a file with one name per sequence, window or file, a column of a CSV, by
        its request_id where INPUT names requests, or files for a group per file. [default: as INPUT
        says]
    window
        Tokens per window; load is balanced in every window. Statistics have windows of their own.
        [default: 512 for a trace]
    tokens_per_step
        Take single steps of so many tokens from the windows of a load table, for counters that sum
        over many steps.
    model
        Model of INPUT, such as deepseek-v3 or Qwen/Qwen3-30B-A3B: its experts' sizes, for predicted
        times and bytes. [default: as INPUT says]
    weight_bits
        Bits of an expert's weight as it is read, for predicted times and bytes; 8 for fp8, 16 for
        bf16, 4.25 for MXFP4. [default: as --model was published; 8 if it is not known]
    """

    input_files: tuple[Path, ...] = argument(
        "INPUT...", IN_INPUT, nargs=-1, required=True, callback=check_files
    )
    only: tuple[str, ...] = option(str, "GROUP", (), multiple=True)
    group_by: str | None = option(FileText(words=(FILES,)), "FILE|FILE.csv:COLUMN|files")
    window: int | None = option(COUNT, "TOKENS", group=GOAL)
    tokens_per_step: int | None = option(COUNT, "N", group=GOAL)
    model: str | None = option(Text(read_model, words=MODELS), "NAME", group=ENGINE)
    weight_bits: float | None = option(Number(1, 64), "BITS", group=ENGINE)
    threads: int | None = threads_option()
    # The file of names that a placement remembers, if it is gone.
    missing_names: str | None = None
    # The same INPUT before it was counted, if it was.
    uncounted: Source | None = None

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers of INPUT's files; none for a pipe."""
        return find_readers(self.inputs.values())

    @cached_property
    def inputs(self) -> dict[Path, Opened]:
        """The files of INPUT, opened."""
        return {path: Opened(path) for path in self.input_files}

    def like(self, recorded: Traffic | None = None, **options: Any) -> Source:
        """Return INPUT or other files, with other options, and what is ``recorded`` if it is read.

        Files that stay are not asked again.
        """
        source, known = replace(self, **options), self.inputs
        files = {path: known.get(path) or Opened(path) for path in source.input_files}
        vars(source)["inputs"] = files
        if recorded is not None:
            vars(source)["recorded"] = recorded
        return source

    @cached_property
    def recorded(self) -> Traffic:
        """Traffic of INPUT, of all groups or of those of --only."""
        with working(f"reading {self.input_files[0].name}"):
            traffic = self._read()
        self._check_model(traffic)
        return only_groups(traffic, self.only) if self.only else traffic

    def _read(self) -> Traffic:
        """Read INPUT, with its own groups or those of --group-by."""
        with warnings.catch_warnings():
            # What was counted in several files is a warning of INPUT's description.
            warnings.simplefilter("ignore", UserWarning)
            if self.group_by is None:
                return self._open(self.input_files, None)
            return group_input(self.group_by, self.input_files, self._open, self.window or WINDOW)

    def _open(self, paths: Sequence[Path], groups: Mapping[str, str] | None) -> Traffic:
        """Read files of INPUT, with the groups of their requests."""
        files = [self.inputs[path] for path in paths]
        return open_input(files, window=self.window, groups=groups, **self.hints)

    def _check_model(self, traffic: Traffic) -> None:
        """Raise if --model has another number of experts."""
        public = MODELS.get(public_name(self.model) or "")
        if public is not None and public.experts != traffic.num_experts:
            raise click.UsageError(
                f"'--model': {self.model} has {public.experts} experts in a layer, INPUT has "
                f"{traffic.num_experts}; for another model: --cost-model GPU:HIDDENxINTERMEDIATE."
            )

    @cached_property
    def traffic(self) -> Traffic:
        """Traffic of INPUT, with the model and the steps of options."""
        traffic = self.recorded
        if self.model is not None:
            traffic = replace(traffic, model=self.model, expert_size=None)
        if self.tokens_per_step is None:
            return traffic
        if not isinstance(traffic, RoutingStatistics) or traffic.window is not None:
            raise click.UsageError(
                "'--tokens-per-step' is for load tables: a window of INPUT has "
                f"{traffic.window or WINDOW} tokens."
            )
        top_k = self.top_k or top_k_of(traffic) or 1
        return traffic.per_step(self.tokens_per_step, top_k=top_k)

    @property
    def counting_window(self) -> int | None:
        """Tokens per window, counted or to be counted; None if unknown."""
        return self.replay_window or self.traffic.window

    @property
    def replay_window(self) -> int | None:
        """Tokens per window of a replay; None if windows are counted already."""
        return (self.window or WINDOW) if self.traffic.ordered else None

    def as_counts(self) -> Source:
        """Return the same INPUT, counted in windows if it is a trace."""
        counts = self.count_all(self.recorded)
        if counts is self.recorded:
            return self
        return self.like(counts, uncounted=self)

    def count_all(self, traffic: Recording) -> RoutingStatistics:
        """Count INPUT, or a part of it, with expert sets and groups."""
        return self.count(traffic, sets=True, by_group=traffic.group is not None)

    def count_for_lp_split(self, traffic: Traffic, serving: Serving) -> Traffic:
        """Return INPUT, or a part of it, counted if the split divides whole windows together."""
        return self.count_all(traffic) if serving.rule.needs_windows else traffic

    def size_for_split(self, serving: Serving) -> dict[str, int]:
        """Return the size of INPUT; that of its windows if the split divides whole ones."""
        if not serving.rule.needs_windows or not self.traffic.ordered:
            return self.traffic.size
        groups, window = self.traffic.group_rows(), self.window or WINDOW
        tokens = groups.pop(None)
        return {"windows": sum(-(-len(rows) // window) for rows in groups.values() or [tokens])}

    def with_hints(self, reading: Reading) -> Source:
        """Return the same INPUT; a placement's settings give hints that no option gives."""
        hints: dict[str, Any] = {
            name: getattr(self, name) or value for name, value in reading.hints()
        }
        source = self.like(**hints)
        return self if source == self else source  # traffic that is read already stays

    def as_placed(self, made: Made, placement_file: Path) -> Source:
        """Return the same INPUT, read once; a placement's settings are defaults of options."""
        recorded, reading = self.recorded, made.input
        missing = reading.substitute(self, recorded)
        if recorded.ordered and self.window is None:
            missing["window"] = made.serving.get("window")
        text = reading.group_by
        has_groups = self.group_by is not None or recorded.group is not None or self.only
        if text is not None and not has_groups and reading.fits(recorded):
            names = locate_names(text, placement_file)
            if names is None:
                missing["missing_names"] = text
            else:
                recorded = self._grouped_by(names, missing.get("window", self.window))
        return self.like(recorded, **missing)

    def _grouped_by(self, text: str, window: int | None) -> Traffic:
        """Return INPUT with the groups that a placement remembers, if they fit."""
        recorded = self.recorded

        def read(paths: Sequence[Path], groups: Mapping[str, str] | None) -> Traffic:
            if groups is None and list(paths) == list(self.input_files):
                return recorded
            return self._open(paths, groups)

        try:
            return group_input(text, self.input_files, read, window or WINDOW)
        except (click.UsageError, OSError):
            return recorded

    def count(self, traffic: Recording | None = None, **tables: Any) -> RoutingStatistics:
        """Count INPUT, or a part of it, in windows; statistics are counted already.

        ``tables`` as for ``RoutingStatistics.from_trace``.
        """
        traffic = self.traffic if traffic is None else traffic
        tables = {"window": self.window or WINDOW, **tables}
        return work.count(traffic, threads=self.threads, **tables)

    def count_for_search(
        self, traffic: Recording | None = None, **tables: Any
    ) -> RoutingStatistics:
        """Count INPUT, or a part of it, as ``Problem`` counts it: a short trace in short windows.

        ``tables`` as for ``RoutingStatistics.from_trace``.
        """
        traffic = self.traffic if traffic is None else traffic
        window = choose_counted_window(traffic.length, self.window or WINDOW)
        return self.count(traffic, window=window, **tables)

    @property
    def lines(self) -> list[str]:
        """Lines on INPUT: its sizes, then its limits, assumptions and warnings."""
        return self._introduction[0]

    @property
    def facts(self) -> dict[str, Any]:
        """Kind, sizes and warnings of INPUT, for JSON."""
        return self._introduction[1]

    @cached_property
    def _introduction(self) -> tuple[list[str], dict[str, Any]]:
        with working(f"looking at {self.input_files[0].name}"):
            return introduce(
                self.input_files, self.traffic, self.readers, self.tokens_per_step, self.top_k
            )
