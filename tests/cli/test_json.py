"""What ``--json`` writes is what docs/json.md says: every key, there and here, with its type."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.cli import moetuner

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
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
COMMANDS = {
    "convert": [
        "trace.safetensors newer.safetensors --out both.safetensors",
        "load.npz --out loads.safetensors",
    ],
    "inspect": ["trace.safetensors --for vllm", "load.npz"],
    "advise": ["trace.safetensors --devices 4 --copies 0 --splits 1 --by-group"],
    "solve": [
        "trace.safetensors --devices 4 --objective traffic --max-imbalance 2 "
        "--certificate proof.json --out other.json",
        "trace.safetensors --devices 4 --holdout 0.5 --initial other.json --pareto "
        "--out placement.json",
        "load.npz --devices 3 --slots-per-device 4 --method lpt --out copies.json",
    ],
    "compare": ["trace.safetensors --devices 4 --methods contiguous,lpt --splits 2"],
    "evaluate": [
        "placement.json trace.safetensors --waterfill 1",
        "placement.json trace.safetensors --by-group",
        "copies.json load.npz --report page.html",
    ],
    "drift": ["placement.json newer.safetensors --profile trace.safetensors"],
    "plan": [
        "copies.json load.npz --with 1 --out more.json",
        "copies.json load.npz --every-loss device --table losses.json",
    ],
    "inspect PLACEMENT": ["placement.json"],
    "inspect BEFORE AFTER": ["other.json placement.json --expert-bytes 10"],
    "export": [
        "empty.json --to eplb --out experts.npz",
        "--check experts.npz",
        "trace.safetensors --to ktransformers --gpu-experts 2 --dense-layers none --out kt.pt",
    ],
    "fit": ["--hidden 64 --times times.csv --out model.json"],
    "verify": ["proof.json trace.safetensors --devices 4 --placement other.json"],
    "demo": ["--out demo"],
}


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


@pytest.fixture
def folder(make_trace, brief, tmp_path, monkeypatch):
    """Folder with what the commands read."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("trace", "newer")):
        make_trace(800, seed=seed).save(f"{name}.safetensors")
    load = np.random.default_rng(0).integers(1, 100, (6, 3, 8))
    np.savez("load.npz", load=load, group=np.arange(6) % 2, group_names=np.array(["a", "b"]))
    mt.Placement([[[0, 1, -1], [2, 3, -1]]]).save("empty.json")
    rows = [(t, e, max(10 + 5 * e, 12 + t)) for t in (1, 9, 99, 300, 900) for e in (1, 4, 8)]
    Path("times.csv").write_text("".join(f"{t},{e},{us}\n" for t, e, us in rows if e <= t))


def test_json_is_as_its_page_says(run, folder):
    """Every key that a command writes is on the page with its type, and every key there comes."""
    shown = {name for name, command in moetuner.commands.items() if not command.hidden}
    assert {*(section.split()[0] for section in COMMANDS), "collect"} == shown
    seen = {}
    for section, lines in COMMANDS.items():
        command = section.split()[0]
        for line in lines:
            status, out, err = run(command, *line.split(), "--json", "-")
            assert status == 0, err
            actual = json.loads(out)
            assert next(iter(actual.items())) == ("schema", f"moetuner.{command}/1")
            check_keys(actual, section, line, seen)
    for section, keys in seen.items():
        assert keys_of(section).keys() == keys, section
    # What needs a model to run has its section; every other section was seen.
    inner = {name for name in TYPES if "*" in TYPES[name]}
    assert TYPES.keys() - seen.keys() <= {"collect", "Types", *inner}
