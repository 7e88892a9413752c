"""The command line: one file per subcommand, and one place where errors become one line."""

from __future__ import annotations

from moetuner.cli import interrupts, streams  # isort: skip - before what takes long to import

import difflib
import importlib
import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from moetuner._texts import printable, suggestion

WRONG = 2
# A bug of moetuner, which its caller cannot mend.
BUG = os.EX_SOFTWARE
INTERRUPTED = 130
# The reader of standard output has gone: 128 + SIGPIPE.
GONE = 141
# Number of glibc's setting for the most arenas, parts of memory that a thread has for itself.
M_ARENA_MAX = -8
LONGEST_LINE = 1000
# How the core and Python say that there is no memory for another thread.
THREADS = re.compile(r"^threads: |can't start new thread")

# Commands in the order in which most need them: each is a module of its name, which is loaded when
# it is used, and begins with this line.
MENU = {
    "demo": "Run the whole flow on the bundled trace.",
    "collect": "Record to which experts a model routes texts.",
    "inspect": "Show what is in a trace or a placement, or what has to move.",
    "advise": "Advise whether a better placement is worth a trial.",
    "solve": "Compute a placement and write it.",
    "compare": "Compare methods on traffic that they have not seen.",
    "evaluate": "Replay a placement on traffic, and judge what it gains.",
    "drift": "Check whether traffic has drifted from a placement's profile.",
    "plan": "Plan which copies move when devices are lost, removed or added.",
    "export": "Write a placement as an engine loads it, or check one.",
    "convert": "Join recordings into one trace, or count recordings of any size.",
    "fit": "Measure one MoE layer, and write its cost model.",
    "verify": "Recompute the bound that a certificate proves.",
}
# Options for numbers of slots, and what a command says that has --copies in place of them.
SLOTS = ("--slots-per-device", "--extra-slots")
COPIES_INSTEAD = "'--copies 0,1,2' lists slots for copies, of a device and layer, to try."


class Commands(Mapping[str, click.Command]):
    """Commands by name, whose modules are loaded when they are taken."""

    def __getitem__(self, name: str) -> click.Command:
        """Return a command; KeyError if there is none."""
        if name not in MENU:
            raise KeyError(name)
        command: click.Command = importlib.import_module(f"moetuner.cli.{name}").command
        return command

    def __iter__(self) -> Iterator[str]:
        """Yield names in the order of the flow, not of the alphabet."""
        return iter(MENU)

    def __len__(self) -> int:
        """Return the number of commands."""
        return len(MENU)


class Menu(click.Group):
    """Commands in the order in which most need them; the menu itself loads none of them."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.commands = Commands()  # type: ignore[assignment]  # nobody adds one

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return names in the order of the flow, not of the alphabet."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command of a name; the error for a wrong name suggests the nearest command."""
        if args[0] not in [*self.commands] and not args[0].startswith("-"):
            raise click.UsageError(
                f"No such command '{args[0]:.60}'{suggestion(args[0], MENU)}", ctx
            )
        with interrupts.ending_at_once():
            return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each command."""
        space = formatter.width - 6 - max(map(len, MENU))
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, click.Command(name, help=line).get_short_help_str(space))
                    for name, line in MENU.items()
                ]
            )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin with ``incomplete``, and options."""
        commands = [
            CompletionItem(name, help=line)
            for name, line in MENU.items()
            if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)


HELP = """Decide which GPU each expert of a Mixture-of-Experts model lives on.

INPUT is a recording of your model's routing, in one or more files:

\b
  trace       the experts of every token, from "moetuner collect" or an engine
              (vLLM, SGLang, Megatron-Core): enough for every command
  statistics  a trace, counted: smaller, without sequences
  load table  tokens of every expert by layer and window, from the counters
              of an engine (EPLB, SGLang, TensorRT-LLM): enough to balance loads

Does it pay? What does the engine load? Has the traffic changed?

\b
  moetuner advise INPUT --devices 8
  moetuner solve INPUT --devices 8 --for sglang --out placement.json
  moetuner export placement.json --to sglang --hidden-layers 48 --out experts.json
  moetuner drift placement.json NEWER

"moetuner demo" shows it on a bundled trace.
"""


