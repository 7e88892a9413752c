"""Options that several subcommands share, and what becomes of them."""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from moetuner.files import same_file
from moetuner.report.page import check_libraries
from moetuner.report.page.figures import check_figures

Command = TypeVar("Command", bound=Callable[..., Any])


def claim(context: click.Context | None, parameter: click.Parameter | None, path: Path) -> None:
    """Remember that an option names a file to read; nothing may be written there."""
    _claim(context, parameter, path, writes=False)


def _claim(
    context: click.Context | None, parameter: click.Parameter | None, path: Path, *, writes: bool
) -> None:
    if context is None or parameter is None:
        return
    claims = context.meta.setdefault(__name__, [])
    hint = parameter.get_error_hint(context)
    for other_hint, other, written in claims:
        if other_hint != hint and (writes or written) and same_file(path, other):
            raise click.BadParameter(
                f"must be another file than that of {other_hint}, got '{path}'.", context, parameter
            )
    claims.append((hint, path, writes))


class InFile(click.Path):
    """A file to read, which no option of the same command may write.

    Parameters
    ----------
    folders
        Whether it may be a folder, too.
    """

    def __init__(self, *, folders: bool = False) -> None:
        super().__init__(exists=True, dir_okay=folders, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, and remember that it is read."""
        path = super().convert(value, param, ctx)
        claim(ctx, param, Path(str(path)))
        return path


class OutFile(click.Path):
    """A file to write, refused before any work is done if it cannot be written.

    Parameters
    ----------
    suffix
        Ending that the name must have.
    standard_output
        Whether "-" stands for standard output.
    """

    def __init__(self, suffix: str = "", *, standard_output: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=standard_output, path_type=Path)
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the directory as well as the file."""
        path = Path(str(super().convert(value, param, ctx)))
        if self.allow_dash and str(path) == "-":
            return path
        if not path.name.endswith(self.suffix):
            self.fail(f"must end in {self.suffix}, got '{path.name}'", param, ctx)
        _claim(ctx, param, path, writes=True)
        if path.exists() and not path.is_file():
            return path  # a pipe or a device, which is written to
        folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
        if not folder.is_dir():
            self.fail(f"directory '{folder}' does not exist; make it first", param, ctx)
        if not os.access(folder, os.W_OK):
            self.fail(f"directory '{folder}' is not writable", param, ctx)
        return path


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
        """Refuse what compares with nothing, and what no figure reaches."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        if math.isinf(number) and not self.infinite:
            self.fail("must be a finite number, got inf.", param, ctx)
        return number


def parse_layers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Read numbers of layers and ranges of them, both ends included; "none" for none of them."""
    if value is None or value == "none":
        return None if value is None else ()
    found: set[int] = set()
    for part in value.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise click.BadParameter(f"must be numbers as in 0-2,5, or none, got '{value:.60}'")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def layer_list(layers: Sequence[int] | None) -> str | None:
    """Write numbers of layers as ``--dense-layers`` takes them."""
    if layers is None:
        return None
    return ",".join(map(str, layers)) or "none"


def as_options(text: str) -> str:
    """Write the arguments that a message names as the options that give them."""
    return ARGUMENTS.sub(lambda found: "--" + found[0].replace("_", "-"), text)


def options_of(command: click.Command, text: str) -> str:
    """Write the argument that a message begins with, or needs, as the option of a command."""
    names = {
        str(each.name): max(each.opts, key=len)
        for each in command.params
        if isinstance(each, click.Option)
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
IN_FILE = InFile()


class Grouped(click.Command):
    """A command whose help has options in groups, those that a newcomer needs first.

    Parameters
    ----------
    groups
        Names of options by the title of their group, in the order of help; what is in none comes
        last.
    """

    def __init__(self, *arguments: Any, groups: Mapping[str, str], **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.groups = {title: names.split() for title, names in groups.items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for every group."""
        left: dict[str, tuple[str, str]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                left[max(parameter.opts, key=len)] = record
        for title, names in self.groups.items():
            mine = [left.pop(name) for name in names]
            with formatter.section(title):
                formatter.write_dl(mine)
        with formatter.section("Other"):
            formatter.write_dl(list(left.values()))


def meant(value: str, known: Iterable[str]) -> str:
    """Return a question for what is probably meant; empty if nothing comes near."""
    near = difflib.get_close_matches(value, list(known), n=1)
    return f". Did you mean {near[0]}?" if near else ""


def completing(*words: str, files: bool = False) -> Callable[..., list[CompletionItem]]:
    """Make what completes an option in a shell: by its words, and by names of files."""

    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        found = [CompletionItem(word) for word in words if word.startswith(begun)]
        return found or ([CompletionItem(begun, type="file")] if files else [])

    return complete


IN_INPUT = InFile(folders=True)


def together(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Make one decorator of several options, listed in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def gathered(
    name: str, kind: Any, options: Sequence[Callable[[Command], Command]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make one decorator of several options whose values arrive as one argument.

    Parameters
    ----------
    name
        Of the argument.
    kind
        Dataclass that it is of; its fields are the options' names.
    options
        The options, in the order in which help shows them.
    """
    names = [field.name for field in fields(kind)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gathering(**values: Any) -> Any:
            own = {key: values.pop(key) for key in names if key in values}
            return command(**values, **{name: kind(**own)})

        decorated: Callable[..., Any] = together(options)(gathering)  # type: ignore[arg-type]
        return decorated

    return decorate


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
    if value is not None:
        try:
            check_libraries()
            check_figures()
        except ImportError as error:
            raise click.UsageError(f"{error}.") from None
        context.meta[FIGURES] = value


def figures_folder() -> Path | None:
    """Return where the running command is to write figures."""
    found: Path | None = click.get_current_context().meta.get(FIGURES)
    return found


time_limit_option = click.option(
    "--time-limit",
    type=Number(min=0, infinite=True),
    metavar="SECONDS",
    help="Of each solve; the answer then depends on the machine.",
)
expert_bytes_option = click.option(
    "--expert-bytes",
    type=Number(min=0, min_open=True),
    metavar="BYTES",
    help="Bytes of one expert of one layer.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of all random choices.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="All cores by default; the answer does not depend on it.",
)
top_k_option = click.option(
    "--top-k",
    type=click.IntRange(1, 65536),
    metavar="K",
    help="Experts per token and layer, where nothing recorded says it (SGLang's responses).",
)
hidden_layers_option = click.option(
    "--hidden-layers",
    type=click.IntRange(1, 65536),
    metavar="N",
    help="Layers of the model, dense ones included.",
)
dense_layers_option = click.option(
    "--dense-layers",
    callback=parse_layers,
    metavar="A-B,C,...|none",
    help="Hidden layers without experts, where an engine counts them too.",
)
json_option = click.option(
    "--json",
    "json_file",
    type=OutFile(standard_output=True),
    metavar="FILE",
    help='Write everything as JSON too; "-" for standard output, then nothing else goes there.',
)
figures_option = click.option(
    "--figures",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    metavar="DIR",
    expose_value=False,
    callback=wants_figures,
    help="Write the charts of the page as SVG and PNG; needs a Chrome or Chromium.",
)
report_option = click.option(
    "--report",
    "report_file",
    type=OutFile(".html"),
    metavar="FILE.html",
    callback=needs_report,
    help="Write one page for people, which opens offline.",
)
