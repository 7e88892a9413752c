"""What is shown while something takes long: on a screen, and in a log."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import moetuner
from moetuner import cli
from moetuner.cli import advise, options, output
from moetuner.cli.output import working
from moetuner.report.findings import Finding
from moetuner.solver import Progress


@pytest.fixture
def screen(monkeypatch):
    """Give what a terminal, or a log, is sent, while the clock stands still."""
    file = io.StringIO()
    monkeypatch.setattr(output, "FIRST_S", 3600.0)
    monkeypatch.setattr(output, "BEAT_S", 3600.0)
    monkeypatch.setattr("moetuner.cli.streams.last_line_time", None)
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def console(*, terminal):
        how = {"force_terminal": terminal, "width": 200, "get_time": lambda: 0.0}
        monkeypatch.setattr(output, "Console", lambda **_: Console(file=file, **how))
        return file

    return console


def test_a_terminal_sees_what_is_done_and_what_is_left(screen, monkeypatch):
    """One line, drawn anew and gone in the end: a bar with the share, or best, bound and gap."""
    monkeypatch.setattr(output, "FIRST_S", 0.0)
    for limit, words in ((4.0, "75 %, about 4 s left"), (None, "0 s")):
        file = screen(terminal=True)
        with output.working("solving, joint", time_limit=limit) as report:
            report(Progress(3.0, "bound", 0.5, 0.25))
        text = file.getvalue()
        assert "solving, joint " in text
        assert f"{words} bound, best 0.5 (seen), bound 0.25, gap 50.0 %" in text
        assert text.endswith("\x1b[2K")


def test_what_is_done_at_once_shows_nothing_on_a_terminal(screen):
    """A bar is for what takes a second."""
    file = screen(terminal=True)
    with output.working("counting") as report:
        output.show_shares(report, "of the tokens", then="figures")(0.5)
    assert file.getvalue() == ""


def test_what_is_read_is_not_all_that_is_done(screen, monkeypatch):
    """Once all tokens are read no line says that nothing is left."""
    file = screen(terminal=False)
    monkeypatch.setattr(output, "INTERVAL_S", 0.0)
    with output.working("replaying") as report:
        for share in (0.5, 1.0):
            output.show_shares(report, "of the tokens", then="figures")(share)
    half, all_read = file.getvalue().splitlines()
    assert "50 % of the tokens, about" in half
    assert all_read == "moetuner: replaying: 0 s, figures"


def test_a_log_gets_a_line_now_and_then(screen, monkeypatch):
    """At once only where little time passed; without marks of a terminal."""
    file = screen(terminal=False)
    with output.working("solving, joint") as report:
        report(Progress(2.0, "search", 0.5))
    assert file.getvalue() == ""
    monkeypatch.setattr(output, "INTERVAL_S", 0.0)
    with output.working("solving, joint") as report:
        report(Progress(12.4, "bound", 0.5, 0.25))
        step = output.show_steps(report, (1.0, 3.0))
        for name in ("counting", "solving", "judging"):
            step(name)
    line = "moetuner: solving, joint: {}, {}\n"
    bound = line.format("12 s", "bound, best 0.5 (seen), bound 0.25, gap 50.0 %")
    counting, *others = file.getvalue().removeprefix(bound).splitlines()
    assert counting == line.format("0 s", "counting").strip()
    assert [text.split(": ")[-1].split(" %")[0] for text in others] == ["25", "25"]


def test_a_log_hears_that_work_goes_on(screen, monkeypatch):
    """What was said last is said again after ten seconds, with what is left of the time by then.

    Ten seconds later at the earliest, whichever work goes on.
    """
    file, clock = screen(terminal=False), [0.0]
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with output.working("advising") as report:
        for clock[0] in (1.0, 9.9, 10.0, 10.5):
            report.beat()
        report.show("searching", 0.25)
        for clock[0] in (19.9, 20.0, 29.9):
            report.beat()
        with output.working("counting") as other:
            other.beat()
            for clock[0] in (30.0, 39.9):
                other.beat()
                report.beat()
    assert file.getvalue().splitlines() == [
        "moetuner: advising: 10 s",
        "moetuner: advising: 25 %, about 22 s left, searching",
        "moetuner: counting: 0 s",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_no_progress(screen, monkeypatch, terminal):
    """Neither a bar nor a line, however long it takes."""
    file = screen(terminal=terminal)
    monkeypatch.setattr(output, "FIRST_S", 0.0)
    monkeypatch.setattr(output, "INTERVAL_S", 0.0)

    @options.command("wait")
    def wait(*, output: output.Output) -> None:
        with working("counting") as report:
            report.begin()
            report.show("half", 0.5)
            report.beat()

    for words in ([], ["-q"], ["--quiet"]):
        wait.main(words, standalone_mode=False)
        assert (file.getvalue() == "") == bool(words)
        file.seek(0)
        file.truncate()


@pytest.mark.parametrize("copies", [(0,), (0, 1), (0, 1, 2, 4)])
@pytest.mark.usefixtures("brief")
def test_each_step_of_advice_has_its_weight(copies):
    """What is searched, and every split, is one step, in the order of the weights."""
    load = np.tile([[[90, 80, 5, 5, 5, 5, 5, 5]]], (40, 1, 1))
    table, said = moetuner.RoutingStatistics.from_load(1000 * load), []
    moetuner.advise(table, moetuner.Topology(4), copies=copies, splits=2, progress=said.append)
    searches = sum("searching" in text for text in said)
    weights = advise._weigh_steps(table, searches, 2)
    assert len(said) <= len(weights)
    told = dict(zip(said, weights, strict=False))
    solving = [told[f"split {number} of 2: solving and judging"] for number in (1, 2)]
    others = [weight for text, weight in told.items() if text.startswith(("search", "count"))]
    replaying = told.get("replaying them on unseen traffic", 0.0)
    assert solving[0] == solving[1] > max(*others, replaying)


SENTENCE = "Worth a trial: a layer takes 9.4 % less predicted time than with the contiguous one."


@pytest.mark.parametrize("columns", [30, 50])
def test_sentences_fit_a_terminal_and_commands_and_tables_stay_whole(columns, monkeypatch, capsys):
    """A pipe gets whole lines without colours; NO_COLOR takes the verdict's away."""
    monkeypatch.setenv("COLUMNS", str(columns))
    command = "  moetuner solve trace.safetensors --devices 4 --out placement.json"

    def printed():
        of = output.Output()
        of.verdict(Finding("one device", forces="worth a trial"), SENTENCE)
        of.say(f"- {SENTENCE}", command)
        of.table(["a" * 40], [["b" * 59]])
        return capsys.readouterr().out.splitlines()

    whole = printed()
    assert whole[:4] == [SENTENCE, f"- {SENTENCE}", command, "a" * 40 + " " * 19]
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = printed()
    assert coloured[0].startswith("\x1b[32mWorth a trial\x1b[0m: ")
    monkeypatch.setenv("NO_COLOR", "1")
    *rows, last, _, cell = printed()
    assert (last, cell) == (command, "b" * 59)
    assert max(map(len, rows)) <= columns
    assert " ".join(row.strip() for row in rows) == f"{SENTENCE} - {SENTENCE}"
    assert {row[:2] for row in rows[len(rows) // 2 + 1 :]} == {"  "}


@pytest.mark.parametrize("columns", [40, 59, 79])
def test_what_belongs_together_stays_on_one_line(monkeypatch, capsys, columns):
    """Wherever a terminal ends its lines: options with their values, numbers with their units."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    text = "A layer takes 20.2 % less time, 1,245.1 to 993.0 us (95 % interval 19.9 to 20.6 %)."
    moved = "To move: 35.2 GB of 90.2 GB, at least 326 ms, or 1.5 s; a step has 512 tokens."
    option = "--move-budget 4359979008)."
    for letters in range(1, 30):
        said = f"{'x' * letters} {text} {moved} Moving 4.36 GB gains 20.7 % (solve {option}"
        output.Output().say(said)
        rows = capsys.readouterr().out.splitlines()
        assert " ".join(rows) == said
        assert any(option in row for row in rows)
        assert not any(re.match(r"%|us|ms|s\b|GB", row) for row in rows)
        assert max(map(len, rows)) <= columns


@pytest.mark.parametrize(("columns", "width"), [(80, 77), (81, 77), (82, 82), (200, 82)])
def test_columns_are_closer_where_a_terminal_is_narrow(monkeypatch, capsys, columns, width):
    """A table of six columns that needs 82 takes 77 on a terminal of 80."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.Output().table(["a" * 12] * 6, [["b"] * 6])
    rows = [re.sub(r"\x1b\[\d*m", "", row).rstrip() for row in capsys.readouterr().out.splitlines()]
    assert [len(row) for row in rows] == [width] * 2


@pytest.mark.usefixtures("brief")
def test_advice_takes_26_lines_of_100_columns(monkeypatch, capsys):
    """Verdict, phases, reasons, one table without empty columns, and next steps, of two nodes."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    trace = Path(moetuner.__file__).parent / "data" / "small-moe.safetensors"
    words = [
        "advise",
        str(trace),
        "--devices",
        "8",
        "--devices-per-node",
        "4",
        "--splits",
        "1",
        "--copies",
        "0",
    ]
    cli.moetuner.main(words, standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 26
    commands = next(n for n, line in enumerate(lines) if line.startswith("Next: "))
    said = [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in lines[:commands]]
    assert [line for line in said if len(line) > 100] == []
    assert not any(cell == "-" for line in said for cell in line.split("  ")[1:])
    assert lines[commands + 1].startswith("  moetuner solve ")
    remarks = [number for number, line in enumerate(lines) if line.startswith("  # ")][:-1]
    assert all(lines[number + 1].startswith("  moetuner ") for number in remarks)


# Sizes whose multiples have more digits than six.
@pytest.mark.parametrize("size", [None, 44040189])
@pytest.mark.usefixtures("brief")
def test_few_moves_have_a_command_with_their_budget(as_json, tmp_path, size):
    """The command of the cheapest useful step has the number of the JSON, digit by digit."""
    random = np.random.default_rng(0)
    share = random.lognormal(0, 1, 16)
    file = tmp_path / "load.npz"
    np.savez(file, load=random.multinomial(20_000, share / share.sum(), (40, 2)))
    words = ["advise", file, "--devices", 4, "--copies", 0, "--splits", 1]
    words += [] if size is None else ["--expert-bytes", size]
    advice = as_json(*words)
    step = advice["step"]
    budget = step["experts"] if size is None else int(step["bytes"])
    assert any(f"--move-budget {budget} " in command for command in advice["commands"])
