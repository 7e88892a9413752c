"""The README tells the truth."""

import re
from pathlib import Path

import pytest

from moetuner.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_example_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    """The Python example runs as it stands, and prints the block below it."""
    code, printed = re.search(
        r"```python\n(.*?)```\n+```\n(.*?)```", README.read_text(), re.DOTALL
    ).groups()
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    capsys.readouterr()
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()))
def test_links_lead_somewhere(link):
    """Files that the README links to exist."""
    assert (README.parent / link).is_file()
