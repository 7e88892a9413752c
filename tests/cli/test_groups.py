"""--group-by: groups for INPUT that brings none."""

import json
from pathlib import Path

import numpy as np
import pytest
from engines_files import vllm_response
from make import trace_of

import moetuner as mt

pytestmark = pytest.mark.usefixtures("brief")


@pytest.fixture
def load():
    """Draw loads of 40 windows."""
    return np.random.default_rng(0).poisson(500, (40, 2, 8)) * (1 + np.arange(8) % 4)


@pytest.mark.parametrize(
    ("names", "column", "words"),
    [
        ("id,kind,kind\n1,a,b\n", ":kind", "must have one column kind, got columns id, kind, ki"),
        ("id,kind\n0,a\n1,b,c\n", ":kind", "names.csv: line 3 must have 2 cells, got 3"),
        ('id,kind\n0,"a\nb"\n1,\n', ":kind", "names.csv: line 4 must have a name of a group"),
        ('id,kind\n0,"a\n', ":kind", "names.csv: line 2 must be CSV: unexpected end of data"),
        (f"id,kind\n0,{'a' * 140_000}\n", ":kind", "names.csv: line 2 must be CSV: field larger"),
        ("id,kind\n0,\udcff\n", ":kind", "names.csv: 'utf-8' codec can't decode"),
    ],
)
def test_names_that_fit_nothing_are_refused(run, load, tmp_path, names, column, words):
    """One line with what is there; tests/transcripts/refusals.md has others."""
    table, file = tmp_path / "load.npz", tmp_path / "names.csv"
    np.savez(table, load=load)
    file.write_text(names, encoding="utf-8", errors="surrogateescape")
    status, out, err = run("inspect", table, "--devices", 4, "--group-by", f"{file}{column}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize("change", ["none", "other traffic"])
def test_a_placement_remembers_its_groups(ok, as_json, load, tmp_path, monkeypatch, change):
    """Groups that --group-by named come back with the placement, for the same traffic alone."""
    monkeypatch.chdir(tmp_path)
    names = tmp_path / "names.txt"
    np.savez("load.npz", load=load)
    names.write_text("code\nprose\n" * 20)
    ok("solve", "load.npz", "--devices", 4, "--group-by", names, "--out", "placed.json")
    if change == "other traffic":
        np.savez("load.npz", load=load[:30])
    judged = as_json("evaluate", "placed.json", "load.npz")
    expected = ["code", "prose"] if change == "none" else []
    assert judged["input"]["group_names"] == expected


@pytest.mark.parametrize("place", ["beside the placement", "nowhere"])
def test_names_are_looked_for_beside_the_placement(
    run, as_json, load, tmp_path, monkeypatch, place
):
    """From another folder they are found, or it is said that they are gone, and a gate fails."""
    home, other = tmp_path / "home", tmp_path / "cron"
    home.mkdir()
    other.mkdir()
    monkeypatch.chdir(home)
    np.savez("load.npz", load=load)
    Path("names.txt").write_text("code\nprose\n" * 20)
    solving = ("solve", "load.npz", "--devices", 4, "--group-by", "names.txt", "--holdout", 0.5)
    assert run(*solving, "--out", "placed.json")[0] == 0
    monkeypatch.chdir(other)
    if place == "nowhere":
        (home / "names.txt").unlink()
    files = ("../home/placed.json", "../home/load.npz")
    named = as_json("evaluate", *files)["input"]["group_names"]
    assert named == ([] if place == "nowhere" else ["code", "prose"])
    said = "names.txt, which names the groups of INPUT, is neither here nor beside placed.json"
    assert (said in run("evaluate", *files)[1]) == (place == "nowhere")
    status, _, err = run("evaluate", *files, "--fail-if-worse", 50)
    assert (status, said in err) == ((2, True) if place == "nowhere" else (0, False))


def test_a_held_out_part_that_is_not_found_has_its_reason(ok, tmp_path, monkeypatch):
    """Groups that follow one another are held out one by one: without names the part is lost."""
    monkeypatch.chdir(tmp_path)
    likes = np.repeat(np.stack([np.linspace(2, 0, 8), np.linspace(0, 2, 8)]), 20, axis=0)
    load = np.random.default_rng(0).poisson(1000 * np.exp(likes), (2, 40, 8)).swapaxes(0, 1)
    np.savez("load.npz", load=load)
    names = Path("names.txt")
    names.write_text("code\n" * 20 + "prose\n" * 20)
    ok(
        "solve",
        "load.npz",
        "--devices",
        4,
        "--group-by",
        names,
        "--holdout",
        0.5,
        "--out",
        "p.json",
    )
    assert "which were held out when the placement was computed" in ok(
        "evaluate", "p.json", "load.npz"
    )
    names.unlink()
    unknown = "Judged on all of INPUT: names.txt is not here, so the held-out part is not known."
    assert unknown in ok("evaluate", "p.json", "load.npz").splitlines()
    # Of other traffic nothing was held out.
    np.savez("newer.npz", load=load[:30])
    assert unknown not in ok("evaluate", "p.json", "newer.npz")


def test_files_of_one_name_are_groups_of_their_own(as_json, load, tmp_path):
    """Their endings, or their folders, tell them apart."""
    for folder in ("code", "prose"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "load.npz", load=load)
    files = [tmp_path / folder / "load.npz" for folder in ("code", "prose")]
    named = as_json("inspect", *files, "--devices", 4, "--group-by", "files")
    assert named["input"]["group_names"] == [str(path) for path in files]


def test_a_window_that_is_not_full_has_a_name(as_json, tmp_path):
    """Of a trace without sequences every window is named, with the last tokens, which fill none."""
    trace, names = tmp_path / "trace.safetensors", tmp_path / "names.txt"
    trace_of(np.random.default_rng(0).random((1200, 2, 8)).argsort(axis=2)[..., :2]).save(trace)
    names.write_text("code\nchat\ncode\n")
    shares = as_json("inspect", trace, "--devices", 4, "--group-by", names)["group_share"]
    assert shares == pytest.approx({"code": (1200 - 512) / 1200, "chat": 512 / 1200})


def test_shares_of_groups_add_up(as_json, tmp_path):
    """Also where halves of a trace without sequences leave out what is between them."""
    ids = np.random.default_rng(0).random((3000, 2, 8)).argsort(axis=2)[..., :2]
    trace = tmp_path / "trace.safetensors"
    group = np.arange(3000) // 1000 % 2
    trace_of(ids, group=group, group_names=["code", "chat"]).save(trace)
    shares = as_json("inspect", trace, "--devices", 4)["group_share"]
    assert shares == pytest.approx({"code": 2 / 3, "chat": 1 / 3})


@pytest.mark.parametrize("command", ["evaluate", "evaluate --report page.html", "drift"])
def test_a_placement_remembers_how_its_input_is_read(ok, as_json, tmp_path, monkeypatch, command):
    """An array of ids does not say how many experts there are; the placement's file does then."""
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).random((16_000, 2, 7)).argsort(axis=2)[..., :2]
    np.save("ids.npy", ids)
    ok("solve", "ids.npy", "--devices", 4, "--num-experts", 8, "--out", "placed.json")
    command, *page = command.split()
    read = as_json(command, "placed.json", "ids.npy", *page)["input"]
    assert (read["num_experts"], read["tokens"]) == (8, 16_000)


