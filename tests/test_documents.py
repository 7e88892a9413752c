"""Documents tell the truth: what they show is run, and prints what they say.

Every document is read from its first line to its last in a folder of its own. Fences of ``python``
and ``sh`` are run; a fence without a language is what the one before printed, with ``...`` for what
differs from run to run. A command that is not moetuner's is named, with the reason, in a comment
before its fence: ``<!-- not run: vllm, curl: they need a GPU -->``. What commands in running text
name is run where they name files, and else only known.
"""

import ast
import doctest
import importlib
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import harness
import pytest
from given import GIVEN
from sybil import Example, Region, Sybil
from sybil.example import SybilFailure
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from moetuner.cli import moetuner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page.relative_to(ROOT).as_posix() for page in PAGES if "_build" not in page.parts]
TRANSCRIPTS = sorted((ROOT / "tests" / "transcripts").glob("*.md"))
TRANSCRIPTS = [page.relative_to(ROOT).as_posix() for page in TRANSCRIPTS]

PACKAGE = ROOT / "python"
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text()
]

FENCES = FencedCodeBlockLexer(r"[^\n]*")
NOT_RUN = DirectiveInHTMLCommentLexer("not run", r"[^\n]*?")
INLINE = re.compile(r"`(moetuner [a-z]+(?: [^`]*)?)`")
LINK = re.compile(r"\]\((?!http)([^)#]+)[^)]*\)")
# Neither run nor printed by anything.
TEXT = {"text", "yaml"}
# Searches whose answers no document shows are cut short, those of models of many layers by a clock.
SEARCHES, SHORT = {"solve", "compare", "advise"}, ["--time-limit", "0.1"]


class Reader:
    """Runs what a document shows, in order.

    ``run`` runs moetuner's command line and gives what it printed, ``printed`` what Python has.
    What a document does not show is searched ``briefly``.
    """

    def __init__(self, run, printed, briefly, names):
        self.run, self.printed = run, printed
        self.briefly, self.names = briefly, names
        self.said = None  # by the last fence that was run
        self.unneeded, self.needed = {}, set()  # programs that are not to be run
        self.values = {}  # of the shell's variables

    def __call__(self, document):
        """Find what there is to do, as Sybil asks."""
        fences, comments = list(FENCES(document)), list(NOT_RUN(document))
        languages = [fence.lexemes["language"].strip() for fence in fences]
        kinds = {"python": self.python, "sh": self.commands, "": self.output}
        for fence, language, after in zip(fences, languages, [*languages, None][1:], strict=True):
            is_text = language.startswith("{") or language in TEXT
            parsed = (fence.lexemes["source"], after == "")
            yield Region(fence.start, fence.end, parsed, self.text if is_text else kinds[language])
        for comment in comments:
            yield Region(comment.start, comment.end, comment.lexemes["arguments"], self.excuse)
        taken = [(of.start, of.end) for of in (*fences, *comments)]
        for match in INLINE.finditer(document.text):
            if not any(start <= match.start() < end for start, end in taken):
                yield Region(match.start(), match.end(), match[1], self.mention)

    def text(self, example: Example) -> str | None:
        """Nothing that could be run hides here."""
        source, _ = example.parsed
        return "a command in a fence of text" if re.search("^moetuner ", source, re.M) else None

    def excuse(self, example: Example) -> str | None:
        """Note which programs are not run."""
        programs, _, reason = example.parsed.partition(": ")
        if not reason:
            return "what is not run needs a reason"
        self.unneeded |= dict.fromkeys(re.split(r",\s*", programs), reason)
        return None

    def python(self, example: Example) -> None:
        """Run a block; names stay for the next."""
        source, _ = example.parsed
        self.printed()
        code = "\n" * example.line + textwrap.dedent(source)
        exec(compile(code, example.path, "exec"), self.names)
        self.said = self.printed()

    def commands(self, example: Example) -> str | None:
        """Run moetuner's lines; the others have an excuse, and all of those are needed."""
        source, shown = example.parsed
        self.said = ""
        for line in source.replace("\\\n", " ").splitlines():
            given = re.sub(r"\$([A-Z]+)", lambda name: self.values[name[1]], line)
            words, values = shlex.split(given, comments=True), {}
            while words and (value := re.fullmatch(r"(\w+)=(.*)", words[0])):
                values[value[1]] = value[2]
                del words[0]
            if not words:
                self.values |= values
            if words[:1] == ["moetuner"]:
                self.said += self.command(words[1:], shown)
            elif words and words[0] in self.unneeded:
                self.needed.add(words[0])
            elif words:
                return f"{words[0]!r} is not run, and no comment before the fence says why"
        left = self.unneeded.keys() - self.needed
        self.unneeded, self.needed = {}, set()
        return f"not said to be run, and not there: {sorted(left)}" if left else None

    def command(self, words, shown):
        """Run one; it must succeed in silence."""
        if shown:
            return self.run(*words)
        with self.briefly():
            return self.run(*words, *(SHORT if words[0] in SEARCHES else ()))

    def output(self, example: Example) -> str | None:
        """Compare with what was printed; every line but its trailing spaces."""
        expected, _ = example.parsed
        if self.said is None:
            return "nothing before this fence prints anything; other fences name their language"
        actual = "".join(line.rstrip() + "\n" for line in self.said.splitlines())
        self.said, checker = None, doctest.OutputChecker()
        if checker.check_output(expected, actual, doctest.ELLIPSIS):
            return None
        return checker.output_difference(doctest.Example("", expected), actual, doctest.ELLIPSIS)

    def mention(self, example: Example) -> str | None:
        """Run a command in running text that names files; know the others."""
        words = shlex.split(example.parsed)[1:]
        if any(re.search(r"[a-z]\.[a-z]|^[A-Z]+$", word) for word in words):
            self.command(words, shown=False)
            return None
        command = moetuner.commands.get(words[0])
        if command is None:
            return f"no command {words[0]}"
        there = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        unknown = [word for word in words[1:] if word.startswith("--") and word not in there]
        return f"unknown: {unknown}" if unknown else None


