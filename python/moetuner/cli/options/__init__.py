"""Options: how they are declared, grouped in ``--help`` and gathered; those of many commands."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from moetuner.cli.options.paths import IN_FILE as IN_FILE
from moetuner.cli.options.paths import IN_INPUT as IN_INPUT
from moetuner.cli.options.paths import InFile as InFile
from moetuner.cli.options.paths import OutFile as OutFile
from moetuner.formats.hints import Hints
from moetuner.problem.settings import ENGINE, GOAL, MACHINE, parameters_of
from moetuner.report.page import check_libraries
from moetuner.report.page.figures import check_figures
from moetuner.solver import EFFORTS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Groups of the help in their order; an option is in one of them, else in the last.
BEGIN, OTHER = "Begin with", "Other"
RUNNING, SEARCH, JUDGING = "The running placement", "The search", "The evaluation"
GROUPS = (BEGIN, MACHINE, GOAL, ENGINE, RUNNING, SEARCH, JUDGING, OTHER)


class Option(click.Option):
    """An option that knows its group of the help."""

    def __init__(self, *arguments: Any, group: str = OTHER, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.group = group


class Grouped(click.Command):
    """A command whose help has options in groups.

    Parameters
    ----------
    begin_with
        Names of options that a newcomer needs, which come first.
    """

    def __init__(self, *arguments: Any, begin_with: str, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.begin_with = begin_with.split()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for every group."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                is_first = bool({*parameter.opts} & {*self.begin_with})
                title = BEGIN if is_first else getattr(parameter, "group", OTHER)
                sections[title].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def option(
    flag: str, kind: Any, metavar: str | None, text: str, *, name: str | None = None, **others: Any
) -> Decorator:
    """Return a decorator that adds an option.

    Parameters
    ----------
    flag, kind, metavar, text
        Its name on the command line, its type, its value in ``--help``, and its help.
    name
        Of the argument; by default that of the flag.
    others
        ``group`` of the help, and what ``click.option`` takes.
    """
    names = (flag,) if name is None else (flag, name)
    return click.option(*names, type=kind, metavar=metavar, help=text, cls=Option, **others)


def declared(kind: Any, metavar: str | None = None, *, default: Any = None, **others: Any) -> Any:
    """Return a dataclass's field that is an option too; its help is what the docstring says of it.

    Parameters
    ----------
    kind, metavar
        Type, and value in ``--help``; ``kind`` may be an option that other commands have too.
    default
        Of field and option.
    others
        ``flag``, by default the field's name, and what ``option`` takes.
    """
    return field(default=default, metadata={"option": (kind, metavar, others)})


def _options_of(kind: Any) -> dict[str, Decorator]:
    """Return the options that a dataclass declares, by field."""
    texts, options = parameters_of(kind), {}
    for of in fields(kind):
        value, metavar, others = of.metadata["option"]
        if not inspect.isfunction(value):
            flag = others.get("flag", "--" + of.name.replace("_", "-"))
            others = {name: other for name, other in others.items() if name != "flag"}
            text = re.sub(r" \[(?=default|required)", "  [", texts.get(of.name, ""))
            others |= {"name": of.name, "default": of.default}
            value = option(flag, value, metavar, text, **others)
        options[of.name] = value
    return options


def option_group(
    name: str, kind: Callable[..., Any], options: Mapping[str, Decorator] | None = None
) -> Decorator:
    """Return one decorator of several options whose values arrive as one argument.

    Parameters
    ----------
    name
        Of the argument.
    kind
        What makes it of the options' values.
    options
        Decorators by parameter, in the order of help; by default those ``declared`` by ``kind``.
    """
    of = _options_of(kind) if options is None else options

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gather(**values: Any) -> Any:
            return command(**{name: kind(**{key: values.pop(key) for key in of}), **values})

        decorated: Callable[..., Any] = gather
        for decorator in reversed([*of.values()]):
            decorated = decorator(decorated)
        return decorated

    return decorate


class Number(click.FloatRange):
    """A number in a range; NaN is in none.

    Parameters
    ----------
    infinite
        Whether "inf" is one.
    """

    def __init__(self, *arguments: Any, infinite: bool = False, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.infinite = infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; refuse NaN, and infinity unless it is allowed."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        if math.isinf(number) and not self.infinite:
            self.fail("must be a finite number, got inf.", param, ctx)
        return number


def parsed(parse: Callable[[str], Any], rule: str) -> Callable[..., Any]:
    """Return a callback that reads a value, or every one of several; an error names the rule."""

    def callback(
        context: click.Context, parameter: click.Parameter, value: str | tuple[str, ...] | None
    ) -> Any:
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(callback(context, parameter, part) for part in value)
        try:
            return parse(value)
        except ValueError:
            raise click.BadParameter(f"must be {rule}, got '{value:.60}'") from None

    return callback


def read_layers(text: str) -> tuple[int, ...]:
    """Read numbers of layers and ranges of them, both ends included; "none" for none of them."""
    if text == "none":
        return ()
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(text)
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def layer_list(layers: Sequence[int] | None) -> str | None:
    """Write numbers of layers as ``--dense-layers`` takes them."""
    if layers is None:
        return None
    return ",".join(map(str, layers)) or "none"


def as_options(text: str) -> str:
    """Write the arguments that a message names as the options that give them."""
    return ARGUMENTS.sub(lambda match: "--" + match[0].replace("_", "-"), text)


def options_of(command: click.Command, text: str) -> str:
    """Write the argument that a message begins with, or needs, as the option of a command."""
    names = {
        str(parameter.name): max(parameter.opts, key=len)
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    first = re.match(r"\w+( and \w+)?(?=:? )", text)
    if first is not None:
        words = " ".join(names.get(word, word) for word in first[0].split())
        text = words + text.removeprefix(first[0])
    return as_options(text) if " is needed" in text else text


ARGUMENTS = re.compile(
    r"(?<![-.'\"])\b(slots_per_device|extra_slots|router_groups|hidden_layers|dense_layers|num_experts|"
    r"top_k)\b"
)


def suggestion(value: str, choices: Iterable[str]) -> str:
    """Return a question that names the nearest choice; empty if none comes near."""
    near = difflib.get_close_matches(value, list(choices), n=1)
    return f". Did you mean {near[0]}?" if near else ""


def completing(*words: str, files: bool = False) -> Callable[..., list[CompletionItem]]:
    """Return what completes an option in a shell: by its words, and by names of files."""

    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        items = [CompletionItem(word) for word in words if word.startswith(begun)]
        return items or ([CompletionItem(begun, type="file")] if files else [])

    return complete


FIGURES = f"{__name__}.figures"


def needs_report(
    context: click.Context, parameter: click.Parameter, value: Path | None
) -> Path | None:
    """Refuse a report before any work where its libraries are missing."""
    if value is not None:
        try:
            check_libraries()
        except ImportError as error:
            raise click.UsageError(f"{error}.") from None
    return value


def wants_figures(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """Keep where figures go; refuse them before any work where they cannot be drawn."""
    if needs_report(context, parameter, value) is not None:
        try:
            check_figures()
        except ImportError as error:
            raise click.UsageError(f"{error}.") from None
        context.meta[FIGURES] = value


def has_page(report_file: Path | None) -> bool:
    """Whether a page is wanted, or its figures."""
    return report_file is not None or figures_folder() is not None


def figures_folder() -> Path | None:
    """Return where the running command is to write figures."""
    folder: Path | None = click.get_current_context().meta.get(FIGURES)
    return folder


SIZE = click.IntRange(1, 65536)
expert_bytes_option = option(
    "--expert-bytes",
    Number(min=0, min_open=True),
    "BYTES",
    "Bytes of one expert of one layer.",
    group=RUNNING,
)
seed_option = option(
    "--seed",
    click.IntRange(0, 2**63 - 1),
    "N",
    "Random seed.",
    group=SEARCH,
    default=0,
    show_default=True,
)
threads_option = option(
    "--threads",
    click.IntRange(1, 1024),
    "N",
    "Threads; results do not depend on them.  [default: all cores]",
    group=SEARCH,
)
# What files may leave out, as fields of `Hints`.
HINTS = {
    "num_experts": option(
        "--num-experts", SIZE, "E", "Experts per layer, if the input does not say (.npy)."
    ),
    "top_k": option(
        "--top-k",
        SIZE,
        "K",
        "Experts per token and layer, if the input does not say (SGLang's responses).",
    ),
    "hidden_layers": option(
        "--hidden-layers", SIZE, "N", "Layers of the model, dense ones included."
    ),
    "dense_layers": option(
        "--dense-layers",
        str,
        "A-B,C,...|none",
        "Hidden layers without experts, for engines that count them too.",
        callback=parsed(read_layers, "numbers as in 0-2,5, or none"),
    ),
}


def hint_options(*names: str) -> Decorator:
    """Return a decorator of options for what files leave out, which arrive as ``hints``."""
    return option_group("hints", Hints, {name: HINTS[name] for name in names or HINTS})


json_option = option(
    "--json",
    OutFile(standard_output=True),
    "FILE",
    'Write all results as JSON; "-" writes them to standard output, and nothing else.',
    name="json_file",
)
trace_option = option(
    "--out",
    OutFile(".safetensors"),
    "TRACE",
    "Write the trace to this file, ending in .safetensors.",
    name="out_file",
    required=True,
)
figures_option = option(
    "--figures",
    click.Path(file_okay=False, writable=True, path_type=Path),
    "DIR",
    "Write the charts of the page as SVG and PNG; needs Chrome or Chromium.",
    expose_value=False,
    callback=wants_figures,
)
report_option = option(
    "--report",
    OutFile(".html"),
    "FILE.html",
    "Write a page of results that opens offline.",
    name="report_file",
    callback=needs_report,
)


@dataclass(frozen=True)
class SearchOptions:
    """How placements are searched: arguments of ``solve``.

    Parameters
    ----------
    time_limit
        Time limit per solve, in seconds. Results then depend on the machine.
    effort
        How much to search without a time limit: default, seconds for most problems, or thorough,
        up to minutes for a last half per cent.  [default: default]
    """

    seed: int = declared(seed_option, default=0)
    time_limit: float | None = declared(Number(min=0, infinite=True), "SECONDS", group=SEARCH)
    effort: str = declared(click.Choice([*EFFORTS]), default="default", group=SEARCH)


search_options = option_group("search", SearchOptions)
