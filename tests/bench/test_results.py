"""What `bench/RESULTS.md` and README say of measurements: commands, commits and figures exist."""

import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import harness
import measured
import pytest

ROOT = Path(__file__).parents[2]
README = measured.README.read_text()
RECORDS = sorted(harness.RECORDS.glob("*.json"))
# What writes documents from the records, without arguments.
WRITERS = {"bench/harness.py", "bench/measured.py"}
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


class ParsedError(Exception):
    """A command line has no fault."""


def commands():
    """Return the commands that RESULTS.md and README's table name, without duplicates."""
    page = harness.RESULTS.read_text()
    table = README.partition("## What was measured")[2].partition("\n## ")[0]
    named = re.findall(r"`(python bench/[^`]+)`", page + table)
    return [*dict.fromkeys(named)]


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command, monkeypatch):
    """The script is there, and its parser takes the parts and options."""

    def parse_only(*positional, **options):
        arguments(*positional, **options)
        raise ParsedError

    arguments = harness.arguments
    _, script, *words = shlex.split(command)
    path = ROOT / script
    assert path.exists()
    if script in WRITERS:
        assert not words
        return
    monkeypatch.setattr(harness, "arguments", parse_only)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Scripts end on SIGTERM in a way of their own, which is not that of the tests behind this one.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    # Modules beside the script have names that tests have, too.
    names = [each.stem for each in path.glob("*.py") if each.stem != "__main__"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        with pytest.raises(ParsedError):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.mark.parametrize("place", re.findall(r"\(`((?:bench/|make )[^)]+)`\)", README))
def test_what_readme_names_exists(place):
    """Targets of make, scripts and folders."""
    for name in place.split("`, `"):
        target = name.removeprefix("make ")
        assert target in TARGETS if target != name else (ROOT / name).exists()


def git(*words):
    """Run git in the project."""
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_commits_are_in_the_history(path):
    """Of every record, so that what it says can be run again."""
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("the history is not here: no clone, or a shallow one")
    commit = json.loads(path.read_text())["commit"].removesuffix(" and changes")
    assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit


def test_figures_of_readme_are_in_the_records():
    """Every number of the table; `python bench/measured.py` writes those that are not."""
    assert list(measured.rows_of(README)) == list(measured.ROWS)
    assert measured.filled(README) == README


@pytest.mark.parametrize("name", measured.ROWS)
def test_a_figure_that_is_changed_is_noticed(name):
    """Each number of a row by itself; so is one too many."""
    answer = measured.rows_of(README)[name]
    for number in measured.NUMBER.finditer(answer):
        changed = f"{float(number[0]) + 1:.{len(number[0].partition('.')[2])}f}"
        other = answer[: number.start()] + changed + answer[number.end() :]
        assert other != answer
        assert measured.with_figures(name, other) == answer
    with pytest.raises(ValueError, match="numbers, the records"):
        measured.with_figures(name, f"{answer} 1.5")


def test_the_best_of_the_others_is_who_readme_says():
    """A row that names another one is refused, with both names."""
    with pytest.raises(
        ValueError, match="the best of the others is deepseek_vec, README names vLLM"
    ):
        measured.beside_best("deepseek-v3-phases", "vLLM")
