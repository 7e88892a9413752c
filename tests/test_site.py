"""The site: every option is in its reference, every page in its menu, every name in one place."""

import importlib.util
import json
import re
from pathlib import Path

import click
import pytest

import moetuner as mt
from moetuner.cli import MENU, moetuner

DOCS = Path(__file__).parents[1] / "docs"


def load_extension(name):
    """Return a module of docs/_extensions, which the build of the site and make use."""
    path = DOCS / "_extensions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_extension("commands")
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
    topics = REFERENCE.write_options().partition("## --")[0]
    assert {*re.findall(r"\[(--[\w-]+)\]", topics)} == {*headings}


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
        Path(line.rpartition("<")[2].rstrip(">")).name
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


def assert_alike(actual, stored, where):
    """Compare JSON; numbers may differ in their last digits."""
    if isinstance(stored, dict):
        assert actual.keys() == stored.keys(), where
        for key, value in stored.items():
            assert_alike(actual[key], value, f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(actual) == len(stored), where
        for number, (one, other) in enumerate(zip(actual, stored, strict=True)):
            assert_alike(one, other, f"{where}[{number}]")
    elif isinstance(stored, float) and isinstance(actual, float):
        assert actual == pytest.approx(stored, rel=1e-2, nan_ok=True), where
    else:
        assert actual == stored, where


def test_pictures_are_not_older_than_what_they_show():
    """What each was drawn from is computed again; `make pictures` draws them anew."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    pictures = load_extension("pictures")
    figures = pictures.compute_pictures()
    for name, figure in figures.items():
        stored = json.loads((pictures.FOLDER / f"{name}.json").read_text())
        assert_alike(pictures.describe(figure), stored, name)
    files = {path.name for path in pictures.FOLDER.glob("*.svg")}
    assert files == {f"{name}-{scheme}.svg" for name in figures for scheme in ("light", "dark")}
    pages = [DOCS.parent / "README.md", *sources()]
    shown = re.findall(r"pictures/([a-z]+-[a-z]+\.svg)", "".join(map(Path.read_text, pages)))
    assert files == set(shown)


def test_what_is_said_of_pictures_is_what_they_show():
    """Numbers in the text below a picture are those of the picture."""
    figures = {
        name: json.loads((DOCS / "pictures" / f"{name}.json").read_text())
        for name in ("devices", "losses", "cards")
    }
    index = (DOCS / "index.md").read_text()
    ratios = re.findall(r"busiest ([\d.]+) x", figures["devices"]["layout"]["title"]["text"])
    assert len(ratios) == 2
    assert all(f"{ratio} times the mean" in index for ratio in ratios)
    lost, kept, *_ = (bars["y"] for bars in figures["losses"]["data"])
    assert min(lost) > 0
    assert round(sum(lost) / len(lost)) == 1
    assert set(kept) == {0}
    wait = json.loads((DOCS / "pictures" / "wait.json").read_text())["layout"]["annotations"]
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    for text in wait:
        name, us = re.fullmatch(r"(\w+): all wait (\d+) us", text["text"]).groups()
        assert re.search(rf"{name},( all wait)? {us} us", readme)
    before, after = (f"{value:.0f}" for value in figures["cards"]["data"][0]["x"][::-1])
    assert (
        f"{before} stay on one card before, and {after} after"
        in (DOCS / "few-cards.md").read_text()
    )


SEARCHED = {
    "install": "installation.md",
    "uninstall": "installation.md",
    "upgrade": "installation.md",
    "license": "license.md",
    "changelog": "changelog.md",
    "contributing": "contributing.md",
    "lost device": "survive.md",
    "confidence interval": "sure.md",
    "groups": "choosing.md",
}


@pytest.mark.parametrize("word", SEARCHED)
def test_search_finds_a_word_where_it_belongs(word):
    """One page has it as a main entry of the index, which search puts above all others."""
    entry = re.compile(rf"^```\{{index\}} ! {word}$", re.MULTILINE)
    assert [path.name for path in sources() if entry.search(path.read_text())] == [SEARCHED[word]]


def test_search_finds_an_option_on_the_page_of_all_options():
    """Each option is a main entry of the index above its heading."""
    page = REFERENCE.write_options()
    for flag in {flag for _, flag in OPTIONS}:
        assert f"```{{index}} ! {flag}\n```\n\n({REFERENCE.anchor_of(flag)})=\n## {flag}\n" in page


def test_notebooks_are_linked_from_inside_alone():
    """Only pages for who builds moetuner lead to design.md and experiments.md."""
    index = (DOCS / "index.md").read_text()
    inside = re.search(r":caption: Inside\n\n(.*?)\n```", index, re.DOTALL)[1].split()
    assert {"design", "experiments"} <= set(inside)
    link = re.compile(r"\]\([^)]*\b(design|experiments)\.md")
    pages = {path.stem for path in sources() if link.search(path.read_text())}
    assert pages <= set(inside), pages - set(inside)
    assert not link.search((DOCS.parent / "README.md").read_text())
