"""The site: every option is in its reference, every page in its menu, every name in one place."""

import importlib.util
import re
from pathlib import Path

import click
import pytest

import moetuner as mt
from moetuner.cli import MENU, moetuner

DOCS = Path(__file__).parents[1] / "docs"


def load_extension():
    """Return docs/_extensions/commands.py, which writes the reference when the site is built."""
    path = DOCS / "_extensions" / "commands.py"
    spec = importlib.util.spec_from_file_location("commands", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_extension()
OPTIONS = [
    (name, flag)
    for name, (command, _) in REFERENCE.list_commands().items()
    for flag in REFERENCE.options_of(command)
]


def read_section(page):
    """Return the text of a page, or of the section of it that a link names."""
    path, _, anchor = page.partition("#")
    parts = re.split(r"^(#+ .+)$", (DOCS / path).read_text(), flags=re.MULTILINE)
    if not anchor:
        return "".join(parts)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    (text,) = [body for head, body in bodies.items() if REFERENCE.slug(head.lstrip("# ")) == anchor]
    return text


def test_options_are_those_of_the_commands():
    """What the reference lists is what click parses, of every command that the menu has."""
    parsed = [
        (name, max(parameter.opts, key=len))
        for name in MENU
        for parameter in moetuner.commands[name].params
        if isinstance(parameter, click.Option)
    ]
    assert parsed == OPTIONS
    assert len(parsed) > 200


@pytest.mark.parametrize("name", MENU)
def test_a_command_shows_all_of_its_help(name):
    """Its page has every option once, with the help and the default that ``--help`` shows."""
    page = REFERENCE.write_command(name)
    command, context = REFERENCE.list_commands()[name]
    entries = re.findall(r"^````\{option\} (.*)$", page, re.MULTILINE)
    assert len(entries) == len(REFERENCE.options_of(command))
    plain = re.sub(r"[`\\]", "", page)
    for flag, option in REFERENCE.options_of(command).items():
        assert sum(flag in entry.split() for entry in entries) == 1, flag
        text = " ".join(option.get_help_record(context)[1].split())
        sentence = text.partition(" [")[0].replace("`", "").replace('"', "")
        assert sentence in plain.replace('"', ""), flag


@pytest.mark.parametrize(("name", "flag"), OPTIONS)
def test_an_option_is_explained_where_its_link_leads(name, flag):
    """The section exists and names the option."""
    section = read_section(REFERENCE.find_explanation(name, flag))
    assert re.search(rf"{flag}(?![\w-])", section)


def test_no_explanation_is_left_over():
    """Every row of the table is of an option that some command has."""
    flags = {flag for _, flag in OPTIONS}
    for key in REFERENCE.EXPLAINED:
        *command, flag = key.split()
        assert (command[0], flag) in OPTIONS if command else flag in flags, key


def test_all_options_are_listed_once():
    """The page of all options has a heading for each, in the order of the alphabet."""
    headings = re.findall(r"^## (--.*)$", REFERENCE.write_options(), re.MULTILINE)
    assert headings == sorted({flag for _, flag in OPTIONS})


def test_every_command_has_a_page_with_its_keys():
    """Its page is generated, and has the sections of docs/json.md that are the command's."""
    for name in MENU:
        page = (DOCS / "commands" / f"{name}.md").read_text()
        assert f"<!-- generated: command {name} -->" in page
        assert "| `schema`" in REFERENCE.write_json(name), name


def test_every_public_name_has_its_place():
    """Each name of the package is documented on one page of docs/python."""
    pages = "".join(path.read_text() for path in sorted((DOCS / "python").glob("*.md")))
    documented = re.findall(r"^\.\. auto(?:class|function):: moetuner\.(\w+)$", pages, re.MULTILINE)
    assert sorted(documented) == sorted(set(mt.__all__) - {"__version__"})


def test_every_page_is_in_the_menu():
    """Each page is in one list of contents, but for two that are linked from every page."""
    lists = re.findall(r"```\{toctree\}\n(.*?)```", "".join(map(Path.read_text, sources())), re.S)
    entries = [
        Path(line).name
        for text in lists
        for line in text.splitlines()
        if line and not line.startswith(":")
    ]
    linked = re.findall(r"pathto\('(\w+)'\)", (DOCS / "_templates" / "links.html").read_text())
    pages = {path.stem for path in sources()} - {"index"} - {"changelog", "license"}
    assert pages <= set(entries), pages - set(entries)
    assert {"changelog", "license", "contributing"} <= set(linked)


def sources():
    """Return the pages of the site."""
    return [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
