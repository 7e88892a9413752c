"""Options: annotated parameters of a command, or of a group of them that commands share."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import click
from click.shell_completion import CompletionItem

from moetuner.files import same_file
from moetuner.problem.settings import ENGINE, GOAL, MACHINE, parameters_of
from moetuner.solver import ALIASES, EFFORTS, METHODS

# What makes a parameter of the command line, given its names, default and help.
Maker = Callable[..., click.Parameter]

# Groups of the help in their order; an option is in one of them, else in the last.
BEGIN, OTHER = "Begin with", "Other"
RUNNING, SEARCH, JUDGING = "The running placement", "The search", "The evaluation"
GROUPS = (BEGIN, MACHINE, GOAL, ENGINE, RUNNING, SEARCH, JUDGING, OTHER)


class Option(click.Option):
    """An option that knows its group of the help."""

    def __init__(self, *arguments: Any, group: str = OTHER, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.group = group


def option(kind: Any = None, metavar: str | None = None, **others: Any) -> Maker:
    """Return the annotation of a parameter that is an option.

    Parameters
    ----------
    kind, metavar
        Its type, and its value in ``--help``.
    others
        ``group`` of the help, ``flag``, by default the parameter's name without "_file", ``help``,
        in place of which stands what a docstring says of it, and what ``click.Option`` takes.
    """
    return partial(Option, type=kind, metavar=metavar, **others)


def argument(metavar: str, kind: Any, **others: Any) -> Maker:
    """Return the annotation of a parameter that is no option; ``others`` as for click's."""
    return partial(click.Argument, metavar=metavar, type=kind, **others)


def options_of(kind: Callable[..., Any]) -> dict[str, click.Parameter]:
    """Return the options of a function or a class, its own and those of groups, by parameter.

    A class that has ``OPTIONS``, makers by name, has those.
    """
    if hasattr(kind, "OPTIONS"):
        return {name: _made(make, name, None, "") for name, make in kind.OPTIONS.items()}
    texts: dict[str, str] = {}
    for of in reversed(getattr(kind, "__mro__", (kind,))):
        texts |= parameters_of(of)
    options: dict[str, click.Parameter] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        hint = _hints(kind)[name]
        if isinstance(hint, type):
            options |= options_of(hint)
        for make in get_args(hint)[1:]:
            is_empty = parameter.default is parameter.empty
            default = None if is_empty else parameter.default
            options[name] = _made(make, name, default, texts.get(name, ""))
    return options


