"""The command line: one file per subcommand, and one place where errors become one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from moetuner import _interrupts
from moetuner._core import __version__
from moetuner.cli import (
    advise,
    audit,
    collect,
    compare,
    convert,
    demo,
    evaluate,
    export,
    inspect,
    options,
    report,
    solve,
    verify,
)
from moetuner.files.text import printable

WRONG = 2
INTERRUPTED = 130
LONGEST_LINE = 1000


class Menu(click.Group):
    """Commands in the order in which most need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return names in the order of the flow, not of the alphabet."""
        return list(self.commands)


@click.group(
    cls=Menu, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="moetuner", message="%(prog)s %(version)s")
def moetuner() -> None:
    """Decide which GPU each expert of a Mixture-of-Experts model lives on.

    INPUT is recorded routing: a trace, saved statistics or a load table. "moetuner demo" shows it
    all on a bundled trace.
    """


for _module, _words in (
    (demo, "Run the whole flow on the bundled trace."),
    (collect, "Record which experts texts visit in a model."),
    (inspect, "Show what is in a trace: skew, groups, structure."),
    (advise, "Advise whether a better placement is worth a trial."),
    (solve, "Compute a placement and write it."),
    (compare, "Compare methods on traffic that they have not seen."),
    (evaluate, "Replay a placement token by token."),
    (audit, "Show which groups a placement serves worse."),
    (report, "Write one page on what a placement does to traffic."),
    (export, "Write a placement as an engine loads it, or check one."),
    (convert, "Join recordings into one trace."),
    (verify, "Recompute the bound that a certificate proves."),
):
    _module.command.short_help = _words
    moetuner.add_command(_module.command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    What goes wrong is told in one line on standard error: status 2, or 130 for Ctrl-C. SIGTERM is
    heard like Ctrl-C, and gives status 143 also where the best so far was written.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Paths that are not UTF-8, and other alphabets on an ASCII terminal.
            stream.reconfigure(errors="backslashreplace")
    with _interrupts.heard():
        status = _run(arguments)
        return _interrupts.status() or status


def _run(arguments: Sequence[str]) -> int:
    try:
        status = moetuner.main(arguments, prog_name="moetuner", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError as error:
        if error.filename:
            return _failed(f"{error.filename}: {error.strerror}")
        # The reader has gone (| head). What is still buffered must not be complained about at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted", INTERRUPTED)
    except click.ClickException as error:
        return _failed(error.format_message())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(where + (error.strerror or str(error)))
    except MemoryError as error:
        return _failed(f"out of memory: {error}".removesuffix(": "))
    except ValueError as error:
        text = str(error)
        return _failed(options.as_options(text) if " is needed" in text else text)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        text = f"{type(error).__name__}: {error}; this is a bug in moetuner: please report it"
        return _failed(f"{text} with the output of 'python -X dev -m moetuner ...'")


def _failed(text: str, status: int = WRONG) -> int:
    print("moetuner: error:", printable(text, LONGEST_LINE), file=sys.stderr)  # noqa: T201 - its only line
    return status
