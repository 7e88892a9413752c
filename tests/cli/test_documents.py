"""Commands that documents show exist, with the options that they name."""

import re
import shlex
from pathlib import Path

import pytest

from moetuner.cli import moetuner

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text):
    """Commands in fences and in running text, without what is a comment or goes on elsewhere."""
    for fence in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in fence.replace("\\\n", " ").splitlines():
            if line.startswith("moetuner "):
                yield line.split(" #")[0].split(" | ")[0]
    yield from re.findall(r"`(moetuner [a-z]+ [^`\n]*)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page):
    """Each names a subcommand, and options that it has."""
    for line in commands(page.read_text()):
        words = shlex.split(line)[1:]
        command = moetuner.commands.get(words[0])
        if words[0].isupper() or words[0].startswith("-"):
            continue
        assert command is not None, line
        known = {name for parameter in command.params for name in parameter.opts}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in known | {"--help"}, line
