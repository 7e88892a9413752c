"""The table of earlier names of commands, which stay until 0.2."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner.cli import evaluate, inspect
from moetuner.cli.options import IN_FILE, FormerCommand, list_options, make_option
from moetuner.cli.options.figures import FigureOptions
from moetuner.cli.options.pages import page_option

# Options of ``evaluate`` that its former names never had.
NEW = {"by_group", "lost", "fail_if_gain_below", *list_options(FigureOptions)}
PAGES = {"report_file", "figures", "expert_bytes"}
GATES = {"measures", "fail_if_worse", "waterfill"}
EVALUATE_OPTIONS = {str(parameter.name) for parameter in evaluate.command.params} - NEW

OUT = make_option(page_option(Path("report.html"), flag="--out"), "report_file", "Page to write.")
FILE = click.Argument(
    ["input_files"], metavar="PLACEMENT", type=IN_FILE, callback=lambda *values: values[-1:]
)
FILES = click.Argument(["input_files"], metavar="BEFORE AFTER", type=IN_FILE, nargs=2)

COMMANDS = (
    FormerCommand(
        "audit",
        "evaluate --by-group",
        evaluate.command,
        names=EVALUATE_OPTIONS - PAGES,
        by_group=True,
        sections=evaluate.GROUPS,
    ),
    FormerCommand(
        "report",
        "evaluate --report FILE.html",
        evaluate.command,
        names=EVALUATE_OPTIONS - GATES,
        params=[OUT],
        sections=evaluate.PAGE,
    ),
    FormerCommand(
        "show",
        "inspect",
        inspect.command,
        names=inspect.PLACEMENT_OPTIONS,
        params=[FILE],
        is_placement=True,
    ),
    FormerCommand(
        "diff",
        "inspect",
        inspect.command,
        names=inspect.MOVES_OPTIONS,
        params=[FILES],
        is_placement=True,
    ),
)
FORMER = {str(command.name): command for command in COMMANDS}
