"""Options of commands: fields of shared dataclasses, or parameters of a command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import click

from moetuner._checks import ArgumentError
from moetuner._texts import suggestion
from moetuner.cli.options.kinds import SIZE, Number, OutFile, Text, read_numbers
from moetuner.serving.settings import ENGINE, GOAL, MACHINE, OTHER, read_parameters
from moetuner.solver import EFFORTS

# Groups of the help in their order; an option is in one of them, else in the last.
BEGIN = "Begin with"
RUNNING, SEARCH, JUDGING = "The running placement", "The search", "The evaluation"
GROUPS = (BEGIN, MACHINE, GOAL, ENGINE, RUNNING, SEARCH, JUDGING, OTHER)

TYPED = f"{__name__}.typed"

# Errors of click about numbers, in plainer words.
NUMBERS = {"is not a valid integer": "is not an integer", "is not a valid float": "is not a number"}


class Option(click.Option):
    """An option with its group in the help, and a value that is left out of next commands.

    That value is ``usual``, besides the default.
    """

    def __init__(
        self, *arguments: Any, group: str = OTHER, usual: Any = None, **others: Any
    ) -> None:
        super().__init__(*arguments, **others)
        self.group, self.usual = group, usual

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value; the error for a wrong one suggests the nearest choice."""
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter as error:
            text = error.message.rstrip(".").removesuffix(" range")
            for clicks, plain in NUMBERS.items():
                text = text.replace(clicks, plain)
            text += self._suggestion(value) if "Did you mean" not in text else ""
            raise click.BadParameter(text, error.ctx, error.param, error.param_hint) from None

    def _suggestion(self, value: Any) -> str:
        """Return a question that names the choice nearest to a value; empty where there is none."""
        words = getattr(self.type, "choices", None) or getattr(self.type, "words", None)
        metavar = self.metavar or ""
        if not words and "|" in metavar:  # else words in it are no choices: FILE.html
            words = re.findall(r"\b[a-z_]{3,}\b", metavar)
        typed = re.split("[,:= ]", value) if isinstance(value, str) else value
        if not words or not isinstance(typed, list | tuple):  # a path is a default
            return ""
        return suggestion(next((word for word in typed if word not in words), ""), words)


def option(kind: Any = None, metavar: str | None = None, default: Any = None, **others: Any) -> Any:
    """Return a field, or the default of a parameter, that is an option.

    Parameters
    ----------
    kind, metavar
        Type of the value, and the name of the value in ``--help``.
    default
        Value of an option that is not given.
    others
        ``group`` in the help; ``flag``, by default the field's name without "_file"; ``short``, a
        flag of one letter; ``help``, by default the docstring of the field; and arguments of
        ``click.Option``.
    """
    return field(default=default, metadata={"type": kind, "metavar": metavar, **others})


def argument(metavar: str, kind: Any, **others: Any) -> Any:
    """Return a field that is a positional argument; ``others`` as for ``click.Argument``."""
    metadata = {"is_argument": True, "type": kind, "metavar": metavar}
    return field(default=None, metadata=metadata | others)


def list_options(kind: Any) -> dict[str, click.Parameter]:
    """Return the options of a function or a class, with those of its groups, by name.

    A class may have its fields by name in ``OPTIONS``.
    """
    members: dict[str, Any] = getattr(kind, "OPTIONS", {})
    if is_dataclass(kind):
        members = {member.name: member for member in fields(kind)}
    elif not members:
        signature = inspect.signature(kind)
        members = {name: value.default for name, value in signature.parameters.items()}
    texts: dict[str, str] = {}
    for base in reversed(getattr(kind, "__mro__", (kind,))):
        texts |= read_parameters(base)
    groups = find_groups(kind)
    options: dict[str, click.Parameter] = {}
    for name, member in members.items():
        if name in groups:
            options |= list_options(groups[name])
        elif isinstance(member, Field) and member.metadata:
            options[name] = make_option(member, name, texts.get(name, ""))
    return options


def find_groups(kind: Any) -> dict[str, type]:
    """Return the parameters of a function that are groups of options, with their classes."""
    if isinstance(kind, type):
        return {}
    types = inspect.get_annotations(kind, eval_str=True)
    return {
        name: group
        for name, group in types.items()
        if isinstance(group, type) and (is_dataclass(group) or hasattr(group, "OPTIONS"))
    }


def make_option(member: Field[Any], name: str, text: str) -> click.Parameter:
    """Make the option of a field; its help is the field's docstring."""
    keywords = dict(member.metadata)
    if keywords.pop("is_argument", False):
        return click.Argument([name], **keywords)
    flag = keywords.pop("flag", "--" + name.removesuffix("_file").replace("_", "-"))
    names = [*filter(None, [keywords.pop("short", None)]), flag, name]
    default = None if member.default is MISSING else member.default
    text = re.sub(r"(?<! ) \[(?=default|required)", "  [", keywords.pop("help", text))
    shows = not any(default is none for none in (None, False, ()))
    if not keywords.get("required"):  # a default, even None, is a value
        keywords["default"] = default
    return Option(names, **{**keywords, "help": text, "show_default": shows})


