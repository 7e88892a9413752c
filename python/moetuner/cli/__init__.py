"""The command line: one file per subcommand, and one place where errors become one line."""

from __future__ import annotations

import ctypes
import difflib
import os
import re
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from moetuner import _interrupts
from moetuner._checks import suggestion
from moetuner.cli import (
    advise,
    collect,
    compare,
    convert,
    demo,
    drift,
    evaluate,
    export,
    fit,
    former,
    inspect,
    plan,
    release,
    solve,
    streams,
    verify,
)
from moetuner.cli.output import Report
from moetuner.files.text import printable

WRONG = 2
# A bug of moetuner: nothing that whoever called it can mend.
BUG = os.EX_SOFTWARE
INTERRUPTED = 130
# Nobody reads standard output any more: 128 + SIGPIPE.
GONE = 141
# Number of glibc's setting: most parts of memory that threads have by themselves.
M_ARENA_MAX = -8
LONGEST_LINE = 1000
# How the core and Python say that there is no memory for another thread.
THREADS = re.compile(r"^threads: |can't start new thread")


class Menu(click.Group):
    """Commands in the order in which most need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return names in the order of the flow, not of the alphabet."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command; an error names the one that comes nearest."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            shown = [name for name, command in self.commands.items() if not command.hidden]
            nearest = suggestion(args[0], shown)
            raise click.UsageError(f"No such command '{args[0]:.60}'{nearest}", ctx)
        return super().resolve_command(ctx, args)


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
    if version:
        release.say_version(context, as_json)
    elif as_json:
        raise click.UsageError("--json before a command goes with --version.", context)
    elif self_test:
        release.check_answers(context)


# A line at the end of each command's help, in the order of the menu.
EXAMPLES = {
    demo: "",
    collect: "MODEL --dataset texts.jsonl --out trace.safetensors",
    inspect: "trace.safetensors",
    advise: "trace.safetensors --devices 8 --for vllm --report page.html",
    solve: "trace.safetensors --devices 8 --out placement.json",
    compare: "trace.safetensors --devices 8 --methods eplb,joint --splits 1",
    evaluate: "placement.json trace.safetensors --by-group --report page.html",
    drift: "placement.json newer.safetensors",
    plan: "placement.json trace.safetensors --with 2 --out more.json --steps steps.json",
    export: "placement.json --to eplb --out experts.npz",
    convert: "trace.safetensors newer.safetensors --out both.safetensors",
    fit: "--model qwen3-30b-a3b --out gpu.json",
    verify: "proof.json trace.safetensors --devices 8",
}
for _module, _example in EXAMPLES.items():
    _line = f"Example:\n\n\b\n  moetuner {_module.command.name} {_example}"
    _module.command.epilog = "\n\n".join(filter(None, (_module.command.epilog, _line)))
    moetuner.add_command(_module.command)
for _former in former.FORMER:
    moetuner.add_command(_former)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    An error is one line on standard error, with status 2, or 70 where it is a bug of moetuner.
    Ctrl-C ends with status 130 and SIGTERM with 143, also if the best so far was written. A closed
    standard output changes nothing; if its reader has gone, work goes on in silence and ends with
    status 141, as after SIGPIPE. docs/status.md has them all.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _share_memory()
    Report.heard = _interrupts.began()
    with _interrupts.heard(), streams.standard_streams() as output:
        status = _run(arguments)
        sys.stdout.flush()
        if output is not None and isinstance(output.failure, BrokenPipeError):
            status = status or GONE
        elif output is not None and output.failure is not None:
            status = _failed(f"standard output: {output.failure.strerror}")
        interrupted = _interrupts.status()
        if interrupted is not None and status == 0:
            print("moetuner: interrupted: this is the best so far", file=sys.stderr)  # noqa: T201
        return interrupted or status


def _share_memory() -> None:
    """Let threads share memory where little may be taken (ulimit -v).

    Else glibc wants 64 MB of addresses for every thread, and where it does not get them it asks the
    system for each object by itself: right, but a hundred times slower.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
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
        if _interrupts.status() is not None:
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