def write_responses(path, names):
    """Write a response of vLLM with two tokens for each request, named or not."""
    random = np.random.default_rng(0)
    for number, name in enumerate(names):
        ids = random.random((2, 3, 8)).argsort(axis=2)[..., :2].astype(np.uint8)
        ids[:, 0] = 0
        response = json.dumps(vllm_response(ids + (ids.sum() == 0), id=name))
        with path.open("a" if number else "w") as file:
            file.write(response + "\n")


@pytest.mark.parametrize("prefix", ["", "cmpl-", "chatcmpl-"])
def test_requests_are_found_by_their_names(as_json, tmp_path, prefix):
    """Responses come in any order, and the table of names may hold others too."""
    names, path = [f"r{number}" for number in range(12)], tmp_path / "responses.jsonl"
    write_responses(path, [prefix + name for name in reversed(names)])
    table = tmp_path / "requests.csv"
    rows = [f"{name},{'code' if number < 3 else 'prose'}" for number, name in enumerate(names)]
    table.write_text("\n".join(["request_id,kind", "other,none", *rows]) + "\n")
    words = ["--num-experts", 8, "--devices", 4, "--group-by", f"{table}:kind"]
    assert as_json("inspect", path, *words)["input"]["group_names"] == ["prose", "code"]
    kinds = dict(row.split(",") for row in rows)
    trace = mt.open_input(path, num_experts=8, groups=kinds)
    assert [trace.group_names[group] for group in trace.group] == ["prose"] * 18 + ["code"] * 6


def test_a_request_may_have_two_lines(as_json, tmp_path):
    """They agree; where INPUT names no requests ids are of something else, and do not matter."""
    path, table = tmp_path / "responses.jsonl", tmp_path / "requests.csv"
    write_responses(path, ["r0", "r1"])
    words = ["--num-experts", 8, "--devices", 4, "--group-by", f"{table}:kind"]
    table.write_text("id,kind\nr0,code\nr1,prose\nr0,code\n")
    assert as_json("inspect", path, *words)["input"]["group_names"] == ["code", "prose"]
    table.write_text("id,kind\nr0,code\nr0,prose\nr1,code\n")
    write_responses(path, ["", "", ""])
    assert as_json("inspect", path, *words)["input"]["group_names"] == ["code", "prose"]