class Command(click.Command):
    """A command that runs a function; parameters that are groups become the groups' options.

    Parameters
    ----------
    name
        Name of the command.
    run
        Function of the command; without ``help``, its docstring up to the parameters is the help.
    example
        Arguments of the example at the end of the help.
    begin_with
        Options that a newcomer needs, which come first in the help.
    others
        Arguments of ``click.Command``.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        *,
        example: str = "",
        begin_with: str = "",
        epilog: str | None = None,
        **others: Any,
    ) -> None:
        groups = {group: (kind, [*list_options(kind)]) for group, kind in find_groups(run).items()}

        def call(**values: Any) -> Any:
            for group, (kind, keys) in groups.items():
                values[group] = kind(**{key: values.pop(key) for key in keys})
            return run(**values)

        line = f"Example:\n\n\b\n  moetuner {name} {example}"
        others["epilog"] = "\n\n".join(filter(None, (epilog, line)))
        others.setdefault("help", (inspect.getdoc(run) or "").partition("\n\nParameters\n")[0])
        params = [*list_options(run).values()]
        super().__init__(name, callback=call, params=params, **others)
        self.begin_with = {*begin_with.split()}

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors name options in place of the arguments that they set."""
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            raise click.ClickException(error.renamed(list_flags())) from error

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the typed arguments, for next commands; then parse them."""
        ctx.meta[TYPED] = [*args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for every group, in the same order for all commands."""
        if {getattr(parameter, "group", OTHER) for parameter in self.params} <= {OTHER}:
            super().format_options(ctx, formatter)
            return
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                is_first = not self.begin_with.isdisjoint(parameter.opts)
                sections[BEGIN if is_first else getattr(parameter, "group", OTHER)].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def command(name: str, **others: Any) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a ``Command`` of a function."""
    return lambda run: Command(name, run, **others)


def list_typed(*kinds: type) -> dict[str, Any]:
    """Return options of the running command as they were typed, by name: all, or those of groups.

    Options that no other command takes over, such as --threads, are left out.
    """
    context = click.get_current_context()
    texts = context.command.make_parser(context).parse_args([*context.meta[TYPED]])[0]
    names = {name for kind in kinds for name in list_options(kind)} if kinds else {*texts}
    return {name: text for name, text in texts.items() if name in names - {*NOT_PASSED_ON}}


# Options that no next command takes over.
NOT_PASSED_ON = ("threads", "report_file", "figures", "json_file", "quiet")


def list_flags() -> dict[str, str]:
    """Return the flags of the running command, by the arguments that they set."""
    command = click.get_current_context().command
    options = (option for option in command.params if isinstance(option, click.Option))
    return {str(option.name): max(option.opts, key=len) for option in options}


# Options of several commands that belong to no group.
expert_bytes_option = partial(option, Number(min=0, min_open=True), "BYTES", group=RUNNING)
seed_option = partial(
    option, click.IntRange(0, (1 << 63) - 1), "N", default=0, group=SEARCH, help="Random seed."
)
threads_option = partial(
    option,
    click.IntRange(1, 1024),
    "N",
    group=SEARCH,
    help="Threads; results do not depend on them. [default: all cores]",
)
trace_option = partial(
    option,
    OutFile(".safetensors"),
    "TRACE",
    required=True,
    help="Write the trace to this file, ending in .safetensors.",
)


@dataclass(frozen=True)
class LayerHints:
    """Sizes of the model that a file, or a map of experts, may leave out.

    Parameters
    ----------
    num_experts
        Experts per layer, if the input does not say (.npy).
    hidden_layers
        Layers of the model, dense ones included.
    dense_layers
        Hidden layers without experts, for engines that count them too.
    """

    num_experts: int | None = option(SIZE, "E")
    hidden_layers: int | None = option(SIZE, "N")
    dense_layers: tuple[int, ...] | None = option(
        Text(read_numbers, "numbers as in 0-2,5, or none"), "A-B,C,...|none"
    )

    @property
    def hints(self) -> dict[str, Any]:
        """The options as fields of ``Hints``."""
        names = ("num_experts", "top_k", "hidden_layers", "dense_layers")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass(frozen=True)
class FileHints(LayerHints):
    """Sizes of the model that a recording may leave out.

    Parameters
    ----------
    top_k
        Experts per token and layer, if the input does not say (SGLang's responses).
    """

    top_k: int | None = option(SIZE, "K")


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search for a placement, arguments of ``solve``.

    Parameters
    ----------
    time_limit
        Time limit per solve, in seconds. Results then depend on the machine.
    effort
        How much to search without a time limit: default, seconds for most problems; brief, half of
        that; or thorough, up to minutes for a last half per cent.
    """

    seed: int = seed_option()
    time_limit: float | None = option(Number(min=0, infinite=True), "SECONDS", group=SEARCH)
    effort: str = option(click.Choice([*EFFORTS]), default="default", group=SEARCH)
