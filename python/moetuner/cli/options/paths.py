"""Files that options name: read or written, never both, and refused before any work is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from moetuner.files import same_file


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
    """A file to read, which no option of the same command may write.

    Parameters
    ----------
    folders
        Whether it may be a folder, too.
    """

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
        Whether "-" stands for standard output.
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


IN_FILE = InFile()
IN_INPUT = InFile(folders=True)
