"""What ``--json`` writes is what docs/json.md says: every key, there and here, with its type."""

import json
import re
from pathlib import Path

from moetuner.cli import moetuner

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
PAGES = Path(__file__).parents[1] / "transcripts"
KINDS = {
    "string": (str,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "list": (list,), "map": (dict,), "object": (dict,),
}  # fmt: skip


def sections():
    """Read the types of the page: of every section its keys, each with its type."""
    read = {}
    for text in re.split(r"^###? ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", text, re.MULTILINE)
        keys = [(re.findall("`([^`]+)`", names), kind.replace("*", "")) for names, kind in rows]
        # A command and a type may have one name: commands come first.
        name = text.split("\n")[0]
        read[f"type {name}" if "Types" in read else name] = {
            key: kind for names, kind in keys for key in names
        }
    return read


TYPES = sections()
# A command with ``--json -`` in a transcript, and what it prints.
SHOWN = re.compile(r"^\$ moetuner ([a-z]+)(.*) --json -(.*)\n((?:(?!\$ |```).*\n)*)", re.MULTILINE)


def shown():
    """Yield the section, the line and the JSON of every command of the transcripts that has one."""
    for page in sorted(PAGES.glob("*.md")):
        for command, before, after, output in SHOWN.findall(page.read_text()):
            files = sum(word.endswith(".json") for word in before.split())
            kind = ("", " PLACEMENT", " BEFORE AFTER")[files] if command == "inspect" else ""
            lines = [line for line in output.split("\n") if not re.match("2> |exit status", line)]
            text = "\n".join(lines).replace(": SECONDS", ": 0.1")
            yield f"{command}{kind}", f"{command}{before}{after}", json.loads(text)


def keys_of(section):
    """Return the keys of a section, and those of sections that it has all keys of."""
    own = dict(TYPES[section])
    return (keys_of(f"type {own.pop('*')}") if "*" in own else {}) | own


def check(value, kind, where, seen):
    """Hold a value against a type of the page, and note the keys of every section."""
    kinds = [each.partition(" of ") for each in kind.split(" or ")]
    fitting = [of for of in kinds if type(value) in KINDS.get(of[0], (dict,))]
    assert fitting, f"{where}: {value!r:.80} is no {kind}"
    first, _, inner = fitting[0]
    if first not in KINDS:
        check_keys(value, f"type {first}", where, seen)
    elif inner:
        for name, each in value.items() if first == "map" else enumerate(value):
            check(each, inner, f"{where}.{name}", seen)


def check_keys(value, section, where, seen):
    """Hold an object against a section."""
    keys = keys_of(section)
    assert value.keys() <= keys.keys(), f"{where}: {value.keys() - keys.keys()} of {section}"
    seen.setdefault(section, set()).update(value)
    for key, each in value.items():
        check(each, keys[key], f"{where}.{key}", seen)


def test_json_is_as_its_page_says(as_json, brief, tmp_path):
    """Every key that a command writes is on the page with its type, and every key there comes.

    Commands are those of the transcripts, and the demo, whose answers HiGHS decides.
    """
    seen = {}
    demo = as_json("demo", "--out", tmp_path / "demo")
    for section, line, actual in [*shown(), ("demo", "demo", demo)]:
        command = section.split()[0]
        assert next(iter(actual.items())) == ("schema", f"moetuner.{command}/1")
        check_keys(actual, section, line, seen)
    for section, keys in seen.items():
        assert keys_of(section).keys() == keys, section
    commands = {*moetuner.commands}
    assert {section.split()[0] for section in seen if not section.startswith("type ")} == commands
    inner = {name for name in TYPES if "*" in TYPES[name]}
    assert TYPES.keys() - seen.keys() <= {"Types", *inner}