def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of parameters with their annotations."""
    if inspect.isclass(kind):
        return get_type_hints(kind, include_extras=True)
    return inspect.get_annotations(kind, eval_str=True)


def _made(make: Any, name: str, default: Any, text: str) -> click.Parameter:
    """Return an option with what its parameter says of it; an argument has but a name."""
    if make.func is click.Argument:
        argument: click.Parameter = make([name])
        return argument
    others = dict(make.keywords)
    flag = others.pop("flag", "--" + name.removesuffix("_file").replace("_", "-"))
    text = re.sub(r"(?<! ) \[(?=default|required)", "  [", text or others.pop("help", ""))
    others = {"default": default, **others, "help": text}
    others["show_default"] = not any(others["default"] is none for none in (None, False, ()))
    return Option([flag, name], **others)


class Command(click.Command):
    """A function as a command: its annotated parameters are options, classes are groups of them.

    Parameters
    ----------
    name
        Of the command.
    run
        What it does; without ``help``, its docstring up to the parameters is the help.
    begin_with
        Options that a newcomer needs, which come first in a help that has them in groups.
    others
        As ``click.Command`` takes them.
    """

    def __init__(
        self, name: str, run: Callable[..., Any], *, begin_with: str = "", **others: Any
    ) -> None:
        kinds = {of: kind for of, kind in _hints(run).items() if isinstance(kind, type)}
        groups = {of: [*options_of(kind)] for of, kind in kinds.items() if of != "return"}

        def call(**values: Any) -> Any:
            for of, keys in groups.items():
                values[of] = kinds[of](**{key: values.pop(key) for key in keys})
            return run(**values)

        others.setdefault("help", (inspect.getdoc(run) or "").partition("\n\nParameters\n")[0])
        params = [*options_of(run).values()]
        super().__init__(name, callback=call, params=params, **others)
        self.begin_with = begin_with.split()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for every group."""
        if not self.begin_with:
            super().format_options(ctx, formatter)
            return
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                is_first = not {*self.begin_with}.isdisjoint(parameter.opts)
                title = BEGIN if is_first else getattr(parameter, "group", OTHER)
                sections[title].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def command(name: str, **others: Any) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a ``Command`` of a function."""
    return lambda run: Command(name, run, **others)


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


class Text(click.ParamType):  # type: ignore[type-arg]
    """A text that is read, and what completes it in a shell.

    Parameters
    ----------
    read
        Its value, ValueError if there is none.
    rule
        What ``read`` accepts, to follow "must be".
    words, files
        Words that complete it, and whether names of files do.
    """

    name = "text"

    def __init__(
        self,
        read: Callable[[str], Any] = str,
        rule: str = "",
        *,
        words: Iterable[str] = (),
        files: bool = False,
    ) -> None:
        self.read, self.rule, self.words, self.files = read, rule, tuple(words), files

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what is read; an error names the rule."""
        try:
            return self.read(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"must be {self.rule}, got '{value:.60}'", param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the words that begin so, else names of files."""
        items = [CompletionItem(word) for word in self.words if word.startswith(incomplete)]
        return items or ([CompletionItem(incomplete, type="file")] if self.files else [])


def read_method(text: str, rule: str = f"one of {', '.join(METHODS)}") -> str:
    """Return the method of a name, or of another name of it; ``rule`` as for ``Text``."""
    name = ALIASES.get(text, text)
    if name not in METHODS:
        near = suggestion(text, METHODS)
        raise click.BadParameter(f"must be {rule}, got '{text:.60}'{near}")
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


def with_options(command: click.Command, text: str) -> str:
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


IN_FILE, IN_INPUT = InFile(), InFile(folders=True)
SIZE = click.IntRange(1, 65536)
# What files may leave out, and who knows it can say.
HINTS = ("num_experts", "top_k", "hidden_layers", "dense_layers")

# Options of several commands that belong to no group.
EXPERT_BYTES_HELP = "Bytes of one expert of one layer."
BYTES = Number(min=0, min_open=True)
ExpertBytes = Annotated[float | None, option(BYTES, "BYTES", group=RUNNING, help=EXPERT_BYTES_HELP)]
InPath = Annotated[Path | None, option(IN_FILE, "PLACEMENT")]
PlacementFile = Annotated[Path, argument("PLACEMENT", IN_FILE)]
SEEDS = click.IntRange(0, (1 << 63) - 1)
Seed = Annotated[int, option(SEEDS, "N", group=SEARCH, help="Random seed.")]
THREADS_HELP = "Threads; results do not depend on them. [default: all cores]"
THREADS = option(click.IntRange(1, 1024), "N", group=SEARCH, help=THREADS_HELP)
Threads = Annotated[int | None, THREADS]
TRACE_HELP = "Write the trace to this file, ending in .safetensors."
TRACE = option(OutFile(".safetensors"), "TRACE", required=True, help=TRACE_HELP)
TraceOut = Annotated[Path, TRACE]


@dataclass(frozen=True)
class LayerHints:
    """What files, and maps of experts, may leave out.

    Parameters
    ----------
    num_experts
        Experts per layer, if the input does not say (.npy).
    hidden_layers
        Layers of the model, dense ones included.
    dense_layers
        Hidden layers without experts, for engines that count them too.
    """

    num_experts: Annotated[int | None, option(SIZE, "E")] = None
    hidden_layers: Annotated[int | None, option(SIZE, "N")] = None
    dense_layers: Annotated[
        tuple[int, ...] | None,
        option(Text(read_layers, "numbers as in 0-2,5, or none"), "A-B,C,...|none"),
    ] = None

    @property
    def hints(self) -> dict[str, Any]:
        """What is said of the input, as fields of ``Hints``."""
        return {name: getattr(self, name) for name in HINTS if hasattr(self, name)}


@dataclass(frozen=True)
class FileHints(LayerHints):
    """What recordings may leave out.

    Parameters
    ----------
    top_k
        Experts per token and layer, if the input does not say (SGLang's responses).
    """

    top_k: Annotated[int | None, option(SIZE, "K")] = None


@dataclass(frozen=True)
class SearchOptions:
    """How placements are searched: arguments of ``solve``.

    Parameters
    ----------
    time_limit
        Time limit per solve, in seconds. Results then depend on the machine.
    effort
        How much to search without a time limit: default, seconds for most problems, or thorough,
        up to minutes for a last half per cent.
    """

    seed: Seed = 0
    time_limit: Annotated[
        float | None, option(Number(min=0, infinite=True), "SECONDS", group=SEARCH)
    ] = None
    effort: Annotated[str, option(click.Choice([*EFFORTS]), group=SEARCH)] = "default"
