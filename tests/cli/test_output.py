"""What is shown while something takes long: on a screen, and in a log."""

import io

import pytest
from rich.console import Console

from moetuner.cli import output
from moetuner.solver import Progress


@pytest.fixture
def screen(monkeypatch):
    """Give what a terminal, or a log, is sent."""
    file = io.StringIO()

    def console(*, terminal):
        monkeypatch.setattr(
            output, "Console", lambda **_: Console(file=file, force_terminal=terminal, width=200)
        )
        return file

    return console


def test_a_terminal_sees_best_bound_gap_and_time(screen):
    """The line is drawn anew, and gone in the end."""
    file = screen(terminal=True)
    with output.working("solving, joint") as report:
        report(Progress(2.0, "search", 0.5))
        report(Progress(3.0, "bound", 0.5, 0.25))
    text = file.getvalue()
    assert "solving, joint: 3 s, bound, best 0.5, bound 0.25, gap 50.0 %" in text
    assert text.endswith("\x1b[2K")


def test_a_log_gets_a_line_now_and_then(screen, monkeypatch):
    """At once only where little time passed; without marks of a terminal."""
    file = screen(terminal=False)
    with output.working("solving, joint") as report:
        report(Progress(2.0, "search", 0.5))
    assert file.getvalue() == ""
    monkeypatch.setattr(output, "INTERVAL_S", 0.0)
    with output.working("solving, joint") as report:
        report(Progress(12.4, "bound", 0.5, 0.25))
        output.timed(report, str)("split 1 of 3: counting")
    line = "moetuner: solving, joint: {} s, {}\n"
    bound = line.format(12, "bound, best 0.5, bound 0.25, gap 50.0 %")
    assert file.getvalue() == bound + line.format(0, "split 1 of 3: counting")
