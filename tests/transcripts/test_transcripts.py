"""Transcripts: what commands print now is what they printed when it was stored.

Each page is documentation of one station of the flow: sentences, and fences of ``console`` in which
a line ``$ moetuner ...`` is followed by what the command prints. The commands of a page run in
order, in a folder of its own; a file that is named and not there is made by ``inputs.py``. A page
that begins with ``<!-- needs: torch -->`` is skipped without that package.

``MOETUNER_STORE_TRANSCRIPTS=1 python -m pytest tests/transcripts`` stores all pages anew.
"""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inputs import make_inputs

import moetuner as mt

STORE = "MOETUNER_STORE_TRANSCRIPTS"
PAGES = sorted(Path(__file__).parent.glob("*.md"))
PROMPT, FENCE = "$ ", "```"
NEEDS = re.compile(r"<!-- needs: (.+) -->")
# Digits and decimals of JSON's numbers: smaller ones may be what sums that are alike differ by.
DIGITS, DECIMALS = 9, 12


def rounded(number: re.Match[str]) -> str:
    """Return a number of JSON with fewer digits."""
    return f"{round(float(number[0]), DECIMALS) + 0.0:.{DIGITS}g}"


def without_seconds(table: re.Match[str]) -> str:
    """Return a table without its last column, the seconds of a search."""
    return re.sub(r" +(seconds|[\d,]+\.\d\d)$", "", table[0], flags=re.MULTILINE)


def joined(numbers: re.Match[str]) -> str:
    """Return a list of JSON in one line."""
    return re.sub(r"\s*\n\s*", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]")


# All that is shown in other words than it is printed: what, how, and why.
NORMALISED: tuple[tuple[str, str | Callable[[re.Match[str]], str], str], ...] = (
    (r"[ \t]+$", "", "editors take spaces at the end of a line away"),
    (
        r"^method .* seconds$\n(?:.+\n)*",
        without_seconds,
        "times differ, and alike ones are not shown",
    ),
    (r"^paper  .*", "paper  ***", "another version of HiGHS may choose another of equal answers"),
    (r'("\w*seconds": )\d[^,\s]*', r"\1SECONDS", "times of searches differ"),
    (r"\d{4}-\d\d-\d\d[T ][\d:.]+[+-]\d\d:\d\d", "DATE", "the time of a file is that of the test"),
    (rf"\b{re.escape(mt.__version__)}\b", "VERSION", "every release has another one"),
    (r"\b[0-9a-f]{64}\b", "SHA-256", "other versions of libraries write files with other bytes"),
    (r"-?\d+\.\d{9,}(e-?\d+)?", rounded, "sums may end in other digits on another processor"),
    (r"\[\n[^\[\]{}]*\]", joined, "JSON has a line for each number: a page would be long"),
)


def normalised(text: str) -> str:
    """Return what was printed without what may differ."""
    for pattern, shown, _ in NORMALISED:
        text = re.sub(pattern, shown, text, flags=re.MULTILINE)
    return text


class PageText(HTMLParser):
    """What a page of results says, without its charts: a line for each element."""

    HIDDEN = ("script", "style", "svg")
    INLINE = ("a", "abbr", "b", "code", "em", "i", "small", "span", "strong", "td", "th")

    def __init__(self) -> None:
        super().__init__()
        self.text, self.hidden = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        self.text += "  " if tag in ("td", "th") else "" if tag in self.INLINE else "\n"

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN
        self.text += "" if tag in self.INLINE else "\n"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += data.replace("\n", " ")

    def lines(self) -> str:
        """Return the text without empty lines."""
        return "".join(f"{line.strip()}\n" for line in self.text.split("\n") if line.strip())


def page_text(path: Path) -> str:
    """Return what a page of results says."""
    parser = PageText()
    parser.feed(path.read_text())
    return parser.lines()


# What a page may run besides moetuner, to show a file that a command wrote.
SHOWN = {"cat": Path.read_text, "page-text": page_text}


def printed(line: str, run) -> Iterator[str]:
    """Run a command line, and give the lines that it prints.

    Those of standard error begin with ``2> ``, and an exit status that is not 0 is the last one.
    """
    make_inputs(line)
    program, *words = sys.argv[:] = shlex.split(line)  # a page of results has it
    if program in SHOWN:
        (file,) = map(Path, words)
        assert file.is_file(), f"no command wrote {file}"
        status, out, err = 0, SHOWN[program](file), ""
    else:
        assert program == "moetuner", f"no program of a transcript: {line}"
        status, out, err = run(*words)
    yield from normalised(out).splitlines()
    yield from (f"2> {row}".rstrip() for row in normalised(err).splitlines())
    if status:
        yield f"exit status {status}"


def rendered(page: str, run) -> str:
    """Return a page whose commands are followed by what they print now."""
    lines, fence = [], None
    for line in page.splitlines():
        if line.startswith(FENCE):
            fence = None if fence else line
            assert fence in (None, f"{FENCE}console"), f"no fence of a transcript: {line}"
        if not fence or line == fence:
            lines.append(line)
        elif line.startswith(PROMPT):
            is_first = lines[-1] == fence
            lines += [*[""] * (not is_first), line, *printed(line.removeprefix(PROMPT), run)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """Work in an empty folder; help is 100 characters wide, and nothing has a colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.usefixtures("brief", "terminal")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_print_what_is_stored(path, run):
    """A difference to the stored page is shown line by line."""
    stored = path.read_text()
    for needed in NEEDS.findall(stored):
        pytest.importorskip(needed)
    now = rendered(stored, run)
    if os.environ.get(STORE):
        path.write_text(now)
    elif now != stored:
        names = (f"{path.name}, stored", f"{path.name}, printed now")
        lines = difflib.unified_diff(stored.splitlines(), now.splitlines(), *names, lineterm="")
        what_to_do = f"If this is meant: {STORE}=1 python -m pytest tests/transcripts"
        pytest.fail("\n".join([*lines, what_to_do]), pytrace=False)