@pytest.fixture
def read(ok, capsys, briefly):
    """Return a function that reads a document to its end."""

    def read(page, names):
        reader = Reader(ok, lambda: capsys.readouterr().out, briefly, names)
        for example in Sybil([reader]).parse(page):
            example.evaluate()
        assert not reader.unneeded

    return read


@pytest.mark.parametrize("page", PAGES)
def test_what_is_shown_is_so(page, read, capsys, tmp_path, monkeypatch):
    """Blocks and commands run, in order, and print what stands below them."""
    monkeypatch.chdir(tmp_path)
    names = GIVEN[page](tmp_path) if page in GIVEN else {}
    capsys.readouterr()
    read(ROOT / page, names)


FAULTS = {
    "another output": "```python\nprint(1)\n```\n\n```\n2\n```\n",
    "no output": "```sh\nmoetuner --version\n```\n\n```\n```\n",
    "an output of nothing": "```\n1\n```\n",
    "an error": "```python\nprint(one)\n```\n",
    "an unknown option": "```sh\nmoetuner demo --directory x\n```\n",
    "an unknown option in the text": "`moetuner demo --directory x`",
    "an unknown command in the text": "`moetuner demonstrate --out x`",
    "a file that is not there": "`moetuner inspect trace.npz`",
    "a command of others": "```sh\nvllm serve\n```\n",
    "no reason": "<!-- not run: vllm -->\n```sh\nvllm serve\n```\n",
    "a reason for nothing": "<!-- not run: vllm: why -->\n```sh\nmoetuner --version\n```\n",
    "a reason for another fence": "<!-- not run: vllm: why -->\n",
    "a hidden command": "```text\nmoetuner demo\n```\n",
    "an unknown language": "```console\n$ moetuner demo\n```\n",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, read, tmp_path, monkeypatch):
    """A document that is wrong does not pass."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(FAULTS[fault])
    with pytest.raises((AssertionError, KeyError, NameError, SybilFailure)):
        read(page, {})


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    """Examples in docstrings print what they say."""
    monkeypatch.chdir(tmp_path)
    if name.startswith("moetuner.torch"):
        pytest.importorskip("torch")
    module = importlib.import_module(name)
    actual = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    written = Path(module.__file__).read_text().count("    >>> ")
    assert sum(len(test.examples) for test in actual) == written
    for test in actual:
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """What a page links to exists."""
    for link in LINK.findall((ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), link


def prose(page):
    """Give the lines of a page, with their numbers, that are neither code nor a table."""
    fence = None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        mark = re.match(r"\s*(```+|~~~+|\$\$)", line)
        if mark and fence in (None, mark[1]):
            fence = None if fence else mark[1]
        elif fence is None and not line.lstrip().startswith("|"):
            yield number, line


@pytest.mark.parametrize("page", [*PAGES, *TRANSCRIPTS, "bench/README.md"])
def test_prose_can_be_reviewed(page):
    """Lines have at most 120 characters, so that a diff shows what is different."""
    assert [number for number, line in prose(page) if len(line) > 120] == []


ADDITIONS = re.findall(
    r"^\*\*([^*]+)\*\*((?:.|\n)*?):\n\n((?:- .*\n(?:  .*\n)*)+)",
    (ROOT / "docs" / "architecture.md").read_text().partition("## To add")[2],
    re.MULTILINE,
)
CODE = [
    path
    for folder, pattern in (
        ("python/moetuner", "*.py"),
        ("python/moetuner", "*.pyi"),
        ("rust", "*.rs"),
    )
    for path in sorted((ROOT / folder).rglob(pattern))
] + [ROOT / "pyproject.toml"]


@cache
def code_of(path):
    """Text of a file without comments and docstrings, in which a word names nothing."""
    text = path.read_text()
    if path.suffix == ".rs":
        return re.sub(r"//.*", "", text)
    lines = text.splitlines()
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                lines[node.lineno - 1 : node.end_lineno] = [""] * (
                    node.end_lineno - node.lineno + 1
                )
    return re.sub("#.*", "", "\n".join(lines))


def examples_of(title, about):
    """Names of the example of a list, of which no other file may name any."""
    sentence = re.search(r"such\s+as\s+(.+), which no other\s+file names", about, re.DOTALL)
    assert sentence, f"{title} has no example"
    return re.findall(r"`([^`]+)`", sentence[1])


@pytest.mark.parametrize(("title", "about", "bullets"), ADDITIONS)
def test_lists_of_what_to_add_are_followed(title, about, bullets):
    """Files and names in them exist; the code of no other file has a name of the example."""
    examples = examples_of(title, about)
    files = set()
    for bullet in re.split(r"^- ", bullets, flags=re.MULTILINE)[1:]:
        for named in re.match(r"(`[^`]+`(?:[^:`]+`[^`]+`)*):", bullet)[1].split("`")[1::2]:
            place = ROOT / named.replace("<name>", examples[0])
            assert place.exists(), f"{title}: {named}"
            inside = [path for path in CODE if path.is_relative_to(place)] or [place]
            files.update(inside)
        content = "".join(path.read_text() for path in inside if path.is_file())
        for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", bullet.partition(":")[2]):
            assert re.search(rf"\b{name}\b", content), f"{title}: {name} in {named}"
    for example in examples:
        actual = {path for path in CODE if re.search(rf"\b{example}\b", code_of(path))}
        assert actual, f"{title}: {example}"
        assert actual <= files, f"{title}: {actual - files}"


def test_every_list_is_followed():
    """The expression that reads the lists misses none of them."""
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## To add")[2]
    assert len(ADDITIONS) == len(re.findall(r"^\*\*", page, re.MULTILINE)) >= 9


def test_results_are_what_was_recorded():
    """`bench/RESULTS.md` is what the harness writes from its records."""
    assert harness.RESULTS.read_text() == harness.written()


def test_constants_name_tables_that_are_there():
    """Every table of docs/experiments.md that effort.py names is a heading there."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    headings = set(re.findall(r"^##+ (.*)$", page, re.MULTILINE))
    comments = re.findall(r"^# (.*)$", (PACKAGE / "moetuner/solver/effort.py").read_text(), re.M)
    named = set(re.findall(r'"([A-Z][^"]*)"', " ".join(comments)))
    assert len(named) >= 12
    assert named <= headings, named - headings
