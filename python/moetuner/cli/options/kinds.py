"""Kinds of values of options: numbers, texts that are read, and files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from moetuner.files import same_file
from moetuner.solver import ALIASES, METHODS


class Number(click.FloatRange):
    """A number in a range, finite unless ``infinite`` allows "inf", and never NaN."""

    def __init__(self, *arguments: Any, infinite: bool = False, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.infinite = infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        if math.isinf(number) and not self.infinite:
            self.fail("must be a finite number, got inf.", param, ctx)
        return number


class Text(click.ParamType):  # type: ignore[type-arg]
    """A text that a function reads, with words that complete it in a shell.

    Parameters
    ----------
    read
        Function from the text to its value; raises ValueError for a wrong text.
    rule
        Texts that ``read`` accepts, to follow "must be"; by default its error is shown.
    words
        Words that complete the text.
    """

    name = "text"

    def __init__(
        self, read: Callable[[str], Any] = str, rule: str = "", *, words: Iterable[str] = ()
    ) -> None:
        self.read, self.rule, self.words = read, rule, tuple(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; the error for a wrong text has the rule."""
        try:
            return self.read(value) if isinstance(value, str) else value
        except ValueError:
            if not self.rule:
                raise
            self.fail(f"must be {self.rule}, got '{value:.60}'", param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the words that begin with ``incomplete``."""
        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]


def read_method(text: str, rule: str = f"one of {', '.join(METHODS)}") -> str:
    """Return the method that a name or an alias stands for; ``rule`` as for ``Text``."""
    name = ALIASES.get(text, text)
    if name not in METHODS:
        raise click.BadParameter(f"must be {rule}, got '{text:.60}'")
    return name


def read_methods(text: str) -> tuple[str, ...]:
    """Read names of methods with commas between them, each once."""
    names, rule = text.replace(",", " ").split(), f"some of {','.join(METHODS)}"
    return tuple(dict.fromkeys(read_method(name, rule) for name in names or [""]))


def register_path(
    context: click.Context | None,
    parameter: click.Parameter | None,
    path: Path,
    *,
    writes: bool = False,
) -> None:
    """Register a file of an option; raise if one option writes what another one names."""
    if context is None or parameter is None:
        return
    registered = context.meta.setdefault(__name__, [])
    hint = parameter.get_error_hint(context)
    for other_hint, other, written in registered:
        if other_hint != hint and (writes or written) and same_file(path, other):
            raise click.BadParameter(
                f"must be another file than that of {other_hint}, got '{path}'.", context, parameter
            )
    registered.append((hint, path, writes))


class InFile(click.Path):
    """A file to read, or a folder if ``folders``; no option of the same command may write it."""

    def __init__(self, *, folders: bool = False) -> None:
        super().__init__(exists=True, dir_okay=folders, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, registered as read."""
        path = super().convert(value, param, ctx)
        register_path(ctx, param, Path(str(path)))
        return path


class OutFile(click.Path):
    """A file to write, refused before any work is done if it cannot be written.

    Parameters
    ----------
    suffix
        Ending that the name must have.
    standard_output
        True if "-" stands for standard output.
    """

    def __init__(self, suffix: str = "", *, standard_output: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=standard_output, path_type=Path)
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, registered as written; check its directory too."""
        path = Path(str(super().convert(value, param, ctx)))
        if self.allow_dash and str(path) == "-":
            return path
        if not path.name.endswith(self.suffix):
            self.fail(f"must end in {self.suffix}, got '{path.name}'", param, ctx)
        register_path(ctx, param, path, writes=True)
        if path.exists() and not path.is_file():
            return path  # a pipe or a device, which is written to
        folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
        if not folder.is_dir():
            self.fail(f"directory '{folder}' does not exist; make it first", param, ctx)
        if not os.access(folder, os.W_OK):
            self.fail(f"directory '{folder}' is not writable", param, ctx)
        return path


class FileText(Text):
    """A text that may name a file, which no option of the same command may write."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; a file of this name is registered as read."""
        if isinstance(value, str) and Path(value).exists():
            register_path(ctx, param, Path(value))
        return super().convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the words that begin with ``incomplete``, else names of files."""
        items = super().shell_complete(ctx, param, incomplete)
        return items or [CompletionItem(incomplete, type="file")]


def read_numbers(text: str) -> tuple[int, ...]:
    """Read numbers and ranges of them, both ends included; "none" for none of them."""
    if text == "none":
        return ()
    numbers: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", item.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(text)
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


IN_FILE, IN_INPUT = InFile(), InFile(folders=True)
DEVICE_LIST = Text(read_numbers, "device numbers and ranges of them, such as 3,8-15")
SIZE = click.IntRange(1, 65536)
COUNT = click.IntRange(min=1)
