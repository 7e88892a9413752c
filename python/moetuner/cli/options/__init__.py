"""Options that several subcommands share, and what becomes of them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from moetuner.evaluation.copies import SPLITS
from moetuner.files import same_file
from moetuner.report.page import check_libraries

Command = TypeVar("Command", bound=Callable[..., Any])


def claim(context: click.Context | None, parameter: click.Parameter | None, path: Path) -> None:
    """Note that an option names a file to read; nothing may be written there.

    Raises
    ------
    click.BadParameter
        If another option writes it.
    """
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
    """A file to read, which no option of the same command may write."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Note what is read."""
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
    """A number in a range; NaN is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what compares with nothing."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        return number


IN_FILE = InFile()


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


time_limit_option = click.option(
    "--time-limit",
    type=Number(min=0),
    metavar="SECONDS",
    help="Of each solve; the answer then depends on the machine.",
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
split_option = click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="even",
    show_default=True,
    help="Which of an expert's copies serves a token: by hash (vLLM), the nearest (SGLang), or in "
    "turns (TensorRT-LLM).",
)
json_option = click.option(
    "--json",
    "json_file",
    type=OutFile(standard_output=True),
    metavar="FILE",
    help='Write everything as JSON too; "-" for standard output, then nothing else goes there.',
)
report_option = click.option(
    "--report",
    "report_file",
    type=OutFile(".html"),
    metavar="FILE.html",
    callback=needs_report,
    help="Write one page for people, which opens offline.",
)