@click.group(
    cls=Menu,
    help=HELP,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, help="Show the version and exit.")
@click.option("--json", "as_json", is_flag=True, help="With --version: all that a report needs.")
@click.option("--self-test", is_flag=True, help="Compare this machine's answers with those stored.")
@click.pass_context
def moetuner(context: click.Context, version: bool, as_json: bool, self_test: bool) -> None:
    """Decide which GPU each expert of a Mixture-of-Experts model lives on."""
    if version or self_test:
        from moetuner.cli import release
    if version:
        release.say_version(context, as_json)
    elif as_json:
        raise click.UsageError("--json before a command goes with --version.", context)
    elif self_test:
        release.check_answers(context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    An error is one line on standard error, with status 2, or 70 where it is a bug of moetuner.
    Ctrl-C ends with status 130 and SIGTERM with 143, also if the best so far was written. A closed
    standard output changes nothing; if its reader has gone, work goes on in silence and ends with
    status 141, as after SIGPIPE. docs/status.md has them all.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _share_memory()
    streams.last_line_time = interrupts.start_time()
    with interrupts.raising_interrupts(), streams.standard_streams() as output:
        status = _run(arguments)
        sys.stdout.flush()
        if output is not None and isinstance(output.failure, BrokenPipeError):
            status = status or GONE
        elif output is not None and output.failure is not None:
            status = _failed(f"standard output: {output.failure.strerror}")
        interrupted = interrupts.exit_status()
        if interrupted is not None and status == 0:
            print("moetuner: interrupted: this is the best so far", file=sys.stderr)  # noqa: T201
        return interrupted or status


def _share_memory() -> None:
    """Let threads share one memory arena where addresses are limited (ulimit -v).

    Otherwise glibc reserves 64 MB of addresses for every thread. If that fails, it asks the system
    for each object by itself, which is a hundred times slower.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        import ctypes

        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _run(arguments: Sequence[str]) -> int:
    try:
        status = moetuner.main(arguments, prog_name="moetuner", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except BrokenPipeError as error:
        # With a file name it was a pipe to write to, whose reader has gone.
        return _failed(f"{error.filename}: {error.strerror}") if error.filename else GONE
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted", INTERRUPTED)
    except click.NoSuchOption as error:
        # Dashes, which all options have, bring none of them nearer.
        flags = {flag.lstrip("-"): flag for flag in error.possibilities or ()}
        context = error.ctx
        names = {parameter.name for parameter in context.command.params} if context else set()
        if error.option_name in SLOTS and "copies" in names:
            return _failed(f"No such option '{error.option_name}'. {COPIES_INSTEAD}")
        similar = difflib.get_close_matches(error.option_name.lstrip("-"), flags)
        nearest = click.NoSuchOption(
            error.option_name, error.message, [flags[name] for name in similar], error.ctx
        )
        return _failed(nearest.format_message())
    except click.ClickException as error:
        return _failed(error.format_message())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(where + (error.strerror or str(error)))
    except MemoryError as error:
        return _failed(f"out of memory: {error}".removesuffix(": "))
    except ValueError as error:
        return _failed(str(error))
    except BaseException as error:  # the core's panics are no Exception
        if interrupts.exit_status() is not None:
            # The signal came in code that does not expect one, such as an import in the core.
            return _failed("interrupted", INTERRUPTED)
        if isinstance(error, RuntimeError) and THREADS.search(str(error)):
            reason = str(error).removeprefix("threads: ")
            return _failed(f"threads: {reason}; take fewer with --threads, or allow more memory")
        if sys.flags.dev_mode or not isinstance(error, Exception):
            raise
        text = f"{type(error).__name__}: {error}; this is a bug in moetuner: please report it"
        return _failed(f"{text} with the output of 'python -X dev -m moetuner ...'", BUG)


def _failed(text: str, status: int = WRONG) -> int:
    print("moetuner: error:", printable(text, LONGEST_LINE), file=sys.stderr)  # noqa: T201 - its only line
    return status
